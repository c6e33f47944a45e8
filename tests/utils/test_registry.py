from __future__ import annotations

import json
import logging
import math
import multiprocessing
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.utils.errors import DataError, ModelError
from src.utils.registry import ModelRegistry
from src.utils.versioning import get_git_revision

WRITERS, EACH = 4, 12
can_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="a fresh process imports for seconds"
)


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(tmp_path / "models")


def register(registry: ModelRegistry, model_id: str, **metrics: Any) -> None:
    registry.register_model(model_id=model_id, metrics=metrics, git_revision=None)


def test_registered_model_is_read_again_with_its_links(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    model = ModelRegistry(tmp_path).register_model(
        model_id="tiny-naïve",
        metrics={"wer": 0.25, "clips": 12},
        git_revision=get_git_revision(),
        run=Path("runs/20260101-120000"),
        data_version="calls 2026-01",
        checkpoint="runs/20260101-120000/checkpoints/step_40",
        base_model="tiny.en",
        notes="first",
    )
    assert ModelRegistry(str(tmp_path)).list_models() == [model]
    assert (model.run, model.checkpoint) == (
        str(Path("runs/20260101-120000")),
        "runs/20260101-120000/checkpoints/step_40",
    )
    assert before <= datetime.fromisoformat(model.created) <= datetime.now(UTC)
    assert datetime.fromisoformat(model.created).tzinfo == UTC
    assert "naïve" in (tmp_path / "registry.json").read_text(encoding="utf-8")


def test_path_may_be_a_json_file(tmp_path: Path) -> None:
    register(ModelRegistry(tmp_path / "deep" / "own.json"), "a", wer=0.1)
    assert json.loads((tmp_path / "deep" / "own.json").read_text())["models"][0]["model_id"] == "a"


def test_same_name_again_is_a_new_version_and_the_old_stays(registry: ModelRegistry) -> None:
    for wer in (0.3, 0.4):
        register(registry, "a", wer=wer)
    register(registry, "b", wer=0.5)
    assert [(m.model_id, m.version) for m in registry.list_models()] == [("a", 1), ("a", 2), ("b", 1)]
    assert registry.get("a").metrics == {"wer": 0.4}
    assert registry.get("a", 1).metrics == {"wer": 0.3}


def test_best_is_the_lowest_or_the_highest_and_the_first_of_equals(registry: ModelRegistry) -> None:
    register(registry, "middle", wer=0.2, rate=3.0)
    register(registry, "low", wer=0.1, rate=1.0)
    register(registry, "low", wer=0.1, rate=9.0)
    assert (registry.best().model_id, registry.best().version) == ("low", 1)
    assert registry.best("rate", lower_is_better=False).version == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, np.float32("nan")])
def test_value_that_is_not_finite_is_kept_as_missing_and_never_wins(
    registry: ModelRegistry, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        register(registry, "odd", wer=value)
    assert "odd: metric wer" in caplog.text
    assert registry.get("odd").metrics == {"wer": None}
    with pytest.raises(ModelError, match="none of 1 models has the metric 'wer'"):
        registry.best()
    register(registry, "fine", wer=0.9)
    assert registry.best().model_id == "fine"
    assert registry.best(lower_is_better=False).model_id == "fine"


def test_numpy_numbers_are_numbers(registry: ModelRegistry) -> None:
    register(registry, "a", wer=np.float32(0.5), clips=np.int64(3))
    assert registry.best().metrics == {"wer": 0.5, "clips": 3.0}


@pytest.mark.parametrize("value", ["0.1", True, [0.1, 0.2], {}])
def test_metric_that_is_no_number_is_refused(registry: ModelRegistry, value: Any) -> None:
    with pytest.raises(ModelError, match=r"a: metric 'wer' is .*, expected a name and one number"):
        register(registry, "a", wer=value)
    assert registry.list_models() == []


def test_model_without_a_name_is_refused(registry: ModelRegistry) -> None:
    with pytest.raises(ModelError, match="model_id is empty"):
        register(registry, " ")


def test_unknown_names_are_answered_with_the_nearest(registry: ModelRegistry) -> None:
    register(registry, "tiny-calls", wer=0.1)
    with pytest.raises(ModelError, match=r"tiny-cals: no such model in .*did you mean 'tiny-calls'"):
        registry.get("tiny-cals")
    with pytest.raises(ModelError, match=r"tiny-calls: no version 3 in .*there are 1"):
        registry.get("tiny-calls", 3)
    with pytest.raises(ModelError, match="metric 'wr'; did you mean 'wer'"):
        registry.best("wr")


def test_empty_registry_says_so_and_makes_no_file(registry: ModelRegistry) -> None:
    assert registry.list_models() == []
    assert registry.to_frame().empty
    with pytest.raises(ModelError, match="none of 0 models"):
        registry.best()
    assert not registry.file.parent.exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1, "models": [{"model_id": "a"}]}',
        '{"format": 2, "models": []}',
        '{"format": 1}',
        '{"format": 1, "models": [{"model_id": "a", "version": 1, "created": "", "git_revision": "", "metrics": []}]}',
        '{"format": 1, "models": [{"model_id": "a", "version": 1, "created": "", "git_revision": null, "metrics": '
        '{"wer": NaN}}]}',
    ],
)
def test_damaged_file_is_named_and_stays(registry: ModelRegistry, content: str) -> None:
    registry.file.parent.mkdir()
    registry.file.write_text(content)
    for use in (lambda: register(registry, "b", wer=0.1), registry.best, registry.to_frame):
        with pytest.raises(DataError, match=r"registry.json: not a model registry .*move it away"):
            use()
    assert registry.file.read_text() == content


