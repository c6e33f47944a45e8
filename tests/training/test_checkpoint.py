from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.training import checkpoint as module
from src.training.checkpoint import (
    CheckpointStore,
    TrainingState,
    clean_up,
    list_checkpoints,
    load_checkpoint,
    read_values,
    verify_checkpoint,
)
from src.utils.errors import CheckpointError


def make_state(value: float = 1.0) -> TrainingState:
    model = {
        "a": torch.full((300, 2), value),
        "half": torch.tensor([value, float("nan"), -0.0], dtype=torch.bfloat16),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
    }
    rng = {"torch": torch.arange(16, dtype=torch.uint8)}
    return TrainingState({"model": model, "optimizer": {"a/step": torch.tensor(3.0)}, "rng": rng}, {"best": value})


def store(folder: Path, limit: int = 2) -> CheckpointStore:
    return CheckpointStore(folder / "run", save_total_limit=limit)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(found: TrainingState, state: TrainingState) -> None:
    assert found.values == {"format": 1, **state.values}
    for file, tensors in state.tensors.items():
        assert set(found.tensors[file]) == set(tensors)
        for name, tensor in tensors.items():
            loaded = found.tensors[file][name]
            assert loaded.dtype == tensor.dtype
            assert torch.equal(loaded.nan_to_num(7.0), tensor.nan_to_num(7.0)), name


def test_what_is_saved_is_verified_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    state = make_state()
    path = store(tmp_path).save(state, 123)
    assert path == tmp_path / "run" / "checkpoint-00000123"
    verify_checkpoint(path)
    assert_same(load_checkpoint(path), state)
    assert read_values(path)["best"] == 1.0


