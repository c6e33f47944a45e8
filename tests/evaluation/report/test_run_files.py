from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from src.data.utterance import Utterance
from src.evaluation.report.run_files import last_training, load_metrics, load_predictions, read_origin
from src.utils.errors import DataError
from src.utils.versioning import DataVersionManager
from tests.evaluation.run_files import append, epoch, prediction, steps


def test_a_repeated_prediction_replaces_the_first_and_any_text_survives(run_dir: Path) -> None:
    text = "a line\u2028separator \u0085"
    append(run_dir, "predictions", prediction("tuned", 3, 4) | {"reference": text})
    file = run_dir / "predictions.jsonl"
    file.write_text(file.read_text().replace(r"\u2028", "\u2028").replace(r"\u0085", "\u0085"))  # as the evaluator does
    rows = load_predictions(run_dir)["tuned"]
    assert len(rows) == 40
    (row,) = [row for row in rows if row.id == "u3"]
    assert (row.substitutions, row.reference) == (4, text)
    file.unlink()
    assert load_predictions(run_dir) == {}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metrics.jsonl", None, r"metrics\.jsonl"),
        ("metrics.jsonl", '{"event": "epoch"}\n{"event": "tra', r"metrics\.jsonl, line 2"),
        ("metrics.jsonl", '{"loss": 1}\n', r"metrics\.jsonl, line 1"),
        ("metrics.jsonl", "[]\n", r"metrics\.jsonl, line 1"),
        ("metrics.jsonl", "\0\udcff", r"metrics\.jsonl, line 1"),
        ("predictions.jsonl", '{"model": "stock", "id": "u1"}\n', r"predictions\.jsonl, line 1"),
        ("config.yaml", "model: [", r"config\.yaml"),
    ],
)
def test_absent_and_damaged_files_are_named(run_dir: Path, name: str, text: str | None, said: str) -> None:
    if text is None:
        (run_dir / name).unlink()
    else:
        (run_dir / name).write_bytes(text.encode(errors="surrogateescape"))
    read = {"metrics.jsonl": load_metrics, "predictions.jsonl": load_predictions, "config.yaml": read_origin}[name]
    with pytest.raises(DataError, match=said):
        read(run_dir)


def test_updates_and_epochs_done_again_replace_the_older_ones() -> None:
    first = [*steps(4), epoch(1, 0.5, True), epoch(2, 0.4, True)]
    started_again = last_training([*first, *steps(4)[:2], epoch(1, 0.3, True)])
    assert [row["val_wer"] for row in started_again[1]] == [0.3]
    assert [row["step"] for row in started_again[0]] == [1, 2]
    resumed = last_training([*first, *steps(4)[3:], epoch(2, 0.3, True), epoch(3, 0.2, True)])
    assert [row["val_wer"] for row in resumed[1]] == [0.5, 0.3, 0.2]
    assert [row["step"] for row in resumed[0]] == [1, 2, 3, 4]


def test_the_commands_that_reproduce_a_run_come_from_its_files(run_dir: Path, sample: list[Utterance]) -> None:
    (run_dir / "env.json").write_text(json.dumps({"python": "3.11", "git_revision": "0123abcd+changes"}))
    (run_dir / "config.yaml").write_text("model: {variant: base.en}\npaths: {checkpoints_dir: kept}\n")
    DataVersionManager(run_dir / "data_versions").log_dataset_version(
        dataset_name="speech", version="v1", metadata={}, utterances=sample[:2]
    )
    origin = read_origin(run_dir)
    checkout, train, evaluate = origin.commands()
    assert checkout.startswith("git checkout 0123abcd  # ")
    assert train == f"python scripts/train.py --config {run_dir.name}/config.yaml"
    command = f"python scripts/evaluate.py --config {run_dir.name}/config.yaml"
    assert evaluate == f"{command} --model kept/best_model_hf --stock base.en"
    assert [version.version for version in origin.data_versions] == ["v1"]
    # a measurement is repeated as it was made
    row = {"event": "measured", "model": "my model", "stock": None, "data": "d.parquet", "max_clips": 9}
    append(run_dir, "metrics", row)
    expected = f"{command} --model 'my model' --data d.parquet --max-clips 9 --no-stock"
    assert read_origin(run_dir).commands()[-1] == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("env.json", "python: 3.11"), ("env.json", "[]"), ("env.json", "{"), ("env.json", '{"packages": 3}'),
        ("env.json", "&a [*a]"), ("env.json", "[" * 100_000), ("env.json", "9" * 5000), ("env.json", "!!str x"),
        ("config.yaml", "[]"), ("config.yaml", "text"), ("config.yaml", "model: 3"), ("config.yaml", "data: {hub: []}"),
        ("config.yaml", "paths: [1]"), ("config.yaml", "a: 1\na: 2"), ("config.yaml", "[" * 5000),
    ],
)  # fmt: skip
def test_tampered_files_of_a_run_are_named(run_dir: Path, name: str, text: str) -> None:
    (run_dir / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}: ") as caught:
        read_origin(run_dir)
    assert len(str(caught.value)) < 2000


def test_no_private_place_is_in_an_origin(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    private = "/home/ann/secret"
    (run_dir / "config.yaml").write_text(
        f"model: {{variant: {private}/model}}\ndata: {{source: folder, path: {private}/speech}}\n"
        f"paths: {{checkpoints_dir: {private}/checkpoints, cache_dir: '~/x', runs_dir: {tmp_path}/runs}}\n"
        f"augmentation: {{noise_dir: 'C:\\Users\\ann\\noise', list: [{private}/a]}}\n"
    )
    (run_dir / "env.json").write_text(json.dumps({"packages": {"torch": f"{private}/torch"}}))
    append(run_dir, "metrics", {"event": "measured", "model": f"{private}/best", "data": f"{private}/test.parquet"})
    origin = read_origin(run_dir)
    shown = f"{origin.config} {origin.environment} {origin.measured} {origin.commands()} {origin.data} {origin.base}"
    for word in ("ann", "secret", "~", str(tmp_path), "Users"):
        assert word not in shown
    assert origin.config["paths"]["runs_dir"] == "runs"
    assert (origin.config["augmentation"]["noise_dir"], origin.config["data"]["path"]) == ("noise", "speech")
    assert "--model best" in origin.commands()[-1]


@pytest.mark.parametrize("name", ["config.yaml", "env.json", "metrics.jsonl"])
def test_a_pipe_in_a_run_is_not_opened(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink(missing_ok=True)
    os.mkfifo(run_dir / name)
    with pytest.raises(DataError, match=rf"{name}: "):
        read_origin(run_dir)
