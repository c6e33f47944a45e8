"""Captions while they are spoken: a notebook's output that is replaced in place, or one line of a terminal."""

from __future__ import annotations

import html
import secrets
import shutil
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from src.inference.captions import columns_of
from src.inference.streaming.commit import Event
from src.utils.languages import graphemes, is_unspaced_text
from src.utils.runtime import in_notebook

MAX_CHARS = 1_000  # of committed text on show; the transcript has all of it
MAX_UPDATES_PER_SEC = 8  # an update of a real microphone is up to three events, about twice a second
FAINT = 0.7  # opacity; the contrast stays above 4.5 (WCAG 2 AA) in the themes of Jupyter and Colab
CLEAR_LINE = "\r\x1b[K"
_SHAPING = "\u200b\u200c\u200d\u200e\u200f"  # Persian, Sinhala and Khmer need some of them; they move no other text


class LiveCaptions:
    """Shows the captions of a live session where it runs.

        with LiveCaptions() as live:
            asr.stream_from_microphone(30, on_event=live.show)

    Text that may still change is fainter. At most eight updates a second; the last state is always shown. Outside of a
    notebook they go to standard output: in place if it is a terminal, else only at the end.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._terminal = clock, sys.stdout
        self._in_notebook, self._display_id = in_notebook(), ""
        self._drawn_sec: deque[float] = deque(maxlen=MAX_UPDATES_PER_SEC)  # the newest updates
        self._committed, self._partial = "", ""  # text that stays, its newest `MAX_CHARS`; what may change, after it
        self._heard_sec, self._late = 0.0, ""

    def __enter__(self) -> Self:
        self._draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._draw(over=True)

    def show(self, event: Event) -> None:
        """Take an event, and show its effect unless there were too many updates."""
        self._heard_sec = event.audio_sec
        text = " " * (event.space and bool(self._committed)) + event.text
        if event.kind == "partial":
            self._partial = text
        elif event.kind == "commit":
            self._committed, self._partial = self._committed + text, ""
            if len(self._committed) > MAX_CHARS:  # from the beginning of a word where the script has spaces
                tail = self._committed[-MAX_CHARS:]
                word, _, rest = tail.partition(" ")
                self._committed = f"… {tail if not rest or is_unspaced_text(word) else rest}"
            late_sec = event.audio_sec - event.words[-1].end_sec
            self._late = f", the newest word committed {late_sec:.1f} s of audio after its end"
        now_sec = self._clock()
        if len(self._drawn_sec) < MAX_UPDATES_PER_SEC or now_sec - self._drawn_sec[0] >= 1.0:
            self._drawn_sec.append(now_sec)
            self._draw()

    def to_html(self, *, over: bool = False) -> str:
        """Return the captions for a notebook; text is escaped."""
        status = f"{'finished' if over else 'listening'}: {self._heard_sec:.1f} s heard{self._late}"
        return (
            '<div style="max-width: 60em; line-height: 1.5">'
            f'<div dir="auto" style="min-height: 1.5em">{html.escape(self._committed)}'
            f'<span style="opacity: {FAINT}; font-style: italic">{html.escape(self._partial)}</span></div>'
            f'<small style="opacity: {FAINT}">{status}</small></div>'
        )

    def to_text(self) -> str:
        """Return the captions for a terminal, on one line, without control characters."""
        return printable(self._committed + self._partial)

    def _draw(self, *, over: bool = False) -> None:
        text, in_place = self.to_text(), self._terminal.isatty()
        if self._in_notebook:
            from IPython.display import display

            shown = {"text/html": self.to_html(over=over), "text/plain": text}
            update, self._display_id = bool(self._display_id), self._display_id or secrets.token_hex(8)
            display(shown, raw=True, display_id=self._display_id, update=update)
        elif over:
            self._terminal.write(f"{CLEAR_LINE if in_place else ''}{text}\n")
        elif in_place:
            columns = shutil.get_terminal_size().columns - 1  # the last one may wrap
            self._terminal.write(CLEAR_LINE + _newest(text, columns))
            self._terminal.flush()


def printable(text: str) -> str:
    """Return a text without the characters that control a terminal or turn the direction of what follows."""
    return "".join(c for c in text if c.isprintable() or unicodedata.category(c) == "Zs" or c in _SHAPING)


def _newest(text: str, columns: int) -> str:
    """Return the end of a text that has room in a line of a terminal."""
    kept: list[str] = []
    for grapheme in reversed(graphemes(text)):
        columns -= columns_of(grapheme)
        if columns < 0:
            break
        kept.append(grapheme)
    return "".join(reversed(kept))
