"""The layout of the web page: its tabs, transcripts as HTML, and how errors are shown.

Written for Gradio 6, which is imported here and nowhere else, because importing it takes seconds.
"""

from __future__ import annotations

import difflib
import html
import logging
import math
import string
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from src.inference.captions import make_cues, spaced, to_srt, to_vtt
from src.inference.files.transcribe import Transcriptions
from src.inference.words import Word
from src.utils.errors import WhisperASRError, first_line
from src.utils.files import read_template

logger = logging.getLogger(__name__)

TITLE = "Speech to text"
KEEP_UPLOADS_SEC, SWEEP_SEC = 3600, 600  # of Gradio's folder of uploads
MAX_UPLOAD_SIZE = "2gb"  # an hour of 24-bit stereo at 48 kHz has 1 GB
FILES_AT_ONCE = 2
UNSURE_PROBABILITY = 0.5  # of a word, below which it is marked
Hear = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]
Transcribe = Callable[..., list[Transcriptions]]
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
JOB: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": FILES_AT_ONCE, "concurrency_id": "files"}

_NOTHING = '<span class="quiet">no words</span>'
_UNSURE = f'<span><i class="unsure">dotted</i> below {UNSURE_PROBABILITY:.0%} probability</span>'
_LEGEND = f'<p class="legend">{_UNSURE}<span>Point at a word for its times, click it to hear it.</span></p>'
_DIFFERENCE = f'<p class="legend"><span><mark>marked</mark> where the other model has other words</span>{_UNSURE}</p>'


