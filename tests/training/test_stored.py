from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from src.training.stored import spare_checkpoints, stored_checkpoints, stored_report
from src.training.trainer import WhisperTrainer
from src.utils.config import Config
from src.utils.memory import clean_up
from src.utils.validation import Check

TrainerFactory = Callable[..., WhisperTrainer]


def by_name(checks: Sequence[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.mark.slow  # trains
def test_checkpoints_are_whole_stale_or_damaged_and_the_newest_whole_one_is_not_spare(
    make_trainer: TrainerFactory, configure: Callable[..., Config]
) -> None:
    trainer = make_trainer(training__epochs=1, checkpoints__save_minutes=0, checkpoints__save_total_limit=3)
    trainer.train()
    config = trainer.config
    first, second, third = stored_checkpoints(config)
    assert [each.update for each in (first, second, third)] == [1, 2, 3]
    assert {each.problem for each in (first, second, third)} == {""}
    assert stored_report(config).ok
    stale = by_name(stored_report(configure(training__batch_size=4)).checks)
    assert (
        "stale, of another training: training.batch_size: 2 then, 4 now"
        in stale[f"checkpoint run-000/{third.path.name}"].found
    )

    content = bytearray((third.path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (third.path / "model.safetensors").write_bytes(content)
    (first.path / "state.json").write_text("{")
    checks = by_name(stored_report(config).checks)
    assert "SHA-256 differs" in checks[f"checkpoint run-000/{third.path.name}"].found
    assert "state.json cannot be read" in checks[f"checkpoint run-000/{first.path.name}"].found
    assert checks[f"checkpoint run-000/{second.path.name}"].found.startswith("whole, ")
    assert checks["best model"].found.startswith("run run-000, epoch ")
    assert set(spare_checkpoints(config)) == {first.path, third.path}
    clean_up(config, dry_run=False, decoded_audio=False, checkpoints=spare_checkpoints(config))
    assert [each.path for each in stored_checkpoints(config)] == [second.path]


def test_weights_and_data_that_need_no_network_are_named(configure: Callable[..., Config]) -> None:
    checks = by_name(stored_report(configure()).checks)
    assert checks["weights"] == Check("weights", "ok", "tiny.en; here without a network: tiny.en, base")
    assert "speechocean762-mini.parquet" in checks["bundled data"].found
    assert checks["checkpoints"].status == "absent"
    small = by_name(stored_report(configure(model__variant="small")).checks)["weights"]
    assert (small.status, small.fix) == ("absent", "hf download openai/whisper-small")
