"""Manifests as spreadsheets, pandas and toolkits write them."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.data.preparation import check_utterance, prepare_datasets
from src.data.sources.catalog import SAMPLE_CLIP, read_folder
from src.data.sources.manifest import find_audio, find_manifests, read_rows
from src.data.sources.parquet import read_parquet
from src.data.utterance import Utterance, text_of
from src.utils.config import DataConfig, load_config
from src.utils.errors import DataError


def write(folder: Path, files: Mapping[str, str | bytes | None]) -> Path:
    """Write files; None is a recording."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.write_bytes(SAMPLE_CLIP.read_bytes())
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def lines(*rows: Mapping[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def packed(text: str) -> bytes:
    """Return a text as gzip packs it, the same at any time of day: it is part of a test's name."""
    return gzip.compress(text.encode(), mtime=0)


def told(utterances: list[Utterance]) -> dict[str, tuple[str, str | None]]:
    """Text and speaker by the name of the recording."""
    return {Path(str(u.audio)).name: (u.text, u.speaker) for u in utterances}


@pytest.mark.parametrize(
    "content",
    [
        "sep=;\nfile_name;text\na.wav;Yes, indeed\n",
        '"sep=;"\r\nfile_name;text\r\na.wav;Yes, indeed\r\n',
        "sep=|\nfile_name|text\na.wav|Yes, indeed\n",
        "\nSEP=\t\r\nFile name\tText\r\na.wav\tYes, indeed\r\n",
        'sep=,\nfile-name,text\na.wav,"Yes, indeed"\n',
        "file_name|text\na.wav|Yes, indeed\n",
        "file_name\ttext\na.wav\tYes, indeed\n",
        'file_name, text\na.wav, "Yes, indeed"\n',
        ' "file_name" , "text" \n "a.wav" , "Yes, indeed" \n',
        '"file_name" ;"text"\n"a.wav" ;"Yes, indeed" \n',
        "\n\nfile_name;text\n\n ; \na.wav;Yes, indeed\n;\n",
        'file_name,text,,\na.wav,"Yes, indeed",,\n,,,\n',
        'file_name,text\na.wav,"Yes, indeed",,\n',
        "file_name;text;\n a.wav ; Yes, indeed ;\n",
        'FILE_NAME,Text\n"a.wav","Yes,\nindeed"\n',
        'file_name,text\n"a.wav","Yes,\u2028indeed"\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_csv_of_any_spreadsheet_is_read(tmp_path: Path, content: str, encoding: str) -> None:
    write(tmp_path, {"metadata.csv": content.encode(encoding)})
    (utterance,) = read_folder(tmp_path)
    assert (utterance.audio, utterance.text) == (tmp_path / "a.wav", "Yes, indeed")


@pytest.mark.parametrize(
    "text", ["Schöne Grüße", "Où est l’hôtel à Besançon ?", "¿Qué mañana?", "København, Ærø", "5 €"]
)
def test_western_code_pages_are_read_with_a_warning(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, {"metadata.csv": f'file_name,text\na.wav,"{text}"\n'.encode("cp1252")})
    (utterance,) = read_folder(tmp_path)
    assert utterance.text == text
    assert "line 2: not UTF-8, read as Windows-1252" in caplog.text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Привет, как дела", "cp1251"), ("Привет", "koi8-r"), ("καλημέρα", "cp1253"), ("gdzie jest łódź", "cp1250"),
        ("über \udcc3", "utf-8"), ("hallo \udcfc\udcc3\udcbc", "utf-8"),
        ("こんにちは", "shift_jis"), ("你好世界", "gb18030"), ("안녕하세요", "euc-kr"), ("şöyle ğ ı", "cp1254"),
    ],
)  # fmt: skip
def test_other_code_pages_are_refused_rather_than_guessed(tmp_path: Path, text: str, encoding: str) -> None:
    write(tmp_path, {"metadata.csv": f"file_name,text\na.wav,{text}\n".encode(encoding, "surrogateescape")})
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_folder(tmp_path)


def test_quotation_marks_that_begin_a_text_need_no_escape_where_the_delimiter_is_no_comma(tmp_path: Path) -> None:
    for name, mark in (("m.tsv", "\t"), ("m.csv", "|")):
        path = write(tmp_path, {name: f'file{mark}text\na.wav{mark}"Well," he said\n'}) / name
        assert [u.text for u in read_folder(path)] == ['"Well," he said']


VALUES = [
    ("NaN", "", None), ("null", "", None), ('""', "", None), ("7", "7", "7"), ("7.0", "7", "7"), ("0", "0", "0"),
    ("2.5", "2.5", "2.5"), ('"007"', "007", "007"), ('" a "', "a", "a"), ('"3.0"', "3.0", "3"),
    (r'"a\nb"', "a b", r"a\nb"), (r'"a\u2028 b\u0085c"', "a b c", r"a\u2028 b\x85c"), ('"\\ud83d\\ude00"', "😀", "😀"),
]  # fmt: skip
WRONG = ["true", '["a", "b"]', '{"en": "x"}', "Infinity", "[]"]
STRANGE = [(r'"half \ud83d"', r"\ud83d"), (r'"\u0000"', r"\x00"), (r'"a\u001b[2J"', r"\x1b")]


@pytest.mark.parametrize(("value", "text", "speaker"), VALUES)
def test_cells_of_json_become_text_as_a_person_would_write_them(
    tmp_path: Path, value: str, text: str, speaker: str | None
) -> None:
    content = f'{{"file": "a.wav", "id": {value}, "text": {value}, "speaker": {value}}}\n'
    (utterance,) = read_folder(write(tmp_path, {"m.jsonl": content}))
    assert (utterance.text, utterance.speaker, utterance.problem) == (text, speaker, None)
    assert utterance.id == (speaker if text.startswith("a ") else text or "a.wav")


@pytest.mark.parametrize(
    ("value", "said"), [*((v, "is no text; write a text") for v in WRONG), *((v, f"character {c}") for v, c in STRANGE)]
)
def test_a_transcript_that_is_no_text_costs_its_row_by_name(tmp_path: Path, value: str, said: str) -> None:
    content = f'{{"file": "a.flac", "text": "fine"}}\n{{"file": "b.flac", "text": {value}}}\n'
    good, bad = read_folder(write(tmp_path, {"m.jsonl": content, "a.flac": None, "b.flac": None}))
    assert check_utterance(good, DataConfig()).problem is None
    with pytest.raises(DataError) as caught:
        check_utterance(bad, DataConfig())
    assert "utterance b.flac (line 2 of the manifest)" in str(caught.value)
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("column", ["speaker", "id", "file"])
def test_no_other_cell_is_taken_for_a_text_either(tmp_path: Path, column: str, value: str) -> None:
    row = {"file": '"a.flac"', "text": '"fine"', "id": '"u1"', "speaker": '"s"', column: value}
    content = "{" + ", ".join(f'"{key}": {cell}' for key, cell in row.items()) + "}"
    (utterance,) = read_folder(write(tmp_path, {"m.jsonl": content, "a.flac": None}))
    with pytest.raises(
        DataError, match=rf"line 1 .*{'recording' if value.startswith('{') and column == 'file' else column}"
    ):
        check_utterance(utterance, DataConfig())


def test_numbers_of_parquet_and_of_csv_name_the_same_speakers(tmp_path: Path) -> None:
    audio = [{"bytes": b"", "path": f"{i}.flac"} for i in range(4)]
    columns = {"audio": audio, "text": [math.nan, 1.0, 2.5, 3.0], "speaker_id": [0.0, 1.0, math.nan, 12.0]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert [(u.text, u.speaker) for u in read_parquet(tmp_path / "x.parquet")] == [
        ("", "0"), ("1", "1"), ("2.5", None), ("3", "12"),
    ]  # fmt: skip
    rows = "file,text,speaker\na,x,0\nb,x,1.0\nc,x,\nd,x,12\ne,x,nan\nf,x, 1\n"
    speakers = [u.speaker for u in read_folder(write(tmp_path / "csv", {"m.csv": rows}))]
    assert speakers == ["0", "1", None, "12", None, "1"]


def test_speaker_zero_is_in_one_split_and_nan_is_nobody(tmp_path: Path) -> None:
    rows = [{"file": f"{i}.flac", "text": f"t {i}", "speaker": i // 4} for i in range(12)]
    write(tmp_path, {"m.jsonl": lines(*rows), **{f"{i}.flac": None for i in range(12)}})
    splits = prepare_datasets(load_config(None, overrides={"data": {"source": "folder", "path": str(tmp_path)}}))
    assert splits.shared_speakers == ()
    assert {u.speaker for u in splits.utterances} == {"0", "1", "2"}
    assert {len({u.speaker for u in part}) for part in splits.parts.values()} == {1}
    (tmp_path / "m.jsonl").write_text(lines(*({**row, "speaker": math.nan} for row in rows)))
    assert {u.speaker for u in read_folder(tmp_path)} == {None}


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "9" * 5_000])
def test_deep_json_and_long_numbers_are_refused_by_line(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"m.jsonl": '{"file": "a", "text": "x"}\n{"file": "a", "text": ' + text + "}\n"})
    with pytest.raises(DataError, match=r"m\.jsonl, line 2: not JSON"):
        read_folder(tmp_path)


def test_other_columns_keep_what_json_can_hold(tmp_path: Path) -> None:
    row = {"file": "a", "text": "x", "age": math.nan, "place": "a\nb\ud83d", "list": [1], "up": True, "n": 3}
    (utterance,) = read_folder(write(tmp_path, {"m.jsonl": lines(row)}))
    assert utterance.meta == {"age": None, "place": r"a\nb\ud83d", "up": True, "n": 3}
    assert utterance.columns == {**utterance.meta, "line": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.jsonl", lines({"file": "a.wav", "text": "x"}, {"file": "b.wav", "text": "y"})),
        ("m.json", lines({"audio_filepath": "a.wav", "text": "x"}, {"audio_filepath": "b.wav", "text": "y"})),
        ("m.json", json.dumps([{"file": "a.wav", "text": "x"}, {"file": "b.wav", "text": "y"}], indent=1)),
        ("m.jsonl.gz", packed(lines({"file": "a.wav", "text": "x"}, {"file": "b.wav", "text": "y"}))),
        ("m.csv", "wav_filename,wav_filesize,transcript\na.wav,1,x\nb.wav,1,y\n"),
    ],
)
def test_json_may_be_lines_an_array_or_packed(tmp_path: Path, name: str, content: str | bytes) -> None:
    """The second and last as NeMo and DeepSpeech write them."""
    write(tmp_path, {name: content, "config.json": "{\n}", "x.json": '{"text": "a caption", "segments": []}'})
    write(tmp_path, {"a.tsv": "start\tend\ttext\n0\t1\tx\n", "a.wav": None})
    assert told(read_folder(tmp_path)) == {"a.wav": ("x", None), "b.wav": ("y", None)}


def test_a_packed_manifest_is_bounded_and_damage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.data.sources.manifest.MAX_UNPACKED_BYTES", 1 << 20)
    bomb = gzip.compress(b'{"file": "a", "text": "' + b"a" * (20 << 20) + b'"}')
    with pytest.raises(DataError, match=r"m\.jsonl\.gz: unpacks to more than"):
        read_folder(write(tmp_path, {"m.jsonl.gz": bomb}))
    for damaged in (bomb[:1000], b"no gzip", bomb[:500] + b"\0\0\0\0" + bomb[504:]):
        with pytest.raises(DataError, match=r"m\.jsonl\.gz: (damaged|unpacks)"):
            read_folder(write(tmp_path, {"m.jsonl.gz": damaged}))


# paths

NAMES = [
    ("sub/a b.wav", "sub\\a b.wav"), ("a.wav", ".\\a.wav"), ("a.wav", " a.wav "), ("café.wav", "cafe\u0301.wav"),
    ("cafe\u0301/b.wav", "café\\b.wav"), ("a.wav", "./a.wav"), ("a.wav", "\u202a'a.wav'"),
    ("back\\slash.wav", "back\\slash.wav"),
]  # fmt: skip


@pytest.mark.parametrize(("there", "written"), NAMES)
def test_names_are_found_however_they_are_spelled(tmp_path: Path, there: str, written: str) -> None:
    write(tmp_path, {there: b"x", "m.csv": f'file,text\n"{written}",x\n'})
    (utterance,) = read_folder(tmp_path)
    assert isinstance(utterance.audio, Path)
    assert utterance.audio.samefile(tmp_path / there)


def test_addresses_of_files_absolute_paths_and_the_home_are_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, {"a b%.wav": b"x"}) / "a b%.wav"
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (path.as_uri(), path.as_uri().replace("///", "//localhost/"), str(path), "~/a b%.wav", "../a b%.wav"):
        assert find_audio(tmp_path / "other", name).exists() == (name != "../a b%.wav")
    (tmp_path / "other").mkdir()
    assert find_audio(tmp_path / "other", "../a b%.wav").exists()


