"""Signal processing in batches on the device: speed, pitch, rooms, telephones.

Every function takes (B, T) rows that share one parameter and gives each row what it would get alone, whatever the
padding behind it (tested). This is the only module that imports torchaudio, and only when a function is called: its
wheels fit few versions of torch, and whatever needs none of this must not fail with it.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from src.data.audio import SAMPLE_RATE
from src.utils.errors import MissingDependencyError

NEWEST_TORCHAUDIO = (2, 11, 0)  # its last release line; it follows torch's numbers up to there
MAX_DENOMINATOR = 100  # of resampling ratios: factors of two decimals stay exact, and kernels small
KERNEL_ZEROS = 16  # zero crossings each side; torchaudio's 6 dull the octave that holds fricatives
VOCODER_FFT = 512  # samples: 32 ms, long enough to part the harmonics of a low voice
VOCODER_HOP = VOCODER_FFT // 4
FFT_STEP = 4_096  # samples; multiples of it have small prime factors, where an FFT is quick
MIN_ROOM_SEC = 0.002  # the first reflection comes after a detour of at least 0.7 m
TELEPHONE_RATE = SAMPLE_RATE // 2  # 8_000 Hz
TELEPHONE_ROLLOFF = 0.9  # of 4 kHz: the flank of the filter ends below it
TELEPHONE_ZEROS = 16
G711_CLIP = 8_158  # of 8_192: the largest magnitude that G.711 codes
G711_BIAS = 33


def resample_by(audio: Tensor, ratio: Fraction) -> Tensor:
    """Play audio faster, as a tape: pitch and tempo rise together.

    Args:
        audio: (B, T) float32.
        ratio: speed; above 1 is faster, higher and shorter.
    Returns: (B, ceil(T / ratio)).
    Raises: MissingDependencyError: no torchaudio that fits.
    """
    resampled: Tensor = _torchaudio_functional().resample(
        audio.contiguous(), ratio.numerator, ratio.denominator, lowpass_filter_width=KERNEL_ZEROS
    )
    return resampled


def speed_ratio(factor: float) -> Fraction:
    """Return the ratio of small integers next to a speed factor."""
    return Fraction(factor).limit_denominator(MAX_DENOMINATOR)


def resampled_lengths(lengths: Tensor, ratio: Fraction) -> Tensor:
    """Return round(T / ratio) for (B,) int64 lengths."""
    return (lengths.double() * ratio.denominator / ratio.numerator).round().long()


def shift_pitch(audio: Tensor, lengths: Tensor, *, ratio: Fraction) -> Tensor:
    """Multiply all frequencies, formants too, and keep lengths and energies: stretch by phase vocoder, then resample.

    Flanagan and Golden, "Phase Vocoder", 1966. Not `torchaudio.functional.pitch_shift`: it resamples between rates
    that share no factor, through a kernel of a gigabyte.

    Args:
        audio: (B, T) float32.
        lengths: (B,) int64 samples; zeros lie behind each clip, before and after.
        ratio: of frequencies, 2 ** (semitones / 12).
    Returns: (B, T).
    Raises: MissingDependencyError: no torchaudio that fits.
    """
    samples = audio.shape[1]
    window = torch.hann_window(VOCODER_FFT, device=audio.device)
    # Zeros on both sides: a reflected edge would differ between a clip alone and the same clip in front of padding.
    padded = functional.pad(audio, (0, VOCODER_FFT))
    spectrum = torch.stft(padded, VOCODER_FFT, VOCODER_HOP, window=window, pad_mode="constant", return_complex=True)
    stretched = stretch_spectrum(spectrum, 1 / ratio)  # (B, bins, frames * ratio)
    reach = samples + VOCODER_HOP  # a cut at the clip's end would ring in the resampler
    longer = torch.istft(stretched, VOCODER_FFT, VOCODER_HOP, window=window, length=math.ceil(reach * ratio))
    return _keep_energy(audio, resample_by(longer, ratio)[:, :samples], lengths)


def stretch_spectrum(spectrum: Tensor, rate: Fraction) -> Tensor:
    """Change the tempo of an STFT and keep its frequencies.

    It gives what `torchaudio.functional.phase_vocoder` gives (tested) with half of its trigonometry: the turn of a bin
    from frame to frame is the angle of one complex product. Whole turns make no difference; left out, they do not eat
    the digits of a sum over 30 s.

    Args:
        spectrum: (B, bins, F) complex64.
        rate: above 1 is faster.
    Returns: (B, bins, ceil(F / rate)) complex64.
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
    ups = set()
    for quarter in range(1, 5):
        exact = 2 ** (max_semitones * quarter / 4 / 12)
        # 1e-9: a ratio that is exact must not fall below itself by rounding
        ups.add(max(Fraction(int(exact * down + 1e-9), down) for down in range(1, 61)))
    ups.discard(Fraction(1))
    return tuple(sorted(ups | {1 / up for up in ups}))


def semitones(ratio: Fraction) -> float:
    """Return 12 log2(ratio)."""
    return 12 * math.log2(ratio)


