from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from src.data.features import LogMel
from src.data.labels import IGNORE_INDEX
from src.data.loader import SpeechLoader, batch_generator, create_loader
from src.data.utterance import Utterance
from src.inference.options import DecodingOptions
from src.inference.torch_engine import decode
from src.inference.words import Word
from src.training import inputs as module
from src.training.inputs import TrainingInputs, cut_at_words, load_or_time_words, time_dataset_words
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


def draws(inputs: TrainingInputs, batch: dict[str, Any], count: int = 20) -> list[torch.Tensor]:
    return [inputs.audio(batch, batch_generator(0, 0, index))[0] for index in range(count)]


def test_clips_get_pauses_of_random_length_and_30_s_when_asked(jfk: Any) -> None:
    batch = make_batch(jfk)
    widths = {audio.shape[1] for audio in draws(TrainingInputs(make_config(), 80), batch)}
    longest = batch["audio"].shape[1]
    assert len(widths) > 5
    assert all(longest <= n <= longest + 16_000 + 320 and n % 320 == 0 for n in widths)
    full_model = load_config(None, overrides={"model.audio_context": "full", "augmentation": QUIET})
    for config in (make_config(training={"full_context_prob": 1.0}), full_model):
        assert {audio.shape[1] for audio in draws(TrainingInputs(config, 80), batch, 5)} == {480_000}
    mixed = draws(TrainingInputs(make_config(training={"full_context_prob": 0.3}), 80), batch, 200)
    assert 0.2 < sum(audio.shape[1] == 480_000 for audio in mixed) / 200 < 0.4


def test_features_are_the_log_mel_of_padded_clips_and_augmentation_repeats_for_the_same_batch_and_epoch(
    jfk: Any,
) -> None:
    batch = make_batch(jfk)
    plain = TrainingInputs(make_config(training={"max_trailing_silence_sec": 0.0}), 80)
    assert torch.equal(plain.features(batch, batch_generator(0, 0, 0)), LogMel(80)(batch["audio"]))
    everything = {"pitch_prob": 1.0, "noise_prob": 1.0, "room_prob": 1.0, "codec_prob": 1.0, "spec_augment_prob": 1.0}
    inputs = TrainingInputs(make_config(augmentation=everything), 80)
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
    for audio in draws(TrainingInputs(make_config(augmentation=noisy), 80), make_batch(jfk, (2.0,)), 5):
        heard = audio[0, 32_000:-320]  # the last position may be padding
        assert len(heard) < 320 or float(heard.abs().max()) > 1e-4


def test_a_clip_of_30_s_still_fits_with_its_pause_and_slower_speech(jfk: Any) -> None:
    batch = make_batch(jfk, (2.0,))
    batch["audio"] = torch.nn.functional.pad(batch["audio"], (0, 480_000 - 32_000)) + 1e-3
    batch["audio_lengths"] = torch.tensor([480_000])
    inputs = TrainingInputs(make_config(augmentation={"speed_factors": [0.9], "spec_augment_prob": 1.0}), 80)
    for index in range(3):
        assert inputs.features(batch, batch_generator(0, 0, index)).shape == (1, 80, 3_000)


# clips cut at a word

END, START = 9, 1


def make_words() -> dict[str, Any]:
    """Two clips of 3 s and 2 s with the texts 11 12 13 and 21 22; the second has a prompt."""
    return {
        "ids": ["a", "b"],
        "audio": torch.ones(2, 48_000),
        "audio_lengths": torch.tensor([48_000, 32_000]),
        "durations": [3.0, 2.0],
        "decoder_input_ids": torch.tensor([[START, 2, 11, 12, 13, END, END], [5, 6, START, 2, 21, 22, END]]),
        "labels": torch.tensor([[-100, 11, 12, 13, END, -100, -100], [-100, -100, -100, 21, 22, END, -100]]),
        "timed": torch.tensor([False, False]),
    }


WORDS = {
    "a": (Word("", 0.0, 1.0, tokens=1), Word("", 1.0, 2.0, tokens=1), Word("", 2.2, 3.0, tokens=1)),
    "b": (Word("", 0.0, 0.5, tokens=1), Word("", 1.0, 2.0, tokens=1)),
}


def cut(prob: float = 1.0, number: int = 0, **changes: Any) -> dict[str, Any]:
    return cut_at_words({**make_words(), **changes}, WORDS, prob, batch_generator(0, 0, number))


def test_a_cut_clip_ends_with_a_word_and_expects_the_words_until_there() -> None:
    seen = set()
    for number in range(40):
        given = make_words()
        batch = cut_at_words(given, WORDS, 1.0, batch_generator(0, 0, number))
        for row, words in enumerate(((11, 12, 13), (21, 22))):
            text = [int(t) for t in batch["labels"][row] if t not in (IGNORE_INDEX, END)]
            count, timed, end_sec = len(text), WORDS["ab"[row]], batch["durations"][row]
            assert text == list(words[:count])
            assert 1 <= count < len(words)
            assert end_sec in (timed[count - 1].end_sec, (timed[count].start_sec + timed[count].end_sec) / 2)
            samples = round(16_000 * end_sec)
            assert batch["audio_lengths"][row] == samples
            assert batch["audio"][row, :samples].all() and not batch["audio"][row, samples:].any()
            begun = ([START, 2], [5, 6, START, 2])[row]  # the second with its prompt
            inputs, rest = [*begun, *text], 7 - len(begun) - count
            assert batch["decoder_input_ids"][row].tolist() == inputs + [END] * rest
            assert batch["labels"][row].tolist() == [-100] * (len(begun) - 1) + [*text, END] + [-100] * rest
            seen.add((row, count, end_sec))
        assert batch["audio"].shape[1] == int(batch["audio_lengths"].max()) < 48_000
    assert len(seen) == 6  # both cuts after each word but the last
    assert str(given) == str(make_words())


def test_a_cut_is_never_within_a_token_that_spells_several_words() -> None:
    words = {"a": (Word("你", 0.0, 1.0), Word("好", 1.0, 2.0, tokens=1), Word("吗", 2.2, 3.0, tokens=2))}
    for number in range(20):
        batch = cut_at_words(make_words(), words, 1.0, batch_generator(0, 0, number))
        assert batch["labels"][0].tolist()[:3] == [-100, 11, END]
        assert batch["durations"][0] in (2.0, 2.6)


def test_a_share_is_cut_and_what_cannot_be_cut_stays_whole() -> None:
    assert cut(prob=0.0)["durations"] == [3.0, 2.0]
    share = [cut(prob=0.3, number=number)["durations"][0] < 3.0 for number in range(300)]
    assert 0.2 < sum(share) / 300 < 0.4
    assert cut(ids=["a+c", "unknown"])["durations"] == [3.0, 2.0]  # joined, without times
    assert cut(timed=torch.tensor([True, True]))["durations"] == [3.0, 2.0]


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
