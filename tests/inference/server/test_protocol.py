"""What travels between caption client and server, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.inference.server.protocol import (
    End,
    Hello,
    LiveEvent,
    StreamError,
    read_client,
    read_samples,
    read_server,
    write_samples,
)  # fmt: skip
from src.inference.streaming.commit import Event
from src.inference.words import Word, join_words


def test_float_samples_arrive_unchanged_and_integers_clipped_and_to_half_a_step() -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, 1_000).astype(np.float32)
    assert np.array_equal(read_samples(write_samples(samples, "f32le"), "f32le"), samples)
    heard = read_samples(write_samples(samples, "s16le"), "s16le")
    assert heard.dtype == np.float32
    assert np.abs(heard - samples).max() <= 0.5 / 32_768 + 1e-7
    loud = np.array([-3.0, -1.0, 1.0, 3.0], dtype=np.float32)
    assert write_samples(loud, "s16le") == np.array([-32_768, -32_768, 32_767, 32_767], dtype="<i2").tobytes()


def test_bytes_that_are_no_audio_are_refused() -> None:
    integers = np.arange(1_000, dtype="<f4")  # sent as floats
    floats = [np.array([0.1, np.nan], "<f4"), np.array([0.1, -np.inf], "<f4"), integers]
    for message in (b"\0" * 6, *(each.tobytes() for each in floats)):
        with pytest.raises(StreamError, match="samples"):
            read_samples(message, "f32le")
    with pytest.raises(StreamError, match="whole number of s16le samples"):
        read_samples(b"\0", "s16le")


def test_hello_has_defaults_and_hides_its_token() -> None:
    assert read_client('{"type": "hello"}', Hello) == Hello()
    hello = Hello(sample_rate=48_000, format="s16le", language="de", token="secret")
    assert read_client(hello.to_text(), Hello) == hello
    assert "secret" not in repr(hello)


@pytest.mark.parametrize("text", [
    json.dumps({"type": "hello", **{f"key{i}": i for i in range(10_000)}}), "", "[" * 100_000, "{}",
    '{"type": "end"}', '{"type": "hello", "version": 2}', '{"type": "hello", "sample_rate": 1}',
    '{"type": "hello", "sample_rate": "16000"}', '{"type": "hello", "sample_rate": NaN}',
    '{"type": "hello", "format": "mp3"}', '{"type": "hello", "rate": 16000}',
])  # fmt: skip
def test_anything_but_a_hello_of_this_version_is_refused(text: str) -> None:
    with pytest.raises(StreamError) as caught:
        read_client(text, Hello)
    assert caught.value.code == "bad_message"
    assert len(str(caught.value)) < 1_000


@given(st.text())
def test_no_text_breaks_the_readers_and_only_end_ends(text: str) -> None:
    for read in (lambda text: read_client(text, Hello), lambda text: read_client(text, End), read_server):
        with pytest.raises(StreamError):
            read(text)
    assert read_client(End().to_text(), End) == End()


def test_an_event_arrives_as_it_was() -> None:
    words = (Word("Grüße,", 0.1, 1 / 3, 0.9), Word("世", 1 / 3, 1.0, 1.0), Word("界", 1.0, 2.0, 1.0, space=False))
    event = Event("commit", words, "Grüße, 世界", 2.5, 12_345.678_901, 7, "zh")
    received = read_server(LiveEvent.of(event, lag_sec=0.5).to_text())
    assert isinstance(received, LiveEvent)
    assert (received.event, received.lag_sec) == (event, 0.5)
    assert [word.space for word in received.event.words] == [True, True, False]
    assert join_words(received.event.words) == event.text
