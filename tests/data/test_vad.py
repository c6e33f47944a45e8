"""Speech detection: against silero's own segmentation, and against itself in pieces."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch

from src.data import vad as vad_module
from src.data import vad_network
from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.utterance import Utterance
from src.data.vad import SpeechSegment, VoiceActivityDetector
from src.data.vad_network import CONTEXT_SAMPLES, WINDOW_SAMPLES, load_network, new_state
from src.utils.config import VADConfig
from src.utils.errors import AudioError, MissingDependencyError, ModelError

JFK = Path(__file__).parents[2] / "src/data/samples/jfk.flac"


@pytest.fixture(scope="module")
def speech() -> Waveform:
    return load_audio(JFK)


@pytest.fixture(scope="module")
def detector() -> VoiceActivityDetector:
    return VoiceActivityDetector()


def as_pairs(segments: list[SpeechSegment]) -> list[tuple[float, float]]:
    return [(segment.start_sec, segment.end_sec) for segment in segments]


@pytest.mark.parametrize(
    "config",
    [
        VADConfig(),
        VADConfig(min_silence_sec=0.1, pad_sec=0.03),
        VADConfig(threshold=0.8, min_silence_sec=0.2, min_speech_sec=0.5, pad_sec=0.0),
    ],
)
def test_segments_equal_those_of_silero(speech: Waveform, config: VADConfig) -> None:
    from silero_vad import get_speech_timestamps, load_silero_vad

    audio = np.concatenate([np.zeros(7_001, np.float32), speech, np.zeros(20_000, np.float32), speech[:60_000]])
    theirs = get_speech_timestamps(
        torch.from_numpy(audio),
        load_silero_vad(),
        threshold=config.threshold,
        min_speech_duration_ms=int(config.min_speech_sec * 1000),
        min_silence_duration_ms=int(config.min_silence_sec * 1000),
        speech_pad_ms=int(config.pad_sec * 1000),
    )
    expected = [(row["start"] / SAMPLE_RATE, row["end"] / SAMPLE_RATE) for row in theirs]
    ours = as_pairs(VoiceActivityDetector(config).speech_segments(audio))
    assert len(ours) == len(expected) >= 2
    np.testing.assert_allclose(ours, expected, atol=2 / SAMPLE_RATE)


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
def test_times_are_seconds_at_any_sample_rate(detector: VoiceActivityDetector, speech: Waveform, rate: int) -> None:
    at_16k = as_pairs(detector.speech_segments(speech))
    resampled = soxr.resample(speech, SAMPLE_RATE, rate)
    found = as_pairs(detector.speech_segments(resampled, sample_rate=rate))
    assert len(found) == len(at_16k)
    np.testing.assert_allclose(found, at_16k, atol=0.1)


def test_silence_and_faint_noise_hold_no_speech(detector: VoiceActivityDetector) -> None:
    noise = np.random.default_rng(0).normal(0, 0.003, 5 * SAMPLE_RATE).astype(np.float32)
    assert detector.speech_segments(np.zeros(5 * SAMPLE_RATE, np.float32)) == []
    assert detector.speech_segments(noise) == []
    assert detector.speech_segments(np.zeros(0, np.float32)) == []


@pytest.mark.parametrize("seed", range(3))
def test_ragged_pieces_give_the_events_of_the_whole(
    detector: VoiceActivityDetector, speech: Waveform, seed: int
) -> None:
    whole = detector.stream()
    expected = whole.feed(speech) + whole.finish()
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(speech), 60))
    pieces = detector.stream()
    events = [event for piece in np.split(speech, cuts) for event in pieces.feed(piece)] + pieces.finish()
    assert events == expected
    assert [event.kind for event in events] == ["start", "end"] * (len(events) // 2)


def test_a_batch_has_the_segments_of_each_recording_alone(
    detector: VoiceActivityDetector, speech: Waveform, sample: list[Utterance]
) -> None:
    clips = [load_audio(utterance.audio) for utterance in sample[::20]]
    joined = np.concatenate([speech[:60_000], np.zeros(20_000, np.float32), speech])  # several segments
    audios = [joined, speech, *clips, speech[:400], np.zeros(0, np.float32), np.zeros(40_000, np.float32)]
    together = detector.speech_segments_batch(audios)
    alone = [detector.speech_segments(audio) for audio in audios]
    assert [len(found) for found in together] == [len(found) for found in alone]
    assert len(together[0]) >= 2
    for ours, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(as_pairs(ours), as_pairs(expected), atol=1e-6)
    assert detector.speech_segments_batch([]) == []
    assert detector.speech_segments_batch([np.zeros(0, np.float32)]) == [[]]


def test_a_batch_refuses_unfit_audio(detector: VoiceActivityDetector, speech: Waveform) -> None:
    with pytest.raises(AudioError, match="int16"):
        detector.speech_segments_batch([speech, np.zeros(16_000, np.int16)])


def test_more_recordings_than_a_batch_holds_keep_their_order(
    detector: VoiceActivityDetector, speech: Waveform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vad_module, "BATCH_CLIPS", 2)
    audios = [speech[:n] for n in (20_000, 60_000, 40_000, 50_000, 30_000)]
    ends = [found[-1].end_sec for found in detector.speech_segments_batch(audios)]
    assert ends == [detector.speech_segments(audio)[-1].end_sec for audio in audios]


def test_two_streams_on_one_detector_do_not_mix(detector: VoiceActivityDetector, speech: Waveform) -> None:
    alone = detector.stream()
    expected = alone.feed(speech)
    first, second = detector.stream(), detector.stream()
    noise = np.random.default_rng(1).normal(0, 0.3, len(speech)).astype(np.float32)
    events = []
    for at in range(0, len(speech), 1_000):
        events += first.feed(speech[at : at + 1_000])
        second.feed(noise[at : at + 1_000])
    assert events == expected
    assert first.probability == pytest.approx(alone.probability, abs=1e-6)


def test_start_is_reported_while_speech_goes_on_and_end_after_the_silence(
    detector: VoiceActivityDetector, speech: Waveform
) -> None:
    stream = detector.stream()
    events = stream.feed(np.concatenate([speech[: 2 * SAMPLE_RATE], np.zeros(SAMPLE_RATE, np.float32)]))
    assert [event.kind for event in events] == ["start", "end"]
    start, end = events
    assert start.detected_sec - start.time_sec < 0.2
    assert end.detected_sec - end.time_sec == pytest.approx(0.5, abs=0.07)


@torch.inference_mode()
def test_the_network_is_silero_s_own(speech: Waveform) -> None:
    from silero_vad import load_silero_vad

    reference = load_silero_vad()
    windows = speech[: len(speech) // WINDOW_SAMPLES * WINDOW_SAMPLES].reshape(-1, WINDOW_SAMPLES)
    expected = [float(reference(torch.from_numpy(window), SAMPLE_RATE)) for window in windows]
    network, state = load_network(), new_state(1)
    contexts = np.concatenate([np.zeros((1, CONTEXT_SAMPLES), np.float32), windows[:-1, -CONTEXT_SAMPLES:]])
    found = []
    for gates in network.gates(np.concatenate([contexts, windows], axis=1)):
        probability, state = network.step(gates[None], state)
        found.append(float(probability[0]))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert min(found) < 0.01 < 0.99 < max(found)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Loads the network again, in the test and after it."""
    load_network.cache_clear()
    yield
    load_network.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_absent_package_is_an_error_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    with pytest.raises(MissingDependencyError, match="pip install 'silero-vad"):
        VoiceActivityDetector()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("tensor", [None, b"four"], ids=["no archive", "other sizes"])
def test_unusable_weights_are_an_error_never_all_speech(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tensor: bytes | None
) -> None:
    path = tmp_path / "silero_vad.jit"
    path.touch()
    if tensor is not None:
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(17):
                archive.writestr(f"model/data/{number}", tensor)
    monkeypatch.setattr(vad_network, "_WEIGHTS_FILE", path)
    with pytest.raises(ModelError, match=r"silero_vad\.jit: .*install it again"):
        VoiceActivityDetector()


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (np.zeros((2, 16_000), np.float32), 16_000, "mix the channels"),
        (np.zeros(16_000, np.int16), 16_000, "int16"),
        (np.full(16_000, np.nan, np.float32), 16_000, "16000 NaN"),
        (np.zeros(16_000, np.float32), 0, "sample rate 0"),
    ],
)
def test_unfit_audio_is_named(detector: VoiceActivityDetector, audio: Waveform, rate: int, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        detector.speech_segments(audio, sample_rate=rate)
