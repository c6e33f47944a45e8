"""scripts/evaluate.py as its user runs it, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import yaml
from transformers import WhisperConfig

from scripts import evaluate
from scripts.command_line import check_model_path
from src.data.audio import SAMPLE_RATE
from src.data.sources.catalog import SAMPLE_PARQUET
from src.evaluation.report.summary import summarize_run
from src.models.export.huggingface import export_huggingface
from src.utils.config import Config
from src.utils.errors import DataError, ModelError


@pytest.fixture
def checkpoint(tmp_path: Path, small: tuple[Any, Any]) -> Path:
    """A random model; the scripts' figures do not depend on its weights."""
    model, processor = small
    model.audio_context = "dynamic"
    return export_huggingface(model, processor, tmp_path / "checkpoints" / "best_model_hf")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Run the script in this process, with its runs in the test's folder."""

    def run(*given: object) -> int:
        settings = ("device=cpu", f"paths.runs_dir={tmp_path / 'runs'}", "inference.max_tokens_per_sec=1.0")
        set_ = [part for setting in settings for part in ("--set", setting)]
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, given), *set_])
        return evaluate.main()

    monkeypatch.setattr(evaluate, "setup_logging", lambda level: None)  # it would last, and take pytest's handlers away
    return run


def config_of(*given: object) -> Config:
    arguments = evaluate.parse_arguments(["--model", "tiny.en", *map(str, given)])
    return evaluate.load_config(None, overrides=evaluate.overrides_of(arguments))


def test_a_checkpoint_is_compared_with_the_stock_model_and_reported(
    call: Callable[..., int], tmp_path: Path, checkpoint: Path, small: tuple[Any, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run_dir, report = tmp_path / "measured", tmp_path / "out" / "report.html"
    small[0].audio_context = "full"
    stock = export_huggingface(*small, tmp_path / "stock")
    given = ["--model", checkpoint, "--stock", stock, "--quick", "--run-dir", run_dir, "--report", report]
    assert call(*given) == 0
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])
    summary = summarize_run(run_dir)
    assert summary.comparison is not None
    wer, stock_wer = (round(summary.evaluations[name]["wer"], 4) for name in ("tuned", "stock"))
    expected = {"wer": wer, "stock_wer": stock_wer, "n": 8, "report": str(report)}
    assert figures == expected | {"verdict": summary.comparison.verdict}
    assert "tuned against stock: WER" in printed
    assert [summary.evaluations[name]["audio_context"] for name in ("stock", "tuned")] == ["full", "dynamic"]
    page = report.read_text(encoding="utf-8")
    assert "data:audio/mpeg" in page
    assert f"--model {checkpoint.name} --stock {stock.name} --max-clips 8" in page  # no private path
    written = {path.name for path in run_dir.iterdir()}
    assert written >= {"config.yaml", "env.json", "metrics.jsonl", "predictions.jsonl"}
    assert call(*given) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_a_folder_with_a_manifest_is_measured_without_a_stock_model(
    call: Callable[..., int], tmp_path: Path, checkpoint: Path, jfk: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "mine"
    data.mkdir()
    sf.write(data / "a.wav", jfk[: 4 * SAMPLE_RATE], SAMPLE_RATE)
    (data / "metadata.csv").write_text("file_name,text\na.wav,and so my fellow americans\n")
    assert call("--model", checkpoint, "--no-stock", "--data", data) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["n"], figures["stock_wer"], figures["verdict"], figures["report"]) == (1, None, None, None)
    (run_dir,) = (tmp_path / "runs").iterdir()
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (config["data"]["source"], config["data"]["path"]) == ("folder", str(data))


def test_a_damaged_or_missing_checkpoint_is_refused_before_anything_is_written(
    call: Callable[..., int], tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (checkpoint / name).unlink()
    assert call("--model", checkpoint) == 1
    said = capsys.readouterr().err
    assert "tokenizer.json" in said and "vocab.json" in said
    assert call("--model", checkpoint.parent / "best_mix_hf") == 1
    said = capsys.readouterr().err
    assert "best_mix_hf: no such folder" in said and "best_model_hf" in said  # the one that is there
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ModelError, match="train first"):
        check_model_path(str(tmp_path / "none" / "best_model_hf"))
    check_model_path("owner-of-the-hub/whisper-base-sw")  # may be on the Hub


@pytest.mark.parametrize("texts", [["?", " "], []])
def test_data_without_a_word_to_measure_against_is_refused(tmp_path: Path, texts: list[str]) -> None:
    file = tmp_path / "d.parquet"
    rows = [{"audio": {"bytes": b"RIFF", "path": "a.wav"}, "text": text, "split": "test"} for text in ("x", *texts)]
    pq.write_table(pa.Table.from_pylist(rows)[1:], file)
    with pytest.raises(DataError, match="2 references" if texts else r"d\.parquet"):
        evaluate.read_clips(config_of("--data", file))


