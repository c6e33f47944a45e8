"""Checkpoints for whisper.cpp: one file in its ggml format, and how to call it.

The format is that of whisper.cpp's own converters
(https://github.com/ggml-org/whisper.cpp/blob/master/models/convert-pt-to-ggml.py), little-endian: a magic number,
eleven sizes, the mel filters, the ordinary tokens as bytes, and the tensors under OpenAI's names, matrices in float16:
of float32 files whisper.cpp 1.8.5 cannot compute the convolutions. It knows the special tokens from the size of the
vocabulary, and pads audio to 30 s unless it is called with `-ac`; the file cannot say that, so `USAGE.md` does. With
`-ac` its flash attention must be off, since it also attends to the zeros that fill up the positions to a multiple of
256: stock tiny.en and base then repeat sentences at whose end they stop without it (2026-11-30, tests/models/export).
"""

from __future__ import annotations

import json
import logging
import math
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from src.models.dynamic_context import get_language
from src.models.export.huggingface import loaded_source, new_export, require_packages
from src.models.export.verify import TRAILING_SILENCE_SEC, ClipBatch, Clips, verify_transcripts
from src.models.folder import GGML_FILE, GGML_USAGE
from src.utils.errors import ModelError

logger = logging.getLogger(__name__)

GGML_PACKAGES = ("pywhispercpp",)  # with which it is verified
MAGIC = 0x67676D6C  # "ggml"
# of English-only, multilingual, and large-v3's vocabulary, which has one language more
VOCABULARIES = (51_864, 51_865, 51_866)
POSITIONS_PER_SEC = 50  # of the encoder; the unit of `-ac`
IS_FLOAT16 = 1
# what stays in 32 bits besides vectors
_FLOAT32 = re.compile(r"(en|de)coder\.positional_embedding|.*\.conv\d\.bias")
# gets a file, the language of each clip, samples per clip and options; the samples come by standard input
_TRANSCRIBE = """
import json, sys
import numpy as np
import _pywhispercpp as cpp

file, languages, samples, given = json.loads(sys.argv[1])
clips = np.frombuffer(sys.stdin.buffer.read(), dtype=np.float32).reshape(-1, samples)
settings = cpp.whisper_context_default_params()
settings.flash_attn = given["audio_ctx"] == 1500
context = cpp.whisper_init_from_file_with_params(file, settings)
rows = []
for clip, language in zip(clips, languages):
    options = cpp.whisper_full_default_params(cpp.whisper_sampling_strategy.WHISPER_SAMPLING_GREEDY)
    for key, value in given.items():
        setattr(options, key, value)
    options.language = language
    options.no_timestamps = options.single_segment = options.suppress_nst = True
    options.print_progress = options.print_timestamps = False
    options.temperature_inc, options.no_speech_thold = 0.0, 1.0  # as it is heard, without second thoughts
    if cpp.whisper_full(context, options, clip, len(clip)):
        sys.exit("a clip could not be transcribed")
    rows.append([cpp.whisper_full_get_token_id(context, segment, token)
                 for segment in range(cpp.whisper_full_n_segments(context))
                 for token in range(cpp.whisper_full_n_tokens(context, segment))])
cpp.whisper_free(context)
print(json.dumps(rows))
"""
_NAMES = (  # of transformers, and of OpenAI
    (r"^model\.", ""),
    (r"\.layers\.", ".blocks."),
    (r"\.self_attn_layer_norm\.", ".attn_ln."),
    (r"\.encoder_attn_layer_norm\.", ".cross_attn_ln."),
    (r"\.final_layer_norm\.", ".mlp_ln."),
    (r"\.self_attn\.", ".attn."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.out_proj\.", ".out."),
    (r"\.fc1\.", ".mlp.0."),
    (r"\.fc2\.", ".mlp.2."),
    (r"^encoder\.layer_norm\.", "encoder.ln_post."),
    (r"^decoder\.layer_norm\.", "decoder.ln."),
    (r"\.embed_positions\.weight$", ".positional_embedding"),
    (r"\.embed_tokens\.", ".token_embedding."),
)


def export_ggml(
    source: str | Path | Any,
    output_dir: str | Path,
    *,
    processor: WhisperProcessor | None = None,
    verify_clips: Clips | None = None,
) -> Path:
    """Convert for whisper.cpp, and verify the export by transcribing with it.

    Arguments are those of `export_ctranslate2`. A checkpoint of dynamic context hears the clips at their own length.

    Returns:
        output_dir, with config.json, `ggml-model.bin`, of which whisper.cpp's `quantize` makes smaller files, and
        `USAGE.md` on how to call whisper.cpp with it.

    Raises:
        MissingDependencyError: pywhispercpp, which has whisper.cpp built in, is absent.
        ModelError: a vocabulary that whisper.cpp does not know, or any word differs and not by close calls alone, see
            `verify_transcripts`.
        FileExistsError: output_dir contains something else.
    """
    require_packages("export for whisper.cpp", GGML_PACKAGES)
    output_dir, given = Path(output_dir), loaded_source(source, processor, verify_clips)
    with given as (model, own, clips), new_export(output_dir, [GGML_FILE]) as folder:
        with (folder / GGML_FILE).open("wb") as file:
            write_ggml(model, own, file)
        model.config.save_pretrained(folder)  # has `audio_context`
        (folder / GGML_USAGE).write_text(_usage(model), encoding="utf-8")
        name = f"{output_dir}: the ggml model"
        verify_transcripts(model, own, whisper_cpp(folder / GGML_FILE), name=name, clips=clips)
    logger.info("saved %s (ggml)", output_dir)
    return output_dir


def write_ggml(model: Any, processor: WhisperProcessor, file: BinaryIO) -> None:
    """Write a model in float32 on the CPU, its mel filters and its tokens."""
    config, tokenizer = model.config, processor.tokenizer
    end = int(tokenizer.eos_token_id)
    if config.vocab_size not in VOCABULARIES or end != 50_256 + (config.vocab_size != VOCABULARIES[0]):
        raise ModelError(
            f"whisper.cpp knows vocabularies of {', '.join(map(str, VOCABULARIES))} tokens, this one has "
            f"{config.vocab_size}, and its text ends with {end}; tokens cannot be added for it"
        )
    if not config.tie_word_embeddings:
        raise ModelError("whisper.cpp has one table for reading and writing tokens; this model has two")
    _write_ints(
        file, MAGIC, config.vocab_size,
        config.max_source_positions, config.d_model, config.encoder_attention_heads, config.encoder_layers,
        config.max_target_positions, config.d_model, config.decoder_attention_heads, config.decoder_layers,
        config.num_mel_bins, IS_FLOAT16,
    )  # fmt: skip
    filters = np.ascontiguousarray(processor.feature_extractor.mel_filters.T, dtype="<f4")  # (mels, frequencies)
    _write_ints(file, *filters.shape)
    file.write(filters.tobytes())
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    _write_ints(file, end)
    for token in tokenizer.convert_ids_to_tokens(range(end)):
        spelt = bytes(byte_of[character] for character in token)
        _write_ints(file, len(spelt))
        file.write(spelt)
    for name, tensor in openai_tensors(model.state_dict()):
        _write_tensor(file, name, tensor)


def openai_tensors(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a `WhisperForConditionalGeneration` under OpenAI's names, without the tied projection."""
    for name, tensor in state.items():
        if name == "proj_out.weight":
            continue
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        yield name, tensor[:, None] if re.search(r"\.conv\d\.bias$", name) else tensor  # whisper.cpp adds it to rows


def _write_tensor(file: BinaryIO, name: str, tensor: Tensor) -> None:
    is_half = tensor.ndim > 1 and not _FLOAT32.fullmatch(name)
    spelt = name.encode()
    _write_ints(file, tensor.ndim, len(spelt), int(is_half), *reversed(tensor.shape))
    file.write(spelt)
    file.write(tensor.contiguous().numpy().astype("<f2" if is_half else "<f4").tobytes())


def _write_ints(file: BinaryIO, *values: int) -> None:
    file.write(struct.pack(f"<{len(values)}i", *values))


def audio_context(duration_sec: float) -> int:
    """Return what whisper.cpp's `-ac` is for a clip that a checkpoint of dynamic context hears at its own length."""
    return min(1_500, math.ceil((duration_sec + TRAILING_SILENCE_SEC) * POSITIONS_PER_SEC))


def whisper_cpp(file: Path) -> Callable[[ClipBatch], list[list[int]]]:
    """Return what transcribes with whisper.cpp greedily, with the settings of `ClipBatch`.

    It runs in a process of its own: what it cannot compute ends its process.
    """

    def transcribe(batch: ClipBatch) -> list[list[int]]:
        languages = [mark.strip("<|>") for mark in batch.spoken.get("language", ["en"] * len(batch.prompts))]
        options = {
            "audio_ctx": batch.features.shape[-1] // 2,
            "translate": batch.spoken.get("task") == "translate",
            "max_tokens": batch.max_new_tokens,
            "n_threads": torch.get_num_threads(),
        }
        given = json.dumps([str(file), languages, batch.audio.shape[1], options])
        done = subprocess.run(
            [sys.executable, "-c", _TRANSCRIBE, given], input=batch.audio.numpy().tobytes(), capture_output=True
        )
        if done.returncode:
            problem = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise ModelError(f"{file}: whisper.cpp failed ({'; '.join(problem) or done.returncode}); it was not saved")
        rows: list[list[int]] = json.loads(done.stdout)
        return rows

    return transcribe


def _usage(model: Any) -> str:
    language = get_language(model) or ("auto" if getattr(model.generation_config, "is_multilingual", False) else "en")
    title = f"# {GGML_FILE} for whisper.cpp\n\n"
    call = f"whisper-cli -m {GGML_FILE} -l {language}"
    if model.audio_context == "full":
        return f"{title}This model hears audio padded to 30 s, as whisper.cpp pads it:\n\n    {call} -f clip.wav\n"
    return f"""{title}\
This model is tuned to hear audio at its own length, which is faster by as much as the audio is shorter than 30 s.
whisper.cpp pads to 30 s unless `-ac` gives the length in steps of 20 ms, with half a second for the end of the speech.
For a clip of 4.2 s:

    {call} -nt -nfa -ac {audio_context(4.2)} -f clip.wav        # 50 * (4.2 + 0.5)

`-nt` leaves out timestamps. `-nfa` turns flash attention off, which with `-ac` also attends to what fills up the
positions to a multiple of 256. In whisper.cpp's library these are `audio_ctx` of `whisper_full_params` and `flash_attn`
of `whisper_context_params`; in pywhispercpp `Model(file, context_params={{"flash_attn": False}})` and
`model.transcribe(audio, audio_ctx={audio_context(4.2)})`. Audio of more than 29.5 s must be cut at pauses first: with
`-ac` whisper.cpp hears the beginning of each window of 30 s only.
"""
