"""Live captions: what is on show after each event, how often, and that a notebook keeps one output of it."""

from __future__ import annotations

import io
import re
from typing import Any
from unittest.mock import Mock

import nbformat
import pytest
from nbclient import NotebookClient

from src.inference.streaming import view as live_view
from src.inference.streaming.commit import Event
from src.inference.streaming.view import FAINT, MAX_CHARS, LiveCaptions, printable
from src.inference.words import Word
from src.utils.languages import is_unspaced_text


def event(kind: Any, text: str, audio_sec: float, *, end_sec: float | None = None) -> Event:
    end_sec = audio_sec if end_sec is None else end_sec
    words = tuple(Word(w, end_sec - 0.1, end_sec, 0.9, space=not is_unspaced_text(w)) for w in text.split())
    return Event(kind, words, text, audio_sec, audio_sec, 0)


def after(*events: Event) -> LiveCaptions:
    captions = LiveCaptions()
    for each in events:
        captions.show(each)
    return captions


def shown_text(html: str) -> str:
    return re.sub("<[^>]*>", "", html.split("<small")[0])


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for the notebook's `display`."""
    display = Mock()
    monkeypatch.setattr(live_view, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    return display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_committed_text_grows_and_the_partial_is_replaced() -> None:
    captions = after(event("commit", "and so", 1.0), event("partial", "my fell", 1.5), event("partial", "my fellow", 2))
    assert captions.to_text() == "and so my fellow"
    captions.show(event("commit", "my", 2.5, end_sec=1.75))
    assert captions.to_text() == "and so my"
    assert "2.5 s" in captions.to_html() and "0.8 s" in captions.to_html()
    captions.show(event("final", "and so my", 4.0))
    assert captions.to_text() == "and so my"
    assert "4.0 s" in captions.to_html()
    captions = after(event("commit", "こんにちは", 1.0), event("commit", "世界", 2.0), event("partial", "です", 3.0))
    assert captions.to_text() == shown_text(captions.to_html()) == "こんにちは世界です"


def test_a_long_session_shows_its_newest_words_whole() -> None:
    text = after(*[event("commit", f"word{i} and more", float(i)) for i in range(300)]).to_text()
    assert MAX_CHARS - 20 < len(text) <= MAX_CHARS + 2
    assert re.match(r"… (word\d+|and|more) .* word299 and more$", text)
    assert len(after(*[event("commit", "世界", float(i)) for i in range(600)]).to_text()) == MAX_CHARS + 2
    mixed = [event("commit", "世界", float(i)) for i in range(600)] + [event("commit", "GPT 4", 601.0)]
    assert len(after(*mixed).to_text()) > MAX_CHARS - 20


def test_what_was_said_is_text_and_never_markup_and_the_partial_is_fainter() -> None:
    html = after(event("commit", "a<b> & <script>", 1.0), event("partial", "<img>", 1.0)).to_html()
    assert "&lt;script&gt;" in html
    assert f'<span style="opacity: {FAINT}; font-style: italic"> &lt;img&gt;</span>' in html
    assert set(re.findall(r"<(\w+)", html)) == {"div", "span", "small"}


def test_all_events_of_an_update_are_shown_a_flood_is_not_and_an_error_leaves_the_last_state(notebook: Mock) -> None:
    now = [0.0]
    with pytest.raises(KeyboardInterrupt), LiveCaptions(clock=lambda: now[0]) as live:
        for second in range(10):  # a microphone: two events at once, twice a second
            now[0] = second / 2
            live.show(event("commit", f"said{second}", now[0]))
            live.show(event("partial", "perhaps", now[0]))
        assert notebook.call_count == 1 + 20
        now[0] += 60
        for i in range(500):  # a file, as fast as it goes
            now[0] += 0.01
            live.show(event("commit", f"fast{i}", now[0]))
        assert 35 <= notebook.call_count - 21 <= 40
        raise KeyboardInterrupt
    assert shown_text(notebook.call_args.args[0]["text/html"]).endswith("fast498 fast499")


def test_a_terminal_shows_one_line_in_place_and_a_file_the_end_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "11")
    for output, expected in (
        (Terminal(), ["", "", "hello[2J", " my fellow", "hello[2J my fellow\n"]),
        (io.StringIO(), ["hello[2J my fellow\n"]),
    ):
        monkeypatch.setattr("sys.stdout", output)
        with LiveCaptions() as live:
            for each in (event("commit", "hello\x1b[2J", 1.0), event("partial", "my fellow", 1.0)):
                live.show(each)
        assert output.getvalue().split(live_view.CLEAR_LINE) == expected


def test_a_terminal_keeps_what_scripts_need_and_counts_wide_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("می‌خواهم", "ශ්‍රී", "東京　大阪", "combien ?"):
        assert printable(text) == text
    assert printable("a[2J‮b c	d") == "a[2Jbcd"
    monkeypatch.setenv("COLUMNS", "8")
    output = Terminal()
    monkeypatch.setattr("sys.stdout", output)
    with LiveCaptions() as live:
        live.show(event("commit", "今日はいい天気です", 1.0))
        live.show(event("commit", "नमस्ते", 2.0))
    shown = output.getvalue().split(live_view.CLEAR_LINE)
    assert shown[2] == "気です"  # two columns each


def test_a_kernel_keeps_one_output_with_the_last_captions() -> None:
    source = """
from src.inference import LiveCaptions
from src.inference.streaming.commit import Event
from src.inference.words import Word
with LiveCaptions() as live:
    for i in range(30):
        live.show(Event("commit", (Word(f"word{i}", i, i + 0.5),), f"word{i}", i + 1.0, 0.0, i))
"""
    cells = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    (cell,) = NotebookClient(cells, timeout=120, kernel_name="python3").execute().cells
    (output,) = cell.outputs
    assert output.data["text/plain"].endswith("word28 word29")
    assert "finished: 30.0 s" in output.data["text/html"]
