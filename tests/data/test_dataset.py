from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from src.data.audio import load_audio
from src.data.dataset import DataCollator, WhisperDataset
from src.data.labels import IGNORE_INDEX, EncodedLabel, LabelEncoder
from src.data.loader import create_dataloaders
from src.data.preparation import DatasetSplits
from src.data.utterance import Utterance
from src.utils.config import Config
from src.utils.errors import AudioError, DataError


def test_collator_pads_to_the_longest_and_masks_padding() -> None:
    items = [
        {
            "audio": torch.ones(n),
            "utterance": Utterance(f"u{n}", b"", "x", "s"),
            "label": EncodedLabel(a, b),
            "timed": False,
        }
        for n, a, b in [(320, (1, 2, 3), (-100, 3, 9)), (640, (1, 2), (-100, 9))]
    ]
    batch = DataCollator(end_token=9)(items)
    assert batch["audio"].shape == (2, 640)
    assert batch["audio"][0, 320:].abs().sum() == 0
    assert batch["audio_lengths"].tolist() == [320, 640]
    assert batch["decoder_input_ids"].tolist() == [[1, 2, 3], [1, 2, 9]]
    assert batch["labels"].tolist() == [[-100, 3, 9], [-100, 9, IGNORE_INDEX]]
    assert batch["timed"].tolist() == [False, False]
    assert batch["ids"] == ["u320", "u640"]
    assert set(batch) == {
        "audio", "audio_lengths", "decoder_input_ids", "labels", "timed", "ids", "texts", "speakers", "durations",
        "meta",
    }  # fmt: skip


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


@pytest.mark.slow
def test_a_clip_that_was_not_checked_is_named(_tiny_en: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match="utterance u: its duration is unknown"):
        WhisperDataset([Utterance("u", b"", "text")], LabelEncoder(_tiny_en[1].tokenizer))


@pytest.mark.slow
def test_audio_comes_from_the_loader_that_was_given(_tiny_en: tuple[Any, Any], sample: list[Utterance]) -> None:
    asked: list[Any] = []

    def load(source: Any, *, name: str) -> Any:
        asked.append((source, name))
        return load_audio(source, name=name)

    clip = replace(sample[0], duration_sec=3.735)
    item = WhisperDataset([clip], LabelEncoder(_tiny_en[1].tokenizer), load=load)[0]
    assert asked == [(clip.audio, clip.audio_name)]
    assert len(item["audio"]) == 59_760
