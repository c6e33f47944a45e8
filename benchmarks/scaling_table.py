"""Print the arithmetic behind docs/SCALING.md: checkpoint sizes, and FLOPs per hour of audio, by variant.

    python benchmarks/scaling_table.py [--clip-sec 4.1] [--utilisation 0.2]

Nothing is measured here: sizes follow from the shapes, times from an assumed share of a GPU's peak. The last line
printed is one JSON object with the FLOPs per hour of audio.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import WhisperConfig

from benchmarks.training_measures import PEAK_TFLOPS, forward_flops

SIZES = {
    "tiny": (384, 4, 6),
    "base": (512, 6, 8),
    "small": (768, 12, 12),
    "medium": (1024, 24, 16),
}  # width, layers, heads
BYTES_A_PARAMETER = 12  # of a checkpoint: float32 weight and AdamW's two means
LORA_RANK = 32
TOKENS_PER_SEC = 3.0  # of a label, read speech
PAUSE_SEC = 0.5  # mean of the random pause at the end of a clip
GPUS = ("T4", "L4", "A100")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip-sec", type=float, default=4.1, help="mean length of a clip")
    parser.add_argument("--utilisation", type=float, default=0.2, help="share of the GPU's peak that training reaches")
    arguments = parser.parse_args()
    columns = [
        "variant",
        "parameters M",
        "checkpoint GB",
        "LoRA checkpoint GB",
        "PFLOP an audio hour",
        "padded to 30 s",
    ]
    columns += [f"{gpu}: hours for 1,000 h" for gpu in GPUS]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    found = {}
    for variant in SIZES:
        own, padded = (hour_flops(variant, arguments.clip_sec, full) for full in (False, True))
        found[variant] = own
        hours = [1000 * own / (PEAK_TFLOPS[gpu] * 1e12 * arguments.utilisation) / 3600 for gpu in GPUS]
        sizes = [
            parameters(variant) / 1e6,
            *(n * BYTES_A_PARAMETER / 1e9 for n in (parameters(variant), adapters(variant))),
        ]
        cells = [f"{sizes[0]:.0f}", f"{sizes[1]:.2f}", f"{sizes[2]:.2f}", f"{own / 1e15:.2f}", f"{padded / 1e15:.2f}"]
        print("| " + " | ".join([variant, *cells, *(f"{hour:.1f}" for hour in hours)]) + " |")
    print(json.dumps({"flops_per_audio_hour": found}))
    return 0


def config_of(variant: str) -> WhisperConfig:
    width, layers, heads = SIZES[variant]
    return WhisperConfig(
        vocab_size=51_865, d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
    )  # fmt: skip


def parameters(variant: str) -> int:
    """Count the trained parameters: all but the encoder's position table."""
    import torch
    from transformers import WhisperForConditionalGeneration

    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config_of(variant))
    return sum(p.numel() for p in model.parameters()) - model.model.encoder.embed_positions.weight.numel()


def adapters(variant: str) -> int:
    """Count the parameters of adapters on every linear layer: rank x (inputs + outputs) each."""
    width, layers, _ = SIZES[variant]
    attention, inner = 4 * LORA_RANK * 2 * width, 2 * LORA_RANK * 5 * width
    return layers * (attention + inner) + layers * (2 * attention + inner)


def hour_flops(variant: str, clip_sec: float, full: bool) -> float:
    """Return the FLOPs of training on an hour of audio: three forward passes."""
    positions = 1500 if full else round(50 * (clip_sec + PAUSE_SEC))
    tokens = round(clip_sec * TOKENS_PER_SEC) + 4
    clip = forward_flops(config_of(variant), clips=1, positions=positions, tokens=tokens, scored=tokens)
    return 3 * clip * 3600 / clip_sec


if __name__ == "__main__":
    sys.exit(main())
