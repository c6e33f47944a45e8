"""Kinds of errors: counted by the alignment that counts the rates, drawn as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from src.evaluation.edits import word_counts
from src.evaluation.report.summary import load_predictions
from src.evaluation.results import Prediction
from src.evaluation.visualization.errors import Confusions, count_confusions, draw_confusions, draw_error_types
from src.utils.errors import DataError
from src.utils.figures import save_figure
from tests.evaluation.run_files import evaluation

pytestmark = pytest.mark.usefixtures("no_warning_and_no_global_change")

TEXTS = [
    ("the cat sat", "the hat sat"),
    ("the cat ran", "a hat ran"),
    ("she said so", "said so"),
    ("go", "go on on"),
    ("", "thank you"),
    ("猫 meows", "مرحبا meows"),
]


@pytest.fixture
def rows() -> list[Prediction]:
    row = Prediction("u", None, 2.0, "", "", 0, 0, 0, 0, -0.1, 0.1)
    return [replace(row, id=f"u{i}", reference=a, hypothesis=b) for i, (a, b) in enumerate(TEXTS)]


def test_confusions_add_up_to_the_edits_of_the_rates(rows: list[Prediction]) -> None:
    found = count_confusions(rows, "plain-v1")
    counts = word_counts([a for a, _ in TEXTS], [b for _, b in TEXTS], "plain-v1")
    assert found.substitutions.total() == sum(count.substitutions for count in counts)
    assert found.deletions.total() == sum(count.deletions for count in counts)
    assert found.insertions.total() == sum(count.insertions for count in counts)
    assert found.substitutions["cat", "hat"] == 2
    assert found.deletions == {"she": 1}
    assert found.insertions == {"on": 2, "thank": 1, "you": 1}


def test_the_most_frequent_come_first_with_their_counts(rows: list[Prediction], tmp_path: Path) -> None:
    figure = draw_confusions(count_confusions(rows, "plain-v1"), model="tuned", top=2)
    left, _, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["cat → hat", "the → a"]
    assert [patch.get_width() for patch in left.patches] == [2, 1]  # type: ignore[attr-defined]
    assert [text.get_text() for text in left.texts] == ["2", "1"]
    assert left.get_title(loc="left") == "Substitutions: 4"
    assert left.get_xlabel() == "times; 2 of 3 different"
    assert [label.get_text() for label in right.get_yticklabels()] == ["on", "thank"]
    save_figure(figure, tmp_path, "confusions")


def test_words_of_any_script_are_drawn(rows: list[Prediction], tmp_path: Path) -> None:
    save_figure(draw_confusions(count_confusions(rows, "plain-v1"), model="نموذج 好"), tmp_path, "scripts")


def test_a_model_without_errors_says_none() -> None:
    figure = draw_confusions(
        Confusions(*(type(count_confusions([], "plain-v1").deletions)() for _ in range(3))), model="x"
    )
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["none", "none", "none"]


@pytest.mark.parametrize("top", [0, 21])
def test_top_out_of_range_is_an_error(rows: list[Prediction], top: int) -> None:
    with pytest.raises(DataError, match=f"top is {top}; a panel of confusions shows 1 to 20"):
        draw_confusions(count_confusions(rows, "plain-v1"), model="tuned", top=top)


def test_bars_are_shares_of_the_reference_and_add_up_to_the_wer(tmp_path: Path) -> None:
    edits = {"substitutions": 20, "deletions": 10, "insertions": 5, "reference_words": 100}
    row = evaluation("stock", 0.35) | edits | {"loop_rate": 0.02, "empty_rate": 0.0}
    figure = draw_error_types({"stock": row}, {})
    left, right = figure.axes
    assert [patch.get_height() for patch in left.patches] == pytest.approx([0.2, 0.1, 0.05])  # type: ignore[attr-defined]
    assert left.get_legend_handles_labels()[1] == ["stock, WER 0.350"]
    assert [text.get_text() for text in right.texts] == ["0.020", "0.000"]
    save_figure(figure, tmp_path, "types")


def test_older_runs_take_edits_from_predictions_and_leave_a_gap_elsewhere(run_dir: Path, tmp_path: Path) -> None:
    predictions = load_predictions(run_dir)
    figure = draw_error_types({"stock": evaluation("stock", 0.5), "tuned": evaluation("tuned", 0.2)}, predictions)
    left, right = figure.axes
    assert left.patches[0].get_height() == pytest.approx(0.5)  # type: ignore[attr-defined]
    assert {text.get_text() for text in right.texts} == {"not measured"}
    assert left.patches[0].get_hatch() != left.patches[3].get_hatch()  # not told apart by colour alone
    alone = draw_error_types({"stock": evaluation("stock", 0.5)}, {})
    assert {text.get_text() for axes in alone.axes for text in axes.texts} == {"not measured"}
    save_figure(alone, tmp_path, "gap")
