from __future__ import annotations

import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from src.data import audio, preparation
from src.data.dataset import decode_audio
from src.data.loader import create_dataloaders
from src.data.preparation import prepare_datasets
from src.data.report.report import build_data_report
from src.data.sources.catalog import read_folder
from src.data.utterance import TimedText
from src.data.vad import VoiceActivityDetector
from src.utils.config import Config, load_config
from src.utils.errors import DataError
from tests.data.recordings import two_tracks


def write_folder(path: Path, rows: list[tuple[str, str, str]], *, header: str = "file_name,text,speaker") -> Path:
    path.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    lines = [header]
    for name, text, speaker in rows:
        if not (path / name).exists() and "absent" not in name:
            sf.write(path / name, 0.1 * rng.standard_normal(16_000).astype(np.float32), 16_000)
        lines.append(f"{name},{text},{speaker}")
    (path / "metadata.csv").write_text("\n".join(lines) + "\n")
    return path


def folder_config(path: Path, **data: object) -> Config:
    return load_config(None, overrides={"data": {"source": "folder", "path": str(path), **data}})


def test_given_splits_are_honoured_and_durations_measured() -> None:
    splits = prepare_datasets(load_config(None))
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [360, 40, 100]
    assert splits.shared_speakers == ()
    assert splits.label_case == "sentence"
    assert splits.train[0].text == "So similar yet so different."
    assert splits.train[0].duration_sec == pytest.approx(3.735, abs=0.05)


