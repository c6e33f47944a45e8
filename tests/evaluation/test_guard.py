from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile as sf

from src.data.audio import load_audio
from src.data.sources import hub
from src.data.sources.catalog import SAMPLE_CLIP
from src.data.utterance import Utterance
from src.evaluation import guard as guard_module
from src.evaluation.guard import CLIP_TEXT, GuardSet, evaluate_guard, prepare_guard_set
from src.evaluation.report.run_files import latest_evaluations, load_metrics, load_predictions
from src.evaluation.report.summary import summarize_run
from src.utils.config import Config, load_config
from src.utils.errors import DataError, SourceUnavailableError
from src.utils.tracking import ExperimentLogger
from tests.data.hub_layout import write_librispeech


def guarded(guard: dict[str, Any], **other: Any) -> Config:
    return load_config(None, overrides={"device": "cpu", "guard": guard, **other})


def write_folder(path: Path, clips: list[Utterance], language: str | None = None) -> Path:
    path.mkdir(parents=True)
    lines = ["file_name,text,speaker,language"]
    for clip in clips:
        sf.write(path / f"{clip.id}.flac", load_audio(clip.audio), 16_000)
        lines.append(f"{clip.id}.flac,{clip.text},{clip.speaker},{language or ''}")
    (path / "metadata.csv").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def by_speaker(sample: list[Utterance]) -> list[Utterance]:
    """36 clips of 12 speakers, speaker by speaker, as corpora are ordered."""
    clips: dict[str | None, list[Utterance]] = {}
    for utterance in sample:
        clips.setdefault(utterance.speaker, []).append(utterance)
    return [u for part in list(clips.values())[:12] for u in part[:3]]


@pytest.fixture
def librispeech(tmp_path: Path, by_speaker: list[Utterance], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as on the Hub, in the corpus's place."""
    splits = {"train.100": by_speaker[:2], "validation": by_speaker[2:4], "test": by_speaker}
    root = write_librispeech(tmp_path / "librispeech", splits)
    monkeypatch.setitem(hub.CORPORA, "librispeech", replace(hub.CORPORA["librispeech"], id=str(root)))
    return root


def test_offline_the_default_is_the_bundled_clip_and_the_reason_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert prepare_guard_set(guarded({"source": "none"})) is None
    guard = prepare_guard_set(guarded({}))
    assert guard is not None
    assert [u.text for u in guard.utterances] == [CLIP_TEXT]
    assert guard.utterances[0].duration_sec == pytest.approx(11, abs=0.1)
    assert "OfflineModeIsEnabled" in caplog.text


def test_a_source_that_was_asked_for_is_never_replaced() -> None:
    with pytest.raises(SourceUnavailableError, match="librispeech"):
        prepare_guard_set(guarded({"source": "librispeech"}))
    with pytest.raises(SourceUnavailableError, match="nowhere"):
        prepare_guard_set(guarded({"source": "parquet", "path": "nowhere"}))


def test_librispeech_is_spread_over_speakers(librispeech: Path, by_speaker: list[Utterance]) -> None:
    guard = prepare_guard_set(guarded({"source": "auto", "max_clips": 10}))
    assert guard is not None
    assert guard.name == "LibriSpeech test-clean"
    assert len(guard.utterances) == len({u.speaker for u in guard.utterances}) == 10
    assert guard.language == "en"
    assert guard.utterances[0].text == by_speaker[0].text.capitalize() + "."  # capitals are not Whisper's style
    more = prepare_guard_set(guarded({"source": "librispeech", "max_clips": 20}))
    assert more is not None
    assert [u.id for u in more.utterances] == [u.id for i, u in enumerate(by_speaker) if i % 3 < 2][:20]


def test_a_connection_that_breaks_gives_way_to_the_clip(
    librispeech: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(stream: Iterator[Utterance], *, max_per_speaker: int) -> Iterator[Utterance]:
        yield next(stream)
        raise SourceUnavailableError("connection reset")

    monkeypatch.setattr(guard_module, "_spread", broken)
    guard = prepare_guard_set(guarded({}))
    assert guard is not None
    assert guard.utterances[0].audio == SAMPLE_CLIP
    assert "connection reset" in caplog.text


def test_clips_of_the_training_data_are_left_out(
    tmp_path: Path, by_speaker: list[Utterance], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_folder(tmp_path / "own", by_speaker[:6])
    config = guarded({"source": "folder", "path": str(path)}, data={"source": "folder", "path": str(path)})
    whole = prepare_guard_set(config)
    assert whole is not None
    assert len(whole.utterances) == 6
    fewer = prepare_guard_set(guarded({"source": "folder", "path": str(path), "max_clips": 4}))
    assert fewer is not None
    assert len(fewer.utterances) == 4
    assert "among the sources of the training data" in caplog.text
    recased = [replace(u, text=u.text.upper().rstrip(".")) for u in whole.utterances]
    rest = prepare_guard_set(config, exclude=recased[:4])
    assert rest is not None
    assert [u.id for u in rest.utterances] == [u.id for u in whole.utterances[4:]]
    assert "4 clip(s)" in caplog.text
    with pytest.raises(DataError, match="6 clips"):
        prepare_guard_set(config, exclude=recased)
    other_words = [replace(u, text="something else") for u in recased]  # two corpora may both have a clip 0001
    unrelated = prepare_guard_set(config, exclude=other_words)
    assert unrelated is not None
    assert len(unrelated.utterances) == 6


def test_speech_of_another_language_is_no_guard(
    tmp_path: Path, by_speaker: list[Utterance], caplog: pytest.LogCaptureFixture
) -> None:
    french = {"variant": "tiny", "language": "fr"}
    assert prepare_guard_set(guarded({}, model=french)) is None
    assert "model.language" in caplog.text
    clip = replace(by_speaker[0], duration_sec=1.0, language="en")
    assert evaluate_guard({}, None, GuardSet("x", (clip,), "en"), guarded({}, model=french)) == {}
    path = write_folder(tmp_path / "fr", by_speaker[:2], language="fr-FR")
    own = {"source": "folder", "path": str(path)}
    assert prepare_guard_set(guarded(own, model={"variant": "tiny", "language": "en"})) is None
    guard = prepare_guard_set(guarded(own, model=french))
    assert guard is not None
    assert guard.language == "fr"
    (path / "metadata.csv").write_text((path / "metadata.csv").read_text().replace("fr-FR", "de", 1))
    with pytest.raises(DataError, match="de, fr"):
        prepare_guard_set(guarded(own, model=french))


def test_results_are_kept_apart_from_the_test_set(small: tuple[Any, Any], config: Config) -> None:
    model, processor = small
    tuned = copy.deepcopy(model)
    tuned.audio_context = "dynamic"
    guard = prepare_guard_set(config)
    assert guard is not None
    with ExperimentLogger(config, run_id="r") as experiment:
        results = evaluate_guard({"stock": model, "tuned": tuned}, processor, guard, config, experiment=experiment)
    assert list(results) == ["stock (guard)", "tuned (guard)"]
    assert [result.audio_context for result in results.values()] == ["full", "dynamic"]
    rows = load_metrics(experiment.dir)
    assert [row["event"] for row in rows] == ["guard", "evaluation", "evaluation"]
    assert latest_evaluations(rows) == {}
    assert load_predictions(experiment.dir) == {}
    assert list(load_predictions(experiment.dir, guard=True)) == list(results)
    text = summarize_run(experiment.dir).to_text()
    assert "bundled public clip, 1 clip" in text
    assert f"{results['tuned (guard)'].wer:.3f}" in text