@pytest.mark.parametrize("name", ["n" * 5_000 + ".wav", "a\0b", "half \ud83d", "字" * 100, "a\nb"])
def test_a_name_that_no_disk_holds_costs_its_row(tmp_path: Path, name: str) -> None:
    (utterance,) = read_folder(write(tmp_path, {"m.jsonl": lines({"file": name, "text": "x"})}))
    with pytest.raises(Exception, match=r"no such file|cannot be read") as caught:
        check_utterance(utterance, DataConfig())
    assert str(caught.value).isprintable()


def test_a_value_is_text_or_refused() -> None:
    for value in (object(), True, [1], b"\xff", math.inf):
        with pytest.raises(ValueError, match=r".+"):
            text_of(value)
    assert text_of(b"caf\xc3\xa9") == "café"
    assert text_of(10**400) == f"1{'0' * 400}"  # beyond what a float holds


# layouts of corpora


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_hugging_faces_audio_folder_has_a_list_in_each_split(tmp_path: Path, name: str) -> None:
    for split, text in (("train", "hello"), ("validation", "so"), ("test", "bye")):
        rows = {"file_name": ["a.flac", "deep/b.flac"], "transcription": [text, "x"]}
        write(tmp_path, {f"data/{split}/a.flac": None, f"data/{split}/deep/b.flac": None})
        if name.endswith("parquet"):
            pq.write_table(pa.table(rows), tmp_path / "data" / split / name)
        else:
            rows_of = [dict(zip(rows, cells, strict=True)) for cells in zip(*rows.values(), strict=True)]
            csv = "file_name,transcription\n" + "".join(f"{r['file_name']},{r['transcription']}\n" for r in rows_of)
            write(tmp_path / "data" / split, {name: csv if name.endswith("csv") else lines(*rows_of)})
    found = read_folder(tmp_path)
    assert {u.id: (u.meta["split"], u.text) for u in found if u.text != "x"} == {
        "data/train/a.flac": ("train", "hello"), "data/validation/a.flac": ("validation", "so"),
        "data/test/a.flac": ("test", "bye"),
    }  # fmt: skip
    assert all(isinstance(u.audio, Path) and u.audio.is_file() for u in found)
    assert {len(part) for part in prepare(tmp_path).values()} == {2}


