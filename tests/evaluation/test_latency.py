from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.evaluation.latency import WARMUP_CALLS as WARM
from src.evaluation.latency import (
    LatencyBenchmark,
    LatencyResult,
    MeasuredEngine,
    check_clips,
    latency_table,
    measure_engine,
)
from src.evaluation.report.run_files import load_metrics
from src.evaluation.visualization.evaluation import latest_latencies
from src.inference import torch_engine
from src.inference.options import DecodingOptions
from src.utils.config import Config, load_config
from src.utils.errors import AudioError, DataError
from src.utils.memory import MemoryUse
from src.utils.tracking import ExperimentLogger

RATE = 16_000
CONFIG = load_config(None, overrides={"device": "cpu", "inference.max_tokens_per_sec": 1.0})


def clip(seconds: float, rate: int = RATE) -> np.ndarray:
    return np.full(round(seconds * rate), 0.1, dtype=np.float32)


class FakeEngine:
    """Takes a given time for each call, on a clock of its own; its text is the clip's length in seconds."""

    def __init__(self, call_secs: Sequence[float], *, first_sec: float = 0.0, warm_sec: float = 0.0) -> None:
        self.now = 0.0
        self.calls: list[list[float]] = []
        self._secs = [warm_sec] * WARM + list(call_secs)
        self._first_sec = first_sec

    def transcribe(self, audios: Sequence[np.ndarray]) -> list[str]:
        if not self._secs[len(self.calls) :]:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines")
        self.now += self._secs[len(self.calls)]
        self.calls.append([len(audio) / RATE for audio in audios])
        return [f"{len(audio) / RATE:g}" for audio in audios]

    def first_token(self, audio: np.ndarray) -> None:
        self.now += self._first_sec

    def measure(self, clips: Sequence[np.ndarray], **options: Any) -> LatencyResult:
        first = self.first_token if self._first_sec else None
        engine = MeasuredEngine("fake", self.transcribe, "cpu", "float32", "full", first)
        return measure_engine(engine, clips, clock=lambda: self.now, **options)


def test_rates_are_ratios_of_sums_and_warm_up_is_not_counted() -> None:
    fake = FakeEngine([3.0, 1.0], warm_sec=100.0)
    result = fake.measure([clip(1.0), clip(6.0), clip(3.0)], batch_size=2)
    assert fake.calls == [[6.0, 3.0]] * (WARM + 1) + [[1.0]]  # the longest batch warms up
    assert (result.audio_sec, result.compute_sec, result.calls, result.clips) == (10.0, 4.0, 2, 3)
    assert (result.rtf, result.rtfx, result.clips_per_sec) == (0.4, 2.5, 0.75)
    result = FakeEngine([1.0] * 6).measure([clip(1.0), clip(3.0), clip(2.0)], passes=2)
    assert (result.calls, result.clips, result.audio_sec, result.clips_per_sec) == (6, 3, 12.0, 1.0)
    assert result.texts == ("1", "3", "2")  # in the order of the clips


@pytest.mark.parametrize(("calls", "measured"), [(1, 1), (2, 3), (19, 3), (20, 4), (99, 4), (100, 5)])
def test_spread_and_percentiles_are_those_of_numpy_and_with_too_few_calls_none(calls: int, measured: int) -> None:
    secs = np.random.default_rng(0).exponential(size=calls)
    result = FakeEngine(secs).measure([clip(1.0)], passes=calls)
    found = [result.mean_sec, result.std_sec, result.p50_sec, result.p95_sec, result.p99_sec]
    expected = [secs.mean(), secs.std(ddof=int(calls > 1)), *np.percentile(secs, [50, 95, 99])]
    assert found == [*map(pytest.approx, expected[:measured]), *[None] * (5 - measured)]


def test_first_token_is_timed_on_single_calls_only_and_only_where_it_can_be_told() -> None:
    clips = [clip(1.0), clip(2.0)]
    assert FakeEngine([1.0] * 2, first_sec=0.25).measure(clips).first_token_sec == 0.25
    assert FakeEngine([1.0], first_sec=0.25).measure(clips, batch_size=2).first_token_sec is None
    assert FakeEngine([1.0] * 2).measure(clips).first_token_sec is None


def test_peak_memory_holds_what_a_call_frees_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    held_mb, seen = [100.0], threading.Event()

    def measure(folder: Path, device: str) -> MemoryUse:
        if held_mb[0] == 900.0:
            seen.set()
        return MemoryUse(held_mb[0], 0.0, None, None, 0.0)

    def transcribe(audios: Sequence[np.ndarray]) -> list[str]:
        held_mb[0] = 900.0
        assert seen.wait(60.0)
        held_mb[0] = 100.0
        return [""]

    monkeypatch.setattr("src.evaluation.latency.measure_memory", measure)
    result = measure_engine(MeasuredEngine("fake", transcribe, "cpu", "float32", "full"), [clip(1.0)])
    assert result.peak_memory_mb == 900.0


