from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError

from src.training import checkpoint as module
from src.training.checkpoint import (
    CheckpointStore,
    TrainingState,
    clean_up,
    config_differences,
    find_checkpoint,
    read_values,
    verify_checkpoint,
)
from src.training.state import Progress, random_state
from src.utils.config import Config
from src.utils.errors import CheckpointError
from tests.training.conftest import Configure, damage

VALUES: dict[str, Any] = {
    "run": "a", "progress": Progress().state_dict(), "loader": {"epoch": 0, "batches": 0, "made_from": {}},
    "updater": {"pieces": 1, "largest": 0, "norms": [], "skipped_in_row": []}, "optimizer": {}, "scaler": None,
    "rng": random_state()[1], "frozen_parameters": "", "data_version": "",
}  # fmt: skip


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


def put(root: Path, run: str, step: int, config: Config, *, saved_at: float, **values: Any) -> Path:
    """Save a checkpoint that holds just what a search looks at."""
    state = TrainingState(
        {"model": {}, "optimizer": {}, "rng": {}},
        {**VALUES, "saved_at": saved_at, "config": config.model_dump(mode="json"), **values},
    )
    return CheckpointStore(root / run, save_total_limit=9).save(state, step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def load_checkpoint(path: Path) -> TrainingState:
    return verify_checkpoint(path).load()


def assert_same(found: TrainingState, state: TrainingState) -> None:
    assert found.values == {"format": 1, **state.values, "order": found.values["order"]}
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
    assert_same(load_checkpoint(path), state)
    assert verify_checkpoint(path).values == read_values(path) == {"format": 1, "best": 1.0, "order": 1}
    whole = verify_checkpoint(path)
    (path / "rng.safetensors").unlink()  # since then
    with pytest.raises(CheckpointError, match="rng"):
        whole.load()
    empty = TrainingState({"model": {}, "optimizer": {}, "rng": {}}, {"best": float("inf")})  # before the first step
    assert_same(load_checkpoint(store(tmp_path).save(empty, 0)), empty)


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, None)
    path = store(tmp_path).save(make_state(), 1)
    load_checkpoint(path)
    assert names(path) == [
        "manifest.json", "metrics.jsonl", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json",
    ]  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
@pytest.mark.parametrize("harm", [damage, cut, Path.unlink])
def test_damage_is_found_and_named(tmp_path: Path, file: str, harm: Callable[[Path], None]) -> None:
    path = store(tmp_path).save(make_state(), 1)
    harm(path / file)
    with pytest.raises(CheckpointError, match=file) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", text)
        for text in (b"", b"{", b"[]", b'{"files": {}}', b'{"files": {"state.json": {"size": 1}}}')
    ]
    + [("state.json", text) for text in (b'{"format": 2}', b"[]", b"\xff\xfe")],
)
def test_a_folder_without_a_whole_manifest_or_of_another_format_is_refused(
    tmp_path: Path, file: str, content: bytes
) -> None:
    path = store(tmp_path).save(make_state(), 1)
    (path / file).write_bytes(content) if content else (path / file).unlink()
    read = load_checkpoint if file == "manifest.json" else read_values
    with pytest.raises(CheckpointError, match=rf"{path}.*{'manifest' if file == 'manifest.json' else ''}"):
        read(path)
    for absent in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=str(absent)):
            read(absent)


