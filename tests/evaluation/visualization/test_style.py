"""Texts of users draw without a warning, and nothing of them is lost."""

from __future__ import annotations

import matplotlib
import pytest

from src.evaluation.report.summary import on_circle
from src.evaluation.visualization import style
from src.evaluation.visualization.style import MAX_CHARS, drawable, new_figure

SCRIPTS = [
    "你好", "أحمد علي", "می‌روم", "हिन्दी क्षत्रिय", "மொழி", "ภาษาไทย", "่", "မြန်မာ", "ქართული", "አማርኛ", "བོད་", "සිංහල",
    "שלום", "ไทย", "😀🫨", "$a$ and $b$", "x\ty\nz", "bell \x07", "\u200f\u200b", "ő Ж δ",
]  # fmt: skip


@pytest.mark.usefixtures("no_warning_and_no_global_change")
def test_any_script_draws_without_a_missing_glyph() -> None:
    with new_figure(4, 4, drawable("".join(SCRIPTS))) as figure:
        for weight in ("normal", "bold"):
            for text in SCRIPTS:
                figure.text(0.5, 0.5, drawable(text), weight=weight)
        figure.draw_without_rendering()
        figure.canvas.print_figure("/dev/null", format="svg")


def test_what_no_font_has_is_written_as_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "_fonts", lambda: ("DejaVu Sans",))
    found = {text: drawable(text) for text in ("猫 cat", "🫨", "a\x07", "naïve Привет δ", "\u2a5e")}
    assert list(found.values()) == [r"\u732b cat", r"\U0001fae8", r"a\x07", "naïve Привет δ", r"\u2a5e"]
    monkeypatch.setattr(style, "_fonts", lambda: ("DejaVu Sans", "STIXGeneral"))
    assert drawable("\u2a5e") == "\u2a5e"


def test_a_text_is_one_line_and_no_formula_and_a_long_name_keeps_both_ends() -> None:
    assert drawable("$5 or $6") == r"\$5 or \$6"
    assert drawable(" a\n b\tc ") == "a b c"
    names = [drawable(f"a speaker with a long name {i}") for i in (1, 2)]
    assert names[0] != names[1]
    assert all(len(name) <= MAX_CHARS for name in names)
    assert drawable("x" * 24) == "x" * 24


def test_right_to_left_words_stand_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "_ORDERS_LETTERS", False)
    assert drawable("שלום עולם") == "םלוע םולש"
    assert drawable("to שלום now") == "to םולש now"
    assert drawable("עמוד12") == "עמוד12"
    assert drawable("בּא") == "אבּ"  # a mark stays on its letter
    monkeypatch.setattr(style, "_ORDERS_LETTERS", True)
    assert drawable("שלום עולם") == "שלום עולם"


def test_arabic_letters_are_joined_and_vowel_signs_stand_where_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "_ORDERS_LETTERS", False)
    monkeypatch.setattr(style, "_has_glyph", lambda *_: True)
    style._arabic_forms.cache_clear()
    assert drawable("بيت") == "\ufe96\ufef4\ufe91"  # initial, medial and final form, the first letter at the right
    assert drawable("دار") == "راد"  # none of these joins the next
    assert drawable("می\u200cروم") == "\u0645\u0648\u0631\ufbfd\ufee3"  # the letter before a ZWNJ ends
    assert drawable("कि त्रि") == "िक ित्र"  # before the whole cluster
    assert drawable("மொழி") == "ெமாழி"  # in two parts, around the consonant
    assert drawable("ने கு ไทย") == "ने கு ไทย"


def test_a_mark_that_nothing_carries_stands_on_a_circle() -> None:
    assert on_circle("่ → ก่ ि") == "\u25cc่ → ก่ \u25ccि"


def test_where_text_stays_text_the_viewer_has_the_fonts() -> None:
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert drawable("猫 مرحبا हिन्दी $5\x07") == r"猫 مرحبا हिन्दी \$5\x07"
        assert drawable("कि" * 9, max_chars=6) == "कि" * 3 + "…" + "कि" * 2
