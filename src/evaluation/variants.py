"""Model variants beside each other: size, speed and error rate, measured on the same clips by the same code.

What could not be measured is blank and has a reason. Variants are measured one after the other, so that one at a time
is in memory. CTranslate2 computes on the CPU, wherever torch does: the device is a column of the table.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pandas as pd
import torch

from src.data.audio import Waveform
from src.data.dataset import decode_audio
from src.data.utterance import Utterance
from src.evaluation.latency import Engine, check_clips, describe_engine, measure_engine, readable, torch_engine
from src.evaluation.metrics import Bootstrap, MetricsCalculator
from src.evaluation.report.run_files import load_metrics
from src.inference.ct2_engine import CTranslate2Engine
from src.models.export.ctranslate2 import export_ctranslate2
from src.models.weights import HUB_REPOSITORIES
from src.models.whisper_model import WhisperModelManager
from src.utils.config import Config, load_config
from src.utils.errors import ConfigError, ModelError, did_you_mean
from src.utils.memory import return_freed_memory
from src.utils.runtime import is_out_of_memory, release_memory
from src.utils.tracking import ExperimentLogger

logger = logging.getLogger(__name__)

ENGINES = ("torch", "ctranslate2-float32", "ctranslate2-int8")
MAX_EXPORT_PARAMETERS = 300_000_000  # up to small: seconds and 1 GB; an export of medium takes minutes and 3 GB
NO_CLIPS = "no clips were given to measure on"
_MB = 1e6


@dataclass(frozen=True)
class VariantFigures:
    """One variant in one engine; None where there is no figure.

    Attributes:
        variant: name or folder.
        engine: of `ENGINES`; `device` is where it computed.
        audio_context: "full" (each clip padded to 30 s) or "dynamic".
        parameters: tied ones count once.
        disk_mb: 10^6 bytes of the weights' files, in the precision that they are stored in.
        peak_memory_mb, rtf, rtfx: as in `LatencyResult`, of one pass in batches of `batch_size`.
        wer, wer_low, wer_high: fraction with its bootstrap interval, as in `ErrorRates`; no interval with one clip.
        normalizer: of `wer`.
        n: clips.
        reason: why figures are missing; None where none is.
    """

    variant: str
    engine: str
    device: str | None = None
    audio_context: str | None = None
    parameters: int | None = None
    disk_mb: float | None = None
    batch_size: int | None = None
    peak_memory_mb: float | None = None
    rtf: float | None = None
    rtfx: float | None = None
    wer: float | None = None
    wer_low: float | None = None
    wer_high: float | None = None
    normalizer: str | None = None
    n: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class VariantComparison:
    """Figures of several variants, a row a variant and engine."""

    rows: tuple[VariantFigures, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return a table for reading: four digits, blank where there is no figure."""
        return pd.DataFrame([{key: readable(value) for key, value in asdict(row).items()} for row in self.rows])

    def save(self, experiment: ExperimentLogger) -> None:
        """Append the rows to the run's metrics.jsonl."""
        for row in self.rows:
            experiment.log("variant", **asdict(row))

    @classmethod
    def load(cls, run_dir: str | Path) -> VariantComparison:
        """Read a run's rows back, the last of each variant and engine: measuring again replaces.

        Raises: DataError: as `load_metrics`.
        """
        names = [f.name for f in fields(VariantFigures)]
        rows = [row for row in load_metrics(run_dir) if row["event"] == "variant"]
        found = [VariantFigures(**{name: row[name] for name in names}) for row in rows]
        return cls(tuple({(row.variant, row.engine): row for row in found}.values()))


@dataclass(frozen=True)
class _TestClips:
    audios: list[Waveform]
    utterances: Sequence[Utterance]


def compare_models(
    config: Config,
    utterances: Sequence[Utterance] = (),
    *,
    variants: Sequence[str] | None = None,
    engines: Sequence[str] = ENGINES,
) -> VariantComparison:
    """Measure variants on the same clips.

    Args:
        config: `inference`, `evaluation`, `device`, `model.language` and `model.task` hold for all variants.
        utterances: checked test clips; without them only parameters and size are filled.
        variants: names, or folders of checkpoints; `model.variant` by default, since others may have to be downloaded.
        engines: of `ENGINES`. CTranslate2 exports are made in a folder for the time being, and proved as every export.
    Returns: a row a variant and engine. Weights that cannot be had, an export that fails or would take minutes, and
        memory that runs out are reasons, not errors.
    Raises: ConfigError: unknown variant or engine, or one that does not know the language. ModelError: a folder without
        a whole checkpoint. AudioError: a clip that cannot be decoded, by its id. DataError: no reference has a word.
    """
    unknown = [name for name in engines if name not in ENGINES]
    if unknown or not engines:
        name = unknown[0] if unknown else ""
        raise ConfigError(f"engine {name!r} is unknown{did_you_mean(name, ENGINES)}; known: {', '.join(ENGINES)}")
    names = [config.model.variant] if variants is None else list(variants)
    configs = [_config_of(config, name) for name in names]  # all names are checked before the first is loaded
    audios = [decode_audio(utterance).numpy() for utterance in utterances]
    clips = _TestClips(check_clips(audios) if audios else [], utterances)
    rows: list[VariantFigures] = []
    for own in configs:
        logger.info("measuring %s: %s", own.model.variant, ", ".join(engines))
        rows += _measure_variant(own, clips, engines)
        _release()
    return VariantComparison(tuple(rows))