def prepare(folder: Path) -> dict[str, list[Utterance]]:
    return prepare_datasets(load_config(None, overrides={"data": {"source": "folder", "path": str(folder)}})).parts


def test_one_list_over_folders_of_splits_is_split_by_them(tmp_path: Path) -> None:
    rows = "file_name,transcription\ntrain/a.flac,one\nval\\b.flac,two\ntest/c.flac,three\n"
    found = read_folder(write(tmp_path, {"metadata.csv": rows, "val/b.flac": None}))
    assert [u.meta["split"] for u in found] == ["train", "validation", "test"]
    assert "split" not in read_folder(write(tmp_path / "b", {"m.csv": "file,text\ntrain/a,x\nb,y\n"}))[0].meta
    own = "file,text,split\ntrain/a,x,test\ntest/b,y,train\n"
    assert [u.meta["split"] for u in read_folder(write(tmp_path / "c", {"m.csv": own}))] == ["test", "train"]


def test_lists_named_after_splits_are_one_set_and_others_are_ambiguous(tmp_path: Path) -> None:
    content = "file,text\na.wav,x\n"
    found = read_folder(write(tmp_path / "a", {"train.csv": content, "dev_manifest.csv": content, "test.csv": content}))
    assert sorted((u.id, u.meta["split"]) for u in found) == [
        ("a.wav", "validation"), ("a.wav#2", "test"), ("a.wav#3", "train"),
    ]  # fmt: skip
    for names in (("a.csv", "b.csv"), ("train.csv", "train.tsv"), ("train.csv", "all.csv"), ("x/a.csv", "x/b.csv")):
        folder = write(tmp_path / "-".join(names).replace("/", ""), dict.fromkeys(names, content))
        with pytest.raises(DataError, match="several manifests"):
            read_folder(folder)
    folders = write(tmp_path / "b", {"anna/metadata.csv": content, "ben/metadata.csv": content})
    assert [u.id for u in read_folder(folders)] == ["anna/a.wav", "ben/a.wav"]


