from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from src.data.dataset import DataCollator, LengthBatchSampler, WhisperDataset, create_dataloaders
from src.data.labels import IGNORE_INDEX, EncodedLabel, LabelEncoder
from src.data.preparation import DatasetSplits
from src.data.utterance import Utterance
from src.utils.config import Config
from src.utils.errors import AudioError, DataError


def padding_share(durations: list[float], batches: list[list[int]]) -> float:
    padded = sum(max(durations[i] for i in batch) * len(batch) for batch in batches)
    return 1 - sum(durations) / padded


@pytest.fixture
def durations() -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return (1 + 14 * torch.rand(203, generator=generator)).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_clip_is_in_exactly_one_batch(durations: list[float], shuffle: bool) -> None:
    sampler = LengthBatchSampler(durations, 8, shuffle=shuffle, seed=1)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(203))
    assert len(batches) == len(sampler) == 26


def test_epochs_differ_and_the_same_epoch_repeats(durations: list[float]) -> None:
    sampler = LengthBatchSampler(durations, 8, shuffle=True, seed=1)
    sampler.set_epoch(1)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(2)
    assert first == again
    assert list(sampler) != first


def test_batches_of_similar_length_waste_little(durations: list[float]) -> None:
    sampler = LengthBatchSampler(durations, 8, shuffle=True, seed=1)
    unsorted = [list(range(at, min(at + 8, 203))) for at in range(0, 203, 8)]
    assert padding_share(durations, list(sampler)) < 0.12 < padding_share(durations, unsorted)


def test_collator_pads_to_the_longest_and_masks_padding() -> None:
    items = [
        {"audio": torch.ones(n), "utterance": Utterance(f"u{n}", b"", "x", "s"), "label": EncodedLabel(a, b)}
        for n, a, b in [(320, (1, 2, 3), (-100, 3, 9)), (640, (1, 2), (-100, 9))]
    ]
    batch = DataCollator(end_token=9)(items)
    assert batch["audio"].shape == (2, 640)
    assert batch["audio"][0, 320:].abs().sum() == 0
    assert batch["audio_lengths"].tolist() == [320, 640]
    assert batch["decoder_input_ids"].tolist() == [[1, 2, 3], [1, 2, 9]]
    assert batch["labels"].tolist() == [[-100, 3, 9], [-100, 9, IGNORE_INDEX]]
    assert batch["ids"] == ["u320", "u640"]


@pytest.mark.slow
def test_a_transcript_over_448_tokens_is_found_before_training(
    tiny_en: tuple[Any, Any], sample: list[Utterance], config: Config
) -> None:
    processor = tiny_en[1]
    good = [replace(u, duration_sec=3.0) for u in sample[:9]]
    long = replace(good[0], id="too-long", text="word " * 500)
    splits = DatasetSplits(train=[*good, long], validation=good, test=good, label_case="keep")
    with pytest.raises(DataError, match=r"too-long: the transcript has 50\d tokens"):
        create_dataloaders(splits, processor, config)
    skipping = config.model_copy(update={"data": config.data.model_copy(update={"on_error": "skip"})})
    loaders = create_dataloaders(splits, processor, skipping)
    assert len(loaders.train.dataset) == 9  # type: ignore[arg-type]
    assert [row.id for row in loaders.train.dataset.skipped] == ["too-long"]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_recording_that_breaks_later_is_named(tiny_en: tuple[Any, Any]) -> None:
    encoder = LabelEncoder(tiny_en[1].tokenizer)
    dataset = WhisperDataset([Utterance("lost", b"", "text", duration_sec=1.0)], encoder)
    with pytest.raises(AudioError, match="utterance lost"):
        dataset[0]