def test_running_out_of_memory_leaves_blanks_and_a_reason_and_other_errors_pass_through() -> None:
    result = FakeEngine([]).measure([clip(1.0)])
    assert result.reason is not None and "Tried to allocate 2.00 GiB" in result.reason
    measured = ("rtf", "rtfx", "clips_per_sec", "audio_sec", "compute_sec", "mean_sec", "p50_sec", "peak_memory_mb")
    assert [getattr(result, name) for name in measured] == [None] * len(measured)
    with pytest.raises(ZeroDivisionError):
        measure_engine(MeasuredEngine("fake", lambda audios: [str(1 // 0)], "cpu", "float32", "full"), [clip(1.0)])
    for options in ({"batch_size": 0}, {"batch_size": 3}, {"passes": 0}):
        with pytest.raises(DataError, match="batch size"):
            FakeEngine([]).measure([clip(1.0), clip(1.0)], **options)


@pytest.mark.parametrize(
    ("audios", "sr", "kind", "message"),
    [
        ([], RATE, DataError, "no audio"),
        ([clip(1.0), np.zeros(0, dtype=np.float32)], 8000, AudioError, "clip 1: 0 samples"),
        ([clip(0.05)], RATE, AudioError, "clip 0: 800 samples"),
        ([clip(1.0), clip(30.5)], RATE, AudioError, "clip 1: 30.5 s.*takes 30 s"),
        ([clip(61.0, 8000)], 16_000, AudioError, "clip 0: 30.5 s"),
        ([np.append(clip(1.0), np.float32("nan"))], RATE, AudioError, "clip 0: samples up to nan"),
        ([(clip(1.0) * 32767).astype(np.int16)], RATE, AudioError, r"clip 0: int16 \(16000,\)"),
        (["speech.wav"], RATE, AudioError, "clip 0: <U10"),
        (clip(1.0), RATE, AudioError, r"clip 0: float32 \(\)"),
        *(([clip(1.0)], rate, AudioError, str(rate)) for rate in ("16k", True, 16000.5, 10)),
    ],
)
def test_bad_audio_is_refused_by_its_number(audios: Any, sr: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        check_clips(audios, sr)
    (mono,) = check_clips([np.stack([clip(30.0, 8000)] * 2, axis=1)], 8000)  # resampled, channels mixed
    assert (len(mono), mono.dtype) == (30 * RATE, np.float32)


def test_results_are_read_back_from_the_run_the_last_of_each_setting(config: Config) -> None:
    first, again = (FakeEngine([sec] * 20).measure([clip(1.0)], passes=20, name="tuned") for sec in (1.0, 2.0))
    other = FakeEngine([]).measure([clip(1.0)] * 2, batch_size=2, name="tuned")
    with ExperimentLogger(config, run_id="r") as experiment:
        for result in (first, other, again):
            result.save(experiment)
    rows = latest_latencies(load_metrics(experiment.dir))
    assert [(row["engine"], row["batch_size"], row["p50_sec"]) for row in rows] == [
        ("tuned, fake", 1, again.p50_sec), ("tuned, fake", 2, None),
    ]  # fmt: skip
    table = latency_table([again, other])
    assert (table["p99_sec"].tolist(), table["reason"][0]) == (["", ""], "")
    assert replace(again, rtf=0.123456).to_frame()["rtf"].tolist() == [0.1235]


def test_model_is_measured_with_the_decoder_of_files_and_left_as_it_was(
    small: tuple[Any, Any], jfk: np.ndarray
) -> None:
    model, processor = small
    model.train()
    model.model.encoder.eval()  # as with a frozen encoder
    modes = [module.training for module in model.modules()]
    short = jfk[: 3 * RATE]
    single = LatencyBenchmark(model, processor, CONFIG, name="stock").benchmark_single(short, repeats=2)
    assert [module.training for module in model.modules()] == modes
    (expected,) = torch_engine.decode(model.eval(), processor, [short], DecodingOptions.from_config(CONFIG))
    assert single.texts == (expected.text,)
    assert (single.calls, single.audio_sec, single.batch_size, single.p95_sec) == (2, 6.0, 1, None)
    described = (single.name, single.engine, single.device, single.precision, single.audio_context)
    assert described == ("stock", "torch", "cpu", "float32", "full")
    assert single.peak_memory_mb is not None and single.peak_memory_mb > 100  # of the whole process
    assert single.first_token_sec is not None
    options = DecodingOptions.from_config(CONFIG)
    assert torch_engine.TorchEngine(model, processor).first_token(short, options) == expected.tokens[0]
    beams = load_config(None, overrides={"device": "cpu", "inference": {"num_beams": 2, "max_tokens_per_sec": 1.0}})
    found = LatencyBenchmark(model, processor, beams).benchmark_single(short, repeats=1)
    assert found.first_token_sec is None  # no token is final before the end


def test_batch_sizes_that_do_not_fit_are_reported_or_left_out(
    small: tuple[Any, Any], jfk: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real: Any = torch_engine.encode

    def encode(model: Any, audios: Any, *rest: Any) -> Any:
        if len(audios) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, audios, *rest)

    monkeypatch.setattr("src.inference.torch_engine.encode", encode)
    benchmark = LatencyBenchmark(*small, CONFIG)
    fits, too_large = benchmark.throughput([jfk[:RATE], jfk[: 2 * RATE]], batch_sizes=(1, 2, 16))
    assert "[16]" in caplog.text
    assert (fits.batch_size, fits.reason, fits.calls) == (1, None, 2)
    assert (too_large.batch_size, too_large.rtf, too_large.calls) == (2, None, 0)
    assert too_large.reason is not None
    assert benchmark.benchmark_batch([jfk[:RATE]] * 2).reason == too_large.reason
    with pytest.raises(DataError, match="batch size 0"):
        benchmark.throughput([jfk], batch_sizes=(0,))
