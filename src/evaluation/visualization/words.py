"""A recording with its words: log-mel features as the model sees them, and the time of each word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.features import FRAMES_PER_SEC, N_FFT, POSITION_SEC, LogMel
from src.evaluation.visualization.style import drawable, new_figure
from src.inference.words import Word
from src.utils.errors import AudioError, DataError
from src.utils.figures import BLUE, GREY, ORANGE, NotebookFigure

MAX_SEC = 30.0  # of one figure: more words do not fit
_WIDTH, _MAX_HEIGHT = 10.0, 4.0  # inches, as those below
_MEL, _BELOW, _ABOVE, _LANE, _GAP = 1.6, 0.5, 0.3, 0.19, 0.06  # _GAP: between two texts of a lane
_LEFT, _RIGHT = 0.055, 0.985  # shares of the width


def draw_words(
    audio: Waveform, words: Sequence[Word], *, between_sec: tuple[float, float] | None = None, title: str = "",
    all_words: bool = True,
) -> NotebookFigure:  # fmt: skip
    """Draw the log-mel spectrogram, the words' boundaries in it, and their texts above without overlap.

    Args:
        audio: (T,) float32 in [-1, 1], 16 kHz.
        words: with times in this audio, from `DecodingResult.words`.
        between_sec: the part to draw, at most 30 s; all by default.
        title: above the figure.
        all_words: False leaves out texts for which there is no room, as where a model repeats itself, and draws a
            recording without words, too; the title says so.

    Raises:
        AudioError: no (T,) audio of at least 25 ms.
        DataError: a part of over 30 s or outside of the recording; with `all_words` no words in this part, or more
            than fit.
    """
    from librosa.display import specshow  # loads numba: seconds that only this figure needs

    if audio.ndim != 1 or len(audio) < N_FFT:
        raise AudioError(f"draw_words: audio has shape {audio.shape}; give (T,) at 16 kHz, at least {N_FFT} samples")
    duration_sec = len(audio) / SAMPLE_RATE
    begin, end = between_sec or (0.0, duration_sec)
    if not 0 <= begin < end <= duration_sec or not N_FFT / SAMPLE_RATE <= end - begin <= MAX_SEC:
        what = f"draw_words: {begin:g} to {end:g} s of {duration_sec:.1f} s cannot be drawn"
        raise DataError(f"{what}; give at most {MAX_SEC:g} s within the recording as between_sec")
    shown = [
        replace(word, start_sec=max(word.start_sec, begin), end_sec=min(word.end_sec, end))
        for word in words
        if word.start_sec < end and (word.end_sec > begin or word.start_sec >= begin)  # also one without length
    ]
    if not shown and all_words:
        raise DataError("draw_words: no words in this part; decode with word_timestamps=True")
    style: dict[str, Any] = {"axes.grid": False, "font.size": 9, "axes.spines.left": False}
    with new_figure(_WIDTH, _MAX_HEIGHT, layout=None, **style) as figure:
        # centre each text on its word, in the lowest lane where it touches no other
        sec_per_inch = (end - begin) / (_WIDTH * (_RIGHT - _LEFT))
        free_from: list[float] = []  # of each lane
        room = int((_MAX_HEIGHT - _BELOW - _MEL - _ABOVE) / _LANE) - 1  # lanes
        places = []  # lane, left end and width of each text
        for word in shown:
            text = figure.text(0, 0, drawable(word.text))
            width = text.get_window_extent().width / figure.dpi * sec_per_inch
            text.remove()
            left = max(begin, min((word.start_sec + word.end_sec - width) / 2, end - width))
            lane = next((i for i, free in enumerate(free_from) if free <= left), len(free_from))
            if lane < room:
                free_from[lane:] = [left + width + _GAP * sec_per_inch, *free_from[lane + 1 :]]
            elif all_words:
                raise DataError(
                    f"draw_words: {len(shown)} words in {end - begin:.1f} s do not fit; give a shorter part"
                )
            places.append((lane, left, width))
        if missing := sum(lane >= room for lane, *_ in places) or not shown:
            title += f"{', ' * bool(title)}{f'no room for {missing} of {len(shown)} words' if shown else 'no words'}"
        bottom, band_height = _BELOW + _MEL, (1 + len(free_from)) * _LANE
        height = bottom + band_height + _ABOVE
        figure.set_size_inches(_WIDTH, height)
        mel = figure.add_axes((_LEFT, _BELOW / height, _RIGHT - _LEFT, _MEL / height))
        band = figure.add_axes((_LEFT, bottom / height, _RIGHT - _LEFT, band_height / height), sharex=mel)

        # features, and the words' boundaries in them
        samples = audio[round(begin * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        log_mel = LogMel()(torch.from_numpy(samples)[None])[0].numpy()  # (80, T // 160)
        times = begin + np.arange(log_mel.shape[1]) / FRAMES_PER_SEC
        top = SAMPLE_RATE / 2
        specshow(log_mel, ax=mel, sr=SAMPLE_RATE, x_coords=times, x_axis="s", y_axis="mel", fmax=top, cmap="magma")
        starts = {word.start_sec for word in shown}
        ends = {word.end_sec for word in shown if word.end_sec < end} - starts
        mel.vlines(sorted(starts), 0, top, color="white", linewidth=1)
        mel.vlines(sorted(ends), 0, top, color="white", linewidth=1, linestyle=":")  # silence follows
        mel.set_yticks([500, 1_000, 2_000, 4_000], ["0.5", "1", "2", "4"])
        mel.set(xlabel="s", ylabel="kHz", xlim=(begin, end), ylim=(0, top))

        # a bar for each word's time, and its text above with a line to the bar
        for index, (word, (lane, left, width)) in enumerate(zip(shown, places, strict=True)):
            color = (BLUE, ORANGE)[index % 2]  # neighbours differ; a white edge parts them too
            length = max(word.end_sec - word.start_sec, POSITION_SEC)  # a word without length should be seen too
            band.broken_barh([(word.start_sec, length)], (0.15, 0.5), facecolor=color, edgecolor="white", clip_on=False)
            if lane >= room:
                continue
            middle = min(max((word.start_sec + word.end_sec) / 2, left), left + width)
            band.plot([middle, middle], [0.65, 1.1 + lane], color=GREY, linewidth=0.6, zorder=1)
            band.text(
                left + width / 2, 1.5 + lane, drawable(word.text), ha="center", va="center", zorder=3,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
        band.set(ylim=(0, 1 + len(free_from)), yticks=[], title=drawable(title, max_chars=90))
        band.tick_params(axis="x", length=0, labelbottom=False)
        band.spines["bottom"].set_visible(False)
    return figure
