"""Noise in batches: coloured, babble from other clips, recordings from a folder; mixed at a given ratio.

Random numbers come from a generator on the CPU, so that a seed gives the same noise on every device;
only coloured noise and crops of recordings then travel there.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from src.data.audio import SAMPLE_RATE, SILENCE_PEAK, load_audio
from src.data.sources.folder import AUDIO_SUFFIXES
from src.utils.errors import AudioError, DataError

logger = logging.getLogger(__name__)

NoiseKind = Literal["white", "pink", "brown", "babble", "recording"]
EXPONENTS: dict[NoiseKind, float] = {"white": 0.0, "pink": 1.0, "brown": 2.0}  # power falls as 1 / f^exponent
LOWEST_HZ = 20.0  # below it nothing is heard, and brown noise would have all its power there
BABBLE_VOICES = 4  # of which no single one is followed
MAX_RECORDING_SEC = 60  # of each file of a folder, so that a few long ones do not fill the pool
MAX_POOL_SEC = 3_600  # 230 MB of float32


def mix_at_snr(speech: Tensor, noise: Tensor, *, snr_db: float | Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mix noise into speech at a given signal-to-noise ratio.

    Equal to `torchaudio.functional.add_noise` to 3e-8; without it, noise works where torchaudio does not.

    Args:
        speech: (T,) or (B, T) float32 in [-1, 1], 16 kHz.
        noise: the same shape, same rate.
        snr_db: power ratio in dB over the whole clip, one for all or (B,).
        lengths: (B,) int64 samples of each clip, over which the ratio is measured; None means T. Noise after a clip
            stays, at the same level.

    Returns:
        The mixture, same shape; may exceed 1.0, the caller decides.

    Raises:
        AudioError: if either signal is silent: there is no such ratio then.
    """
    speech_energy, noise_energy = _energy(speech, lengths), _energy(noise, lengths)  # (..., 1)
    for name, energy in (("speech", speech_energy), ("noise", noise_energy)):
        if bool((energy <= 0).any()):
            raise AudioError(
                f"the {name} is silent, so that it has no ratio to the other; leave this clip without noise"
            )
    ratio_db = torch.as_tensor(snr_db, dtype=torch.float32, device=speech.device)
    wanted = speech_energy / 10 ** (ratio_db[..., None] / 10)
    scale: Tensor = (wanted / noise_energy).sqrt()  # sqrt: snr is a power ratio, waveforms are amplitudes
    return speech + noise * scale


def coloured_noise(shape: tuple[int, int], exponents: Tensor, generator: torch.Generator) -> Tensor:
    """Make noise whose power falls as 1 / f^exponent above 20 Hz: 0 is white, 1 pink, 2 brown.

    Timmer and Koenig, "On generating power law noise", 1995: Gaussian noise, shaped in the spectrum.

    Args:
        shape: (B, T).
        exponents: (B,).
        generator: on the CPU.

    Returns:
        (B, T) float32 on the CPU; each row has mean square 1.
    """
    samples = shape[1]
    hertz = torch.fft.rfftfreq(samples, d=1 / SAMPLE_RATE)
    # half the exponent: the slope is of power, the spectrum is of amplitudes
    weights = hertz.clamp(min=LOWEST_HZ) ** (-exponents.float()[:, None] / 2) * (hertz >= LOWEST_HZ)
    spectrum = torch.fft.rfft(torch.randn(shape, generator=generator))
    noise: Tensor = torch.fft.irfft(spectrum * weights, n=samples)
    level = noise.square().mean(dim=-1, keepdim=True).sqrt()
    return noise / level.clamp(min=torch.finfo(torch.float32).tiny)


