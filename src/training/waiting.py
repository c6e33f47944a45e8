"""How long the trainer waits for data: whether more workers, or a decoded cache, would make it faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class WaitMeter:
    """Splits wall time into waiting for the next item of an iterable, and everything else.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waited_sec = 0.0
        self._began_sec = clock()
        self._lap = (self._began_sec, 0.0)  # when the lap began, and the waiting until then

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; the time until each of them comes, and until they end, is waiting."""
        iterator = iter(items)
        while True:
            asked_sec = self._clock()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waited_sec += self._clock() - asked_sec
            yield item

    def lap(self) -> float:
        """Return the share of waiting, 0 to 1, since the last lap, and begin the next."""
        now_sec = self._clock()
        began_sec, waited_sec = self._lap
        self._lap = (now_sec, self._waited_sec)
        return _share(self._waited_sec - waited_sec, now_sec - began_sec)

    def total(self) -> float:
        """Return the share of waiting, 0 to 1, since the meter was made."""
        return _share(self._waited_sec, self._clock() - self._began_sec)


def _share(waited_sec: float, whole_sec: float) -> float:
    return waited_sec / whole_sec if whole_sec else 0.0
