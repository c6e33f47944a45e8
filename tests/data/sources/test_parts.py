"""Rows that name a part of a recording: its own audio goes beside its text, and what cannot be is refused by line."""

from __future__ import annotations

import io
import json
import shutil
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from src.data.audio import decode, load_audio
from src.data.preparation import check_utterance, prepare_datasets
from src.data.sources.catalog import SAMPLE_CLIP, read_folder
from src.data.sources.parts import AudioPart
from src.utils.config import DataConfig, load_config
from src.utils.errors import AudioError, DataError


@pytest.fixture
def talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recording of 11 s, talk.flac."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "temporary").mkdir()
    shutil.copy(SAMPLE_CLIP, folder / "talk.flac")
    return folder


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "m.jsonl").write_text(
        "".join(json.dumps({"file": "talk.flac", "text": "x", **row}) + "\n" for row in rows)
    )


@pytest.mark.parametrize("row", [
    {"offset": 2, "duration": 1.5}, {"start": "2.0", "end": "3.5"}, {"start_sec": 2, "end_sec": 3.5},
    {"start_time": "0:02", "end_time": "0:03.5"}, {"begin": "0:00:02,0", "end": 3.5},
])  # fmt: skip
def test_each_way_to_name_a_part_gives_that_part(talk: Path, row: dict) -> None:
    write_rows(talk, [row])
    (utterance,) = read_folder(talk)
    assert utterance.audio == AudioPart(talk / "talk.flac", 2.0, 3.5)
    whole = load_audio(SAMPLE_CLIP)
    assert np.abs(load_audio(utterance.audio) - whole[32_000:56_000]).max() < 1e-4


def test_rows_of_one_recording_become_utterances_of_their_own(talk: Path) -> None:
    write_rows(talk, [{"text": f"part {i}", "offset": i, "duration": 1.0, "speaker": f"s{i}"} for i in range(8)])
    config = load_config(None, overrides={"data.source": "folder", "data.path": str(talk)})
    splits = prepare_datasets(config)
    assert sorted((u.text, u.duration_sec) for u in splits.utterances) == [(f"part {i}", 1.0) for i in range(8)]
    assert len({u.id for u in splits.utterances}) == 8


def test_a_duration_alone_describes_the_file_and_an_offset_alone_goes_to_its_end(talk: Path) -> None:
    write_rows(talk, [{"id": "a", "duration": 3.0}, {"id": "b", "offset": 10}, {"id": "c", "end": 1}])
    whole, rest, head = (len(load_audio(u.audio)) / 16_000 for u in read_folder(talk))
    assert (whole, rest, head) == (11.0, 1.0, 1.0)


def test_a_clip_that_was_cut_already_is_taken_whole(talk: Path) -> None:
    write_rows(talk, [{"start": 125.5, "end": 136.5}])  # where it was in a recording that is not here
    (utterance,) = read_folder(talk)
    decoded = decode(utterance.audio)
    assert (len(decoded.samples), decoded.sample_rate) == (11 * 16_000, sf.info(SAMPLE_CLIP).samplerate)


@pytest.mark.parametrize(("row", "reason"), [
    ({"start": 3, "end": 2}, "begins at 3 s and ends at 2 s"), ({"start": -1, "end": 2}, "start is -1"),
    ({"offset": "nan", "duration": 1}, "offset is 'nan'"), ({"start": True, "end": 2}, "start is True"),
    ({"start": "soon", "end": 2}, "start is 'soon'"), ({"start": [1], "end": 2}, r"start is \[1\]"),
])  # fmt: skip
def test_times_that_cannot_be_cost_their_row(talk: Path, row: dict, reason: str) -> None:
    write_rows(talk, [{"start": 1, "end": 2}, row, row])
    good, bad, worse = read_folder(talk)
    assert (good.problem, bad.id, worse.id) == (None, "talk.flac line 2", "talk.flac line 3")
    with pytest.raises(DataError, match=rf"line 2 of the manifest.*{reason}"):
        check_utterance(bad, DataConfig())


def test_a_part_beyond_the_end_and_an_absent_recording_are_named(talk: Path) -> None:
    write_rows(talk, [{"start": 2_000, "end": 3_500}, {"id": "b", "file": "gone.wav", "start": 0, "end": 1}])
    beyond, absent = read_folder(talk)
    with pytest.raises(AudioError, match=r"talk.flac, 2000-3500 s: the recording ends at 11.00 s"):
        load_audio(beyond.audio)
    with pytest.raises(AudioError, match=r"gone.wav: no such file"):
        load_audio(absent.audio)


def test_a_part_of_a_damaged_recording_is_refused(talk: Path) -> None:
    whole = (talk / "talk.flac").read_bytes()
    (talk / "talk.flac").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AudioError, match=r"talk.flac"):
        load_audio(AudioPart(talk / "talk.flac", 0.0, 1.0))
    assert not list(Path(tempfile.gettempdir()).rglob("*.flac"))


def test_a_changed_recording_is_decoded_again(talk: Path) -> None:
    part = AudioPart(talk / "talk.flac", 0.0, 1.0)
    before = part.read()
    sf.write(talk / "talk.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 32_000), 16_000)
    assert part.read() != before
    assert sf.info(io.BytesIO(part.read())).duration == 1.0


def test_threads_decode_a_recording_once_into_a_folder_that_others_cannot_enter(talk: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda at: AudioPart(talk / "talk.flac", at, at + 1.0).read(), range(8)))
    assert len(set(parts)) == 8
    (decoded,) = Path(tempfile.gettempdir()).rglob("*.flac")
    assert stat.S_IMODE(decoded.parent.stat().st_mode) == 0o700
