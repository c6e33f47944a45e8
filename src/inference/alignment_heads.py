"""Search for the cross-attention heads that time words, for a checkpoint that lists none.

Transcripts are forced through the decoder. The path of the heads that would serve without a list (the upper half of the
layers) says where each token lies, and a head is scored by how much of its attention follows it there. Single heads lie
up to half a second early or late; those that agree with a consensus of many together give better times than it does.

Median distance of word ends from those of an HMM aligner (pocketsphinx 5.1), heads found with 6 clips, measured on
others (2026-11-28; 254 words, base 190), for tiny.en and base: heads listed by OpenAI 0.15 and 0.10 s, upper half of
the layers 0.10 and 0.085 s, found here 0.08 and 0.07 s. One pass is enough: a search that continues from the heads
found drifts to those that are sharp but early (0.12 s).

Filtering heads without labels and taking the ten best is the idea of Yeh, Meng & Tang 2025, "Whisper Has an Internal
Word Aligner", arXiv:2509.09987. Their score, the norms of rows and columns, needs no consensus and takes the sharp
early heads (0.13 s, tiny.en; 0.12 s, base; 41 clips).
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
from src.data.features import POSITION_SEC
from src.inference.alignment import force_align, record_cross_attention, time_tokens
from src.inference.options import DecodingOptions
from src.inference.torch_engine import TorchEngine
from src.models.dynamic_context import Head, evaluation_mode, listed_heads, upper_half_heads
from src.utils.errors import DataError, ModelError
from src.utils.files import read_json, write_text_atomic

DEFAULT_COUNT = 10  # heads; 10 to 12 are within 0.01 s of each other on both models above, fewer depend on the clips
MIN_SHARE = 0.3  # of the best score: a head below it mostly looks elsewhere
MIN_SCORE = 0.25  # of the best head, which has 0.5 to 0.7 above; texts of other clips 0.08, random weights below 0.06
MIN_TOKENS = 3  # of a transcript: what a head does with one or two says nothing
TOLERANCE_POSITIONS = 2  # 0.04 s around a token count as its place


@dataclass(frozen=True)
class HeadSearch:
    """Result of a search; a head's score is the share of a token's attention at the token's place, less that of others.

    1 follows the audio alone, 0 ignores which token is due.
    """

    heads: tuple[Head, ...]  # (layer, head) for `generation_config.alignment_heads`, in order of layers
    scores: Mapping[Head, float]  # of all heads, best first: mean over tokens
    clips: int  # searched with
    words: int  # in them
    upper_half_sec: float  # median distance of word ends by these heads from those by all heads of the upper half
    listed_sec: float | None  # likewise from the heads that the checkpoint lists; None if it lists none that exist


def find_alignment_heads(
    model: Any,
    processor: Any,
    audios: Sequence[Waveform],
    texts: Sequence[str] | None = None,
    *,
    count: int = DEFAULT_COUNT,
    language: str | None = None,
    languages: Sequence[str | None] | None = None,
) -> HeadSearch:
    """Find the heads of a model that follow the audio.

    Args:
        model: a `DynamicWhisper`, in the context that its config says.
        processor: its `WhisperProcessor`.
        audios: (T,) float32 each, 16 kHz, at most 30 s; a handful of clips is enough.
        texts: what is said in each; the model's own transcripts by default. Clips without text are left out.
        count: maximum number of heads; fewer where fewer score at least 0.3 of the best.
        language: of the clips; the checkpoint's own by default, else detected (multilingual models).
        languages: of each clip, where it is known; it comes before `language`.
    """
    if texts is not None and len(texts) != len(audios):
        raise DataError(f"alignment heads: {len(audios)} clips, but {len(texts)} texts; pass one for each")
    engine, options = TorchEngine(model, processor), DecodingOptions(language=language)
    with evaluation_mode(model), torch.inference_mode():
        # each clip by itself, so that it keeps its own length: the arguments of `force_align`
        clips: list[dict[str, Any]] = []
        for index, audio in enumerate(audios):
            encoded = engine.encode([audio], options.trailing_silence_sec)
            given = None if languages is None else [languages[index]]
            if texts is None:
                (heard,) = engine.decode(encoded, [audio], options, languages=given)
                tokens, spoken = list(heard.tokens), heard.language
            else:
                (spoken,) = engine.languages(encoded, 1, options, given=given)
                tokens = engine.vocabulary.encode(texts[index], language=spoken)
            start = engine.vocabulary.start_sequence(spoken, options.task, timestamps=False)
            room = model.config.max_target_positions - len(start)
            if len(tokens) > room:
                raise ModelError(f"the text of clip {index} has {len(tokens)} tokens, the decoder takes {room}")
            clip = {"hidden": encoded.last_hidden_state, "sot_sequence": start, "tokens": tokens}
            if len(tokens) >= MIN_TOKENS:
                clips.append({**clip, "audio_sec": len(audio) / SAMPLE_RATE})
        if not clips:
            raise DataError(f"none of {len(audios)} clips has a text of {MIN_TOKENS} tokens; pass clips with speech")

        # score every head by all tokens of all clips
        layers, heads_of_layer = model.config.decoder_layers, model.config.decoder_attention_heads
        heads = [(layer, head) for layer in range(layers) for head in range(heads_of_layer)]
        by_token = torch.cat([_score_clip(model, heads, **clip) for clip in clips], dim=1)  # (heads, tokens of all)
        means = dict(zip(heads, by_token.mean(dim=1).tolist(), strict=True))
        scores = dict(sorted(means.items(), key=lambda each: each[1], reverse=True))
        best = max(scores.values())
        if best < MIN_SCORE:
            raise ModelError(
                f"no cross-attention head follows the audio: the best of {len(scores)} scores {best:.2f}, needed is "
                f"{MIN_SCORE}; check the weights, the language, and that the texts are what is said in the clips"
            )
        chosen = sorted(head for head in list(scores)[:count] if scores[head] >= MIN_SHARE * best)

        # compare with the word ends that the model gives without them
        def word_ends(heads: Sequence[Head]) -> list[float]:
            words = [force_align(model, processor.tokenizer, heads=heads, **clip) for clip in clips]
            return [word.end_sec for words_of_clip in words for word in words_of_clip]

        def distance_sec(others: Sequence[Head]) -> float:
            return float(np.median(np.abs(np.subtract(ends, word_ends(others)))))

        ends, listed = word_ends(chosen), listed_heads(model)
        return HeadSearch(
            heads=tuple(chosen),
            scores=scores,
            clips=len(clips),
            words=len(ends),
            upper_half_sec=distance_sec(upper_half_heads(model.config)),
            listed_sec=distance_sec(listed) if listed and set(listed) <= set(heads) else None,
        )


def _score_clip(
    model: Any, heads: Sequence[Head], *, hidden: Tensor, sot_sequence: list[int], tokens: list[int], audio_sec: float
) -> Tensor:
    """Return (heads, tokens), on the CPU."""
    ids = torch.tensor([[*sot_sequence, *tokens]], device=hidden.device)
    with record_cross_attention(model, heads) as recorded:  # per layer: (1, heads of it, L, positions)
        model.model.decoder(input_ids=ids, encoder_hidden_states=hidden, use_cache=False)
    upper = sorted({layer for layer, _ in upper_half_heads(model.config)})
    consensus = torch.cat([recorded[layer] for layer in upper], dim=1)
    first, n = len(sot_sequence), len(tokens)
    entered_sec = time_tokens(consensus[0], n, first=first, audio_sec=audio_sec)
    audio = max(1, round(audio_sec / POSITION_SEC))
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


def write_alignment_heads(folder: Path, heads: Sequence[Head]) -> Path:
    """Write heads into a checkpoint's `generation_config.json`, which is replaced as a whole; all else in it stays.

    torch, transformers and every later export to CTranslate2 then use them.
    """
    path = folder / "generation_config.json"
    fix = "give the Hugging Face folder of the checkpoint, or copy the file of the same openai/whisper-* variant there"
    try:
        known: dict[str, Any] = read_json(path, dict, what="a generation config", fix=fix)
    except DataError as err:
        raise ModelError(str(err)) from err
    known["alignment_heads"] = [list(head) for head in heads]
    write_text_atomic(path, json.dumps(known, indent=2, sort_keys=True) + "\n", durable=True)
    return path