def test_caps_take_the_same_clips_each_time_and_never_the_head(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(None, overrides={"data": {"max_train": 20, "max_validation": 5, "max_test": 10_000}})
    with caplog.at_level("INFO"):
        first, second = prepare_datasets(config), prepare_datasets(config)
    assert first.train == second.train
    assert len(first.train) == 20
    assert len({u.speaker for u in first.train}) > 10
    assert len(first.test) == 100
    assert "10000 asked for, 100 exist" in caplog.text
    assert "train: 20 of 360 are taken, as data.max_train says" in caplog.text


def test_missing_splits_are_cut_by_speaker(tmp_path: Path) -> None:
    rows = [(f"{i}.wav", f"text {i}", f"s{i % 6}") for i in range(36)]
    splits = prepare_datasets(folder_config(write_folder(tmp_path / "d", rows)))
    parts = [splits.train, splits.validation, splits.test]
    assert sum(map(len, parts)) == 36
    speakers = [{u.speaker for u in part} for part in parts]
    assert all(speakers)
    assert sum(map(len, speakers)) == 6
    assert splits.shared_speakers == ()


def test_one_speaker_cannot_be_split(tmp_path: Path) -> None:
    rows = [(f"{i}.wav", "text", "s1") for i in range(9)]
    with pytest.raises(DataError, match="1 speaker"):
        prepare_datasets(folder_config(write_folder(tmp_path / "d", rows)))


@pytest.mark.parametrize(
    ("split", "named"), [("trian", "unknown split 'trian'"), ("test", "no utterance is in the train")]
)
def test_a_split_that_cannot_be_used_is_named(tmp_path: Path, split: str, named: str) -> None:
    rows = [("a.wav", "text", split)]
    with pytest.raises(DataError, match=named):
        prepare_datasets(folder_config(write_folder(tmp_path / "d", rows, header="file_name,text,split")))


def test_shared_speakers_and_texts_are_reported(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "d", [("a.wav", "same", "s1"), ("b.wav", "same", "s1"), ("c.wav", "other", "s2")])
    lines = ["file_name,text,speaker,split", "a.wav,same,s1,train", "b.wav,same,s1,test", "c.wav,other,s2,dev"]
    (path / "metadata.csv").write_text("\n".join(lines))
    splits = prepare_datasets(folder_config(path))
    assert splits.shared_speakers == ("s1",)
    assert splits.shared_texts == 1


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    rows = [(f"{i}.wav", f"text {i}", f"s{i % 6}") for i in range(30)]
    path = write_folder(tmp_path / "d", [*rows, ("absent.wav", "gone", "s1"), ("silent.wav", "nothing", "s2")])
    sf.write(path / "silent.wav", np.zeros(16_000), 16_000)
    with (path / "metadata.csv").open("a") as file:
        file.write("3b.wav,,s3\n")
    return path


def test_the_first_bad_recording_stops_and_is_named_with_its_line(faulty: Path) -> None:
    with pytest.raises(DataError, match=r"(absent|silent|3b)\.wav.*of the manifest[^\0]*data.on_error"):
        prepare_datasets(folder_config(faulty))


def test_skip_counts_every_bad_recording_with_its_reason_up_to_a_limit(faulty: Path) -> None:
    splits = prepare_datasets(folder_config(faulty, on_error="skip"))
    reasons = {row.id: row.reason for row in splits.skipped}
    assert set(reasons) == {"absent.wav", "silent.wav", "3b.wav"}
    for name, reason in (("absent.wav", "no such file"), ("silent.wav", "silent"), ("3b.wav", "transcript is empty")):
        assert reason in reasons[name]
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == 30
    with pytest.raises(DataError, match="3 of 33"):
        prepare_datasets(folder_config(faulty, on_error="skip", max_skip_fraction=0.05))


def test_recasing_starts_from_the_source_and_can_be_changed() -> None:
    splits = prepare_datasets(load_config(None, overrides={"data": {"max_train": 4, "max_test": 4}}))
    text = splits.train[0].text
    assert text != text.upper()
    kept = splits.with_label_case("keep")
    assert kept.train[0].text == text.upper().rstrip(".")
    assert kept.with_label_case("sentence").train[0].text == text
    assert all(splits.stats[u.id].duration_sec == u.duration_sec for u in splits.utterances)


def test_a_signal_to_noise_ratio_of_the_source_is_better_than_the_measured_one(tmp_path: Path) -> None:
    rows = [(f"{speaker}.wav", "x", f"{speaker},{snr}") for speaker, snr in (("a", "12.5"), ("b", "7"), ("c", "3"))]
    given = prepare_datasets(folder_config(write_folder(tmp_path, rows, header="file_name,text,speaker,snr_db")))
    assert {u.id: u.columns for u in given.utterances} == {
        "a.wav": {"snr_db": "12.5", "line": 2}, "b.wav": {"snr_db": "7", "line": 3}, "c.wav": {"snr_db": "3", "line": 4}
    }  # fmt: skip
    write_folder(tmp_path, [(name, text, rest.split(",")[0]) for name, text, rest in rows])
    splits = prepare_datasets(folder_config(tmp_path))
    for number, utterance in enumerate(sorted(splits.utterances, key=lambda u: u.id)):
        measured_db = round(splits.stats[utterance.id].snr_db, 1)
        assert utterance.columns == {"snr_db": measured_db, "line": 2 + number}


def test_rows_keep_their_paths_and_share_what_they_lack(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", [(f"{name}.wav", "x", name) for name in "abc"])
    first, second, _ = read_folder(folder)
    assert first.audio == folder / "a.wav"
    assert first.meta is second.meta
    copied = pickle.loads(pickle.dumps(replace(first, audio=folder / "b.wav")))
    assert (copied.audio, copied.audio_name, copied.line) == (folder / "b.wav", str(folder / "b.wav"), 2)
    assert replace(first, audio=b"RIFF").audio == b"RIFF"


def test_a_recording_longer_than_allowed_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "d", [("a.wav", "x", "s1"), ("b.wav", "y", "s2"), ("c.wav", "z", "s3")])
    sf.write(path / "b.wav", 0.1 * np.ones(40 * 8_000, dtype=np.float32), 8_000)
    with pytest.raises(DataError, match=r"b\.wav.*cut it at a pause"):
        prepare_datasets(folder_config(path))


def test_clips_that_cutters_leave_a_little_too_long_are_taken_without_their_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_folder(tmp_path / "d", [(f"{name}.wav", name, name) for name in "abcd"])
    noise = 0.1 * np.random.default_rng(0).normal(size=32 * 8_000).astype(np.float32)
    sf.write(path / "a.wav", noise[: round(30.02 * 8_000)], 8_000)
    sf.write(path / "b.wav", noise[: round(30.5 * 8_000)], 8_000)
    splits = prepare_datasets(folder_config(path))
    by_id = {utterance.id: utterance for utterance in splits.utterances}
    for name in ("a.wav", "b.wav"):
        assert by_id[name].duration_sec == 30.0
        assert len(decode_audio(by_id[name])) == 30 * 16_000
    assert "2 clip(s) are up to 0.50 s longer than 30 s" in caplog.text
    sf.write(path / "b.wav", noise[: round(30.6 * 8_000)], 8_000)
    with pytest.raises(DataError, match=r"b\.wav.*cut it at a pause"):
        prepare_datasets(folder_config(path))


def test_a_cut_recording_is_refused_and_a_crashed_one_is_taken(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "d", [(f"{name}.wav", name, name) for name in "abcd"])
    content = (path / "a.wav").read_bytes()
    (path / "a.wav").write_bytes(content[:40] + bytes(4) + content[44:])
    assert len(prepare_datasets(folder_config(path)).utterances) == 4
    (path / "b.wav").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"b\.wav: truncated, or never finished"):
        prepare_datasets(folder_config(path))


