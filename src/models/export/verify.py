"""Check of an export: a few clips, transcribed greedily by the source and by the exported model.

One check for every format; it costs seconds on a CPU. The clips are those of the user's data that training kept in the
checkpoint's folder, each in its language, else bundled English ones.

A broken export changes most of the text, but so may a sound quantised one of a model that is unsure: where two tokens
are about equally likely, rounding tips the choice, and all that follows differs. So texts that differ are judged by the
source: how much less likely than its own choice does it find each token that the export wrote, after those before?
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jiwer
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import logging as transformers_logging

from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.dataset import WhisperDataset, decode_audio
from src.data.features import CONTEXT_SAMPLES, LogMel, padded_samples
from src.data.labels import MIN_NEW_TOKENS
from src.data.sources.catalog import SAMPLE_PARQUET
from src.data.sources.parquet import read_parquet
from src.data.utterance import hashed_choice
from src.models.dynamic_context import DynamicWhisper, evaluation_mode, get_cap_rates, get_language
from src.utils.errors import DataError, ModelError
from src.utils.files import parse_json
from src.utils.languages import UNSPACED, known_language, max_tokens_per_sec, parse_language, text_language

CLIPS_FILE = ".verification_clips.safetensors"  # in a checkpoint's folder; hidden, since `push_to_hub` leaves such out
KEPT_CLIPS = 5  # at least; one of each language
MAX_CLIP_SEC = 10.0
MAX_KEPT_SEC = 60.0  # of all: 1.9 MB
VERIFY_IDS = ("010120269", "010330257", "013090339", "021680297", "096390012")  # adults; 2.4 to 3.3 s, 7 to 9 words
INT16_MAX = 32_767
BATCH_CLIPS = 5  # at a time
TRAILING_SILENCE_SEC = 0.5  # at dynamic context: the pause tells the decoder to stop
MAX_NEW_TOKENS = 224  # CTranslate2 stops there too: half of the decoder's 448 positions
MAX_MISMATCH_QUANTISED = 0.2  # of the words; other exports may not change any
# Mean over clips of the worst token's gap. Sound exports of base in Hindi and Georgian have at most 0.05 in 16 bits and
# 1.3 in 8 bits, though up to 76% of their words differ; with a layer's weights at zero or in the wrong rows 6 to 19.
MAX_GAP_NATS, MAX_GAP_NATS_QUANTISED = 0.1, 2.0


@dataclass(frozen=True)
class SpokenClip:
    """Speech to verify an export with."""

    audio: Waveform  # (T,) float32, 16 kHz, up to 30 s
    language: str | None = None  # Whisper's code; None is the checkpoint's own, else what the model hears


Clips = Sequence[Waveform | SpokenClip]


@dataclass(frozen=True)
class ClipBatch:
    """Input of the source and of its export."""

    audio: Tensor  # (B, T) float32 on the CPU: the clips, padded as the source hears them
    features: Tensor  # (B, mels, frames) on the source's device and in its precision
    languages: list[str | None]  # of the transcripts
    spoken: dict[str, Any]  # task and the language of each clip, for `generate`; empty for an English-only model
    prompts: list[list[int]]  # the special tokens that begin each transcript, equally many for each
    max_new_tokens: int

    def generate(self, model: Any) -> list[list[int]]:
        """Transcribe greedily with transformers; the tokens end in padding, and may begin with the prompt."""
        with quiet_inference(model):
            tokens = model.generate(self.features, num_beams=1, max_new_tokens=self.max_new_tokens, **self.spoken)
        rows: list[list[int]] = tokens.tolist()
        return rows

    def written(self, rows: Sequence[Sequence[int]], end: int) -> list[list[int]]:
        """Return the new tokens of each row, with the end token unless the limit came first."""
        texts = []
        for row, prompt in zip(rows, self.prompts, strict=True):
            text = list(row[len(prompt) :] if list(row[: len(prompt)]) == prompt else row)
            text = text[: text.index(end)] if end in text else text
            texts.append([*text, end][: self.max_new_tokens])
        return texts


def verify_transcripts(
    model: Any,
    processor: Any,
    transcribe: Callable[[ClipBatch], Sequence[Sequence[int]]],
    *,
    name: str,
    quantised: bool = False,
    clips: Clips | None = None,
) -> float:
    """Transcribe clips with a model and with its export, and return the `word_mismatch`; `ModelError` if they differ.

    `transcribe` is the export, greedy: tokens of each clip, with or without special tokens; `name` is its name in the
    message. If it is quantised, a fifth of the words may differ, and close calls may tip beyond that; else no word.
    There must be at least one clip, of up to 30 s; by default they are `bundled_clips`.
    """
    given = _spoken(bundled_clips() if clips is None else clips)
    if not given or max(len(clip.audio) for clip in given) > CONTEXT_SAMPLES:
        raise ModelError(f"{name}: the clips to verify with must be of at most 30 s, and at least one")
    end = int(processor.tokenizer.eos_token_id)
    texts: tuple[list[str], list[str]] = [], []
    languages: list[str | None] = []
    exported: list[tuple[ClipBatch, list[list[int]]]] = []
    for start in range(0, len(given), BATCH_CLIPS):
        batch = prepare_batch(model, processor.tokenizer, given[start : start + BATCH_CLIPS])
        expected, found = (batch.written(rows, end) for rows in (batch.generate(model), transcribe(batch)))
        for known, rows in zip(texts, (expected, found), strict=True):
            known += [processor.decode(row, skip_special_tokens=True).strip() for row in rows]
        languages += batch.languages
        exported.append((batch, found))
    allowed, allowed_gap = (MAX_MISMATCH_QUANTISED, MAX_GAP_NATS_QUANTISED) if quantised else (0.0, MAX_GAP_NATS)
    mismatch = word_mismatch(*texts, languages)
    if mismatch <= allowed:
        return mismatch
    gap = sum(gap for batch, rows in exported for gap in worst_gaps(model, batch, rows)) / len(given)
    if not gap <= allowed_gap:  # nan too
        raise ModelError(
            f"{name} differs in {mismatch:.0%} of the words, allowed are {allowed:.0%}, and its choices are not close "
            f"calls ({gap:.1f} nats, allowed are {allowed_gap}), so it was not saved. "
            f"Source: {texts[0]!r}; export: {texts[1]!r}"
        )
    return mismatch


def choose_clips(loader: Any, seed: int) -> tuple[SpokenClip, ...]:
    """Choose a few clips by a hash of their ids, at least one of each language; of long ones the beginning.

    `loader` is from `create_loader`; others have no utterances, so none is chosen.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, WhisperDataset):
        return ()
    order = hashed_choice((u for u in dataset.utterances if u.text.strip()), None, seed)
    first = {u.language: u for u in reversed(order)}  # of each language
    others = [u for u in order if u is not first[u.language]]
    chosen = [*first.values(), *others[: max(0, KEPT_CLIPS - len(first))]]
    samples = int(min(MAX_CLIP_SEC, MAX_KEPT_SEC / max(1, len(chosen))) * SAMPLE_RATE)
    return tuple(SpokenClip(decode_audio(u)[:samples].numpy(), u.language) for u in chosen)


