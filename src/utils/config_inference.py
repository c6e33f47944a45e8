"""The configuration's sections for decoding, speech detection and streaming."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from src.utils.config_section import MAX_AUDIO_SEC, Section


class InferenceConfig(Section):
    """Decoding of files; evaluation uses its batches, beams, pause and cap as well."""

    engine: Literal["auto", "torch", "ctranslate2"] = "auto"
    compute_type: str = "auto"
    batch_size: int = Field(16, ge=1)
    num_beams: int = Field(1, ge=1)
    trailing_silence_sec: float = Field(0.5, ge=0, le=5)
    max_tokens_per_sec: float = Field(10.0, gt=0)
    temperatures: tuple[Annotated[float, Field(ge=0, le=2)], ...] = Field((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), min_length=1)
    compression_ratio_threshold: float | None = Field(2.4, gt=1)
    logprob_threshold: float | None = Field(None, lt=0)
    no_speech_threshold: float | None = Field(0.6, gt=0, lt=1)
    max_segment_sec: float = Field(28.0, ge=2, le=29.5)
    join_pause_sec: float | None = Field(None, ge=0)
    initial_prompt: str = ""
    hotwords: str = ""


class VADConfig(Section):
    """silero-vad."""

    threshold: float = Field(0.5, gt=0, lt=1)
    min_silence_sec: float = Field(0.5, gt=0)
    min_speech_sec: float = Field(0.1, ge=0)
    pad_sec: float = Field(0.1, ge=0)


class StreamingConfig(Section):
    """The streaming state machine."""

    policy: Literal["alignatt", "local_agreement", "chunk_merge"] = "alignatt"
    guard_sec: float = Field(0.55, ge=0, le=3)
    display_guard_sec: float = Field(0.2, ge=0, le=3)
    min_chunk_sec: float = Field(0.3, ge=0.1, le=5)
    buffer_sec: float = Field(12.0, ge=2, le=MAX_AUDIO_SEC - 1)
    max_prompt_tokens: int = Field(0, ge=0, le=223)
