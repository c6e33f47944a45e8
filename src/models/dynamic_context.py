"""Whisper whose encoder takes audio at its own length, 0.1 to 30 s, instead of always 30 s; its alignment heads.

The position table is sliced, nothing else changes: state-dict keys are those of stock Whisper, and at 3,000 frames the
outputs are the stock ones. A model must be trained for short context, else its decoder does not know when to stop
(measured 2026-11-24 on two CPU cores, tiny.en, 100 SpeechOcean762 clips: stock weights at own length give WER 630 %).
So a checkpoint says in its config which it can do, `audio_context: "full" | "dynamic"`, and the encoder enforces it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, RLock
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from src.utils.errors import DataError, ModelError
from src.utils.languages import known_language, parse_language

AudioContext = Literal["full", "dynamic"]
Head = tuple[int, int]  # layer, head of the decoder
MIN_FRAMES = 10  # 0.1 s
FIND_HEADS = "python scripts/find_alignment_heads.py --model FOLDER --write"
_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # an `RLock` for each model
_making_lock = Lock()


class DynamicWhisperEncoder(WhisperEncoder):  # type: ignore[misc]
    """Whisper's encoder over 10 to 3,000 mel frames."""

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """Encode (B, mels, frames) into (B, frames // 2, d_model); frames are even and in 10..3,000, 3,000 if full.

        The mask is ignored, as in stock Whisper: the model knows silence.
        """
        self._check_frames(input_features.shape[-1])
        hidden = nn.functional.gelu(self.conv1(input_features))  # (B, d_model, frames)
        hidden = nn.functional.gelu(self.conv2(hidden)).permute(0, 2, 1)  # (B, frames // 2, d_model)
        hidden = hidden + self.embed_positions.weight[: hidden.shape[1]]
        hidden = nn.functional.dropout(hidden, p=self.dropout, training=self.training)
        for layer in self.layers:
            if self.training and self.layerdrop > 0 and float(torch.rand([])) < self.layerdrop:
                continue
            hidden = layer(hidden, None, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden))

    def _check_frames(self, frames: int) -> None:
        full = 2 * self.config.max_source_positions  # 3_000
        if frames > full or frames < MIN_FRAMES or frames % 2:
            raise ModelError(
                f"{frames} mel frames: an even number from {MIN_FRAMES} (0.1 s) to {full} (30 s) is needed; "
                "cut longer audio first (BatchInference does), pad shorter audio with silence"
            )
        if frames != full and get_audio_context(self.config) == "full":
            raise ModelError(
                f"this checkpoint has audio_context 'full': it takes 30 s ({full} frames), got {frames} frames. Pad "
                "the audio to 30 s, or make it dynamic: adapt_context needs recordings only, WhisperTrainer with "
                "model.audio_context: dynamic needs transcripts too"
            )


class DynamicWhisper(WhisperForConditionalGeneration):  # type: ignore[misc]
    """`WhisperForConditionalGeneration` with an encoder for any length up to 30 s.

    Forward, loss and `generate` (greedy, beam, timestamps, token timestamps) work as in transformers; a saved folder
    loads in the stock class and in `pipeline("automatic-speech-recognition")`.
    """

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        self.model.encoder = DynamicWhisperEncoder(config)
        self.post_init()

    @property
    def audio_context(self) -> AudioContext:
        """What the weights can do: "full" (30 s only) or "dynamic" (0.1 to 30 s)."""
        return get_audio_context(self.config)

    @audio_context.setter
    def audio_context(self, value: AudioContext) -> None:
        if value not in ("full", "dynamic"):
            raise ModelError(f"audio_context is 'full' or 'dynamic', got {value!r}")
        self.config.audio_context = value

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save as transformers does, under the stock class's name: every tool then finds an architecture it knows."""
        super().save_pretrained(save_directory, **kwargs)
        self.config.architectures = [WhisperForConditionalGeneration.__name__]
        self.config.save_pretrained(save_directory)

    def _get_input_segment(self, **given: Any) -> Any:
        """`generate` cuts windows here and pads them to 30 s; at dynamic context they keep their length."""
        if given["input_features"] is not None and self.audio_context == "dynamic":
            longest = int(max(given["seek_num_frames"][row] for row in given["batch_idx_map"][: given["cur_bsz"]]))
            given["num_segment_frames"] = max(longest + longest % 2, MIN_FRAMES)
        return super()._get_input_segment(**given)


