from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.data.preparation import prepare_datasets
from src.data.sources import catalog
from src.data.sources.hub import stream_hub
from src.data.utterance import Utterance
from src.utils.config import Config, HubConfig, load_config
from src.utils.errors import DataError
from tests.data.hub_layout import encoded, write_librispeech, write_minds14, write_speechocean762

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def train(sample: list[Utterance]) -> list[Utterance]:
    """24 clips of 12 speakers."""
    by_speaker: dict[str | None, list[Utterance]] = {}
    for utterance in sample:
        by_speaker.setdefault(utterance.speaker, []).append(utterance)
    return [u for clips in list(by_speaker.values())[:12] for u in clips[:2]]


@pytest.fixture(scope="module")
def minds14(tmp_path_factory: pytest.TempPathFactory, train: list[Utterance]) -> Path:
    return write_minds14(tmp_path_factory.mktemp("minds14"), train)


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory: pytest.TempPathFactory, train: list[Utterance]) -> Path:
    splits = {"train.100": train[:14], "validation": train[14:18], "test": train[18:]}
    return write_librispeech(tmp_path_factory.mktemp("librispeech"), splits)


def hub_config(source: str, root: Path | str, **data: Any) -> Config:
    hub = {"id": str(root), **data.pop("hub", {})}
    return load_config(None, overrides={"data": {"source": source, "hub": hub, **data}})


def test_minds14_is_read_from_the_parquet_branch_at_8_khz_and_split(
    minds14: Path, train: list[Utterance], caplog: pytest.LogCaptureFixture
) -> None:
    streams = stream_hub("minds14", HubConfig(id=str(minds14)))
    assert list(streams) == ["train"]
    first = next(streams["train"])
    assert (first.id, first.text, first.language) == (train[0].id, train[0].text.lower(), "en")
    assert first.speaker is None
    assert first.meta["intent_class"] == "abroad"
    with caplog.at_level("INFO"):
        splits = prepare_datasets(hub_config("minds14", minds14, max_train=2_000))
    assert len(splits.utterances) == 24
    assert "24 exist; taking all of them" in caplog.text
    assert "speakers are unknown" in caplog.text
    assert {splits.stats[u.id].sample_rate for u in splits.train} == {8_000}
    assert splits.source == "minds14"


