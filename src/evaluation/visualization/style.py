"""Style of a run's figures: models, texts of any script and missing values."""

from __future__ import annotations

import functools
import itertools
import math
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
import regex
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import SubFigure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from src.evaluation.report.run_files import STOCK
from src.evaluation.report.summary import on_circle
from src.utils.figures import BLUE, FIGURE_STYLE, GREEN, GREY, ORANGE, NotebookFigure
from src.utils.languages import graphemes

# DejaVu Sans comes with matplotlib: Latin, Greek, Cyrillic, Armenian, Georgian, Hebrew and Arabic letters. Others are
# used if they are installed; Debian's packages fonts-noto-cjk and fonts-noto-core have all of Whisper's scripts.
FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "WenQuanYi Zen Hei", "Microsoft YaHei", "Malgun Gothic", "PingFang SC", "Hiragino Sans GB", "Apple SD Gothic Neo",
    *(f"Noto Sans {script}" for script in (
        "Devanagari", "Bengali", "Tamil", "Telugu", "Kannada", "Malayalam", "Gujarati", "Gurmukhi", "Sinhala", "Thai",
        "Lao", "Khmer", "Myanmar", "Ethiopic", "Arabic", "Hebrew", "Armenian", "Georgian",
    )),
    "Noto Serif Tibetan", "Nirmala UI", "Leelawadee UI", "Myanmar Text", "Ebrima", "FreeSans", "Arial Unicode MS",
)  # fmt: skip
MAX_CHARS = 24
_ORDERS_LETTERS = matplotlib.__version_info__ >= (3, 11)  # of any script
_JOINERS = "\u200c\u200d"
_TWO_SIDED = regex.compile(r"\p{InPC=Left_And_Right}")
_LEFT_VOWEL = regex.compile(
    r"((?:\p{L}[[\p{InSC=Virama}\p{InSC=Invisible_Stacker}]--[\u0BCD\u0DCA]])*\p{L}\p{M}*?)(\p{InPC=Left}+)", regex.V1
)


@dataclass(frozen=True)
class ModelStyle:
    """Style of a model in figures: it differs from others by colour, and without colour by marker, line and hatch."""

    color: str
    marker: str
    line: str
    hatch: str


STOCK_STYLE = ModelStyle(GREY, "s", "--", "")
OTHER_STYLES = ModelStyle(BLUE, "o", "-", "//"), ModelStyle(ORANGE, "^", "-.", ".."), ModelStyle(GREEN, "D", ":", "xx")


def styles_of(names: Iterable[str]) -> dict[str, ModelStyle]:
    """Give each model a style; the stock model has the same one in every figure."""
    others = itertools.cycle(OTHER_STYLES)
    return {name: STOCK_STYLE if name == STOCK else next(others) for name in names}


@contextmanager
def new_figure(
    width: float, height: float, caption: str = "", *, on: SubFigure | None = None, layout: Any = "constrained",
    **changes: Any,
) -> Iterator[NotebookFigure]:  # fmt: skip
    """Give a figure of a size in inches, to draw in with `FIGURE_STYLE`, fonts of many scripts, and changed settings.

    With `on`, a part of a page is drawn on instead, which has its own size. The caption is below.
    """
    with matplotlib.rc_context({**FIGURE_STYLE, "font.family": list(_fonts()), **changes}):
        figure = NotebookFigure(figsize=(width, height), layout=layout) if on is None else cast(NotebookFigure, on)
        if caption:
            figure.supxlabel(caption, fontsize=8, color=GREY)
        yield figure


def gap(value: Any) -> float:
    """Return nan for None: a missing value leaves a gap, never a zero."""
    return math.nan if value is None else float(value)


def annotate(axes: Axes, text: str, point: tuple[float, float], shift: tuple[float, float], **style: Any) -> None:
    """Write a text at a shift in points from a place of the panel."""
    axes.annotate(text, point, shift, textcoords="offset points", **style)