def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"registry.json: cannot be locked for writing"):
        register(ModelRegistry(tmp_path / "file"), "a", wer=0.1)


def test_table_has_one_row_a_version_and_one_column_a_metric(registry: ModelRegistry) -> None:
    register(registry, "a", wer=0.2, version=7.0)
    register(registry, "b", cer=0.1)
    frame = registry.to_frame()
    assert list(frame["model_id"]) == ["a", "b"]
    assert list(frame.columns[-3:]) == ["wer", "metrics.version", "cer"]
    assert frame["version"].tolist() == [1, 1]
    assert frame["wer"].isna().tolist() == [False, True]
    assert frame.sort_values("cer").iloc[0]["model_id"] == "b"


def register_many(path: Path, writer: int) -> None:
    for i in range(EACH):
        registry = ModelRegistry(path)
        register(registry, "shared", wer=writer + i / 100)
        register(registry, f"own{writer}", wer=float(i))


def assert_nothing_lost(registry: ModelRegistry) -> None:
    models = registry.list_models()
    assert len(models) == 2 * WRITERS * EACH
    shared = [m for m in models if m.model_id == "shared"]
    assert [m.version for m in shared] == list(range(1, WRITERS * EACH + 1))
    assert {m.metrics["wer"] for m in shared} == {w + i / 100 for w in range(WRITERS) for i in range(EACH)}
    for writer in range(WRITERS):
        own = [m for m in models if m.model_id == f"own{writer}"]
        assert [(m.version, m.metrics["wer"]) for m in own] == [(i + 1, float(i)) for i in range(EACH)]


@can_fork
def test_concurrent_processes_lose_nothing(registry: ModelRegistry) -> None:
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=register_many, args=(registry.file, writer)) for writer in range(WRITERS)]
    for process in writers:
        process.start()
    while any(process.is_alive() for process in writers):
        registry.list_models()  # a reader always finds a whole file
        time.sleep(0.005)
    for process in writers:
        process.join()
    assert [process.exitcode for process in writers] == [0] * WRITERS
    assert_nothing_lost(registry)


def test_concurrent_threads_lose_nothing(registry: ModelRegistry) -> None:
    writers = [threading.Thread(target=register_many, args=(registry.file, writer)) for writer in range(WRITERS)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert_nothing_lost(registry)


@can_fork
def test_killed_writer_leaves_a_whole_file_and_no_lock(registry: ModelRegistry) -> None:
    register(registry, "first", wer=0.0)
    for i in range(5):
        process = multiprocessing.get_context("fork").Process(target=register_many, args=(registry.file, i))
        process.start()
        time.sleep(0.01 + 0.02 * i)
        process.kill()
        process.join()
        before = registry.list_models()
        register(registry, "after", wer=0.0)
        assert registry.list_models()[:-1] == before
        assert registry.get("after").version == i + 1