def test_librispeech_honours_the_splits_and_n_clips_cost_n_clips(
    librispeech: Path, train: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []

    def counted(source: str, options: HubConfig) -> dict[str, Iterator[Utterance]]:
        def count(stream: Iterator[Utterance]) -> Iterator[Utterance]:
            for utterance in stream:
                drawn.append(utterance.id)
                yield utterance

        return {name: count(stream) for name, stream in stream_hub(source, options).items()}

    monkeypatch.setattr(catalog, "stream_hub", counted)
    splits = prepare_datasets(hub_config("librispeech", librispeech, max_train=5, max_validation=2, max_test=3))
    expected = [*train[:5], *train[14:16], *train[18:21]]
    assert [u.id for u in splits.utterances] == [u.id for u in expected] == drawn
    assert (splits.train[0].speaker, splits.train[0].language) == (str(int(train[0].speaker or 0)), "en")


def test_a_stream_passes_over_what_fails_and_still_gives_n(
    tmp_path: Path, train: list[Utterance], caplog: pytest.LogCaptureFixture
) -> None:
    broken = Utterance(train[1].id, train[1].audio, "", train[1].speaker)  # no transcript
    root = write_librispeech(
        tmp_path, {"train.100": [train[0], broken, *train[2:14]], "validation": train[14:18], "test": train[18:]}
    )
    splits = prepare_datasets(hub_config("librispeech", root, max_train=5, on_error="skip", max_skip_fraction=0.5))
    assert [u.id for u in splits.train] == [train[i].id for i in (0, 2, 3, 4, 5)]
    assert [row.id for row in splits.skipped] == [broken.id]
    any_set = hub_config("hub", root, hub={"config": "clean", "train_split": "train.100"}, max_train=1)
    assert [u.id for u in prepare_datasets(any_set).train] == [train[0].id]
    with pytest.raises(DataError, match=broken.id):
        prepare_datasets(hub_config("librispeech", root, max_train=5))


def test_speechocean762_has_its_test_split_and_validation_is_cut_by_speaker(
    tmp_path: Path, train: list[Utterance]
) -> None:
    root = write_speechocean762(tmp_path, {"train": train[:18], "test": train[18:]})
    splits = prepare_datasets(hub_config("speechocean762", root, validation_fraction=0.2))
    assert {u.id for u in splits.test} == {u.id for u in train[18:]}
    assert len(splits.train) + len(splits.validation) == 18
    assert not {u.speaker for u in splits.train} & {u.speaker for u in splits.validation}
    assert splits.train[0].meta["gender"] in ("m", "f")
    assert "words" not in splits.train[0].meta


@pytest.mark.parametrize(
    ("hub", "reason"),
    [
        ({"config": "clean"}, r"no split 'train' among train\.100, validation, test"),
        ({"config": "clean", "train_split": "train.360"}, r"no split 'train\.360'"),
        ({"config": "clear", "train_split": "train.100"}, r"'clear' not found.*clean"),
        ({"config": "clean", "train_split": "train.100", "text_column": "words"}, "no column 'words'; it has file"),
    ],
)
def test_wrong_names_are_refused_with_those_that_exist(librispeech: Path, hub: dict[str, str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        prepare_datasets(hub_config("hub", librispeech, hub=hub, max_train=3))


def test_a_subsets_language_is_that_of_its_rows_and_not_for_an_english_model(
    tmp_path: Path, train: list[Utterance]
) -> None:
    root = write_minds14(tmp_path, train, config="fr-FR")
    hub = {"id": str(root), "config": "fr-FR"}
    overrides: dict[str, Any] = {
        "model": {"variant": "base", "language": "en"},
        "data": {"source": "minds14", "hub": hub, "max_train": 8},
    }
    splits = prepare_datasets(load_config(None, overrides=overrides))
    assert {u.language for u in splits.utterances} == {"fr"}
    overrides["model"] = {"variant": "tiny.en"}
    with pytest.raises(DataError, match=r"utterance \S+: its language is French.*model\.variant: tiny"):
        prepare_datasets(load_config(None, overrides=overrides))


def test_a_cut_network_is_named_too() -> None:
    """A fresh process without offline mode, whose Hub is a port where nobody listens."""
    code = (
        "from src.data.preparation import prepare_datasets\nfrom src.utils.config import load_config\n"
        "prepare_datasets(load_config(None, overrides={'data.source': 'minds14'}))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    message = done.stderr.strip().splitlines()[-1]
    assert "SourceUnavailableError: data set 'PolyAI/minds14' cannot be reached" in message
    assert "sample (bundled)" in message


def test_the_next_source_is_tried_only_where_the_config_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(None, overrides={"data": {"sources": ["minds14", "sample"], "max_train": 8, "max_test": 4}})
    with caplog.at_level("WARNING"):
        splits = prepare_datasets(config)
    assert splits.source == "sample"
    assert "source 'minds14' is unavailable" in caplog.text


def test_a_fault_in_the_data_never_switches_the_source(tmp_path: Path, train: list[Utterance]) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text,split\nabsent.wav,hello,train\n")
    config = load_config(None, overrides={"data": {"sources": ["folder", "sample"], "path": str(tmp_path)}})
    with pytest.raises(DataError, match=r"cannot cut|absent\.wav"):
        prepare_datasets(config)


def test_a_row_that_names_a_file_elsewhere_is_refused(tmp_path: Path, train: list[Utterance]) -> None:
    (tmp_path / "secret.wav").write_bytes(encoded(train[0], 16_000, "WAV"))
    root = tmp_path / "set"
    root.mkdir()
    (root / "a.wav").write_bytes(encoded(train[0], 16_000, "WAV"))
    for named, is_taken in ((root / "a.wav", True), (tmp_path / "secret.wav", False), (root / "../secret.wav", False)):
        table = pa.table({"audio": [{"bytes": None, "path": str(named)}] * 4, "text": list("abcd")})
        pq.write_table(table, root / "train-00000-of-00001.parquet")
        opened = stream_hub("hub", HubConfig(id=str(root), audio_column="audio"))
        if is_taken:
            assert [u.audio for u in opened["train"]] == [root / "a.wav"] * 4
        else:
            with pytest.raises(DataError, match=r"names .*secret\.wav"):
                list(opened["train"])
