"""The layout of the web page: its tabs, transcripts as HTML, and how errors are shown.

Written for Gradio 6, which is imported here and nowhere else, because importing it takes seconds.
"""

from __future__ import annotations

import asyncio
import difflib
import html
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Event
from typing import Any

import gradio as gr
import jinja2
from gradio import route_utils
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from src.inference.captions import CaptionOptions, make_cues, to_srt, to_vtt
from src.inference.files.transcribe import Transcriptions
from src.inference.server.served import complaint
from src.inference.streaming.commit import word_key
from src.inference.words import Word
from src.utils.errors import WhisperASRError
from src.utils.files import read_template
from src.utils.languages import text_language

TITLE = "Speech to text"
KEEP_UPLOADS_SEC, SWEEP_SEC = 3600, 600  # of Gradio's folder of uploads
MAX_UPLOAD_SIZE = "2gb"  # an hour of 24-bit stereo at 48 kHz has 1 GB
FILES_AT_ONCE, MAX_QUEUE = 2, 16  # running, waiting
ALIVE_SEC = 2.0  # between looks whether the tab of a running job is still there
MAX_BODY = 1 << 20  # bytes of a request that is no upload
DIGEST_CHARS = 64  # of the folder of an upload
UNFINISHED = f"whisper-asr-upload-{os.getpid()}-"  # begins the names of uploads until they are whole
UNSURE_PROBABILITY = 0.5  # of a word, below which it is marked
Hear = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]
Transcribe = Callable[..., list[Transcriptions]]
logger = logging.getLogger(__name__)
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
JOB: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": FILES_AT_ONCE, "concurrency_id": "files"}


def build_page(
    about: Mapping[str, str],
    *,
    hear: Hear,
    leave: Callable[[str], None],
    transcribe: Transcribe,
    task: str = "transcribe",
) -> gr.Blocks:
    """Return the page, not yet served.

    Args:
        about: how each model computes, by its name.
        hear: answers a message of the live tab.
        leave: called with the name of a tab that was closed.
        transcribe: turns the path of an upload, which may be None, and names of models into their transcripts; `gone`,
            an event, says that nobody waits for them.
        task: of `transcribe`: captions of translations are laid out as English.
    """
    names, jobs = list(about), dict[str, Event]()  # at most one of each tab

    def free(tab: str) -> None:
        leave(tab)
        if tab in jobs:
            jobs[tab].set()

    def title_html(name: str) -> str:
        return f"<h1>{TITLE}</h1><p>{html.escape(about[name])}</p>"

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(SWEEP_SEC, KEEP_UPLOADS_SEC)) as page:
        with gr.Row(elem_id="head"):
            title = gr.HTML(title_html(names[0]), elem_id="title", apply_default_css=False)
            model = _model_choice(names, names[0], "Model")
        with gr.Tabs():
            with gr.Tab("Live"):
                live = _live_tab(page, hear, free, names[0])
            with gr.Tab("File"):
                _file_tab("file", "Transcribe", transcribe, task, jobs, lambda: [model])
            if len(names) > 1:
                with gr.Tab("Compare"):
                    two = (names[1], "First model"), (names[0], "Second model")
                    _file_tab(
                        "compare",
                        "Compare",
                        transcribe,
                        task,
                        jobs,
                        lambda: [_model_choice(names, *each) for each in two],
                    )
        model.change(lambda name: (gr.HTML(model=name), title_html(name)), model, [live, title], **PRIVATE)
    return page


def build_recorder(next_sentence: Hear, take_part: Hear, **props: Any) -> gr.Blocks:
    """Return the page that records sentences, not yet served; its script has `props`."""

    async def find(message: dict[str, Any]) -> dict[str, Any]:  # the page's script calls both by these names
        return await next_sentence(message)

    async def hear(message: dict[str, Any]) -> dict[str, Any]:
        return await take_part(message)

    with gr.Blocks(title="Record sentences", analytics_enabled=False, delete_cache=(SWEEP_SEC, SWEEP_SEC)) as page:
        _microphone("record", find, hear, elem_id="record", **props)
    return page


