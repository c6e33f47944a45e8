from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.data.audio import load_audio
from src.data.preparation import prepare_datasets
from src.data.sources import parquet as parquet_module
from src.data.sources.catalog import SAMPLE_PARQUET, load_utterances
from src.data.sources.parquet import ParquetCell, read_parquet
from src.data.utterance import Utterance, split_of
from src.utils.config import DataConfig, load_config
from src.utils.errors import AudioError, DataError, SourceUnavailableError
from tests.data.hub_layout import encoded, write_speechocean762


def test_cells_are_read_when_asked_and_equal_the_table(sample: list[Utterance]) -> None:
    table = pq.read_table(SAMPLE_PARQUET)
    assert table.num_rows == len(sample)
    for index in (0, 99, 100, 499):  # across row groups
        audio = sample[index].audio
        assert isinstance(audio, ParquetCell)
        assert audio.read() == table["audio"][index].as_py()["bytes"]
        assert sample[index].text == table["text"][index].as_py()


def test_memory_keeps_the_newest_row_groups_only(sample: list[Utterance], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_module, "_kept", type(parquet_module._kept)())
    monkeypatch.setattr(parquet_module, "KEPT_BYTES", 2_500_000)  # the file has five groups of about 1 MB
    for utterance in sample[::20]:
        assert not isinstance(utterance.audio, Path | bytes)
        utterance.audio.read()
    assert 1 <= len(parquet_module._kept) <= 3
    assert sum(array.nbytes for array in parquet_module._kept.values()) <= 2_500_000


def test_a_folder_of_shards_has_its_splits_from_the_names(tmp_path: Path, sample: list[Utterance]) -> None:
    splits = {"train": sample[:30], "test": sample[400:410]}
    write_speechocean762(tmp_path, splits)
    listed = load_utterances(DataConfig(source="parquet", path=tmp_path))
    assert {u.id for u in listed if u.meta["split"] == "train"} == {u.id for u in sample[:30]}
    assert {u.id for u in listed if u.meta["split"] == "test"} == {u.id for u in sample[400:410]}
    copy = next(u for u in listed if u.id == sample[3].id)
    np.testing.assert_allclose(load_audio(copy.audio), load_audio(sample[3].audio), atol=1e-4)
    config = load_config(None, overrides={"data": {"source": "parquet", "path": str(tmp_path), "max_train": 12}})
    prepared = prepare_datasets(config)
    assert len(prepared.train) == 12
    assert {u.id for u in prepared.test} == {u.id for u in sample[400:410]}


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("en/validation/0000.parquet", "validation"),
        ("speechocean762-dev.parquet", "validation"),
        ("test.clean.parquet", "test"),
        ("0000.parquet", None),
        ("pretraining/0000.parquet", None),
    ],
)
def test_the_split_is_in_the_name(path: str, split: str | None) -> None:
    assert split_of(Path(path)) == split


def test_names_that_repeat_in_an_archive_get_numbers(tmp_path: Path) -> None:
    audio = [{"bytes": b"x", "path": "audio.wav"}] * 3
    pq.write_table(pa.table({"audio": audio, "text": ["a", "b", "c"]}), tmp_path / "x.parquet")
    assert [u.id for u in read_parquet(tmp_path / "x.parquet")] == ["audio", "audio#2", "audio#3"]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"text": ["a"]}, "no column with recordings among text"),
        ({"audio": [{"bytes": b"x", "path": "a"}], "words": ["a"]}, "no text column among words"),
        ({"a": [{"bytes": b"x"}], "b": [{"bytes": b"y"}], "text": ["a"]}, r"no audio column among a, b"),
    ],
)
def test_unknown_columns_are_refused(tmp_path: Path, columns: dict[str, list[object]], reason: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=reason):
        read_parquet(tmp_path / "x.parquet")


def test_a_damaged_file_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailableError, match=r"no \.parquet file"):
        read_parquet(tmp_path)
    with pytest.raises(SourceUnavailableError, match="no such file or folder"):
        read_parquet(tmp_path / "absent")
    (tmp_path / "cut.parquet").write_bytes(SAMPLE_PARQUET.read_bytes()[:100_000])
    with pytest.raises(DataError, match=r"cut\.parquet: not a Parquet file that can be read"):
        read_parquet(tmp_path)