def test_longer_recordings_are_cut_at_their_longest_pauses(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "d", [(f"{name}.wav", name, "") for name in "xyz"])
    times = [(0.5, 9.0), (9.2, 17.0), (19.0, 26.0), (26.1, 33.0), (40.0, 49.0), (50.0, 58.0)]
    sound = np.zeros(60 * 8_000, np.float32)
    for begin, end in times:
        sound[int(begin * 8_000) : int(end * 8_000)] = (
            0.1 * np.sin(np.arange(int((end - begin) * 8_000) + 1))[: int(end * 8_000) - int(begin * 8_000)]
        )
    sf.write(path / "talk.wav", sound, 8_000)
    said = "".join(f"<|{begin:.2f}|> part {number}<|{end:.2f}|>" for number, (begin, end) in enumerate(times))
    with (path / "metadata.csv").open("a") as file:
        file.write(f"talk.wav,{said},\n")
    with pytest.raises(DataError, match=r"talk\.wav.*longer than 30"):
        prepare_datasets(folder_config(path))
    splits = prepare_datasets(folder_config(path, cut=True))
    pieces = [u for u in splits.utterances if u.id.startswith("talk.wav")]
    assert [u.text for u in pieces] == ["part 0 part 1", "part 2 part 3", "part 4 part 5"]
    spans = [(u.audio.start_sec, u.audio.end_sec) for u in pieces]  # type: ignore[union-attr]
    assert spans == [(0.25, 17.25), (18.75, 33.25), (39.75, 58.25)]
    assert [part.start_sec for part in pieces[1].parts] == [pytest.approx(0.25), pytest.approx(7.35)]
    assert sum(any(u in part for u in pieces) for part in splits.parts.values()) == 1
    for piece in pieces:
        assert len(decode_audio(piece)) == round((piece.duration_sec or 0) * 16_000)


def test_the_setting_chooses_a_track_of_files_and_of_their_parts(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "d", [(f"{name}.wav", name, name) for name in "abc"])
    for name in "abc":
        (path / f"{name}.wav").write_bytes(two_tracks())
    rows = [f"{name}.wav,{name},{name}" for name in "abc"]
    (path / "metadata.csv").write_text("\n".join(["file_name,text,speaker", *rows]))
    with pytest.raises(DataError, match="silent"):
        prepare_datasets(folder_config(path))
    chosen = folder_config(path, audio_track=2)
    assert all(0.4 < decode_audio(u).max() < 0.6 for u in prepare_datasets(chosen).utterances)
    parts = [f"{row},0.5,1.5" for row in rows]
    (path / "metadata.csv").write_text("\n".join(["file_name,text,speaker,start,end", *parts]))
    splits = prepare_datasets(chosen)
    assert [u.duration_sec for u in splits.utterances] == [pytest.approx(1.0)] * 3
    assert all(0.4 < decode_audio(u).max() < 0.6 for u in splits.utterances)


@pytest.mark.slow
def test_recordings_are_decoded_once_before_the_first_update(
    _tiny_en: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: Counter[str | None] = Counter()

    def count(source: Any, *, name: str | None = None, **options: Any) -> audio.DecodedAudio:
        decoded[name] += 1
        return original(source, name=name, **options)

    original = audio.decode
    for module in (audio, preparation):
        monkeypatch.setattr(module, "decode", count)
    path = write_folder(tmp_path / "d", [(f"{i}.wav", f"text {i}", f"s{i % 6}") for i in range(12)])
    data = {"source": "folder", "path": str(path), "cache_decoded": True, "num_workers": 0}
    config = load_config(None, overrides={"data": data, "device": "cpu", "paths.cache_dir": str(tmp_path / "cache")})
    splits = prepare_datasets(config, vad=VoiceActivityDetector(config.vad))
    report = build_data_report(splits, config, tokenizer=_tiny_en[1].tokenizer)
    assert report.clips["speech_fraction"].notna().all()
    batches = list(create_dataloaders(splits, _tiny_en[1], config).train)
    assert sum(len(batch["ids"]) for batch in batches) == len(splits.train)
    assert decoded == {str(path / f"{i}.wav"): 1 for i in range(12)}
    assert len(list((tmp_path / "cache" / "audio").rglob("*.flac"))) == 12


def test_speech_is_looked_for_in_a_sample_that_the_report_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, overrides={"data": {"max_train": 30, "max_validation": 10, "max_test": 10}})
    monkeypatch.setattr(preparation, "MAX_VAD_CLIPS", 10)
    report = build_data_report(prepare_datasets(config, vad=VoiceActivityDetector()), config)
    columns = ["speech_fraction", "leading_silence_sec", "trailing_silence_sec"]
    found = len(report.clips[columns].dropna())
    assert 0 < found <= 10
    assert any(f"on {found} of 50 clips" in finding.message for finding in report.findings)
    assert build_data_report(prepare_datasets(config), config).clips[columns].isna().all(axis=None)


