"""Words over a spectrogram: each text by its word, none over another."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from src.evaluation.visualization.words import draw_words
from src.inference.words import Word
from src.utils.errors import AudioError, DataError
from src.utils.figures import save_figure

pytestmark = pytest.mark.usefixtures("no_warning_and_no_global_change")


def words_every(step_sec: float, end_sec: float, text: str = "word") -> list[Word]:
    times = np.arange(0, end_sec - step_sec / 2, step_sec)
    return [Word(text, float(at), float(at) + step_sec, 0.9) for at in times]


@pytest.mark.parametrize(("step_sec", "end_sec"), [(0.25, 11.0), (0.4, 30.0)])
def test_texts_do_not_collide(jfk: np.ndarray, step_sec: float, end_sec: float) -> None:
    audio = np.tile(jfk, 3)[: round(16_000 * end_sec)]
    figure = draw_words(audio, words_every(step_sec, end_sec))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[1].texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert max(figure.get_size_inches() / [10, 4]) <= 1


def test_bars_boundaries_and_axis_are_in_seconds(jfk: np.ndarray, tmp_path: Path) -> None:
    words = [Word("a", 1.0, 2.0, 0.9), Word("b", 2.0, 2.5, 0.9), Word("c", 4.0, 4.0, 0.9)]
    figure = draw_words(jfk, words, title="jfk $x$")
    mel, band = figure.axes
    starts, ends = (
        [float(segment[0, 0]) for segment in each.get_segments()]  # type: ignore[attr-defined]
        for each in mel.collections[1:]
    )
    assert starts == [1.0, 2.0, 4.0]
    assert ends == [2.5]  # where silence follows; 2.0 begins the next word, 4.0 its own
    spans = [each.get_paths()[0].get_extents() for each in band.collections]
    assert [(span.x0, round(span.x1 - span.x0, 3)) for span in spans] == [(1.0, 1.0), (2.0, 0.5), (4.0, 0.02)]
    assert [text.get_text() for text in band.texts] == ["a", "b", "c"]
    assert mel.get_xlim() == (0, pytest.approx(len(jfk) / 16_000))
    save_figure(figure, tmp_path, "words")


def test_a_part_has_the_words_of_that_part_at_their_times(jfk: np.ndarray) -> None:
    figure = draw_words(jfk, words_every(1.0, 11.0), between_sec=(2.5, 5.0))
    assert len(figure.axes[1].texts) == 3
    assert figure.axes[0].get_xlim() == (2.5, 5.0)
    bounds = figure.axes[0].collections[0].get_coordinates()[0, :, 0]  # type: ignore[attr-defined]
    assert (bounds[0], bounds[-1]) == pytest.approx((2.5, 5.0), abs=0.011)


def test_words_of_any_script_are_drawn(jfk: np.ndarray, tmp_path: Path) -> None:
    texts = ["你好", "مرحبا", "😀", "$5", "fin"]
    words = [Word(text, float(i), i + 0.5, 0.9) for i, text in enumerate(texts)]
    save_figure(draw_words(jfk, words), tmp_path, "scripts")


def test_what_cannot_be_drawn_is_an_error(jfk: np.ndarray) -> None:
    words = words_every(1.0, 11.0)
    for audio, given, part, error, said in (
        (jfk, [], None, DataError, "word_timestamps"),
        (jfk[:10], words, None, AudioError, r"shape \(10,\)"),
        (jfk[None], words, None, AudioError, r"\(1, "),
        (np.tile(jfk, 4), words, None, DataError, "30 s"),
        *[(jfk, words, part, DataError, "between_sec") for part in ((5.0, 5.0), (-1.0, 2.0), (5.0, 90.0))],
        (np.tile(jfk, 3)[:480_000], words_every(0.05, 30.0, "incomprehensible"), None, DataError, "600 words"),
    ):
        with pytest.raises(error, match=said):
            draw_words(audio, given, between_sec=part)


def test_a_model_that_repeats_itself_or_hears_nothing_is_drawn_as_far_as_there_is_room(jfk: np.ndarray) -> None:
    looped = [Word("again", 10.0, 10.0, 0.9) for _ in range(43)]
    figure = draw_words(jfk, [*words_every(1.0, 10.0), *looped], title="clip", all_words=False)
    band = figure.axes[1]
    assert len(band.collections) == 53
    assert len(band.texts) < 53
    assert band.get_title(loc="left") == f"clip, no room for {53 - len(band.texts)} of 53 words"
    assert max(figure.get_size_inches() / [10, 4]) <= 1
    alone = draw_words(jfk, [], all_words=False).axes[1]
    assert (alone.get_title(loc="left"), len(alone.texts)) == ("no words", 0)