def test_a_cell_without_a_recording_is_named_and_one_that_names_a_file_reads_it(
    tmp_path: Path, sample: list[Utterance]
) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"audio": [{"bytes": None, "path": "a.wav"}, None], "text": ["a", "b"]}), path)
    for utterance in read_parquet(path, audio_column="audio"):
        with pytest.raises(AudioError, match=r"x\.parquet, row group 0, row .: (names a\.wav|the cell holds no rec)"):
            load_audio(utterance.audio)
    (tmp_path / "a.wav").write_bytes(encoded(sample[0], 16_000, "WAV"))
    assert len(load_audio(read_parquet(path)[0].audio)) > 16_000
    gone = ParquetCell(tmp_path / "gone.parquet", 0, 0, "audio")
    with pytest.raises(AudioError, match=r"gone\.parquet, row group 0: cannot be read"):
        gone.read()


@pytest.mark.parametrize(
    "named", ["/etc/hostname", "../a.wav", "x/../../a.wav", "..\\a.wav", "C:\\a.wav", "\\\\host\\a.wav"]
)
def test_a_cell_names_no_file_outside_its_folder(tmp_path: Path, sample: list[Utterance], named: str) -> None:
    (tmp_path / "a.wav").write_bytes(encoded(sample[0], 16_000, "WAV"))
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "x.parquet"
    pq.write_table(pa.table({"audio": [{"bytes": None, "path": named}], "text": ["a"]}), path)
    with pytest.raises(AudioError, match="lies elsewhere"):
        load_audio(read_parquet(path, audio_column="audio")[0].audio)


def test_a_cell_that_names_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    pq.write_table(pa.table({"audio": [{"bytes": None, "path": "a.wav"}], "text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(AudioError, match="not a regular file"):
        load_audio(read_parquet(tmp_path / "x.parquet", audio_column="audio")[0].audio)


def test_numbers_of_class_labels_are_read_by_their_names_and_other_numbers_are_no_language(tmp_path: Path) -> None:
    audio = [{"bytes": b"", "path": f"{i}.wav"} for i in range(3)]
    table = pa.table({"audio": audio, "text": ["a", "b", "c"], "lang_id": [0, 1, None]})
    pq.write_table(table, tmp_path / "plain.parquet")
    assert [u.language for u in read_parquet(tmp_path / "plain.parquet")] == [None] * 3
    features = {"lang_id": {"names": ["cs-CZ", "de-DE"], "_type": "ClassLabel"}}
    named = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(named, tmp_path / "named.parquet")
    assert [u.language for u in read_parquet(tmp_path / "named.parquet")] == ["cs", "de", None]


def write_bomb(path: Path, kind: str) -> None:
    rows = 100
    large = "a" * (1 << 20)
    columns = {"audio": pa.array([{"bytes": b"x", "path": "a.wav"}] * rows), "text": pa.array(["hello"] * rows)}
    if kind == "audio":  # stored once, used by each row
        columns["audio"] = pa.array([{"bytes": large.encode(), "path": "a.wav"}] * rows)
    elif kind == "text":
        columns["text"] = pa.array([large] * rows)
    elif kind == "other column":
        columns["note"] = pa.array([large] * rows)
    else:
        columns = {name: pa.array([None] * 3_000_000, column.type) for name, column in columns.items()}
    pq.write_table(pa.table(columns), path, compression="zstd")


@pytest.mark.parametrize("kind", ["audio", "text", "other column", "rows of nothing"])
def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bomb.parquet"
    write_bomb(path, kind)
    assert path.stat().st_size < 2 << 20
    with pytest.raises(DataError, match=r"bomb\.parquet.* unpacks to 100 times"):
        for utterance in load_utterances(DataConfig(source="parquet", path=path)):
            utterance.audio.read()


def test_damaged_files_and_odd_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.parquet"
    cells = pa.array([{"bytes": b"x", "path": "a.wav"}] * 3)
    bad_text = pa.array([b"\xff\xfe", b"a", b"b"], pa.binary()).view(pa.string())
    metadata = {b"huggingface": b"[" * 100_000}
    table = pa.table({"audio": cells, "text": bad_text, "image": pa.array([b"1", b"2", b"3"])})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(DataError, match=r"odd\.parquet: not a Parquet file that can be read"):
        load_utterances(DataConfig(source="parquet", path=path))
    with pytest.raises(DataError, match=r"odd\.parquet: no column 'sound'; it has audio, text, image"):
        read_parquet(path, audio_column="sound")
    pq.write_table(pa.table({"audio": cells, "text": ["a", "b", "c"]}), path)
    whole = path.read_bytes()
    for place in range(4, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            for utterance in load_utterances(DataConfig(source="parquet", path=path)):
                utterance.audio.read()
        except DataError as err:
            assert "odd.parquet" in str(err)
