from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from src.data.report.report import DataReport, build_data_report
from src.data.utterance import Utterance
from src.evaluation.report.model_card import write_model_card
from src.utils.config import load_config
from src.utils.errors import DataError, ModelError
from src.utils.versioning import DataVersionManager
from tests.data.report_data import clip, noise, splits_of
from tests.evaluation.run_files import append, epoch, evaluation, guard_rows, prediction, spoken_run, write


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "best_model_hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "whisper"}')
    (folder / "provenance.json").write_text(json.dumps({"run": "r7", "epoch": 2, "validation_wer": 0.25}))
    return folder


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_the_card_reads_back_with_the_measured_rates(
    model_dir: Path, run_dir: Path, sample: list[Utterance], data_report: DataReport
) -> None:
    (run_dir / "config.yaml").write_text("model: {variant: tiny.en}\ndata: {source: sample}\ntraining: {epochs: 2}\n")
    metrics, predictions = guard_rows(0, 2)
    append(run_dir, "metrics", *metrics)
    append(run_dir, "predictions", *predictions)
    versions = DataVersionManager(run_dir / "data_versions")
    versions.log_dataset_version(dataset_name="speech", version="v1", metadata={}, utterances=sample[:2])
    data_report.save(run_dir)
    (model_dir / "README.md").write_text("old")
    path = write_model_card(model_dir, run_dir, name="my-whisper", license_id="mit")
    data, text = ModelCard.load(path).data, path.read_text()
    assert (data.model_name, data.language, data.base_model) == ("my-whisper", "en", "openai/whisper-tiny.en")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "automatic-speech-recognition")
    assert data.license == "mit"
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert found["sample", "wer"] == 27.0
    assert found["sample", "cer"] == 20.0
    assert found["LibriSpeech test-clean", "wer"] == 50.0
    for heading, parts in {
        "Result": ("0.370 [0.320, 0.420]", "WER -37.5 points", "worse on general speech", "40 clips of 8 speakers"),
        "Data": ("Version v1 of speech", "| train "),
        "How it was trained": ("- run: r7", "epoch 2 was kept", "training.epochs"),
        "Limits": ("Measured on 8 speakers",),
        "How to load it": ("pipeline(", model_dir.name, "WhisperModelManager(config)"),
        "How to reproduce it": ("scripts/train.py",),
    }.items():
        for part in parts:
            assert part in section(text, heading), part
    assert str(model_dir.parent) not in path.read_text()  # no private place
    assert [path.name for path in model_dir.iterdir() if "partial" in path.name] == []


def test_slices_come_worst_first_and_the_worse_ones_are_limits(model_dir: Path, tmp_path: Path) -> None:
    rooms = ["car" if i < 10 else "hall" for i in range(40)]
    rows = [{**prediction("tuned", i, 4 * (room == "car")), "meta": {"room": room}} for i, room in enumerate(rooms)]
    text = write_model_card(model_dir, write(tmp_path / "rooms", [evaluation("tuned", 0.25)], rows)).read_text()
    found = [line.split("|")[2:5] for line in section(text, "Where it is worst").splitlines() if "| room" in line]
    assert [(name.strip(), n.strip(), rate.split()[0]) for name, n, rate in found] == [
        ("car", "10", "1.000"), ("hall", "30", "0.000"),
    ]  # fmt: skip
    assert "room is car: WER 1.000" in section(text, "Limits")
    write(tmp_path / "rooms", [evaluation("tuned", 0.25) | {"wer": None}], rows)  # the whole set has no rate
    assert "room is" not in section(write_model_card(model_dir, tmp_path / "rooms").read_text(), "Limits")


