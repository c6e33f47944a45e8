"""Folders of recordings with transcripts become folders of clips, once, and train like any other."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from src.data.audio import SAMPLE_RATE, load_audio
from src.data.preparation import prepare_datasets
from src.data.report.report import DataReport, build_data_report
from src.data.sources.catalog import read_folder
from src.data.utterance import Utterance
from src.inference.files import recordings
from src.inference.files.matching import Excerpt, MatchedRecording
from src.inference.files.recordings import prepare_recordings, with_clips
from src.utils.config import Config, load_config
from src.utils.errors import DataError
from src.utils.files import atomic_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three recordings of 40 s of noise with subtitles of two sentences."""
    found = tmp_path / "in"
    found.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        sf.write(found / f"{name}.wav", rng.uniform(-0.3, 0.3, 40 * SAMPLE_RATE), SAMPLE_RATE)
        cues = "".join(f"{i}\n00:00:{i}0,000 --> 00:00:{i}5,000\nSentence {i} of {name}.\n\n" for i in (1, 2, 3))
        (found / f"{name}.srt").write_text(cues)
    return found


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Config:
    return load_config(None, overrides={
        "data": {"source": "folder", "path": str(folder)}, "paths.cache_dir": str(tmp_path / "cache"),
        "model.variant": "tiny.en", "model.language": "en",
    })  # fmt: skip


