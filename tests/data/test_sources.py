from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.data.sources import load_utterances
from src.utils.config_schema import DataConfig
from src.utils.errors import DataError


def folder(path: Path) -> DataConfig:
    return DataConfig(source="folder", path=path)


def test_sample_has_500_clips_with_disjoint_given_splits(sample: list) -> None:
    assert len(sample) == 500
    speakers = {s: {u.speaker for u in sample if u.meta["split"] == s} for s in ("train", "validation", "test")}
    assert [len(v) for v in speakers.values()] == [60, 8, 20]
    assert not speakers["train"] & speakers["test"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", 'file_name,text,speaker\na b/clip.wav,Hello,s1\nü.wav,"Yes, indeed",s2\n'),
        ("list.tsv", "path\tsentence\tclient_id\r\na b/clip.wav\tHello\ts1\r\nü.wav\tYes, indeed\ts2\r\n"),
        (
            "rows.jsonl",
            "\n".join(
                json.dumps({"audio": n, "transcript": t, "speaker_id": s})
                for n, t, s in [("a b/clip.wav", "Hello", "s1"), ("ü.wav", "Yes, indeed", "s2")]
            ),
        ),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_folder_reads_each_kind_of_manifest(tmp_path: Path, name: str, content: str, mark: str) -> None:
    (tmp_path / name).write_text(mark + content, encoding="utf-8", newline="")
    first, second = load_utterances(folder(tmp_path))
    assert first.audio == tmp_path / "a b" / "clip.wav"
    assert (first.text, first.speaker) == ("Hello", "s1")
    assert (second.id, second.text) == ("ü.wav", "Yes, indeed")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no recording and no manifest"),
        ({"a.wav": ""}, "no manifest among its 1 recording"),
        ({"metadata.csv": "file_name,text\n"}, "no rows"),
        ({"metadata.csv": "file_name,words\na.wav,x\n"}, "no text column among file_name, words"),
        ({"metadata.csv": "fil,text\na.wav,x\n"}, "did you mean 'file'"),
        ({"metadata.csv": "file_name,text\na.wav,x,y\n"}, "line 2: the row does not have the 2 columns"),
        ({"metadata.csv": "id,file_name,text\n1,a.wav,x\n1,b.wav,y\n"}, "id '1' occurs twice"),
        ({"rows.jsonl": '{"file": "a.wav", "text": "x"}\n{oops}\n'}, "line 2: not JSON"),
        ({"one.csv": "file,text\n", "two.csv": "file,text\n"}, "several manifests"),
    ],
)
def test_bad_folders_are_refused_with_name_and_line(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=reason) as caught:
        load_utterances(folder(tmp_path))
    assert "1" in str(caught.value) if "twice" in reason else str(tmp_path) in str(caught.value)


def test_absent_folder_and_wrong_encoding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_utterances(folder(tmp_path / "absent"))
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.wav,für\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        load_utterances(folder(tmp_path))
