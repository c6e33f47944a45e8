"""OpenAI's API for files: `POST /v1/audio/transcriptions` and `/v1/audio/translations`, `GET /v1/models`, `/health`.

Requests are multipart forms (https://platform.openai.com/docs/api-reference/audio). A file goes to a temporary folder,
under a name of ours, while it arrives; threads read and cut it, and their calls of the model run between the turns of
live sessions (`host`). What is wrong is answered as OpenAI does, `{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from src.data.audio import Waveform, stream_audio
from src.inference.captions import to_srt, to_vtt
from src.inference.engine_base import Engine
from src.inference.files.transcribe import BatchInference, Transcription
from src.inference.server.host import EngineInTurns, LiveHost, ServedModel
from src.utils.config import Config
from src.utils.errors import AudioError, DeviceError, WhisperASRError, first_line, visible
from src.utils.languages import language_name, space_between

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "whisper-1"  # what clients of OpenAI ask for: the first model
FILES_AT_ONCE = 2  # one is read and cut while the model hears the other
MAX_PARTS, MAX_FIELD_BYTES = 32, 1 << 14  # of a form; a prompt has at most 223 tokens
BODY_SEC, BODY_BYTES_PER_SEC = 10.0, 8192  # a form may take so long, and longer as it arrives at this rate
CHUNK_BYTES = 1 << 16
RETRY_SEC = 5  # after which a client that was refused may try again
# What the model hears at once: live sessions wait for one call. On a CPU a batch takes as long as its clips one by one.
BATCH = {"cpu": 1, "cuda": 8}
AUDIO_PATHS = {"/v1/audio/transcriptions": "transcribe", "/v1/audio/translations": "translate"}
ARRAYS = frozenset({"timestamp_granularities", "keywords"})
T = TypeVar("T")
Serve = Callable[[Callable[[Exception], object] | None], None]


class ApiError(WhisperASRError):
    """A request that is refused, or failed: `param` is the field of the form that is wrong, `code` is for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def content(self) -> dict[str, Any]:
        """What OpenAI's clients read."""
        kinds = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str]) -> web.Response:
        """Return the answer to the request."""
        own = {name.replace("_", "-"): value for name, value in self.headers.items()}
        return web.json_response(self.content, status=self.status, headers={**headers, **own})


def wrong_token(wrong: str) -> ApiError:
    """Return why a client without the token, or with a wrong one, is refused."""
    fix = "send Authorization: Bearer TOKEN"
    return ApiError(401, f"{wrong}; {fix}", code="invalid_api_key", WWW_Authenticate="Bearer")


