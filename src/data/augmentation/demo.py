"""What augmentation does to a recording, to hear and to see: each effect that is on, by itself and all together."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from transformers.audio_utils import hertz_to_mel

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.augmentation.augmenter import AudioAugmenter, Effects
from src.data.augmentation.spec_augment import SpecAugment
from src.data.features import FRAMES_PER_SEC, LogMel
from src.utils.config import AugmentationConfig
from src.utils.errors import DataError
from src.utils.figures import FIGURE_STYLE, NotebookFigure

FIGURE_INCHES = (10.0, 4.0)
TICKS_HZ = (500, 1_000, 2_000, 4_000)
PROBABILITIES = ("pitch_prob", "noise_prob", "room_prob", "codec_prob")


@dataclass(frozen=True)
class Example:
    """One version of a recording.

    Attributes:
        name: what was done to it, for example "speed x0.9".
        waveform: (T,) float32 in [-1, 1], 16 kHz; the original where only the features changed.
        log_mel: (80, T // 160) float32, as the model sees it.
        audible: False where only the features changed.
    """

    name: str
    waveform: Waveform
    log_mel: np.ndarray[Any, np.dtype[np.float32]]
    audible: bool = True


def demonstrate(waveform: Waveform, config: AugmentationConfig, *, seed: int) -> list[Example]:
    """Apply each effect that is switched on, whatever its probability, and all of them together.

    Args:
        waveform: (T,) float32 in [-1, 1], 16 kHz, at least 0.1 s.
        config: an effect of probability 0, speeds of 1 and a gain of 0 dB are switched off.
        seed: of the values that are drawn; the example with everything has the values of the others.
    Returns: the original first, the one with everything last; the original alone where nothing is switched on.
    Raises: DataError, AudioError: noise_dir cannot be used.
    """
    clip, length = torch.from_numpy(waveform)[None], torch.tensor([len(waveform)])
    augmenter = AudioAugmenter(_always(config))
    examples = [_example("original", waveform)]
    if not config.enabled:
        return examples
    everything = augmenter.draw(clip, length, torch.Generator().manual_seed(seed))[0]
    everything = replace(everything, gain_db=-config.max_gain_db)  # down: a peak near 1.0 would leave little to hear
    parts = _parts(everything)
    for name, effects in parts:
        changed = augmenter.apply(clip, length, [effects], seed=seed).audio[0]
        examples.append(_example(name, changed.numpy()))
    masks = SpecAugment(config.spec_augment) if config.spec_augment_prob else None
    if masks is not None:
        log_mel = masks(torch.from_numpy(examples[0].log_mel), generator=torch.Generator().manual_seed(seed)).numpy()
        examples.append(Example("masks (not heard)", waveform, log_mel, audible=False))
    if len(examples) > 2:
        changed = augmenter.apply(clip, length, [everything], seed=seed).audio[0]
        examples.append(_example("everything", changed.numpy(), masks, seed))
    return examples


def players(examples: Sequence[Example]) -> Any:
    """Return an object that a notebook shows as one labelled player for each example that sounds different."""
    from IPython.display import HTML, Audio  # only a notebook has it loaded anyway

    rows = [
        '<div style="display:flex;align-items:center;gap:1em">'
        f'<span style="width:16em">{html.escape(example.name)}</span>'
        f"{Audio(example.waveform, rate=SAMPLE_RATE, normalize=False)._repr_html_()}</div>"
        for example in examples
        if example.audible
    ]
    return HTML("\n".join(rows))


def draw_examples(examples: Sequence[Example]) -> NotebookFigure:
    """Draw the log-mel features of each example, on one scale of time and level.

    Raises: DataError: no examples.
    """
    if not examples:
        raise DataError("no examples to draw; demonstrate() makes them")
    rows = 1 if len(examples) <= 3 else 2
    columns = -(-len(examples) // rows)
    longest_sec = max(example.log_mel.shape[1] for example in examples) / FRAMES_PER_SEC
    levels = examples[0].log_mel
    with matplotlib.rc_context({**FIGURE_STYLE, "axes.grid": False, "axes.titlesize": 9, "font.size": 8}):
        figure = NotebookFigure(figsize=FIGURE_INCHES, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(examples) :]:
            axes.set_axis_off()
        for axes, example in zip(grid.flat, examples, strict=False):
            draw_log_mel(axes, example.log_mel, (float(levels.min()), float(levels.max())))
            axes.set_title(example.name)
            axes.set_xlim(0, longest_sec)
        for axes in grid[:, 0]:
            axes.set_ylabel("kHz")
        for column in range(columns):  # below the last picture of each column
            bottom = grid[rows - 1, column] if (rows - 1) * columns + column < len(examples) else grid[0, column]
            bottom.set_xlabel("s")
            bottom.tick_params(labelbottom=True)
    return figure


def _always(config: AugmentationConfig) -> AugmentationConfig:
    """Draw every effect that is switched on, and a speed that can be heard."""
    speeds = tuple(factor for factor in config.speed_factors if factor != 1.0)
    certain = {name: 1.0 for name in PROBABILITIES if getattr(config, name) > 0}
    return config.model_copy(update={**certain, "speed_factors": speeds or (1.0,)})


def _parts(effects: Effects) -> list[tuple[str, Effects]]:
    """Take combined effects apart, in the order in which they are applied."""
    parts: list[tuple[str, Effects]] = []
    if effects.speed != 1.0:
        parts.append((f"speed x{effects.speed:g}", Effects(speed=effects.speed)))
    if effects.pitch != 1:
        parts.append((f"pitch {effects.pitch_semitones:+.1f} semitones", Effects(pitch=effects.pitch)))
    if effects.rt60_sec is not None:
        room = Effects(rt60_sec=effects.rt60_sec, direct_db=effects.direct_db)
        parts.append((f"room, RT60 {effects.rt60_sec:.2f} s", room))
    if effects.noise is not None:
        noise = Effects(noise=effects.noise, snr_db=effects.snr_db)
        kind = "recorded" if effects.noise == "recording" else effects.noise
        parts.append((f"{kind} noise, SNR {effects.snr_db:.0f} dB", noise))
    if effects.gain_db:
        parts.append((f"gain {effects.gain_db:+.1f} dB", Effects(gain_db=effects.gain_db)))
    if effects.telephone:
        parts.append(("telephone", Effects(telephone=True)))
    return parts


def _example(name: str, waveform: Waveform, masks: SpecAugment | None = None, seed: int = 0) -> Example:
    log_mel = LogMel()(torch.from_numpy(waveform)[None])[0]
    if masks is not None:
        log_mel = masks(log_mel, generator=torch.Generator().manual_seed(seed))
    return Example(name, waveform, log_mel.numpy())


def draw_log_mel(
    axes: Axes, log_mel: np.ndarray[Any, np.dtype[np.float32]], levels: tuple[float, float], *, begin_sec: float = 0.0
) -> None:
    """Draw a log-mel spectrogram over seconds and kHz.

    Args:
        log_mel: (bins, frames).
        levels: at the ends of the colours.
        begin_sec: time of the first frame.
    """
    bins, frames = log_mel.shape
    axes.imshow(
        log_mel, origin="lower", aspect="auto", cmap="magma", vmin=levels[0], vmax=levels[1],
        extent=(begin_sec, begin_sec + frames / FRAMES_PER_SEC, 0, bins), interpolation="nearest",
    )  # fmt: skip
    top = hertz_to_mel(SAMPLE_RATE / 2, mel_scale="slaney")
    places = [bins * float(hertz_to_mel(hertz, mel_scale="slaney") / top) for hertz in TICKS_HZ]
    axes.set_yticks(places, [f"{hertz / 1_000:g}" for hertz in TICKS_HZ])
