"""Live captions of a web page: a session for each tab, fed by its messages.

gr.Audio can stream a microphone too, but loses audio: of the first 8 s that it recorded it delivered 1.0 to 3.0 s, and
never what came after the last full piece before Stop (Gradio 6.24, Chromium, loopback, 2026-11-28). So the page hears
for itself (`templates/demo_live.js`): a message holds at most half a second, and the next one leaves when the answer to
the last has come. Nothing is lost, and tabs go round. Samples and events are those of `src.inference.server.protocol`.
"""

from __future__ import annotations

import base64
import binascii
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from src.data.audio import Waveform
from src.inference.captions import make_cues, spaced, to_srt, to_vtt
from src.inference.server.connection import ServerLimits
from src.inference.server.protocol import MAX_WIRE_RATE, MIN_WIRE_RATE, LiveEvent, StreamError, read_samples
from src.inference.streaming.commit import Event
from src.inference.streaming.session import StreamingSession
from src.utils.errors import WhisperASRError, first_line

logger = logging.getLogger(__name__)

MAX_CHARS = 1 << 18  # of a message's audio: 1 s of int16 at the highest rate, in base64


class LiveMessage(BaseModel):
    """What a tab says.

    Attributes:
        tab: who it is.
        model: one of the page's, by name.
        rate: of the samples, Hz.
        pcm: one channel of "s16le", base64.
        first, last: whether a recording begins, or ends, with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tab: str = Field(min_length=1, max_length=100)
    model: str
    rate: int = Field(ge=MIN_WIRE_RATE, le=MAX_WIRE_RATE)
    pcm: str = Field(max_length=MAX_CHARS)
    first: bool = False
    last: bool = False


@dataclass
class _Recording:
    """A session in use."""

    session: StreamingSession
    model: str
    heard_at: float
    newest: str = ""  # final word
    turn: Lock = field(default_factory=Lock)


class LiveSessions:
    """The recordings that are under way, one a tab at most.

    Args:
        make_session: makes a session for a model, by its name; a `ConfigError` of it is the client's.
        limits: `max_sessions`, `max_session_sec`, and `idle_sec`, after which a recording that sends nothing gives
            way to others.
        clock: seconds, monotone.
    """

    def __init__(
        self,
        make_session: Callable[[str], StreamingSession],
        *,
        limits: ServerLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make_session, self._limits, self._clock = make_session, limits or ServerLimits(), clock
        self._recordings: dict[str, _Recording] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._recordings)

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Hear a message.

        Returns: `events` as they travel and `audio_sec` heard; when the recording ends `srt` and `vtt`, and a `note`
            if it ended at its limit. Or `error` alone, and the recording is over.
        """
        try:
            return self.hear(LiveMessage.model_validate(message))
        except ValidationError as err:
            return {"error": f"not a message of this page: {err.errors()[0]['msg']}; reload the page"}
        except WhisperASRError as err:
            return {"error": first_line(err)}
        except Exception as err:  # the thread's boundary: one recording fails, the others go on
            logger.exception("a recording failed")
            return {"error": f"{type(err).__name__}: {first_line(err)}; the server's log has the traceback"}

    def hear(self, message: LiveMessage) -> dict[str, Any]:
        """As `answer`.

        Raises: StreamError: all sessions are taken, or this one has ended; no audio, or too much of it. What the
            session raises.
        """
        samples = read_samples(_decoded(message.pcm), "s16le")
        recording = self._begin(message) if message.first else self._find(message.tab)
        try:
            with recording.turn:
                return self._hear(recording, samples, message)
        except Exception:
            self.leave(message.tab)
            raise
        finally:
            recording.heard_at = self._clock()

    def leave(self, tab: str) -> None:
        """Free a tab's session, if it has one."""
        with self._lock:
            self._recordings.pop(tab, None)

    def _hear(self, recording: _Recording, samples: Waveform, message: LiveMessage) -> dict[str, Any]:
        session, limit_sec = recording.session, self._limits.max_session_sec
        session.sharers = sum(each.model == recording.model for each in list(self._recordings.values()))
        events = session.feed(samples, message.rate)
        is_full = session.audio_sec >= limit_sec
        if message.last or is_full:
            self.leave(message.tab)
            events += session.flush()
        reply: dict[str, Any] = {"events": _on_page(events, recording), "audio_sec": session.audio_sec}
        if message.last or is_full:
            cues = make_cues(session.words)
            reply |= {"srt": to_srt(cues), "vtt": to_vtt(cues)}
        if is_full and not message.last:
            reply["note"] = f"A recording ends after {limit_sec / 60:g} minutes here; press Start for another."
        return reply

    def _begin(self, message: LiveMessage) -> _Recording:
        recording = _Recording(self._make_session(message.model), message.model, self._clock())
        with self._lock:
            self._recordings.pop(message.tab, None)
            for tab, each in list(self._recordings.items()):
                if self._clock() - each.heard_at > self._limits.idle_sec and not each.turn.locked():
                    del self._recordings[tab]
            if len(self._recordings) >= self._limits.max_sessions:
                raise StreamError(
                    "too_many_sessions", f"all {self._limits.max_sessions} sessions are taken", fix="try again later"
                )
            self._recordings[message.tab] = recording
        return recording

    def _find(self, tab: str) -> _Recording:
        try:
            return self._recordings[tab]
        except KeyError as err:
            silent = f"nothing came for {self._limits.idle_sec:g} s, or the connection was lost"
            raise StreamError("idle", f"this recording has ended: {silent}", fix="press Start again") from err


def _on_page(events: Sequence[Event], recording: _Recording) -> list[dict[str, Any]]:
    """Return events as they travel; a word's text begins with the space before it, if there is one."""
    found = []
    for event in events:
        fields = LiveEvent.of(event, lag_sec=0.0).model_dump()
        texts = [word.text for word in event.words]
        for word, text in zip(fields["words"], spaced([recording.newest, *texts])[1:], strict=True):
            word["text"] = text
        if event.kind == "commit":
            recording.newest = texts[-1]
        found.append(fields)
    return found


def _decoded(pcm: str) -> bytes:
    try:
        return base64.b64decode(pcm, validate=True)
    except binascii.Error as err:
        raise StreamError("bad_audio", f"the audio is not base64: {err}", fix="reload the page") from err
