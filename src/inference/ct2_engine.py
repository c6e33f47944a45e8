"""CTranslate2 engine: 8-bit and 16-bit weights on CPU and CUDA, three times as fast as torch on a CPU.

CTranslate2's encoder takes short features as they are, so that a checkpoint with dynamic context runs at the audio's
own length here too. It gives no attention while it generates: word times need a second pass of the decoder.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.features import HOP_SAMPLES, POSITION_SEC, log_mel
from src.data.labels import MAX_LABEL_TOKENS
from src.inference.engine_base import Decoded, Engine, batch_samples
from src.inference.options import DecodingOptions, gumbel_noise, log_softmax
from src.inference.words import Vocabulary, Word, place_words
from src.models.ct2_file import check_ct2_folder
from src.models.folder import content_files, own_settings, read_settings
from src.utils.errors import DeviceError, ModelError
from src.utils.files import expand_path, recover_folder
from src.utils.runtime import CUBLAS_FIX, cpu_threads, ctranslate2_cuda_problem, load_cublas

logger = logging.getLogger(__name__)


class CTranslate2Engine(Engine):
    """Decodes with the model in a folder that `export_ctranslate2` wrote, on a device as `find_device` takes it.

    Compute type "auto" keeps the type of the stored weights where the device can compute with it. `workers` batches are
    computed at once on a CPU, if as many threads call: on two cores, two workers of one thread decode nearly twice the
    clips of one with two (2026-11-28). `threads` are per worker; 0 shares the cores out.
    """

    name = "ctranslate2"

    def __init__(
        self, folder: Path, *, device: str = "auto", compute_type: str = "auto", workers: int = 1, threads: int = 0
    ) -> None:
        config = _read_config(folder)
        self.vocabulary = Vocabulary.from_folder(folder)
        self.audio_context, self.cap_rates = own_settings(config, folder / "config.json")
        mark = config.get("language")
        try:
            self.language = self.vocabulary.language_code(str(mark)) if mark and self.vocabulary.multilingual else None
        except ModelError as err:
            raise ModelError(f"{folder / 'config.json'}: {err}") from err
        layers, heads = check_ct2_folder(folder, config)
        # distilled checkpoints list their teacher's; CTranslate2 would end the process
        self._foreign_heads = [h for h in config.get("alignment_heads") or () if h[0] >= layers or h[1] >= heads]
        kind, index = find_device(device)
        if kind == "cuda":
            load_cublas()
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
        except (RuntimeError, MemoryError) as err:
            raise ModelError(f"{folder}: CTranslate2 cannot load it: {err}; export the model again") from err
        if self._model.is_multilingual != self.vocabulary.multilingual:
            raise ModelError(f"{folder}: tokenizer.json is that of another Whisper than model.bin; export it again")
        self.workers, self.device, self.precision = workers, self._model.device, self._model.compute_type

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Any:
        """Return the encoder's output, a `StorageView` (B, positions, d_model) on the engine's device."""
        samples = batch_samples([len(audio) for audio in audios], trailing_silence_sec, self.audio_context)
        batch = np.zeros((len(audios), samples), dtype=np.float32)
        for row, audio in enumerate(audios):
            batch[row, : len(audio)] = audio
        features = np.ascontiguousarray(log_mel(batch, self._model.n_mels))
        return self._model.encode(ctranslate2.StorageView.from_array(features))

    def _generate(
        self, encoded: Any, given: list[list[int]], prefix: list[int], caps: list[int], options: DecodingOptions
    ) -> list[Decoded]:
        if options.temperature:
            texts = zip(given, caps, strict=True)
            return [
                self._draw(self._row(encoded, i), text, prefix, cap, options) for i, (text, cap) in enumerate(texts)
            ]
        forced, new = len(prefix), len(prefix) + max(caps)  # CTranslate2 counts the forced tokens, too
        generated = self._model.generate(
            encoded,
            given,
            beam_size=options.num_beams,
            # CTranslate2 stops after half of max_length, or where context and text fill it; it may exceed 448
            max_length=max(2 * new, len(given[0]) - forced + new),
            suppress_blank=not prefix,
            return_scores=True,
            return_logits_vocab=bool(options.hotwords) and options.num_beams == 1,  # beams give none
            return_no_speech_prob=options.no_speech,
        )
        rows = []
        for i, (row, cap) in enumerate(zip(generated, caps, strict=True)):
            tokens = row.sequences_ids[0]  # the forced ones too
            # its score must not count what a neighbour's cap lets it say
            if len(given) > 1 and len(tokens) > forced + cap:
                rows += self._generate(self._row(encoded, i), given[i : i + 1], prefix, [cap], options)
                continue
            # the score is divided by all of these; the end token is in the sum, but not in the number
            logprob = row.scores[0] * len(tokens) / (len(tokens) - forced + (len(tokens) < new))
            silence = row.no_speech_prob if options.no_speech else None
            text, logits = tokens[forced : forced + cap], None
            if options.hotwords:
                steps = row.logits[0] if row.logits else self._forced_logits(encoded, i, [*given[i], *text])
                views = steps[forced : forced + len(text) + 1]
                logits = np.stack([np.array(_on_cpu(view)).ravel() for view in views])
                logits = np.pad(logits, ((0, len(text) + 1 - len(views)), (0, 0)))  # none after a text that is cut off
            rows.append(Decoded([*prefix, *text], logprob, silence, logits=logits))
        return rows

    def _forced_logits(self, encoded: Any, index: int, tokens: list[int]) -> Any:
        """Return the logits at each place of a text that is given, and after it."""
        (found,) = self._model.generate(
            self._row(encoded, index), [tokens], beam_size=1, max_length=2 * len(tokens), return_logits_vocab=True
        )
        return found.logits[0]

    def _draw(self, encoded: Any, given: list[int], prefix: list[int], cap: int, options: DecodingOptions) -> Decoded:
        """Draw one text as the torch engine does: what CTranslate2 itself draws depends on what it drew before.

        The likeliest continuation is taken as far as it is what is drawn; from the first other token there is a new
        one. At low temperatures that is a few calls.
        """
        chosen: list[int] = []  # with the end token
        logprob, no_speech, end = 0.0, None, self.vocabulary.end
        while len(chosen) < cap and end not in chosen:
            forced = len(prefix) + len(chosen)
            new = forced + cap - len(chosen)
            (found,) = self._model.generate(
                encoded,
                [[*given, *chosen]],
                beam_size=1,
                max_length=max(2 * new, len(given) + cap),
                suppress_blank=not forced,
                return_logits_vocab=True,
                return_no_speech_prob=True,
            )
            no_speech = found.no_speech_prob if no_speech is None else no_speech
            for likeliest, view in zip([*found.sequences_ids[0][forced:], end], found.logits[0][forced:], strict=False):
                logits = np.array(_on_cpu(view)).ravel().clip(min=-1e30)  # what is suppressed has the lowest float32
                noise = gumbel_noise(len(chosen), options.temperature, len(logits))
                chosen.append(int((logits / options.temperature + noise).argmax()))
                logprob += float(log_softmax(logits)[chosen[-1]])
                if chosen[-1] != likeliest or len(chosen) == cap:
                    break
        text = [token for token in chosen if token != end]
        return Decoded([*prefix, *text], logprob / len(chosen), no_speech if options.no_speech else None)

    def _row(self, encoded: Any, index: int) -> Any:
        return ctranslate2.StorageView.from_array(np.ascontiguousarray(np.array(_on_cpu(encoded))[index : index + 1]))

    def _place(
        self, encoded: Any, audios: Sequence[Waveform], starts: list[list[int]], rows: Sequence[Decoded]
    ) -> list[tuple[Word, ...]]:
        if self._foreign_heads:
            raise ModelError(
                f"alignment_heads of config.json has {self._foreign_heads[0]}, which the decoder lacks: the list is "
                "another model's; find this one's with scripts/find_alignment_heads.py, and export it again"
            )
        texts = [[token for token in row.tokens if token < self.vocabulary.end] for row in rows]
        frames = [max(1, len(audio) // HOP_SAMPLES) for audio in audios]
        # once for each language of the batch: CTranslate2 takes one start for all rows
        keys = [tuple(token for token in start if token != self.vocabulary.no_timestamps) for start in starts]
        # `align` adds two tokens of its own; a text that fills the decoder leaves no position for its last one
        fitting = [tokens[: MAX_LABEL_TOKENS - 2 - len(key)] for tokens, key in zip(texts, keys, strict=True)]
        aligned = {key: self._model.align(encoded, list(key), fitting, frames) for key in set(keys)}
        words: list[tuple[Word, ...]] = []
        for i, (tokens, key, audio) in enumerate(zip(texts, keys, audios, strict=True)):
            found, audio_sec = aligned[key][i], len(audio) / SAMPLE_RATE
            entered = dict(reversed(found.alignments))  # token -> its first position
            places = range(len(tokens) + 1 if tokens else 0)
            entered_sec = [min(entered.get(at, math.inf) * POSITION_SEC, audio_sec) for at in places]
            missing = len(tokens) - len(found.text_token_probs)
            probabilities = [*found.text_token_probs, *found.text_token_probs[-1:] * missing]
            words.append(place_words(self.vocabulary, tokens, entered_sec=entered_sec, probabilities=probabilities))
        return words

    def _detect(self, encoded: Any) -> list[tuple[str, float]]:
        return [(found[0][0].strip("<|>"), found[0][1]) for found in self._model.detect_language(encoded)]


def _on_cpu(view: Any) -> Any:
    """Return a `StorageView` as NumPy takes it."""
    return view.to_device(ctranslate2.Device.cpu).to(ctranslate2.DataType.float32)


def ct2_folder(source: str, *, quantization: str, cache_dir: Path) -> Path:
    """Return a CTranslate2 folder with the weights that `resolve_weights` finds, converted once into `cache_dir`.

    A CTranslate2 folder is returned as it is.
    """
    folder = expand_path(source)
    if not folder.exists():
        recover_folder(folder)  # a process was killed while it replaced the folder
    if (folder / "model.bin").is_file():
        return folder
    # the Hub's client, torch and transformers take seconds, and most calls need none
    from src.models.weights import combined_sha256, convert_once, resolve_weights

    weights = resolve_weights(source, cache_dir=cache_dir)
    content = combined_sha256(content_files(weights.path))
    digest = hashlib.sha256(f"{content} {quantization}".encode()).hexdigest()

    def convert(target: Path) -> None:
        from src.models.export.ctranslate2 import export_ctranslate2

        export_ctranslate2(weights.path, target, quantization=quantization)

    label = f"{weights.source}, as CTranslate2 {quantization}"
    return convert_once(f"{folder.name}-ct2-{quantization}", digest, label, cache_dir=cache_dir, convert=convert)


def find_device(name: str) -> tuple[str, int]:
    """Return kind and number of auto (CUDA if it works, else the CPU), cpu, cuda or cuda:N, without torch."""
    kind, _, number = name.partition(":")
    found = ctranslate2.get_cuda_device_count() if kind in ("auto", "cuda") else 0
    problem = ctranslate2_cuda_problem() if found else None
    if kind == "auto":
        if problem is not None:
            logger.warning("CTranslate2 on the CPU: on this GPU %s; %s", problem, CUBLAS_FIX)
        return ("cuda", 0) if found and problem is None else ("cpu", 0)
    if kind not in ("cpu", "cuda"):
        raise ModelError(f"CTranslate2 runs on cpu and cuda, not on {name}; set engine: torch, or device: cpu")
    index = int(number or 0)
    if kind == "cuda" and index >= found:
        raise DeviceError(f"device {name!r}: CTranslate2 sees {found} CUDA device(s); check nvidia-smi, or set auto")
    if problem is not None:
        raise DeviceError(
            f"device {name!r}: CTranslate2 cannot compute there: {problem}; {CUBLAS_FIX}, or engine: torch"
        )
    return kind, index


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    for file in (folder / "model.bin", path):
        if not file.is_file():
            raise ModelError(f"{folder}: no {file.name}; make the folder with `python scripts/export.py --format ct2`")
    config = read_settings(path)
    if "suppress_ids" not in config:
        raise ModelError(f"{folder}: not a Whisper model of CTranslate2; export a Whisper checkpoint")
    return config
