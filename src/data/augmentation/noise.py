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

from src.data.audio import AUDIO_SUFFIXES, SAMPLE_RATE, SILENCE_PEAK, load_audio
from src.utils.errors import AudioError, DataError

logger = logging.getLogger(__name__)

NoiseKind = Literal["white", "pink", "brown", "babble", "recording"]
EXPONENTS: dict[NoiseKind, float] = {"white": 0.0, "pink": 1.0, "brown": 2.0}  # power falls as 1 / f^exponent
LOWEST_HZ = 20.0  # below it nothing is heard, and brown noise would have all its power there
BABBLE_VOICES = 4  # of which no single one is followed
MAX_RECORDING_SEC = 60  # of each file of a folder, so that a few long ones do not fill the pool
MAX_POOL_SEC = 3_600  # 230 MB of float32


def mix_at_snr(speech: Tensor, noise: Tensor, *, snr_db: float | Tensor, lengths: Tensor) -> Tensor:
    """Mix noise into speech (B, T) at a power ratio in dB, one or (B,), over each clip's own samples.

    Noise after a clip stays, at the same level; the mixture may exceed 1.0. Equal to `torchaudio.functional.add_noise`
    to 3e-8, but works where torchaudio does not. Raises `AudioError` for silence, which has no ratio.
    """
    speech_energy, noise_energy = _energy(speech, lengths), _energy(noise, lengths)
    for name, energy in (("speech", speech_energy), ("noise", noise_energy)):
        if min(energy.flatten().tolist()) <= 0:
            raise AudioError(f"the {name} of a clip is silent and has no ratio; leave this clip without noise")
    ratio_db = torch.as_tensor(snr_db, dtype=torch.float32, device=speech.device)
    wanted = speech_energy / 10 ** (ratio_db[..., None] / 10)
    scale: Tensor = (wanted / noise_energy).sqrt()  # sqrt: snr is a power ratio, waveforms are amplitudes
    return speech + noise * scale


def coloured_noise(shape: tuple[int, int], exponents: Tensor, generator: torch.Generator) -> Tensor:
    """Make noise (B, T) of mean square 1, on the CPU; power falls as 1 / f^exponent (B,) above 20 Hz.

    Timmer and Koenig, "On generating power law noise", 1995: Gaussian noise, shaped in the spectrum.
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
    clips: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, width: int, generator: torch.Generator
) -> Tensor:
    """Mix other clips of a batch (B, T), (B,): (K, width), each voice of mean square 1 over its own clip.

    Each target, a row of `clips`, gets up to four voices, never its own; one of the others must not be silent. A voice
    is looped, from a random place; its loudest sample falls inside the target, so that no target is left with a pause
    of the voices and an undefined ratio.
    """
    device = clips.device
    peaks, loudest = clips.abs().max(dim=1)
    # choose rows of other clips, (K, voices), and note which count, where there are too few
    score = torch.rand(len(targets), len(clips), generator=generator)
    score[torch.arange(len(targets)), targets] = -1.0
    score = score.masked_fill((peaks < SILENCE_PEAK).cpu(), -1.0)
    best, chosen = score.topk(min(BABBLE_VOICES, len(clips)), dim=1)
    place = (torch.rand(chosen.shape, generator=generator) * target_lengths.cpu()[:, None]).long()
    position = torch.arange(width, device=device)
    own = lengths.to(device)
    level = clips.square().sum(dim=1).div(own.clamp(min=1)).sqrt().clamp(min=SILENCE_PEAK)
    mixed = torch.zeros(len(targets), width, device=device)
    for voice in range(chosen.shape[1]):  # not all voices at once: at 30 s their indices would take half a gigabyte
        row = chosen[:, voice].to(device)
        at = (position + (loudest[row] - place[:, voice].to(device))[:, None]) % own[row][:, None]
        counts = (best[:, voice] >= 0).to(device)
        mixed += clips[row].gather(1, at) * (counts / level[row])[:, None]
    return mixed


class NoisePool:
    """Recordings of a folder, from which crops are drawn: of at most an hour, the first minute of each file.

    All are decoded when the pool is made: a broken file shows then, not hours into a training. A larger folder gives
    recordings from all over it, in an order that is fixed. Raises `DataError` for a folder without audio, `AudioError`
    for a recording that cannot be decoded or is silent.
    """

    def __init__(self, folder: str | Path) -> None:
        paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
        if not paths:
            raise DataError(
                f"augmentation.noise_dir: {folder} is no folder with audio ({', '.join(sorted(AUDIO_SUFFIXES))}); "
                "put recordings of noise there, or set it to null for made noise"
            )
        recordings: list[Tensor] = []
        room = MAX_POOL_SEC * SAMPLE_RATE
        for index in torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist():
            if room <= 0:
                break
            recording = torch.from_numpy(load_audio(paths[index])[: MAX_RECORDING_SEC * SAMPLE_RATE])
            if not bool(recording.any()):
                raise AudioError(f"{paths[index]}: its first {MAX_RECORDING_SEC} s are digital silence; remove them")
            recordings.append(recording[:room])
            room -= len(recording)
        self._tape = torch.cat(recordings)  # one tensor, so that a batch of crops is one indexing
        self._lengths = torch.tensor([len(recording) for recording in recordings])
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._loudest = torch.stack([recording.abs().argmax() for recording in recordings])
        seconds = len(self._tape) / SAMPLE_RATE
        logger.info("noise: %d of %d recordings in %s, %.0f s", len(recordings), len(paths), folder, seconds)

    def crops(self, lengths: Tensor, width: int, generator: torch.Generator) -> Tensor:
        """Draw (K, width) on the CPU from random places, not silent within (K,) lengths; short files loop."""
        count = len(lengths)
        chosen = torch.randint(len(self._lengths), (count,), generator=generator)
        place = (torch.rand(count, generator=generator, dtype=torch.float64) * self._lengths[chosen]).long()
        crops = self._take(chosen, place, width)
        energy = _energy(crops, lengths.cpu())[:, 0].tolist()
        silent = [row for row, each in enumerate(energy) if each <= 0]  # a pause; its loudest place has a sound
        if silent:
            crops[silent] = self._take(chosen[silent], self._loudest[chosen[silent]], width)
        return crops

    def _take(self, chosen: Tensor, place: Tensor, width: int) -> Tensor:
        at = (place[:, None] + torch.arange(width)) % self._lengths[chosen][:, None]
        return self._tape[self._starts[chosen][:, None] + at]


def mask_padding(audio: Tensor, lengths: Tensor) -> Tensor:
    """Set everything after each clip to zero, keeping (B, T)."""
    position = torch.arange(audio.shape[1], device=audio.device)
    return audio.masked_fill(position >= lengths.to(audio.device)[:, None], 0.0)


def _energy(audio: Tensor, lengths: Tensor) -> Tensor:
    return mask_padding(audio, lengths).square().sum(dim=-1, keepdim=True)  # (B, 1)
