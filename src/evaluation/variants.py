"""Model variants compared: size, speed and error rate, measured on the same clips by the same code."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from src.data.audio import Waveform
from src.data.dataset import decode_audio
from src.data.utterance import Utterance
from src.evaluation.latency import MeasuredEngine, check_clips, describe_engine, measure_engine, readable_table
from src.evaluation.metrics import MetricsCalculator
from src.inference.ct2_engine import CTranslate2Engine
from src.inference.torch_engine import TorchEngine
from src.models.export.ctranslate2 import export_ctranslate2
from src.models.weights import HUB_REPOSITORIES
from src.models.whisper_model import WhisperModelManager
from src.utils.config import Config, load_config
from src.utils.errors import ConfigError, ModelError, did_you_mean
from src.utils.files import expand_path
from src.utils.memory import return_freed_memory
from src.utils.runtime import is_out_of_memory, release_memory

logger = logging.getLogger(__name__)

ENGINES = ("torch", "ctranslate2-float32", "ctranslate2-int8")
MAX_EXPORT_PARAMETERS = 300_000_000  # up to small: seconds and 1 GB; an export of medium takes minutes and 3 GB
NO_CLIPS = "no clips were given to measure on"


@dataclass(frozen=True)
class VariantFigures:
    """One variant in one engine; a figure is None if it was not measured."""

    variant: str  # name or folder
    engine: str  # of `ENGINES`
    device: str | None = None
    audio_context: str | None = None  # "full" (each clip padded to 30 s) or "dynamic"
    parameters: int | None = None  # tied ones count once
    disk_mb: float | None = None  # of the weights' files, as they are stored
    batch_size: int | None = None
    peak_memory_mb: float | None = None  # as in `LatencyResult`, like the next two
    rtf: float | None = None
    rtfx: float | None = None
    metric: str | None = None  # the headline, as in `ErrorRates`, like the next seven
    rate: float | None = None
    low: float | None = None
    high: float | None = None
    wer: float | None = None
    wer_low: float | None = None
    wer_high: float | None = None
    normalizer: str | None = None
    n: int | None = None  # clips
    reason: str | None = None  # why figures are missing


@dataclass(frozen=True)
class VariantComparison:
    """Figures of several variants, one row per variant and engine."""

    rows: tuple[VariantFigures, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return a table for reading: four digits, blank if not measured."""
        return readable_table(map(asdict, self.rows))


def compare_models(
    config: Config, utterances: Sequence[Utterance] = (), *, variants: Sequence[str] | None = None,
    engines: Sequence[str] = ENGINES,
) -> VariantComparison:  # fmt: skip
    """Measure variants on the same clips, one after the other, so that one at a time is in memory.

    Args:
        config: holds for all variants; CTranslate2 computes on the CPU in any case.
        utterances: checked test clips; without them only parameters and size are filled.
        variants: names, or folders of checkpoints; `model.variant` by default, since others may have to be downloaded.
        engines: of `ENGINES`. CTranslate2 exports are made in a temporary folder, and verified as every export.

    Returns:
        One row per variant and engine. Unavailable weights, an export that fails or would take minutes, a language that
        the variant does not know, and memory that runs out are reasons, not errors.
    """
    for name in engines or [""]:
        if name not in ENGINES:
            raise ConfigError(f"engine {name!r} is unknown{did_you_mean(name, ENGINES)}; known: {', '.join(ENGINES)}")
    tree = config.model_dump(mode="json", exclude={"profile"})
    configs = [  # all names are checked before the first is loaded
        load_config(None, overrides={**tree, "model": {**tree["model"], "variant": variant}})
        for variant in ([config.model.variant] if variants is None else variants)
    ]
    audios = [decode_audio(utterance).numpy() for utterance in utterances]
    clips = check_clips(audios) if audios else []
    rows: list[VariantFigures] = []
    for own in configs:
        logger.info("measuring %s: %s", own.model.variant, ", ".join(engines))
        rows += _measure_variant(own, clips, utterances, engines)
        _release()
    return VariantComparison(tuple(rows))