def test_texts_of_the_data_cannot_break_the_card(model_dir: Path, tmp_path: Path) -> None:
    names = ["# x", "| y", "a\n## b", "---", "<script>"]
    rows = [
        {**prediction("tuned", i, 4 * (i % 5 == 2)), "speaker": names[i % 5], "meta": {"room": names[i % 2]}}
        for i in range(40)
    ]
    run = write(tmp_path / "run", [evaluation("tuned", 0.1)], rows)
    (run / "config.yaml").write_text(f"data: {{source: {json.dumps(names[2])}}}\n")
    name = 'my: "model"\n---\n# x'
    path = write_model_card(model_dir, run, name=name)
    text = path.read_text()
    assert ModelCard.load(path).data.model_name == name
    headings = [line for line in text.split("\n---\n", 1)[1].splitlines() if line.startswith("#")]
    assert headings[0] == '# my: "model" --- # x'
    assert [line[:3] for line in headings[1:]] == ["## "] * 8
    tables = [line for line in section(text, "Where it is worst").splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {6}
    assert "<script>" not in text
    assert "speaker is a ## b" in section(text, "Limits")


def test_no_text_of_a_run_is_markup_of_the_card(model_dir: Path, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>\n## forged\n```\n<script>"
    rows = [{**prediction("tuned", i, i % 2), "speaker": f"{evil} {i % 3}"} for i in range(40)]
    rows += [{**row, "model": evil} for row in rows]
    guard = {"event": "guard_set", "set": evil, "clips": 3, "speakers": 0, "not_measured": [evil]}
    events = [evaluation("tuned", 0.1), evaluation(evil, 0.2), guard]
    run = write(tmp_path / "run", [*events, {"event": "measured", "model": evil, "stock": evil, "data": evil}], rows)
    text = write_model_card(model_dir, run).read_text()
    _, head, body = text.split("---\n", 2)
    prose = re.sub(r"^```.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"<[^>]*>", prose) == ["<details>", "<summary>", "</summary>", "</details>"][: prose.count("<")]
    assert "## forged" not in body.splitlines()
    assert body.count("\n```") == 6
    assert yaml.safe_load(head)["library_name"] == "transformers"


def test_what_is_missing_is_said_to_be_not_measured(model_dir: Path, tmp_path: Path) -> None:
    text = write_model_card(model_dir, write(tmp_path / "run", [evaluation("tuned", 0.2)])).read_text()
    expected = {"Result": 2, "Where it is worst": 1, "Data": 2, "How it was trained": 1, "Limits": 7}
    for heading, count in expected.items():
        lines = [line for line in section(text, heading).splitlines() if not line.startswith("|")]
        assert sum("not measured" in line for line in lines) >= count, heading
    data = ModelCard(text).data
    assert (data.base_model, data.language, data.license) == (None, None, None)


def test_limits_follow_from_what_was_measured(model_dir: Path, tmp_path: Path) -> None:
    padded = {"event": "full_context", "val_wer": 0.41, "val_cer": 0.2, "own_length_wer": 0.33}
    row = evaluation("tuned", 0.5) | {"loop_rate": 0.125, "empty_rate": 0.0, "empty_references": 4}
    row |= {"hallucinated_words": 17, "blocks": "clip"}
    rows = [prediction("stock", i, 0) for i in range(20)] + [prediction("tuned", i, 2) for i in range(20)]
    metrics = [epoch(1, 0.3, True), padded, evaluation("stock", 0.0), row]
    limits = section(write_model_card(model_dir, write(tmp_path / "run", metrics, rows)).read_text(), "Limits")
    for part in ("WORSE", "0.125", "17 on 4 clips", "WER 0.410", "0.330", "speakers of the test set are not known"):
        assert part in limits
    assert "gives nothing" not in limits


def test_a_folder_without_a_model_and_a_run_without_an_evaluation_are_refused(model_dir: Path, tmp_path: Path) -> None:
    run = write(tmp_path / "run", [epoch(1, 0.3, True)])
    with pytest.raises(DataError, match=str(run)):
        write_model_card(model_dir, run)
    assert not (model_dir / "README.md").exists()
    shutil.rmtree(model_dir)
    with pytest.raises(ModelError, match=str(model_dir)):
        write_model_card(model_dir, run)


def test_languages_and_metrics_are_those_of_the_run(model_dir: Path, tmp_path: Path) -> None:
    run = spoken_run(tmp_path / "run", "zh", "hi", cut=("hi0",))
    spoken = [clip(f"c{i}", noise(2, i), "text", language="zh" if i % 3 else "jw") for i in range(9)]
    build_data_report(splits_of(spoken), load_config(None)).save(run)
    text = write_model_card(model_dir, run).read_text()
    data = ModelCard(text).data
    assert data.language == ["zh", "jv"]  # ISO 639 has no `jw`
    assert "Trained on: Chinese 6 clips, Javanese 3 clips." in section(text, "Data")
    assert "Transcribing speech in Chinese, Javanese" in section(text, "Intended use")
    rates = {(found.dataset_config, found.metric_type) for found in data.eval_results}
    assert (rates, sorted(data.metrics)) == ({("zh", "cer"), ("hi", "wer")}, ["cer", "wer"])
    assert "1 of 12 clips" in section(text, "Limits")
    assert "the best by mean of the languages" in section(text, "How it was trained")
    chinese = ModelCard.load(write_model_card(model_dir, spoken_run(tmp_path / "zh", "zh"))).data
    assert (chinese.language, chinese.metrics) == ("zh", ["cer"])


def test_a_model_that_translates_says_so(model_dir: Path, tmp_path: Path) -> None:
    run = spoken_run(tmp_path / "run", "hi")
    (run / "config.yaml").write_text("model: {variant: base, task: translate, language: hi}\n")
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"tokens_per_sec": {"en": 9.0}}))  # of the transcripts
    text = write_model_card(model_dir, run).read_text()
    assert "Translating speech in Hindi into English" in section(text, "Intended use")
    assert "Transcribing" not in text
    assert 'generate_kwargs={"task": "translate"}' in section(text, "How to load it")