def test_the_oldest_over_the_limit_go_whatever_their_steps(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        store(tmp_path).save(make_state(step), step)
    store(tmp_path).save(make_state(7.0), 11)  # the same step again: the new one counts
    assert names(tmp_path / "run") == ["checkpoint-00000010", "checkpoint-00000011"]
    assert load_checkpoint(tmp_path / "run" / "checkpoint-00000011").values["best"] == 7.0
    for step in (1, 2):  # a new training in the same run keeps its own
        store(tmp_path).save(make_state(), step)
    assert names(tmp_path / "run") == ["checkpoint-00000001", "checkpoint-00000002"]


def test_a_clock_set_back_changes_neither_what_stays_nor_what_is_taken_up(tmp_path: Path, configure: Configure) -> None:
    root, copies = tmp_path / "local", tmp_path / "mirror"
    config, checkpoints = configure().model_dump(mode="json"), store(root)

    def save(step: int, now: float, into: CheckpointStore) -> Path:
        values = {**VALUES, "saved_at": now, "config": config}
        path = into.save(TrainingState({"model": {}, "optimizer": {}, "rng": {}}, values), step)
        for file in path.iterdir():
            os.utime(file, (now, now))
        return path

    for step, now in ((10, 5000.0), (20, 5060.0), (30, 1500.0), (40, 1560.0), (50, 1620.0)):
        last = save(step, now, checkpoints)
    assert names(root / "run") == ["checkpoint-00000040", "checkpoint-00000050"]
    assert find_checkpoint([root], None).checkpoint == last
    again = save(5, 3.0, store(root))  # a new training in this folder, and one in another
    assert find_checkpoint([root], configure()).checkpoint == again
    other = save(1, 2.0, CheckpointStore(root / "other", save_total_limit=2))
    assert find_checkpoint([root], None).checkpoint == other
    root.rename(copies)  # a new machine: only the copies are left
    newest = save(1, 1.0, CheckpointStore(root / "run", save_total_limit=2, older=[copies]))
    assert find_checkpoint([root, copies], None).checkpoint == newest
    # of an earlier version, without an order: by the clock, before all others
    values = json.loads((newest / "state.json").read_text())
    del values["order"]
    (newest / "state.json").write_text(json.dumps({**values, "saved_at": 9e9}))
    assert find_checkpoint([root, copies], None).refused == ()
    assert find_checkpoint([root, copies], None).checkpoint == copies / "other" / other.name


def test_the_mirror_gets_each_and_what_it_copies_stays_until_it_is_done(tmp_path: Path) -> None:
    mirror = Mock()
    mirror.is_busy = lambda path: path.name == busy
    checkpoints = CheckpointStore(tmp_path / "run", save_total_limit=1, mirror=mirror)
    busy = "checkpoint-00000001"
    for step in (1, 2):
        path = checkpoints.save(make_state(), step)
    mirror.submit.assert_called_with(path, name=f"run/{path.name}", group="run", keep=1)
    assert names(tmp_path / "run") == [busy, path.name]
    busy = ""
    checkpoints.save(make_state(), 3)
    assert names(tmp_path / "run") == ["checkpoint-00000003"]


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", [1, 2])  # in place of the older one, or next to it
@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("save_file", NO_SPACE, "No space"),
        ("sha256_of", NO_SPACE, "No space"),
        ("save_file", SafetensorError("I/O error: No space left on device (os error 28)"), "No space"),
        ("_compare", KeyboardInterrupt(), ""),
        ("safe_open", None, "model.safetensors"),  # reads other bytes
        ("_write", None, "5 MB"),  # is not called: there is no space
    ],
)
def test_a_save_that_fails_leaves_the_older_checkpoint_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fault: BaseException | None,
    message: str,
    step: int,
) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(make_state(), 1)
    with monkeypatch.context() as patch:
        if name == "safe_open":
            save_file = module.save_file
            patch.setattr(module, "save_file", lambda tensors, file: (save_file(tensors, file), damage(file)))
        elif name == "_write":
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
            patch.setattr(module, name, lambda *args: pytest.fail("written"))
        else:
            patch.setattr(module, name, Mock(side_effect=fault))
        with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
            checkpoints.save(make_state(2.0), step)
    assert message in str(caught.value)
    assert names(tmp_path / "run") == ["checkpoint-00000001"]
    assert_same(load_checkpoint(tmp_path / "run" / "checkpoint-00000001"), make_state())
    checkpoints.save(make_state(2.0), step)  # it works again


# the search