def test_ljspeech_has_bars_and_no_header(tmp_path: Path) -> None:
    rows = 'LJ001-0001|In 1455, "Printing," he|In fourteen fifty-five\nLJ001-0002|two|two\nLJ001-0003|gone\n'
    write(tmp_path, {"LJ/metadata.csv": rows, "LJ/wavs/LJ001-0001.wav": b"", "LJ/wavs/LJ001-0002.flac": b""})
    found = read_folder(tmp_path)
    assert [(u.id, u.text) for u in found] == [
        ("LJ001-0001", 'In 1455, "Printing," he'), ("LJ001-0002", "two"), ("LJ001-0003", "gone"),
    ]  # fmt: skip
    wavs = tmp_path / "LJ" / "wavs"
    assert [u.audio for u in found] == [wavs / n for n in ("LJ001-0001.wav", "LJ001-0002.flac", "LJ001-0003.wav")]
    assert found[0].meta["normalized_text"] == "In fourteen fifty-five"
    write(tmp_path / "x", {"list.csv": "a/b.wav|hello\n", "a/b.wav": b""})  # a list of paths
    assert told(read_folder(tmp_path / "x")) == {"b.wav": ("hello", None)}
    with pytest.raises(DataError, match="line 1: no file column"):
        read_folder(write(tmp_path / "y", {"list.csv": "what|ever\n"}))