def ctranslate2_engine(folder: Path, config: Config, *, quantization: str) -> Engine:
    """Make an engine of a CTranslate2 export, on the CPU, with as many threads as torch has.

    Args:
        folder: from `export_ctranslate2`.
        quantization: precision to compute in: "float32" or "int8".
    """
    threads = torch.get_num_threads()
    engine = CTranslate2Engine(folder, device="cpu", compute_type=quantization, threads=threads)
    return replace(describe_engine(engine, config), name=f"ctranslate2-{quantization}", precision=quantization)


def _config_of(config: Config, variant: str) -> Config:
    """Return the configuration with another variant, checked as a whole."""
    tree = config.model_dump(mode="json", exclude={"profile"})
    return load_config(None, overrides={**tree, "model": {**tree["model"], "variant": variant}})


def _measure_variant(config: Config, clips: _TestClips, engines: Sequence[str]) -> list[VariantFigures]:
    variant = config.model.variant
    manager = WhisperModelManager(config)
    try:
        model, processor = manager.initialize_model()
    except (ModelError, RuntimeError, MemoryError) as err:
        reason = _why_not_loaded(variant, err)
        if reason is None:
            raise
        return [VariantFigures(variant, engine, reason=reason) for engine in engines]
    assert manager.weights is not None  # a model was loaded
    source = manager.weights.path
    blank = VariantFigures(variant, "torch", parameters=model.num_parameters(), audio_context=model.audio_context)
    rows = {}
    if "torch" in engines:
        blank_torch = replace(blank, disk_mb=_weights_mb(source))
        rows["torch"] = _fill(blank_torch, torch_engine(model, processor, config), clips, config)
    del model
    _release()
    for engine in engines:
        if engine != "torch":
            rows[engine] = _measure_export(replace(blank, engine=engine), source, clips, config)
    return [rows[engine] for engine in engines]


def _measure_export(blank: VariantFigures, source: Path, clips: _TestClips, config: Config) -> VariantFigures:
    if blank.parameters is None or blank.parameters > MAX_EXPORT_PARAMETERS:
        limit = f"{MAX_EXPORT_PARAMETERS / 1e6:.0f} M parameters"
        return replace(blank, reason=f"an export of more than {limit} takes minutes; export_ctranslate2 makes one")
    quantization = blank.engine.removeprefix("ctranslate2-")
    with tempfile.TemporaryDirectory() as folder:
        try:
            export = export_ctranslate2(
                source, Path(folder) / "export", quantization=quantization, language=config.model.language
            )
        except ModelError as err:  # the export is not like its source
            return replace(blank, reason=_one_line(err))
        _release()
        blank = replace(blank, disk_mb=_weights_mb(export))
        return _fill(blank, ctranslate2_engine(export, config, quantization=quantization), clips, config)


def _fill(blank: VariantFigures, engine: Engine, clips: _TestClips, config: Config) -> VariantFigures:
    if not clips.audios:
        return replace(blank, device=engine.device, reason=NO_CLIPS)
    size = min(config.inference.batch_size, len(clips.audios))
    result = measure_engine(engine, clips.audios, batch_size=size, name=blank.variant)
    described = replace(blank, device=engine.device, batch_size=size, n=len(clips.audios), reason=result.reason)
    if result.reason is not None:
        return described
    calculator = MetricsCalculator(config.model.language, bootstrap=Bootstrap.from_config(config))
    rates = calculator.compute([u.text for u in clips.utterances], result.texts, [u.speaker for u in clips.utterances])
    return replace(
        described,
        peak_memory_mb=result.peak_memory_mb,
        rtf=result.rtf,
        rtfx=result.rtfx,
        wer=rates.wer,
        wer_low=None if math.isnan(rates.wer_low) else rates.wer_low,
        wer_high=None if math.isnan(rates.wer_high) else rates.wer_high,
        normalizer=rates.normalizer,
    )


def _weights_mb(folder: Path) -> float:
    """Return the size of the files that hold weights; of several formats, the one that is loaded."""
    files = [*folder.glob("model*.safetensors")] or [*folder.glob("*model.bin")]
    return sum(file.stat().st_size for file in files) / _MB


def _why_not_loaded(variant: str, error: Exception) -> str | None:
    """Return why a model is not there to measure; None where the error is the caller's: a folder that is no model."""
    if is_out_of_memory(error):
        return f"out of memory: {_one_line(error)}"
    local = variant.startswith((".", "/", "~")) or Path(variant).expanduser().exists()
    if not isinstance(error, ModelError) or (local and variant not in HUB_REPOSITORIES):
        return None
    logger.warning("%s is left out: %s", variant, error)
    return _one_line(error).partition(" To get them")[0]  # how to get them is in the log: a table has no room for it


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _release() -> None:
    release_memory()
    return_freed_memory()
