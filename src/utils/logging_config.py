"""What is shown while work goes on: progress bars, and the log of the notebook and scripts."""

from __future__ import annotations

import logging
import threading
import warnings
from typing import Any, ClassVar
from weakref import WeakSet

from tqdm.auto import tqdm

from src.utils.errors import visible

_NOISY = ("httpx", "urllib3", "filelock", "matplotlib", "fsspec", "numba")


class _SafeFormatter(logging.Formatter):
    """Shows control characters as escapes and indents further lines: no name can write a line of the log."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n    ".join(visible(line) for line in super().format(record).split("\n"))


def setup_logging(level: int | str = logging.INFO) -> None:
    """Log to standard error with time and module; safe to call again. The library itself never calls this.

    Uses `force=True`, because Colab installs a root handler of its own that would otherwise swallow every line.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*loss_type=None.*")


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """A bar that may be interrupted at any moment.

    Ctrl-C while a bar of tqdm is drawn leaves the lock of all bars taken; the thread with which tqdm watches them then
    waits for it, and the process, at its end, for that thread. These have no such thread, and give their lock back.
    """

    monitor_interval = 0
    _instances: ClassVar[WeakSet[ProgressBar]] = WeakSet()  # the thread that watches other bars passes over these

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Draw the bar again."""
        with self.get_lock():
            super().refresh(nolock=True)


ProgressBar.set_lock(threading.RLock())