def test_kaldis_folders_are_read_with_segments_and_speakers(tmp_path: Path) -> None:
    write(tmp_path, {
        "exp/data/train/wav.scp": "u1 wavs/a.flac\nu2\twavs/b c.flac\n",
        "exp/data/train/text": "u1 HELLO THERE\nu2 zwei\nu9 not there\n",
        "exp/data/train/utt2spk": "u1 0\nu2 s2\n",
        "exp/data/train/utt2lang": "u2 de\n",
        "exp/data/test/wav.scp": f"rec {tmp_path}/exp/wavs/a.flac\n",
        "exp/data/test/segments": "seg1 rec 1.0 2.5\nseg2 rec 2.5 -1\n",
        "exp/data/test/text": "seg1 one\nseg2 two\n",
        "exp/wavs/a.flac": None, "exp/wavs/b c.flac": None,
    })  # fmt: skip
    found = {u.id: u for u in read_folder(tmp_path)}
    assert {i: (u.text, u.speaker, u.language, u.meta["split"]) for i, u in found.items()} == {
        "u1": ("HELLO THERE", "0", None, "train"), "u2": ("zwei", "s2", "de", "train"),
        "seg1": ("one", None, None, "test"), "seg2": ("two", None, None, "test"),
    }  # fmt: skip
    assert [found[u].audio for u in ("u1", "u2")] == [tmp_path / "exp" / "wavs" / n for n in ("a.flac", "b c.flac")]
    lengths = [check_utterance(found[u], DataConfig()).duration_sec for u in ("seg1", "seg2")]
    assert lengths == [pytest.approx(1.5, abs=0.01), pytest.approx(8.5, abs=0.01)]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"wav.scp": "u1 sph2pipe -f wav a.sph |\n"}, "wav.scp, line 1: u1 is a command, which is not run"),
        ({"wav.scp": "u1 a.wav\nu1 b.wav\n"}, "wav.scp, line 2: 'u1' occurs twice, first in line 1"),
        ({"wav.scp": "r a.wav\n", "segments": "s1 r 1.0\n"}, "segments, line 1: expected"),
        ({"wav.scp": "r a.wav\n", "segments": "s1 q 1.0 2.0\n"}, "segments, line 1: expected"),
        ({"wav.scp": ""}, "no rows"),
    ],
)
def test_kaldis_faults_are_named(tmp_path: Path, files: dict[str, str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_folder(write(tmp_path, files))


def recording(name: str = "rec-1", source: str = "audio/a.flac") -> dict[str, Any]:
    sources = [{"type": "file", "channels": [0], "source": source}]
    return {"id": name, "sources": sources, "sampling_rate": 16_000, "num_samples": 176_000, "duration": 11.0}


def supervision(name: str, start: float, duration: float, text: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "recording_id": "rec-1", "start": start, "duration": duration, "text": text, **more}


def cut(name: str, start: float, *supervisions: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": name, "start": start, "duration": 4.0, "channel": 0, "recording": recording(),
        "supervisions": list(supervisions), "type": "MonoCut",
    }  # fmt: skip


WHOLE = supervision("u0", 0.0, 11.0, "all of it", speaker="s0", language="English")
PART = supervision("u1", 1.0, 2.0, "a part", speaker="s1")
LHOTSE = {
    "recordings": {"r_recordings_all.jsonl.gz": [recording()], "r_supervisions_all.jsonl.gz": [WHOLE, PART]},
    "cuts": {"cuts.jsonl.gz": [
        {**cut("c0", 0.0, WHOLE), "duration": 11.0},
        cut("c1", 0.5, supervision("u1", 0.5, 2.0, "a part", speaker="s1")),
    ]},
    "all": {"recordings.jsonl": [recording()], "supervisions.jsonl": [WHOLE, PART],
            "cuts.jsonl": [{**cut("c0", 0.0, WHOLE), "duration": 11.0}, cut("c1", 0.0, PART)]},
}  # fmt: skip


@pytest.mark.parametrize("files", LHOTSE.values(), ids=LHOTSE)
def test_lhotses_manifests_are_read(tmp_path: Path, files: dict[str, list[dict[str, Any]]]) -> None:
    write(tmp_path, {"corpus/audio/a.flac": None})
    for name, rows in files.items():
        content = lines(*rows)
        write(tmp_path, {f"corpus/manifests/{name}": packed(content) if name.endswith("gz") else content})
    whole, part = read_folder(tmp_path / "corpus" / "manifests")
    assert (whole.id, whole.text, whole.speaker, whole.language) == ("u0", "all of it", "s0", "en")
    assert whole.audio == tmp_path / "corpus" / "audio" / "a.flac"
    assert (part.id, part.text, part.speaker) == ("u1", "a part", "s1")
    assert check_utterance(part, DataConfig()).duration_sec == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"supervisions.jsonl": [PART]}, "not next to it .recordings.jsonl"),
        ({"recordings.jsonl": [recording("other")], "supervisions.jsonl": [PART]}, "supervisions.jsonl, line 1.*rec-1"),
        ({"cuts.jsonl": [{**cut("c", 0.0, PART), "recording": None}]}, "cuts.jsonl, line 1: not a recording"),
        ({"cuts.jsonl": [cut("c", 0.0, {**PART, "duration": None})]}, "cuts.jsonl, line 1: not a recording"),
        ({"r.jsonl": [{**recording(), "sources": [{"type": "command", "source": "rm", "channels": [0]}]}]}, "command"),
        ({"r.jsonl": [{**recording(), "sources": [{"type": "file", "source": "a", "channels": [0, 1]}]}]}, "channels"),
        ({"r.jsonl": [{**recording(), "sources": []}]}, "r.jsonl, line 1"),
    ],
)
def test_lhotses_faults_are_named(tmp_path: Path, files: dict[str, list[dict[str, Any]]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_folder(write(tmp_path, {name: lines(*rows) for name, rows in files.items()}))


def test_a_table_of_one_recordings_name_is_a_manifest_if_it_names_files_and_captions_if_not(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.flac": None, "a.csv": "file,start,end,text\na.flac,0,1,hello\n"})
    assert [(u.id, u.text) for u in read_folder(folder)] == [("a.flac 0-1 s", "hello")]
    write(tmp_path, {"a.csv": "start,end,text\n0,1,hello\n", "a.json": '{"text": "hello", "segments": []}'})
    assert find_manifests(folder) == []


def test_manifests_are_not_looked_for_endlessly(tmp_path: Path) -> None:
    write(tmp_path, {"a/b/c/d/e/metadata.csv": "", ".hidden/metadata.csv": "", "a/x.csv/y": ""})
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert find_manifests(tmp_path) == []
    assert list(read_rows(write(tmp_path, {"m.csv": ""}) / "m.csv")) == []
