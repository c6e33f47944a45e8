"""The data report's table: one row a clip, from what checking measured, what a tokenizer counts and where speech is.

Reading the transcripts costs nothing; only speech detection decodes recordings again, so it can be kept to a sample.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm.auto import tqdm

from src.data.audio import SAMPLE_RATE
from src.data.dataset import decode_audio
from src.data.labels import LabelEncoder
from src.data.preparation import DatasetSplits
from src.data.preprocessing import ClipStats
from src.data.utterance import SPLITS, Utterance, stable_hash
from src.data.vad import VoiceActivityDetector
from src.utils.config import Config
from src.utils.errors import DataError

CLIP_TYPES: Mapping[str, str] = {
    "id": "str",
    "split": "str",
    "speaker": "object",
    "duration_sec": "float64",
    "text": "str",
    "characters": "int64",
    "chars_per_sec": "float64",
    "chars_per_sec_outlier": "bool",
    "sample_rate": "int64",
    "channels": "int64",
    "peak_dbfs": "float64",
    "clipped_fraction": "float64",
    "loudness_dbfs": "float64",
    "silent_fraction": "float64",
    "bandwidth_hz": "float64",
    "leading_silence_sec": "float64",
    "trailing_silence_sec": "float64",
    "speech_fraction": "float64",
    "tokens": "Int64",
    "duplicate_audio_of": "object",
    "duplicate_text_count": "int64",
    "audio_sha256": "str",
}
OUTLIER_SCORE = 3.5
MIN_CLIPS_FOR_OUTLIERS = 10
_MIN_LOG_SPREAD = 0.1  # 10%: where all clips speak at one rate, not every small difference is an outlier
_WORD = re.compile(r"[\w'’]+")


def tabulate_clips(
    splits: DatasetSplits,
    config: Config,
    *,
    tokenizer: Any | None,
    vad: VoiceActivityDetector | None,
    max_vad_clips: int,
) -> pd.DataFrame:
    """Return one row a clip with the columns of `CLIP_TYPES`, in the order of the splits; what was not measured is NA.

    Raises: DataError: a clip without measurements. AudioError: a recording that can no longer be decoded.
    """
    parts = {name: getattr(splits, name) for name in SPLITS}
    utterances: list[Utterance] = [u for part in parts.values() for u in part]
    clips = pd.DataFrame([_stats_of(u, splits.stats) for u in utterances])
    clips["id"] = [u.id for u in utterances]
    clips["split"] = [name for name, part in parts.items() for _ in part]
    clips["speaker"] = [u.speaker for u in utterances]
    clips["text"] = [u.text for u in utterances]
    clips["characters"] = [len(u.text.strip()) for u in utterances]
    clips["chars_per_sec"] = clips["characters"] / clips["duration_sec"]
    clips["chars_per_sec_outlier"] = find_rate_outliers(clips["chars_per_sec"].to_numpy(dtype=float))
    first = clips.groupby("audio_sha256")["id"].transform("first")
    clips["duplicate_audio_of"] = first.astype(object).where(first != clips["id"], None)
    keys = clips["text"].map(text_key)
    clips["duplicate_text_count"] = keys.groupby(keys).transform("size")
    clips["tokens"] = pd.array(_count_tokens(utterances, tokenizer, config), dtype="Int64")
    heard = _find_speech(hashed_choice(utterances, max_vad_clips, config.seed), vad) if vad is not None else {}
    for column in ("leading_silence_sec", "trailing_silence_sec", "speech_fraction"):
        clips[column] = [heard.get(u.id, {}).get(column, np.nan) for u in utterances]
    return clips[list(CLIP_TYPES)].astype(dict(CLIP_TYPES))


def find_rate_outliers(rates: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which clips have far too many or too few characters a second.

    The modified z-score of Iglewicz and Hoaglin (1993), |x - median| / (1.4826 MAD) > 3.5, on the logarithm of the
    rate: half and twice the speed are equally far, and outliers do not move the yardstick. Fewer than 10 clips have
    none; a rate of zero is one.

    Args:
        rates: (n,) characters a second.
    """
    if len(rates) < MIN_CLIPS_FOR_OUTLIERS:
        return np.zeros(len(rates), dtype=bool)
    logs = np.log(np.maximum(rates, 1e-9))
    distances = np.abs(logs - np.median(logs))
    outliers: NDArray[np.bool_] = distances > OUTLIER_SCORE * max(1.4826 * float(np.median(distances)), _MIN_LOG_SPREAD)
    return outliers


def hashed_choice(utterances: Sequence[Utterance], count: int, seed: int) -> list[Utterance]:
    """Choose `count` utterances by a hash of their ids, all where there are fewer: a sample of the whole, never a head.

    Raises: DataError: none asked for.
    """
    if count < 1:
        raise DataError(f"{count} clips asked for; ask for at least one")
    return sorted(utterances, key=lambda u: stable_hash(seed, u.id))[:count]


def text_key(text: str) -> str:
    """Return what two transcripts have in common that differ in case and punctuation only."""
    return " ".join(_WORD.findall(text.casefold()))


def _stats_of(utterance: Utterance, stats: Mapping[str, ClipStats]) -> dict[str, Any]:
    if utterance.id not in stats:
        raise DataError(f"utterance {utterance.id}: it was not measured; take the splits from prepare_datasets")
    return asdict(stats[utterance.id])


def _count_tokens(utterances: Sequence[Utterance], tokenizer: Any | None, config: Config) -> list[int | None]:
    """Count the decoder's positions a transcript, prefix and end token included, as `LabelEncoder` makes them."""
    if tokenizer is None:
        return [None] * len(utterances)
    special = len(LabelEncoder(tokenizer, language=config.model.language, task=config.model.task).prefix) + 1
    texts = [" " + u.text.strip() for u in utterances]
    return [len(ids) + special for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _find_speech(utterances: Sequence[Utterance], vad: VoiceActivityDetector) -> dict[str, dict[str, float]]:
    """Return silence before, silence after and share of speech by id; without speech there is no before and after."""

    def measure(utterance: Utterance) -> dict[str, float]:
        audio = decode_audio(utterance).numpy()
        duration_sec = len(audio) / SAMPLE_RATE
        segments = vad.speech_segments(audio)
        found = {"speech_fraction": sum(segment.duration_sec for segment in segments) / duration_sec}
        if segments:
            found["leading_silence_sec"] = segments[0].start_sec
            found["trailing_silence_sec"] = duration_sec - segments[-1].end_sec
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = tqdm(pool.map(measure, utterances), total=len(utterances), desc="speech", leave=False)
        return {utterance.id: heard for utterance, heard in zip(utterances, found, strict=True)}
