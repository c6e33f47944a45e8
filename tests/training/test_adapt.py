from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.data.audio import SAMPLE_RATE
from src.data.dataset import decode_audio
from src.data.features import CONTEXT_SAMPLES, padded_samples
from src.data.utterance import Utterance
from src.training import adapt
from src.training.adapt import Clip, Target, Teacher, _batches, adapt_context, matching_losses, state_loss
from src.utils.config import Config
from src.utils.errors import AudioError, ConfigError, DataError, ModelError


def tone(seconds: float, hz: float = 220.0) -> np.ndarray:
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.1 * np.sin(2 * np.pi * hz * time)).astype(np.float32)


@pytest.fixture(scope="module")
def clips(sample: list[Utterance]) -> list[Utterance]:
    """Ten short ones of ten speakers."""
    by_speaker = {u.speaker: u for u in sorted(sample, key=lambda u: (-u.meta["duration"], u.id))}
    return sorted(by_speaker.values(), key=lambda u: (u.meta["duration"], u.id))[20:30]


@torch.no_grad()
def losses(model: Any, clips: list[Clip], targets: list[Target]) -> np.ndarray:
    """Mean losses of encoder and decoder at own length and half a second of pause."""
    each = []
    for clip, target in zip(clips, targets, strict=True):
        audio = torch.zeros(1, padded_samples(len(clip.audio) + SAMPLE_RATE // 2))
        audio[0, : len(clip.audio)] = clip.audio
        each.append([float(loss) for loss in matching_losses(model, audio, [target])])
    return np.mean(each, axis=0)


@pytest.mark.slow
def test_states_of_other_clips_come_nearer_to_those_at_30_s(
    tiny_en: tuple[Any, Any], clips: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_en
    monkeypatch.setattr(adapt, "CUT_SHARE", 0.0)
    held_out = [Clip(i, u.id, decode_audio(u)) for i, u in enumerate(clips[8:])]
    targets = Teacher(model, processor, Config(), keep=False).targets(held_out)
    keys, embedding = set(model.state_dict()), model.proj_out.weight.clone()
    model.audio_context = "dynamic"
    before = losses(model, held_out, targets)
    model.audio_context = "full"

    result = adapt_context(model, clips[:6], processor=processor, steps=10, batch_size=2)

    assert model.audio_context == "dynamic"
    assert (losses(model, held_out, targets) < 0.7 * before).all()
    assert (result.steps, len(result.losses), result.clips) == (10, 10, 6)
    assert set(model.state_dict()) == keys
    assert torch.equal(model.proj_out.weight, embedding)
    assert model.proj_out.weight.requires_grad


@pytest.mark.slow
def test_targets_are_over_the_real_audio_and_kept_while_there_is_room(
    tiny_en: tuple[Any, Any], jfk: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_en
    clip = Clip(0, "jfk", torch.from_numpy(jfk[: 2 * SAMPLE_RATE]))
    teacher = Teacher(model, processor, Config(), keep=True)
    (target,) = teacher.targets([clip])
    assert target.encoder.shape == (150, 384)  # 2 s and 1 s of pause, 50 per second
    assert target.encoder.dtype == torch.float16
    assert target.decoder.shape == (len(target.tokens), 384)
    assert processor.tokenizer.decode(target.tokens, skip_special_tokens=True).strip().startswith("And so")
    assert not target.encoder.requires_grad
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "_compute", None)
        assert teacher.targets([clip, clip]) == [target, target]
    monkeypatch.setattr(adapt, "TARGET_MEMORY_BYTES", 1000)
    capped = Config.model_validate({"inference": {"max_tokens_per_sec": 0.01}})  # 9 tokens: the transcript does not end
    teacher = Teacher(model, processor, capped, keep=True)
    (first,), (second,) = (teacher.targets([Clip(0, "jfk", torch.from_numpy(jfk))]) for _ in range(2))
    assert first is not second
    assert torch.equal(first.encoder, second.encoder)
    assert not first.is_finished
    assert processor.tokenizer.decode(first.tokens) == "<|startoftranscript|><|notimestamps|>"
    assert teacher.finished == {0: False}


def test_the_teacher_writes_each_clip_in_its_language(
    small: tuple[Any, Any], clips: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    decode = adapt.decode
    monkeypatch.setattr(
        adapt, "decode", lambda *args, languages, **options: asked.extend(languages) or decode(*args, **options)
    )
    audio = [replace(clips[0], language="deu"), decode_audio(clips[1]).numpy(), replace(clips[2], language="ckb")]
    adapt_context(small[0], audio, processor=small[1], steps=1, batch_size=3)
    assert sorted(asked, key=str) == [None, None, "de"]  # Whisper has no token for Sorani


def test_the_same_seed_gives_the_same_weights(small: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = small
    monkeypatch.setattr(adapt, "CUT_SHARE", 0.5)
    again = copy.deepcopy(model)
    audio = [tone(1.5), tone(2.0, hz=330.0)]
    options: dict[str, Any] = {"processor": processor, "steps": 2, "batch_size": 1}
    results = [adapt_context(each, audio, **options) for each in (model, again)]
    assert results[0].losses == results[1].losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_state_loss_is_0_for_equal_1_for_the_mean_and_reads_only_the_targets_lengths() -> None:
    states = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    targets = [states[0], states[1, :2]]
    mean = torch.cat(targets).mean(dim=0).expand_as(states)
    assert state_loss(states, targets) == 0
    assert state_loss(mean, targets) == pytest.approx(1.0)
    wild = states.clone()
    wild[1, 2:] = 1e6
    assert state_loss(wild, targets) == 0
    assert state_loss(states[:, :3], targets) == 0  # audio shorter than a target


def test_every_clip_comes_once_a_pass_its_cut_stays_the_same_and_30_s_of_long_ones_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapt, "CUT_SHARE", 0.5)
    audio = [tone(1.5 + 0.1 * number) for number in range(12)]
    batches = list(_batches(audio, steps=8, batch_size=3, seed=1))
    drawn = [clip for batch in batches for clip in batch]
    assert sorted(clip.index for clip in drawn[:12]) == list(range(12))
    assert sorted(clip.index for clip in drawn[12:]) == list(range(12))
    lengths = {(clip.index, len(clip.audio)) for clip in drawn}
    assert len(lengths) == 12
    cut = [samples for index, samples in lengths if samples < len(audio[index])]
    assert 0 < len(cut) < 12
    assert min(cut) >= SAMPLE_RATE
    monkeypatch.setattr(adapt, "CUT_SHARE", 0.0)
    ((clip,),) = _batches([tone(31.0)], steps=1, batch_size=1, seed=1)
    assert len(clip.audio) == CONTEXT_SAMPLES


def test_models_audio_and_numbers_that_cannot_be_used_are_refused(small: tuple[Any, Any]) -> None:
    model, processor = small
    with pytest.raises(DataError, match="no audio"):
        adapt_context(model, [], processor=processor)
    for wrong in ({"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"learning_rate": math.nan}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
            adapt_context(model, [tone(1.0)], processor=processor, **wrong)  # type: ignore[arg-type]
    model.audio_context = "dynamic"
    with pytest.raises(ModelError, match="dynamic"):
        adapt_context(model, [tone(1.0)], processor=processor)
    model.audio_context = "full"
    with pytest.raises(ModelError, match="float16"):
        adapt_context(model.half(), [tone(1.0)], processor=processor)


def test_bad_audio_is_named_and_the_model_stays_full(small: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = small
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    cases: list[tuple[Any, type[Exception], str]] = [
        (tmp_path / "broken.wav", AudioError, "broken.wav"),
        (Utterance("u-17", tmp_path / "absent.wav", "text"), AudioError, "u-17"),
        (np.full(16_000, np.nan, dtype=np.float32), AudioError, r"audio\[0\]"),
        (tone(1.0).reshape(2, -1), DataError, r"audio\[0\]"),
        (b"bytes", DataError, r"audio\[0\]: bytes"),
    ]
    for item, error, name in cases:
        with pytest.raises(error, match=name):
            adapt_context(model, [item], processor=processor, steps=1)
        assert model.audio_context == "full"


def test_a_loss_that_is_not_finite_names_its_clips(small: tuple[Any, Any], jfk: np.ndarray) -> None:
    model, processor = small
    with torch.no_grad():
        model.model.encoder.layer_norm.weight.fill_(float("inf"))
    with pytest.raises(DataError, match=r"audio\[0\]"):
        adapt_context(model, [jfk[:SAMPLE_RATE]], processor=processor, steps=1, batch_size=1)
    assert model.audio_context == "full"
    assert model.proj_out.weight.requires_grad
