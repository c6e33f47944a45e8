"""The audio buffer: bounded, and always at the right time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data.audio import SAMPLE_RATE
from src.inference.streaming.buffer import AudioBuffer
from src.utils.errors import AudioError


@given(st.lists(st.tuples(st.integers(0, 1_600), st.integers(0, 2_000)), max_size=60))
def test_a_view_is_the_stream_between_its_times(script: list[tuple[int, int]]) -> None:
    buffer = AudioBuffer(0.2)
    heard = np.zeros(0, np.float32)
    for size, drop in script:
        if size > buffer.free_samples:
            buffer.trim_to(buffer.end_sec - (buffer.capacity_samples - size) / SAMPLE_RATE)
        piece = np.arange(len(heard), len(heard) + size, dtype=np.float32)
        heard = np.concatenate([heard, piece])
        buffer.append(piece)
        buffer.trim_to(buffer.start_sec + drop / SAMPLE_RATE)
        view, start_sec = buffer.view()
        start = round(start_sec * SAMPLE_RATE)
        np.testing.assert_array_equal(view, heard[start:])
        assert buffer.end_sec == pytest.approx(len(heard) / SAMPLE_RATE)
        assert buffer.duration_sec <= 0.2


def test_memory_stays_the_same_over_ten_minutes() -> None:
    buffer = AudioBuffer(2.0)
    memory = buffer._memory
    for _ in range(600):
        buffer.trim_to(buffer.end_sec - 1.0)
        buffer.append(np.ones(SAMPLE_RATE, np.float32))
    assert buffer._memory is memory
    assert buffer.end_sec == 600.0
    assert buffer.view()[0].dtype == np.float32


def test_overflow_raises_and_loses_nothing() -> None:
    buffer = AudioBuffer(1.0)
    buffer.append(np.ones(SAMPLE_RATE - 1, np.float32))
    with pytest.raises(AudioError, match="1 of 16000 are free"):
        buffer.append(np.ones(2, np.float32))
    assert len(buffer.view()[0]) == SAMPLE_RATE - 1


def test_trim_outside_the_buffer_keeps_or_drops_all() -> None:
    buffer = AudioBuffer(1.0)
    buffer.append(np.ones(8_000, np.float32))
    buffer.trim_to(-3.0)
    assert buffer.duration_sec == 0.5
    buffer.trim_to(99.0)
    assert (buffer.duration_sec, buffer.start_sec, buffer.end_sec) == (0.0, 0.5, 0.5)


def test_a_view_cannot_be_written() -> None:
    buffer = AudioBuffer(1.0)
    buffer.append(np.ones(10, np.float32))
    with pytest.raises(ValueError, match="read-only"):
        buffer.view()[0][0] = 2.0


def test_a_buffer_without_capacity_is_refused() -> None:
    with pytest.raises(AudioError, match="above 0"):
        AudioBuffer(0.0)
