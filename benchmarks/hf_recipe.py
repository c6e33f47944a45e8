"""The peer of benchmarks/training.py: Hugging Face's fine-tuning guide for Whisper, on transformers 5.

Kept as the guide has it (https://huggingface.co/blog/fine-tune-whisper): features padded to 30 s and stored by
`datasets.map`, labels by `tokenizer(text)` without a leading space, the guide's collator with its later fix of the
start token, `Seq2SeqTrainer` with its own optimizer settings, order and clipping. Adapted: names of arguments that
transformers 5 changed; audio decoded by soundfile and soxr, since `datasets` needs FFmpeg; no gradient checkpointing,
and as many warm-up updates as the other side. Nothing of this library is imported, so that time and memory are those of
the recipe alone.
"""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import soxr
import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

LOGGING_UPDATES = 25  # as the guide
SAMPLE_RATE = 16_000
IGNORE_INDEX = -100


@dataclass(frozen=True)
class RecipeOptions:
    """What both sides share.

    Attributes:
        planned_updates: over which the learning rate falls to zero.
        stop_after: updates to do of these.
        precision: "float32", or what mixed precision computes in.
        workers: processes that read the features; 0 in the guide.
        save_updates: updates between two checkpoints, from which a stopped run continues; None saves none.
    """

    batch_size: int
    learning_rate: float
    warmup_updates: int
    planned_updates: int
    stop_after: int
    precision: str
    device: str
    seed: int
    workers: int = 0
    save_updates: int | None = None


def prepare_features(clips: Path, processor: Any, cache_dir: Path) -> tuple[Any, float, int]:
    """Store features and labels of every clip.

    Args:
        clips: Parquet with columns `audio` (bytes) and `text`.
    Returns: the data set, the seconds that it took, and the bytes stored.
    """
    from datasets import Audio, load_dataset

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32", always_2d=True)
        samples = soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE)
        features = processor.feature_extractor(samples, sampling_rate=SAMPLE_RATE).input_features[0]
        return {"input_features": features, "labels": processor.tokenizer(row["text"]).input_ids}

    began = time.perf_counter()
    dataset = load_dataset("parquet", data_files=str(clips), split="train", cache_dir=str(cache_dir))
    dataset = dataset.cast_column("audio", Audio(decode=False))
    prepared = dataset.map(prepare, remove_columns=dataset.column_names)
    seconds = time.perf_counter() - began
    stored = sum(Path(file["filename"]).stat().st_size for file in prepared.cache_files)
    return prepared, seconds, stored


@dataclass
class DataCollatorSpeechSeq2SeqWithPadding:
    """The guide's collator."""

    processor: Any
    decoder_start_token_id: int

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Return a batch with `input_features` (B, mels, 3000) and `labels` (B, L), -100 where padded."""
        batch = self.processor.feature_extractor.pad(
            [{"input_features": feature["input_features"]} for feature in features], return_tensors="pt"
        )
        padded = self.processor.tokenizer.pad(
            [{"input_ids": feature["labels"]} for feature in features], return_tensors="pt"
        )
        labels = padded["input_ids"].masked_fill(padded.attention_mask.ne(1), IGNORE_INDEX)
        # the model puts the start token before the labels itself
        if bool((labels[:, 0] == self.decoder_start_token_id).all()):
            labels = labels[:, 1:]
        batch["labels"] = labels
        return batch


class _Recorder(TrainerCallback):  # type: ignore[misc]
    """Appends the seconds of each update, including loading but not saving, to a file; ends the run when asked."""

    def __init__(self, rows: Path, stop_after: int) -> None:
        self._rows = rows
        self._stop_after = stop_after
        self._since = _now()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._since = _now()

    def on_save(self, *_: Any, **__: Any) -> None:
        self._since = _now()

    def on_step_end(self, _: TrainingArguments, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        now = _now()  # the trainer has looked at the loss, so a GPU has done the update
        wall, cpu = (after - before for after, before in zip(now, self._since, strict=True))
        with self._rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "sec": wall, "cpu_sec": cpu}) + "\n")
        self._since = now
        if state.global_step >= self._stop_after:
            control.should_training_stop = True


def fine_tune(model: Any, processor: Any, dataset: Any, options: RecipeOptions, folder: Path) -> list[dict[str, Any]]:
    """Train in place; continue from the last checkpoint in `folder`, if there is one.

    Args:
        model: stock `WhisperForConditionalGeneration` in float32.
        dataset: from `prepare_features`.
    Returns: one row per update: `step`, `sec`, and processor time `cpu_sec`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "updates.jsonl"
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_updates,
        max_steps=options.planned_updates,
        bf16=options.precision == "bfloat16",
        fp16=options.precision == "float16",
        use_cpu=options.device == "cpu",
        seed=options.seed,
        dataloader_num_workers=options.workers,
        save_strategy="no" if options.save_updates is None else "steps",
        save_steps=options.save_updates or options.planned_updates,
        save_total_limit=1,
        logging_steps=LOGGING_UPDATES,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=DataCollatorSpeechSeq2SeqWithPadding(processor, model.config.decoder_start_token_id),
        processing_class=processor.feature_extractor,
        callbacks=[_Recorder(rows, options.stop_after)],
    )
    stopped = any(folder.glob("checkpoint-*"))
    if not stopped:
        rows.unlink(missing_ok=True)
    trainer.train(resume_from_checkpoint=stopped)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    # of an update that was done again after a stop, the last row counts
    by_step = {row["step"]: row for row in map(json.loads, rows.read_bytes().splitlines())}
    return [by_step[step] for step in sorted(by_step)]


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
