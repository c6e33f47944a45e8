"""Effects on batches of speech: speed, pitch, rooms, noise, level, telephone; one class for each.

`CHAIN` lists them in the order of a recording: the voice, the room around it, the noise that a microphone hears next to
it, the recording level, the telephone line. So the noise does not sound in the voice's room, its ratio is to the voice
as the microphone hears it, and the codec quantises whatever level arrives. Every row gets what it would get alone,
whatever the padding after it (tested).

This is the only module that imports torchaudio, and only when an effect needs it: its wheels fit few versions of torch,
and code that needs no effect must not fail with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from src.data.audio import SAMPLE_RATE
from src.data.augmentation import noise
from src.data.augmentation.noise import EXPONENTS, NoiseKind, NoisePool, mask_padding
from src.data.features import CONTEXT_SAMPLES
from src.utils.config import AugmentationConfig
from src.utils.errors import MissingDependencyError
from src.utils.files import uninterrupted

NEWEST_TORCHAUDIO = (2, 11, 0)  # its last release line; it follows torch's numbers up to there
MAX_DENOMINATOR = 100  # of resampling ratios: factors of two decimals stay exact, and kernels small
KERNEL_ZEROS = 16  # zero crossings each side; torchaudio's 6 dull the octave that holds fricatives
VOCODER_FFT = 512  # samples: 32 ms, long enough to part the harmonics of a low voice
VOCODER_HOP = VOCODER_FFT // 4
RT60_SEC = (0.15, 0.6)  # a furnished small room to a bare large one
DIRECT_DB = (0.0, 12.0)  # direct sound over reverberation: across the room to close to the microphone
MIN_ROOM_SEC = 0.002  # the first reflection comes after a detour of at least 0.7 m
FFT_STEP = 4_096  # samples; multiples of it have small prime factors, where an FFT is quick
TELEPHONE_RATE = SAMPLE_RATE // 2  # 8_000 Hz
TELEPHONE_ROLLOFF = 0.9  # of 4 kHz: the flank of the filter ends below it
TELEPHONE_ZEROS = 16
G711_CLIP = 8_158  # of 8_192: the largest magnitude that G.711 codes
G711_BIAS = 33

T = TypeVar("T")


class Clip(NamedTuple):
    """What the draw of an effect for a clip may depend on."""

    samples: int
    keep_speed: bool  # its label holds times
    audible: bool  # else noise has no ratio to it
    has_voices: bool  # enough of its batch is audible to make babble


@dataclass
class Batch:
    """A batch while effects change it; (B,) tensors are int64 samples on the CPU."""

    audio: Tensor  # (B, T') float32
    lengths: Tensor
    trailing: Tensor  # pause after each clip
    reach: Tensor  # end of what each clip holds: `lengths`, or the end of the pause where noise goes on through it
    original: tuple[Tensor, Tensor]  # audio and lengths as they came, from which babble is made
    pool: NoisePool | None
    generator: torch.Generator  # on the CPU, so that a seed means the same on every device

    def change(self, rows: list[int], lengths: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace rows by `change(part (K, W), lengths (K,))`; what it leaves after the clips is cut off."""
        own = lengths[rows]
        width = max(own.tolist())
        self.audio[rows, :width] = mask_padding(change(self.audio[rows, :width], own), own)