# languages and special tokens


def language_folder(path: Path, marks: list[str], column: str = "language", text: str = "hello there") -> Path:
    rows = [(f"{i}.wav", f"{text} {i}", f"s{i},{mark}") for i, mark in enumerate(marks)]
    return write_folder(path, rows, header=f"file_name,text,speaker,{column}")


@pytest.mark.parametrize("column", ["language", "lang", "locale", "lang_id"])
def test_marks_of_language_become_codes_and_rows_without_one_take_the_setting(tmp_path: Path, column: str) -> None:
    marks = [
        "hi",
        "hin",
        "Hindi",
        "zh-TW",
        "cmn_hans_cn",
        "nb",
        "iw",
        "fil",
        "und",
        "mul",
        "zxx",
        "",
        "nan",
        "NaN",
        "7",
    ]
    codes = ["hi", "hi", "hi", "zh", "zh", "no", "he", "tl", *[None] * 7]
    config = folder_config(language_folder(tmp_path, marks, column))
    assert {u.id: u.language for u in prepare_datasets(config).utterances} == {
        f"{i}.wav": code for i, code in enumerate(codes)
    }
    config = config.model_copy(update={"model": config.model.model_copy(update={"language": "de"})})
    assert Counter(u.language for u in prepare_datasets(config).utterances)["de"] == 7


def test_a_language_without_a_token_takes_the_setting_once_logged_or_is_refused_by_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = language_folder(tmp_path, ["Kinyarwanda", *["sw"] * 5, "rw"])
    with pytest.raises(DataError, match=r"utterance 0\.wav \(line 2 .*'Kinyarwanda' has no token.*model\.language"):
        prepare_datasets(folder_config(folder))
    config = load_config(None, overrides={**folder_config(folder).model_dump(), "model.language": "sw"})
    splits = prepare_datasets(config)
    assert {u.language for u in splits.utterances} == {"sw"}
    assert sum("no token in Whisper" in message for message in caplog.messages) == 2  # one for each mark


def test_an_english_model_refuses_rows_in_another_language_or_skips_them(tmp_path: Path) -> None:
    folder = language_folder(tmp_path, ["en"] * 11 + ["hi"])
    config = load_config(None, overrides={**folder_config(folder).model_dump(), "model.variant": "tiny.en"})
    with pytest.raises(DataError, match=r"utterance 11\.wav .*its language is Hindi.*set model\.variant: tiny"):
        prepare_datasets(config)
    skipped = prepare_datasets(
        config.model_copy(update={"data": config.data.model_copy(update={"on_error": "skip"})})
    ).skipped
    assert [row.id for row in skipped] == ["11.wav"]


def test_each_language_has_its_own_case(tmp_path: Path) -> None:
    rows = [(f"{i}.wav", "THIS IS I", f"s{i},en") for i in range(4)]
    rows += [(f"zh{i}.wav", "他在ABC公司", f"z{i},zh") for i in range(4)]
    splits = prepare_datasets(folder_config(write_folder(tmp_path, rows, header="file_name,text,speaker,language")))
    assert {u.text for u in splits.utterances} == {"This is I.", "他在ABC公司"}


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|en|>", "<|startoftranscript|>", "<|notimestamps|>"])
def test_a_special_token_in_a_transcript_is_refused_by_row(tmp_path: Path, token: str) -> None:
    rows = [(f"{i}.wav", "hello", f"s{i}") for i in range(11)] + [("x.wav", f"hello {token} there", "sx")]
    folder = write_folder(tmp_path, rows)
    with pytest.raises(DataError, match=rf"utterance x\.wav \(line 13 .*{re.escape(token)}"):
        prepare_datasets(folder_config(folder))
    assert [row.id for row in prepare_datasets(folder_config(folder, on_error="skip")).skipped] == ["x.wav"]


def test_times_in_transcripts_are_taken_out_and_kept(tmp_path: Path) -> None:
    rows = [(f"{i}.wav", "<|0.00|> HELLO<|0.40|><|0.50|> I SEE<|1.00|>", f"s{i}") for i in range(6)]
    splits = prepare_datasets(folder_config(write_folder(tmp_path, rows)))
    assert {u.text for u in splits.utterances} == {"Hello I see."}
    assert splits.train[0].parts[1] == TimedText("I see.", 0.5, 1.0)
    assert splits.with_label_case("keep").train[0].text == "HELLO I SEE"