def room_impulses(rt60_sec: Tensor, direct_db: Tensor, generator: torch.Generator) -> Tensor:
    """Make impulse responses of rooms: the direct sound at once, then noise that decays by 60 dB in RT60.

    h(t) = b(t) exp(-3 ln(10) t / RT60) with b white noise: Polack, "La transmission de l'énergie sonore dans les
    salles", 1988; Lebart et al., "A New Method Based on Spectral Subtraction for Speech Dereverberation", 2001.

    Args:
        rt60_sec: (B,) seconds.
        direct_db: (B,) power of the direct sound over that of everything behind it, dB.
        generator: on the CPU.
    Returns: (B, S) float32 on the CPU; `[:, 0]` is 1, the direct sound.
    """
    taps = int(float(rt60_sec.max()) * SAMPLE_RATE)
    time_sec = torch.arange(taps) / SAMPLE_RATE
    tail = torch.randn(len(rt60_sec), taps, generator=generator)
    tail = tail * torch.exp(-3 * math.log(10) * time_sec / rt60_sec[:, None])  # amplitudes: 60 dB are a factor 1000
    tail = tail * (time_sec >= MIN_ROOM_SEC)
    energy = tail.square().sum(dim=1, keepdim=True)
    tail = tail * (10 ** (-direct_db[:, None] / 10) / energy).sqrt()  # sqrt: a power ratio, applied to amplitudes
    tail[:, 0] = 1.0
    return tail


def reverberate(audio: Tensor, lengths: Tensor, *, impulses: Tensor) -> Tensor:
    """Let clips sound in rooms; words keep their times, clips their lengths and energies.

    Args:
        audio: (B, T) float32, zeros behind each clip.
        lengths: (B,) int64 samples; what rings on behind a clip is cut.
        impulses: (B, S), of `room_impulses`.
    Returns: (B, T).
    Raises: MissingDependencyError: no torchaudio that fits.
    """
    samples = audio.shape[1]
    full = samples + impulses.shape[1] - 1
    padded = functional.pad(audio, (0, -full % FFT_STEP))
    wet: Tensor = _torchaudio_functional().fftconvolve(padded, impulses)[:, :samples]
    return _keep_energy(audio, wet, lengths)


def telephone(audio: Tensor) -> Tensor:
    """Send audio through a telephone: 8 kHz, 8-bit mu-law, back to 16 kHz.

    Args:
        audio: (B, T) float32; beyond [-1, 1] it is clipped, as the codec does.
    Returns: (B, T), with nothing above 4 kHz.
    Raises: MissingDependencyError: no torchaudio that fits.
    """
    resample = _torchaudio_functional().resample
    options: dict[str, Any] = {"lowpass_filter_width": TELEPHONE_ZEROS, "rolloff": TELEPHONE_ROLLOFF}
    padded = functional.pad(audio, (0, 4 * TELEPHONE_ZEROS))  # the filters ring on behind a clip, padding or not
    narrow = resample(padded, SAMPLE_RATE, TELEPHONE_RATE, **options)
    wide: Tensor = resample(g711_mu_law(narrow), TELEPHONE_RATE, SAMPLE_RATE, **options)
    return wide[:, : audio.shape[1]]


def g711_mu_law(audio: Tensor) -> Tensor:
    """Encode to 8 bits and decode: ITU-T G.711, the segments of the standard and not the smooth curve behind them.

    Args:
        audio: any shape, float32; full scale is 1.
    Returns: the same shape, on the 255 levels of the codec; 0 stays 0.
    """
    magnitude = (audio.abs() * 8_192).floor().clamp(max=G711_CLIP) + G711_BIAS  # 13 bits and sign, as integers
    segment = torch.log2(magnitude + 0.5).floor() - 5  # 0 to 7; + 0.5: no integer lies at an edge of rounding
    step = torch.exp2(segment + 1)
    middle = (torch.floor(magnitude / step) + 0.5) * step - G711_BIAS
    return torch.sign(audio) * middle / 8_192


def mask_padding(audio: Tensor, lengths: Tensor) -> Tensor:
    """Set everything behind each clip to zero, keeping (B, T)."""
    position = torch.arange(audio.shape[1], device=audio.device)
    return audio.masked_fill(position >= lengths.to(audio.device)[:, None], 0.0)


def _keep_energy(before: Tensor, after: Tensor, lengths: Tensor) -> Tensor:
    after = mask_padding(after, lengths)
    wanted = before.square().sum(dim=1, keepdim=True)
    found = after.square().sum(dim=1, keepdim=True)
    return after * (wanted / found.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()  # silence stays silence


@cache
def _torchaudio_functional() -> Any:
    try:
        from torchaudio import functional as torchaudio_functional
    except ModuleNotFoundError as err:
        raise MissingDependencyError(
            f"augmentation needs torchaudio ({err}): pip install torchaudio=={_fitting_torchaudio()}"
        ) from err
    except (ImportError, OSError, RuntimeError, AttributeError) as err:  # what wheels of another torch or CUDA raise
        raise MissingDependencyError(
            f"torchaudio does not import beside torch {torch.__version__} ({err}). Its wheels need a CUDA build of "
            "torch, which runs on the CPU too: pip install --force-reinstall torch==2.11.0 torchaudio==2.11.0 "
            "and restart the runtime"
        ) from err
    return torchaudio_functional


def _fitting_torchaudio() -> str:
    installed = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:3])
    return ".".join(str(part) for part in min(installed, NEWEST_TORCHAUDIO))
