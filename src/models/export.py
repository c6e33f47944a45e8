"""Checkpoints for other tools: Hugging Face, and CTranslate2 for faster-whisper.

Nothing counts as saved before the tool that it is for has loaded it and given the source model's text. An older export
of the same name is replaced when the new one is complete; any other folder is refused.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ctranslate2
import jiwer
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from ctranslate2.specs.model_spec import ACCEPTED_MODEL_TYPES
from safetensors.torch import save_file
from torch import Tensor
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers import logging as transformers_logging

from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.features import CONTEXT_SAMPLES, SAMPLES_PER_POSITION, LogMel
from src.data.sources import SAMPLE_CLIP
from src.models.dynamic_context import DynamicWhisper, get_audio_context
from src.models.processor import save_processor
from src.utils.atomic import atomic_folder, recover_folder
from src.utils.errors import ModelError

logger = logging.getLogger(__name__)

TRAILING_SILENCE_SEC = 0.5  # at dynamic context: the pause tells the decoder to stop
MAX_NEW_TOKENS = 224  # CTranslate2 stops there too: half of the decoder's 448 positions
COMPARED_TOKENS = 32  # of the bundled clip; the weights are compared bit for bit besides
MAX_WORD_MISMATCH = {"float32": 0.0, "float16": 0.0}
MAX_WORD_MISMATCH_QUANTISED = 0.2  # share of words; int8 flips a word here and there, a broken model flips most
PROVENANCE = "provenance.json"
ADAPTERS_FILE = "adapters.safetensors"
FASTER_WHISPER_FILES = ("tokenizer.json", "preprocessor_config.json")


def export_huggingface(
    model: Any,
    processor: WhisperProcessor,
    output_dir: Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    adapters: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save a model and its processor, and prove it with stock transformers.

    Args:
        model: `WhisperForConditionalGeneration` or a subclass with its state-dict keys.
        processor: of the model.
        output_dir: replaced if it is an older export; appears whole or not at all.
        provenance: how the model came about, for `provenance.json` beside it.
        adapters: that were merged into the model, for `adapters.safetensors`, with which training can go on.
    Returns: output_dir, loadable by `WhisperForConditionalGeneration`, `WhisperProcessor` and `pipeline`.
    Raises: ModelError: the weights or the tokens differ after reloading, or the model is not plain Whisper.
        FileExistsError: output_dir holds something else.
    """
    _check_plain(model)
    recover_folder(output_dir)
    with atomic_folder(output_dir, replace=_is_export(output_dir, "config.json"), durable=True) as folder:
        _save(model, processor, folder)
        if provenance is not None:
            (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
        if adapters is not None:
            save_file({name: tensor.contiguous() for name, tensor in adapters.items()}, folder / ADAPTERS_FILE)
        _verify_huggingface(model, folder)
    logger.info("saved %s (Hugging Face format, reloaded and compared)", output_dir)
    return output_dir


def export_ctranslate2(
    source: Path | Any,
    output_dir: Path,
    *,
    processor: WhisperProcessor | None = None,
    quantization: str = "int8",
    verify_clips: Sequence[Waveform] | None = None,
    language: str | None = None,
) -> Path:
    """Convert for CTranslate2 and faster-whisper, and prove it by transcribing.

    Args:
        source: a Hugging Face folder, or a model together with its `processor`.
        output_dir: replaced if it is an older export; appears whole or not at all.
        quantization: of the weights: "int8", "float16", "float32", ... as CTranslate2 names them.
        verify_clips: (T,) float32 each, 16 kHz, up to 30 s, transcribed by both; the bundled clip by default.
        language: of the clips, for multilingual models; by default what the generation config says, else detected.
    Returns: output_dir; its config.json keeps `audio_context`, which CTranslate2 ignores.
    Raises: ModelError: unknown quantization, or more than 20% of the words differ (float32 and float16: any word).
        FileExistsError: output_dir holds something else.
    """
    if quantization not in ACCEPTED_MODEL_TYPES:
        raise ModelError(f"unknown quantization {quantization!r}; known: {', '.join(ACCEPTED_MODEL_TYPES)}")
    if isinstance(source, str | Path):
        return _convert(Path(source), output_dir, quantization, verify_clips, language)
    if processor is None:
        raise ModelError("export_ctranslate2: a model needs its processor: pass processor=, or a Hugging Face folder")
    _check_plain(source)
    with tempfile.TemporaryDirectory() as folder:
        _save(source, processor, Path(folder))
        return _convert(Path(folder), output_dir, quantization, verify_clips, language)


def _convert(
    hf_dir: Path, output_dir: Path, quantization: str, clips: Sequence[Waveform] | None, language: str | None
) -> Path:
    model = DynamicWhisper.from_pretrained(hf_dir, dtype=torch.float32).eval()
    processor = WhisperProcessor.from_pretrained(hf_dir)
    audios = [load_audio(SAMPLE_CLIP)] if clips is None else list(clips)
    recover_folder(output_dir)
    with atomic_folder(output_dir, replace=_is_export(output_dir, "model.bin"), durable=True) as folder:
        converter = TransformersConverter(str(hf_dir), copy_files=list(FASTER_WHISPER_FILES))
        converter.convert(str(folder), quantization=quantization, force=True)
        _write_audio_context(folder / "config.json", get_audio_context(model.config))
        mismatch = _verify_ctranslate2(model, processor, folder, quantization, audios, language)
        allowed = MAX_WORD_MISMATCH.get(quantization, MAX_WORD_MISMATCH_QUANTISED)
        if mismatch.rate > allowed:
            raise ModelError(
                f"{output_dir}: the {quantization} model differs in {mismatch.rate:.0%} of the words, allowed are "
                f"{allowed:.0%}, so it was not saved. Source: {mismatch.expected!r}; converted: {mismatch.found!r}"
            )
    logger.info("saved %s (CTranslate2 %s, %.0f%% of words differ)", output_dir, quantization, 100 * mismatch.rate)
    return output_dir


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return what an export says of its making; empty where it says nothing or there is none."""
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return provenance if isinstance(provenance, dict) else {}


def _check_plain(model: Any) -> None:
    if not isinstance(model, WhisperForConditionalGeneration):
        raise ModelError(
            f"cannot export a {type(model).__name__}; pass the Whisper model itself (LoRA: after merge_and_unload)"
        )


def _save(model: Any, processor: WhisperProcessor, folder: Path) -> None:
    model.save_pretrained(folder)
    save_processor(processor, folder)


def _is_export(folder: Path, marker: str) -> bool:
    return (folder / marker).is_file()


def _verify_huggingface(model: Any, folder: Path) -> None:
    reloaded = WhisperForConditionalGeneration.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    saved, expected = reloaded.state_dict(), model.state_dict()
    wrong = [name for name in saved if name not in expected or not torch.equal(saved[name], expected[name])]
    if wrong or len(saved) != len(expected):
        raise ModelError(
            f"{folder}: {len(wrong) or abs(len(saved) - len(expected))} weights differ after reloading: "
            f"{', '.join(wrong[:3])}; LoRA adapters must be merged first"
        )
    features = _features(load_audio(SAMPLE_CLIP), model, CONTEXT_SAMPLES)  # stock Whisper takes 30 s only
    options = _language_options(model, features, None)
    with _inference(model):
        before, after = (
            m.generate(features, max_new_tokens=COMPARED_TOKENS, **options).tolist() for m in (model, reloaded)
        )
    if before != after:
        raise ModelError(f"{folder}: the reloaded model gives other tokens: {before} before, {after} after")


@dataclass(frozen=True)
class _Mismatch:
    rate: float  # word edits over the source's words
    expected: list[str]
    found: list[str]


def _verify_ctranslate2(
    model: Any, processor: Any, folder: Path, quantization: str, audios: Sequence[Waveform], language: str | None
) -> _Mismatch:
    """Transcribe greedily with both, from the same features and the same prompt."""
    compute_type = "int8" if quantization.startswith("int8") else "float32"  # no CPU computes in 16 bits
    threads = torch.get_num_threads()
    engine = ctranslate2.models.Whisper(str(folder), device="cpu", compute_type=compute_type, intra_threads=threads)
    expected: list[str] = []
    found: list[str] = []
    for audio in audios:
        features = _features(audio, model, _context_samples(model, len(audio)))
        options = _language_options(model, features, language)
        with _inference(model):
            tokens = model.generate(features, max_new_tokens=MAX_NEW_TOKENS, **options)[0]
        expected.append(processor.decode(tokens, skip_special_tokens=True).strip())
        mel = ctranslate2.StorageView.from_array(np.ascontiguousarray(features.numpy()))
        result = engine.generate(mel, [_prompt(processor.tokenizer, options)], beam_size=1)[0]
        found.append(processor.decode(result.sequences_ids[0], skip_special_tokens=True).strip())
    return _Mismatch(_word_mismatch(expected, found), expected, found)


def _word_mismatch(expected: list[str], found: list[str]) -> float:
    counts = jiwer.process_words(expected, found)
    edits = counts.substitutions + counts.deletions + counts.insertions
    words = counts.substitutions + counts.deletions + counts.hits
    return edits / words if words else float(edits > 0)  # a source that says nothing: any word is a mismatch


def _language_options(model: Any, features: Tensor, language: str | None) -> dict[str, str]:
    """Language and task for a multilingual model, nothing for an English-only one."""
    config = model.generation_config
    if not getattr(config, "is_multilingual", False):
        return {}
    chosen = language or getattr(config, "language", None)
    if chosen is None:
        with _inference(model):
            token = int(model.detect_language(features)[0])
        chosen = next(name for name, number in config.lang_to_id.items() if number == token)[2:-2]
    return {"language": chosen, "task": getattr(config, "task", None) or "transcribe"}


def _prompt(tokenizer: Any, options: dict[str, str]) -> list[int]:
    names = ["<|startoftranscript|>", *(f"<|{value}|>" for value in options.values()), "<|notimestamps|>"]
    return [int(tokenizer.convert_tokens_to_ids(name)) for name in names]


def _context_samples(model: Any, samples: int) -> int:
    if get_audio_context(model.config) == "full":
        return CONTEXT_SAMPLES
    wanted = samples + round(TRAILING_SILENCE_SEC * SAMPLE_RATE)
    return min(-(-wanted // SAMPLES_PER_POSITION) * SAMPLES_PER_POSITION, CONTEXT_SAMPLES)


def _features(audio: Waveform, model: Any, samples: int) -> Tensor:
    if len(audio) > CONTEXT_SAMPLES:
        raise ModelError(f"a clip of {len(audio) / SAMPLE_RATE:.1f} s: pass clips of at most 30 s to verify with")
    padded = torch.zeros(1, samples)
    padded[0, : len(audio)] = torch.from_numpy(audio)
    features = LogMel(model.config.num_mel_bins)(padded)  # (1, mels, samples // 160)
    return cast(Tensor, features.to(device=model.device, dtype=model.dtype))


def _write_audio_context(config_file: Path, audio_context: str) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["audio_context"] = audio_context
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _inference(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients, and without a warning for each generate call about its own processors."""
    was_training, verbosity = model.training, transformers_logging.get_verbosity()
    model.eval()
    transformers_logging.set_verbosity_error()
    try:
        with torch.inference_mode():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        model.train(was_training)