def test_the_newest_usable_one_is_taken_and_newer_ones_are_refused_with_reasons(
    tmp_path: Path, configure: Configure
) -> None:
    config, number = configure(), itertools.count(1)

    def newer(run: str = "a", with_config: Config = config) -> Path:
        step = next(number)
        return put(tmp_path, run, step, with_config, saved_at=float(step))

    newer()
    put(tmp_path, "a", 900, config, saved_at=1.5)  # by age, whatever the run and step
    wanted = newer("c")
    refused = {newer("b", configure(training__learning_rate=0.5)): "training.learning_rate"}
    damaged, unfinished = newer(), newer()
    damage(damaged / "model.safetensors")
    (unfinished / "manifest.json").unlink()
    refused |= {damaged: "model.safetensors", unfinished: "manifest.json"}
    for key in ("config", "training", "format", "saved_at"):  # a byte of a key is another
        state = newer() / "state.json"
        state.write_text(state.read_text().replace(f'"{key}"', f'"{key[:-1]}~"', 1))
        refused[state.parent] = ""
    report = find_checkpoint([tmp_path], config)
    assert report.checkpoint == wanted
    assert {path for path, _ in report.refused} == set(refused)
    for path, reason in report.refused:
        assert refused[path] in reason
        assert str(path) in str(report)
    nothing = find_checkpoint([tmp_path / "absent"], config)
    assert nothing.checkpoint is None
    assert str(tmp_path / "absent") in str(nothing)


def tamper(checkpoint: Path, file: str, content: bytes) -> None:
    """Replace a file of a checkpoint, and what the manifest says about it."""
    (checkpoint / file).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        {"progress": {**Progress().state_dict(), "step": "7"}},
        {"progress": {**Progress().state_dict(), "epochs_done": -1}},
        {"progress": {**Progress().state_dict(), "totals": {}}},
        {"progress": {**Progress().state_dict(), "history": []}},
        {"progress": {**Progress().state_dict(), "more": 1}},
        {"progress": None},
        {"loader": {"epoch": -1, "batches": 0, "made_from": {}}},
        {"updater": {"pieces": 0, "largest": 0, "norms": [], "skipped_in_row": []}},
        {"optimizer": [1]},
        {"rng": {"python": [3, [1, 2], None], "numpy": VALUES["rng"]["numpy"]}},
        {"rng": {"python": VALUES["rng"]["python"], "numpy": ["MT19937", [1e99], 0, 0, 0.0]}},
        {"run": "../../elsewhere"},
        {"saved_at": "yesterday"},
        {"saved_at": 10**400},
        {"order": [1]},
        {"order": float("inf")},
        {"config": "none"},
        {"config": {"training": [[]]}},
        {"data_version": 3},
    ],
    ids=lambda change: ",".join(change),  # the values are drawn: each process that collects has its own
)
def test_auto_passes_over_a_state_that_somebody_changed(
    tmp_path: Path, configure: Configure, change: dict[str, Any]
) -> None:
    config = configure()
    older, newest = (put(tmp_path, "a", step, config, saved_at=float(step)) for step in (1, 2))
    values = {**read_values(newest), **change}
    tamper(newest, "state.json", json.dumps(values).encode())
    for wanted in (config, None):
        report = find_checkpoint([tmp_path], wanted)
        assert report.checkpoint == older or ("config" in change and wanted is None and report.checkpoint == newest)


