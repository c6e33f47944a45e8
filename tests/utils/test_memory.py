from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from src.utils.memory import MemoryUse, measure_memory, return_freed_memory


def test_memory_that_is_taken_shows(tmp_path: Path) -> None:
    gc.collect()  # what other tests left would be freed in between
    before = measure_memory(tmp_path)
    taken = np.ones(300_000_000, dtype=np.uint8)  # 300 MB
    after = measure_memory(tmp_path)
    assert 200 < after.process_mb - before.process_mb < 350
    assert after.system_available_mb > 0
    assert taken[-1] == 1


def test_fields_are_those_of_a_row_and_a_cpu_has_no_memory_of_its_own(tmp_path: Path) -> None:
    use = measure_memory(tmp_path, torch.device("cpu"))
    assert (use.gpu_mb, use.gpu_peak_mb) == (None, None)
    assert MemoryUse(10.4, 5.0, 3.6, 4.0, 7.0).fields() == {"memory_mb": 10, "gpu_memory_mb": 4, "disk_free_mb": 7}


def test_disk_is_the_one_of_the_folder(tmp_path: Path) -> None:
    assert measure_memory(tmp_path).disk_free_mb > 0
    with pytest.raises(OSError, match="absent"):
        measure_memory(tmp_path / "absent")


@pytest.mark.gpu
def test_tensors_on_the_gpu_show(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = measure_memory(tmp_path, "cuda").gpu_mb
    tensor = torch.ones(50_000_000, dtype=torch.uint8, device="cuda")
    after = measure_memory(tmp_path, tensor.device)
    assert before is not None
    assert after.gpu_mb is not None
    assert after.gpu_peak_mb is not None
    assert 50 <= after.gpu_mb - before < 55
    assert after.gpu_peak_mb >= after.gpu_mb


def test_freed_memory_goes_back_to_the_system() -> None:
    blocks = [bytearray(100_000) for _ in range(2_000)]
    del blocks[::2]  # holes, which the C library keeps
    return_freed_memory()
    assert len(blocks) == 1_000
