"""Augmentation of training audio, in batches on the device where the model is.

What happens to a clip is drawn first, as one `Effects`; then each effect is one call over the clips that share its
parameters. The order is that of a recording: the voice (speed, pitch), the room around it, the noise that a microphone
hears beside it, the recording level, the telephone line. So the noise does not sound in the voice's room, its ratio is
to the voice as the microphone hears it, and the codec quantises whatever level arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from src.data.audio import SILENCE_PEAK
from src.data.augmentation import effects as dsp
from src.data.augmentation.noise import EXPONENTS, NoiseKind, NoisePool, babble, coloured_noise, mix_at_snr
from src.data.features import CONTEXT_SAMPLES
from src.utils.config import AugmentationConfig
from src.utils.errors import AudioError, ConfigError, DeviceError

RT60_SEC = (0.15, 0.6)  # a furnished small room to a bare large one
DIRECT_DB = (0.0, 12.0)  # direct sound over reverberation: across the room to close to the microphone
MIN_BABBLE_VOICES = 3  # fewer can be followed, and an empty label may stand beside them
Option = TypeVar("Option")


@dataclass(frozen=True)
class Effects:
    """What happens to one clip; the defaults are nothing.

    Attributes:
        speed: factor of pitch and tempo; the length becomes round(T / speed).
        pitch: ratio of frequencies at the same length.
        rt60_sec: reverberation time of the room, None without one.
        direct_db: direct sound over reverberation, dB.
        noise: its kind, None without noise.
        snr_db: speech over noise, dB.
        gain_db: as drawn; what is applied is reduced where the peak would exceed 1.0.
        telephone: sent through a telephone.
    """

    speed: float = 1.0
    pitch: Fraction = Fraction(1)
    rt60_sec: float | None = None
    direct_db: float = 0.0
    noise: NoiseKind | None = None
    snr_db: float | None = None
    gain_db: float = 0.0
    telephone: bool = False

    @property
    def pitch_semitones(self) -> float:
        """The change of pitch, without that of `speed`."""
        return dsp.semitones(self.pitch)


NOTHING = Effects()


class AugmentedBatch(NamedTuple):
    """Changed audio.

    Attributes:
        audio: (B, T') float32, or (T',) for a single waveform; T' holds the longest clip with its pause.
        lengths: (B,) int64 samples of each clip without the pause.
        applied: one for each clip.
    """

    audio: Tensor
    lengths: Tensor
    applied: tuple[Effects, ...]


class _Draws(NamedTuple):
    """Uniform numbers in [0, 1), all of them for each clip: switching one effect off leaves the others alone."""

    speed: float
    pitch: float
    pitch_step: float
    room: float
    rt60: float
    direct: float
    noise: float
    noise_kind: float
    snr: float
    gain: float
    codec: float


class _Voices(NamedTuple):
    """The batch as it came, (B, T) and (B,), from which babble is made."""

    audio: Tensor
    lengths: Tensor


class AudioAugmenter:
    """Draws and applies effects.

    All random numbers come from a generator on the CPU, noise and rooms included, so that a seed means the same effects
    and the same noise on every device.

    Args:
        config: shares and ranges; the defaults of `AugmentationConfig` if None.
    Raises: DataError, AudioError: noise_dir cannot be used. ConfigError: a pitch limit below the smallest step.
    """

    def __init__(self, config: AugmentationConfig | None = None) -> None:
        self.config = config or AugmentationConfig()
        wants_noise = self.config.enabled and self.config.noise_prob > 0
        self._pool = NoisePool(self.config.noise_dir) if wants_noise and self.config.noise_dir else None
        limit = self.config.max_pitch_semitones
        self._pitches = dsp.pitch_ratios(limit)
        if self.config.pitch_prob and limit and not self._pitches:
            raise ConfigError(
                f"augmentation.max_pitch_semitones is {limit}, below the smallest step of 0.29; raise it, "
                "or set pitch_prob: 0"
            )

    def __call__(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        *,
        generator: torch.Generator,
        trailing_samples: Tensor | None = None,
        keep_speed: Tensor | None = None,
    ) -> AugmentedBatch:
        """Draw effects for each clip and apply them.

        Args:
            audio: (B, T) float32, 16 kHz, on any device, zeros behind each clip; or one clip (T,). Not changed.
            lengths: (B,) int64 samples; None means T.
            generator: on the CPU.
            trailing_samples: (B,) int64 samples of pause behind each clip, through which its noise goes on.
            keep_speed: (B,) bool, clips whose labels hold times.
        Returns: the batch, zeros behind each clip and its noise; the input itself where nothing was drawn and it is
            wide enough. A clip that would grow past 30 s keeps its speed; a silent clip has no ratio and gets no noise.
        Raises: AudioError: a shape, type or length that does not fit. DeviceError: a generator that is not on the CPU.
        """
        if audio.dim() == 1:
            batch = self(
                audio[None], lengths, generator=generator, trailing_samples=trailing_samples, keep_speed=keep_speed
            )
            return batch._replace(audio=batch.audio[0])
        own_lengths = _check_batch(audio, lengths, generator)
        if not self.config.enabled:
            effects: tuple[Effects, ...] = (NOTHING,) * len(audio)
            return self.apply(audio, own_lengths, effects, seed=0, trailing_samples=trailing_samples)
        effects = self.draw(audio, own_lengths, generator, keep_speed=keep_speed)
        seed = int(torch.randint(2**62, (1,), generator=generator))
        return self.apply(audio, own_lengths, effects, seed=seed, trailing_samples=trailing_samples)

    def draw(
        self, audio: Tensor, lengths: Tensor, generator: torch.Generator, *, keep_speed: Tensor | None = None
    ) -> tuple[Effects, ...]:
        """Draw the effects of each clip of (B, T) audio."""
        count = len(audio)
        numbers = torch.rand(count, len(_Draws._fields), generator=generator, dtype=torch.float64).tolist()
        kept = [False] * count if keep_speed is None else keep_speed.tolist()
        audible = [False] * count
        if self.config.noise_prob:
            audible = (audio.abs().amax(dim=1) >= SILENCE_PEAK).tolist()
        return tuple(
            self._effects_of(
                _Draws(*numbers[row]), int(lengths[row]), keep_speed=kept[row], audible=audible[row],
                has_voices=sum(audible) > MIN_BABBLE_VOICES,
            )
            for row in range(count)
        )  # fmt: skip

    def _effects_of(self, draws: _Draws, length: int, *, keep_speed: bool, audible: bool, has_voices: bool) -> Effects:
        config = self.config
        speed = _pick(config.speed_factors, draws.speed)
        has_pitch = bool(self._pitches) and draws.pitch < config.pitch_prob
        has_room = draws.room < config.room_prob
        has_noise = audible and draws.noise < config.noise_prob
        return Effects(
            speed=1.0 if keep_speed or length / speed > CONTEXT_SAMPLES else speed,
            pitch=_pick(self._pitches, draws.pitch_step) if has_pitch else Fraction(1),
            rt60_sec=_between(RT60_SEC, draws.rt60) if has_room else None,
            direct_db=_between(DIRECT_DB, draws.direct) if has_room else 0.0,
            noise=_pick(self._noise_kinds(has_voices), draws.noise_kind) if has_noise else None,
            snr_db=_between((config.min_snr_db, config.max_snr_db), draws.snr) if has_noise else None,
            gain_db=_between((-config.max_gain_db, config.max_gain_db), draws.gain),
            telephone=draws.codec < config.codec_prob,
        )

    def _noise_kinds(self, has_voices: bool) -> tuple[NoiseKind, ...]:
        if self._pool is not None:
            return ("recording",)
        return (*EXPONENTS, "babble") if has_voices else tuple(EXPONENTS)

    @torch.no_grad()
    def apply(
        self,
        audio: Tensor,
        lengths: Tensor,
        effects: Sequence[Effects],
        *,
        seed: int,
        trailing_samples: Tensor | None = None,
    ) -> AugmentedBatch:
        """Apply given effects.

        Args:
            audio, lengths, trailing_samples: as `__call__`, (B, T).
            effects: one a clip.
            seed: of noise and rooms.
        """
        device, applied = lengths.device, tuple(effects)
        lengths = lengths.cpu()
        trailing = torch.zeros_like(lengths) if trailing_samples is None else trailing_samples.cpu()
        if all(effect == NOTHING for effect in applied):
            missing = int((lengths + trailing).max()) - audio.shape[1]
            padded = functional.pad(audio, (0, missing)) if missing > 0 else audio
            return AugmentedBatch(padded, lengths.to(device), applied)
        generator = torch.Generator().manual_seed(seed)
        with torch.autocast(device_type=audio.device.type, enabled=False):  # half precision is noise of its own
            changed, new_lengths = _change_speed(audio, lengths, applied)
            changed = functional.pad(changed, (0, int((new_lengths + trailing).max()) - changed.shape[1]))
            _shift_pitches(changed, new_lengths, applied)
            _add_rooms(changed, new_lengths, applied, generator)
            voices = _Voices(audio, lengths)
            reach = self._add_noise(changed, new_lengths, trailing, applied, generator, voices)
            _set_levels(changed, applied)
            rows = [row for row, effect in enumerate(applied) if effect.telephone]
            _change_rows(changed, reach, rows, lambda part, _: _limit_peak(dsp.telephone(part)))
        return AugmentedBatch(changed, new_lengths.to(device), applied)

    def _add_noise(
        self, audio: Tensor, lengths: Tensor, trailing: Tensor, effects: Sequence[Effects],
        generator: torch.Generator, voices: _Voices,
    ) -> Tensor:  # fmt: skip
        """Mix noise in; return how far each clip reaches, (B,): through its pause where it has noise."""
        reach = lengths.clone()
        for kind, rows in _groups([effect.noise for effect in effects], neutral=None).items():
            reach[rows] += trailing[rows]
            width, own = int(reach[rows].max()), lengths[rows]
            if kind == "recording":
                assert self._pool is not None  # only a pool makes this kind
                noise = self._pool.crops(own, width, generator).to(audio.device)
            elif kind == "babble":
                noise = babble(
                    *voices, targets=torch.tensor(rows), target_lengths=own, num_samples=width, generator=generator
                )
            else:
                exponents = torch.full((len(rows),), EXPONENTS[kind])
                noise = coloured_noise((len(rows), width), exponents, generator).to(audio.device)
            ratios_db = torch.tensor([effects[row].snr_db for row in rows], device=audio.device)
            noise = dsp.mask_padding(noise, reach[rows])
            at = torch.tensor(rows, device=audio.device)
            audio[at, :width] = mix_at_snr(audio[at, :width], noise, snr_db=ratios_db, lengths=own)
        return reach


def _change_speed(audio: Tensor, lengths: Tensor, effects: Sequence[Effects]) -> tuple[Tensor, Tensor]:
    """Return new audio and lengths, one resampling for each factor."""
    ratios = [dsp.speed_ratio(effect.speed) for effect in effects]
    groups = _groups(ratios, neutral=None)
    new_lengths = lengths.clone()
    for ratio, rows in groups.items():
        new_lengths[rows] = dsp.resampled_lengths(lengths[rows], ratio)
    changed = audio.new_zeros(len(audio), int(new_lengths.max()))
    for ratio, rows in groups.items():
        at = torch.tensor(rows, device=audio.device)
        part = audio[at, : int(lengths[rows].max())]
        if ratio != 1:
            part = dsp.mask_padding(dsp.resample_by(part, ratio), new_lengths[rows])
        width = int(new_lengths[rows].max())
        changed[at, :width] = part[:, :width]
    return changed, new_lengths


def _shift_pitches(audio: Tensor, lengths: Tensor, effects: Sequence[Effects]) -> None:
    for ratio, rows in _groups([effect.pitch for effect in effects], neutral=Fraction(1)).items():
        _change_rows(audio, lengths, rows, partial(dsp.shift_pitch, ratio=ratio))


def _add_rooms(audio: Tensor, lengths: Tensor, effects: Sequence[Effects], generator: torch.Generator) -> None:
    rooms = {row: (effect.rt60_sec, effect.direct_db) for row, effect in enumerate(effects) if effect.rt60_sec}
    if rooms:
        rt60_sec, direct_db = torch.tensor(list(rooms.values())).T
        impulses = dsp.room_impulses(rt60_sec, direct_db, generator).to(audio.device)
        _change_rows(audio, lengths, list(rooms), partial(dsp.reverberate, impulses=impulses))


def _set_levels(audio: Tensor, effects: Sequence[Effects]) -> None:
    """Apply gains; nothing that was changed in any way leaves with a peak above 1.0."""
    rows = [row for row, effect in enumerate(effects) if effect != NOTHING]
    at = torch.tensor(rows, device=audio.device)
    gain = torch.tensor([10 ** (effects[row].gain_db / 20) for row in rows], device=audio.device)
    audio[at] = _limit_peak(audio[at] * gain[:, None])


def _limit_peak(audio: Tensor) -> Tensor:
    """Scale rows down whose peak exceeds 1.0."""
    return audio / audio.abs().amax(dim=1, keepdim=True).clamp(min=1.0)


def _change_rows(audio: Tensor, lengths: Tensor, rows: list[int], change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace rows in place by `change(part (K, W), lengths (K,))`; what it leaves behind the clips is cut off."""
    if rows:
        own = lengths[rows]
        at, width = torch.tensor(rows, device=audio.device), int(own.max())
        audio[at, :width] = dsp.mask_padding(change(audio[at, :width], own), own)