def serve(page: gr.Blocks, *, uploads: bool = True, **address: Any) -> None:
    """Begin to serve a page, and return; OSError: no port is free, ValueError: the host cannot be reached.

    Without `uploads`, one that is larger than `MAX_BODY` is refused as any other request is.
    """
    font = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))  # in 6.24 its file of 600 lacks most letters
    theme = gr.themes.Base(
        primary_hue="blue", neutral_hue="zinc", radius_size="lg", font=[font, "system-ui", "sans-serif"]
    )
    page.queue(max_size=MAX_QUEUE)
    page.launch(
        **address,
        app_kwargs={"middleware": [Middleware(_SmallBodies, uploads=uploads)]},
        height=860,  # of the frame in a notebook, pixels
        prevent_thread_lock=True,
        quiet=True,
        theme=theme,
        css=_template("demo.css"),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        max_file_size=MAX_UPLOAD_SIZE,
    )


def _template(name: str) -> str:
    return read_template("src.inference", name)


def _microphone(script: str, *functions: Callable[..., Any], **props: Any) -> Any:
    """Lay out what a script does with the microphone; it calls the functions by their names, and has `props`."""
    return gr.HTML(
        html_template=_template(f"{script}.html"),
        js_on_load=_template("audio_source.js") + _template(f"{script}.js"),
        server_functions=list(functions),
        apply_default_css=False,
        **props,
    )


def _model_choice(names: list[str], chosen: str, label: str) -> gr.Dropdown:
    return gr.Dropdown(
        names, value=chosen, label=label, show_label=False, container=False, filterable=False, elem_classes="model"
    )


def _live_tab(page: Any, answer: Hear, leave: Callable[[str], None], model: str) -> Any:
    async def hear(message: dict[str, Any]) -> dict[str, Any]:  # the page's script calls it by this name
        return await answer(message)

    def name_tab(request: gr.Request) -> Any:
        return gr.HTML(tab=request.session_hash)

    async def unload(request: gr.Request) -> None:
        leave(str(request.session_hash))

    live = _microphone("demo_live", hear, elem_id="live", tab="", model=model)
    page.load(name_tab, None, live, queue=False, **PRIVATE)
    page.unload(unload)
    return live


def _file_tab(
    name: str,
    label: str,
    transcribe: Transcribe,
    task: str,
    jobs: dict[str, Event],
    choose: Callable[[], list[gr.Dropdown]],
) -> None:
    """Lay out a recording, the models that `choose` gives, a button, and what the models heard.

    `jobs` are those that run, by tab.
    """
    audio: Any = gr.Audio(
        sources=["upload", "microphone"],
        type="filepath",  # as it was uploaded: `src.data.audio` decodes it
        label="Recording",
        editable=False,
        buttons=[],
        waveform_options=gr.WaveformOptions(show_recording_waveform=False),  # a waveform decodes the whole file
        elem_id=f"{name}-audio",
    )
    with gr.Row(elem_classes="actions"):
        models = choose()
        button = gr.Button(label, variant="primary", elem_id=label.lower())
    script, player = _template("demo_words.js"), f"#{name}-audio"
    result: Any = gr.HTML(js_on_load=script, apply_default_css=False, elem_id=f"{name}-result", player=player)

    async def run(request: gr.Request, path: str | None, *chosen: str) -> AsyncIterator[Any]:
        tab, gone = str(request.session_hash), Event()
        if jobs.setdefault(tab, gone) is not gone:
            raise gr.Error("This tab has a recording transcribed already; wait for it.", print_exception=False)
        job = asyncio.ensure_future(asyncio.to_thread(show, gone, path, *chosen))
        job.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may wait
        try:
            while not (await asyncio.wait([job], timeout=ALIVE_SEC))[0]:
                yield gr.skip()  # Gradio comes back only while the tab is there
            yield job.result()
        finally:
            gone.set()
            del jobs[tab]

    def show(gone: Event, path: str | None, *chosen: str) -> str:
        try:
            done = transcribe(path, *chosen, gone=gone)
            if any(each[0].words for each in done):
                return results_html(chosen, done, Path(path or "").stem, task=task)
        except Exception as err:  # the page's boundary: it shows the error, and goes on
            title = "That did not work" if isinstance(err, WhisperASRError) else "Error"
            raise gr.Error(html.escape(complaint(err)), title=title, print_exception=False) from err
        gr.Warning(f"No speech was found in {html.escape(Path(path or '').name)}.", title="No speech")
        return ""

    button.click(run, [audio, *models], result, **JOB)


