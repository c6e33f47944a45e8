from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.data.audio import SAMPLE_RATE, load_audio
from src.data.dataset import DataCollator, Example, ExamplePlanner, WhisperDataset
from src.data.labels import IGNORE_INDEX, MAX_LABEL_TOKENS, LabelEncoder
from src.data.preparation import check_utterance
from src.data.utterance import Utterance
from src.utils.config import CompositionConfig, Config


def speech(count: int, *, speakers: int = 5, seed: int = 0) -> list[Utterance]:
    rng = np.random.default_rng(seed)
    return [
        Utterance(
            f"u{i}", b"", "text", f"s{i * speakers // count}", duration_sec=round(rng.uniform(1, 9) * 16_000) / 16_000
        )
        for i in range(count)
    ]


def plan(
    utterances: list[Utterance], epoch: int = 0, *, counts: list[int] | None = None, seed: int = 1, **shares: float
) -> list[Example]:
    return ExamplePlanner(
        utterances,
        counts or [10] * len(utterances),
        prefix_tokens=2,
        config=CompositionConfig(**shares),  # type: ignore[arg-type]
        seed=seed,
    ).plan(epoch)


def test_nothing_asked_for_gives_each_clip_by_itself_in_order() -> None:
    utterances = speech(20)
    assert plan(utterances) == [Example((i,), duration_sec=u.duration_sec or 0) for i, u in enumerate(utterances)]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 30), st.integers(0, 445), st.sampled_from("abc")), min_size=1, max_size=40),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(2, 30),
    st.integers(0, 5),
)
def test_every_clip_is_in_one_example_that_fits_the_model(
    clips: list[tuple[float, int, str]], join: float, timed: float, prompted: float, longest: float, epoch: int
) -> None:
    utterances = [
        Utterance(f"u{i}", b"", "x", speaker if speaker != "c" else None, duration_sec=seconds)
        for i, (seconds, _, speaker) in enumerate(clips)
    ]
    counts = [count for _, count, _ in clips]
    shares = {
        "concatenate_prob": join,
        "timestamp_prob": timed,
        "previous_text_prob": prompted,
        "max_concatenated_sec": longest,
    }
    examples = plan(utterances, epoch, counts=counts, **shares)
    assert examples == plan(utterances, epoch, counts=counts, **shares)
    assert sorted(i for e in examples for i in e.indices) == list(range(len(clips)))
    for e in examples:
        special = 2 + 1 - e.timestamps + 2 * len(e.indices) * e.timestamps + 2 * (e.previous is not None)
        assert sum(counts[i] for i in e.indices) + special <= MAX_LABEL_TOKENS
        assert len(e.gaps_sec) == len(e.indices) - 1
        assert all(0.2 <= gap <= 0.8 for gap in e.gaps_sec)
        assert e.duration_sec == pytest.approx(sum(clips[i][0] for i in e.indices) + sum(e.gaps_sec))
        assert len(e.indices) == 1 or e.duration_sec <= longest + 1e-9
        same = [i for i in range(len(clips)) if clips[i][2] == clips[e.indices[0]][2] and counts[i]]
        if len(e.indices) > 1:
            at = same.index(e.indices[0])
            assert list(e.indices) == same[at : at + len(e.indices)]  # neighbours of one speaker, none left out
        if e.previous is not None:
            assert same.index(e.previous) == same.index(e.indices[0]) - 1


def test_the_share_of_joined_clips_is_the_one_asked_for() -> None:
    utterances = speech(3000)
    for asked in (0.3, 1.0):
        examples = plan(utterances, concatenate_prob=asked)
        joined = sum(len(e.indices) for e in examples if len(e.indices) > 1)
        assert joined / 3000 == pytest.approx(asked, abs=0.04)


def test_joined_lengths_reach_from_two_clips_to_the_longest_allowed() -> None:
    seconds = [e.duration_sec for e in plan(speech(3000), concatenate_prob=1.0, max_concatenated_sec=20)]
    assert max(seconds) > 19.5
    assert np.quantile(seconds, 0.1) < 11 < 15 < np.quantile(seconds, 0.9)


def test_shares_of_timed_and_prompted_examples_are_those_asked_for() -> None:
    examples = plan(speech(3000), timestamp_prob=0.5, previous_text_prob=0.25)
    assert sum(e.timestamps for e in examples) / 3000 == pytest.approx(0.5, abs=0.04)
    assert sum(e.previous is not None for e in examples) / 3000 == pytest.approx(0.25, abs=0.04)


