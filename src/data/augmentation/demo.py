"""What augmentation does to a recording, to hear and to see: each effect that is on, by itself and all together."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from numpy.typing import NDArray

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.augmentation.augmenter import AudioAugmenter, Effects, SpecAugment
from src.data.augmentation.effects import CHAIN, Gain
from src.data.features import HOP_SAMPLES, LogMel
from src.utils.config import AugmentationConfig
from src.utils.figures import FIGURE_STYLE, NotebookFigure


@dataclass(frozen=True)
class Example:
    """One version of a recording."""

    name: str  # "speed x0.9"
    waveform: Waveform  # the original where only the features changed
    log_mel: NDArray[Any]  # (80, T // 160) float32, as the model sees it
    audible: bool = True  # False where only the features changed


def demonstrate(waveform: Waveform, config: AugmentationConfig, *, seed: int) -> list[Example]:
    """Apply each effect that is switched on, whatever its probability, and all of them together.

    Args:
        waveform: (T,) float32 in [-1, 1], 16 kHz, at least 0.1 s.
        config: an effect of probability 0, speeds of 1 and a gain of 0 dB are switched off.
        seed: of the values that are drawn; the example with everything has the values of the others.

    Returns:
        The original first, the one with everything last; the original alone where nothing is switched on.

    Raises:
        DataError: noise_dir cannot be used.
        AudioError: a recording in noise_dir cannot be used.
    """
    clip, length = torch.from_numpy(waveform)[None], torch.tensor([len(waveform)])
    examples = [Example("original", waveform, LogMel()(clip)[0].numpy())]
    if not config.enabled:
        return examples
    # draw every effect that is switched on, and a speed that can be heard
    on = {k.setting: 1.0 for k in CHAIN if k.setting.endswith("_prob") and getattr(config, k.setting) > 0}
    speeds = tuple(factor for factor in config.speed_factors if factor != 1.0) or (1.0,)
    augmenter = AudioAugmenter(config.model_copy(update={**on, "speed_factors": speeds}))
    drawn = augmenter.draw(clip, length, torch.Generator().manual_seed(seed))[0]
    # down: a peak near 1.0 would leave little to hear
    everything = tuple(Gain(-config.max_gain_db) if isinstance(effect, Gain) else effect for effect in drawn)

    def example(name: str, effects: Effects, *, masked: bool = False) -> Example:
        changed = augmenter.apply(clip, length, [effects], seed=seed).audio
        features = LogMel()(changed)
        if masked:
            features = SpecAugment(config.spec_augment)(features, generator=torch.Generator().manual_seed(seed))
        return Example(name, changed[0].numpy(), features[0].numpy(), audible=bool(effects))

    examples += [example(str(effect), (effect,)) for effect in everything]
    if config.spec_augment_prob:
        examples.append(example("masks (not heard)", (), masked=True))
    if len(examples) > 2:
        examples.append(example("everything", everything, masked=config.spec_augment_prob > 0))
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
    """Draw the log-mel features of each example, on one scale of time and level."""
    from librosa.display import specshow  # loads numba: seconds that only this figure needs

    rows = 1 if len(examples) <= 3 else 2
    levels = examples[0].log_mel
    with matplotlib.rc_context({**FIGURE_STYLE, "axes.grid": False, "axes.titlesize": 9, "font.size": 8}):
        figure = NotebookFigure(figsize=(10.0, 4.0), layout="constrained")
        grid = figure.subplots(rows, math.ceil(len(examples) / rows), squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(examples) :]:
            axes.set_axis_off()
        for axes, example in zip(grid.flat, examples, strict=False):
            specshow(
                example.log_mel, sr=SAMPLE_RATE, hop_length=HOP_SAMPLES, x_axis="time", y_axis="mel", ax=axes,
                cmap="magma", vmin=levels.min(), vmax=levels.max(),
            )  # fmt: skip
            axes.set(title=example.name, xlabel="", ylabel="")
        grid[0, 0].set_xlim(0, max(example.log_mel.shape[1] for example in examples) * HOP_SAMPLES / SAMPLE_RATE)
        figure.supxlabel("s", fontsize=8)
        figure.supylabel("Hz", fontsize=8)
    return figure
