"""Check of an export: five clips, transcribed greedily by the source and by the exported model.

One check for every format. The clips are short and bundled, so that it costs seconds on a CPU: a broken export changes
most of their words, a sound quantised one few of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import jiwer
import torch
from torch import Tensor
from transformers import logging as transformers_logging
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.features import CONTEXT_SAMPLES, LogMel, padded_samples
from src.data.sources.catalog import SAMPLE_PARQUET
from src.data.sources.parquet import read_parquet
from src.models.dynamic_context import DynamicWhisper, evaluation_mode
from src.utils.errors import ModelError

VERIFY_IDS = ("010120269", "010330257", "013090339", "021680297", "096390012")  # adults; 2.4 to 3.3 s, 7 to 9 words
BATCH_CLIPS = 5  # at a time
TRAILING_SILENCE_SEC = 0.5  # at dynamic context: the pause tells the decoder to stop
MIN_NEW_TOKENS = 8
TOKENS_PER_SEC = 8  # of audio; fast speech has about 6. A model that loops is compared too, and soon done
MAX_NEW_TOKENS = 224  # CTranslate2 stops there too: half of the decoder's 448 positions
MAX_WORD_MISMATCH_QUANTISED = 0.2  # other exports may not change any word


@dataclass(frozen=True)
class ClipBatch:
    """Input of the source and of its export."""

    features: Tensor  # (B, mels, frames) on the source's device and in its precision
    spoken: dict[str, Any]  # task and the language of each clip, for `generate`; empty for an English-only model
    prompts: list[list[int]]  # the special tokens that begin each transcript, equally many for each
    max_new_tokens: int

    def generate(self, model: Any) -> list[list[int]]:
        """Transcribe greedily with transformers; the tokens end in padding, and may begin with the prompt."""
        with quiet_inference(model):
            tokens = model.generate(self.features, num_beams=1, max_new_tokens=self.max_new_tokens, **self.spoken)
        return cast("list[list[int]]", tokens.tolist())


def verify_transcripts(
    model: Any,
    processor: Any,
    transcribe: Callable[[ClipBatch], Sequence[Sequence[int]]],
    *,
    name: str,
    allowed: float = 0.0,
    clips: Sequence[Waveform] | None = None,
) -> float:
    """Transcribe clips with a model and with its export, and refuse the export where more words differ than allowed.

    `transcribe` is the export, greedy: tokens of each clip, with or without special tokens; `name` is for the message.
    The clips are (T,) float32, 16 kHz, up to 30 s; by default `bundled_clips`. Returns the `word_mismatch`.
    """
    audios = bundled_clips() if clips is None else clips
    if not len(audios) or max(map(len, audios)) > CONTEXT_SAMPLES:
        raise ModelError(f"{name}: the clips to verify with must be of at most 30 s, and at least one")
    texts: tuple[list[str], list[str]] = [], []
    for start in range(0, len(audios), BATCH_CLIPS):
        batch = prepare_batch(model, processor.tokenizer, audios[start : start + BATCH_CLIPS])
        for known, tokens in zip(texts, (batch.generate(model), transcribe(batch)), strict=True):
            known += [processor.decode(row, skip_special_tokens=True).strip() for row in tokens]
    rate = word_mismatch(*texts)
    if rate > allowed:
        raise ModelError(
            f"{name} differs in {rate:.0%} of the words, allowed are {allowed:.0%}, so it was not saved. "
            f"Source: {texts[0]!r}; export: {texts[1]!r}"
        )
    return rate


@cache
def bundled_clips() -> tuple[Waveform, ...]:
    """Return the default clips: five speakers, (T,) float32 each, 16 kHz."""
    listed = {utterance.id: utterance for utterance in read_parquet(SAMPLE_PARQUET)}
    return tuple(load_audio(listed[name].audio) for name in VERIFY_IDS)


def keeps_length(model: Any) -> bool:
    """Whether a model takes clips at their own length: dynamic context, and the class that can do it."""
    return isinstance(model, DynamicWhisper) and model.audio_context == "dynamic"


def prepare_batch(model: Any, tokenizer: Any, audios: Sequence[Waveform]) -> ClipBatch:
    """Compute features at the model's own audio context, and find each clip's language and first tokens.

    The language is that of the generation config, else it is detected.
    """
    longest = max(len(audio) for audio in audios)
    silence = round(TRAILING_SILENCE_SEC * SAMPLE_RATE)
    padded = torch.zeros(len(audios), padded_samples(longest + silence) if keeps_length(model) else CONTEXT_SAMPLES)
    for row, audio in enumerate(audios):
        padded[row, : len(audio)] = torch.from_numpy(audio)
    features = LogMel(model.config.num_mel_bins)(padded).to(device=model.device, dtype=model.dtype)  # (B, mels, frames)
    generation, spoken = model.generation_config, {}
    names: list[list[str]] = [[]] * len(audios)
    if getattr(generation, "is_multilingual", False):
        language, task = getattr(generation, "language", None), getattr(generation, "task", None) or "transcribe"
        if language is None:
            with quiet_inference(model):
                languages = tokenizer.convert_ids_to_tokens(model.detect_language(features).tolist())
        else:
            languages = [f"<|{TO_LANGUAGE_CODE.get(language, language)}|>"] * len(audios)
        if not generation.lang_to_id.keys() >= set(languages):
            raise ModelError(f"language {language!r} of the generation config is unknown to this model")
        spoken = {"language": languages, "task": task}
        names = [[name, f"<|{task}|>"] for name in languages]
    prompts = [["<|startoftranscript|>", *row, "<|notimestamps|>"] for row in names]
    return ClipBatch(
        features=features,
        spoken=spoken,
        prompts=[[int(tokenizer.convert_tokens_to_ids(name)) for name in row] for row in prompts],
        max_new_tokens=min(MIN_NEW_TOKENS + math.ceil(TOKENS_PER_SEC * longest / SAMPLE_RATE), MAX_NEW_TOKENS),
    )


def word_mismatch(expected: list[str], found: list[str]) -> float:
    """Return the mean over clips of word edits divided by expected words, at most 1 per clip.

    A clip counts once, however many words it has: a model that loops on one of five is not refused for ending the loop.
    """
    rates = []
    for pair in zip(expected, found, strict=True):
        counts = jiwer.process_words(*pair)
        edits = counts.substitutions + counts.deletions + counts.insertions
        words = counts.substitutions + counts.deletions + counts.hits
        rates.append(min(1.0, edits / words) if words else float(edits > 0))  # nothing expected: any word is wrong
    return sum(rates) / len(rates)


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
