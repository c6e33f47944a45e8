"""Speed of engines: latency of calls, real-time factor, first token, memory.

    RTF = sum(compute) / sum(audio), RTFx = sum(audio) / sum(compute); features are part of the compute

Warm-up calls are not counted, and a GPU is waited for. Clips go from long to short, for little padding in batches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from src.data.audio import SAMPLE_RATE, Waveform, to_mono_16k
from src.data.features import CONTEXT_SAMPLES
from src.inference.engine_base import Engine, transcribe
from src.inference.options import DecodingOptions
from src.inference.torch_engine import TorchEngine
from src.utils.config import Config
from src.utils.errors import AudioError, DataError, OutOfMemoryError
from src.utils.memory import measure_memory
from src.utils.runtime import in_memory
from src.utils.tracking import ExperimentLogger

logger = logging.getLogger(__name__)

WARMUP_CALLS = 2  # of the longest batch: the first allocates, the second runs as all later ones
MIN_CALLS = {50: 2, 95: 20, 99: 100}  # for a percentile: so many that one call is expected beyond it
SAMPLING_SEC = 0.01  # between readings of memory, during the warm-up only


@dataclass(frozen=True)
class MeasuredEngine:
    """Something that turns audio into text, with what it computes on."""

    name: str
    # clips up to 30 s, (T,) float32 each, to texts in order; `languages` is passed if the measurement has some
    transcribe: Callable[..., list[str]]
    device: str  # as torch names it; a GPU is waited for
    precision: str  # of its weights: "float32", "int8", ...
    audio_context: str  # "full" (each clip padded to 30 s) or "dynamic"
    first_token: Callable[[Waveform], object] | None = None  # features, encoder and first decoder step; None: none


def describe_engine(engine: Engine, config: Config) -> MeasuredEngine:
    """Return an engine of `src.inference` to be measured; `inference` and `model` say how it decodes."""
    options = DecodingOptions.from_config(config)

    def texts_of(audios: Sequence[Waveform], languages: Sequence[str | None] | None = None) -> list[str]:
        return [result.text for result in transcribe(engine, audios, options, languages=languages)]

    first_token = (lambda audio: engine.first_token(audio, options)) if options.num_beams == 1 else None
    return MeasuredEngine(engine.name, texts_of, engine.device, engine.precision, engine.audio_context, first_token)


@dataclass(frozen=True)
class LatencyResult:
    """The result of a measurement; a number is None if it was not measured."""

    name: str  # of the model
    engine: str
    device: str
    precision: str
    audio_context: str
    batch_size: int  # the last call of a pass may have fewer
    clips: int  # distinct ones, each transcribed equally often
    calls: int = 0
    audio_sec: float | None = None  # sum over all calls, without padding
    compute_sec: float | None = None
    rtf: float | None = None  # these three are ratios of sums
    rtfx: float | None = None
    clips_per_sec: float | None = None
    mean_sec: float | None = None  # wall time of a call, until its texts are there
    std_sec: float | None = None  # of a sample
    p50_sec: float | None = None  # percentiles need the calls of `MIN_CALLS`
    p95_sec: float | None = None
    p99_sec: float | None = None
    first_token_sec: float | None = None  # median; None in batches and with beams: no token is final before the end
    peak_memory_mb: float | None = None  # of the GPU's tensors, otherwise of the whole process, during the warm-up
    reason: str | None = None  # why nothing was measured
    texts: tuple[str, ...] = field(default=(), repr=False)  # of the clips, in order; not saved

    def to_frame(self) -> pd.DataFrame:
        """Return `latency_table` of this one."""
        return latency_table([self])

    def save(self, experiment: ExperimentLogger) -> None:
        """Append the figures to the run's metrics.jsonl."""
        experiment.log("latency", **_row(self))


def latency_table(results: Sequence[LatencyResult]) -> pd.DataFrame:
    """Return a table for reading, one row per measurement: four digits, blank if not measured."""
    return readable_table(map(_row, results))


def _row(result: LatencyResult) -> dict[str, Any]:
    return {key: value for key, value in asdict(result).items() if key != "texts"}