def babble(
    clips: Tensor,
    lengths: Tensor,
    *,
    targets: Tensor,
    target_lengths: Tensor,
    num_samples: int,
    generator: torch.Generator,
) -> Tensor:
    """Mix voices of other clips of a batch: up to four for each target, equally loud, never its own.

    A voice is looped, from a random place; its loudest sample falls inside the target, so that no target is left with
    a pause of the voices and an undefined ratio.

    Args:
        clips: (B, T) float32 on any device.
        lengths: (B,) int64 samples.
        targets: (K,) int64, rows of `clips` that get babble.
        target_lengths: (K,) int64 samples.
        num_samples: to return.
        generator: on the CPU.

    Returns:
        (K, num_samples) float32 on the device of `clips`; each voice has mean square 1 over its own clip.

    Raises:
        AudioError: a target without another clip that is not silent.
    """
    device = clips.device
    peaks, loudest = clips.abs().max(dim=1)
    # choose rows of other clips, (K, voices), and note which count, where there are too few
    score = torch.rand(len(targets), len(clips), generator=generator)
    score[torch.arange(len(targets)), targets] = -1.0
    score[:, (peaks < SILENCE_PEAK).cpu()] = -1.0
    best, chosen = score.topk(min(BABBLE_VOICES, len(clips)), dim=1)
    if bool((best[:, 0] < 0).any()):
        raise AudioError("babble needs another clip in the batch that is not silent; use coloured noise for this one")
    place = (torch.rand(chosen.shape, generator=generator) * target_lengths.cpu()[:, None]).long()
    position = torch.arange(num_samples, device=device)
    own = lengths.to(device)
    level = clips.square().sum(dim=1).div(own.clamp(min=1)).sqrt().clamp(min=SILENCE_PEAK)
    mixed = torch.zeros(len(targets), num_samples, device=device)
    for voice in range(chosen.shape[1]):  # not all voices at once: at 30 s their indices would take half a gigabyte
        row = chosen[:, voice].to(device)
        at = (position + (loudest[row] - place[:, voice].to(device))[:, None]) % own[row][:, None]
        counts = (best[:, voice] >= 0).to(device)
        mixed += clips[row].gather(1, at) * (counts / level[row])[:, None]
    return mixed


class NoisePool:
    """Recordings of a folder, decoded once, from which crops are drawn.

    A broken file shows when the pool is made, not hours into a training. At most an hour is kept: a larger folder gives
    recordings from all over it, in an order that is fixed.

    Args:
        folder: with audio files, at any depth; the first minute of each counts.

    Raises:
        DataError: no such folder, or no audio in it.
        AudioError: a recording that cannot be decoded or is silent.
    """

    def __init__(self, folder: str | Path) -> None:
        paths = _audio_files(Path(folder))
        recordings: list[Tensor] = []
        room = MAX_POOL_SEC * SAMPLE_RATE
        for index in torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist():
            if room <= 0:
                break
            recording = torch.from_numpy(load_audio(paths[index])[: MAX_RECORDING_SEC * SAMPLE_RATE])
            if not bool(recording.any()):
                raise AudioError(
                    f"{paths[index]}: its first {MAX_RECORDING_SEC} s are digital silence; cut them off, or remove it"
                )
            recordings.append(recording[:room])
            room -= len(recording)
        self._tape = torch.cat(recordings)  # one tensor, so that a batch of crops is one indexing
        self._lengths = torch.tensor([len(recording) for recording in recordings])
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._loudest = torch.stack([recording.abs().argmax() for recording in recordings])
        logger.info(
            "noise: %d of %d recordings in %s, %.0f s",
            len(recordings), len(paths), folder, len(self._tape) / SAMPLE_RATE,
        )  # fmt: skip

    def crops(self, lengths: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draw a recording and a place in it for each clip; short recordings are looped.

        Args:
            lengths: (K,) int64 samples of the clips, within which no crop is silent.
            num_samples: to return.
            generator: on the CPU.

        Returns:
            (K, num_samples) float32 on the CPU.
        """
        count = len(lengths)
        chosen = torch.randint(len(self._lengths), (count,), generator=generator)
        place = (torch.rand(count, generator=generator, dtype=torch.float64) * self._lengths[chosen]).long()
        crops = self._take(chosen, place, num_samples)
        silent = _energy(crops, lengths.cpu())[:, 0] <= 0  # a pause of the recording; its loudest place has a sound
        if bool(silent.any()):
            crops[silent] = self._take(chosen[silent], self._loudest[chosen[silent]], num_samples)
        return crops

    def _take(self, chosen: Tensor, place: Tensor, num_samples: int) -> Tensor:
        at = (place[:, None] + torch.arange(num_samples)) % self._lengths[chosen][:, None]
        return self._tape[self._starts[chosen][:, None] + at]


def _audio_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"augmentation.noise_dir: {folder} is not a folder; name one with recordings of noise, or null")
    try:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    except OSError as err:  # a folder below it that may not be read
        raise DataError(f"augmentation.noise_dir: {folder} cannot be read: {err.strerror}") from err
    if not paths:
        raise DataError(
            f"augmentation.noise_dir: no audio file in {folder}; known are {', '.join(sorted(AUDIO_SUFFIXES))}. "
            "Put recordings there, or set it to null for made noise"
        )
    return paths


def mask_padding(audio: Tensor, lengths: Tensor) -> Tensor:
    """Set everything after each clip to zero, keeping (B, T)."""
    position = torch.arange(audio.shape[1], device=audio.device)
    return audio.masked_fill(position >= lengths.to(audio.device)[:, None], 0.0)


def _energy(audio: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the sum of squares over each clip's own samples, (..., 1)."""
    if lengths is not None:
        audio = mask_padding(audio, lengths)
    return audio.square().sum(dim=-1, keepdim=True)
