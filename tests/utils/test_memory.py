from __future__ import annotations

import gc
import logging
import mmap
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from src.data.audio import AudioCache
from src.data.sources.catalog import SAMPLE_CLIP
from src.utils.config import Config, load_config
from src.utils.errors import WhisperASRError
from src.utils.files import atomic_folder
from src.utils.memory import (
    MemoryUse,
    clean_up,
    find_unfinished,
    measure_memory,
    run_disk_mb,
    run_memory_mb,
    size_mb,
    watch_resources,
)

DEAD = 2**22 + 1  # above the largest process id of Linux


@pytest.fixture
def config(tmp_path: Path) -> Config:
    names = ("runs_dir", "checkpoints_dir", "cache_dir")
    for name in names:
        (tmp_path / name).mkdir()
    return load_config(None, overrides={"paths": {name: str(tmp_path / name) for name in names}})


def write(path: Path, size: int = 1_000_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path


def test_allocated_memory_shows_and_a_cpu_has_no_memory_of_its_own(tmp_path: Path) -> None:
    gc.collect()  # what other tests left would be freed in between
    before = measure_memory(tmp_path, torch.device("cpu"))
    taken = np.ones(300_000_000, dtype=np.uint8)  # 300 MB
    after = measure_memory(tmp_path)
    assert 200 < after.process_mb - before.process_mb < 350
    assert after.system_available_mb > 0 and after.disk_free_mb > 0
    assert taken[-1] == 1
    assert (before.gpu_mb, before.gpu_peak_mb) == (None, None)
    assert MemoryUse(10.4, 5.0, 3.6, 4.0, 7.0).fields() == {"memory_mb": 10, "gpu_memory_mb": 4, "disk_free_mb": 7}


@pytest.mark.gpu
def test_tensors_on_the_gpu_show(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = measure_memory(tmp_path, "cuda").gpu_mb
    tensor = torch.ones(50_000_000, dtype=torch.uint8, device="cuda")
    after = measure_memory(tmp_path, tensor.device)
    assert before is not None and after.gpu_mb is not None and after.gpu_peak_mb is not None
    assert 50 <= after.gpu_mb - before < 55
    assert after.gpu_peak_mb >= after.gpu_mb


def test_a_step_is_logged_before_and_after_even_if_it_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "src.utils.memory")
    with pytest.raises(ValueError, match="half"), watch_resources("training", folder=tmp_path / "new") as before:
        # Pages of its own from the kernel: an array may lie in memory that the process has freed and still holds.
        kept = mmap.mmap(-1, 200_000_000)
        kept.write(bytes(1_000_000) * 200)
        raise ValueError("half-way")
    kept.close()
    assert before.process_mb > 10
    first, last = caplog.messages
    assert first.startswith("training: before: ")
    assert int(re.match(r"training: after: process [^(]*\(([+-]\d+)\)", last)[1]) > 100


def test_a_dry_run_lists_and_only_what_was_listed_is_removed(config: Config) -> None:
    cache = AudioCache(config.paths.cache_dir / "audio")
    cache.load_audio(SAMPLE_CLIP)
    [decoded] = cache.folder.glob("*/*.flac")
    write(cache.folder / "ab" / "my song.flac")
    half = write(config.paths.runs_dir / "run" / f".report.html.{DEAD}.0a1b.partial")
    (config.paths.checkpoints_dir / "run" / f".checkpoint-00000003.{DEAD}.0a1b.partial").mkdir(parents=True)
    old = write(config.paths.checkpoints_dir / "run" / "checkpoint-00000004" / "model.safetensors").parent
    weights = write(config.paths.cache_dir / "weights" / "base" / "model.safetensors")

    listed = clean_up(config, checkpoints=[old])
    assert not listed.done
    assert half.exists()
    assert {item.kind for item in listed.items} == {"decoded audio", "unfinished", "checkpoint"}
    assert listed.mb == pytest.approx(2 + decoded.stat().st_size / 1e6)
    assert len(find_unfinished(config)) == 2
    assert len(listed.to_text().splitlines()) == 1 + len(listed.items)

    assert clean_up(config, dry_run=False, checkpoints=[old]).done
    left = {path.name for path in config.paths.runs_dir.parent.rglob("*") if path.is_file()}
    assert left == {"my song.flac", weights.name}
    assert clean_up(config).items == ()


def test_a_folder_being_written_or_the_last_copy_stays(config: Config) -> None:
    folder = config.paths.checkpoints_dir
    last_copy = write(folder / f".best_model_hf.{DEAD}.0a1b.replaced" / "model.safetensors")
    with atomic_folder(folder / "export") as partial:
        write(partial / "model.bin")
        assert not clean_up(config, dry_run=False).items
    assert last_copy.exists()
    write(folder / "best_model_hf" / "model.safetensors")  # its successor exists
    assert [item.place for item in find_unfinished(config)] == [last_copy.parent]


def test_links_are_never_followed_and_the_folders_never_left(config: Config, tmp_path: Path) -> None:
    name = f"{'ab' * 32}.flac"
    outside = [write(tmp_path / "elsewhere" / "ab" / name), write(tmp_path / "elsewhere" / f".x.{DEAD}.0a.partial")]
    (config.paths.cache_dir / "audio").symlink_to(tmp_path / "elsewhere")
    (config.paths.runs_dir / "linked").symlink_to(tmp_path / "elsewhere")
    (config.paths.runs_dir / f".y.{DEAD}.0a.partial").symlink_to(outside[0])
    assert not clean_up(config, dry_run=False).items
    assert size_mb(config.paths.runs_dir) == 0
    checkpoint = config.paths.checkpoints_dir / "checkpoint-00000001"
    checkpoint.symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere", checkpoint, checkpoint / "ab", config.paths.checkpoints_dir / ".." / "x"):
        with pytest.raises(WhisperASRError, match=re.escape(str(path))):
            clean_up(config, dry_run=False, checkpoints=[path])
    assert all(path.exists() for path in outside)


def test_a_run_of_known_size_takes_known_memory_and_disk() -> None:
    assert run_memory_mb(10e6, trained=10e6) == 160  # four copies in float32
    assert run_memory_mb(10e6, trained=1e6) == 52
    assert run_memory_mb(10e6, trained=1e6, half_copy=True) == 74
    assert run_disk_mb(10e6, trained=10e6, kept=2) == 480  # three checkpoints of 120 MB, three models of 40 MB
    assert run_disk_mb(10e6, trained=1e6, kept=1, optimizer="adamw_8bit") == 132
