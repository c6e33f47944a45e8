"""Names and words from the data, made drawable: they come in any script, and a glyph that is missing is only a box.

DejaVu Sans comes with matplotlib and draws Latin, Greek, Cyrillic, Hebrew and Arabic letters. For others the fonts of
`FALLBACK_FONTS` that this machine has are asked; what none of them has is written as its code, `\\u4f60`, so that
nothing disappears.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from src.utils.figures import FIGURE_STYLE

MAIN_FONT = "DejaVu Sans"
FALLBACK_FONTS = (
    "Noto Sans CJK SC",  # `apt-get install fonts-noto-cjk`
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Sans Bengali",
    "Noto Sans Tamil",
    "Arial Unicode MS",
)
MAX_CHARS = 24
_JOINS_LETTERS = matplotlib.__version_info__ >= (3, 11)  # it puts right-to-left text in order by itself


def figure_style(changes: Mapping[str, Any] | None = None) -> AbstractContextManager[None]:
    """Return the context in which pictures with texts of the data are drawn: `FIGURE_STYLE`, its fonts, and changes."""
    return matplotlib.rc_context({**FIGURE_STYLE, "font.family": list(_fonts()), **(changes or {})})


def drawable(text: str, *, max_chars: int = MAX_CHARS) -> str:
    """Return a text that draws without a missing glyph, on one line and not as a formula.

    Args:
        max_chars: of the text; a longer one loses its middle: identifiers often differ at the end alone.
    """
    line = " ".join(text.split())
    if len(line) > max_chars:
        tail = max_chars // 3
        line = f"{line[: max_chars - tail - 1].rstrip()}…{line[-tail:].lstrip()}"
    if not _JOINS_LETTERS:
        line = _in_visual_order(line)
    return "".join(map(_drawn, line))


def _drawn(char: str) -> str:
    if char == "$":
        return r"\$"  # two of them would begin and end a formula
    if char.isprintable() and _has_glyph(char, _fonts()):
        return char
    return char.encode("unicode_escape").decode()


@functools.cache
def _fonts() -> tuple[str, ...]:
    installed = {font.name for font in fontManager.ttflist}
    return (MAIN_FONT, *(name for name in FALLBACK_FONTS if name in installed))


@functools.lru_cache(maxsize=4096)
def _has_glyph(char: str, fonts: tuple[str, ...]) -> bool:
    """Whether a font has it in both weights: titles are bold."""
    return any(
        all(get_font(findfont(FontProperties(family=name, weight=weight))).get_char_index(ord(char)) for weight in
            ("normal", "bold"))
        for name in fonts
    )  # fmt: skip


def _in_visual_order(line: str) -> str:
    """Turn right-to-left words round, as matplotlib before 3.11 draws every script from left to right.

    Its Arabic letters then stand in their order, though unjoined. A word with digits stays as it is.
    """
    parts: list[str] = []
    for turned, words in itertools.groupby(line.split(" "), _is_right_to_left):
        parts += [_turned(word) for word in reversed(list(words))] if turned else list(words)
    return " ".join(parts)


def _is_right_to_left(word: str) -> bool:
    kinds = {unicodedata.bidirectional(char) for char in word}
    return bool(kinds & {"R", "AL"}) and not kinds & {"L", "EN", "AN"}


def _turned(word: str) -> str:
    """Reverse letters; a mark stays after the letter that carries it."""
    letters: list[str] = []
    for char in word:
        if letters and unicodedata.combining(char):
            letters[-1] += char
        else:
            letters.append(char)
    return "".join(reversed(letters))
