"""The attacks of the drill: each tries to do harm in an empty folder, and returns if it could not.

Ctrl-C at any moment has a drill of its own, benchmarks/interrupts.py. To add an attack,
write a function of a folder below, with `@attack`; where it succeeds it raises `BrokenError`, `WeakError`
or an AssertionError. Import what it needs inside of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

MAX_MESSAGE = 10_000  # characters of an error
AttackFunction = Callable[[Path], object]  # or a coroutine function


class Attack(NamedTuple):
    """A function, and how long it may take."""

    call: AttackFunction
    limit_sec: float


class BrokenError(Exception):
    """The attack did harm."""


class WeakError(Exception):
    """It did no lasting harm, and was not answered well."""


FORK = multiprocessing.get_context("fork")
ATTACKS: dict[str, Attack] = {}


def attack(limit_sec: float = 60.0) -> Callable[[AttackFunction], AttackFunction]:
    """Register a function under its name."""

    def register(function: AttackFunction) -> AttackFunction:
        assert function.__name__ not in ATTACKS, function.__name__
        ATTACKS[function.__name__] = Attack(function, limit_sec)
        return function

    return register


def must_refuse(call: Callable[[], object], *names: str, what: str = "it") -> str:
    """Check that a call raises an error of the project, short, that has all names in it; return its text."""
    from src.utils.errors import WhisperASRError

    try:
        returned = call()
    except WhisperASRError as err:
        text = str(err)
    except Exception as err:
        raise BrokenError(f"{what}: {type(err).__name__} of a library: {str(err)[:200]}") from err
    else:
        raise BrokenError(f"{what} was taken: {str(returned)[:200]}")
    if len(text) > MAX_MESSAGE:
        raise WeakError(f"{what}: a message of {len(text)} characters")
    if missing := [name for name in names if name not in text]:
        raise WeakError(f"{what}: the message lacks {missing}: {text[:200]}")
    return text


@contextlib.contextmanager
def stopped_in(work: Callable[[Callable[[], None]], None], *, within_sec: float) -> Iterator[int]:
    """Fork a process that works until it calls its argument; yield its id, and kill it."""
    stopped = FORK.Event()

    def stop() -> None:
        stopped.set()
        time.sleep(3600)

    process = FORK.Process(target=work, args=(stop,))
    process.start()
    assert stopped.wait(within_sec)
    yield process.pid or 0
    process.kill()
    process.join()


# files of others


@attack()
def tar_links(folder: Path) -> None:
    """Write outside with links whose real path is longer than PATH_MAX (CVE-2025-4517), and with simpler ones."""
    from src.data.sources.archives import unpack
    from src.utils.errors import DataError

    def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, to
        return member, b""

    def file(name: str, content: bytes = b"new") -> tuple[tarfile.TarInfo, bytes]:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        return member, content

    long: list[tuple[tarfile.TarInfo, bytes]] = []
    path, part = "", "d" * 247
    for step in "abcdefghijklmnop":
        directory = tarfile.TarInfo(f"{path}{part}")
        directory.type = tarfile.DIRTYPE
        long += [(directory, b""), link(f"{path}{step}", part)]
        path = f"{path}{part}/"
    last = "/".join("abcdefghijklmnop") + "/" + "l" * 254
    long += [link(last, "../" * 16), link("escape", last + "/../../../../")]
    long += [link("flag", "escape/VICTIM", tarfile.LNKTYPE), file("flag"), file("escape/PWNED")]
    victim = folder / "VICTIM"
    tries = {
        "long": long,
        "up": [file("../../VICTIM")],
        "absolute": [file(str(victim))],
        "link": [link("out", str(folder)), file("out/VICTIM")],
        "hard": [link("hard", str(victim), tarfile.LNKTYPE), file("hard")],
    }
    for name, members in tries.items():
        victim.write_text("original")
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for member, content in members:
                archive.addfile(member, io.BytesIO(content))
        before = set(folder.iterdir())
        with contextlib.suppress(DataError):
            unpack(folder / f"{name}.tar")
        new = {each.name for each in set(folder.iterdir()) - before if not each.name.startswith("whisper_asr")}
        if victim.read_text() != "original" or "PWNED" in new:
            raise BrokenError(f"{name}: outside of the folder: {new}, VICTIM = {victim.read_text()!r}")


@attack()
def archive_bombs(folder: Path) -> None:
    """Unpack far more than the archive has, trees without end, and what cannot be read."""
    from src.data.sources.archives import unpack

    def packed(name: str, member: str, content: bytes = b"x", *, flags: int = 0, method: int | None = None) -> Path:
        path = folder / f"{name}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, content)
        data = bytearray(path.read_bytes())
        head, entry = data.find(b"PK\3\4"), data.find(b"PK\1\2")
        data[head + 6] |= flags
        data[entry + 8] |= flags
        if method is not None:
            data[head + 8 : head + 10] = data[entry + 10 : entry + 12] = struct.pack("<H", method)
        path.write_bytes(data)
        return path

    bombs = [
        packed("bomb", "a.wav", bytes(256 << 20)),
        packed("encrypted", "a.wav", flags=1),
        packed("deflate64", "a.wav", method=9),
        packed("deep", "d/" * 2000 + "x"),
    ]
    for path in bombs:
        must_refuse(lambda path=path: unpack(path), path.name, what=path.stem)


@attack()
def flipped_bytes(folder: Path) -> None:
    """Flip a byte of an archive: noticed, or the content is what it was."""
    from src.data.sources.archives import unpack
    from src.utils.errors import DataError

    content, draw = random.Random(0).randbytes(20_000), random.Random(1)
    for kind in ("zip", "tar.gz"):
        whole = folder / f"whole.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(whole, "w") as archive:
                archive.writestr("a/b.bin", content)
        else:
            with tarfile.open(whole, "w:gz") as archive:
                member = tarfile.TarInfo("a/b.bin")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        for number in range(40):
            data = bytearray(whole.read_bytes())
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path = folder / f"{number}.{kind}"
            path.write_bytes(data)
            try:
                found = [each.read_bytes() for each in unpack(path).rglob("*") if each.is_file()]
            except DataError:
                continue
            if found != [content]:
                raise BrokenError(f"{path.name}: other content without an error")


@attack()
def settings_files(folder: Path) -> None:
    """Read YAML that repeats keys, has no end, or no numbers."""
    from src.utils.config import load_config

    names = "abcdefghijk"
    bomb = f"x: &a [{','.join('1' * 9)}]\n"
    bomb += "".join(f"y{i}: &{names[i + 1]} [{','.join(['*' + names[i]] * 9)}]\n" for i in range(8))
    texts = {
        "duplicate key": "training:\n  epochs: 1\n  epochs: 99\n",
        "duplicate section": "training:\n  epochs: 7\ntraining:\n  batch_size: 2\n",
        "inf": "training:\n  learning_rate: .inf\n",
        "nan": "training:\n  learning_rate: .nan\n",
        "huge": f"training:\n  epochs: {10**26}\n",
        "seed": f"seed: {2**63}\n",
        "bomb": bomb + "training:\n  epochs: *i\n",
        "deep": "[" * 5000 + "]" * 5000,
        "profiles": "profiles: {a: hello}\n",
        "a list": "- 1\n",
        "code": "seed: !!python/object/apply:os.system ['touch PWNED']\n",
        "binary": "\0\1\2",
    }
    for what, text in texts.items():
        (folder / "c.yaml").write_text(text)
        must_refuse(lambda: load_config(folder / "c.yaml"), "c.yaml", what=what)
    must_refuse(lambda: load_config(folder), str(folder), what="a folder")
    assert not (folder / "PWNED").exists()


@attack()
def manifests_of_others(folder: Path) -> None:
    """List files that are pipes, deep JSON, endless numbers, names and texts that no file can have."""
    from src.data.audio import decode
    from src.data.sources.catalog import read_folder

    os.mkfifo(folder / "pipe.wav")
    must_refuse(lambda: decode(folder / "pipe.wav"), "pipe.wav", what="a pipe")
    rows = {
        "deep": '{"file":"a.wav","text":' + "[" * 100_000 + "]" * 100_000 + "}",
        "number": '{"file":"a.wav","text":' + "9" * 5000 + "}",
        "name": json.dumps({"file": "n" * 5000 + ".wav", "text": "hi"}),
        "outside": json.dumps({"file": "\0.wav", "text": "hi"}),
    }
    for what, row in rows.items():
        place = folder / what
        place.mkdir()
        (place / "metadata.jsonl").write_text(row + "\n")
        must_refuse(lambda place=place: [decode(each.audio, name=each.id) for each in read_folder(place)], what=what)


@attack()
def texts_of_others(folder: Path) -> None:
    """Write and read texts with every separator that Unicode has, surrogates, formulas and markup."""
    from types import SimpleNamespace

    from src.evaluation.evaluator import EvaluationResult, Prediction
    from src.evaluation.report.run_files import load_predictions

    texts = ["a\u2028b", "a\u2029b", "a\x85b", "a\x1cb", "a\rb", "a\nb", "=1+1", "<script>", "\ud800", "a\0b"]
    counts = {"substitutions": 0, "deletions": 0, "insertions": 0, "reference_words": 2}
    said: dict[str, Any] = {"speaker": None, "duration_sec": 1.0, "avg_logprob": -0.1, "latency_sec": 0.1}
    rows = tuple(
        Prediction(id=f"u{i}", reference=each, hypothesis=each, **counts, **said) for i, each in enumerate(texts)
    )
    result: Any = SimpleNamespace(name="tuned", rows=rows)
    for _ in range(2):
        EvaluationResult.write_predictions(result, folder / "predictions.jsonl")
    read = load_predictions(folder)["tuned"]
    assert [row.reference for row in read] == texts, "texts came back changed"


# weights, checkpoints, runs


@attack(limit_sec=120.0)
def weights_of_others(folder: Path) -> None:
    """Load a folder whose weights are of something else, damaged, or absurd."""
    import torch
    from safetensors.torch import load_file, save_file

    from benchmarks.faults import make_stock_model
    from src.models import WhisperModelManager
    from src.utils.config import load_config

    stock = folder / "stock"
    make_stock_model(stock)
    weights, config = load_file(stock / "model.safetensors"), json.loads((stock / "config.json").read_text())
    name = next(iter(weights))

    def load() -> str:
        settings = load_config(None, overrides={"model.variant": str(stock), "device": "cpu"})
        WhisperModelManager(settings).initialize_model()
        return "loaded"

    assert load() == "loaded"
    file, kept = stock / "model.safetensors", (stock / "model.safetensors").read_bytes()
    tries: dict[str, Callable[[], object]] = {
        "other tensors": lambda: save_file({"foo": torch.zeros(1)}, file),
        "a missing tensor": lambda: save_file({k: v for k, v in weights.items() if k != name}, file),
        "another shape": lambda: save_file({**weights, name: torch.zeros(3)}, file),
        "NaN": lambda: save_file({**weights, name: torch.full_like(weights[name], float("nan"))}, file),
        "an empty file": lambda: file.write_bytes(b""),
        "a cut file": lambda: file.write_bytes(kept[: len(kept) // 2]),
        "a huge header": lambda: file.write_bytes(struct.pack("<Q", 1 << 62) + kept[8:]),
    }
    for what, damage in tries.items():
        damage()
        must_refuse(load, str(stock), what=what)
        file.write_bytes(kept)
    for key, value in (("d_model", 1 << 40), ("decoder_layers", 1 << 30), ("vocab_size", -1), ("num_mel_bins", "x")):
        (stock / "config.json").write_text(json.dumps(config | {key: value}))
        must_refuse(load, str(stock), what=f"{key} {value}")
    (stock / "config.json").write_text(json.dumps(config))
    assert load() == "loaded"


def _state(saved_at: float, **weights: Any) -> Any:
    from src.training.checkpoint import TrainingState

    return TrainingState({"model": weights, "optimizer": {}, "rng": {}}, {"saved_at": saved_at})


def _checkpoints(folder: Path) -> list[Path]:
    import torch

    from src.training.checkpoint import CheckpointStore

    store = CheckpointStore(folder / "run", save_total_limit=2)
    return [store.save(_state(float(step), a=torch.zeros(2)), step) for step in (1, 2)]


@attack()
def tampered_checkpoints(folder: Path) -> None:
    """Damage the newest checkpoint, also with files that never end: the one before is taken."""
    import shutil

    from src.training.checkpoint import find_checkpoint, verify_checkpoint

    older, newest = _checkpoints(folder)
    kept = folder / "kept"
    shutil.copytree(newest, kept)
    manifest = json.loads((newest / "manifest.json").read_text())

    def listing(**files: Any) -> str:
        return json.dumps({"files": {**manifest["files"], **files}})

    device, outside = {"/dev/zero": {"size": 0, "sha256": "x"}}, {"../../../etc/passwd": {"size": 1, "sha256": "x"}}
    tries: dict[str, Callable[[], object]] = {
        "state is a list": lambda: (newest / "state.json").write_text("[]"),
        "state is deep": lambda: (newest / "state.json").write_text("[" * 100_000),
        "manifest names a device": lambda: (newest / "manifest.json").write_text(listing(**device)),
        "manifest names another folder": lambda: (newest / "manifest.json").write_text(listing(**outside)),
        "manifest is a number": lambda: (newest / "manifest.json").write_text("7"),
        "manifest lists texts": lambda: (newest / "manifest.json").write_text('{"files": {"state.json": "x"}}'),
        "manifest is a pipe": lambda: ((newest / "manifest.json").unlink(), os.mkfifo(newest / "manifest.json")),
        "state is a pipe": lambda: ((newest / "state.json").unlink(), os.mkfifo(newest / "state.json")),
        "weights are a device": lambda: (
            (newest / "model.safetensors").unlink(), (newest / "model.safetensors").symlink_to("/dev/zero")
        ),
        "weights are cut": lambda: (newest / "model.safetensors").write_bytes(b"x"),
    }  # fmt: skip
    for what, damage in tries.items():
        damage()
        must_refuse(lambda: verify_checkpoint(newest), newest.name, what=what)
        if find_checkpoint([folder], None).checkpoint != older:
            raise BrokenError(f"{what}: the checkpoint before it was not taken")
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)


@attack()
def run_names(folder: Path) -> None:
    """Begin runs whose id is a path, or is taken by another process."""
    from src.utils.config import load_config
    from src.utils.tracking import ExperimentLogger

    config = load_config(None, overrides={"paths.runs_dir": str(folder / "runs")})
    for run_id in ("../escaped", "/tmp/escaped", "a/b", "..", ".", "a\nb", "n" * 300, "a\0b"):
        must_refuse(lambda run_id=run_id: ExperimentLogger(config, run_id=run_id), what=f"run id {run_id[:20]!r}")
    assert not list(folder.glob("escaped*"))
    taken = ExperimentLogger(config, run_id="taken")
    child = os.fork()
    if child == 0:
        try:
            must_refuse(lambda: ExperimentLogger(config, run_id="taken"), what="a second writer")
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the parent says it
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        raise BrokenError("two processes write into one run")
    taken.close()


# clocks, other processes, full disks, Ctrl-C


@attack()
def clock_set_back(folder: Path) -> None:
    """Save checkpoints while the clock goes back by an hour."""
    from src.training.checkpoint import CheckpointStore, find_checkpoint, list_checkpoints

    store = CheckpointStore(folder / "run", save_total_limit=2)
    for step, now in ((10, 5000.0), (20, 5060.0), (30, 1500.0), (40, 1560.0)):
        path = store.save(_state(now), step)
        os.utime(path / "manifest.json", (now, now))
    kept = [int(path.name[-8:]) for path in list_checkpoints(store.folder)]
    if kept != [30, 40] or find_checkpoint([folder], None).checkpoint != path:
        raise BrokenError(f"kept {kept}, would resume from {find_checkpoint([folder], None).checkpoint}")


@attack()
def secrets_and_places(folder: Path) -> None:
    """Look for a token and for the places of files in what a run and a data report tell others."""
    from src.data import prepare_datasets
    from src.data.report.report import build_data_report
    from src.data.sources.catalog import SAMPLE_CLIP
    from src.utils import ExperimentLogger, load_config

    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        os.environ[name] = "hf_secretsecretsecretsecret"
    data = folder / "data"
    data.mkdir()
    rows = [{"file": f"{i}.flac", "text": f"clip {i}"} for i in range(24)]
    for row in rows[1:]:
        (data / row["file"]).write_bytes(SAMPLE_CLIP.read_bytes())
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {f"paths.{name}_dir": str(folder / name) for name in ("runs", "cache")}
    options = {"data.source": "folder", "data.path": str(data), "data.on_error": "skip", "device": "cpu"}
    config = load_config(None, overrides={**paths, **options, "data.max_skip_fraction": 0.5})
    report = build_data_report(prepare_datasets(config), config)
    assert report.skipped, "the absent clip was not skipped"
    with ExperimentLogger(config) as experiment:
        report.save(experiment.dir)
    told = {path.name: path.read_text() for path in experiment.dir.glob("*.*")} | {"html": report._repr_html_()}
    for name, text in told.items():
        if "secretsecret" in text:
            raise BrokenError(f"{name} has a token")
        if str(folder) in text and name != "config.yaml":
            raise BrokenError(f"{name} has the place of a file")


@attack()
def second_writer(folder: Path) -> None:
    """Write a run and checkpoints that another process writes, then kill that process."""
    from src.training.checkpoint import CheckpointStore
    from src.utils import ExperimentLogger, load_config

    config = load_config(None, overrides={"paths.runs_dir": str(folder / "runs")})

    def write() -> tuple[ExperimentLogger, CheckpointStore]:
        experiment = ExperimentLogger(config, run_id="same")
        store = CheckpointStore(folder / "checkpoints", save_total_limit=2)
        store.save(_state(0.0), 1)
        return experiment, store

    def write_and_stop(stop: Callable[[], None]) -> None:
        held = write()
        stop()
        del held

    with stopped_in(write_and_stop, within_sec=30) as pid:
        must_refuse(lambda: ExperimentLogger(config, run_id="same"), "same", str(pid), what="a run in use")
        store = CheckpointStore(folder / "checkpoints", save_total_limit=2)
        must_refuse(lambda: store.save(_state(0.0), 2), "checkpoints", str(pid), what="a folder of checkpoints in use")
    write()[0].close()


@attack()
def killed_conversion(folder: Path) -> None:
    """Kill a process inside of a conversion, then convert."""
    from src.models import weights

    def convert_and_stop(stop: Callable[[], None]) -> None:
        convert = weights._convert

        def convert_alone(*given: Path) -> None:
            convert(*given)
            stop()

        weights._convert = convert_alone
        weights.resolve_weights("tiny.en", cache_dir=folder)

    with stopped_in(convert_and_stop, within_sec=50):
        pass
    found = weights.resolve_weights("tiny.en", cache_dir=folder).path
    if left := [path.name for path in found.parent.iterdir() if path != found]:
        raise WeakError(f"left {left}")


@attack(limit_sec=120.0)
def full_disk(folder: Path) -> None:
    """Let every writer replace an older version on a disk with a few free bytes; benchmarks/full_disk.py has more."""
    from benchmarks.full_disk import fill_disks

    if problems := fill_disks(folder, steps=3):
        raise BrokenError("; ".join(problems)[:1000])


@attack(limit_sec=120.0)
def ctrl_c(folder: Path) -> None:
    """Interrupt saving and converting at random moments."""
    import random

    from benchmarks.interrupts import interrupt_all

    if problems := interrupt_all(folder, 3, random.Random(), only=("save", "convert")):
        raise BrokenError("; ".join(problems)[:1000])
