from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.data.sources import catalog
from src.data.sources.catalog import choose_data, load_utterances
from src.data.utterance import Utterance
from src.utils.config import DataConfig, load_config
from src.utils.errors import ConfigError, DataError, SourceUnavailableError


def folder(path: Path) -> DataConfig:
    return DataConfig(source="folder", path=path)


def test_sample_has_500_clips_with_disjoint_given_splits(sample: list) -> None:
    assert len(sample) == 500
    speakers = {s: {u.speaker for u in sample if u.meta["split"] == s} for s in ("train", "validation", "test")}
    assert [len(v) for v in speakers.values()] == [60, 8, 20]
    assert not speakers["train"] & speakers["test"]


ROWS = [{"audio": "a b/clip.wav", "transcript": "Hello", "speaker_id": "s1"},
        {"audio": "ü.wav", "transcript": "Yes, indeed", "speaker_id": "s2"}]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", 'file_name,text,speaker\na b/clip.wav,Hello,s1\nü.wav,"Yes, indeed",s2\n'),
        ("list.tsv", "path\tsentence\tclient_id\r\na b/clip.wav\tHello\ts1\r\nü.wav\tYes, indeed\ts2\r\n"),
        ("rows.jsonl", "\n".join(map(json.dumps, ROWS))),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_folder_reads_each_kind_of_manifest(tmp_path: Path, name: str, content: str, mark: str) -> None:
    (tmp_path / name).write_text(mark + content, encoding="utf-8", newline="")
    first, second = load_utterances(folder(tmp_path))
    assert (first.audio, first.text, first.speaker) == (tmp_path / "a b" / "clip.wav", "Hello", "s1")
    assert (second.id, second.text) == ("ü.wav", "Yes, indeed")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no recording and no manifest"),
        ({"train.parquet": ""}, "set data.source: parquet"),
        ({"a.wav": ""}, "1 recording.*no manifest"),
        ({"a.wav": "", "metadata.json": "[{oops"}, r"metadata\.json, line 1: not JSON"),
        ({"metadata.csv": "file_name,text\n"}, "no rows"),
        ({"metadata.csv": "file_name,words\na.wav,x\n"}, "no text column among file_name, words"),
        ({"metadata.csv": "fil,text\na.wav,x\n"}, "did you mean 'file'"),
        ({"metadata.csv": "file_name,text\na.wav,x,y\n"}, "line 2: the row has 3 cells, not the 2 columns"),
        ({"metadata.csv": "id,file,text\n1,a.wav,x\n1,b.wav,y\n"}, "line 3: the id '1' occurs twice, first in line 2"),
        ({"rows.jsonl": '{"file": "a.wav", "text": "x"}\n{oops}\n'}, "line 2: not JSON"),
        ({"rows.jsonl": "[" * 100_000}, "line 1: not JSON"),
        ({"one.csv": "file,text\n", "two.csv": "file,text\n"}, "several manifests"),
        ({"metadata.csv": "file,text,text\na.wav,x,y\n"}, "line 1: the column 'text' occurs twice"),
        ({"metadata.csv": 'file,text\na.wav,"x\n'}, "line 2: unexpected end of data"),
    ],
)
def test_bad_folders_are_refused_with_name_and_line(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=reason) as caught:
        load_utterances(folder(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_absent_folder_and_wrong_encoding_are_refused(tmp_path: Path) -> None:
    for source in ("folder", "common_voice"):
        with pytest.raises(SourceUnavailableError, match=r"no such folder|clips/ and train\.tsv"):
            load_utterances(DataConfig(source=source, path=tmp_path / "absent"))
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.wav,привет\n".encode("cp1251"))
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        load_utterances(folder(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "encoding"),
    [
        ("metadata.csv", "File_Name;Text;Speaker\r\na.wav;Yes, indeed;s1\r\n", "utf-8"),  # a European spreadsheet
        ("metadata.csv", "file_name\ttext\na.wav\tYes, indeed\n", "utf-8"),
        ("list.csv", "file_name\ttext\na.wav\tYes, indeed\n", "utf-16"),  # a spreadsheet's "Unicode text"
        ("rows.jsonl", '{"Path": "a.wav", "Sentence": "Yes, indeed"}\r\n\r\n', "utf-8"),
        ("rows.jsonl", '{"file": "a.wav", "text": "Yes,\u2028indeed"}', "utf-8"),  # a line separator in a text
    ],
)
def test_what_spreadsheets_write_is_read(tmp_path: Path, name: str, content: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(content.encode(encoding))
    (utterance,) = load_utterances(folder(tmp_path))
    assert (utterance.audio, utterance.text.split()) == (tmp_path / "a.wav", ["Yes,", "indeed"])


@pytest.mark.parametrize(
    ("written", "on_disk"),
    [
        ("Pr\u00fcfung \u6f22\u5b57.wav", "Pru\u0308fung \u6f22\u5b57.wav"),  # macOS decomposes
        ("Pru\u0308fung.wav", "Pr\u00fcfung.wav"),
        ("my clips\\one.wav", "my clips/one.wav"),
    ],
)
def test_other_spellings_of_a_name_are_found(tmp_path: Path, written: str, on_disk: str) -> None:
    (tmp_path / on_disk).parent.mkdir(exist_ok=True)
    (tmp_path / on_disk).write_bytes(b"nothing is decoded here")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{written},hello\n", encoding="utf-8")
    (utterance,) = load_utterances(folder(tmp_path))
    assert (utterance.id, utterance.audio) == (written, tmp_path / on_disk)


def test_common_voice_is_read_from_its_extracted_archive(tmp_path: Path, sample: list[Utterance]) -> None:
    (tmp_path / "clips").mkdir()
    header = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\n"
    for name, clips in (("train", sample[:6]), ("dev", sample[360:362]), ("test", sample[400:403])):
        rows = [f'{u.speaker}\t{u.id}.mp3\t"Well," {u.text.lower()}\t2\t0\ttwenties\tfemale\t\ten\n' for u in clips]
        (tmp_path / f"{name}.tsv").write_text(header + "".join(rows))
    (tmp_path / "validated.tsv").write_text(header)
    listed = load_utterances(DataConfig(source="common_voice", path=tmp_path))
    assert [u.meta["split"] for u in listed] == ["train"] * 6 + ["validation"] * 2 + ["test"] * 3
    first = listed[0]
    assert first.audio == tmp_path / "clips" / f"{sample[0].id}.mp3"
    assert first.text == f'"Well," {sample[0].text.lower()}'  # its quotation marks are part of the sentence
    assert (first.speaker, first.language, first.meta["age"]) == (sample[0].speaker, "en", "twenties")


def test_what_a_user_of_the_notebook_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = tmp_path / "drive"
    (drive / "MyDrive" / "talks").mkdir(parents=True)
    monkeypatch.setattr(catalog, "MOUNT_POINT", drive)
    assert choose_data("auto", hub={"id": "", "config": ""}) == {"source": "sample", "hub": {}}
    monkeypatch.setattr(catalog, "in_colab", lambda: True)
    english = choose_data("auto", "", "English", hub={})
    assert english == {"source": "minds14", "sources": ["minds14", "sample"], "hub": {"config": "en-US"}}
    german = choose_data("auto", "", "de", hub={})  # the sample is English
    assert german == {"source": "minds14", "sources": [], "hub": {"config": "de-DE"}}
    assert choose_data("minds14", "", "auto", hub={"config": "en-GB"})["hub"] == {"config": "en-GB"}
    with pytest.raises(ConfigError, match=r"MInDS-14 has no language 'hi', only cs, de, en"):
        choose_data("auto", "", "hi", hub={})
    talks = {"source": "folder", "path": str(drive / "MyDrive" / "talks"), "hub": {}}
    assert choose_data("folder", "talks", hub={}) == choose_data("auto", "talks", hub={}) == talks
    assert choose_data("auto", hub={"id": "google/fleurs"}) == {"source": "hub", "hub": {"id": "google/fleurs"}}
    for needs_one in ("folder", "parquet"):
        with pytest.raises(ConfigError, match=f"DATA_SOURCE '{needs_one}' needs DATA_PATH: a"):
            choose_data(needs_one, hub={})
    assert choose_data("folder", hub={}, overrides={"data.path": "talks"}) == {"source": "folder", "hub": {}}
    for takes_none in ("minds14", "upload", "sample", "hub"):  # else the path would be passed over
        with pytest.raises(ConfigError, match=f"DATA_PATH 'talks': {takes_none} takes no path"):
            choose_data(takes_none, "talks", hub={})
    with pytest.raises(ConfigError, match="no such file or folder"):
        choose_data("folder", "nowhere", hub={})
    monkeypatch.setattr(catalog, "upload_files", lambda: Path("uploads/a.zip"))
    assert choose_data("upload", hub={}) == {"source": "folder", "path": "uploads/a.zip"}
    for given in ({"data": {"source": "sample"}}, {"data.mix": []}):
        assert choose_data("auto", hub={}, overrides=given) == {}
    for chosen in (english, german):
        load_config(None, overrides={"data": chosen})