class _SmallBodies:
    """Lets no request but an upload bring more than `MAX_BODY` bytes, which Gradio would read into memory."""

    def __init__(self, app: Any, *, uploads: bool) -> None:
        self._app, self._uploads = app, uploads

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_upload = self._uploads and scope.get("path", "").rstrip("/").endswith("/upload")
        if scope["type"] != "http" or is_upload:
            await self._app(scope, receive, send)
            return
        if int(dict(scope["headers"]).get(b"content-length", b"0")) > MAX_BODY:
            await PlainTextResponse("too large\n", status_code=413)(scope, receive, send)
            return
        taken = 0

        async def receive_some() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return message if taken <= MAX_BODY else {"type": "http.disconnect"}

        await self._app(scope, receive_some, send)


def sweep_uploads(page: gr.Blocks, age: float | None) -> None:
    """Delete uploads older than `age` seconds, None: all of them, and those that never became whole.

    It stands in for Gradio's own, which ends for good at the first name that it cannot delete, and does not know of
    uploads that failed (6.24).
    """
    kept = {str(file) for component in page.blocks.values() for file in component.keep_in_cache}
    for files in page.temp_file_sets:
        for file in set(files) - kept:
            if _deleted(Path(file), age):
                files.discard(file)
    for path in Path(get_upload_folder()).glob("*"):
        if path.name.startswith(UNFINISHED) or (len(path.name) == DIGEST_CHARS and not any(path.glob("*"))):
            _deleted(path, age)


def _deleted(path: Path, age: float | None) -> bool:
    try:
        if age is not None and time.time() - path.lstat().st_ctime < age:
            return False
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except FileNotFoundError:
        return True
    except (OSError, ValueError) as err:
        logger.warning("an upload could not be deleted: %s", err)
        return False
    return True


def _unfinished_upload(**options: Any) -> Any:
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    return NamedTemporaryFile(prefix=UNFINISHED, dir=folder, **options)


route_utils.delete_files_created_by_app = sweep_uploads  # type: ignore[assignment]
route_utils.NamedTemporaryFile = _unfinished_upload  # type: ignore[assignment]


def results_html(models: Sequence[str], done: Sequence[Transcriptions], stem: str, *, task: str = "transcribe") -> str:
    """Return what one model or two heard in a recording; `stem` is of the captions' file names.

    Of one model by segment; of two side by side, with the words marked that the other lacks.
    """
    words = [each[0].words or () for each in done]
    cues = make_cues(words[0], CaptionOptions.of(text_language(done[0][0].language, task)))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["clock"] = clock
    return environment.from_string(_template("demo_results.html")).render(
        models=models,
        done=done,
        marked=differing_words(*words) if len(words) > 1 else None,
        captions={"srt": to_srt(cues), "vtt": to_vtt(cues)},
        stem=stem,
        unsure=UNSURE_PROBABILITY,
    )


def differing_words(first: Sequence[Word], second: Sequence[Word]) -> tuple[set[int], set[int]]:
    """Return the places of words that the other text lacks, without regard to case and punctuation.

    The longest common runs are matched first (difflib): this shows where to look, and is no error rate.
    """
    keys = [[word_key(word) for word in words] for words in (first, second)]
    steps = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes()
    spans = [(range(a, b), range(c, d)) for step, a, b, c, d in steps if step != "equal"]
    return {place for span, _ in spans for place in span}, {place for _, span in spans for place in span}


def clock(sec: float) -> str:
    """Return a time as 3:07 or 1:02:03."""
    minutes, seconds = divmod(int(sec), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