def decoder_states(
    model: Any,
    inputs_embeds: Tensor,
    audio: Tensor,
    *,
    audio_mask: Tensor | None = None,
    cache: Any = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the (B, L, d_model) states of texts, from embedded tokens and the encoder's (B, T, d_model).

    As the stock decoder computes them, which reads a value from the device in each pass, to look for packed sequences,
    and a random number in each layer; and which takes no mask for the audio.

    Args:
        model: a `DynamicWhisper`.
        inputs_embeds: (B, L, d_model).
        audio: (B, T, d_model).
        audio_mask: (B, 1, 1, T), added to the scores of the attention to the audio; with sdpa attention only.
        cache: an `EncoderDecoderCache` of the tokens before these.
        positions: (1, L) those of the tokens; by default they follow the cache.
        mask: (1, 1, L, tokens of the cache), added to the scores of self-attention; causal by default.
    """
    decoder = model.model.decoder
    if not takes_audio_mask(model) or (decoder.training and decoder.layerdrop):
        hidden: Tensor = decoder(
            inputs_embeds=inputs_embeds, attention_mask=mask, encoder_hidden_states=audio, past_key_values=cache,
            position_ids=positions, use_cache=cache is not None,
        )[0]  # fmt: skip
        return hidden
    before = cache.get_seq_length() if cache is not None and positions is None else 0
    hidden = inputs_embeds + decoder.embed_positions(inputs_embeds, before, positions)
    hidden = nn.functional.dropout(hidden, p=decoder.dropout, training=decoder.training)
    for layer in decoder.layers:
        hidden = layer(hidden, mask, audio, audio_mask, past_key_values=cache, use_cache=cache is not None)
    hidden = decoder.layer_norm(hidden)
    return hidden  # noqa: RET504  of a type that mypy knows


def takes_audio_mask(model: Any) -> bool:
    """Whether `decoder_states` takes an `audio_mask`: attention other than sdpa needs other masks."""
    return bool(model.config._attn_implementation == "sdpa")


def get_audio_context(config: WhisperConfig) -> AudioContext:
    """Read a checkpoint's context; stock checkpoints do not have the key and are "full"."""
    return cast("AudioContext", getattr(config, "audio_context", "full"))


def get_language(model: Any) -> str | None:
    """Return the language that a checkpoint's generation config names, as a code that the model knows.

    Other tools write names (`hindi`) and tokens (`<|hi|>`) there too. None if it names none, or if the model is
    English-only.

    Raises:
        ModelError: the model does not know the language.
    """
    generation = model.generation_config
    mark = getattr(generation, "language", None)
    if mark is None or not getattr(generation, "is_multilingual", False):
        return None
    known = [name.strip("<|>") for name in getattr(generation, "lang_to_id", None) or ()]
    try:
        return known_language(parse_language(str(mark).strip("<|>")), known)
    except DataError as err:
        raise ModelError(
            f"the checkpoint's generation_config.json has language {mark!r}: {err}; correct it there, or remove it"
        ) from err


def get_cap_rates(config: Any) -> dict[str, float]:
    """Return the tokens per second at most of each language that a checkpoint was trained on; empty if it says none."""
    return dict(getattr(config, "tokens_per_sec", None) or {})


def listed_heads(model: Any) -> list[Head]:
    """Return the heads whose attention follows the audio, as the generation config lists them; none by default."""
    return [(int(layer), int(head)) for layer, head in getattr(model.generation_config, "alignment_heads", None) or ()]


def existing_heads(model: Any) -> list[Head]:
    """Return `listed_heads`; a `ModelError` if the decoder lacks one: distilled checkpoints list their teacher's."""
    listed = listed_heads(model)
    layers, count = model.config.decoder_layers, model.config.decoder_attention_heads
    absent = [(layer, head) for layer, head in listed if not (0 <= layer < layers and 0 <= head < count)]
    if absent:
        raise ModelError(
            f"alignment_heads lists {absent[0]}, but the decoder has {layers} layers of {count} heads: the list is "
            f"another model's; find this one's: {FIND_HEADS}"
        )
    return listed


def upper_half_heads(config: Any) -> list[Head]:
    """Return all heads of the upper half of the decoder's layers, as CTranslate2's converter does without a list."""
    layers, count = config.decoder_layers, config.decoder_attention_heads
    return [(layer, head) for layer in range(layers // 2, layers) for head in range(count)]


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode, and give it back in the mode it came in.

    One thread at a time is in here with a model: others wait, so that sessions in several threads may share it.
    """
    with _making_lock:
        lock = _locks.setdefault(model, RLock())
    with lock:
        # module by module: part of a model may be frozen in evaluation mode while the rest trains
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
