"""Decode again, at a temperature, what looks like a loop or a guess; take silence for silence.

The rules are those of openai/whisper (Radford et al. 2022, section 4.5): greedy first; where the text compresses too
well or its log-probability is too low, the next temperature. A segment that the model takes for silence has no text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from src.data.audio import Waveform
from src.data.vad import VoiceActivityDetector
from src.inference.engines import Engine, transcribe
from src.inference.options import DecodingOptions, DecodingResult
from src.utils.config import Config

logger = logging.getLogger(__name__)

# Above it silero-vad is asked whether there is speech at all. tiny.en, stock and tuned, int8 and float32 (2026-11-28):
# zeros, white and brown noise and hum have 0.53 to 0.95, read and spoken English clips 0.01 to 0.03.
DOUBTFUL_NO_SPEECH_PROB = 0.2


@dataclass(frozen=True)
class FallbackOptions:
    """When to decode again.

    Attributes:
        temperatures: tried in order until a text passes; the last one's is taken.
        compression_ratio_threshold: a text above is a loop; None never is.
        logprob_threshold: a text whose mean log-probability lies below is a guess; None never is.
        no_speech_threshold: a guess whose probability of silence lies above has no text; None keeps it.
    """

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = None
    no_speech_threshold: float | None = 0.6

    @classmethod
    def from_config(cls, config: Config) -> FallbackOptions:
        """Take the inference section."""
        section = config.inference
        return cls(
            section.temperatures,
            section.compression_ratio_threshold,
            section.logprob_threshold,
            section.no_speech_threshold,
        )

    def is_loop(self, result: DecodingResult) -> bool:
        """Whether a text compresses too well."""
        limit = self.compression_ratio_threshold
        return limit is not None and result.compression_ratio > limit

    def is_guess(self, result: DecodingResult) -> bool:
        """Whether the model did not trust its text."""
        return self.logprob_threshold is not None and result.avg_logprob < self.logprob_threshold

    def is_silence(self, result: DecodingResult) -> bool:
        """Whether the model took the clip for silence and what it wrote for a guess."""
        limit, probability = self.no_speech_threshold, result.no_speech_prob
        return limit is not None and probability is not None and probability > limit and self.is_guess(result)


def decode_with_fallback(
    engine: Engine,
    audios: Sequence[Waveform],
    options: DecodingOptions,
    fallback: FallbackOptions,
    *,
    vad: VoiceActivityDetector | None = None,
) -> list[DecodingResult]:
    """Transcribe clips of at most 30 s as one batch; those that fail are decoded again.

    Args:
        vad: asked where the model doubts that there is speech, and where it loops; without speech there is no text.
    Returns: one result a clip, in order, with the temperature that gave it. Silence has an empty text.
    Raises: ModelError: as the engine.
    """
    asked = replace(options, no_speech=True, temperature=fallback.temperatures[0])
    results = transcribe(engine, audios, asked)
    silent = _without_speech(audios, results, fallback, vad) if vad is not None else set()
    for temperature in fallback.temperatures[1:]:
        failed = [i for i, result in enumerate(results) if i not in silent and _has_failed(result, fallback)]
        if not failed:
            break
        logger.debug("%d of %d clips are decoded again at temperature %g", len(failed), len(audios), temperature)
        again = replace(asked, temperature=temperature, num_beams=1)
        for i, result in zip(failed, transcribe(engine, [audios[i] for i in failed], again), strict=True):
            results[i] = result
    return [
        _silent(result) if i in silent or fallback.is_silence(result) else result for i, result in enumerate(results)
    ]


def _without_speech(
    audios: Sequence[Waveform],
    results: Sequence[DecodingResult],
    fallback: FallbackOptions,
    vad: VoiceActivityDetector,
) -> set[int]:
    """Return which clips hold no speech, of those whose text is doubtful."""
    doubtful = [i for i, result in enumerate(results) if _is_doubtful(result, fallback)]
    heard = vad.speech_segments_batch([audios[i] for i in doubtful]) if doubtful else []
    return {i for i, speech in zip(doubtful, heard, strict=True) if not speech}


def _is_doubtful(result: DecodingResult, fallback: FallbackOptions) -> bool:
    unsure = result.no_speech_prob is not None and result.no_speech_prob > DOUBTFUL_NO_SPEECH_PROB
    return bool(result.text) and (unsure or fallback.is_loop(result))


def _has_failed(result: DecodingResult, fallback: FallbackOptions) -> bool:
    return not fallback.is_silence(result) and (fallback.is_loop(result) or fallback.is_guess(result))


def _silent(result: DecodingResult) -> DecodingResult:
    return replace(result, text="", tokens=(), words=None if result.words is None else ())
