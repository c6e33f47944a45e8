from __future__ import annotations

import logging
import mmap
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from src.data.audio_cache import AudioCache
from src.data.sources.catalog import SAMPLE_CLIP
from src.utils.config import Config, load_config
from src.utils.errors import WhisperASRError
from src.utils.files import atomic_folder
from src.utils.resources import (
    check_disk,
    check_kept,
    clean_up,
    find_leftovers,
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


def test_a_step_is_logged_before_and_after_also_where_it_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "src.utils.resources")
    with pytest.raises(ValueError, match="half"), watch_resources("training", folder=tmp_path / "new") as before:
        # Pages of its own from the kernel: an array may lie in memory that the process has freed and still holds.
        kept = mmap.mmap(-1, 200_000_000)
        kept.write(bytes(1_000_000) * 200)
        raise ValueError("half-way")
    kept.close()
    assert before.process_mb > 10
    first, last = caplog.messages
    assert first.startswith("training: before: process ")
    assert last.startswith("training: after: process ")
    assert int(re.match(r"[^(]*\(([+-]\d+)\)", last)[1]) > 100


def test_what_cannot_fit_on_the_disk_is_refused_and_what_hardly_fits_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000_000))
    with (
        pytest.raises(
            WhisperASRError, match=r"export: .* 3000 MB are needed on the disk, 2000 MB are free; .*clean_up"
        ),
        watch_resources("export", folder=tmp_path, needs_disk_mb=3_000),
    ):
        raise AssertionError("it began")
    with watch_resources("export", folder=tmp_path, needs_disk_mb=1_900, needs_mb=1e9):
        pass
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "almost full" in warnings[0]
    assert "1000000000 MB of memory" in warnings[1]
    assert check_disk("disk", tmp_path / "a" / "b", 2_500).status == "warning"
    assert check_disk("disk", tmp_path / "a" / "b", 1_500).status == "ok"


def test_a_dry_run_lists_and_only_what_was_listed_goes(config: Config) -> None:
    cache = AudioCache(config.paths.cache_dir / "audio")
    cache.load_audio(SAMPLE_CLIP)
    write(cache.folder / "ab" / "my song.flac")
    half = write(config.paths.runs_dir / "run" / f".report.html.{DEAD}.0a1b.partial")
    (config.paths.checkpoints_dir / "run" / ".checkpoint-00000003.removed").mkdir(parents=True)
    old = write(config.paths.checkpoints_dir / "run" / "checkpoint-00000004" / "model.safetensors").parent
    weights = write(config.paths.cache_dir / "weights" / "base" / "model.safetensors")

    listed = clean_up(config, checkpoints=[old])
    assert not listed.done
    assert half.exists()
    assert {item.kind for item in listed.items} == {"decoded audio", "left-over", "checkpoint"}
    assert listed.mb == pytest.approx(2 + cache.size_bytes() / 1e6)
    assert "nothing was removed yet" in listed.to_text()
    assert by_name(config)["left-overs"].found == "2 of killed processes, 1 MB"

    assert clean_up(config, dry_run=False, checkpoints=[old]).done
    left = {path.name for path in config.paths.runs_dir.parent.rglob("*") if path.is_file()}
    assert left == {"my song.flac", weights.name}
    assert clean_up(config).to_text() == "nothing to clean up"


def by_name(config: Config) -> dict[str, Any]:
    return {check.name: check for check in check_kept(config)}


def test_what_is_being_written_or_the_last_copy_stays(config: Config) -> None:
    folder = config.paths.checkpoints_dir
    last_copy = write(folder / f".best_model_hf.{DEAD}.0a1b.replaced" / "model.safetensors")
    with atomic_folder(folder / "export") as partial:
        write(partial / "model.bin")
        assert not clean_up(config, dry_run=False).items
    assert last_copy.exists()
    write(folder / "best_model_hf" / "model.safetensors")  # its successor is here
    assert [item.place for item in find_leftovers(config)] == [last_copy.parent]


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
        with pytest.raises(WhisperASRError, match="a link, or not below"):
            clean_up(config, dry_run=False, checkpoints=[path])
    assert all(path.exists() for path in outside)


def test_a_run_of_known_size_takes_known_memory_and_disk() -> None:
    assert run_memory_mb(10e6, trained=10e6) == 160  # four copies in float32
    assert run_memory_mb(10e6, trained=1e6) == 52
    assert run_disk_mb(10e6, trained=10e6, kept=2) == 480  # three checkpoints of 120 MB, three models of 40 MB
    assert run_disk_mb(10e6, trained=1e6, kept=1, optimizer="adamw_8bit") == 132