def build_page(
    about: Mapping[str, str], *, hear: Hear, leave: Callable[[str], None], transcribe: Transcribe
) -> gr.Blocks:
    """Return the page, not yet served.

    Args:
        about: how each model computes, by its name.
        hear: answers a message of the live tab.
        leave: called with the name of a tab that was closed.
        transcribe: turns the path of an upload, which may be None, and names of models into their transcripts.
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
                _file_tab(transcribe, model)
            if len(names) > 1:
                with gr.Tab("Compare"):
                    _compare_tab(transcribe, names)
        model.change(lambda name: (gr.HTML(model=name), title_html(name)), model, [live, title], **PRIVATE)
    return page


def serve(page: gr.Blocks, **address: Any) -> None:
    """Begin to serve a page, and return; `address` are arguments of `launch`.

    Raises:
        OSError: no port is free.
        ValueError: the host cannot be reached.
    """
    font = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))  # in 6.24 its file of 600 lacks most letters
    theme = gr.themes.Base(
        primary_hue="blue", neutral_hue="zinc", radius_size="lg", font=[font, "system-ui", "sans-serif"]
    ).set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
    )
    page.launch(
        **address,
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


def _file_tab(transcribe: Transcribe, model: Any) -> None:
    audio = _audio_input("file-audio")
    with gr.Row(elem_classes="actions"):
        run = gr.Button("Transcribe", variant="primary", elem_id="transcribe")
    result = _words_output("file-audio", "file-result")

    def transcribed(path: str | None, model: str) -> str:
        (done,) = transcribe(path, model)
        return transcript_html(done, Path(path or "").stem) if done[0].words else ""

    run.click(_shown(transcribed), [audio, model], result, **JOB)


def _compare_tab(transcribe: Transcribe, names: list[str]) -> None:
    audio = _audio_input("compare-audio")
    with gr.Row(elem_classes="actions"):
        first, second = _model_choice(names, names[1], "First model"), _model_choice(names, names[0], "Second model")
        run = gr.Button("Compare", variant="primary", elem_id="compare")
    result = _words_output("compare-audio", "compare-result")

    def compared(path: str | None, first: str, second: str) -> str:
        done = transcribe(path, first, second)
        return comparison_html((first, second), done) if any(each[0].words for each in done) else ""

    run.click(_shown(compared), [audio, first, second], result, **JOB)


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
        js_on_load=_template("demo_words.js"), apply_default_css=False, elem_id=elem_id, player=f"#{audio_id}"
    )


def _template(name: str) -> str:
    return read_template("src.inference", name)


def _shown(work: Callable[..., str]) -> Callable[..., str]:
    """Wrap a job that makes HTML so that the page shows what went wrong, and that there was no speech."""

    def run(*given: Any) -> str:
        try:
            found = work(*given)
        except WhisperASRError as err:
            raise gr.Error(html.escape(first_line(err)), title="That did not work", print_exception=False) from err
        except Exception as err:  # the page's boundary: it shows the error, and goes on
            logger.exception("a job of the page failed")
            said = html.escape(f"{type(err).__name__}: {first_line(err)}")
            raise gr.Error(f"{said}; the server's log has the traceback", print_exception=False) from err
        if not found:
            gr.Warning(f"No speech was found in {html.escape(Path(given[0]).name)}.", title="No speech")
        return found

    return run


def transcript_html(done: Transcriptions, stem: str) -> str:
    """Return the transcript of one recording by segment, with its cost and its captions.

    Args:
        done: of one recording, with word times.
        stem: of the captions' file names.
    """
    rows = "".join(
        f'<div class="row"><time>{clock(segment.start_sec)}</time><p>{_words_html(segment.words or ())}</p></div>'
        for segment in done[0].segments
    )
    cues = make_cues(done[0].words or ())
    links = "".join(
        f'<a download="{html.escape(stem)}.{suffix}" href="data:text/plain;charset=utf-8,{quote(text)}">'
        f"{suffix.upper()}</a>"
        for suffix, text in (("srt", to_srt(cues)), ("vtt", to_vtt(cues)))
    )
    files = f'<p class="files">Captions {links}</p>'
    return f'{_cost_html(done)}<div class="transcript">{rows}</div>{files}{_LEGEND}'


def comparison_html(models: Sequence[str], done: Sequence[Transcriptions]) -> str:
    """Return what two models heard in the same recording side by side, with the words marked that the other lacks."""
    words = [each[0].words or () for each in done]
    columns = "".join(
        f'<section class="side"><h3>{html.escape(model)}</h3>{_cost_html(each)}'
        f"<p>{_words_html(heard, marked) or _NOTHING}</p></section>"
        for model, each, heard, marked in zip(models, done, words, differing_words(*words), strict=True)
    )
    return f'<div class="sides">{columns}</div>{_DIFFERENCE}'


def differing_words(first: Sequence[Word], second: Sequence[Word]) -> tuple[frozenset[int], frozenset[int]]:
    """Return the places of words that the other text lacks, without regard to case and punctuation.

    The longest common runs are matched first (difflib): this shows where to look, and is no error rate.
    """
    keys = [[word.text.casefold().strip(string.punctuation) for word in words] for words in (first, second)]
    runs = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_matching_blocks()
    same_first = {run.a + i for run in runs for i in range(run.size)}
    same_second = {run.b + i for run in runs for i in range(run.size)}
    return frozenset(range(len(first))) - same_first, frozenset(range(len(second))) - same_second


def clock(sec: float) -> str:
    """Return a time as 3:07 or 1:02:03."""
    minutes, seconds = divmod(int(sec), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _words_html(words: Sequence[Word], marked: Set[int] = frozenset()) -> str:
    texts = spaced([word.text for word in words])
    return "".join(
        f"{text.removesuffix(word.text)}{_word_html(word, i in marked)}"
        for i, (word, text) in enumerate(zip(words, texts, strict=True))
    )


def _word_html(word: Word, is_marked: bool) -> str:
    known = not math.isnan(word.probability)
    unsure = ' class="unsure"' if known and word.probability < UNSURE_PROBABILITY else ""
    tip = f"{word.start_sec:.2f} to {word.end_sec:.2f} s" + (f", {word.probability:.0%}" if known else "")
    tag = "mark" if is_marked else "span"
    return f'<{tag}{unsure} data-start="{word.start_sec:.2f}" data-tip="{tip}">{html.escape(word.text)}</{tag}>'


def _cost_html(done: Transcriptions) -> str:
    figures = (
        ("audio", f"{done.audio_sec:.1f} s"),
        ("compute", f"{done.compute_sec:.2f} s"),
        ("RTF", f"{done.rtf:.3f}"),
        ("words", str(len(done[0].words or ()))),
    )
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    return f'<dl class="figures">{items}</dl>'