def _measure_variant(
    config: Config, clips: Sequence[Waveform], utterances: Sequence[Utterance], engines: Sequence[str]
) -> list[VariantFigures]:
    variant = config.model.variant
    manager = WhisperModelManager(config)
    try:
        model, processor = manager.initialize_model()
    except (ModelError, RuntimeError, MemoryError) as err:
        local = variant.startswith((".", "/", "~")) or expand_path(variant).exists()
        reason = _one_line(err)
        if is_out_of_memory(err):
            reason = f"out of memory: {reason}"
        elif isinstance(err, ModelError) and (not local or variant in HUB_REPOSITORIES):
            logger.warning("%s is left out: %s", variant, err)
            reason = reason.partition(" To get them")[0]  # the advice is in the log: a table has no room for it
        else:  # the caller's: a folder without a model
            raise
        return [VariantFigures(variant, engine, reason=reason) for engine in engines]
    assert manager.weights is not None  # a model was loaded
    source, parameters = manager.weights.path, model.num_parameters()
    blank = VariantFigures(variant, "torch", parameters=parameters, audio_context=model.audio_context)
    rows = {}
    if "torch" in engines:
        described = describe_engine(TorchEngine(model, processor), config)
        rows["torch"] = _measure(replace(blank, disk_mb=_weights_mb(source)), described, clips, utterances, config)
        del described
    del model
    _release()
    for engine in (name for name in engines if name != "torch"):
        row, quantization = replace(blank, engine=engine), engine.removeprefix("ctranslate2-")
        if parameters > MAX_EXPORT_PARAMETERS:
            what = f"an export of more than {MAX_EXPORT_PARAMETERS / 1e6:.0f} M parameters takes minutes"
            rows[engine] = replace(row, reason=f"{what}; export_ctranslate2 makes one")
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                export = export_ctranslate2(source, Path(folder) / "export", quantization=quantization)
            except ModelError as err:  # the export is not like its source
                rows[engine] = replace(row, reason=_one_line(err))
                continue
            _release()
            loaded = CTranslate2Engine(export, device="cpu", compute_type=quantization, threads=torch.get_num_threads())
            row = replace(row, disk_mb=_weights_mb(export))
            rows[engine] = _measure(row, describe_engine(loaded, config), clips, utterances, config)
            del loaded  # else the memory of the next engine would include it
    return [rows[engine] for engine in engines]


def _measure(
    row: VariantFigures, engine: MeasuredEngine, clips: Sequence[Waveform], utterances: Sequence[Utterance],
    config: Config,
) -> VariantFigures:  # fmt: skip
    if not clips:
        return replace(row, device=engine.device, reason=NO_CLIPS)
    languages = [utterance.language for utterance in utterances]
    size = min(config.inference.batch_size, len(clips))
    try:
        result = measure_engine(engine, clips, batch_size=size, name=row.variant, languages=languages)
    except ModelError as err:  # a language that the variant does not know
        return replace(row, device=engine.device, reason=_one_line(err))
    measured = {**vars(result), "engine": row.engine, "n": len(clips)}
    if result.reason is None:
        texts, speakers = [u.text for u in utterances], [u.speaker for u in utterances]
        calculator = MetricsCalculator.from_config(config)
        measured |= vars(calculator.compute(texts, result.texts, speakers, languages=languages))
    names = {f.name for f in fields(VariantFigures)}
    found: dict[str, Any] = {key: None if v != v else v for key, v in measured.items() if key in names}  # no nan
    return replace(row, **found)


def _weights_mb(folder: Path) -> float:
    """Return the size of the files with weights in 10^6 bytes; of several formats, the one that is loaded."""
    files = [*folder.glob("model*.safetensors")] or [*folder.glob("*model.bin")]
    return sum(file.stat().st_size for file in files) / 1e6


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _release() -> None:
    release_memory()
    return_freed_memory()
