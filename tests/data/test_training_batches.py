from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from src.data.augmentation.effects import sped_up
from src.data.labels import IGNORE_INDEX
from src.data.loader import batch_generator, create_loader
from src.data.preparation import check_utterance, load_utterances
from src.data.training_batches import LABEL_STEP, TrainingBatches, choose_lengths, cut_at_words
from src.data.utterance import Utterance
from src.inference.words import Word
from src.utils.config import DataConfig, load_config
from tests.data.word_tokenizer import word_processor

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


# lengths


def bundled_clips() -> list[Utterance]:
    """The training clips of the bundled data, by their durations in its table; nothing is decoded."""
    rows = load_utterances(DataConfig())
    return [replace(u, duration_sec=u.meta["duration"]) for u in rows if u.meta["split"] == "train"]


@pytest.mark.parametrize(
    ("size", "seconds", "full_share", "speeds", "p90_sec"),
    [
        (8, None, 0.0, (0.9, 1.0, 1.1), 1.0),
        (16, None, 0.1, (0.9, 1.0, 1.1), 1.0),
        (16, "auto", 0.1, (0.9, 1.0, 1.1), 1.0),
        (32, None, 0.1, (0.9, 1.0, 1.1), 1.9),
        (16, None, 0.1, (1.0,), 1.4),
    ],
)
def test_shapes_of_training_repeat_and_padding_is_a_small_share(
    size: int, seconds: str | None, full_share: float, speeds: tuple[float, ...], p90_sec: float
) -> None:
    """At most 12 shapes of the encoder and 30 with labels in 3 epochs, and 15 % of padding at own length.

    Batches by seconds have as few lengths, and more numbers of rows.

    A clip is not silent for longer than a pause, but for few, mostly in the longest rows; with 32 clips in a batch the
    360 clips make 11 batches, whose clips differ by more.
    """
    clips = bundled_clips()
    given: dict[str, Any] = {"batch_size": size, "batch_seconds": seconds}
    given["full_context_prob"] = full_share
    config = load_config(
        None, overrides={"device": "cpu", "training": given, "augmentation.speed_factors": list(speeds)}
    )
    loader = create_loader(clips, word_processor(), config, shuffle=True)
    made = TrainingBatches(config, 80, durations_sec=loader.durations_sec(0))
    shapes: Counter[tuple[int, int]] = Counter()
    pairs: set[tuple[int, int]] = set()
    spoken = padded = 0.0
    silences: list[float] = []
    played: Counter[float] = Counter()
    for epoch in range(3):
        for number, batch in enumerate(loader.batch_sampler.batches(epoch)):
            lengths = torch.tensor([round(16_000 * (clips[index].duration_sec or 0.0)) for index in batch])
            lone = {"audio_lengths": lengths, "timed": torch.zeros(len(batch), dtype=torch.bool)}
            full = bool(number % 10 == 0) and full_share > 0
            samples, chosen = made._fit(lone, [0] * len(batch), batch_generator(0, epoch, number), full=full)
            shapes[size if seconds else len(batch), samples] += 1
            tokens = max(loader.dataset.token_counts[index] + 3 for index in batch)
            pairs.add((samples, -(-tokens // LABEL_STEP)))
            if samples < 480_000:
                heard = [sped_up(length, speed) for length, speed in zip(lengths.tolist(), chosen, strict=True)]
                spoken += sum(heard)
                padded += len(batch) * samples
                silences += [(samples - length) / 16_000 for length in heard]
                played.update(chosen)
    assert len(shapes) <= 12
    assert len(pairs) <= 30
    assert all(samples % 2_560 == 0 for _, samples in shapes if samples < 480_000)
    assert spoken / padded >= 0.85
    assert min(silences) >= 0
    assert np.percentile(silences, 90) <= p90_sec
    assert min(played.values()) > 0.7 * sum(played.values()) / len(speeds)  # no speed is rare


def test_rows_are_those_of_the_least_squared_padding() -> None:
    counts = np.array([0, 5, 1, 0, 9, 0, 2])
    assert choose_lengths(counts, 1) == [6]
    assert choose_lengths(counts, 9) == [1, 2, 4, 6]

    def padding(ends: Sequence[int]) -> int:
        return sum(int(counts[n]) * (min(end for end in ends if end >= n) - n) ** 2 for n in range(len(counts)))

    for most in (1, 2, 3):
        least = min(padding((*ends, 6)) for ends in itertools.combinations(range(1, 6), most - 1))
        assert padding(choose_lengths(counts, most)) == least


def test_speech_is_never_cut_and_every_row_has_one_of_the_lengths(sample: list[Utterance]) -> None:
    clips = [check_utterance(u, DataConfig()) for u in sample[:24]]
    overrides = {"device": "cpu", "training.batch_size": 2, "augmentation": {"pitch_prob": 0.0, "noise_prob": 0.0}}
    config = load_config(None, overrides=overrides)
    loader = create_loader(clips, word_processor(), config, shuffle=True)
    made = TrainingBatches(config, 80, durations_sec=loader.durations_sec(0))
    loader.prepare_with(made)
    speeds = set()
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            assert batch["audio"].shape[1] in (*made._lengths, 480_000)
            assert batch["labels"].shape == batch["decoder_input_ids"].shape
            assert batch["labels"].shape[1] % LABEL_STEP == 0
            for audio, length, duration_sec in zip(
                batch["audio"], batch["audio_lengths"].tolist(), batch["durations"], strict=True
            ):
                assert length <= len(audio)
                assert not audio[length:].any()
                assert audio[length - 800 : length].any()
                speeds.add(round(duration_sec * 16_000 / length, 2))
    assert speeds == {0.9, 1.0, 1.1}


@pytest.mark.parametrize("factors", [(0.9,), (1.2, 1.3), (0.5, 2.0)])
def test_any_speeds_are_kept_to_and_fit(factors: tuple[float, ...]) -> None:
    durations_sec = [1.0, 2.0, 3.0, 29.0, 0.01]
    config = load_config(None, overrides={"augmentation.speed_factors": list(factors)})
    made = TrainingBatches(config, 80, durations_sec=durations_sec)
    lengths = torch.tensor([round(16_000 * sec) for sec in durations_sec])
    batch = {"audio_lengths": lengths, "timed": torch.tensor([False, False, True, False, False])}
    for number in range(10):
        samples, speeds = made._fit(batch, [0] * 5, batch_generator(0, 0, number), full=False)
        assert set(speeds) <= set(factors)
        assert 29 * 16_000 / max(1.0, *factors) <= samples <= 480_000


def test_labels_of_a_rounded_batch_say_the_same() -> None:
    given = make_words()
    batch = TrainingBatches(load_config(None, overrides={"augmentation.enabled": False}), 80)(
        given, batch_generator(0, 0, 0)
    )
    assert batch["labels"].shape == (2, 8)
    assert torch.equal(batch["labels"][:, :7], given["labels"])
    assert (batch["labels"][:, 7] == IGNORE_INDEX).all()
    assert torch.equal(batch["decoder_input_ids"][:, :7], given["decoder_input_ids"])


def test_a_prepared_batch_is_the_same_wherever_it_is_made(sample: list[Utterance]) -> None:
    clips = [check_utterance(u, DataConfig()) for u in sample[:6]]
    overrides = {"device": "cpu", "training.batch_size": 2, "augmentation.noise_prob": 1.0}

    def prepared(workers: int) -> Iterator[dict[str, Any]]:
        config = load_config(None, overrides={**overrides, "data.num_workers": workers})
        loader = create_loader(clips, word_processor(), config, shuffle=True)
        next(iter(loader))  # its workers begin before they know
        loader.prepare_with(TrainingBatches(config, 80, durations_sec=loader.durations_sec(0)))
        return iter(loader)

    for one, other in zip(prepared(0), prepared(1), strict=True):
        assert torch.equal(one["audio"], other["audio"])
        assert torch.equal(one["masks"], other["masks"])
