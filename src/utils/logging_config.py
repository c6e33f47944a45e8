"""Logging setup for the notebook and scripts; the library itself never calls it."""

from __future__ import annotations

import logging
import warnings

_NOISY = ("httpx", "urllib3", "filelock", "matplotlib", "fsspec", "numba")


def setup_logging(level: int | str = logging.INFO) -> None:
    """Log to standard error with time and module; safe to call again.

    Uses `force=True`, because Colab installs a root handler of its own that would otherwise swallow every line.
    """
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", force=True
    )
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*loss_type=None.*")