def test_an_optimizer_that_has_not_stepped_yet_is_no_problem(tmp_path: Path) -> None:
    state = TrainingState({"model": {}, "optimizer": {}, "rng": {}}, {"best": float("inf")})
    assert_same(load_checkpoint(store(tmp_path).save(state, 0)), state)


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(tmp_path).save(make_state(), 1)
    assert names(path) == [
        "manifest.json", "metrics.jsonl", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json",
    ]  # fmt: skip
    for file in path.iterdir():
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError)):
            pickle.loads(file.read_bytes())

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load_checkpoint(path)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [(flip_a_bit, "the content of {} is damaged"), (cut, "{} has .* bytes instead of"), (Path.unlink, "{} cannot be")],
)
def test_damage_is_found_and_named(tmp_path: Path, file: str, damage: Callable[[Path], None], reason: str) -> None:
    path = store(tmp_path).save(make_state(), 1)
    damage(path / file)
    for read in (verify_checkpoint, load_checkpoint):
        with pytest.raises(CheckpointError, match=reason.format(file)) as caught:
            read(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"has no manifest\.json: it was never finished"),
        ("{", r"manifest\.json cannot be read"),
        ("[]", r"manifest\.json cannot be read"),
        ('{"files": {}}', "does not list model"),
        ('{"files": {"state.json": {"size": 1}}}', r"manifest\.json cannot be read"),
    ],
)
def test_a_folder_without_a_whole_manifest_is_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    path = store(tmp_path).save(make_state(), 1)
    (path / "manifest.json").unlink()
    if content is not None:
        (path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(path)


def test_a_foreign_format_and_a_folder_that_is_none_are_refused(tmp_path: Path) -> None:
    path = store(tmp_path).save(make_state(), 1)
    (path / "state.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(CheckpointError, match="not a checkpoint of format 1; train with the version that wrote it"):
        read_values(path)
    (path / "state.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        read_values(path)
    for absent in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError):
            load_checkpoint(absent)
        with pytest.raises(CheckpointError):
            read_values(absent)


def test_the_oldest_over_the_limit_go(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, limit=2)
    for step in (1, 2, 10, 11):
        checkpoints.save(make_state(step), step)
    assert names(tmp_path / "run") == ["checkpoint-00000010", "checkpoint-00000011"]
    checkpoints.save(make_state(7.0), 11)  # the same step again: the new one counts
    assert names(tmp_path / "run") == ["checkpoint-00000010", "checkpoint-00000011"]
    assert load_checkpoint(tmp_path / "run" / "checkpoint-00000011").values["best"] == 7.0


def test_a_training_that_begins_anew_in_the_same_run_keeps_its_own_and_not_the_former_ones(tmp_path: Path) -> None:
    for step in (90, 100):
        store(tmp_path).save(make_state(), step)
    for step in (1, 2):
        path = store(tmp_path).save(make_state(2.0), step)
        assert path.is_dir()
    assert names(tmp_path / "run") == ["checkpoint-00000001", "checkpoint-00000002"]


class Mirror:
    def __init__(self) -> None:
        self.busy: set[str] = set()
        self.submitted: list[tuple[str, dict[str, Any]]] = []

    def submit(self, source: Path, **options: Any) -> None:
        self.submitted.append((source.name, options))

    def is_busy(self, source: Path) -> bool:
        return source.name in self.busy


def test_the_mirror_gets_each_and_what_it_copies_stays_until_it_is_done(tmp_path: Path) -> None:
    mirror = Mirror()
    checkpoints = CheckpointStore(tmp_path / "run", save_total_limit=1, mirror=mirror)  # type: ignore[arg-type]
    mirror.busy = {"checkpoint-00000001"}
    for step in (1, 2):
        checkpoints.save(make_state(), step)
    assert mirror.submitted[1] == (
        "checkpoint-00000002", {"name": "run/checkpoint-00000002", "group": "run", "keep": 1}
    )  # fmt: skip
    assert len(list_checkpoints(tmp_path / "run")) == 2
    mirror.busy = set()
    checkpoints.save(make_state(), 3)
    assert names(tmp_path / "run") == ["checkpoint-00000003"]


def assert_older_is_whole(tmp_path: Path) -> None:
    assert names(tmp_path / "run") == ["checkpoint-00000001"]
    assert_same(load_checkpoint(tmp_path / "run" / "checkpoint-00000001"), make_state())


def test_a_disk_without_space_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(make_state(), 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    monkeypatch.setattr(module, "_write", lambda *args: pytest.fail("written"))
    with pytest.raises(CheckpointError, match=r"needs 17 MB, 5 MB are free; older checkpoints are whole"):
        checkpoints.save(make_state(2.0), 2)
    assert_older_is_whole(tmp_path)


@pytest.mark.parametrize("step", [1, 2])  # in place of the older one, or beside it
@pytest.mark.parametrize("failing", ["save_file", "sha256_of", "safetensors"])
def test_a_disk_that_fills_up_in_the_middle_leaves_the_older_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, step: int
) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(make_state(), 1)

    def full(*args: Any) -> Any:
        (tmp_path / "run" / f".checkpoint-{step:08d}.touched").touch()
        if failing == "safetensors":
            raise module.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file" if failing == "safetensors" else failing, full)
        with pytest.raises(
            CheckpointError, match=r"cannot be saved: .*No space left on device.*; older checkpoints are"
        ):
            checkpoints.save(make_state(2.0), step)
    (tmp_path / "run" / f".checkpoint-{step:08d}.touched").unlink()
    assert_older_is_whole(tmp_path)
    checkpoints.save(make_state(2.0), 2)  # there is space again


def test_a_disk_that_gives_back_other_bytes_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(make_state(), 1)
    save_file = module.save_file

    def unreliable(tensors: dict[str, torch.Tensor], file: Path) -> None:
        save_file(tensors, file)
        cut_at = file.stat().st_size - 1
        content = bytearray(file.read_bytes())
        content[cut_at] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(module, "save_file", unreliable)
    with pytest.raises(CheckpointError, match="reads back differently; the disk is not reliable"):
        checkpoints.save(make_state(2.0), 2)
    assert_older_is_whole(tmp_path)


def test_an_interrupt_in_the_middle_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(make_state(), 1)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(make_state(2.0), 1)
    assert_older_is_whole(tmp_path)


def test_what_a_killed_process_left_is_cleaned_up(tmp_path: Path) -> None:
    path = store(tmp_path).save(make_state(), 1)
    dead = 2**22 + 1  # no process has this id
    (path.parent / f".checkpoint-00000002.{dead}.0a0b.partial").mkdir()
    (path.parent / ".checkpoint-00000000.removed" / "sub").mkdir(parents=True)
    shutil.copytree(path, path.parent / f".checkpoint-00000003.{dead}.0a0c.replaced")
    (path.parent / "notes.txt").write_text("mine")
    clean_up(path.parent)
    assert names(path.parent) == ["checkpoint-00000001", "checkpoint-00000003", "notes.txt"]
    verify_checkpoint(path.parent / "checkpoint-00000003")
    clean_up(tmp_path / "absent")