@pytest.fixture(autouse=True)
def matched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every sentence is found where its cue is, but the third ones; the list counts the recordings."""
    calls: list[int] = []

    def match(audio: np.ndarray, passages: Any, *_: Any, **__: Any) -> MatchedRecording:
        calls.append(len(passages))
        excerpts = [
            Excerpt(p.text, p.start_sec, p.end_sec, p.start_sec - 0.25, p.end_sec + 0.25, "SPEAKER_00", p.text,
                    -float(i), "'x' is not what is heard" if i == 2 else None)
            for i, p in enumerate(passages)
        ]  # fmt: skip
        return MatchedRecording(tuple(excerpts), 40.0, 20.0, 10.0, "en")

    monkeypatch.setattr(recordings, "match_transcript", match)
    monkeypatch.setattr(recordings, "load_engine", lambda *_: None)
    return calls


def test_clips_have_their_audio_their_text_and_where_they_are_from(
    folder: Path, config: Config, tmp_path: Path
) -> None:
    prepared = prepare_recordings(folder, tmp_path / "out", config)
    rows = list(csv.DictReader((tmp_path / "out" / "metadata.csv").open()))
    assert (prepared.clips, len(rows), len(prepared.rejected)) == (6, 6, 3)
    assert rows[1] == {
        "file_name": "a-000020000.flac", "text": "Sentence 2 of a.", "speaker": "a.wav SPEAKER_00", "language": "en",
        "recording": "a.wav", "recording_start": "20.0", "recording_end": "25.0", "score": "-1.0",
    }  # fmt: skip
    whole = load_audio(folder / "a.wav")
    clip = load_audio(tmp_path / "out" / "a-000020000.flac")
    assert np.abs(clip - whole[round(19.75 * SAMPLE_RATE) : round(25.25 * SAMPLE_RATE)]).max() < 1e-4
    notes = json.loads((tmp_path / "out" / "preparation.json").read_text())
    assert [row["reason"] for row in notes["rejected"]] == ["'x' is not what is heard"] * 3
    assert (
        notes["recordings"][0] | {"recording": "a.wav", "clips": 2, "rejected": 1, "speech_sec": 20.0}
        == (notes["recordings"][0])
    )
    assert (prepared.speech_share, prepared.reasons()) == (0.5, {"is not what is heard": 3})


def test_a_folder_source_cuts_its_recordings_once(config: Config, matched: list[int], folder: Path) -> None:
    with pytest.raises(DataError, match=r"in: long recordings .* config = with_clips\(config\)"):
        prepare_datasets(config)
    splits = prepare_datasets(with_clips(config))
    assert matched == [3, 3, 3]
    assert {u.speaker for u in splits.utterances} == {f"{name}.wav SPEAKER_00" for name in "abc"}
    assert not splits.shared_speakers
    assert sorted(u.text for u in splits.utterances) == [f"Sentence {i} of {n}." for i in (1, 2) for n in "abc"]
    prepare_datasets(with_clips(config))
    assert len(matched) == 3
    (folder / "a.srt").write_text((folder / "a.srt").read_text().replace("Sentence", "Phrase"))
    assert any(u.text.startswith("Phrase") for u in prepare_datasets(with_clips(config)).utterances)
    assert len(matched) == 6


def test_the_data_report_says_what_was_left_out_and_what_to_listen_to(config: Config, tmp_path: Path) -> None:
    report = build_data_report(prepare_datasets(with_clips(config)), config)
    assert report.recordings is not None and report.rejected is not None and report.doubtful is not None
    assert report.recordings["covered_sec"].tolist() == [10.0] * 3
    assert len(report.rejected) == 3
    assert report.doubtful["score"].tolist() == [-1.0] * 3 + [0.0] * 3
    assert report._repr_html_().count("<audio") == 6
    assert any(f.topic == "recordings" and f.level == "warning" for f in report.findings)
    report.save(tmp_path / "run")
    loaded = DataReport.load(tmp_path / "run")
    assert loaded.doubtful is not None and loaded.doubtful["id"].tolist() == report.doubtful["id"].tolist()
    assert "a.wav" in loaded.to_text()
    assert str(config.paths.cache_dir) not in (tmp_path / "run" / "data_report.json").read_text()
    assert "<audio" not in loaded._repr_html_()
    (tmp_path / "private.flac").write_bytes(b"private")
    texts = report.doubtful.assign(text=str(tmp_path / "private.flac"))
    assert replace(report, doubtful=texts)._repr_html_().count("<audio") == 6


def test_short_recordings_with_plain_text_are_clips_already(
    sample: list[Utterance], config: Config, tmp_path: Path, matched: list[int]
) -> None:
    source = tmp_path / "short"
    source.mkdir()
    for utterance in sample[:4]:
        sf.write(source / f"{utterance.id}.wav", load_audio(utterance.audio), SAMPLE_RATE)
        (source / f"{utterance.id}.txt").write_text(utterance.text.lower() + "\n")
    prepare_recordings(source, tmp_path / "out", config)
    found = read_folder(tmp_path / "out")
    assert not matched
    assert [u.text for u in found] == sorted((u.text.lower() for u in sample[:4]), key=[u.text for u in found].index)
    assert {u.speaker for u in found} == {None}

    # a text does not fit to half of its clip
    clip = source / f"{sample[0].id}.wav"
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"{clip.name}: truncated"):
        prepare_recordings(source, tmp_path / "more", config)


def test_speakers_are_names_else_recordings_else_unknown() -> None:
    def speakers(*rows: tuple[str, str | None]) -> list[object]:
        given: list[dict[str, object]] = [{"recording": recording, "speaker": speaker} for recording, speaker in rows]
        recordings._fill_speakers(given)
        return [row["speaker"] for row in given]

    assert speakers(("a", "Anna"), ("a", "Ben"), ("b", "Cy")) == ["Anna", "Ben", "Cy"]
    assert speakers(("a", "speaker 1"), ("b", "speaker 1"), ("c", "S2")) == ["a speaker 1", "b speaker 1", "c S2"]
    assert speakers(("a", None), ("a", None), ("b", "x"), ("c", None)) == ["a", "a", "b", "c"]
    assert speakers(("a", None), ("b", None), ("a", None)) == [None] * 3


@pytest.mark.parametrize(("change", "reason"), [
    (lambda folder: (folder / "metadata.csv").write_text("file_name,text\n"), "there is a manifest already"),
    (lambda folder: [p.unlink() for p in folder.glob("*.srt")], "no recording with a transcript"),
    (lambda folder: (folder / "a.srt").write_text("x"), r"a\.srt: no text"),
    (lambda folder: (folder / "b.wav").write_bytes(b"RIFF"), r"b\.wav"),
])  # fmt: skip
def test_what_cannot_be_cut_is_refused_and_leaves_nothing(
    folder: Path, config: Config, tmp_path: Path, change: Any, reason: str
) -> None:
    change(folder)
    with pytest.raises(DataError, match=reason):
        prepare_recordings(folder, tmp_path / "out", config)
    assert not list(tmp_path.glob("*out*"))


def test_what_cannot_be_cut_is_left_out_where_bad_recordings_are_skipped(
    folder: Path, config: Config, tmp_path: Path
) -> None:
    (folder / "a.srt").write_text("x")
    (folder / "b.wav").write_bytes(b"RIFF")
    config = config.model_copy(update={"data": config.data.model_copy(update={"on_error": "skip"})})
    prepared = prepare_recordings(folder, tmp_path / "out", config)
    assert (prepared.clips, len(prepared.recordings)) == (2, 1)
    assert [(row["recording"], str(folder) in str(row["reason"])) for row in prepared.rejected[:2]] == [
        ("a.wav", True), ("b.wav", True),
    ]  # fmt: skip


def test_a_taken_output_and_a_transcript_without_a_match_are_refused(
    folder: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_folder(tmp_path / "out") as taken:
        (taken / "x").touch()
    with pytest.raises(DataError, match="out: exists already"):
        prepare_recordings(folder, tmp_path / "out", config)
    lost = (Excerpt("x", 0.0, 1.0, reason="nothing was heard"),)
    monkeypatch.setattr(recordings, "match_transcript", lambda *_, **__: MatchedRecording(lost, 40.0, 20.0, 0.0, "en"))
    with pytest.raises(DataError, match=r"nothing of 3 transcript\(s\) matches.*nothing was heard"):
        prepare_recordings(folder, tmp_path / "new", config)