def test_of_any_training_tensors_alone_are_a_checkpoint(tmp_path: Path) -> None:
    state = TrainingState(make_state().tensors, {"saved_at": 0.0})
    saved = [store(tmp_path).save(state, step) for step in (2, 1)]
    assert find_checkpoint([tmp_path], None).checkpoint == saved[-1]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", b"[" * 100_000),
        ("state.json", b"[" * 100_000),
        ("state.json", b'{"format": 1, "saved_at": ' + b"9" * 5_000 + b"}"),
        ("state.json", b"\xff\xfe"),
        ("manifest.json", b'{"files": {"state.json": {"size": 1e999, "sha256": ""}}}'),
        ("manifest.json", b'{"files": {"../a": {"size": 0, "sha256": ""}}}'),
        ("manifest.json", b'{"files": {"/dev/zero": {"size": 0, "sha256": ""}}}'),
        ("manifest.json", rb'{"files": {"a\u0000b": {"size": 0, "sha256": ""}}}'),
        ("manifest.json", rb'{"files": {"\ud800": {"size": 0, "sha256": ""}}}'),
        ("manifest.json", b'{"files": [1]}'),
        ("metrics.jsonl", None),
        ("manifest.json", None),
        ("state.json", None),
        ("model.safetensors", None),
    ],
)
def test_auto_passes_over_what_is_no_checkpoint_and_opens_no_pipe(
    tmp_path: Path, configure: Configure, file: str, content: bytes | None
) -> None:
    older, newest = (put(tmp_path, "a", step, configure(), saved_at=float(step)) for step in (1, 2))
    (newest / file).unlink()
    if content is None:
        os.mkfifo(newest / file)
    else:
        (newest / file).write_bytes(content)
    report = find_checkpoint([tmp_path], configure())
    assert report.checkpoint == older
    ((path, reason),) = report.refused
    assert path == newest
    assert file in reason
    with pytest.raises(CheckpointError, match=file):
        verify_checkpoint(newest)


def test_the_copy_stands_in_for_a_damaged_or_absent_original(tmp_path: Path, configure: Configure) -> None:
    config, (local, mirror) = configure(), (tmp_path / "local", tmp_path / "mirror")
    path = put(local, "a", 2, config, saved_at=2.0)
    shutil.copytree(local, mirror)
    assert find_checkpoint([local, mirror], config).checkpoint == path
    damage(path / "model.safetensors")
    assert find_checkpoint([local, mirror], config).checkpoint == mirror / "a" / path.name
    shutil.rmtree(local)
    assert find_checkpoint([local, mirror], config).checkpoint == mirror / "a" / path.name


def test_what_a_killed_process_left_is_removed_here_but_not_in_the_mirror(tmp_path: Path, configure: Configure) -> None:
    config, (local, mirror) = configure(), (tmp_path / "local", tmp_path / "mirror")
    dead = "4194305.0a0b"  # no process has this id
    path = put(local, "a", 1, config, saved_at=1.0)
    (path.parent / f".checkpoint-00000000.{dead}.partial" / "sub").mkdir(parents=True)
    (path.parent / f".checkpoint-00000002.{dead}.partial").mkdir()
    shutil.copytree(path, path.parent / f".checkpoint-00000003.{dead}.replaced")
    (path.parent / "notes.txt").write_text("mine")
    shutil.copytree(local, mirror)
    find_checkpoint([local, mirror], config)
    assert names(path.parent) == ["checkpoint-00000001", "checkpoint-00000003", "notes.txt"]
    verify_checkpoint(path.parent / "checkpoint-00000003")
    assert len(names(mirror / "a")) == 5
    clean_up(tmp_path / "absent")


def test_only_what_decides_what_is_learnt_must_be_the_same(configure: Configure) -> None:
    saved = configure().model_dump(mode="json")
    free = configure(
        training__epochs=9, training__patience=2, training__mix_shares=(0.5,), data__num_workers=3,
        checkpoints__save_minutes=1.0, tracking__trackers=("tensorboard",), inference__num_beams=5,
    )  # fmt: skip
    assert config_differences(saved, free) == []
    for key, value in [
        ("training__batch_size", 3), ("training__lora", {"rank": 4}), ("augmentation__enabled", True), ("seed", 1),
        ("model__audio_context", "full"), ("composition__timestamp_prob", 0.5), ("data__max_train", 3),
    ]:  # fmt: skip
        (difference,) = config_differences(saved, configure(**{key: value}))
        assert difference.startswith(key.replace("__", "."))
    renamed = json.loads(json.dumps(saved))
    renamed["training"]["of_an_older_version"] = 1
    assert config_differences(renamed, configure()) == ["training.of_an_older_version: 1 then, None now"]
    older = json.loads(json.dumps(saved))
    del older["data"]["mix"], older["data"]["replay"]  # settings that are newer than the checkpoint
    assert config_differences(older, configure()) == []
    assert len(config_differences(older, configure(data__replay={"share": 0.1}))) == 1
