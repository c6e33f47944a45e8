"""Check of an export: five clips, transcribed greedily by the source and by the exported model.

One check for every format. The clips are short and bundled, so that it costs seconds on a CPU: a broken export changes
most of their words, a sound quantised one few of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import jiwer
import torch
from torch import Tensor
from transformers import logging as transformers_logging

from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.features import CONTEXT_SAMPLES, LogMel, padded_samples
from src.data.sources.catalog import SAMPLE_PARQUET
from src.data.sources.parquet import read_parquet
from src.models.dynamic_context import DynamicWhisper, evaluation_mode
from src.utils.errors import ModelError, did_you_mean

VERIFY_IDS = ("010120269", "010330257", "013090339", "021680297", "096390012")  # adults; 2.4 to 3.3 s, 7 to 9 words
BATCH_CLIPS = 5  # at a time
TRAILING_SILENCE_SEC = 0.5  # at dynamic context: the pause tells the decoder to stop
MIN_NEW_TOKENS = 8
TOKENS_PER_SEC = 8  # of audio; fast speech has about 6. A model that loops is compared too, and soon done
MAX_NEW_TOKENS = 224  # CTranslate2 stops there too: half of the decoder's 448 positions
MAX_WORD_MISMATCH_QUANTISED = 0.2  # other exports may not change any word


@dataclass(frozen=True)
class ClipBatch:
    """Input of the source and of its export.

    Attributes:
        features: (B, mels, frames) on the source's device and in its precision.
        languages: one code per clip; empty for an English-only model.
        task: "transcribe" or "translate".
        prompts: the special tokens that begin each transcript, equally many for each.
        max_new_tokens: limit of each transcript.
    """

    features: Tensor
    languages: list[str]
    task: str
    prompts: list[list[int]]
    max_new_tokens: int

    def generate(self, model: Any) -> list[list[int]]:
        """Transcribe greedily with transformers; the tokens end in padding, and may begin with the prompt."""
        spoken = {"language": self.languages, "task": self.task} if self.languages else {}
        with quiet_inference(model):
            tokens = model.generate(self.features, num_beams=1, max_new_tokens=self.max_new_tokens, **spoken)
        return cast("list[list[int]]", tokens.tolist())


def verify_transcripts(
    model: Any,
    processor: Any,
    transcribe: Callable[[ClipBatch], Sequence[Sequence[int]]],
    *,
    name: str,
    allowed: float = 0.0,
    clips: Sequence[Waveform] | None = None,
    language: str | None = None,
) -> float:
    """Transcribe clips with a model and with its export, and refuse the export where the words differ.

    Args:
        model: the source, `WhisperForConditionalGeneration` or a subclass.
        processor: of the source.
        transcribe: the export, greedy: tokens of each clip, with or without special tokens.
        name: of the export, for the message.
        allowed: `word_mismatch` at most.
        clips: (T,) float32 each, 16 kHz, up to 30 s; by default `bundled_clips`.
        language: code, for multilingual models; by default that of the generation config, else detected for each clip.

    Returns:
        `word_mismatch` of the transcripts.

    Raises:
        ModelError: more words differ than are allowed, no clip, a clip that is too long, an unknown language.
    """
    audios = bundled_clips() if clips is None else clips
    if not len(audios):
        raise ModelError(f"{name}: no clip to verify with; pass some, or None for the five bundled ones")
    expected: list[str] = []
    found: list[str] = []
    for start in range(0, len(audios), BATCH_CLIPS):
        batch = prepare_batch(model, processor.tokenizer, audios[start : start + BATCH_CLIPS], language)
        expected += _texts(processor, batch.generate(model))
        found += _texts(processor, transcribe(batch))
    rate = word_mismatch(expected, found)
    if rate > allowed:
        raise ModelError(
            f"{name} differs in {rate:.0%} of the words, allowed are {allowed:.0%}, so it was not saved. "
            f"Source: {expected!r}; export: {found!r}"
        )
    return rate


@lru_cache(maxsize=1)
def bundled_clips() -> tuple[Waveform, ...]:
    """Return the default clips: five speakers, (T,) float32 each, 16 kHz."""
    listed = {utterance.id: utterance for utterance in read_parquet(SAMPLE_PARQUET)}
    return tuple(load_audio(listed[name].audio) for name in VERIFY_IDS)


def keeps_length(model: Any) -> bool:
    """Whether a model takes clips at their own length: dynamic context, and the class that can do it."""
    return isinstance(model, DynamicWhisper) and model.audio_context == "dynamic"


def prepare_batch(model: Any, tokenizer: Any, audios: Sequence[Waveform], language: str | None) -> ClipBatch:
    """Compute features at the model's own audio context, and find each clip's language and first tokens.

    Raises:
        ModelError: a clip that is too long, an unknown language.
    """
    longest = max(len(audio) for audio in audios)
    if longest > CONTEXT_SAMPLES:
        raise ModelError(f"a clip of {longest / SAMPLE_RATE:.1f} s: pass clips of at most 30 s to verify with")
    silence = round(TRAILING_SILENCE_SEC * SAMPLE_RATE)
    samples = padded_samples(longest + silence) if keeps_length(model) else CONTEXT_SAMPLES
    padded = torch.zeros(len(audios), samples)
    for row, audio in enumerate(audios):
        padded[row, : len(audio)] = torch.from_numpy(audio)
    features = LogMel(model.config.num_mel_bins)(padded).to(device=model.device, dtype=model.dtype)  # (B, mels, frames)
    languages = _languages(model, features, language)
    task = getattr(model.generation_config, "task", None) or "transcribe"
    spoken = [[f"<|{code}|>", f"<|{task}|>"] for code in languages] or [[]] * len(audios)
    prompts = [["<|startoftranscript|>", *names, "<|notimestamps|>"] for names in spoken]
    return ClipBatch(
        features=features,
        languages=languages,
        task=task,
        prompts=[[int(tokenizer.convert_tokens_to_ids(name)) for name in names] for names in prompts],
        max_new_tokens=min(MIN_NEW_TOKENS + math.ceil(TOKENS_PER_SEC * longest / SAMPLE_RATE), MAX_NEW_TOKENS),
    )


def word_mismatch(expected: list[str], found: list[str]) -> float:
    """Return the mean over clips of word edits divided by expected words, at most 1 per clip.

    A clip counts once, however many words it has: a model that loops on one of five is not refused for ending the loop.
    """
    return sum(map(_clip_mismatch, expected, found)) / len(expected)


def _clip_mismatch(expected: str, found: str) -> float:
    counts = jiwer.process_words(expected, found)
    edits = counts.substitutions + counts.deletions + counts.insertions
    words = counts.substitutions + counts.deletions + counts.hits
    return min(1.0, edits / words) if words else float(edits > 0)  # nothing expected: any word is a mismatch


@contextmanager
def quiet_inference(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients, and without a warning for each generate call about its own processors."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with evaluation_mode(model), torch.inference_mode():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _texts(processor: Any, tokens: Sequence[Sequence[int]]) -> list[str]:
    return [processor.decode(row, skip_special_tokens=True).strip() for row in tokens]


def _languages(model: Any, features: Tensor, language: str | None) -> list[str]:
    """Return one language per clip for a multilingual model, none for an English-only one."""
    config = model.generation_config
    if not getattr(config, "is_multilingual", False):
        return []
    codes = {number: name[2:-2] for name, number in config.lang_to_id.items()}
    chosen = language or getattr(config, "language", None)
    if chosen is None:
        with quiet_inference(model):
            return [codes[number] for number in model.detect_language(features).tolist()]
    if chosen not in codes.values():
        raise ModelError(f"language {chosen!r} is unknown to this model{did_you_mean(chosen, list(codes.values()))}")
    return [chosen] * len(features)
