from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from src.data.features import LogMel
from src.data.loader import SpeechLoader, batch_generator, create_loader
from src.data.training_batches import TrainingBatches
from src.data.utterance import Utterance
from src.inference.options import DecodingOptions
from src.inference.torch_engine import decode
from src.training import inputs as module
from src.training.inputs import TrainingInputs, load_or_time_words, time_dataset_words
from src.utils.config import Config, load_config

QUIET = {"enabled": False}


def make_config(*, training: dict[str, Any] | None = None, augmentation: dict[str, Any] | None = None) -> Config:
    given = {"full_context_prob": 0.0, **(training or {})}
    return load_config(None, overrides={"training": given, "augmentation": augmentation or QUIET})


def make_batch(jfk: Any, seconds: tuple[float, ...] = (2.0, 3.0)) -> dict[str, Any]:
    lengths = [int(16_000 * sec) for sec in seconds]
    audio = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        audio[row, :length] = torch.from_numpy(jfk[:length])
    timed = torch.zeros(len(lengths), dtype=torch.bool)
    return {"audio": audio, "audio_lengths": torch.tensor(lengths), "timed": timed, "ids": list("ab"[: len(lengths)])}


def draws(config: Config, batch: dict[str, Any], count: int = 20) -> list[torch.Tensor]:
    prepare = TrainingBatches(config, 80)
    return [prepare(batch, batch_generator(0, 0, index))["audio"] for index in range(count)]


def features(config: Config, batch: dict[str, Any], *numbers: int) -> torch.Tensor:
    """Make the features of a batch of a seed, an epoch and a number."""
    return TrainingInputs(config, 80).features(TrainingBatches(config, 80)(batch, batch_generator(*numbers)))


def test_clips_get_pauses_of_random_length_and_30_s_when_asked(jfk: Any) -> None:
    batch = make_batch(jfk)
    widths = {audio.shape[1] for audio in draws(make_config(), batch)}
    longest = batch["audio"].shape[1]
    assert len(widths) > 5
    assert all(longest <= n <= longest + 16_000 + 320 and n % 320 == 0 for n in widths)
    full_model = load_config(None, overrides={"model.audio_context": "full", "augmentation": QUIET})
    for config in (make_config(training={"full_context_prob": 1.0}), full_model):
        assert {audio.shape[1] for audio in draws(config, batch, 5)} == {480_000}
    mixed = draws(make_config(training={"full_context_prob": 0.3}), batch, 200)
    assert 0.2 < sum(audio.shape[1] == 480_000 for audio in mixed) / 200 < 0.4


def test_features_are_the_log_mel_of_padded_clips_and_augmentation_repeats_for_the_same_batch_and_epoch(
    jfk: Any,
) -> None:
    batch = make_batch(jfk)
    plain = make_config(training={"max_trailing_silence_sec": 0.0})
    assert torch.equal(features(plain, batch, 0, 0, 0), LogMel(80)(batch["audio"]))
    everything = {"pitch_prob": 1.0, "noise_prob": 1.0, "room_prob": 1.0, "codec_prob": 1.0, "spec_augment_prob": 1.0}
    config = make_config(augmentation=everything)
    first, again, other = (features(config, batch, 3, epoch, 5) for epoch in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert torch.isfinite(first).all()


def test_timed_clips_keep_their_speed(jfk: Any) -> None:
    prepare = TrainingBatches(make_config(augmentation={"speed_factors": [0.9]}), 80)
    batch = make_batch(jfk)
    batch["timed"] = torch.tensor([True, False])
    lengths = prepare(batch, batch_generator(0, 0, 0))["audio_lengths"]
    assert lengths.tolist() == [32_000, round(48_000 / 0.9)]


def test_background_noise_goes_on_through_the_pause(jfk: Any) -> None:
    noisy = {"speed_factors": [1.0], "pitch_prob": 0.0, "noise_prob": 1.0, "min_snr_db": 5, "max_snr_db": 5}
    for audio in draws(make_config(augmentation=noisy), make_batch(jfk, (2.0,)), 5):
        heard = audio[0, 32_000:-320]  # the last position may be padding
        assert len(heard) < 320 or float(heard.abs().max()) > 1e-4


def test_a_clip_of_30_s_still_fits_with_its_pause_and_slower_speech(jfk: Any) -> None:
    batch = make_batch(jfk, (2.0,))
    batch["audio"] = torch.nn.functional.pad(batch["audio"], (0, 480_000 - 32_000)) + 1e-3
    batch["audio_lengths"] = torch.tensor([480_000])
    config = make_config(augmentation={"speed_factors": [0.9], "spec_augment_prob": 1.0})
    for index in range(3):
        assert features(config, batch, 0, 0, index).shape == (1, 80, 3_000)


@pytest.fixture
def loader(tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config) -> SpeechLoader:
    return create_loader(clips[:4], tiny_en[1], config, shuffle=True)


@pytest.mark.slow
def test_words_are_timed_once_and_a_cut_clip_says_its_words(
    tiny_en: tuple[Any, Any], loader: SpeechLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_en
    model.audio_context = "dynamic"
    dataset = loader.dataset
    words = load_or_time_words(model, processor.tokenizer, dataset, tmp_path)
    assert set(words) == {u.id for u in dataset.utterances}
    for utterance, tokens in zip(dataset.utterances, dataset.tokens, strict=True):
        timed = words[utterance.id]
        assert sum(word.tokens for word in timed) == len(tokens)
        ends = [word.end_sec for word in timed]
        assert ends == sorted(ends) and ends[-1] <= (utterance.duration_sec or 0) + 1e-6
    monkeypatch.setattr(module, "time_dataset_words", lambda *a, **k: pytest.fail("timed again"))
    assert load_or_time_words(model, processor.tokenizer, dataset, tmp_path) == words
    assert len(json.loads(next((tmp_path / "word_times").iterdir()).read_text())) == 4


@pytest.mark.slow
def test_cuts_are_where_the_model_hears_the_words_end(tiny_en: tuple[Any, Any], jfk: Any, config: Config) -> None:
    """The public clip, cut behind a word in its middle, is transcribed up to that word."""
    model, processor = tiny_en
    utterance = Utterance(
        "jfk", jfk, "And so my fellow Americans ask not what your country can do for you, ask what you can do for your "
        "country.", duration_sec=len(jfk) / 16_000,
    )  # fmt: skip
    dataset = create_loader([utterance], processor, config, shuffle=True).dataset
    dataset._load = lambda audio, **_: audio
    model.audio_context = "dynamic"
    (timed,) = time_dataset_words(model, processor.tokenizer, dataset).values()
    end_sec = timed[4].end_sec  # Americans
    model.audio_context = "full"
    heard = decode(model, processor, [jfk[: round(16_000 * end_sec)]], DecodingOptions())[0].text
    assert heard.lower().strip(" .,").endswith("fellow americans")
