"""The decoder heads whose cross-attention follows the audio, as a checkpoint's generation config lists them."""

from __future__ import annotations

from typing import Any

from src.utils.errors import ModelError

Head = tuple[int, int]  # layer, head

FIND_HEADS = "python scripts/find_alignment_heads.py --model FOLDER --write"


def listed_heads(model: Any) -> list[Head]:
    """Return the alignment heads that the generation config lists, whether or not they exist; none by default."""
    return [(int(layer), int(head)) for layer, head in getattr(model.generation_config, "alignment_heads", None) or ()]


def existing_heads(model: Any) -> list[Head]:
    """Return the alignment heads that the generation config lists; none by default.

    Raises:
        ModelError: it lists heads that the decoder does not have, as distilled checkpoints do with their teacher's.
    """
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