def _groups(keys: Sequence[Any], *, neutral: Any) -> dict[Any, list[int]]:
    """Return the rows of each key but the neutral one."""
    groups: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        if key != neutral:
            groups.setdefault(key, []).append(row)
    return groups


def _pick(options: Sequence[Option], uniform: float) -> Option:
    return options[int(uniform * len(options))]


def _between(limits: tuple[float, float], uniform: float) -> float:
    low, high = limits
    return low + uniform * (high - low)


def _check_batch(audio: Tensor, lengths: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return (B,) int64 lengths."""
    if generator.device.type != "cpu":
        raise DeviceError(f"the generator is on {generator.device}; pass torch.Generator(), which is on the CPU")
    if audio.dim() != 2 or audio.dtype != torch.float32 or not audio.numel():
        raise AudioError(
            f"audio of shape {tuple(audio.shape)} and type {audio.dtype}: (B, T) or (T,) float32 in [-1, 1] is needed"
        )
    if lengths is None:
        return torch.full((len(audio),), audio.shape[1], device=audio.device)
    if lengths.shape != audio.shape[:1] or bool((lengths < 1).any()) or bool((lengths > audio.shape[1]).any()):
        raise AudioError(f"lengths {lengths.tolist()} do not fit {len(audio)} clips of up to {audio.shape[1]} samples")
    return lengths
