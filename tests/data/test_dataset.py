"""Training examples: which clips they are made of, their audio and labels, and examples without speech."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import welch

from src.data.audio import SAMPLE_RATE, load_audio
from src.data.dataset import (
    DataCollator,
    Example,
    ExamplePlanner,
    Examples,
    NoSpeechAudio,
    PackedRows,
    WhisperDataset,
    make_no_speech,
)  # fmt: skip
from src.data.labels import IGNORE_INDEX, MAX_LABEL_TOKENS, EncodedLabel, LabelEncoder, LabelStyle, restyle
from src.data.loader import create_loader
from src.data.preparation import check_utterance
from src.data.utterance import Utterance
from src.data.vad import speech_edges
from src.utils.config import CompositionConfig, Config, load_config
from src.utils.errors import AudioError, DataError

# what an example is made of


def speech(count: int, *, speakers: int = 5, seed: int = 0) -> list[Utterance]:
    seconds = np.random.default_rng(seed).uniform(1, 9, count)
    return [
        Utterance(f"u{i}", b"", "text", f"s{i * speakers // count}", duration_sec=round(sec * 16_000) / 16_000)
        for i, sec in enumerate(seconds)
    ]


def plan(
    utterances: list[Utterance], epoch: int = 0, *, counts: list[int] | None = None, seed: int = 1, **shares: Any
) -> list[Example]:
    config = CompositionConfig(**shares)
    counts = counts or [10] * len(utterances)
    return list(ExamplePlanner(utterances, counts, prefix_tokens=2, config=config, seed=seed).plan(epoch))


def test_nothing_asked_for_gives_each_clip_by_itself_in_order() -> None:
    utterances = speech(20)
    assert plan(utterances) == [Example((i,), duration_sec=u.duration_sec or 0) for i, u in enumerate(utterances)]


def test_packed_examples_and_rows_are_the_same() -> None:
    examples = [
        Example((2,), duration_sec=0.1),
        Example((0, 3, 1), (0.2, 1 / 3), True, 0, 9.0),
        Example((4,), (), True),
    ]
    packed = Examples(examples)
    assert list(packed) == examples
    assert packed[1] == examples[1]
    assert list(packed.durations_sec) == [0.1, 9.0, 0.0]
    rows = PackedRows()
    for row in ([5, 6], [], [51_865]):
        rows.append(row)
    assert list(rows) == [(5, 6), (), (51_865,)]
    assert rows[-1] == (51_865,)
    with pytest.raises(IndexError):
        rows[3]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 30), st.integers(0, 445), st.sampled_from("abc")), min_size=1, max_size=40),
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    st.floats(2, 30),
    st.integers(0, 5),
)
def test_every_clip_is_in_one_example_that_fits_the_model(
    clips: list[tuple[float, int, str]], probs: tuple[float, float, float], longest: float, epoch: int
) -> None:
    utterances = [
        Utterance(f"u{i}", b"", "x", speaker if speaker != "c" else None, duration_sec=seconds)
        for i, (seconds, _, speaker) in enumerate(clips)
    ]
    counts = [count for _, count, _ in clips]
    shares = dict(zip(("concatenate_prob", "timestamp_prob", "previous_text_prob"), probs, strict=True))
    examples = plan(utterances, epoch, counts=counts, max_concatenated_sec=longest, **shares)
    assert examples == plan(utterances, epoch, counts=counts, max_concatenated_sec=longest, **shares)
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
        assert all(counts[i] for i in e.indices) or e == Example(e.indices[:1], duration_sec=clips[e.indices[0]][0])
        if e.previous is not None:
            assert same.index(e.previous) == same.index(e.indices[0]) - 1


def test_shares_and_joined_lengths_are_those_asked_for() -> None:
    utterances = speech(3000)
    for asked in (0.3, 1.0):
        examples = plan(utterances, concatenate_prob=asked, max_concatenated_sec=20)
        joined = [e for e in examples if len(e.indices) > 1]
        assert sum(len(e.indices) for e in joined) / 3000 == pytest.approx(asked, abs=0.04)
    seconds = [e.duration_sec for e in examples]
    assert max(seconds) > 19.5
    assert np.quantile(seconds, 0.1) < 11 < 15 < np.quantile(seconds, 0.9)
    examples = plan(utterances, timestamp_prob=0.5, previous_text_prob=0.25)
    assert sum(e.timestamps for e in examples) / 3000 == pytest.approx(0.5, abs=0.04)
    assert sum(e.previous is not None for e in examples) / 3000 == pytest.approx(0.25, abs=0.04)


def test_epochs_and_seeds_differ() -> None:
    utterances = speech(60)
    first = plan(utterances, 0, concatenate_prob=0.5)
    assert plan(utterances, 1, concatenate_prob=0.5) != first != plan(utterances, 0, concatenate_prob=0.5, seed=2)


# its audio and label, with real speech and the real tokenizer


@pytest.fixture(scope="module")
def clips(sample: list[Utterance]) -> list[Utterance]:
    """The six clips of one speaker."""
    checked = [check_utterance(u, Config().data) for u in sample[:6]]
    return [replace(u, text=u.text.capitalize() + ".") for u in checked]


@pytest.fixture(scope="module")
def encoder(_tiny_en: tuple[Any, Any]) -> LabelEncoder:
    return LabelEncoder(_tiny_en[1].tokenizer)


@pytest.fixture(scope="module")
def dataset(encoder: LabelEncoder, clips: list[Utterance]) -> WhisperDataset:
    return WhisperDataset(clips, encoder)


@pytest.mark.slow
def test_joined_audio_is_its_parts_with_zeros_between(
    dataset: WhisperDataset, clips: list[Utterance], encoder: LabelEncoder
) -> None:
    item = dataset[Example((0, 1, 2), gaps_sec=(0.25, 0.5))]
    parts = [load_audio(u.audio) for u in clips[:3]]
    zeros = [np.zeros(4_000, np.float32), np.zeros(8_000, np.float32)]
    expected = np.concatenate([parts[0], zeros[0], parts[1], zeros[1], parts[2]])
    assert np.array_equal(item["audio"].numpy(), expected)
    assert item["utterance"].id == "+".join(u.id for u in clips[:3])
    assert item["utterance"].text == " ".join(u.text for u in clips[:3])
    assert item["utterance"].speaker == clips[0].speaker
    assert item["label"] == encoder.encode(item["utterance"].text)
    for example in plan(clips, concatenate_prob=1.0):
        assert len(dataset[example]["audio"]) == round(example.duration_sec * SAMPLE_RATE) <= 30 * SAMPLE_RATE


@pytest.mark.slow
def test_times_stand_where_speech_begins_and_ends_and_the_text_before_is_a_prompt(
    dataset: WhisperDataset, clips: list[Utterance], encoder: LabelEncoder, _tiny_en: tuple[Any, Any]
) -> None:
    item = dataset[Example((0, 1), gaps_sec=(0.4,), timestamps=True)]
    audio = [load_audio(clip.audio) for clip in clips[:2]]
    (a, b), (c, d) = (speech_edges(part) for part in audio)
    assert 0 < a < b < len(audio[0]) / SAMPLE_RATE  # 3.735 s, with silence around the speech
    later = len(audio[0]) / SAMPLE_RATE + 0.4
    times = [f"<|{round(sec * 50) / 50:.2f}|>" for sec in (a, b, later + c, later + d)]
    tokens = [t for t in item["label"].labels if t != IGNORE_INDEX]
    assert _tiny_en[1].tokenizer.decode(tokens, decode_with_timestamps=True) == (
        f"{times[0]} {clips[0].text}{times[1]}{times[2]} {clips[1].text}{times[3]}<|endoftext|>"
    )
    assert DataCollator(9)([dataset[0], item])["timed"].tolist() == [False, True]
    prompted, prompt = dataset[Example((1,), previous=0)]["label"], encoder.tokenize(clips[0].text)
    assert prompted.decoder_input_ids == (50360, *prompt, *dataset[1]["label"].decoder_input_ids)


@pytest.mark.slow
@pytest.mark.parametrize(("silence_sec", "first_sec"), [((0.4, 0.9), None), ((2.0, 0.0), 1.0)])
def test_silence_around_a_clip_is_outside_its_times(
    clips: list[Utterance], encoder: LabelEncoder, _tiny_en: tuple[Any, Any],
    silence_sec: tuple[float, float], first_sec: float | None,
) -> None:  # fmt: skip
    spoken, noise = load_audio(clips[0].audio), np.random.default_rng(0).normal(0, 1e-4, 4 * SAMPLE_RATE)
    lead, rest = (noise[: round(sec * SAMPLE_RATE)].astype(np.float32) for sec in silence_sec)
    file = io.BytesIO()
    sf.write(file, np.concatenate([lead, spoken, rest]), SAMPLE_RATE, format="WAV", subtype="FLOAT")
    seconds = len(spoken) / SAMPLE_RATE + sum(silence_sec)
    clip = replace(clips[0], audio=file.getvalue(), duration_sec=seconds)
    label = WhisperDataset([clip], encoder)[Example((0,), timestamps=True)]["label"]
    text = _tiny_en[1].tokenizer.decode([t for t in label.labels if t >= 0], decode_with_timestamps=True)
    begin, end = (float(sec) for sec in re.findall(r"<\|([\d.]+)\|>", text))
    start_sec, end_sec = speech_edges(spoken)
    assert begin == pytest.approx(silence_sec[0] + start_sec if first_sec is None else first_sec, abs=0.1)
    assert end == pytest.approx(silence_sec[0] + end_sec, abs=0.1)


@pytest.fixture(scope="module")
def multilingual(base: tuple[Any, Any], clips: list[Utterance]) -> WhisperDataset:
    texts = [("zh", "你好"), ("zh", "再见。"), ("bn", "আমার"), ("bn", "ভাই"), ("de", "Guten Tag"), ("en", "Hello")]
    spoken = [replace(u, text=t, language=c) for u, (c, t) in zip(clips, texts, strict=True)]
    return WhisperDataset(spoken, LabelEncoder(base[1].tokenizer))


@pytest.mark.slow
def test_each_row_has_the_prefix_of_its_language_and_only_one_language_is_joined(
    multilingual: WhisperDataset, base: tuple[Any, Any]
) -> None:
    tokenizer = base[1].tokenizer
    for index, utterance in enumerate(multilingual.utterances):
        assert multilingual.prefix_of(index)[1] == tokenizer.convert_tokens_to_ids(f"<|{utterance.language}|>")
        assert multilingual[index]["label"].decoder_input_ids[:4] == multilingual.prefix_of(index)
    planner = ExamplePlanner(
        multilingual.utterances, multilingual.token_counts, prefix_tokens=4, seed=0,
        config=CompositionConfig(concatenate_prob=1.0, previous_text_prob=1.0),
    )  # fmt: skip
    for example in planner.plan(0):
        indices = (*example.indices, *([] if example.previous is None else [example.previous]))
        assert len({multilingual.utterances[i].language for i in indices}) == 1
        assert len(multilingual[example]["label"].labels) + 1 <= planner.longest_label(0)
    assert [len(e.indices) for e in planner.plan(0)] == [2, 2, 1, 1]
    batch = DataCollator(9)([multilingual[0], multilingual[5]])
    assert batch["languages"] == ["zh", "en"]


@pytest.mark.slow
def test_joined_labels_decode_to_the_joined_text(multilingual: WhisperDataset, base: tuple[Any, Any]) -> None:
    for indices, text in (((0, 1), "你好再见。"), ((2, 3), "আমার ভাই")):
        item = multilingual[Example(indices, gaps_sec=(0.25,))]
        tokens = [t for t in item["label"].labels if t != IGNORE_INDEX]
        assert item["utterance"].text == base[1].tokenizer.decode(tokens, skip_special_tokens=True) == text


@pytest.mark.slow
def test_times_of_the_transcript_go_before_those_of_the_clip(
    encoder: LabelEncoder, clips: list[Utterance], _tiny_en: tuple[Any, Any]
) -> None:
    timed = replace(clips[0], text="<|0.20|> One<|1.00|><|1.40|> two.<|2.00|>")
    dataset = WhisperDataset([restyle(timed, LabelStyle("keep")), clips[1]], encoder)
    assert dataset.utterances[0].text == "One two."
    item = dataset[Example((0, 1), gaps_sec=(0.25,), timestamps=True)]
    tokens = [t for t in item["label"].labels if t != IGNORE_INDEX]
    text = _tiny_en[1].tokenizer.decode(tokens, decode_with_timestamps=True)
    start_sec = len(load_audio(clips[0].audio)) / SAMPLE_RATE + 0.25 + speech_edges(load_audio(clips[1].audio))[0]
    assert text.startswith(f"<|0.20|> One<|1.00|><|1.40|> two.<|2.00|><|{round(start_sec * 50) / 50:.2f}|> ")
    plain = [t for t in dataset[0]["label"].labels if t != IGNORE_INDEX]
    assert _tiny_en[1].tokenizer.decode(plain) == " One two.<|endoftext|>"


@pytest.mark.slow
def test_the_highest_rate_of_tokens_is_that_of_the_densest_clip_of_a_language(
    base: tuple[Any, Any], clips: list[Utterance]
) -> None:
    rows = [("ka", "ამინდის პროგნოზის მიხედვით", 1.0), ("ka", "ამინდის", 8.0), ("en", "Hi", 2.0)]
    spoken = [replace(clips[0], language=c, text=t, duration_sec=d) for c, t, d in rows]
    dataset = WhisperDataset(spoken, LabelEncoder(base[1].tokenizer))
    assert dataset.token_rates() == {"ka": 1.5 * (len(dataset.tokens[0]) - 8) / 1.0, "en": 0.0}


def test_collator_pads_to_the_longest_and_masks_padding() -> None:
    rows = [(320, (1, 2, 3), (-100, 3, 9)), (640, (1, 2), (-100, 9))]
    items = [
        {"audio": torch.ones(n), "utterance": Utterance(f"u{n}", b"", "x", "s"), "label": EncodedLabel(ids, labels),
         "timed": False}
        for n, ids, labels in rows
    ]  # fmt: skip
    batch = DataCollator(end_token=9)(items)
    assert batch["audio"].shape == (2, 640)
    assert batch["audio"][0, 320:].abs().sum() == 0
    assert batch["audio_lengths"].tolist() == [320, 640]
    assert batch["decoder_input_ids"].tolist() == [[1, 2, 3], [1, 2, 9]]
    assert batch["labels"].tolist() == [[-100, 3, 9], [-100, 9, IGNORE_INDEX]]
    assert batch["ids"] == ["u320", "u640"]
    assert {"texts", "speakers", "durations", "meta"} < set(batch)


@pytest.mark.slow
def test_a_transcript_over_448_tokens_is_found_before_training(
    _tiny_en: tuple[Any, Any], sample: list[Utterance]
) -> None:
    clips = [replace(u, duration_sec=3.0) for u in sample[:9]]
    clips.append(replace(clips[0], id="too-long", text="word " * 500))
    with pytest.raises(DataError, match="too-long"):
        create_loader(clips, _tiny_en[1], Config())
    dataset = create_loader(clips, _tiny_en[1], load_config(None, overrides={"data.on_error": "skip"})).dataset
    assert len(dataset) == 9
    assert [row.id for row in dataset.skipped] == ["too-long"]


@pytest.mark.slow
def test_a_recording_that_breaks_later_or_was_not_checked_is_named(encoder: LabelEncoder) -> None:
    unchecked = [Utterance("u", b"", "text")]
    with pytest.raises(AudioError, match="utterance u"):
        WhisperDataset([replace(unchecked[0], duration_sec=1.0)], encoder)[0]
    with pytest.raises(DataError, match="utterance u"):
        WhisperDataset(unchecked, encoder)


# examples without speech


def slope(wave: np.ndarray) -> float:
    """Exponent with which the power falls from 100 Hz to 6 kHz."""
    hertz, power = welch(wave, 16_000, nperseg=2048)
    band = (hertz > 100) & (hertz < 6_000)
    return float(np.polyfit(np.log(hertz[band]), np.log(power[band]), 1)[0])


def test_kinds_levels_and_colours_are_those_promised() -> None:
    made = [NoSpeechAudio(7, f"no-speech-{i:04d}", 2.0).waveform() for i in range(200)]
    assert all(wave.dtype == np.float32 and len(wave) == 32_000 and np.isfinite(wave).all() for wave in made)
    noises = [wave for wave in made if wave.any()]
    assert 0.15 < 1 - len(noises) / len(made) < 0.35
    levels = [20 * np.log10(np.sqrt(np.mean(wave.astype(float) ** 2))) for wave in noises]
    assert -70.01 < min(levels) < -60 and -40 < max(levels) < -29.99
    slopes = [slope(wave) for wave in noises]
    assert -2.2 < min(slopes) < -1.7 and -0.3 < max(slopes) < 0.2
    assert max(np.abs(wave).max() for wave in noises) < 1


@pytest.mark.parametrize("duration_sec", [0.1, 30.0])
def test_seed_and_id_decide_every_sample_and_the_encoded_form_is_the_same(duration_sec: float) -> None:
    made = [NoSpeechAudio(7, f"x{i}", duration_sec) for i in range(9)]
    waves = [audio.waveform() for audio in made]
    assert len({wave.tobytes() for wave in waves if wave.any()}) == sum(bool(wave.any()) for wave in waves) > 3
    for audio, wave in zip(made, waves, strict=True):
        assert np.array_equal(audio.waveform(), wave)
        if wave.max() > 0.001:
            assert np.array_equal(load_audio(audio.read()), wave)


@pytest.mark.slow
def test_their_number_is_a_share_of_the_clips_their_text_is_empty(encoder: LabelEncoder) -> None:
    clips = [Utterance(f"u{i}", b"", "x", duration_sec=1.0 + i) for i in range(30)]
    made = make_no_speech(clips, fraction=0.2, seed=3)
    assert [u.id for u in made] == [f"no-speech-{n:04d}" for n in range(1, 7)]
    assert made == make_no_speech(clips, fraction=0.2, seed=3)
    assert len({u.duration_sec for u in made} & {u.duration_sec for u in clips}) > 2
    assert all(u.text == "" and u.speaker is None for u in made)
    assert make_no_speech(clips, fraction=0, seed=3) == []
    item = WhisperDataset(made, encoder)[0]
    assert item["label"] == EncodedLabel((50257, 50362), (IGNORE_INDEX, 50256))
    assert len(item["audio"]) == round((made[0].duration_sec or 0) * SAMPLE_RATE)
