"""Search for the cross-attention heads that time words, for a checkpoint that lists none.

Transcripts are forced through the decoder. The path of the heads that would serve without a list (the upper half of the
layers) says where each token lies, and a head is scored by how much of its attention follows it there. Single heads lie
up to half a second early or late; those that agree with a consensus of many together give better times than it does.

Median distance of word ends from those of an HMM aligner (pocketsphinx 5.1), heads found with 6 clips, measured on
others (2026-11-28; 254 words, base 190):

| heads | tiny.en | base |
|---|---|---|
| listed by OpenAI | 0.15 s | 0.10 s |
| upper half of the layers | 0.10 s | 0.085 s |
| found here | 0.08 s | 0.07 s |

One pass is enough: a search that continues from the heads found drifts to those that are sharp but early (0.12 s).
Source: filtering heads without labels and taking the ten best is the idea of Yeh, Meng & Tang 2025, "Whisper Has an
Internal Word Aligner", arXiv:2509.09987. Their score, the norms of rows and columns, needs no consensus and takes the
sharp early heads (0.13 s, tiny.en; 0.12 s, base; 41 clips).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.data.audio import SAMPLE_RATE, Waveform
from src.inference.alignment import POSITION_SEC, align_words, record_cross_attention, time_tokens
from src.inference.decoding import decode, encode, languages_of
from src.inference.options import DecodingOptions
from src.inference.words import Vocabulary
from src.models.alignment_heads import Head, listed_heads, upper_half_heads
from src.models.dynamic_context import evaluation_mode
from src.utils.errors import DataError, ModelError
from src.utils.files import write_text_atomic

DEFAULT_COUNT = 10  # heads; 10 to 12 are within 0.01 s of each other on both models above, fewer depend on the clips
MIN_SHARE = 0.3  # of the best score: a head below it mostly looks elsewhere
MIN_SCORE = 0.25  # of the best head, which has 0.5 to 0.7 above; texts of other clips 0.08, random weights below 0.06
MIN_TOKENS = 3  # of a transcript: what a head does with one or two says nothing
TOLERANCE_POSITIONS = 2  # 0.04 s around a token count as its place


@dataclass(frozen=True)
class HeadSearch:
    """Result of a search.

    Attributes:
        heads: (layer, head) pairs for `generation_config.alignment_heads`, in order of layers.
        scores: of all heads, best first: the share of a token's attention that lies at the token's place, less the
            share that the clip's other tokens have there, mean over tokens. 1 follows the audio alone, 0 ignores which
            token is due.
        clips: number of clips searched with.
        words: number of their words.
        upper_half_sec: median distance of word ends by these heads from those by all heads of the upper half.
        listed_sec: likewise, from those by the heads that the checkpoint lists; None if it lists none that exist.
    """

    heads: tuple[Head, ...]
    scores: Mapping[Head, float]
    clips: int
    words: int
    upper_half_sec: float
    listed_sec: float | None


@dataclass(frozen=True)
class _Clip:
    """A transcript and its audio, ready for the decoder."""

    hidden: Tensor  # (1, positions, d_model)
    start: list[int]  # special tokens
    tokens: list[int]
    audio_sec: float


def find_alignment_heads(
    model: Any,
    processor: Any,
    audios: Sequence[Waveform],
    texts: Sequence[str] | None = None,
    *,
    count: int = DEFAULT_COUNT,
    language: str | None = None,
) -> HeadSearch:
    """Find the heads of a model that follow the audio.

    Args:
        model: a `DynamicWhisper`, in the context that its config says.
        processor: its `WhisperProcessor`.
        audios: (T,) float32 each, 16 kHz, at most 30 s; a handful of clips is enough.
        texts: what is said in each; the model's own transcripts by default. Clips without text are left out.
        count: maximum number of heads; fewer where fewer score at least 0.3 of the best.
        language: of the clips; detected by default (multilingual models).

    Raises:
        DataError: numbers of clips and texts differ, or no clip has a text of three tokens.
        ModelError: no head follows the audio; a clip of more than 30 s, or a text that does not fit into the decoder.
    """
    if texts is not None and len(texts) != len(audios):
        raise DataError(f"alignment heads: {len(audios)} clips, but {len(texts)} texts; pass one for each")
    with evaluation_mode(model), torch.inference_mode():
        clips = [
            _read_clip(model, processor, audio, None if texts is None else texts[index], index, language)
            for index, audio in enumerate(audios)
        ]
        clips = [clip for clip in clips if len(clip.tokens) >= MIN_TOKENS]
        if not clips:
            raise DataError(
                f"alignment heads: none of {len(audios)} clips has a text of {MIN_TOKENS} tokens or more; pass clips "
                "with speech, and their transcripts"
            )

        # score every head by all tokens of all clips
        layers, heads_of_layer = model.config.decoder_layers, model.config.decoder_attention_heads
        heads = [(layer, head) for layer in range(layers) for head in range(heads_of_layer)]
        by_token = torch.cat([_score_clip(model, clip, heads) for clip in clips], dim=1)  # (heads, tokens of all clips)
        means = dict(zip(heads, by_token.mean(dim=1).tolist(), strict=True))
        scores = dict(sorted(means.items(), key=lambda each: each[1], reverse=True))
        best = max(scores.values())
        if best < MIN_SCORE:
            raise ModelError(
                f"no cross-attention head follows the audio: the best of {len(scores)} scores {best:.2f}, "
                f"needed is {MIN_SCORE}. The weights are untrained or damaged, or the texts are not what is said in "
                "the clips: check them, and the language"
            )
        chosen = sorted(head for head in list(scores)[:count] if scores[head] >= MIN_SHARE * best)

        # compare with the word ends that the model gives without them
        ends = _word_ends(model, processor, clips, chosen)
        upper_half = _word_ends(model, processor, clips, upper_half_heads(model.config))
        listed = listed_heads(model)
        exist = bool(listed) and set(listed) <= set(heads)
        return HeadSearch(
            heads=tuple(chosen),
            scores=scores,
            clips=len(clips),
            words=len(ends),
            upper_half_sec=_median_distance(ends, upper_half),
            listed_sec=_median_distance(ends, _word_ends(model, processor, clips, listed)) if exist else None,
        )


def _read_clip(
    model: Any, processor: Any, audio: Waveform, text: str | None, index: int, language: str | None
) -> _Clip:
    """Encode a clip by itself, so that it keeps its own length."""
    options, vocabulary = DecodingOptions(language=language), Vocabulary.of(processor.tokenizer)
    encoded = encode(model, [audio], options.trailing_silence_sec)
    if text is None:
        (found,) = decode(model, processor, [audio], options, encoder_outputs=encoded)
        tokens, language = list(found.tokens), found.language
    else:
        tokens, (language,) = vocabulary.encode(text), languages_of(model, vocabulary, encoded, options)
    start = vocabulary.start_sequence(language, options.task, timestamps=False)
    room = model.config.max_target_positions - len(start)
    if len(tokens) > room:
        raise ModelError(f"the text of clip {index} has {len(tokens)} tokens, the decoder takes {room}; cut both")
    return _Clip(encoded.last_hidden_state, start, tokens, len(audio) / SAMPLE_RATE)


def _score_clip(model: Any, clip: _Clip, heads: Sequence[Head]) -> Tensor:
    """Return (heads, tokens), on the CPU."""
    ids = torch.tensor([[*clip.start, *clip.tokens]], device=clip.hidden.device)
    with record_cross_attention(model, heads) as recorded:  # per layer: (1, heads of it, L, positions)
        model.model.decoder(input_ids=ids, encoder_hidden_states=clip.hidden, use_cache=False)
    upper = sorted({layer for layer, _ in upper_half_heads(model.config)})
    consensus = torch.cat([recorded[layer] for layer in upper], dim=1)
    first, n = len(clip.start), len(clip.tokens)
    entered_sec = time_tokens(consensus[0], n, first=first, audio_sec=clip.audio_sec)
    audio = max(1, round(clip.audio_sec / POSITION_SEC))
    rows = slice(first - 1, first - 1 + n)  # the row before a token predicts it
    return torch.cat([score_heads(layer[0, :, rows, :audio], entered_sec).cpu() for layer in recorded])


def score_heads(attention: Tensor, entered_sec: Sequence[float]) -> Tensor:
    """Score heads against the places of tokens: (heads, n), of which a head's score is the mean.

    `attention` (heads, n, P) has the probabilities of n > 1 tokens over the positions of the real audio, `entered_sec`
    when each begins, and then the end: n + 1 times, ascending.
    """
    begins = np.rint(np.asarray(entered_sec) / POSITION_SEC).astype(int)
    at = np.arange(attention.shape[-1])
    ends = np.maximum(begins[1:], begins[:-1] + 1)
    near = (at >= begins[:-1, None] - TOLERANCE_POSITIONS) & (at < ends[:, None] + TOLERANCE_POSITIONS)
    places = torch.from_numpy(near).to(attention)  # (n, P)
    others = (attention.sum(dim=1, keepdim=True) - attention) / (attention.shape[1] - 1)
    return ((attention - others) * places).sum(dim=-1)


def _word_ends(model: Any, processor: Any, clips: Sequence[_Clip], heads: Sequence[Head]) -> list[float]:
    """Return the end of every word of every clip, in seconds of its clip."""
    return [
        word.end_sec
        for clip in clips
        for word in align_words(
            model,
            processor.tokenizer,
            clip.hidden,
            sot_sequence=clip.start,
            tokens=clip.tokens,
            audio_sec=clip.audio_sec,
            heads=heads,
        )
    ]


def _median_distance(first: Sequence[float], second: Sequence[float]) -> float:
    return float(np.median(np.abs(np.subtract(first, second))))


def write_alignment_heads(folder: Path, heads: Sequence[Head]) -> Path:
    """Write heads into a checkpoint's generation config; everything else in it stays.

    torch, transformers and every later export to CTranslate2 then use them.

    Returns:
        The file, which is replaced as a whole.

    Raises:
        ModelError: the folder has no such file, or it is not JSON.
    """
    path = folder / "generation_config.json"
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as err:
        raise ModelError(
            f"{folder}: no {path.name}; give the Hugging Face folder of the checkpoint, or copy the file of the same "
            "openai/whisper-* variant there first"
        ) from err
    except (ValueError, TypeError) as err:
        raise ModelError(f"{path}: not a JSON object: {err}; save the checkpoint again") from err
    known["alignment_heads"] = [list(head) for head in heads]
    write_text_atomic(path, json.dumps(known, indent=2, sort_keys=True) + "\n", durable=True)
    return path
