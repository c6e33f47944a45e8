from __future__ import annotations

import json
import math
import multiprocessing
import subprocess
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.utils.errors import DataError, ModelError
from src.utils.versioning import DatasetVersion, DataVersionManager, ModelRegistry, get_git_revision

WRITERS, EACH = 3, 8
can_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="a fresh process imports for seconds"
)


@dataclass
class Row:
    """Any class with an id, a text and audio will do; one that reads itself as well."""

    id: str
    text: str
    audio: Any

    def read(self) -> bytes:
        return b"sound of c"


@pytest.fixture
def clips(tmp_path: Path) -> list[Row]:
    (tmp_path / "a.wav").write_bytes(b"sound of a")
    read_later = Row("", "", None)
    return [Row("a", "one", tmp_path / "a.wav"), Row("b", "two", b"sound of b"), Row("c", "three", read_later)]


@pytest.fixture
def manager(tmp_path: Path) -> DataVersionManager:
    return DataVersionManager(str(tmp_path / "versions"))


def log(manager: DataVersionManager, clips: list[Row], version: str = "v1", **metadata: Any) -> DatasetVersion:
    return manager.log_dataset_version(dataset_name="calls", version=version, metadata=metadata, utterances=clips)


def test_version_is_one_file_that_is_read_back_as_it_was(manager: DataVersionManager, clips: list[Row]) -> None:
    log(manager, clips, rate=8000)
    record = log(manager, clips, rate=16_000)  # its metadata are renewed
    assert manager.versions() == [record]
    assert (record.clips, record.metadata, record.git_revision) == (3, {"rate": 16_000}, get_git_revision())
    assert datetime.fromisoformat(record.time).utcoffset() is not None
    [file] = manager.path.iterdir()
    assert json.loads(file.read_text())["checksum"] == record.checksum
    alone = log(manager, [], "metadata alone")
    assert (alone.clips, alone.checksum) == (0, None)


def test_checksum_goes_by_content_and_not_by_order_or_kind_of_source(
    manager: DataVersionManager, clips: list[Row]
) -> None:
    checksum = log(manager, clips).checksum
    as_bytes = [replace(clips[0], audio=b"sound of a"), *clips[1:]]
    assert log(manager, clips[::-1]).checksum == log(manager, as_bytes).checksum == checksum
    others = [
        clips[:2],
        [*clips, clips[0]],
        [replace(clips[0], text="One"), *clips[1:]],
        [replace(clips[0], audio=b"sound of x"), *clips[1:]],
        [replace(clips[0], text="two"), replace(clips[1], text="one"), clips[2]],
    ]
    checksums = [log(manager, other, f"v{i + 2}").checksum for i, other in enumerate(others)]
    assert len({checksum, *checksums}) == len(others) + 1


def test_same_version_with_other_content_is_refused_and_the_changes_are_listed(
    manager: DataVersionManager, clips: list[Row]
) -> None:
    record = log(manager, clips)
    now = [replace(clips[0], text="one!"), clips[1], replace(clips[1], id="d")]
    with pytest.raises(DataError, match=r"calls v1 .*\n.* added: d\n.* removed: c\n.* changed: a"):
        log(manager, now)
    with pytest.raises(DataError, match="changed: a"):
        log(manager, [*clips, clips[0]])
    assert manager.versions() == [record]


def test_versions_of_one_data_set_are_told_apart(manager: DataVersionManager) -> None:
    for name in ("a/b", "a_b", "A_B", "../up", "ü", "x" * 300):
        manager.log_dataset_version(dataset_name=name, version="1.0 (new)", metadata={})
    names = [file.name for file in manager.path.iterdir()]
    assert len({name.lower() for name in names}) == len(manager.versions()) == 6
    assert all(name.isascii() and len(name) < 200 and not set(name) & set("/\\ ()") for name in names)


def test_what_cannot_be_logged_or_read_is_named(manager: DataVersionManager, clips: list[Row], tmp_path: Path) -> None:
    for value in (object(), float("nan")):
        with pytest.raises(DataError, match="calls v1"):
            log(manager, clips, x=value)
    with pytest.raises(DataError, match=r"q \(.*gone\.wav"):
        log(manager, [Row("q", "text", tmp_path / "gone.wav")])
    assert not manager.path.exists()
    with pytest.raises(DataError, match=r"a\.wav"):
        log(DataVersionManager(tmp_path / "a.wav"), clips)
    for content in ("{", "{}", '{"digests": {"a": 1}}'):
        manager.path.mkdir(exist_ok=True)
        (manager.path / "odd.json").write_text(content)
        with pytest.raises(DataError, match=r"odd\.json"):
            manager.versions()


