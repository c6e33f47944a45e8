"""What the web page asks of the models; it knows nothing of Gradio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.data.audio import SAMPLE_RATE
from src.data.vad import VoiceActivityDetector
from src.inference.engines import Engine, transcribe
from src.inference.files.transcribe import BatchInference
from src.inference.options import DecodingOptions
from src.inference.server.connection import ServerLimits
from src.inference.server.page_files import compare_models, read_upload, transcribe_upload
from src.inference.server.page_live import LiveSessions
from src.inference.server.page_views import comparison_html, transcript_html
from src.inference.streaming.session import StreamingSession
from src.utils.config import Config
from src.utils.errors import AudioError, ConfigError

CPU_BATCH = 1  # segments of a file in a turn: live captions wait for one, not for sixteen; on a CPU it is as fast
CONTEXTS = {"full": "padded to 30 s", "dynamic": "at the audio's own length"}


@dataclass(frozen=True)
class Backend:
    """What the page asks.

    Attributes:
        about: how each model computes, by its name.
        batches: for files.
        live: for microphones.
        max_upload_sec: of a file.
    """

    about: Mapping[str, str]
    batches: Mapping[str, BatchInference]
    live: LiveSessions
    max_upload_sec: float

    def transcribe(self, path: str | None, model: str) -> str | None:
        """Return an upload's transcript as HTML; None for silence."""
        audio_path = _chosen(path)
        done = transcribe_upload(read_upload(audio_path, max_sec=self.max_upload_sec), model, self.batches[model])
        return transcript_html(done, audio_path.stem) if done.words else None

    def compare(self, path: str | None, first: str, second: str) -> str | None:
        """Return the transcripts of two models as HTML; None where neither finds words."""
        audio = read_upload(_chosen(path), max_sec=self.max_upload_sec)
        done = compare_models(audio, [(name, self.batches[name]) for name in (first, second)])
        return comparison_html(*done) if any(each.words for each in done) else None


def make_backend(
    engines: Mapping[str, Engine], config: Config, *, limits: ServerLimits | None = None, max_upload_sec: float
) -> Backend:
    """Warm the engines up, and put before them what the page needs.

    Args: engines: by the name that the page shows, at least one; several threads call them at once.
    """
    vad = VoiceActivityDetector(config.vad)

    def make_session(name: str) -> StreamingSession:
        if name not in engines:
            raise ConfigError(f"model {name!r} is not on this page; known: {', '.join(engines)}")
        return StreamingSession(engine=engines[name], vad=vad, config=config)

    for engine in engines.values():
        transcribe(engine, [np.zeros(SAMPLE_RATE, np.float32)], DecodingOptions(language="en"))  # the first is slow
    return Backend(
        about={
            name: f"{e.name}, {e.precision} on {e.device}, {CONTEXTS[e.audio_context]}" for name, e in engines.items()
        },
        batches={name: BatchInference(config=_by_turns(config, e), engine=e, vad=vad) for name, e in engines.items()},
        live=LiveSessions(make_session, limits=limits),
        max_upload_sec=max_upload_sec,
    )


def _by_turns(config: Config, engine: Engine) -> Config:
    """Return the configuration with batches that take a short turn."""
    if engine.device != "cpu":
        return config
    return config.model_copy(update={"inference": config.inference.model_copy(update={"batch_size": CPU_BATCH})})


def _chosen(path: str | None) -> Path:
    if path is None:
        raise AudioError("no recording yet: upload one, or record it")
    return Path(path)
