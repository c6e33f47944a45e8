"""Speech detection: against silero's own segmentation, and against itself in pieces."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from src.data import vad as vad_module
from src.data.audio import SAMPLE_RATE, Waveform
from src.data.vad import WINDOW_SAMPLES, VoiceActivityDetector, load_network
from src.utils.config import VADConfig
from src.utils.errors import AudioError, MissingDependencyError, ModelError


@pytest.fixture(scope="module")
def detector() -> VoiceActivityDetector:
    return VoiceActivityDetector()


CONFIGS = [
    VADConfig(),
    VADConfig(min_silence_sec=0.1, pad_sec=0.03),
    VADConfig(threshold=0.8, min_silence_sec=0.2, min_speech_sec=0.5, pad_sec=0.0),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_segments_equal_those_of_silero(jfk: Waveform, config: VADConfig) -> None:
    from silero_vad import get_speech_timestamps, load_silero_vad

    audio = np.concatenate([np.zeros(7_001, np.float32), jfk, np.zeros(20_000, np.float32), jfk[:60_000]])
    theirs = get_speech_timestamps(
        torch.from_numpy(audio),
        load_silero_vad(),
        threshold=config.threshold,
        min_speech_duration_ms=int(config.min_speech_sec * 1000),
        min_silence_duration_ms=int(config.min_silence_sec * 1000),
        speech_pad_ms=int(config.pad_sec * 1000),
    )
    expected = [(row["start"] / SAMPLE_RATE, row["end"] / SAMPLE_RATE) for row in theirs]
    ours = [(s.start_sec, s.end_sec) for s in VoiceActivityDetector(config).speech_segments(audio)]
    assert len(ours) == len(expected) >= 2
    np.testing.assert_allclose(ours, expected, atol=2 / SAMPLE_RATE)


@torch.inference_mode()
def test_probabilities_are_those_of_silero_s_torch_model(detector: VoiceActivityDetector, jfk: Waveform) -> None:
    from silero_vad import load_silero_vad

    reference, stream = load_silero_vad(), detector.stream()
    found = []
    for window in jfk[: len(jfk) // WINDOW_SAMPLES * WINDOW_SAMPLES].reshape(-1, WINDOW_SAMPLES):
        stream.feed(window)
        found.append(stream.probability)
        assert stream.probability == pytest.approx(float(reference(torch.from_numpy(window), SAMPLE_RATE)), abs=1e-4)
    assert min(found) < 0.01 < 0.99 < max(found)


def test_silence_and_faint_noise_hold_no_speech(detector: VoiceActivityDetector) -> None:
    noise = np.random.default_rng(0).normal(0, 0.003, 5 * SAMPLE_RATE).astype(np.float32)
    for audio in (noise, np.zeros(5 * SAMPLE_RATE, np.float32), np.zeros(0, np.float32)):
        assert detector.speech_segments(audio) == []


@pytest.mark.parametrize("seed", range(3))
def test_ragged_pieces_give_the_events_of_the_whole(
    detector: VoiceActivityDetector, jfk: Waveform, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = detector.stream()
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(jfk), 60))
    events = [event for piece in np.split(jfk, cuts) for event in pieces.feed(piece)] + pieces.finish()
    monkeypatch.setattr(vad_module, "CHUNK_WINDOWS", 100)
    whole = detector.stream()
    assert events == whole.feed(jfk) + whole.finish()
    assert [event.kind for event in events] == ["start", "end"] * (len(events) // 2)


def test_two_streams_on_one_detector_do_not_mix(detector: VoiceActivityDetector, jfk: Waveform) -> None:
    alone = detector.stream()
    expected = alone.feed(jfk)
    first, second = detector.stream(), detector.stream()
    noise = np.random.default_rng(1).normal(0, 0.3, len(jfk)).astype(np.float32)
    events = []
    for at in range(0, len(jfk), 1_000):
        events += first.feed(jfk[at : at + 1_000])
        second.feed(noise[at : at + 1_000])
    assert events == expected
    assert first.probability == pytest.approx(alone.probability, abs=1e-4)


def test_start_is_reported_while_speech_goes_on_and_end_after_the_silence(
    detector: VoiceActivityDetector, jfk: Waveform
) -> None:
    events = detector.stream().feed(np.concatenate([jfk[: 2 * SAMPLE_RATE], np.zeros(SAMPLE_RATE, np.float32)]))
    assert [event.kind for event in events] == ["start", "end"]
    start, end = events
    assert start.detected_sec - start.time_sec < 0.2
    assert end.detected_sec - end.time_sec == pytest.approx(0.5, abs=0.07)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Load the network again, in the test and after it."""
    load_network.cache_clear()
    yield
    load_network.cache_clear()


def test_a_live_stream_may_end_speech_sooner_than_files_are_cut(detector: VoiceActivityDetector, jfk: Waveform) -> None:
    audio = np.concatenate([jfk[: 2 * SAMPLE_RATE], np.zeros(SAMPLE_RATE, np.float32)])
    (live, at_once), (filed, later) = (
        next((event.time_sec, event.detected_sec) for event in stream.feed(audio) if event.kind == "end")
        for stream in (detector.stream(0.3), detector.stream())
    )
    assert live == filed
    assert (at_once - live, later - filed) == pytest.approx((0.3, 0.5), abs=0.07)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("module", "package"), [("silero_vad", "silero-vad"), ("onnxruntime", "onnxruntime")])
def test_absent_package_is_an_error_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=f"pip install '?{package}"):
        VoiceActivityDetector()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("content", [None, b"", b"no network"], ids=["absent", "empty", "damaged"])
def test_unusable_network_is_an_error_never_all_speech(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "silero_vad.onnx"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(vad_module, "_MODEL_FILE", path)
    with pytest.raises(ModelError, match=r"silero_vad\.onnx: .*pip install"):
        VoiceActivityDetector()


@pytest.mark.parametrize(
    ("audio", "named"),
    [(np.zeros((2, 16_000), np.float32), r"\(2, 16000\)"), (np.zeros(16_000, np.int16), "int16"),
     (np.full(16_000, np.nan, np.float32), "16000 NaN")],
)  # fmt: skip
def test_unfit_audio_is_named(detector: VoiceActivityDetector, audio: Waveform, named: str) -> None:
    with pytest.raises(AudioError, match=named):
        detector.speech_segments(audio)


@pytest.mark.usefixtures("fresh")
def test_ctrl_c_while_onnxruntime_is_imported_is_no_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import signal\ntry: signal.raise_signal(signal.SIGINT)\nexcept BaseException: raise ImportError('failed')\n"
    (tmp_path / "onnxruntime.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            load_network()
    finally:
        signal.signal(signal.SIGINT, before)
        sys.modules.pop("onnxruntime", None)