def test_epochs_and_seeds_differ() -> None:
    utterances = speech(60)
    first = plan(utterances, 0, concatenate_prob=0.5)
    assert plan(utterances, 1, concatenate_prob=0.5) != first != plan(utterances, 0, concatenate_prob=0.5, seed=2)


def test_a_clip_without_text_stays_alone() -> None:
    utterances = speech(12, speakers=1)
    counts = [10] * 12
    counts[5] = 0
    joined = plan(utterances, counts=counts, concatenate_prob=1, timestamp_prob=1, previous_text_prob=1)
    assert Example((5,), duration_sec=utterances[5].duration_sec or 0) in joined
    single = {e.indices[0]: e for e in plan(utterances, counts=counts, previous_text_prob=1)}
    assert (single[4].previous, single[5].previous, single[6].previous) == (3, None, 4)


# real speech and the real tokenizer


@pytest.fixture(scope="module")
def clips(sample: list[Utterance]) -> list[Utterance]:
    """The six clips of one speaker."""
    checked = [check_utterance(u, Config().data) for u in sample[:6]]
    return [replace(u, text=u.text.capitalize() + ".") for u in checked]


@pytest.fixture(scope="module")
def dataset(_tiny_en: tuple[Any, Any], clips: list[Utterance]) -> WhisperDataset:
    return WhisperDataset(clips, LabelEncoder(_tiny_en[1].tokenizer))


@pytest.mark.slow
def test_joined_audio_is_its_parts_with_zeros_between(dataset: WhisperDataset, clips: list[Utterance]) -> None:
    item = dataset[Example((0, 1, 2), gaps_sec=(0.25, 0.5))]
    parts = [load_audio(u.audio) for u in clips[:3]]
    zeros = [np.zeros(4_000, np.float32), np.zeros(8_000, np.float32)]
    expected = np.concatenate([parts[0], zeros[0], parts[1], zeros[1], parts[2]])
    assert np.array_equal(item["audio"].numpy(), expected)
    assert item["utterance"].id == "+".join(u.id for u in clips[:3])
    assert item["utterance"].text == " ".join(u.text for u in clips[:3])
    assert item["utterance"].speaker == clips[0].speaker
    assert item["label"] == LabelEncoder(dataset._encoder._tokenizer).encode(item["utterance"].text)


@pytest.mark.slow
def test_a_plan_knows_the_samples_of_its_examples(dataset: WhisperDataset, clips: list[Utterance]) -> None:
    for example in plan(clips, concatenate_prob=1.0):
        assert len(dataset[example]["audio"]) == round(example.duration_sec * SAMPLE_RATE) <= 30 * SAMPLE_RATE


@pytest.mark.slow
def test_times_stand_around_each_clip(
    dataset: WhisperDataset, clips: list[Utterance], _tiny_en: tuple[Any, Any]
) -> None:
    item = dataset[Example((0, 1), gaps_sec=(0.4,), timestamps=True)]
    assert item["timed"] is True
    first = len(load_audio(clips[0].audio)) / SAMPLE_RATE  # 3.735 s
    whole = len(item["audio"]) / SAMPLE_RATE
    text = _tiny_en[1].tokenizer.decode(
        [t for t in item["label"].labels if t != IGNORE_INDEX], decode_with_timestamps=True
    )
    assert text == (
        f"<|0.00|> {clips[0].text}<|{round(first * 50) / 50:.2f}|><|{round((first + 0.4) * 50) / 50:.2f}|>"
        f" {clips[1].text}<|{round(whole * 50) / 50:.2f}|><|endoftext|>"
    )


@pytest.mark.slow
def test_the_text_before_is_a_prompt_without_loss(dataset: WhisperDataset, clips: list[Utterance]) -> None:
    label = dataset[Example((1,), previous=0)]["label"]
    plain = dataset[1]["label"]
    prompt = dataset._encoder.tokenize(clips[0].text)
    assert label.decoder_input_ids == (50360, *prompt, *plain.decoder_input_ids)
    assert label.labels == (IGNORE_INDEX,) * (1 + len(prompt)) + plain.labels


@pytest.mark.slow
def test_a_batch_says_which_of_its_examples_carry_times(dataset: WhisperDataset) -> None:
    batch = DataCollator(9)([dataset[0], dataset[Example((1,), timestamps=True)]])
    assert batch["timed"].dtype == torch.bool
    assert batch["timed"].tolist() == [False, True]