def save_clips(clips: Clips, folder: Path) -> None:
    """Write clips into a checkpoint's folder, in 16 bits; nothing if there are none."""
    given = _spoken(clips)
    audios = {f"{at:03d}": torch.from_numpy(clip.audio) for at, clip in enumerate(given)}
    languages = {name: clip.language for name, clip in zip(audios, given, strict=True) if clip.language}
    tensors = {name: (audio.clamp(-1, 1) * INT16_MAX).round().to(torch.int16) for name, audio in audios.items()}
    if tensors:
        save_file(tensors, folder / CLIPS_FILE, metadata={"languages": json.dumps(languages)})


def load_clips(folder: Path) -> tuple[SpokenClip, ...]:
    """Return the clips of a checkpoint's folder; none if it has none.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / CLIPS_FILE
    if not path.is_file():
        return ()
    try:
        with safe_open(path, framework="pt") as file:
            languages = parse_json((file.metadata() or {}).get("languages", "{}"))
            audios = {name: file.get_tensor(name).float().flatten() / INT16_MAX for name in sorted(file.keys())}
        return tuple(
            SpokenClip(audio.numpy(), parse_language(languages[name]) if name in languages else None)
            for name, audio in audios.items()
        )
    except (OSError, SafetensorError, DataError, ValueError, TypeError, AttributeError) as err:
        raise ModelError(
            f"{path}: not clips to verify exports with ({type(err).__name__}: {err}); delete it: bundled English clips "
            "then serve"
        ) from err


@cache
def bundled_clips() -> tuple[Waveform, ...]:
    """Return the default clips: five speakers of English, (T,) float32 each, 16 kHz.

    A checkpoint of another language writes them in that: nonsense, but a sound export writes nonsense as likely.
    """
    listed = {utterance.id: utterance for utterance in read_parquet(SAMPLE_PARQUET)}
    return tuple(load_audio(listed[name].audio) for name in VERIFY_IDS)


def _spoken(clips: Clips) -> list[SpokenClip]:
    return [clip if isinstance(clip, SpokenClip) else SpokenClip(clip) for clip in clips]


def keeps_length(model: Any) -> bool:
    """Whether a model takes clips at their own length: dynamic context, and the class that can do it."""
    return isinstance(model, DynamicWhisper) and model.audio_context == "dynamic"


def prepare_batch(model: Any, tokenizer: Any, clips: Clips) -> ClipBatch:
    """Compute features at the model's own audio context, and find each clip's language, first tokens and limit.

    The language is the clip's, else that of the generation config, else it is detected.
    """
    given = _spoken(clips)
    longest = max(len(clip.audio) for clip in given)
    silence = round(TRAILING_SILENCE_SEC * SAMPLE_RATE)
    padded = torch.zeros(len(given), padded_samples(longest + silence) if keeps_length(model) else CONTEXT_SAMPLES)
    for row, clip in enumerate(given):
        padded[row, : len(clip.audio)] = torch.from_numpy(clip.audio)
    features = LogMel(model.config.num_mel_bins)(padded).to(device=model.device, dtype=model.dtype)  # (B, mels, frames)
    generation, spoken = model.generation_config, {}
    codes: list[str | None] = [None] * len(given)
    names: list[list[str]] = [[]] * len(given)
    task = getattr(generation, "task", None) or "transcribe"
    if getattr(generation, "is_multilingual", False):
        known, own = [name.strip("<|>") for name in generation.lang_to_id], get_language(model)
        codes = [own if clip.language is None else known_language(clip.language, known) for clip in given]
        if None in codes:
            with quiet_inference(model):
                heard = tokenizer.convert_ids_to_tokens(model.detect_language(features).tolist())
            codes = [code or name.strip("<|>") for code, name in zip(codes, heard, strict=True)]
        names = [[f"<|{code}|>", f"<|{task}|>"] for code in codes]
        spoken = {"language": [name for name, _ in names], "task": task}
    prompts = [["<|startoftranscript|>", *row, "<|notimestamps|>"] for row in names]
    languages = [text_language(code, task) for code in codes]
    rate = max(max_tokens_per_sec(each, get_cap_rates(model.config)) for each in languages)
    return ClipBatch(
        audio=padded,
        features=features,
        languages=languages,
        spoken=spoken,
        prompts=[[int(tokenizer.convert_tokens_to_ids(name)) for name in row] for row in prompts],
        max_new_tokens=min(MIN_NEW_TOKENS + math.ceil(rate * longest / SAMPLE_RATE), MAX_NEW_TOKENS),
    )


def word_mismatch(
    expected: Sequence[str], found: Sequence[str], languages: Sequence[str | None] | None = None
) -> float:
    """Return the mean over clips of word edits divided by expected words, at most 1 per clip.

    Where the clip's language has no spaces between words, each character is one.

    A clip counts once, however many words it has: a model that loops on one of five is not refused for ending the loop.
    """
    rates = []
    for *pair, language in zip(expected, found, languages or [None] * len(expected), strict=True):
        units = [" ".join("".join(text.split())) if language in UNSPACED else text for text in pair]
        counts = jiwer.process_words(*units)
        edits = counts.substitutions + counts.deletions + counts.insertions
        words = counts.substitutions + counts.deletions + counts.hits
        rates.append(min(1.0, edits / words) if words else float(edits > 0))  # nothing expected: any word is wrong
    return sum(rates) / len(rates)


def worst_gaps(model: Any, batch: ClipBatch, rows: Sequence[Sequence[int]]) -> list[float]:
    """Return for each text (its new tokens) how far its worst token is behind the source's choice there, in nats.

    The source is given the tokens before, so that a text may go another way after a close call: 0 is the source's own.
    """
    rules, gaps = model.generation_config, []
    with quiet_inference(model):
        encoded = model.get_encoder()(batch.features).last_hidden_state  # (B, positions, d_model)
        for hidden, prompt, row in zip(encoded, batch.prompts, rows, strict=True):
            ids = torch.tensor([[*prompt, *row]], device=model.device)
            states = model.model.decoder(
                input_ids=ids[:, :-1], encoder_hidden_states=hidden[None], use_cache=False
            ).last_hidden_state[0, len(prompt) - 1 :]
            logits = model.proj_out(states).float()  # (new tokens, vocabulary)
            logits[:, rules.suppress_tokens or []] = -torch.inf
            logits[0, rules.begin_suppress_tokens or []] = -torch.inf
            chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
            gaps.append(float((logits.max(dim=-1).values - chosen).max()))
    return gaps


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
