from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from src.evaluation.report.model_card import write_model_card
from src.utils.config import Config
from src.utils.errors import DataError, ModelError
from tests.evaluation.run_files import epoch, evaluation, prediction, write


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "best_model_hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "whisper"}')
    (folder / "provenance.json").write_text(json.dumps({"run": "r7", "epoch": 2, "validation_wer": 0.25}))
    return folder


@pytest.fixture
def trained(run_dir: Path, config: Config) -> Path:
    """A run that trained, with its configuration and a guard set."""
    (run_dir / "config.yaml").write_text(
        config.model_copy(update={"model": config.model.model_copy(update={"language": "en"})}).to_yaml()
    )
    guard = {"event": "guard", "set": "LibriSpeech test-clean", "clips": 8, "speakers": 4}
    append(run_dir, "metrics", guard, evaluation("stock (guard)", 0.05), evaluation("tuned (guard)", 0.3))
    rows = [prediction(f"{m} (guard)", 100 + i, e) for m, e in (("stock", 0), ("tuned", 2)) for i in range(8)]
    append(run_dir, "predictions", *rows)
    return run_dir


def append(run_dir: Path, name: str, *rows: dict[str, Any]) -> None:
    with (run_dir / f"{name}.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def test_the_front_matter_reads_back_with_the_measured_rates(model_dir: Path, trained: Path) -> None:
    data = ModelCard.load(write_model_card(model_dir, trained, name="my-whisper")).data
    assert (data.model_name, data.language, data.base_model) == ("my-whisper", "en", "openai/whisper-tiny.en")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "automatic-speech-recognition")
    assert data.license is None
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert found[("sample", "wer")] == 27.0
    assert found[("sample", "cer")] == 20.0
    assert found[("LibriSpeech test-clean", "wer")] == 30.0


def test_the_body_has_the_verdict_the_guard_set_and_the_settings(
    model_dir: Path, trained: Path, config: Config
) -> None:
    text = write_model_card(model_dir, trained).read_text()
    for part in (
        "0.370 [0.320, 0.420]", "tuned against stock: WER -37.5 points", "worse on general speech",
        "guard set: LibriSpeech test-clean, 8 clips of 4 speakers", "epoch 2 was kept",
        f"| training.batch_size | {config.training.batch_size} |",
        "- run: r7", "Measured on 8 speakers: so few", "recognizer = pipeline(", "WhisperModelManager(config)",
    ):  # fmt: skip
        assert part in text, part


def test_slices_come_worst_first_and_the_worse_ones_are_limits(model_dir: Path, run_dir: Path) -> None:
    rooms = ["car" if i < 10 else "a|b" for i in range(40)]
    errors = [4 if room == "car" else 0 for room in rooms]
    rows = [{**prediction("tuned", i, errors[i]), "meta": {"room": room}} for i, room in enumerate(rooms)]
    run = write(run_dir.parent / "rooms", [evaluation("tuned", 0.25)], rows)
    text = write_model_card(model_dir, run).read_text()
    worst = text[text.index("## Where it is worst") : text.index("## Data")]
    found = [line for line in worst.splitlines() if line.startswith("| room")]
    assert found[0].startswith("| room | car | 10 | 1.000")
    assert found[1].startswith("| room | a\\|b | 30 | 0.000")
    assert "Worse than on the whole set where room is car: WER 1.000" in text


def test_what_is_missing_is_said_to_be_not_measured(model_dir: Path, tmp_path: Path) -> None:
    text = write_model_card(model_dir, write(tmp_path / "run", [evaluation("tuned", 0.2)])).read_text()
    for part in (
        "Guard set (speech of another kind): not measured", "The stock model beside it: not measured",
        "Slices: not measured", "Version of the data: not measured", "hyper-parameters not measured",
        "Words invented where nobody speaks: not measured", "Streaming: not measured",
        "a stock model that the run's files do not name",
    ):  # fmt: skip
        assert part in text, part
    data = ModelCard(text).data
    assert data.base_model is None
    assert data.language is None


def test_a_model_that_is_not_better_says_so_in_its_limits(model_dir: Path, tmp_path: Path) -> None:
    rows = [prediction("stock", i, 0) for i in range(20)] + [prediction("tuned", i, 2) for i in range(20)]
    run = write(tmp_path / "run", [epoch(1, 0.3, True), evaluation("stock", 0.0), evaluation("tuned", 0.5)], rows)
    text = write_model_card(model_dir, run).read_text()
    assert "WORSE: keep the stock model" in text[text.index("## Limits") :]


def test_loops_and_padding_are_limits_where_they_were_measured(model_dir: Path, tmp_path: Path) -> None:
    padded = {"event": "full_context", "val_wer": 0.41, "val_cer": 0.2, "own_length_wer": 0.33}
    row = evaluation("tuned", 0.2) | {"loop_rate": 0.125, "empty_rate": 0.0, "empty_references": 4}
    row |= {"hallucinated_words": 17}
    text = write_model_card(model_dir, write(tmp_path / "run", [padded, row])).read_text()
    assert "Share of clips that repeat themselves or outrun the audio: 0.125." in text
    assert "Words invented where nobody speaks: 17 on 4 clips." in text
    assert "validation WER 0.410; at its own length 0.330" in text
    assert "for which it gives nothing" not in text


def test_an_older_card_is_replaced_and_a_licence_is_taken(model_dir: Path, trained: Path) -> None:
    (model_dir / "README.md").write_text("old")
    assert ModelCard.load(write_model_card(model_dir, trained, license_id="mit")).data.license == "mit"
    assert [path.name for path in model_dir.iterdir() if "partial" in path.name] == []


def test_a_folder_without_a_model_and_a_run_without_an_evaluation_are_refused(model_dir: Path, tmp_path: Path) -> None:
    run = write(tmp_path / "run", [epoch(1, 0.3, True)])
    with pytest.raises(DataError, match="nothing was evaluated in this run"):
        write_model_card(model_dir, run)
    assert not (model_dir / "README.md").exists()
    shutil.rmtree(model_dir)
    with pytest.raises(ModelError, match="holds no exported model"):
        write_model_card(model_dir, run)