class _Form(BaseModel):
    """The fields of a request, but for its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    language: str | None = None
    prompt: str | None = None
    keywords: tuple[str, ...] = ()
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: float = Field(0.0, ge=0.0, le=1.0)
    timestamp_granularities: tuple[Literal["word", "segment"], ...] = ()
    stream: bool = False
    chunking_strategy: Literal["auto"] = "auto"  # recordings are always cut at silences

    @classmethod
    def of(cls, fields: Mapping[str, list[str]]) -> _Form:
        """Read fields; an ApiError names the one that is wrong."""
        given: dict[str, Any] = {}
        for name, values in fields.items():
            if name not in ARRAYS and len(values) > 1:
                raise ApiError(400, f"{name} is given {len(values)} times; give it once", param=name)
            given[name] = values if name in ARRAYS else values[0]
        try:
            form = cls.model_validate({name: value for name, value in given.items() if value != ""})
        except ValidationError as err:
            problem = err.errors()[0]
            name = str(problem["loc"][0])
            if problem["type"] == "missing":
                raise ApiError(400, f"you must provide a {name} parameter", param=name) from err
            if problem["type"] == "extra_forbidden":
                unknown = f"unknown or unsupported parameter: {visible(name)[:100]!r}"
                raise ApiError(400, unknown, param=name[:100], code="unknown_parameter") from err
            raise ApiError(400, f"{name}: {problem['msg']}", param=name, code="invalid_value") from err
        if form.timestamp_granularities and form.response_format != "verbose_json":
            wrong = "timestamp_granularities need response_format verbose_json"
            raise ApiError(400, wrong, param="timestamp_granularities")
        if form.stream and form.response_format not in ("json", "text"):
            raise ApiError(400, f"stream gives json, not {form.response_format}; leave one of them out", param="stream")
        return form

    @property
    def words(self) -> bool:
        """Whether the times of words are needed."""
        return "word" in self.timestamp_granularities or self.response_format in ("srt", "vtt")


class SpeechApi:
    """Answers requests for the texts of files, with the models of a server and on its host."""

    def __init__(self, models: Mapping[str, ServedModel], host: LiveHost) -> None:
        self._models, self._host = models, host
        self._files = ThreadPoolExecutor(FILES_AT_ONCE, "files")
        self._jobs: set[_Job] = set()
        self._created = int(time.time())
        self._is_stopping = False

    def stop(self) -> None:
        """Refuse what comes, and what is there."""
        self._is_stopping = True
        for job in self._jobs:
            job.fail(_stopping())
        self._files.shutdown(wait=False, cancel_futures=True)

    async def answer(
        self, request: web.BaseRequest, headers: Mapping[str, str], *, is_known: bool, serve: Serve
    ) -> web.StreamResponse:
        """Answer a request, with `headers` for its page.

        A client that is not known is told of the server's health only. `serve` takes what is to be called if the
        client leaves. Refusals are ApiErrors.
        """
        path = request.path.rstrip("/")
        allowed = "POST" if path in AUDIO_PATHS else "GET, HEAD"
        if request.method == "OPTIONS" and headers:  # asked by a browser before a page may ask
            methods = {"Access-Control-Allow-Methods": allowed, "Access-Control-Allow-Headers": "*, Authorization"}
            return web.Response(status=204, headers={**headers, **methods, "Access-Control-Max-Age": "600"})
        if path != "/health" and not is_known:
            raise wrong_token("no token")
        if path not in ("/health", "/v1/models", *AUDIO_PATHS) and not path.startswith("/v1/models/"):
            raise ApiError(404, f"unknown address: {request.method} {visible(path)[:200]}", code="unknown_url")
        if request.method not in allowed.split(", "):
            raise ApiError(405, f"{path} takes {allowed}, not {request.method[:20]}", Allow=allowed)
        if path in AUDIO_PATHS:
            return await self._transcribe(request, headers, serve, AUDIO_PATHS[path])
        if path == "/health":
            if self._is_stopping:
                raise _stopping()
            return web.json_response({"status": "ok"}, headers=headers)
        said = {"object": "model", "created": self._created, "owned_by": "whisper-asr"}
        models = {name: {"id": name, **said} for name in ([*self._models, DEFAULT_MODEL] if self._models else [])}
        if path == "/v1/models":
            return web.json_response({"object": "list", "data": list(models.values())}, headers=headers)
        name = path.removeprefix("/v1/models/")
        self._model(name)
        return web.json_response(models[name], headers=headers)

    def _model(self, name: str) -> ServedModel:
        model = self._models.get(name) or (next(iter(self._models.values()), None) if name == DEFAULT_MODEL else None)
        if model is None:
            known = f"known: {', '.join(self._models)}" if self._models else "this server has live captions only"
            wrong = f"the model {visible(name)[:100]!r} does not exist; {known}"
            raise ApiError(404, wrong, param="model", code="model_not_found")
        return model

    async def _transcribe(
        self, request: web.BaseRequest, headers: Mapping[str, str], serve: Serve, task: str
    ) -> web.StreamResponse:
        """Take a form and its file, and answer with the text."""
        limits = self._host.limits
        if self._is_stopping:
            raise _stopping()
        if len(self._jobs) >= limits.max_files:
            busy = f"{limits.max_files} files are being sent or transcribed; try again later"
            raise ApiError(429, busy, code="rate_limit_exceeded", Retry_After=str(RETRY_SEC))
        job = _Job(self._host)
        self._jobs.add(job)
        serve(job.fail)
        try:
            with tempfile.TemporaryDirectory(prefix="whisper_asr_upload_") as folder:
                path = Path(folder, "upload")
                form = _Form.of(await job.unless_failed(_read_form(request, path, limits.max_file_bytes)))
                deltas: asyncio.Queue[str | None] = asyncio.Queue()
                work = self._work(job, form, path, task, deltas)
                running = asyncio.wrap_future(self._files.submit(work))
                running.add_done_callback(lambda _: deltas.put_nowait(None))
                try:
                    if form.stream:
                        return await self._stream(request, headers, job, running, deltas)
                    return _answer(await job.unless_failed(running), form, task, headers)
                finally:
                    running.cancel()
        finally:
            job.fail(ConnectionAbortedError("the request is over"))
            self._jobs.discard(job)

    def _work(
        self, job: _Job, form: _Form, path: Path, task: str, deltas: asyncio.Queue[str | None]
    ) -> Callable[[], Transcription]:
        """Return what a thread does for a request; its text goes into `deltas` as it comes, if that is asked for."""
        model = self._model(form.model)
        loop, sent = asyncio.get_running_loop(), ""
        config = _settings(model, form, task)

        def send(so_far: Transcription) -> None:
            nonlocal sent
            text = so_far.text or ""
            if len(text) > len(sent):
                loop.call_soon_threadsafe(deltas.put_nowait, text[len(sent) :])
                sent = text

        def blocks() -> Iterator[Waveform]:
            for block in stream_audio(path, name="file", max_sec=self._host.limits.max_session_sec):
                job.check()
                yield block

        def work() -> Transcription:
            try:
                job.check()
                between_turns = cast(Engine, EngineInTurns(model.engine, job.run))
                inference = BatchInference(config=config, engine=between_turns, vad=model.vad)
                options: dict[str, Any] = {"on_progress": send} if form.stream else {}
                (found,) = inference.transcribe_iter([blocks()], word_timestamps=form.words, **options)
            except (ApiError, ConnectionError):
                raise
            except AudioError as err:
                raise ApiError(400, first_line(err), param="file", code="invalid_audio") from err
            except DeviceError as err:
                raise ApiError(503, first_line(err), Retry_After=str(RETRY_SEC)) from err
            except WhisperASRError as err:
                raise ApiError(400, first_line(err)) from err
            except Exception as err:  # the thread's boundary: one request fails, the others go on
                logger.exception("a request failed")
                failed = f"the model failed: {type(err).__name__}; the server's log has the traceback"
                raise ApiError(500, failed, code="engine_failed") from err
            return found

        return work

    async def _stream(
        self,
        request: web.BaseRequest,
        headers: Mapping[str, str],
        job: _Job,
        running: asyncio.Future[Transcription],
        deltas: asyncio.Queue[str | None],
    ) -> web.StreamResponse:
        """Send the text as it comes, as server-sent events; what fails before the first is answered by its status."""
        response = web.StreamResponse(
            headers={
                **headers, "Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no",
            }
        )  # fmt: skip

        async def send(event: Mapping[str, Any]) -> None:
            if not response.prepared:
                await response.prepare(request)
            async with asyncio.timeout(self._host.limits.send_sec):
                await response.write(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())

        try:
            while (delta := await job.unless_failed(deltas.get())) is not None:
                await send({"type": "transcript.text.delta", "delta": delta})
            found = await running
            await send({"type": "transcript.text.done", "text": found.text, "usage": _usage(found)})
        except ApiError as err:
            if not response.prepared:
                raise
            await send(err.content)
        except TimeoutError as err:
            raise ConnectionAbortedError("took no event in time") from err
        await response.write_eof()
        return response


class _Job:
    """A request, in the event loop and in its thread, until it is done or fails."""

    def __init__(self, host: LiveHost) -> None:
        self._host, self._loop = host, asyncio.get_running_loop()
        self._failed: asyncio.Future[Any] = self._loop.create_future()
        self._error: Exception | None = None
        self._call: Future[Any] | None = None

    def fail(self, error: Exception) -> None:
        """Go no further; only the first error counts."""
        if self._error is None:
            self._error = error
            self._failed.set_result(None)
            if self._call is not None:
                self._call.cancel()

    def check(self) -> None:
        """Raise what `fail` was given."""
        if self._error is not None:
            raise self._error

    async def unless_failed(self, result: Awaitable[T]) -> T:
        """Wait for a result, or raise what `fail` was given."""
        waiting = asyncio.ensure_future(result)
        try:
            await asyncio.wait([waiting, self._failed], return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                self.check()
        finally:
            waiting.cancel()
        return await waiting

    def run(self, call: Callable[[], T]) -> T:
        """Run a call of the model between the turns of live sessions, and wait for it; used in the thread."""
        self.check()
        running: Coroutine[Any, Any, T] = self._host.between_turns(call)
        self._call = asyncio.run_coroutine_threadsafe(running, self._loop)
        if self._error is not None:
            self._call.cancel()
        try:
            return cast(T, self._call.result())
        except CancelledError:
            self.check()
            raise


def _stopping() -> ApiError:
    return ApiError(503, "the server stops; try again later", code="shutdown", Retry_After=str(RETRY_SEC))


async def _read_form(request: web.BaseRequest, path: Path, max_bytes: int) -> dict[str, list[str]]:
    """Read a multipart form: write its file to `path`, and return its other fields."""
    if request.content_type != "multipart/form-data" or "Content-Encoding" in request.headers:
        raise ApiError(415, "send a form: Content-Type: multipart/form-data; boundary=..., not compressed")
    limit = f"a file has at most {max_bytes / (1 << 20):g} MB; cut it at a pause, or send it as mp3 or Opus"
    too_big = ApiError(413, limit, param="file", code="file_too_large")
    if (request.content_length or 0) > max_bytes + MAX_PARTS * MAX_FIELD_BYTES:
        raise too_big
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    fields: dict[str, list[str]] = defaultdict(list)
    began, taken, parts = asyncio.get_running_loop().time(), 0, 0

    async def chunks(part: BodyPartReader, most: int, too_long: ApiError) -> AsyncIterator[bytes]:
        nonlocal taken
        size = 0
        while chunk := await part.read_chunk(CHUNK_BYTES):
            size, taken = size + len(chunk), taken + len(chunk)
            patience.reschedule(began + BODY_SEC + taken / BODY_BYTES_PER_SEC)
            if size > most:
                raise too_long
            yield chunk

    try:
        async with asyncio.timeout_at(began + BODY_SEC) as patience:
            reader = await request.multipart()
            while (part := await reader.next()) is not None:
                parts, name = parts + 1, part.name if isinstance(part, BodyPartReader) else None
                if not isinstance(part, BodyPartReader) or not name or parts > MAX_PARTS:
                    raise ApiError(400, f"a form has at most {MAX_PARTS} parts, and each has a name and no parts")
                if name != "file":
                    long = f"{visible(name)[:100]}: longer than {MAX_FIELD_BYTES} bytes"
                    too_long = ApiError(400, long, param=name[:100], code="string_above_max_length")
                    text = b"".join([chunk async for chunk in chunks(part, MAX_FIELD_BYTES, too_long)])
                    fields[name.removesuffix("[]")].append(text.decode())
                elif path.exists():
                    raise ApiError(400, "file is given twice; give it once", param="file")
                else:
                    with path.open("wb") as file:
                        async for chunk in chunks(part, max_bytes, too_big):
                            await asyncio.to_thread(file.write, chunk)
    except TimeoutError as err:
        raise ApiError(408, f"the form came slower than {BODY_BYTES_PER_SEC} bytes per second") from err
    except (ValueError, AssertionError, RuntimeError, LookupError, HttpProcessingError) as err:
        raise ApiError(400, f"the form cannot be read: {visible(first_line(err))[:200]}") from err
    if not path.exists():
        raise ApiError(400, "you must provide a file parameter", param="file")
    return fields


def _settings(model: ServedModel, form: _Form, task: str) -> Config:
    """Return the server's settings with what the form says."""
    config = model.config
    if task == "translate" and not model.engine.vocabulary.languages:
        raise ApiError(400, f"{form.model} knows English only, and translates nothing", param="model")
    try:
        language = model.language(form.language)
    except WhisperASRError as err:
        raise ApiError(400, str(err), param="language", code="invalid_language") from err
    own = config.inference
    asked: dict[str, Any] = {"batch_size": min(own.batch_size, BATCH.get(model.engine.device.partition(":")[0], 1))}
    if form.prompt is not None:
        asked["initial_prompt"] = form.prompt
    if form.keywords:
        asked["hotwords"] = "\n".join([*form.keywords, ""])  # lines are terms: a client names no file of the server
    if form.temperature:
        higher = (each for each in own.temperatures if each > form.temperature)
        asked |= {"temperatures": (form.temperature, *higher), "num_beams": 1}
    spoken = config.model.model_copy(update={"language": language, "task": task})
    return config.model_copy(update={"model": spoken, "inference": own.model_copy(update=asked)})


