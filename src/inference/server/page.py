"""A web page to try models on: live captions, files, and two models side by side.

Everything stays between the browser and this process: no font, script or count comes from or goes to anywhere else.
`share=True` alone opens a tunnel through Gradio's servers.

Live captions go over the page's own requests, because a proxy such as Colab's may not pass WebSockets. gr.Audio can
stream a microphone too, but loses audio (Gradio 6.24, Chromium, 2026-11-28: of the first 8 s 1.0 to 3.0 s arrived). So
the page hears for itself (`templates/demo_live.js`): a message holds at most half a second, and the next one leaves
when the answer to the last has come. A slow server loses nothing, the backlog stays in the browser. But a recording
from which no message came for `ServerLimits.idle_sec` (30 s: its computer slept, its network was away) has ended: the
next answer gives the captions of what was heard until then, and what the browser still holds is not transcribed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from threading import Event as Flag
from typing import Any, cast

import numpy as np
from pydantic import Field

from src.data.audio import SAMPLE_RATE, Waveform, stream_audio
from src.data.vad import VoiceActivityDetector
from src.inference.captions import CaptionOptions, make_cues, to_srt, to_vtt
from src.inference.engine_base import Engine, transcribe
from src.inference.engines import load_engine
from src.inference.files.transcribe import BatchInference, Transcriptions
from src.inference.options import DecodingOptions
from src.inference.server.host import LOOPBACK, EngineInTurns, LiveHost, LiveSession, ServerLimits
from src.inference.server.protocol import StreamError, read_samples
from src.inference.server.served import AudioMessage, ServedPage, complaint
from src.inference.streaming.commit import Event
from src.inference.streaming.session import StreamingASR
from src.inference.words import Word
from src.utils.config import Config
from src.utils.errors import AudioError, ConfigError, MissingDependencyError, ModelError
from src.utils.languages import language_name, text_language

MAX_UPLOAD_SEC = 3600.0  # 230 MB of samples
CPU_BATCH = 1  # segments of a file in a turn: live captions wait for one, not for sixteen; on a CPU it is as fast
CONTEXTS = {"full": "padded to 30 s", "dynamic": "at the audio's own length"}
ModelSource = str | Path | Engine
NOBODY_WAITS: ContextVar[Flag | None] = ContextVar("NOBODY_WAITS", default=None)  # for the job of this context


class Demo(ServedPage):
    """The page of models; a model call that runs while it is closed comes to its end."""

    def __init__(self, page: Any, host: LiveHost, **address: Any) -> None:
        self.host = host
        super().__init__(page, ending=partial(host.worker.shutdown, wait=False, cancel_futures=True), **address)


def launch_demo(
    model: Any = None,
    processor: Any = None,
    *,
    config: Config | None = None,
    stock: ModelSource | None = None,
    models: Mapping[str, ModelSource] | None = None,
    share: bool = False,
    server_name: str = LOOPBACK,
    port: int | None = None,
    limits: ServerLimits | None = None,
    max_upload_sec: float = MAX_UPLOAD_SEC,
) -> Demo:
    """Serve the page, and show it below the cell of a notebook.

    Args:
        model: a `DynamicWhisper`, called "tuned" on the page; not needed with `models`.
        processor: its processor.
        config: `inference`, `streaming`, `model`, `vad` and `device`; by default the defaults of `Config`.
        stock: to compare with: a variant such as "tiny.en", a folder, or an engine.
        models: more of them, by the name that the page shows. The first model of all is chosen at the start.
        share: open a public address through Gradio's servers: whoever knows it can use the page, for a week at most.
        server_name: to listen on; only this machine reaches the default.
        port: None takes a free one from 7860 on.
        limits: of live captions.
        max_upload_sec: of a file.

    Raises:
        MissingDependencyError: gradio is absent.
        ModelError: no model, or what `load_engine` raises.
        ConfigError: the address or port is unavailable, or no tunnel can be opened.
    """
    if (model is None) != (processor is None) or (model is None and not models):
        raise ModelError("launch_demo needs a model and its processor, or models={name: folder}")
    try:
        from src.inference.server import page_layout
    except ImportError as err:
        raise MissingDependencyError(f"the web page needs gradio 6 ({err}): pip install gradio") from err
    config, host = config or Config(), LiveHost(limits)
    sources: dict[str, ModelSource] = {**(models or {}), **({} if stock is None else {"stock": stock})}
    if model is not None:
        from src.inference.torch_engine import TorchEngine

        sources = {"tuned": TorchEngine(model, processor)} | sources
    engines = {n: load_engine(each, config) if isinstance(each, str | Path) else each for n, each in sources.items()}
    backend = Backend(engines, config, host, max_upload_sec=max_upload_sec)
    page = page_layout.build_page(
        backend.about,
        hear=backend.live.answer,
        leave=backend.live.leave,
        transcribe=backend.transcribe,
        task=config.model.task,
    )
    return Demo(page, host, serve=page_layout.serve, share=share, server_name=server_name, port=port)


class Backend:
    """The models behind the page, by the name that it shows; it knows nothing of Gradio."""

    def __init__(self, engines: Mapping[str, Engine], config: Config, host: LiveHost, *, max_upload_sec: float) -> None:
        self._engines, self._config, self._max_upload_sec = engines, config, max_upload_sec

        def in_turn(call: Callable[[], Any]) -> Any:  # a file must not keep live captions waiting
            end_if_nobody_waits()
            return host.worker.submit(call).result()

        self._vad = VoiceActivityDetector(config.vad)
        self.live = LiveTabs(host, self._make_session, task=config.model.task)
        self.about: dict[str, str] = {}  # how each model computes
        self._batches: dict[str, BatchInference] = {}
        for name, engine in engines.items():
            transcribe(engine, [np.zeros(SAMPLE_RATE, np.float32)], DecodingOptions(language="en"))  # the first is slow
            self.about[name] = f"{engine.name}, {engine.precision} on {engine.device}, {CONTEXTS[engine.audio_context]}"
            short = {"batch_size": CPU_BATCH} if engine.device == "cpu" else {}
            settings = config.model_copy(update={"inference": config.inference.model_copy(update=short)})
            in_turns = cast(Engine, EngineInTurns(engine, in_turn))
            self._batches[name] = BatchInference(config=settings, engine=in_turns, vad=self._vad)

    def _make_session(self, model: str) -> StreamingASR:
        if model not in self._engines:
            raise ConfigError(f"model {model!r} is not on this page; known: {', '.join(self._engines)}")
        return StreamingASR(engine=self._engines[model], vad=self._vad, config=self._config)

    def transcribe(self, path: str | None, *models: str, gone: Flag | None = None) -> list[Transcriptions]:
        """Transcribe an upload with one model after the other, so that their times compare; silence is allowed.

        Once `gone` is set, nobody waits for it, and it ends with an AudioError.
        """
        NOBODY_WAITS.set(gone)
        if path is None:
            raise AudioError("no recording yet: upload one, or record it")
        audio = read_upload(Path(path), max_sec=self._max_upload_sec)
        return [self._batches[model].transcribe_batch([audio], word_timestamps=True) for model in models]


def end_if_nobody_waits() -> None:
    """Raise an AudioError in a job whose tab has gone."""
    if (gone := NOBODY_WAITS.get()) is not None and gone.is_set():
        raise AudioError("the tab that asked for this transcript has gone")


def read_upload(path: Path, *, max_sec: float) -> Waveform:
    """Decode an upload to (T,) float32 at 16 kHz; silence is allowed, more than `max_sec` is an AudioError."""
    blocks, samples = [], 0
    for block in stream_audio(path, name=path.name):
        end_if_nobody_waits()
        blocks.append(block)
        samples += len(block)
        if samples > max_sec * SAMPLE_RATE:
            raise AudioError(
                f"{path.name}: longer than {max_sec / 60:g} minutes, the most that this page takes; "
                "scripts/transcribe.py transcribes recordings of any length"
            )
    return np.concatenate(blocks)


class LiveMessage(AudioMessage):
    """A message of a tab."""

    tab: str = Field(min_length=1, max_length=100)
    model: str


class LiveTabs:
    """Recordings that are under way, at most one per tab: an adapter between the page's requests and `host`."""

    def __init__(
        self, host: LiveHost, make_session: Callable[[str], StreamingASR], *, task: str = "transcribe"
    ) -> None:
        self._host, self._make_session, self._task = host, make_session, task
        self._tabs: dict[str, LiveSession] = {}
        self._heard: set[str] = set()  # tabs whose message is not answered yet

    async def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Hear a message; the answer is `error` alone if the recording is over by it.

        Else it has the `events`, the `audio_sec` heard, and the name of the `language` of the newest if it is known; at
        the end of the recording `srt`, `vtt`, and a `note` if a limit ended it.
        """
        try:
            valid = LiveMessage.read(message)
        except StreamError as err:
            return {"error": complaint(err)}
        if valid.tab in self._heard:
            return {"error": "the last message of this tab is not answered yet; wait for it, and press Start again"}
        self._heard.add(valid.tab)
        try:
            return await self._hear(valid)
        except Exception as err:  # noqa: BLE001 - the page's boundary: one recording fails, the others go on
            self.leave(valid.tab)
            return {"error": complaint(err)}
        finally:
            self._heard.discard(valid.tab)

    def leave(self, tab: str) -> None:
        """Free a tab's session, if it has one."""
        if (live := self._tabs.pop(tab, None)) is not None:
            live.close()

    async def _hear(self, message: LiveMessage) -> dict[str, Any]:
        samples = read_samples(message.decoded(), "s16le")
        if message.first:
            await self._begin(message)
        if (live := self._tabs.get(message.tab)) is None:
            silent = f"nothing came for {self._host.limits.idle_sec:g} s, or the connection was lost"
            raise StreamError("idle", f"this recording has ended: {silent}", fix="press Start again")
        if message.rate != live.sample_rate:
            mixed = f"{message.rate} Hz in a recording of {live.sample_rate} Hz"
            raise StreamError("bad_audio", mixed, fix="press Start again")
        events = await live.hear(samples)
        if message.last:
            live.end("end")
        reply: dict[str, Any] = {}
        if live.is_over():
            while (more := await live.next_events()) is not None:
                events += more
            self.leave(message.tab)
            options = [CaptionOptions.of(text_language(live.language, self._task))] if live.language else []
            cues = await asyncio.to_thread(make_cues, live.session.words, *options)
            reply = {"srt": to_srt(cues), "vtt": to_vtt(cues)}
        if isinstance(live.ending, StreamError):
            reply["note"] = f"This recording has ended: {live.ending.message}; press Start for another."
        language = {"language": language_name(live.language)} if live.language else {}
        return {"events": _on_page(events), "audio_sec": live.session.audio_sec, **language, **reply}

    async def _begin(self, message: LiveMessage) -> None:
        for tab, live in list(self._tabs.items()):
            if tab == message.tab or live.is_over():  # its last recording, and those that fell silent
                self.leave(tab)
        live = await self._host.open(partial(self._make_session, message.model), message.rate)
        self.leave(message.tab)  # its page may have sent two at once
        self._tabs[message.tab] = live


def _on_page(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return events as they travel, words with the space before them."""

    def on_page(word: Word) -> dict[str, Any]:
        return {"text": " " * word.space + word.text, "start": word.start_sec, "end": word.end_sec}

    return [{"kind": event.kind, "words": [on_page(word) for word in event.words]} for event in events]
