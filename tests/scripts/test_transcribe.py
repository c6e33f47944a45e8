"""scripts/transcribe.py as its user runs it, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from scripts import transcribe
from scripts.recordings import caption_paths, find_recordings
from src.data.audio import SAMPLE_RATE
from src.data.sources.catalog import SAMPLE_CLIP
from src.data.vad import SpeechSegment
from src.inference.files.segmentation import TranscribedSegment
from src.inference.files.transcribe import Transcription, _reading
from src.models.export.ctranslate2 import export_ctranslate2
from src.utils.errors import DataError
from tests.data.recordings import two_tracks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(_tiny_en: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory, jfk: np.ndarray) -> Path:
    target = tmp_path_factory.mktemp("ct2") / "tiny.en"
    return export_ctranslate2(_tiny_en[0], target, processor=_tiny_en[1], quantization="int8", verify_clips=[jfk])


@pytest.fixture
def talks(tmp_path: Path, jfk: np.ndarray) -> Path:
    """A folder with a clip, the same clip under a name that differs by the suffix alone, and a broken one below."""
    folder = tmp_path / "talks"
    (folder / "day 2").mkdir(parents=True)
    for name in ("a.wav", "a.flac", "day 2/b.wav"):
        sf.write(folder / name, jfk[: 4 * SAMPLE_RATE], SAMPLE_RATE)
    (folder / "day 2" / "broken.wav").write_bytes(b"RIFF")
    (folder / "._a.wav").write_bytes(b"a file of macOS")
    (folder / "notes.md").write_text("no audio")
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *given: object) -> int:
    monkeypatch.setattr(transcribe, "setup_logging", lambda level: None)  # it would last
    return transcribe.main([*map(str, given), "--set", "device=cpu"])


def found(*inputs: object) -> list[str]:
    return [recording.path for recording in find_recordings([*map(str, inputs)])]


@pytest.mark.slow
def test_a_cold_process_loads_neither_torch_nor_transformers(model: Path) -> None:
    code = (
        f"import sys; sys.argv = ['transcribe.py', {str(SAMPLE_CLIP)!r}, '--model', {str(model)!r}];"
        "import runpy\n"
        "try: runpy.run_path('scripts/transcribe.py', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'transformers', 'httpx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    text, ended = done.stdout.splitlines()
    assert text.endswith("do for your country.")
    assert ended == "0 []", done.stderr


@pytest.mark.slow
def test_a_folder_prints_its_texts_and_lists_what_failed(
    monkeypatch: pytest.MonkeyPatch, talks: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, talks, "--model", model) == 1
    printed = capsys.readouterr()
    texts = dict(line.split("\t") for line in printed.out.splitlines())
    assert list(texts) == [str(talks / name) for name in ("a.flac", "a.wav", "day 2/b.wav")]
    assert all("fellow Americans" in text for text in texts.values())
    assert str(talks / "day 2" / "broken.wav") in printed.err
    assert call(monkeypatch, talks, "--model", model, "--on-error", "raise") == 1


@pytest.mark.slow
def test_captions_keep_folders_apart_and_are_not_written_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, talks: Path, model: Path
) -> None:
    output = tmp_path / "captions"
    given = [talks / "day 2" / "b.wav", talks / "a.wav", "--model", model, "--output", output]
    given += ["--format", "srt,txt,json"]
    assert call(monkeypatch, *given) == 0
    names = [f"{stem}.{suffix}" for stem in ("a.wav", "b") for suffix in ("json", "srt", "txt")]
    assert sorted(path.name for path in output.iterdir()) == names
    assert "words" in json.loads((output / "b.json").read_text())["segments"][0]
    (output / "b.txt").write_text("corrected by hand")
    (output / "b.srt").unlink()
    assert call(monkeypatch, *given) == 0
    assert (output / "b.txt").read_text() == "corrected by hand"
    assert (output / "b.srt").read_text().startswith("1\n00:00:00,")
    assert call(monkeypatch, *given, "--overwrite") == 0
    assert "fellow Americans" in (output / "b.txt").read_text()


@pytest.mark.slow
def test_rows_go_on_after_a_stop_and_refuse_other_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, talks: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.jsonl"
    given = [talks, "--model", model, "--output", output]
    assert call(monkeypatch, *given, "--words") == 1
    rows = output.read_text().splitlines()
    assert [Path(json.loads(row)["source"]).name for row in rows] == ["a.flac", "a.wav", "b.wav", "broken.wav"]
    word = json.loads(rows[0])["words"][0]
    assert (word["text"], sorted(word)) == ("And", ["end_sec", "probability", "start_sec", "text"])
    shutil.copy(SAMPLE_CLIP, talks / "new.flac")
    assert call(monkeypatch, *given, "--words") == 1
    assert [row for row in output.read_text().splitlines() if "new.flac" not in row] == rows
    assert call(monkeypatch, *given) == 2
    assert "words True, now False" in capsys.readouterr().err


def test_a_manifest_gives_each_recording_its_language(tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text("file_name,language\na.wav,German\nb.wav,cmn\nc.wav,\n")
    recordings = find_recordings([str(manifest)])
    assert [recording.language for recording in recordings] == ["de", "zh", None]
    assert transcribe.languages_of(recordings) == {str(tmp_path / "a.wav"): "de", str(tmp_path / "b.wav"): "zh"}
    manifest.write_text("file_name,lang\na.wav,klingon\n")
    with pytest.raises(DataError, match=r"list\.csv: a\.wav: .*'klingon'"):
        find_recordings([str(manifest)])


def test_names_in_manifests_are_found_as_in_training(tmp_path: Path) -> None:
    """Also on the command line."""
    (tmp_path / "sub").mkdir()
    for name in ("sub/a b.flac", "cafe\u0301.flac"):
        (tmp_path / name).write_bytes(SAMPLE_CLIP.read_bytes())
    paths = [str(tmp_path / "sub" / "a b.flac"), str(tmp_path / "cafe\u0301.flac")]
    uri = (tmp_path / "sub" / "a b.flac").as_uri()
    manifests = {
        "a.csv": "file_name,text\nsub\\a b.flac,x\ncaf\u00e9.flac,y\n",
        "b.csv": f"sep=;\nfile_name;text\n{uri};x\ncaf\u00e9.flac;y\n",
        "c.txt": "sub\\a b.flac\r\n  caf\u00e9.flac  \n",
        "d.json": '{"audio_filepath": "sub/a b.flac", "duration": 1}\n{"audio_filepath": "caf\u00e9.flac"}\n',
        "wav.scp": "u1 sub/a b.flac\nu2 caf\u00e9.flac\n",
        "e.jsonl": '{"source": "sub/a b.flac"}\n{"source": null}\n{"source": NaN}\n{"source": "caf\u00e9.flac"}\n',
    }
    for name, content in manifests.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert found(tmp_path / name) == paths, name
        relative = [recording.relative for recording in find_recordings([str(tmp_path / name)])]
        assert name == "wav.scp" or relative == [Path("sub", "a b.flac"), Path("cafe\u0301.flac")]
    assert found(tmp_path / "caf\u00e9.flac", uri) == [paths[1], paths[0]]
    (tmp_path / "c.txt").write_text("a\u2028b.flac\na\x0bb.flac\n", encoding="utf-8")
    assert [Path(path).name for path in found(tmp_path / "c.txt")] == ["a\u2028b.flac", "a\x0bb.flac"]
    (tmp_path / "e.jsonl").write_text('{"source": ["a"]}\n')
    with pytest.raises(DataError, match=r"e\.jsonl, line 1: the row's source is wrong"):
        found(tmp_path / "e.jsonl")
    with pytest.raises(DataError, match="no such file or folder"):
        found("n" * 5_000)


def test_a_long_name_costs_its_own_file_and_older_captions_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a" * 230 + ".flac", "a" * 253 + ".x", "\u5b57" * 83 + ".wav", "short\nERROR.flac"]
    for name in names:
        (tmp_path / name).write_bytes(b"")

    class Inference:
        def transcribe_iter(self, sources: list[str], **_: Any) -> Any:
            for source in sources:
                segment = TranscribedSegment(0.0, 1.0, "x\u2028y", -0.1, None, 1.0, 0.0, None, "en")
                yield Transcription(source, "x", 1.0, (segment,), None, "en")

    monkeypatch.setattr(transcribe, "load_inference", lambda *_, **__: Inference())
    given = [*(tmp_path / name for name in names), "--model", "base", "--format", "txt"]
    assert call(monkeypatch, *given) == 1
    err = capsys.readouterr().err
    assert "1 recording(s) failed:" in err
    assert "the name is too long for captions" in err
    written = sorted(path.name for path in tmp_path.glob("*.txt"))
    assert written == sorted(["a" * 230 + ".txt", "\u5b57" * 83 + ".txt", "short\nERROR.txt"])
    assert (tmp_path / written[0]).read_text() == "x y\n"
    assert not list(tmp_path.glob(".*"))
    os.utime(tmp_path / "short\nERROR.flac", (2**32, 2**32))
    call(monkeypatch, *given)
    assert "captions of 1 recording(s) are older" in capsys.readouterr().err
    call(monkeypatch, tmp_path / names[0], tmp_path / "short\nERROR.flac", "--model", "base")
    assert r"short\nERROR.flac" in capsys.readouterr().out


def test_it_says_which_language_was_taken_and_which_texts_ended_at_a_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, talks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    class Inference:
        def transcribe_iter(self, sources: list[str], *, languages: dict[str, str], **_: Any) -> Any:
            asked.append(languages)
            for source in sources:
                segment = TranscribedSegment(
                    0.0, 1.0, "你好", -0.1, None, 1.0, 0.0, None, "zh", truncated="b" in source
                )
                gaps = (SpeechSegment(2.0, 4.5),) * ("b" in source)
                yield Transcription(source, "你好", 1.0, (segment,), language="zh", uncovered=gaps)

    def load(model: str, config: Any, *, workers: int | None) -> Inference:
        asked.append(config.model.language)
        return Inference()

    monkeypatch.setattr(transcribe, "load_inference", load)
    (talks / "day 2" / "broken.wav").unlink()
    assert call(monkeypatch, talks, "--model", "base") == 0
    err = capsys.readouterr().err
    assert "languages of the recordings: Chinese (zh) 3" in err
    assert (
        f"1 text(s) ended at a limit of tokens; raise inference.max_tokens_per_sec, or check the language:\n  {talks}"
        in err
    )
    assert "1 text(s) leave speech out" in err
    assert asked == [None, {}]

    (talks / "list.csv").write_text("file_name,language\na.wav,deu\n")
    given = [talks / "list.csv", talks / "day 2", "--model", "base", "--language", "Mandarin Chinese"]
    assert call(monkeypatch, *given, "--output", tmp_path / "out", "--format", "json") == 0
    assert asked[2:] == ["zh", {str(talks / "a.wav"): "de"}]
    err = capsys.readouterr().err
    assert "language: Chinese (zh)" in err
    assert "1 text(s) ended at a limit" in err
    assert json.loads((tmp_path / "out" / "b.json").read_text())["truncated"] is True
    assert json.loads((tmp_path / "out" / "b.json").read_text())["uncovered"] == [{"start": 2.0, "end": 4.5}]
    assert not {"truncated", "uncovered"} & set(json.loads((tmp_path / "out" / "a.wav.json").read_text()))

    rows = tmp_path / "rows.jsonl"
    assert call(monkeypatch, talks / "day 2", "--model", "base", "--output", rows) == 0
    assert json.loads(rows.read_text())["truncated"] is True
    assert json.loads(rows.read_text())["uncovered"] == [{"start_sec": 2.0, "end_sec": 4.5}]
    err = capsys.readouterr().err
    assert "1 text(s) ended at a limit" in err
    assert "1 text(s) leave speech out" in err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_recordings_in_several_languages_are_whole_in_the_language_of_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {
        "de": ("de", "Guten Morgen. Ich heiße Anna und ich wohne seit drei Jahren in Berlin."),
        "hi": ("hi", "मेरे भाई ने कल शाम को बाजार से तीन किलो सेब खरीदे। हमारी शिक्षिका ने एक नई किताब खरीदी।"),
        "zh": ("cmn", "我哥哥昨天晚上在市场上买了三公斤苹果。"),
        "ka": ("ka", "ამინდის პროგნოზის მიხედვით ხვალ დილით ქვეყნის ჩრდილოეთით ძლიერი წვიმა იქნება. " * 3),
    }
    rows = ["file_name,language"]
    for language, (voice, text) in texts.items():
        subprocess.run(["espeak-ng", "-v", voice, "-s", "150", "-w", tmp_path / f"{language}.wav", text], check=True)
        rows.append(f"{language}.wav,{language if language != 'de' else ''}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    output = tmp_path / "rows.jsonl"
    assert call(monkeypatch, tmp_path / "list.csv", "--model", "base", "--output", output, "--words") == 0
    found = {Path(row["source"]).stem: row for row in map(json.loads, output.read_text().splitlines())}
    assert {stem: row["language"] for stem, row in found.items()} == {code: code for code in texts}
    assert "Berlin" in found["de"]["text"]
    for row in found.values():
        assert not row["truncated"]
        joined = "".join(" " * word.get("space", True) + word["text"] for word in row["words"]).strip()
        assert joined == row["text"]
    assert len(found["ka"]["segments"]) >= 3
    assert found["ka"]["segments"][-1]["end_sec"] == pytest.approx(found["ka"]["duration_sec"], abs=0.5)
    assert " " not in found["zh"]["text"].strip()
    assert "limit" not in capsys.readouterr().err


def test_every_input_is_found_once_and_in_order(talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_ = [str(talks / name) for name in ("a.flac", "a.wav", "day 2/b.wav", "day 2/broken.wav")]
    assert found(talks) == all_
    assert found(talks / "a.wav", talks) == [all_[1], all_[0], *all_[2:]]
    assert found(f"{talks}/**/*.wav") == all_[1:]
    monkeypatch.chdir(talks)
    assert found("*.wav") == ["a.wav"]
    listed = tmp_path / "list.txt"
    listed.write_text(f"\ufefftalks/a.wav\n\n{all_[0]}\ngone.wav\n")
    assert found(listed) == [all_[1], all_[0], str(tmp_path / "gone.wav")]
    for column in ("audio", "source"):
        rows = tmp_path / f"{column}.jsonl"
        rows.write_text(json.dumps({column: "talks/a.wav", "text": "old"}) + "\n")
        assert found(rows) == [all_[1]]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["gone"], "gone"),
        (["empty"], "no recording"),
        (["*.ogg"], "no recording"),
        (["list.txt"], "list.txt"),
        (["a.wav", "--output", "a.srt"], "--format srt"),
        (["a.wav", "--output", "rows.jsonl", "--format", "srt"], "--format"),
        (["a.wav", "--output", "list.txt/below"], "list.txt"),
        (["a.wav", "--format", "srf"], "'srt'"),
        (["a.wav", "--output", "list.txt/rows.jsonl"], "rows.jsonl"),
        (["a.wav", "--model", "empty/gone_hf"], "gone_hf"),
        (["a.wav", "--set", "inference.beams=2"], "inference.beams"),
    ],
)
def test_what_cannot_be_done_is_named_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("list.txt", "a.wav"):
        (tmp_path / name).touch()
    try:
        code = call(monkeypatch, "--model", "tiny.en", *given)
    except SystemExit as end:  # of argparse
        code = int(end.code or 0)
    assert code == 2
    assert named in capsys.readouterr().err


def test_a_folder_holds_every_suffix_that_is_decoded_and_counts_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    suffixes = ("3gp", "aiff", "amr", "avi", "caf", "m4b", "mka", "mov", "mp2", "oga", "ts")
    for name in [*(f"talk.{suffix}" for suffix in suffixes), ".hidden.wav", "a.pdf", "b.PDF", "notes", "c.wav.part"]:
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.wav")
    assert [Path(path).suffix[1:] for path in found(tmp_path)] == list(suffixes)
    for reason in ("11 recordings", ".pdf 2", "hidden 1", "no regular file 1", "without a suffix 1", ".part 1"):
        assert reason in caplog.text


def test_a_track_is_chosen_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = transcribe.parse_arguments(["a.mkv", "--model", "tiny.en", "--audio-track", "2"])
    assert transcribe.configure(arguments, device="cpu").data.audio_track == 2
    (tmp_path / "a.mkv").write_bytes(two_tracks())
    heard: dict[int | None, float] = {}
    for track in (None, 2):
        with _reading(tmp_path / "a.mkv", 0, {}, "raise", track) as (_, blocks):
            heard[track] = max(float(abs(block).max()) for block in blocks)
    assert heard[None] < 0.01 < 0.4 < heard[2]


def test_captions_of_two_recordings_are_never_one_file(talks: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(talks / "day 2" / "b.wav", other / "b.wav")
    recordings = find_recordings([str(talks)])
    beside = caption_paths(recordings, ["srt"], None)
    assert [paths["srt"].relative_to(talks).as_posix() for paths in beside.values()] == [
        "a.flac.srt", "a.wav.srt", "day 2/b.srt", "day 2/broken.srt",
    ]  # fmt: skip
    (alone,) = caption_paths(find_recordings([str(talks / "a.wav")]), ["vtt"], tmp_path / "out").values()
    assert alone["vtt"] == tmp_path / "out" / "a.wav.vtt"  # the other lies beside it, asked for or not
    with pytest.raises(DataError, match=r"b\.wav.*b\.wav"):
        caption_paths(find_recordings([str(talks / "day 2"), str(other)]), ["srt"], tmp_path / "out")
