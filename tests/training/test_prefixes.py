from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from src.data.batching import batch_generator
from src.data.labels import IGNORE_INDEX
from src.data.loader import SpeechLoader, create_loader
from src.data.utterance import Utterance
from src.inference.decoding import decode
from src.inference.options import DecodingOptions
from src.inference.words import Word
from src.training import prefixes
from src.training.prefixes import PrefixCutter, load_or_time_words, time_words
from src.utils.config import Config

END, START = 9, 1


def make_batch() -> dict[str, Any]:
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
    return PrefixCutter(WORDS, prob=prob)({**make_batch(), **changes}, batch_generator(0, 0, number))


def texts(batch: dict[str, Any]) -> list[list[int]]:
    return [[int(t) for t in row if t not in (IGNORE_INDEX, END)] for row in batch["labels"]]


def test_a_cut_clip_ends_with_a_word_and_expects_the_words_until_there() -> None:
    seen = set()
    for number in range(40):
        batch = cut(number=number)
        for row, words in enumerate(((11, 12, 13), (21, 22))):
            text = texts(batch)[row]
            assert text == list(words[: len(text)])
            assert 1 <= len(text) < len(words)
            end_sec = batch["durations"][row]
            timed = WORDS["ab"[row]]
            kept, following = timed[len(text) - 1], timed[len(text)]
            assert end_sec in (kept.end_sec, (following.start_sec + following.end_sec) / 2)
            assert batch["audio_lengths"][row] == round(16_000 * end_sec)
            assert not batch["audio"][row, round(16_000 * end_sec) :].any()
            assert batch["audio"][row, : round(16_000 * end_sec)].all()
            seen.add((row, len(text), end_sec))
    assert len(seen) == 6  # both cuts after each word but the last


def test_the_label_of_a_cut_clip_is_that_of_its_words_with_the_prompt_in_place() -> None:
    batch = cut()
    count = len(texts(batch)[0])
    assert batch["decoder_input_ids"][0].tolist() == [START, 2, *(11, 12)[:count], *[END] * (5 - count)]
    assert batch["labels"][0].tolist() == [-100, *(11, 12)[:count], END, *[-100] * (5 - count)]
    assert batch["decoder_input_ids"][1].tolist() == [5, 6, START, 2, 21, END, END]
    assert batch["labels"][1].tolist() == [-100, -100, -100, 21, END, -100, -100]


def test_a_batch_is_cut_to_its_longest_clip_and_the_given_one_stays() -> None:
    given = make_batch()
    batch = PrefixCutter(WORDS, prob=1.0)(given, batch_generator(0, 0, 0))
    assert batch["audio"].shape[1] == int(batch["audio_lengths"].max()) < 48_000
    assert all(
        torch.equal(given[k], v) if isinstance(v, torch.Tensor) else given[k] == v for k, v in make_batch().items()
    )


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
    words = load_or_time_words(model, processor.tokenizer, dataset, prefix=dataset.prefix, cache_dir=tmp_path)
    assert set(words) == {u.id for u in dataset.utterances}
    for utterance, tokens in zip(dataset.utterances, dataset.tokens, strict=True):
        timed = words[utterance.id]
        assert sum(word.tokens for word in timed) == len(tokens)
        ends = [word.end_sec for word in timed]
        assert ends == sorted(ends) and ends[-1] <= (utterance.duration_sec or 0) + 1e-6
    monkeypatch.setattr(prefixes, "time_words", lambda *a, **k: pytest.fail("timed again"))
    assert load_or_time_words(model, processor.tokenizer, dataset, prefix=dataset.prefix, cache_dir=tmp_path) == words
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
    (timed,) = time_words(model, processor.tokenizer, dataset, prefix=dataset.prefix).values()
    end_sec = timed[4].end_sec  # Americans
    model.audio_context = "full"
    heard = decode(model, processor, [jfk[: round(16_000 * end_sec)]], DecodingOptions())[0].text
    assert heard.lower().strip(" .,").endswith("fellow americans")
