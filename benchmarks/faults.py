"""The faults of the drill that need no kill: each trains a small model, breaks something, and checks what is left."""

from __future__ import annotations

import contextlib
import logging
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CLIPS, EPOCHS = 24, 3
UPDATES = CLIPS // 2 * EPOCHS  # batches of two
Outcome = tuple[str, str, bool]  # fault, what happened, whether it was survived


def make_stock_model(folder: Path) -> None:
    """Save a Whisper of random weights with tiny.en's tokenizer; its checkpoints take a few MB."""
    import torch
    from transformers import WhisperConfig

    from src.models import WhisperModelManager
    from src.models.dynamic_context import DynamicWhisper
    from src.utils import load_config

    real, processor = WhisperModelManager(load_config(None, overrides={"device": "cpu"})).initialize_model("tiny.en")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = DynamicWhisper(WhisperConfig(**{**real.config.to_dict(), **sizes, **heads}))
    model.generation_config = real.generation_config
    model.generation_config.alignment_heads = [[0, 0]]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_trainer(stock: Path, folder: Path, **checkpoints: Any) -> Any:
    """Return a trainer that writes below a folder."""
    import torch

    from src.data.loader import create_loader
    from src.data.preparation import check_utterance
    from src.data.sources.catalog import load_utterances
    from src.models import WhisperModelManager
    from src.training import WhisperTrainer
    from src.utils import ExperimentLogger, load_config

    torch.set_num_threads(1)
    config = load_config(
        None,
        overrides={
            "device": "cpu",
            "model.variant": str(stock),
            "paths": {"runs_dir": str(folder / "runs"), "checkpoints_dir": str(folder / "checkpoints")},
            "training": {"epochs": EPOCHS, "batch_size": 2, "learning_rate": 1e-3, "full_context_prob": 0.0},
            "inference.max_tokens_per_sec": 2,
            "checkpoints": {"save_minutes": 0, **checkpoints},
        },
    )
    train = [u for u in load_utterances(config.data) if u.meta["split"] == "train"]
    clips = [check_utterance(utterance, config.data) for utterance in train[:: len(train) // CLIPS][:CLIPS]]
    model, processor = WhisperModelManager(config).initialize_model()
    loaders = (create_loader(clips, processor, config, shuffle=True), create_loader(clips[:2], processor, config))
    return WhisperTrainer(model, processor, *loaders, config, experiment=ExperimentLogger(config, run_id="drill"))


@contextlib.contextmanager
def files_up_to(n_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a number of bytes in a block, whichever library writes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disk(stock: Path, folder: Path) -> Outcome:
    """Let no file grow beyond 1 MB from the sixth update on: every write of a checkpoint breaks off in the middle."""
    trainer = make_trainer(stock, folder)
    at, warnings, small_files = count_updates(trainer), Warnings(), contextlib.ExitStack()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(step: int) -> None:
        if step == 6:
            small_files.enter_context(files_up_to(1_000_000))
        if step == 9:
            small_files.close()

    at.append(limit)
    with small_files:
        trainer.train(1)
    failed = warnings.count("no checkpoint was saved")
    whole = [path for path in (folder / "checkpoints" / "drill").iterdir() if is_whole(path)]
    return (
        "disk full during three saves",
        f"{failed} warnings, training went on, {len(whole)} whole at the end",
        (failed == 3 and len(whole) == 2),
    )


def flipped_byte(stock: Path, folder: Path) -> Outcome:
    """Flip one byte in the middle of the newest checkpoint's weights."""
    from src.utils.errors import CheckpointError

    make_trainer(stock, folder).train(1)
    older, newest = sorted((folder / "checkpoints" / "drill").glob("checkpoint-*"))
    file = newest / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    trainer = make_trainer(stock, folder)
    report = trainer.resume("auto")
    try:
        trainer.resume(newest)
        named = False
    except CheckpointError as err:
        named = newest.name in str(err) and "model.safetensors" in str(err)
    refused = [path for path, _ in report.refused] == [newest]
    return (
        "a flipped byte",
        "refused by name; the one before is taken",
        refused and named and report.checkpoint == older,
    )


def vanished_mirror(stock: Path, folder: Path) -> Outcome:
    """Take the mirror away in mid-run and give it back."""
    target = folder / "drive"
    trainer = make_trainer(stock, folder, mirror_dir=str(target))
    gone = folder / "unmounted"

    def unmount(step: int) -> None:
        if step == 4:
            trainer._saver.flush()
            target.rename(gone)
        if step == 8:
            gone.rename(target)

    count_updates(trainer).append(unmount)
    trainer.train(1)
    copies = [path for path in (target / "drill").iterdir() if is_whole(path)]
    return (
        "mirror unmounted for 4 updates",
        f"{len(copies)} whole copies at the end",
        len(copies) == 2,
    )


def full_mirror(stock: Path, folder: Path) -> Outcome:
    """Let the mirror's disk report no free space after its first copies."""
    target = folder / "drive"
    trainer, warnings = make_trainer(stock, folder, mirror_dir=str(target)), Warnings()
    real = shutil.disk_usage

    def fill(step: int) -> None:
        if step == 4:
            trainer._saver.flush()
            usage = real(folder)
            shutil.disk_usage = lambda path: (
                usage._replace(free=0) if target in (Path(path), *Path(path).parents) else real(path)
            )

    count_updates(trainer).append(fill)
    try:
        trainer.train(1)
    finally:
        shutil.disk_usage = real
    copies = [path for path in (target / "drill").iterdir() if is_whole(path)]
    return "mirror full", f"{len(copies)} older whole copies kept, training went on", bool(copies) and warnings.seen


def stalled_mirror(stock: Path, folder: Path) -> Outcome:
    """Let a block of the copy never end."""
    from src.utils import mirror

    trainer = make_trainer(stock, folder, mirror_dir=str(folder / "drive"))
    real = mirror._write_block
    mirror._write_block = lambda writer, block: time.sleep(3600)
    began = time.monotonic()
    try:
        trainer._saver.flush = lambda: trainer._saver._mirror.flush(1.0)
        trainer.train(1)
    finally:
        mirror._write_block = real
    waited = not trainer._saver._mirror.flush(0.1)
    steps = trainer._progress.step
    return (
        "mirror stalls",
        f"{steps} updates in {time.monotonic() - began:.0f} s meanwhile",
        waited and steps == UPDATES // EPOCHS,
    )


def truncating_mirror(stock: Path, folder: Path) -> Outcome:
    """Let the target lose the second half of each block, for a while."""
    from src.utils import mirror

    target = folder / "drive"
    trainer = make_trainer(stock, folder, mirror_dir=str(target))
    real, broken = mirror._write_block, [0]

    def write_half(writer: Any, block: bytes) -> None:
        broken[0] += 1
        real(writer, block[: len(block) // 2] if broken[0] < 6 else block)

    mirror._write_block = write_half
    try:
        trainer.train(1)
    finally:
        mirror._write_block = real
    copies = list((target / "drill").iterdir())
    return "mirror cuts files off", f"{len(copies)} copies, all whole", bool(copies) and all(map(is_whole, copies))


class Warnings(logging.Handler):
    """Collects the library's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("src").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def count(self, text: str) -> int:
        """Return the warnings that hold a text."""
        return sum(text in message for message in self.messages)

    @property
    def seen(self) -> bool:
        """Whether there was one."""
        return bool(self.messages)


def count_updates(trainer: Any) -> list[Callable[[int], None]]:
    """Return a list of functions that are called with the number of each update, before it is saved."""
    listeners: list[Callable[[int], None]] = []

    def called(row: dict[str, Any]) -> None:
        if row["event"] == "train_step":
            for listener in listeners:
                listener(row["step"])

    trainer.experiment.subscribe(called)
    return listeners


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint passes its own check."""
    from src.training.checkpoint import verify_checkpoint
    from src.utils.errors import CheckpointError

    try:
        verify_checkpoint(checkpoint)
    except CheckpointError:
        return False
    return True


FAULTS = (full_disk, flipped_byte, vanished_mirror, full_mirror, stalled_mirror, truncating_mirror)
