"""CTranslate2 engine: 8-bit and 16-bit weights on CPU and CUDA, three times as fast as torch on a CPU.

CTranslate2's encoder takes short features as they are, so that a checkpoint with dynamic context runs at the audio's
own length here too. It gives no attention while it generates: word times need a second pass of the decoder (`align`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import ctranslate2
import numpy as np

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.features import HOP_SAMPLES, log_mel
from src.inference.options import DecodingOptions, DecodingResult, batch_samples
from src.inference.words import Vocabulary, Word, place_words
from src.utils.errors import DeviceError, ModelError
from src.utils.runtime import cpu_threads

MAX_POSITIONS = 448  # of the decoder
POSITION_SEC = 2 * HOP_SAMPLES / SAMPLE_RATE  # 0.02 s


class CTranslate2Engine:
    """Decodes with a CTranslate2 model; see `Engine` for its methods.

    Args:
        folder: with model.bin, config.json and tokenizer.json, as `export_ctranslate2` writes it.
        device: as `find_device` takes it.
        compute_type: "auto" keeps the type of the stored weights where the device can compute with it; or int8,
            int8_float16, float16, float32, ... as CTranslate2 names them.
        workers: batches computed at once on a CPU, if as many threads call: on two cores, two workers of one thread
            decode nearly twice the clips of one with two (2026-11-28).
        threads: CPU threads per worker; 0 shares the cores out.

    Raises:
        ModelError: not a complete CTranslate2 Whisper.
        DeviceError: the device or type is unavailable.
    """

    name = "ctranslate2"

    def __init__(
        self, folder: Path, *, device: str = "auto", compute_type: str = "auto", workers: int = 1, threads: int = 0
    ) -> None:
        config = _read_config(folder)
        self.vocabulary = Vocabulary.from_folder(folder)
        self.audio_context = cast(Literal["full", "dynamic"], config.get("audio_context", "full"))
        kind, index = find_device(device)
        try:
            self._model = ctranslate2.models.Whisper(
                str(folder),
                device=kind,
                device_index=index,
                compute_type="default" if compute_type == "auto" else compute_type,
                inter_threads=workers,
                intra_threads=threads or max(1, cpu_threads() // workers),
            )
        except ValueError as err:
            raise DeviceError(f"{folder}: {err}; try device: cpu, or compute_type: auto") from err
        except RuntimeError as err:
            raise ModelError(f"{folder}: CTranslate2 cannot load it: {err}; export the model again") from err
        self.workers = workers
        self.device, self.precision = self._model.device, self._model.compute_type

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Any:
        """Return the encoder's output, a `StorageView` (B, positions, d_model) on the engine's device."""
        samples = batch_samples([len(audio) for audio in audios], trailing_silence_sec, self.audio_context)
        batch = np.zeros((len(audios), samples), dtype=np.float32)
        for row, audio in enumerate(audios):
            batch[row, : len(audio)] = audio
        features = np.ascontiguousarray(log_mel(batch, self._model.n_mels))
        return self._model.encode(ctranslate2.StorageView.from_array(features))

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        """Decode what `encode` gave for these clips."""
        languages = self._languages(encoded, len(audios), options)
        prompt = self.vocabulary.prompt_tokens(options.prompt, options.hotwords)
        prefix = self.vocabulary.encode(options.prefix)
        starts = [
            self.vocabulary.start_sequence(code, options.task, timestamps=options.timestamps) for code in languages
        ]
        caps = [options.token_cap(len(audio)) for audio in audios]
        forced = len(prefix)
        sampling = {}
        if options.temperature:
            ctranslate2.set_random_seed(options.seed)
            sampling = {"sampling_topk": 0, "sampling_temperature": options.temperature}
        generated = self._model.generate(
            encoded,
            [[*prompt, *start, *prefix] for start in starts],
            beam_size=options.num_beams,
            max_length=_max_length(len(prompt) + len(starts[0]) + forced, max(caps)),
            suppress_blank=not prefix,
            return_scores=True,
            return_no_speech_prob=options.no_speech,
            **sampling,
        )
        texts = [row.sequences_ids[0][: forced + cap] for row, cap in zip(generated, caps, strict=True)]
        words = self._align_rows(encoded, audios, starts, texts) if options.word_timestamps else [None] * len(texts)
        results = []
        for row, tokens, words_of_row, language in zip(generated, texts, words, languages, strict=True):
            size = len(row.sequences_ids[0])
            results.append(
                DecodingResult(
                    text=self.vocabulary.decode(tokens).strip(),
                    tokens=tuple(tokens),
                    # CTranslate2 divides the sum by all tokens, the forced ones too, and leaves the end token out
                    avg_logprob=row.scores[0] * size / (size - forced + 1),
                    words=words_of_row,
                    language=language,
                    no_speech_prob=row.no_speech_prob if options.no_speech else None,
                    temperature=options.temperature,
                )
            )
        return results

    def align(
        self, encoded: Any, audios: Sequence[Waveform], texts: Sequence[Sequence[int]], options: DecodingOptions
    ) -> list[tuple[Word, ...]]:
        """Place known texts in their clips."""
        start = self.vocabulary.start_sequence(options.language, options.task, timestamps=False)
        return self._align_rows(encoded, audios, [start] * len(texts), texts)

    def detect_languages(self, audios: Sequence[Waveform]) -> list[str | None]:
        """Return the likeliest language of each clip; None for an English-only model."""
        options = DecodingOptions()
        return self._languages(self.encode(audios, options.trailing_silence_sec), len(audios), options)

    def first_token(self, audio: Waveform, options: DecodingOptions) -> int:
        """Return the likeliest first token of a clip."""
        encoded = self.encode([audio], options.trailing_silence_sec)
        (language,) = self._languages(encoded, 1, options)
        start = self.vocabulary.start_sequence(language, options.task, timestamps=False)
        (row,) = self._model.generate(encoded, [start], beam_size=1, max_length=_max_length(len(start), 1))
        return int(row.sequences_ids[0][0])

    def _languages(self, encoded: Any, rows: int, options: DecodingOptions) -> list[str | None]:
        if not self.vocabulary.multilingual or options.language is not None:
            return [options.language] * rows
        return [found[0][0].strip("<|>") for found in self._model.detect_language(encoded)]

    def _align_rows(
        self, encoded: Any, audios: Sequence[Waveform], starts: Sequence[list[int]], texts: Sequence[Sequence[int]]
    ) -> list[tuple[Word, ...]]:
        """Align once for each language of the batch: CTranslate2 takes one start for all rows."""
        rows = [[token for token in tokens if token < self.vocabulary.end] for tokens in texts]
        frames = [max(1, len(audio) // HOP_SAMPLES) for audio in audios]
        keys = [tuple(token for token in start if token != self.vocabulary.no_timestamps) for start in starts]
        aligned = {key: self._model.align(encoded, list(key), rows, frames) for key in set(keys)}
        words: list[tuple[Word, ...]] = [()] * len(rows)
        for i, (tokens, key, audio) in enumerate(zip(rows, keys, audios, strict=True)):
            if tokens:
                found, audio_sec = aligned[key][i], len(audio) / SAMPLE_RATE
                entered = dict(reversed(found.alignments))  # token -> its first position
                entered_sec = [min(entered[at] * POSITION_SEC, audio_sec) for at in range(len(tokens) + 1)]
                words[i] = place_words(
                    self.vocabulary, tokens, entered_sec=entered_sec, probabilities=found.text_token_probs
                )
        return words


def find_device(name: str) -> tuple[str, int]:
    """Return the kind and number of a device for CTranslate2, without torch.

    Args:
        name: "auto" (CUDA if there is any, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        ModelError: another kind.
        DeviceError: no such CUDA device.
    """
    kind, _, number = name.partition(":")
    found = ctranslate2.get_cuda_device_count() if kind in ("auto", "cuda") else 0
    if kind == "auto":
        return ("cuda", 0) if found else ("cpu", 0)
    if kind not in ("cpu", "cuda"):
        raise ModelError(f"CTranslate2 runs on cpu and cuda, not on {name}; set engine: torch, or device: cpu")
    index = int(number or 0)
    if kind == "cuda" and index >= found:
        raise DeviceError(
            f"device {name!r}: CTranslate2 sees {found} CUDA device(s) here; check nvidia-smi, or set device: auto"
        )
    return kind, index


def _max_length(context: int, new: int) -> int:
    """CTranslate2 stops after half of max_length, or where context and text fill it."""
    return min(max(2 * new, context + new), MAX_POSITIONS)


def _read_config(folder: Path) -> dict[str, Any]:
    for name in ("model.bin", "config.json"):
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder}: no {name}; make a CTranslate2 folder with `python scripts/export.py --format ct2`"
            )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as err:
        raise ModelError(f"{folder / 'config.json'}: not JSON: {err}; export the model again") from err
    if not isinstance(config, dict) or "suppress_ids" not in config:
        raise ModelError(f"{folder}: not a Whisper model of CTranslate2; export a Whisper checkpoint")
    return config