def test_what_lies_at_a_path_says_how_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data .*gone: no such file or folder"):
        evaluate.source_of(tmp_path / "gone")
    assert evaluate.source_of(SAMPLE_PARQUET) == "parquet"
    (tmp_path / "part-0.parquet").touch()
    assert evaluate.source_of(tmp_path) == "parquet"
    (tmp_path / "metadata.csv").touch()
    assert evaluate.source_of(tmp_path) == evaluate.source_of(tmp_path / "metadata.csv") == "folder"
    for name in ("a/train/metadata.jsonl", "b/data/test/wav.scp", "c/test/metadata.parquet", "d/m.jsonl.gz"):
        path = tmp_path / "sets" / name
        path.parent.mkdir(parents=True)
        path.touch()
        assert evaluate.source_of(path) == evaluate.source_of(tmp_path / "sets" / name[0]) == "folder"
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "sets" / "a")
    assert evaluate.source_of(Path(packed)) == "folder"


def test_only_the_test_split_is_measured_where_the_data_has_one() -> None:
    clips = evaluate.read_clips(config_of("--max-clips", 5))
    assert len(clips) == 5
    assert {clip.meta["split"] for clip in clips} == {"test"}
    assert not any(clip.text.isupper() for clip in clips)


def test_the_stock_model_is_told_by_the_checkpoints_shape() -> None:
    shapes = {"tiny.en": (384, 4, 51_864), "base": (512, 6, 51_865), "large-v3-turbo": (1280, 4, 51_866)}
    for variant, (width, layers, vocabulary) in shapes.items():
        shape = WhisperConfig(d_model=width, decoder_layers=layers, vocab_size=vocabulary)
        assert evaluate.stock_variant(shape) == variant
    with pytest.raises(ModelError, match="name it with --stock"):
        evaluate.stock_variant(WhisperConfig(d_model=64, decoder_layers=2))


def test_set_has_the_last_word() -> None:
    assert config_of("--max-clips", 9, "--set", "data.max_test=3", "--quick").data.max_test == 3
    with pytest.raises(SystemExit):
        evaluate.parse_arguments(["--model", "tiny.en", "--stock", "base", "--no-stock"])


@pytest.mark.slow
def test_each_row_is_measured_in_its_own_language(
    call: Callable[..., int], tmp_path: Path, base: Any, espeak: Callable[[str, str], bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, run_dir = tmp_path / "mine", tmp_path / "run"
    data.mkdir()
    rows = [("hi", "Hindi", "बैठक शुक्रवार को होगी"), ("cmn", "cmn", "我们今天去公园散步"),
            ("de", "", "Wir gehen heute im Park spazieren und danach nach Hause.")]  # fmt: skip
    lines = ["file_name,text,language"]
    for voice, mark, text in rows:
        (data / f"{voice}.wav").write_bytes(espeak(text, voice))
        lines.append(f"{voice}.wav,{text},{mark}")
    (data / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    assert call("--model", "base", "--no-stock", "--data", data, "--run-dir", run_dir) == 0
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])
    metrics = {language: list(rate) for language, rate in figures["languages"].items()}
    assert metrics == {"hi": ["wer"], "zh": ["cer"], "de": ["wer"]}  # the model heard the German
    assert figures["mean"] == pytest.approx(
        sum(rate for rates in figures["languages"].values() for rate in rates.values()) / 3, abs=1e-3
    )
    for part in (
        "| Chinese ",
        "CER",
        "plain-v2-zh",
        "mean of 3 languages",
        "ended at a limit",
    ):  # of 1 token per second
        assert part in printed
    predictions = summarize_run(run_dir).predictions["tuned"]
    assert {row.id.removesuffix(".wav"): row.language for row in predictions} == {"hi": "hi", "cmn": "zh", "de": "de"}


@pytest.mark.slow
def test_translations_are_recased_as_english_whatever_is_spoken(
    call: Callable[..., int], tmp_path: Path, base: Any, jfk: Any
) -> None:
    data, run_dir = tmp_path / "mine", tmp_path / "run"
    data.mkdir()
    sf.write(data / "a.wav", jfk[: 2 * SAMPLE_RATE], SAMPLE_RATE)
    (data / "metadata.csv").write_text("file_name,text,language\na.wav,I LIKE IT,Turkish\n")
    given = ("--model", "base", "--no-stock", "--data", data, "--run-dir", run_dir, "--set", "model.task=translate")
    assert call(*given) == 0
    assert [row.reference for row in summarize_run(run_dir).predictions["tuned"]] == ["I like it."]
