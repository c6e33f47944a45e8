"""Logging setup for the notebook and scripts; the library itself never calls it."""

from __future__ import annotations

import logging
import warnings

from src.utils.errors import visible

_NOISY = ("httpx", "urllib3", "filelock", "matplotlib", "fsspec", "numba")


class _SafeFormatter(logging.Formatter):
    """Shows control characters as escapes and indents further lines: no name can write a line of the log."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n    ".join(visible(line) for line in super().format(record).split("\n"))


def setup_logging(level: int | str = logging.INFO) -> None:
    """Log to standard error with time and module; safe to call again.

    Uses `force=True`, because Colab installs a root handler of its own that would otherwise swallow every line.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*loss_type=None.*")