def test_git_revision_is_the_commit_and_marks_changes(tmp_path: Path) -> None:
    assert get_git_revision(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (tmp_path / "a").write_text("1")
    for arguments in (["init", "-q"], ["add", "a"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    revision = get_git_revision(tmp_path) or ""
    assert len(revision) == 40
    (tmp_path / "a").write_text("2")
    assert get_git_revision(tmp_path) == f"{revision}+changes"


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(str(tmp_path / "models"))


def register(registry: ModelRegistry, model_id: str, **metrics: Any) -> None:
    registry.register_model(model_id=model_id, metrics=metrics, git_revision=None)


def test_same_name_again_is_a_new_version_and_the_first_of_equals_is_best(registry: ModelRegistry) -> None:
    register(registry, "middle", wer=0.2, rate=3.0)
    register(registry, "low", wer=0.1, rate=1.0)
    register(registry, "low", wer=0.1, rate=9.0)
    assert [(m.model_id, m.version) for m in registry.list_models()] == [("middle", 1), ("low", 1), ("low", 2)]
    assert (registry.best().model_id, registry.best().version) == ("low", 1)
    assert registry.best("rate", lower_is_better=False).version == 2
    with pytest.raises(ModelError, match="did you mean 'wer'"):
        registry.best("wr")


@pytest.mark.parametrize("value", [math.nan, -math.inf, None, np.float32("nan")])
def test_value_that_is_not_finite_is_kept_as_missing_and_never_wins(
    registry: ModelRegistry, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    register(registry, "odd", wer=value)
    assert "odd: metric wer" in caplog.text
    assert registry.list_models()[0].metrics == {"wer": None}
    with pytest.raises(ModelError, match="'wer'"):
        registry.best()
    register(registry, "fine", wer=0.9)
    assert registry.best().model_id == registry.best(lower_is_better=False).model_id == "fine"


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"format": 2, "models": []}', '{"format": 1, "models": [{"model_id": "a"}]}',
        '{"format": 1, "models": [{"model_id": "a", "version": 1, "created": "", "git_revision": null, "metrics": '
        '{"wer": NaN}}]}',
    ],
)  # fmt: skip
def test_damaged_registry_is_named_and_stays(registry: ModelRegistry, content: str) -> None:
    registry.file.parent.mkdir()
    registry.file.write_text(content)
    for use in (lambda: register(registry, "b", wer=0.1), registry.best, registry.to_frame):
        with pytest.raises(DataError, match=r"registry\.json"):
            use()
    assert registry.file.read_text() == content
    with pytest.raises(DataError, match=r"registry\.json"):
        register(ModelRegistry(registry.file / "own.json"), "a", wer=0.1)  # below a file


def test_registered_models_are_read_again_and_are_rows_of_a_table(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path / "deep" / "own.json")
    model = registry.register_model(
        model_id="tiny-naïve", metrics={"wer": np.float32(0.25), "version": np.int64(7)},
        git_revision=get_git_revision(), run=Path("runs/1"), data_version="calls", checkpoint="runs/1/checkpoints/4",
        base_model="tiny.en", notes="first",
    )  # fmt: skip
    register(registry, "b", cer=0.1)
    assert ModelRegistry(str(registry.file)).list_models()[0] == model
    assert (model.run, model.metrics) == (str(Path("runs/1")), {"wer": 0.25, "version": 7.0})
    frame = registry.to_frame()
    assert frame["model_id"].tolist() == ["tiny-naïve", "b"]
    assert list(frame.columns[-3:]) == ["wer", "metrics.version", "cer"]
    assert frame["version"].tolist() == [1, 1]
    assert frame["wer"].isna().tolist() == [False, True]


@pytest.mark.parametrize(("name", "wer"), [("a", "low"), ("a", [0.1, 0.2]), (" ", 0.1)])
def test_a_metric_that_is_no_number_and_an_empty_name_are_refused(registry: ModelRegistry, name: str, wer: Any) -> None:
    with pytest.raises(ModelError):
        register(registry, name, wer=wer)
    assert registry.to_frame().empty
    assert not registry.file.parent.exists()


def register_many(path: Path, writer: int) -> None:
    for i in range(EACH):
        registry = ModelRegistry(path)
        register(registry, "shared", wer=writer + i / 100)
        register(registry, f"own{writer}", wer=float(i))


@can_fork
def test_concurrent_writers_lose_nothing_and_a_killed_one_leaves_no_lock(registry: ModelRegistry) -> None:
    def start(writer: int) -> Any:
        process = multiprocessing.get_context("fork").Process(target=register_many, args=(registry.file, writer))
        process.start()
        return process

    writers = [start(writer) for writer in range(WRITERS)]
    while any(writer.is_alive() for writer in writers):
        registry.list_models()  # a reader always finds a whole file
        time.sleep(0.005)
    shared = [m for m in registry.list_models() if m.model_id == "shared"]
    assert len(registry.list_models()) == 2 * WRITERS * EACH
    assert [m.version for m in shared] == list(range(1, WRITERS * EACH + 1))
    assert {m.metrics["wer"] for m in shared} == {w + i / 100 for w in range(WRITERS) for i in range(EACH)}
    for i in range(4):
        process = start(i)
        time.sleep(0.01 + 0.02 * i)
        process.kill()
        process.join()
        before = registry.list_models()
        register(registry, "after", wer=0.0)
        assert registry.list_models()[:-1] == before
        assert registry.list_models()[-1].version == i + 1