class Effect:
    """One change of one clip, with the values that were drawn for it; a subclass is a frozen dataclass.

    `draw` gets `numbers` uniform numbers in [0, 1) for each clip, whether the effect is on or not, so that switching it
    leaves the draws of the others alone. If the setting is a probability, the first number decides.
    """

    setting: ClassVar[str]  # the field of `AugmentationConfig` that switches it on
    numbers: ClassVar[int]
    needs_torchaudio: ClassVar[bool] = True  # it is off where torchaudio cannot be imported

    @classmethod
    def draw(cls, config: AugmentationConfig, clip: Clip, *uniform: float) -> Self | None:
        """Return the effect with its values, or None where the clip stays as it is."""
        if not cls.setting.endswith("_prob"):
            return cls._draw(config, clip, *uniform)
        return cls._draw(config, clip, *uniform[1:]) if uniform[0] < getattr(config, cls.setting) else None

    @classmethod
    def apply(cls, batch: Batch, chosen: Mapping[int, Self]) -> None:
        """Change the chosen rows of a batch, those of one group at once."""
        groups: dict[Hashable, list[int]] = {}
        for row, effect in chosen.items():
            groups.setdefault(effect._group(), []).append(row)
        for rows in groups.values():
            cls._apply(batch, rows, [chosen[row] for row in rows])

    @classmethod
    def _draw(cls, config: AugmentationConfig, clip: Clip, *uniform: float) -> Self | None:
        raise NotImplementedError

    def _group(self) -> Hashable:
        return None

    @classmethod
    def _apply(cls, batch: Batch, rows: list[int], effects: Sequence[Self]) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Speed(Effect):
    """Played faster or slower, as a tape: pitch and tempo by one factor; the length becomes round(T / factor)."""

    factor: float
    setting = "speed_factors"
    numbers = 1

    @classmethod
    def _draw(cls, config: AugmentationConfig, clip: Clip, *uniform: float) -> Self | None:
        return cls.of(clip, _pick(config.speed_factors, uniform[0]))

    @classmethod
    def of(cls, clip: Clip, factor: float) -> Self | None:
        """Return the effect of a factor on a clip; None where the clip stays as it is."""
        too_long = clip.samples / factor > CONTEXT_SAMPLES
        return None if factor == 1 or clip.keep_speed or too_long else cls(factor)

    def _group(self) -> Fraction:
        return speed_ratio(self.factor)

    @classmethod
    def _apply(cls, batch: Batch, rows: list[int], effects: Sequence[Self]) -> None:
        factor, before = effects[0].factor, batch.lengths[rows].tolist()
        own = torch.tensor([sped_up(samples, factor) for samples in before])
        changed = resample_by(batch.audio[rows, : max(before)], speed_ratio(factor))[:, : max(own.tolist())]
        batch.lengths[rows] = batch.reach[rows] = own
        missing = max((own + batch.trailing[rows]).tolist()) - batch.audio.shape[1]
        batch.audio = functional.pad(batch.audio, (0, max(missing, 0)))
        batch.audio[rows] = 0
        batch.audio[rows, : changed.shape[1]] = mask_padding(changed, own)

    def __str__(self) -> str:
        return f"speed x{self.factor:g}"


@dataclass(frozen=True)
class Pitch(Effect):
    """All frequencies times a ratio, at the same length."""

    ratio: Fraction
    setting = "pitch_prob"
    numbers = 2

    @classmethod
    def _draw(cls, config: AugmentationConfig, clip: Clip, *uniform: float) -> Self | None:
        ratios = pitch_ratios(config.max_pitch_semitones)
        return cls(_pick(ratios, uniform[0])) if ratios else None

    def _group(self) -> Fraction:
        return self.ratio

    @classmethod
    def _apply(cls, batch: Batch, rows: list[int], effects: Sequence[Self]) -> None:
        batch.change(rows, batch.lengths, partial(shift_pitch, ratio=effects[0].ratio))

    def __str__(self) -> str:
        return f"pitch {12 * math.log2(self.ratio):+.1f} semitones"


@dataclass(frozen=True)
class Room(Effect):
    """Heard in a room."""

    rt60_sec: float  # reverberation time
    direct_db: float  # direct sound over reverberation
    setting = "room_prob"
    numbers = 3

    @classmethod
    def _draw(cls, config: AugmentationConfig, clip: Clip, *uniform: float) -> Self | None:
        return cls(_between(RT60_SEC, uniform[0]), _between(DIRECT_DB, uniform[1]))

    @classmethod
    def _apply(cls, batch: Batch, rows: list[int], effects: Sequence[Self]) -> None:
        rt60_sec, direct_db = torch.tensor([(effect.rt60_sec, effect.direct_db) for effect in effects]).T
        impulses = room_impulses(rt60_sec, direct_db, batch.generator).to(batch.audio.device)
        batch.change(rows, batch.lengths, partial(reverberate, impulses=impulses))

    def __str__(self) -> str:
        return f"room, RT60 {self.rt60_sec:.2f} s"


