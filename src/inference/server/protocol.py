"""The wire format of live captions over a WebSocket, version 1.

The client sends
1. optionally, as its first message, text: `{"type": "hello", "version": 1, "sample_rate": 16000, "format": "f32le",
   "language": "en", "model": "tuned", "token": "..."}`. All but `type` may be left out. `language` is a mark that
   `parse_language` takes, or "auto": the checkpoint's own, else detected. Without it the server's own setting holds.
   `model` is one of those that the server names; without it, the first. `token` is for browsers, which cannot send
   the header `Authorization: Bearer TOKEN`.
2. binary messages: any number of samples of one channel, in the format that hello named: "f32le" in [-1, 1], or
   "s16le".
3. text: `{"type": "end"}`. What was sent is then decoded to its end; closing the connection instead discards it.

The server sends text, JSON objects with a `kind`:
- "ready", after hello or the first audio: `version`, `sample_rate`, `format`, and its limits `max_message_bytes`,
  `queue_sec`, `idle_sec`, `max_session_sec`.
- "partial", "commit", "final": an `Event`, words as `{text, start, end, probability, space}`, times in seconds since
  the first sample. `space` of a word, and of the event, says whether a space separates it from the text before it,
  across events too: commits joined by it are the transcript. `language` is what the words were decoded in; left out for
  an English-only model. `emitted_at` is a monotone clock of the server, in seconds: only differences mean something.
  `lag_sec` is audio that the server has received and not heard yet.
- "done", the last message: `reason` ("end", or "shutdown" of the server), `text`: all commits, their `language`, and
  the `audio_sec` heard.
- "error", the last message instead: `code`, `message`, `fix`, and `audio_sec` heard where a session had begun. The
  connection closes with `CLOSE_CODES[code]`.

A server that is `queue_sec` behind stops reading until it has caught up, pings included: clients should wait for
events, not for pongs. While it has several clients it hears each at most a little faster than real time. A first
message must come within seconds unless the token is in the header; `idle_sec` without audio, or with less than a tenth
of real time, ends a session. More than 100 pings and fragments per second end the connection.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from src.data.audio import MAX_PEAK, SAMPLE_RATE, Waveform
from src.inference.streaming.commit import Event
from src.inference.words import Word
from src.utils.errors import WhisperASRError

MIN_WIRE_RATE, MAX_WIRE_RATE = 8_000, 96_000  # Hz: telephony, studio; bounds what a second of backlog may hold
FULL_SCALE = 32_768  # of int16
MAX_PROBLEMS = 5  # named in an error; a message may have thousands

SampleFormat = Literal["f32le", "s16le"]
DTYPES: dict[SampleFormat, str] = {"f32le": "<f4", "s16le": "<i2"}
CLOSE_CODES = {  # RFC 6455, 7.4.1; 1013 of the IANA registry: try again later
    "bad_message": 1007,
    "bad_audio": 1007,
    "unauthorized": 1008,
    "idle": 1008,
    "session_too_long": 1008,
    "message_too_big": 1009,
    "too_many_sessions": 1013,
    "shutdown": 1001,
    "engine_failed": 1011,
}
_ORDER = 'send {"type": "hello", ...} first if at all, then binary audio, then {"type": "end"}'
T = TypeVar("T")


class StreamError(WhisperASRError):
    """A live session was refused, or ended before its audio did, of which `audio_sec` was heard: None, if none began.

    `code` is a key of `CLOSE_CODES`, or "unreachable", "refused" or "lost" of the client.
    """

    def __init__(self, code: str, message: str, *, fix: str, audio_sec: float | None = None) -> None:
        super().__init__(f"{message}; {fix}")
        self.code, self.message, self.fix, self.audio_sec = code, message, fix, audio_sec


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def to_text(self) -> str:
        """Return the JSON that travels; unset fields do not."""
        return self.model_dump_json(exclude_none=True)


class Hello(_Message):
    """What the audio is, and who sends it."""

    type: Literal["hello"] = "hello"
    version: Literal[1] = 1
    sample_rate: int = Field(SAMPLE_RATE, ge=MIN_WIRE_RATE, le=MAX_WIRE_RATE)
    format: SampleFormat = "f32le"
    language: str | None = None
    model: str | None = None
    token: str | None = Field(None, repr=False)


class End(_Message):
    """The audio is complete."""

    type: Literal["end"] = "end"


class Ready(_Message):
    """The session has begun; audio may come."""

    kind: Literal["ready"] = "ready"
    version: Literal[1] = 1
    sample_rate: int
    format: SampleFormat
    max_message_bytes: int
    queue_sec: float
    idle_sec: float
    max_session_sec: float


class WireWord(_Message):
    """A word, in seconds since the first sample."""

    text: str
    start: float
    end: float
    probability: float
    space: bool = True


class LiveEvent(_Message):
    """An event of the session, and how far the server was behind when it sent it."""

    kind: Literal["partial", "commit", "final"]
    sequence: int
    text: str
    space: bool = True
    words: tuple[WireWord, ...]
    audio_sec: float
    emitted_at: float
    lag_sec: float
    language: str | None = None

    @classmethod
    def of(cls, event: Event, *, lag_sec: float) -> Self:
        """Wrap an event for the wire."""
        words = tuple(
            WireWord(text=w.text, start=w.start_sec, end=w.end_sec, probability=w.probability, space=w.space)
            for w in event.words
        )
        return cls(**{**vars(event), "words": words}, space=event.space, lag_sec=lag_sec)

    @property
    def event(self) -> Event:
        """The event as the session emitted it."""
        words = tuple(Word(w.text, w.start, w.end, w.probability, space=w.space) for w in self.words)
        return Event(self.kind, words, self.text, self.audio_sec, self.emitted_at, self.sequence, self.language)


class Done(_Message):
    """The session is complete."""

    kind: Literal["done"] = "done"
    reason: Literal["end", "shutdown"]
    text: str
    audio_sec: float
    language: str | None = None


class Failure(_Message):
    """A `StreamError` on the wire."""

    kind: Literal["error"] = "error"
    code: str
    message: str
    fix: str
    audio_sec: float | None = None


ServerMessage = Ready | LiveEvent | Done | Failure
_CLIENT: TypeAdapter[Hello | End] = TypeAdapter(Annotated[Hello | End, Field(discriminator="type")])
_SERVER: TypeAdapter[ServerMessage] = TypeAdapter(Annotated[ServerMessage, Field(discriminator="kind")])


def read_client(text: str, expected: type[T]) -> T:
    """Read a text message of a client: `Hello` as its first one, `End` as its last; else raise StreamError."""
    message = _read(_CLIENT, text, fix=_ORDER)
    if not isinstance(message, expected):
        raise StreamError("bad_message", f"not understood: {message.type!r} at the wrong time", fix=_ORDER)
    return message


def read_server(text: str) -> ServerMessage:
    """Read a message of the server; raise StreamError if it is none of this version."""
    return _read(_SERVER, text, fix="connect to a caption server of the same version")


def _read(adapter: TypeAdapter[T], text: str, *, fix: str) -> T:
    try:
        return adapter.validate_json(text)
    except ValidationError as err:
        problems = [f"{'.'.join(map(str, each['loc'])) or 'message'}: {each['msg']}" for each in err.errors()]
        raise StreamError("bad_message", f"not understood: {'; '.join(problems[:MAX_PROBLEMS])}", fix=fix) from err


def read_samples(message: bytes, sample_format: SampleFormat) -> Waveform:
    """Decode a binary message to (T,) float32; half a sample, or floats that are not audio, raise StreamError."""
    dtype = np.dtype(DTYPES[sample_format])
    if len(message) % dtype.itemsize:
        wrong = f"{len(message)} bytes are not a whole number of {sample_format} samples"
        fix = f"send a multiple of {dtype.itemsize} bytes, and name the format in hello"
        raise StreamError("bad_audio", wrong, fix=fix)
    samples = np.frombuffer(message, dtype).astype(np.float32)
    if sample_format == "s16le":
        return samples / FULL_SCALE
    peak = float(np.abs(samples).max(initial=0.0))
    if not peak <= MAX_PEAK:  # NaN is not
        fix = "divide integers by their full scale, or name the format in hello"
        raise StreamError("bad_audio", f"samples up to {peak:.3g}, floats belong in [-1, 1]", fix=fix)
    return samples


def write_samples(samples: Waveform, sample_format: SampleFormat) -> bytes:
    """Encode (T,) float32 for a binary message; "s16le" clips it to [-1, 1]."""
    if sample_format == "s16le":
        samples = (samples * FULL_SCALE).round().clip(-FULL_SCALE, FULL_SCALE - 1)
    return samples.astype(DTYPES[sample_format]).tobytes()
