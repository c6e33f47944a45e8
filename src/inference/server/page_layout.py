"""The layout of the web page: its tabs, transcripts as HTML, and how errors are shown.

Written for Gradio 6, which is imported here and nowhere else, because importing it takes seconds.
"""

from __future__ import annotations

import difflib
import html
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import jinja2

from src.inference.captions import CaptionOptions, make_cues, to_srt, to_vtt
from src.inference.files.transcribe import Transcriptions
from src.inference.server.host import complaint
from src.inference.streaming.commit import word_key
from src.inference.words import Word
from src.utils.errors import WhisperASRError
from src.utils.files import read_template
from src.utils.languages import text_language

TITLE = "Speech to text"
KEEP_UPLOADS_SEC, SWEEP_SEC = 3600, 600  # of Gradio's folder of uploads
MAX_UPLOAD_SIZE = "2gb"  # an hour of 24-bit stereo at 48 kHz has 1 GB
FILES_AT_ONCE = 2
UNSURE_PROBABILITY = 0.5  # of a word, below which it is marked
Hear = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]
Transcribe = Callable[..., list[Transcriptions]]
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
        transcribe: turns the path of an upload, which may be None, and names of models into their transcripts.
        task: of `transcribe`: captions of translations are laid out as English.
    """
    names = list(about)

    def title_html(name: str) -> str:
        return f"<h1>{TITLE}</h1><p>{html.escape(about[name])}</p>"

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(SWEEP_SEC, KEEP_UPLOADS_SEC)) as page:
        with gr.Row(elem_id="head"):
            title = gr.HTML(title_html(names[0]), elem_id="title", apply_default_css=False)
            model = _model_choice(names, names[0], "Model")
        with gr.Tabs():
            with gr.Tab("Live"):
                live = _live_tab(page, hear, leave, names[0])
            with gr.Tab("File"):
                _file_tab("file", "Transcribe", transcribe, task, lambda: [model])
            if len(names) > 1:
                with gr.Tab("Compare"):
                    two = (names[1], "First model"), (names[0], "Second model")
                    _file_tab(
                        "compare", "Compare", transcribe, task, lambda: [_model_choice(names, *each) for each in two]
                    )
        model.change(lambda name: (gr.HTML(model=name), title_html(name)), model, [live, title], **PRIVATE)
    return page


def serve(page: gr.Blocks, **address: Any) -> None:
    """Begin to serve a page, and return; OSError: no port is free, ValueError: the host cannot be reached."""
    font = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))  # in 6.24 its file of 600 lacks most letters
    theme = gr.themes.Base(
        primary_hue="blue", neutral_hue="zinc", radius_size="lg", font=[font, "system-ui", "sans-serif"]
    )
    page.launch(
        **address,
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

    live = gr.HTML(
        html_template=_template("demo_live.html"),
        js_on_load=_template("audio_source.js") + _template("demo_live.js"),
        server_functions=[hear],
        apply_default_css=False,
        elem_id="live",
        tab="",
        model=model,
    )
    page.load(name_tab, None, live, queue=False, **PRIVATE)
    page.unload(unload)
    return live


def _file_tab(
    name: str, label: str, transcribe: Transcribe, task: str, choose: Callable[[], list[gr.Dropdown]]
) -> None:
    """Lay out a recording, the models that `choose` gives, a button, and what the models heard."""
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

    def run(path: str | None, *chosen: str) -> str:
        try:
            done = transcribe(path, *chosen)
            if any(each[0].words for each in done):
                return results_html(chosen, done, Path(path or "").stem, task=task)
        except Exception as err:  # the page's boundary: it shows the error, and goes on
            title = "That did not work" if isinstance(err, WhisperASRError) else "Error"
            raise gr.Error(html.escape(complaint(err)), title=title, print_exception=False) from err
        gr.Warning(f"No speech was found in {html.escape(Path(path or '').name)}.", title="No speech")
        return ""

    button.click(run, [audio, *models], result, **JOB)


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
