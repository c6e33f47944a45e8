from __future__ import annotations

from typing import Any

import pytest
import torch

from src.data.batching import batch_generator
from src.data.features import LogMel
from src.training.inputs import TrainingInputs
from src.utils.config import Config, load_config

QUIET = {"enabled": False}


def make_config(*, training: dict[str, Any] | None = None, augmentation: dict[str, Any] | None = None) -> Config:
    return load_config(None, overrides={"training": training or {}, "augmentation": augmentation or QUIET})


def make_batch(jfk: Any, seconds: tuple[float, ...] = (2.0, 3.0)) -> dict[str, Any]:
    lengths = [int(16_000 * sec) for sec in seconds]
    audio = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        audio[row, :length] = torch.from_numpy(jfk[:length])
    timed = torch.zeros(len(lengths), dtype=torch.bool)
    return {"audio": audio, "audio_lengths": torch.tensor(lengths), "timed": timed, "ids": list("ab"[: len(lengths)])}


def draws(inputs: TrainingInputs, batch: dict[str, Any], count: int = 20) -> list[torch.Tensor]:
    return [inputs.audio(batch, batch_generator(0, 0, index))[0] for index in range(count)]


def test_clips_get_pauses_of_random_length_and_the_full_context_when_asked(jfk: Any) -> None:
    batch = make_batch(jfk)
    widths = {audio.shape[1] for audio in draws(TrainingInputs(make_config(), 80), batch)}
    longest = batch["audio"].shape[1]
    assert len(widths) > 5
    assert all(longest <= n <= longest + 16_000 + 320 and n % 320 == 0 for n in widths)
    always_full = TrainingInputs(make_config(training={"full_context_prob": 1.0}), 80)
    assert {audio.shape[1] for audio in draws(always_full, batch)} == {480_000}
    share = [
        a.shape[1] == 480_000
        for a in draws(TrainingInputs(make_config(training={"full_context_prob": 0.3}), 80), batch, 200)
    ]
    assert 0.2 < sum(share) / 200 < 0.4


def test_a_model_of_full_context_always_gets_30_s(jfk: Any) -> None:
    config = load_config(None, overrides={"model.audio_context": "full", "augmentation": QUIET})
    assert {audio.shape[1] for audio in draws(TrainingInputs(config, 80), make_batch(jfk))} == {480_000}


def test_without_augmentation_the_features_are_the_log_mel_of_the_padded_clips(jfk: Any) -> None:
    batch, config = make_batch(jfk), make_config(training={"max_trailing_silence_sec": 0.0})
    features = TrainingInputs(config, 80).features(batch, batch_generator(0, 0, 0))
    assert torch.equal(features, LogMel(80)(batch["audio"]))


def test_the_same_batch_of_the_same_epoch_gets_the_same_and_another_epoch_another(jfk: Any) -> None:
    everything = {"pitch_prob": 1.0, "noise_prob": 1.0, "room_prob": 1.0, "codec_prob": 1.0, "spec_augment_prob": 1.0}
    inputs, batch = TrainingInputs(make_config(augmentation=everything), 80), make_batch(jfk)
    first, again, other = (inputs.features(batch, batch_generator(3, epoch, 5)) for epoch in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert torch.isfinite(first).all()


def test_timed_clips_keep_their_speed(jfk: Any) -> None:
    inputs = TrainingInputs(make_config(augmentation={"speed_factors": [0.9]}), 80)
    batch = make_batch(jfk)
    batch["timed"] = torch.tensor([True, False])
    _, lengths = inputs.audio(batch, batch_generator(0, 0, 0))
    assert lengths.tolist() == [32_000, round(48_000 / 0.9)]


def test_background_noise_goes_on_through_the_pause(jfk: Any) -> None:
    noisy = {"speed_factors": [1.0], "pitch_prob": 0.0, "noise_prob": 1.0, "min_snr_db": 5, "max_snr_db": 5}
    inputs = TrainingInputs(make_config(augmentation=noisy), 80)
    for audio in draws(inputs, make_batch(jfk, (2.0,)), 5):
        pause = audio[0, 32_000:]
        heard = pause[: len(pause) - 320]  # the last position may be padding
        assert len(heard) < 320 or float(heard.abs().max()) > 1e-4


def test_a_clip_of_30_s_still_fits_with_its_pause_and_slower_speech(jfk: Any) -> None:
    batch = make_batch(jfk, (2.0,))
    batch["audio"] = torch.nn.functional.pad(batch["audio"], (0, 480_000 - 32_000)) + 1e-3
    batch["audio_lengths"] = torch.tensor([480_000])
    inputs = TrainingInputs(make_config(augmentation={"speed_factors": [0.9], "spec_augment_prob": 1.0}), 80)
    for index in range(3):
        assert inputs.features(batch, batch_generator(0, 0, index)).shape == (1, 80, 3_000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_are_made_where_the_batch_is(jfk: Any) -> None:
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in make_batch(jfk).items()}
    assert (
        TrainingInputs(make_config(augmentation={"noise_prob": 1.0}), 80)
        .features(batch, batch_generator(0, 0, 0))
        .is_cuda
    )
