"""Transcripts as HTML: words that tell their times, what two models hear differently, captions to take away."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence, Set
from urllib.parse import quote

from src.inference.captions import make_cues, spaced, to_srt, to_vtt
from src.inference.server.page_files import FileTranscript, differing_words
from src.inference.words import Word

UNSURE_PROBABILITY = 0.5  # of a word, below which it is marked
_NOTHING = '<span class="quiet">no words</span>'
_UNSURE = f'<span><i class="unsure">dotted</i> below {UNSURE_PROBABILITY:.0%} probability</span>'
_LEGEND = f'<p class="legend">{_UNSURE}<span>Point at a word for its times, click it to hear it.</span></p>'
_DIFFERENCE = f'<p class="legend"><span><mark>marked</mark> where the other model has other words</span>{_UNSURE}</p>'


def transcript_html(transcript: FileTranscript, stem: str) -> str:
    """Return a transcript by segment, with its cost and its captions.

    Args: stem: of the captions' file names.
    """
    rows = "".join(
        f'<div class="row"><time>{clock(segment.start_sec)}</time><p>{_words_html(segment.words or ())}</p></div>'
        for segment in transcript.segments
    )
    return f'{_cost_html(transcript)}<div class="transcript">{rows}</div>{_files_html(transcript, stem)}{_LEGEND}'


def comparison_html(first: FileTranscript, second: FileTranscript) -> str:
    """Return two transcripts of the same recording side by side, with the words marked that the other lacks."""
    sides = zip((first, second), differing_words(first.words, second.words), strict=True)
    columns = "".join(
        f'<section class="side"><h3>{html.escape(transcript.model)}</h3>{_cost_html(transcript)}'
        f"<p>{_words_html(transcript.words, marked) or _NOTHING}</p></section>"
        for transcript, marked in sides
    )
    return f'<div class="sides">{columns}</div>{_DIFFERENCE}'


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


def _cost_html(transcript: FileTranscript) -> str:
    figures = (
        ("audio", f"{transcript.audio_sec:.1f} s"),
        ("compute", f"{transcript.compute_sec:.2f} s"),
        ("RTF", f"{transcript.rtf:.3f}"),
        ("words", str(len(transcript.words))),
    )
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    return f'<dl class="figures">{items}</dl>'


def _files_html(transcript: FileTranscript, stem: str) -> str:
    cues = make_cues(transcript.words)
    links = (
        f'<a download="{html.escape(stem)}.{suffix}" href="data:text/plain;charset=utf-8,{quote(text)}">'
        f"{suffix.upper()}</a>"
        for suffix, text in (("srt", to_srt(cues)), ("vtt", to_vtt(cues)))
    )
    return f'<p class="files">Captions {"".join(links)}</p>'
