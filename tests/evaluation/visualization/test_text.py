"""Texts of users draw without a warning, and nothing of them is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from matplotlib.figure import Figure

from src.evaluation.visualization import text as figures_text
from src.evaluation.visualization.text import drawable, figure_style


@pytest.fixture
def only_the_main_font(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(figures_text, "FALLBACK_FONTS", ())
    figures_text._fonts.cache_clear()
    yield
    figures_text._fonts.cache_clear()


@pytest.mark.usefixtures("no_warning_and_no_global_change")
@pytest.mark.parametrize(
    "text",
    [
        "你好",
        "أحمد علي",
        "שלום",
        "ไทย",
        "हिन्दी",
        "😀🫨",
        "$a$ and $b$",
        "x\ty\nz",
        "bell \x07",
        "\u200f\u200b",
        "ő Ж δ",
        "",
    ],
)
@pytest.mark.parametrize("weight", ["normal", "bold"])
def test_any_script_draws_without_a_missing_glyph(text: str, weight: str) -> None:
    with figure_style():
        figure = Figure()
        figure.text(0.5, 0.5, drawable(text), weight=weight)
        figure.draw_without_rendering()
        figure.canvas.print_figure("/dev/null", format="svg")


def test_what_no_font_has_is_written_as_its_code(only_the_main_font: None) -> None:
    assert drawable("猫 cat") == r"\u732b cat"
    assert drawable("🫨") == r"\U0001fae8"
    assert drawable("a\x07") == r"a\x07"
    assert drawable("naïve Привет δ") == "naïve Привет δ"


def test_a_font_of_the_machine_is_asked_before_a_code_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    only_in_stix = "\u2a5e"
    monkeypatch.setattr(figures_text, "FALLBACK_FONTS", ())
    figures_text._fonts.cache_clear()
    without = drawable(only_in_stix)
    monkeypatch.setattr(figures_text, "FALLBACK_FONTS", ("no such font", "STIXGeneral"))
    figures_text._fonts.cache_clear()
    assert (without, drawable(only_in_stix)) == (r"\u2a5e", only_in_stix)
    assert figures_text._fonts() == ("DejaVu Sans", "STIXGeneral")
    figures_text._fonts.cache_clear()


def test_dollars_are_no_formula_and_a_text_is_one_line() -> None:
    assert drawable("$5 or $6") == r"\$5 or \$6"
    assert drawable(" a\n b\tc ") == "a b c"


def test_a_long_name_keeps_both_ends() -> None:
    names = [drawable(f"a speaker with a long name {i}") for i in (1, 2)]
    assert names[0] != names[1]
    assert all(len(name) <= figures_text.MAX_CHARS for name in names)
    assert drawable("x" * 24) == "x" * 24


def test_right_to_left_words_stand_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures_text, "_JOINS_LETTERS", False)
    assert drawable("שלום עולם") == "םלוע םולש"
    assert drawable("to שלום now") == "to םולש now"
    assert drawable("עמוד12") == "עמוד12"
    assert drawable("בּא") == "אבּ"  # a mark stays on its letter
    monkeypatch.setattr(figures_text, "_JOINS_LETTERS", True)
    assert drawable("שלום עולם") == "שלום עולם"
