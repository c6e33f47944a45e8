from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from src.utils.errors import DeviceError
from src.utils.runtime import choose_precision, get_device, set_seed

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")


def test_the_seed_reaches_every_library() -> None:
    drawn = []
    for _ in range(2):
        set_seed(7)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert drawn[0] == drawn[1]


@no_cuda
def test_only_auto_may_choose_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert get_device("auto").type in ("cpu", "mps")
    assert "no CUDA device" in caplog.text
    with pytest.raises(DeviceError, match="Change runtime"):
        get_device("cuda")


def test_unknown_devices_and_precisions_are_refused() -> None:
    with pytest.raises(DeviceError, match="'gpu'"):
        get_device("gpu")
    with pytest.raises(DeviceError, match="'int4'"):
        choose_precision("int4", torch.device("cpu"))
    with pytest.raises(DeviceError, match="needs a CUDA device"):
        choose_precision("float16", torch.device("cpu"))


def test_the_cpu_trains_in_float32_with_a_reason() -> None:
    choice = choose_precision("auto", torch.device("cpu"))
    assert choice.precision == "float32"
    assert choice.reason