@dataclass(frozen=True)
class Noise(Effect):
    """Noise of a kind, at a ratio of speech over noise, through the pause after the clip too."""

    kind: NoiseKind
    snr_db: float
    setting = "noise_prob"
    numbers = 3
    needs_torchaudio = False

    @classmethod
    def _draw(cls, config: AugmentationConfig, clip: Clip, *uniform: float) -> Self | None:
        kinds: tuple[NoiseKind, ...] = (*EXPONENTS, "babble") if clip.has_voices else tuple(EXPONENTS)
        kind = _pick(("recording",) if config.noise_dir else kinds, uniform[0])
        return cls(kind, _between((config.min_snr_db, config.max_snr_db), uniform[1])) if clip.audible else None

    def _group(self) -> NoiseKind:
        return self.kind

    @classmethod
    def _apply(cls, batch: Batch, rows: list[int], effects: Sequence[Self]) -> None:
        kind, own = effects[0].kind, batch.lengths[rows]
        batch.reach[rows] = own + batch.trailing[rows]
        width = max(batch.reach[rows].tolist())
        if kind == "recording":
            assert batch.pool is not None  # only a pool makes this kind
            added = batch.pool.crops(own, width, batch.generator)
        elif kind == "babble":
            added = noise.babble(*batch.original, torch.tensor(rows), own, width, batch.generator)
        else:
            exponents = torch.full((len(rows),), EXPONENTS[kind])
            added = noise.coloured_noise((len(rows), width), exponents, batch.generator)
        added = mask_padding(added.to(batch.audio.device), batch.reach[rows])
        snr_db = torch.tensor([effect.snr_db for effect in effects], device=batch.audio.device)
        batch.audio[rows, :width] = noise.mix_at_snr(batch.audio[rows, :width], added, snr_db=snr_db, lengths=own)

    def __str__(self) -> str:
        return f"{'recorded' if self.kind == 'recording' else self.kind} noise, SNR {self.snr_db:.0f} dB"


@dataclass(frozen=True)
class Gain(Effect):
    """Another recording level; reduced where the peak would exceed 1.0."""

    gain_db: float
    setting = "max_gain_db"
    numbers = 1
    needs_torchaudio = False

    @classmethod
    def _draw(cls, config: AugmentationConfig, clip: Clip, *uniform: float) -> Self | None:
        gain_db = _between((-config.max_gain_db, config.max_gain_db), uniform[0])
        return cls(gain_db) if gain_db else None

    @classmethod
    def _apply(cls, batch: Batch, rows: list[int], effects: Sequence[Self]) -> None:
        factors = [10 ** (effect.gain_db / 20) for effect in effects]
        batch.audio[rows] *= torch.tensor(factors, device=batch.audio.device)[:, None]

    def __str__(self) -> str:
        return f"gain {self.gain_db:+.1f} dB"


@dataclass(frozen=True)
class Telephone(Effect):
    """Sent through a telephone."""

    setting = "codec_prob"
    numbers = 1

    @classmethod
    def _draw(cls, config: AugmentationConfig, clip: Clip, *uniform: float) -> Self | None:
        return cls()

    @classmethod
    def _apply(cls, batch: Batch, rows: list[int], effects: Sequence[Self]) -> None:
        batch.change(rows, batch.reach, lambda part, _: telephone(limit_peak(part)))

    def __str__(self) -> str:
        return "telephone"


CHAIN: tuple[type[Effect], ...] = (Speed, Pitch, Room, Noise, Gain, Telephone)


def limit_peak(audio: Tensor) -> Tensor:
    """Scale rows down whose peak exceeds 1.0."""
    return audio / audio.abs().amax(dim=1, keepdim=True).clamp(min=1.0)


def _pick(options: Sequence[T], uniform: float) -> T:
    return options[int(uniform * len(options))]


def _between(limits: tuple[float, float], uniform: float) -> float:
    low, high = limits
    return low + uniform * (high - low)


@cache
def speed_ratio(factor: float) -> Fraction:
    """Return a speed factor as the ratio that audio is resampled by."""
    return Fraction(factor).limit_denominator(MAX_DENOMINATOR)


def sped_up(samples: int, factor: float) -> int:
    """Return the samples of a clip at another speed."""
    return round(samples * speed_ratio(factor).denominator / speed_ratio(factor).numerator)