def mark_powers(axis: Axis) -> None:
    """Mark a logarithmic axis at 1, 2, 5, 10, ... with plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def show_note(axes: Axes, text: str) -> None:
    """Write a text into a panel that has nothing to draw."""
    axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])


def drawable(text: str, *, max_chars: int = MAX_CHARS) -> str:
    r"""Return a text that draws on one line, without a missing glyph and not as a formula.

    A character that no installed font has is written as its code, such as `\u4f60`, so that nothing disappears. A long
    text loses its middle, since identifiers often differ at the end only. A combining mark alone stands on a dotted
    circle. In an SVG file whose text stays text ("svg.fonttype" is "none"), the viewer has fonts, and orders and joins
    letters itself.
    """
    line = on_circle(" ".join(text.split()))
    if len(characters := graphemes(line)) > max_chars:
        tail = max_chars // 3
        head, end = "".join(characters[: max_chars - tail - 1]), "".join(characters[-tail:])
        line = f"{head.rstrip()}…{end.lstrip()}"
    if matplotlib.rcParams["svg.fonttype"] == "none":
        return "".join(r"\$" if c == "$" else c if c.isprintable() or c in _JOINERS else _code(c) for c in line)
    if not _ORDERS_LETTERS:
        line = _in_visual_order(line)
    # two dollars would begin and end a formula
    return "".join(
        r"\$" if char == "$" else char if char.isprintable() and _has_glyph(char, _fonts()) else _code(char)
        for char in line if char not in _JOINERS
    )  # fmt: skip


def _code(char: str) -> str:
    return char.encode("unicode_escape").decode()


@functools.cache
def _fonts() -> tuple[str, ...]:
    installed = {font.name for font in fontManager.ttflist}
    return tuple(name for name in FONTS if name in installed)


@functools.lru_cache(maxsize=4096)
def _has_glyph(char: str, fonts: tuple[str, ...]) -> bool:
    """Whether a font has it in both weights: titles are bold."""
    files = ([findfont(FontProperties(family=name, weight=each)) for each in ("normal", "bold")] for name in fonts)
    return any(all(get_font(file).get_char_index(ord(char)) for file in pair) for pair in files)


def _in_visual_order(line: str) -> str:
    """Order letters as they are seen, since matplotlib before 3.11 draws one after the other from left to right.

    Right-to-left words are reversed, with Arabic letters in their joined forms; one with digits stays as it is. Vowel
    signs that stand left of their consonants come before them.
    """
    parts: list[str] = []
    for reverse, words in itertools.groupby(line.split(" "), _is_right_to_left):
        parts += [_reverse(_join_letters(word)) for word in reversed(list(words))] if reverse else words
    split = _TWO_SIDED.sub(lambda match: unicodedata.normalize("NFD", match[0]), " ".join(parts))
    return str(_LEFT_VOWEL.sub(r"\2\1", split))


@functools.cache
def _arabic_forms() -> dict[str, dict[str, str]]:
    """Return the forms of each Arabic letter that Unicode lists: "<isolated>", "<initial>", "<medial>", "<final>"."""
    forms: dict[str, dict[str, str]] = {}
    for char in map(chr, (*range(0xFB50, 0xFBFF), *range(0xFE80, 0xFEF5))):
        form, _, letter = unicodedata.decomposition(char).partition(" ")
        if len(letter) == 4 and _has_glyph(char, _fonts()):
            forms.setdefault(chr(int(letter, 16)), {})[form] = char
    return forms


def _join_letters(word: str) -> str:
    """Replace Arabic letters by their forms: one joins the next if it has an initial form and the next a final one."""
    forms = _arabic_forms()
    letters = [i for i, char in enumerate(word) if not unicodedata.combining(char)]
    places = [forms.get(word[i], {}) for i in letters]
    joins = [False, *("<initial>" in a and "<final>" in b for a, b in itertools.pairwise(places)), False]
    joined = list(word)
    for i, own, (before, after) in zip(letters, places, itertools.pairwise(joins), strict=True):
        form = {(False, True): "<initial>", (True, True): "<medial>", (True, False): "<final>"}.get((before, after), "")
        joined[i] = own.get(form, word[i])
    return "".join(joined)


def _is_right_to_left(word: str) -> bool:
    kinds = {unicodedata.bidirectional(char) for char in word}
    return bool(kinds & {"R", "AL"}) and not kinds & {"L", "EN", "AN"}


def _reverse(word: str) -> str:
    """Reverse letters; a mark stays after the letter that carries it."""
    marks = itertools.accumulate(not unicodedata.combining(char) for char in word)
    letters = itertools.groupby(zip(word, marks, strict=True), key=lambda pair: pair[1])
    return "".join(reversed(["".join(char for char, _ in letter) for _, letter in letters]))