def readable_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a table with four digits of each float, blank for None and nan."""

    def cell(value: Any) -> Any:
        if value is None or value != value:
            return ""
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return pd.DataFrame([{key: cell(value) for key, value in row.items()} for row in rows])


class LatencyBenchmark:
    """Measures a `DynamicWhisper` with the decoder that files, evaluation and streaming use.

    A stock model is measured padded to 30 s. `config` says how to decode; `experiment` records results under `name`.
    """

    def __init__(
        self, model: Any, processor: Any, config: Config | None = None, *, name: str = "model",
        experiment: ExperimentLogger | None = None,
    ) -> None:  # fmt: skip
        self._name, self._config = name, config or Config()
        self._experiment = experiment
        self._engine = describe_engine(TorchEngine(model, processor), self._config)

    def benchmark_single(self, audio: Any, sr: int = SAMPLE_RATE, *, repeats: int = 20) -> LatencyResult:
        """Transcribe one clip repeatedly, as a user who waits for its text; p95 needs 20 repeats, p99 needs 100.

        The clip is (T,) or (T, channels) floats in [-1, 1], 0.1 to 30 s; other rates `sr` than 16,000 samples per
        second are resampled before the clock runs.
        """
        return self._measure(check_clips([audio], sr), 1, repeats)

    def benchmark_batch(
        self, test_audios: Sequence[Any], sr: int = SAMPLE_RATE, *, batch_size: int | None = None, repeats: int = 3
    ) -> LatencyResult:
        """Transcribe clips, all of one rate, in batches: `inference.batch_size`, or all clips if there are fewer."""
        clips = check_clips(test_audios, sr)
        size = min(self._config.inference.batch_size, len(clips)) if batch_size is None else batch_size
        return self._measure(clips, size, repeats)

    def throughput(
        self, test_audios: Sequence[Any], batch_sizes: Sequence[int] = (1, 2, 4, 8, 16), sr: int = SAMPLE_RATE
    ) -> list[LatencyResult]:
        """Transcribe the same clips once at each batch size that they fill: one result per size."""
        clips = check_clips(test_audios, sr)
        if larger := [size for size in batch_sizes if size > len(clips)]:
            logger.warning("batch sizes %s are left out: there are %d clips", larger, len(clips))
        return [self._measure(clips, size, 1) for size in batch_sizes if size <= len(clips)]

    def _measure(self, clips: Sequence[Waveform], batch_size: int, passes: int) -> LatencyResult:
        result = measure_engine(self._engine, clips, batch_size=batch_size, passes=passes, name=self._name)
        if self._experiment is not None:
            result.save(self._experiment)
        return result


def check_clips(audios: Sequence[Any], sr: int = SAMPLE_RATE) -> list[Waveform]:
    """Check (T,) or (T, channels) floats in [-1, 1] of 0.1 to 30 s, silence too; return them as 16 kHz mono."""
    if not len(audios):
        raise DataError("no audio was given; pass at least one clip")
    if isinstance(sr, bool) or not isinstance(sr, int | np.integer):
        raise AudioError(f"sample rate {sr!r}: whole Hz are needed, such as 16000")
    clips = []
    for i, audio in enumerate(audios):
        name, samples = f"clip {i}", np.asarray(audio)
        if samples.dtype.kind != "f" or samples.ndim not in (1, 2):
            raise AudioError(f"{name}: {samples.dtype} {samples.shape}; give (T,) floats in [-1, 1], as of load_audio")
        clips.append(to_mono_16k(samples, int(sr), name=name, allow_silence=True))
        if len(clips[-1]) > CONTEXT_SAMPLES:
            raise AudioError(f"{name}: {len(clips[-1]) / SAMPLE_RATE:.1f} s; the encoder takes 30 s, cut it at a pause")
    return clips


def measure_engine(
    engine: MeasuredEngine, clips: Sequence[Waveform], *, batch_size: int = 1, passes: int = 1, name: str = "model",
    languages: Sequence[str | None] | None = None, clock: Callable[[], float] = time.perf_counter,
) -> LatencyResult:  # fmt: skip
    """Measure an engine on clips from `check_clips`, each in its own language where `languages` has one.

    Where memory runs out, the result has a `reason` alone.
    """
    if not 1 <= batch_size <= len(clips) or passes < 1:
        raise DataError(f"batch size {batch_size} (1 to the {len(clips)} clips given), repeats {passes} (at least 1)")
    described = engine.name, engine.device, engine.precision, engine.audio_context
    blank = LatencyResult(name, *described, batch_size, len(clips))
    order = sorted(range(len(clips)), key=lambda i: len(clips[i]), reverse=True)
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    wait = torch.cuda.synchronize if engine.device.startswith("cuda") else (lambda device: None)

    def timed(action: Callable[[Any], Any], argument: Any) -> tuple[Any, float]:
        wait(engine.device)
        began = clock()
        result = action(argument)
        wait(engine.device)
        return result, clock() - began

    def transcribe(batch: Sequence[int]) -> list[str]:
        spoken = {} if languages is None else {"languages": [languages[i] for i in batch]}
        return engine.transcribe([clips[i] for i in batch], **spoken)

    def measure() -> LatencyResult:
        with _peak_memory(engine.device) as readings_mb:
            for _ in range(WARMUP_CALLS):
                transcribe(batches[0])
        latencies: list[float] = []
        texts: dict[int, str] = {}
        for batch in batches * passes:
            found, elapsed_sec = timed(transcribe, batch)
            latencies.append(elapsed_sec)
            texts.update(zip(batch, found, strict=True))
        first_token_sec = None
        if engine.first_token is not None and batch_size == 1:
            engine.first_token(clips[0])  # warm-up
            first_token_sec = float(np.median([timed(engine.first_token, clip)[1] for clip in [*clips] * passes]))
        percentiles: dict[str, Any] = {
            f"p{q}_sec": float(np.percentile(latencies, q)) for q, least in MIN_CALLS.items() if len(latencies) >= least
        }
        audio_sec, compute_sec = passes * sum(map(len, clips)) / SAMPLE_RATE, sum(latencies)
        return replace(
            blank, calls=len(latencies), audio_sec=audio_sec, compute_sec=compute_sec,
            rtf=compute_sec / audio_sec, rtfx=audio_sec / compute_sec,
            clips_per_sec=passes * len(clips) / compute_sec, mean_sec=float(np.mean(latencies)),
            std_sec=float(np.std(latencies, ddof=1)) if len(latencies) > 1 else None, **percentiles,
            first_token_sec=first_token_sec, peak_memory_mb=max(readings_mb),
            texts=tuple(texts[i] for i in range(len(clips))),
        )  # fmt: skip

    try:
        return in_memory(measure)
    except OutOfMemoryError as err:
        return replace(blank, reason=str(err))


@contextmanager
def _peak_memory(device: str) -> Iterator[list[float]]:
    """Read memory in a thread while the block runs, in MB: memory that a call frees before it ends counts as well."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    readings_mb: list[float] = []
    done = threading.Event()

    def watch() -> None:
        ended = False
        while not ended:  # the last reading is after the end: it has the peak of a GPU
            ended = done.wait(SAMPLING_SEC)
            use = measure_memory(Path(), device)
            readings_mb.append(next(mb for mb in (use.gpu_peak_mb, use.gpu_mb, use.process_mb) if mb is not None))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield readings_mb
    finally:
        done.set()
        thread.join()