def resample_by(audio: Tensor, ratio: Fraction) -> Tensor:
    """Play (B, T) audio faster, as a tape; above 1 is faster, higher and shorter: (B, ceil(T / ratio))."""
    resampled: Tensor = torchaudio_functional().resample(
        audio.contiguous(), ratio.numerator, ratio.denominator, lowpass_filter_width=KERNEL_ZEROS
    )
    return resampled


def shift_pitch(audio: Tensor, lengths: Tensor, *, ratio: Fraction) -> Tensor:
    """Multiply all frequencies, formants too, and keep lengths and energies: stretch by phase vocoder, then resample.

    Flanagan and Golden, "Phase Vocoder", 1966. Not `torchaudio.functional.pitch_shift`: it resamples between rates
    that share no factor, through a kernel of a gigabyte.
    """
    samples = audio.shape[1]
    window = torch.hann_window(VOCODER_FFT, device=audio.device)
    # zeros on both sides: a reflected edge would differ between a clip alone and the same clip in front of padding
    padded = functional.pad(audio, (0, VOCODER_FFT))
    spectrum = torch.stft(padded, VOCODER_FFT, VOCODER_HOP, window=window, pad_mode="constant", return_complex=True)
    stretched = stretch_spectrum(spectrum, 1 / ratio)  # (B, bins, frames * ratio)
    reach = samples + VOCODER_HOP  # a cut at the clip's end would ring in the resampler
    longer = torch.istft(stretched, VOCODER_FFT, VOCODER_HOP, window=window, length=math.ceil(reach * ratio))
    return _keep_energy(audio, resample_by(longer, ratio)[:, :samples], lengths)


def stretch_spectrum(spectrum: Tensor, rate: Fraction) -> Tensor:
    """Change the tempo of a (B, bins, F) complex64 STFT and keep its frequencies: (B, bins, ceil(F / rate)).

    It gives what `torchaudio.functional.phase_vocoder` gives (tested) with half of its trigonometry: the turn of a bin
    from frame to frame is the angle of one complex product. Whole turns change nothing: they are left out,
    since they would cost a sum over 30 s its last digits.
    """
    frames = functional.pad(spectrum.transpose(1, 2), (0, 0, 0, 2))  # (B, F + 2, bins): a frame lies in one piece
    size = frames.abs()
    turn = (frames[:, 1:] * frames[:, :-1].conj()).angle()  # (B, F + 1, bins) radians
    at = torch.arange(math.ceil(spectrum.shape[2] / rate), device=spectrum.device) * rate.numerator
    left = at // rate.denominator  # in integers: a frame that is hit exactly must not become the one before
    share = (at % rate.denominator / rate.denominator).to(size.dtype)[:, None]
    new_size = torch.lerp(size[:, left], size[:, left + 1], share)
    turns = torch.cat([frames[:, :1].angle(), turn[:, left[:-1]]], dim=1)
    return torch.polar(new_size, turns.cumsum(dim=1)).transpose(1, 2)


@cache
def pitch_ratios(max_semitones: float) -> tuple[Fraction, ...]:
    """Return the steps of pitch within a limit: four up and four down where the limit is wide enough, evenly spaced.

    Few steps, so that clips of a batch share one; ratios of small integers, so that kernels are small. Each step is the
    nearest such ratio that is not above it, so that none exceeds the limit. At 2 semitones: 55/49, 12/11, ...
    """
    exact = [2 ** (max_semitones * quarter / 4 / 12) for quarter in range(1, 5)]
    # 1e-9: a ratio that is exact must not fall below itself by rounding
    ups = {max(Fraction(int(step * down + 1e-9), down) for down in range(1, 61)) for step in exact} - {Fraction(1)}
    return tuple(sorted(ups | {1 / up for up in ups}))


