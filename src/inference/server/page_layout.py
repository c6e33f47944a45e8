"""The page itself: its tabs, what they ask of the models, and how errors are said.

Written against Gradio 6, which is imported here and nowhere else, as importing it takes seconds.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from src.inference.server.page_backend import Backend
from src.inference.server.page_live import LiveSessions
from src.utils.errors import WhisperASRError, first_line
from src.utils.files import read_template

logger = logging.getLogger(__name__)

TITLE = "Speech to text"
KEEP_UPLOADS_SEC, SWEEP_SEC = 3600, 600  # of Gradio's folder of uploads
MAX_UPLOAD_SIZE = "2gb"  # an hour of 24-bit stereo at 48 kHz has 1 GB
FILES_AT_ONCE = 2


def build_page(backend: Backend) -> gr.Blocks:
    """Return the page, not yet served."""
    names = list(backend.about)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(SWEEP_SEC, KEEP_UPLOADS_SEC)) as page:
        with gr.Row(elem_id="head"):
            title = gr.HTML(_title_html(backend, names[0]), elem_id="title", apply_default_css=False)
            model = _model_choice(names, names[0], "Model")
        with gr.Tabs():
            with gr.Tab("Live"):
                live = _live_tab(page, backend.live, names[0])
            with gr.Tab("File"):
                _file_tab(backend, model)
            if len(names) > 1:
                with gr.Tab("Compare"):
                    _compare_tab(backend, names)
        model.change(lambda name: (gr.HTML(model=name), _title_html(backend, name)), model, [live, title], **_private())
    return page


def serve(page: gr.Blocks, **address: Any) -> None:
    """Begin to serve a page, and return; `address` are arguments of `launch`.

    Raises: OSError: no port. ValueError: the host cannot be reached.
    """
    page.launch(
        **address,
        prevent_thread_lock=True,
        quiet=True,
        theme=_theme(),
        css=_template("demo.css"),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        max_file_size=MAX_UPLOAD_SIZE,
    )


def _theme() -> gr.themes.Base:
    """Return a quiet theme, with a font that Gradio serves itself."""
    font = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))  # in 6.24 its file of 600 lacks most letters
    return gr.themes.Base(
        primary_hue="blue", neutral_hue="zinc", radius_size="lg", font=[font, "system-ui", "sans-serif"]
    ).set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
    )


def _live_tab(page: Any, sessions: LiveSessions, model: str) -> Any:
    def hear(message: dict[str, Any]) -> dict[str, Any]:
        return sessions.answer(message)

    def name_tab(request: gr.Request) -> Any:
        return gr.HTML(tab=request.session_hash)

    def leave(request: gr.Request) -> None:
        sessions.leave(str(request.session_hash))

    live = gr.HTML(
        html_template=_template("demo_live.html"),
        js_on_load=_template("audio_source.js") + _template("demo_live.js"),
        server_functions=[hear],
        apply_default_css=False,
        elem_id="live",
        tab="",
        model=model,
    )
    page.load(name_tab, None, live, queue=False, **_private())
    page.unload(leave)
    return live


def _file_tab(backend: Backend, model: Any) -> None:
    audio = _audio_input("file-audio")
    with gr.Row(elem_classes="actions"):
        run = gr.Button("Transcribe", variant="primary", elem_id="transcribe")
    result = _words_output("file-audio", "file-result")
    run.click(_shown(backend.transcribe), [audio, model], result, **_job())


def _compare_tab(backend: Backend, names: list[str]) -> None:
    audio = _audio_input("compare-audio")
    with gr.Row(elem_classes="actions"):
        first, second = _model_choice(names, names[1], "First model"), _model_choice(names, names[0], "Second model")
        run = gr.Button("Compare", variant="primary", elem_id="compare")
    result = _words_output("compare-audio", "compare-result")
    run.click(_shown(backend.compare), [audio, first, second], result, **_job())


def _model_choice(names: list[str], chosen: str, label: str) -> gr.Dropdown:
    return gr.Dropdown(
        names, value=chosen, label=label, show_label=False, container=False, filterable=False, elem_classes="model"
    )


def _audio_input(elem_id: str) -> Any:
    return gr.Audio(
        sources=["upload", "microphone"],
        type="filepath",  # as it was uploaded: `src.data.audio` decodes it
        label="Recording",
        editable=False,
        buttons=[],
        waveform_options=gr.WaveformOptions(show_recording_waveform=False),  # a waveform decodes the whole file
        elem_id=elem_id,
    )


def _words_output(audio_id: str, elem_id: str) -> Any:
    return gr.HTML(
        js_on_load=_template("demo_words.js"),
        apply_default_css=False,
        elem_id=elem_id,
        player=f"#{audio_id}",
    )


def _template(name: str) -> str:
    return read_template("src.inference", name)


def _private() -> dict[str, Any]:
    return {"api_visibility": "private", "show_progress": "hidden"}


def _job() -> dict[str, Any]:
    return {"api_visibility": "private", "concurrency_limit": FILES_AT_ONCE, "concurrency_id": "files"}


def _title_html(backend: Backend, name: str) -> str:
    return f"<h1>{TITLE}</h1><p>{html.escape(backend.about[name])}</p>"


def _shown(work: Callable[..., str | None]) -> Callable[..., str]:
    """Wrap what makes HTML so that the page says what went wrong, and that there was no speech."""

    def run(*given: Any) -> str:
        try:
            found = work(*given)
        except WhisperASRError as err:
            raise gr.Error(html.escape(first_line(err)), title="That did not work", print_exception=False) from err
        except Exception as err:  # the page's boundary: it says so, and goes on
            logger.exception("a job of the page failed")
            said = html.escape(f"{type(err).__name__}: {first_line(err)}")
            raise gr.Error(f"{said}; the server's log has the traceback", print_exception=False) from err
        if found is None:
            gr.Warning(f"No speech was found in {html.escape(Path(given[0]).name)}.", title="No speech")
        return found or ""

    return run