def _usage(found: Transcription) -> dict[str, Any]:
    return {"type": "duration", "seconds": math.ceil(found.duration_sec)}


def _answer(found: Transcription, form: _Form, task: str, headers: Mapping[str, str]) -> web.Response:
    """Return the text in the format that was asked for."""
    if form.response_format == "text":
        return web.Response(text=f"{found.text}\n", headers=headers)
    if (written := {"srt": to_srt, "vtt": to_vtt}.get(form.response_format)) is not None:
        return web.Response(text=written(found.cues(task=task)), headers=headers)
    content: dict[str, Any] = {"text": found.text, "usage": _usage(found)}
    if form.response_format == "verbose_json":
        granularities = form.timestamp_granularities or ("segment",)
        content |= {"task": task, "duration": round(found.duration_sec, 3)}
        content["language"] = language_name(found.language or "en").lower()  # of an English-only model, and of silence
        if "segment" in granularities:
            content["segments"] = _segments(found)
        if "word" in granularities:
            content["words"] = [
                {"word": word.text, "start": round(word.start_sec, 3), "end": round(word.end_sec, 3)}
                for word in found.words or ()
            ]
    return web.json_response(content, headers=headers, dumps=partial(json.dumps, ensure_ascii=False, allow_nan=False))


def _segments(found: Transcription) -> list[dict[str, Any]]:
    """Return segments as openai/whisper has them: their texts joined are the text."""
    segments, before = [], ""
    for number, segment in enumerate(found.segments):
        segments.append(
            {
                "id": number,
                "seek": round(100 * segment.start_sec),
                "start": round(segment.start_sec, 3),
                "end": round(segment.end_sec, 3),
                "text": space_between(before, segment.text) + segment.text,
                "tokens": list(segment.tokens),
                "temperature": segment.temperature,
                "avg_logprob": segment.avg_logprob if math.isfinite(segment.avg_logprob) else None,
                "compression_ratio": segment.compression_ratio,
                "no_speech_prob": segment.no_speech_prob,
            }
        )
        before = segment.text
    return segments
