"""Count the operators of one training update, about the kernels that a GPU is given.

    python benchmarks/launches.py [--variant small] [--batch 32] [--quick]

Nothing is computed: random weights of the variant's shapes run in FakeTensorMode on the CPU, as torch 2.11 has no
backward pass on a pretended CUDA device, but on the branches of our code for a GPU. Operators that only make views are
not counted. Augmentation runs in the loader's processes, so that the device is given its features alone; what
it takes there is in the last line, too, which is one JSON object. `--quick` counts `tiny`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scaling_table import SIZES, config_of
from src.data import features
from src.data.labels import IGNORE_INDEX
from src.data.loader import batch_generator
from src.data.training_batches import TrainingBatches
from src.models.dynamic_context import DynamicWhisper
from src.training.inputs import TrainingInputs
from src.training.loss import TokenLoss
from src.training.methods import HalfCopy, prepare_model
from src.training.updates import Updater, build_optimizer, learning_rates
from src.utils.config import load_config

MOST = {"forward_backward": 1_500, "features_and_augmentation": 250}
CLIP_SEC, TOKENS = 4.0, 24
VIEWS = (
    "alias", "as_strided", "detach", "empty", "expand", "is_", "lift", "permute", "reshape", "select", "slice", "split",
    "squeeze", "t.", "transpose", "unbind", "unsafe_split", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
)  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts operators by name, except for those that only make views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.startswith((*VIEWS, "prim.", "profiler.")):  # those ask for a device, or time
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="small", choices=SIZES)
    parser.add_argument("--batch", type=int, default=32, help="clips")
    parser.add_argument("--quick", action="store_true", help="of tiny instead")
    arguments = parser.parse_args()
    variant = "tiny" if arguments.quick else arguments.variant
    found = count(variant, arguments.batch)
    print("| part | operators |\n|---|---:|")
    for name, number in found.items():
        print(f"| {name.replace('_', ' ')} | {number} |")
    print(json.dumps({"variant": variant, "batch": arguments.batch, **found, "at_most": MOST}))
    return int(any(found[name] > most for name, most in MOST.items()))


def count(variant: str, batch: int) -> dict[str, int]:
    """Return the operators of each part of an update."""
    config = load_config(None, overrides={"device": "cpu", "precision": "float32", "training.method": "full"})
    raw = make_batch(batch)
    with Operators() as on_loader:
        prepared = TrainingBatches(config, 80, durations_sec=[CLIP_SEC])(raw, batch_generator(0, 0, 0))
    found: dict[str, int] = {}
    as_on_gpu = patch.object(torch.compiler, "is_compiling", lambda: True)  # where shapes repeat
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = DynamicWhisper(config_of(variant))
        model.audio_context = "dynamic"
        prepare_model(model, config.training)
        model.train()
        half = HalfCopy(model, torch.bfloat16)
        inputs, loss = TrainingInputs(config, 80), TokenLoss(half.model)
        log_mel, found["features_and_augmentation"] = counted(lambda: inputs.features(prepared))
        passes = log_mel.to(half.model.dtype), prepared["decoder_input_ids"], prepared["labels"]
        with as_on_gpu:
            total, forward = counted(lambda: loss(*passes))
        found["forward_backward"] = forward + counted(total.backward)[1]
        optimizer = build_optimizer(model, learning_rate=1e-5, weight_decay=0.01)
        holder: Any = SimpleNamespace(optimizer=optimizer, zero_grad=optimizer.zero_grad)
        accelerator: Any = SimpleNamespace(
            device=torch.device("cpu"), scaler=None, clip_grad_norm_=partial(nn.utils.clip_grad_norm_, foreach=True),
            backward=lambda loss: loss.backward(),
        )  # fmt: skip
        updater = Updater(loss, holder, accelerator, inputs, config.training, half=half)
        updater.start(learning_rates(1e-5, total_updates=10, warmup_ratio=0.1), applied=0)

        gradients = [parameter.grad for parameter in half.model.parameters()]

        def step() -> None:
            for parameter, gradient in zip(half.model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            half.collect()
            norm = accelerator.clip_grad_norm_(half.weights, 1.0)
            updater._step(torch.isfinite(norm))

        step()  # makes the optimizer's state
        optimizer.zero_grad(set_to_none=True)
        found["optimizer_and_copies"] = counted(step)[1]
        with as_on_gpu, torch.autocast("cpu", dtype=torch.bfloat16):
            whole = TokenLoss(model)
            total, forward = counted(lambda: whole(log_mel, *passes[1:]))
        found["forward_backward_under_autocast"] = forward + counted(total.backward)[1]
    features._constants.cache_clear()  # has pretended constants
    found["augmentation_in_the_loader"] = sum(on_loader.found.values())
    return found


def counted(work: Callable[[], Any]) -> tuple[Any, int]:
    """Return what a function returns, and its operators."""
    with Operators() as mode:
        result = work()
    return result, sum(mode.found.values())


def make_batch(clips: int) -> dict[str, Any]:
    """Return noise in place of clips, as the collator gives them."""
    samples = round(CLIP_SEC * 16_000)
    tokens = torch.randint(0, 1_000, (clips, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = copy.deepcopy(tokens)
    labels[:, :3] = IGNORE_INDEX
    return {
        "audio": 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(0)),
        "audio_lengths": torch.full((clips,), samples),
        "decoder_input_ids": tokens,
        "labels": labels,
        "timed": torch.zeros(clips, dtype=torch.bool),
        "ids": [str(number) for number in range(clips)],
        "durations": [CLIP_SEC] * clips,
    }


if __name__ == "__main__":
    sys.exit(main())