def room_impulses(rt60_sec: Tensor, direct_db: Tensor, generator: torch.Generator) -> Tensor:
    """Make impulse responses of rooms, (B, S): the direct sound, 1, then noise that decays by 60 dB in RT60 (B,).

    h(t) = b(t) exp(-3 ln(10) t / RT60) with b white noise: Polack, "La transmission de l'énergie sonore dans les
    salles", 1988; Lebart et al., "A New Method Based on Spectral Subtraction for Speech Dereverberation", 2001.
    `direct_db` (B,) is the power of the direct sound over that of everything after it.
    """
    taps = int(max(rt60_sec.tolist()) * SAMPLE_RATE)
    time_sec = torch.arange(taps) / SAMPLE_RATE
    tail = torch.randn(len(rt60_sec), taps, generator=generator)
    tail = tail * torch.exp(-3 * math.log(10) * time_sec / rt60_sec[:, None])  # amplitudes: 60 dB are a factor 1000
    tail = tail * (time_sec >= MIN_ROOM_SEC)
    energy = tail.square().sum(dim=1, keepdim=True)
    tail = tail * (10 ** (-direct_db[:, None] / 10) / energy).sqrt()  # sqrt: a power ratio, applied to amplitudes
    tail[:, 0] = 1.0
    return tail


def reverberate(audio: Tensor, lengths: Tensor, *, impulses: Tensor) -> Tensor:
    """Convolve (B, T) clips with rooms (B, S); words keep their times, clips their lengths (B,) and energies."""
    samples = audio.shape[1]
    full = samples + impulses.shape[1] - 1
    padded = functional.pad(audio, (0, -full % FFT_STEP))
    wet: Tensor = torchaudio_functional().fftconvolve(padded, impulses)[:, :samples]
    return _keep_energy(audio, wet, lengths)


def telephone(audio: Tensor) -> Tensor:
    """Send (B, T) audio through a telephone: 8 kHz, 8-bit mu-law, back to 16 kHz with nothing above 4 kHz."""
    resample = torchaudio_functional().resample
    options: dict[str, Any] = {"lowpass_filter_width": TELEPHONE_ZEROS, "rolloff": TELEPHONE_ROLLOFF}
    padded = functional.pad(audio, (0, 4 * TELEPHONE_ZEROS))  # the filters ring on after a clip, padding or not
    narrow = resample(padded, SAMPLE_RATE, TELEPHONE_RATE, **options)
    wide: Tensor = resample(g711_mu_law(narrow), TELEPHONE_RATE, SAMPLE_RATE, **options)
    return wide[:, : audio.shape[1]]


def g711_mu_law(audio: Tensor) -> Tensor:
    """Encode float32 audio to 8 bits and decode it: ITU-T G.711, the segments of the standard, not the smooth curve."""
    magnitude = (audio.abs() * 8_192).floor().clamp(max=G711_CLIP) + G711_BIAS  # 13 bits and sign, as integers
    segment = torch.log2(magnitude + 0.5).floor() - 5  # 0 to 7; + 0.5: no integer lies at an edge of rounding
    step = torch.exp2(segment + 1)
    middle = (torch.floor(magnitude / step) + 0.5) * step - G711_BIAS
    return torch.sign(audio) * middle / 8_192


def _keep_energy(before: Tensor, after: Tensor, lengths: Tensor) -> Tensor:
    after = mask_padding(after, lengths)
    wanted = before.square().sum(dim=1, keepdim=True)
    found = after.square().sum(dim=1, keepdim=True)
    return after * (wanted / found.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()  # silence stays silence


@cache
def torchaudio_functional() -> Any:
    """Import torchaudio, once; where it is absent or does not fit torch, the error says how to install it."""
    try:
        with uninterrupted():  # its libraries may answer Ctrl-C with one of the errors below
            from torchaudio import functional as torchaudio_functional
    except ModuleNotFoundError as err:
        installed = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:3])
        fitting = ".".join(map(str, min(installed, NEWEST_TORCHAUDIO)))
        raise MissingDependencyError(
            f"augmentation needs torchaudio ({err}): pip install torchaudio=={fitting}"
        ) from err
    except (ImportError, OSError, RuntimeError, AttributeError) as err:  # what wheels of another torch or CUDA raise
        raise MissingDependencyError(
            f"torchaudio does not import together with torch {torch.__version__} ({err}). Its wheels need a CUDA build "
            "of torch, which runs on the CPU too: pip install --force-reinstall torch==2.11.0 torchaudio==2.11.0 "
            "and restart the runtime"
        ) from err
    return torchaudio_functional
