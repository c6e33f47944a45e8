from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from src.data import LengthBatchSampler, SpeechLoader, create_loader
from src.data.loader import batch_generator, choose_workers, current_shard, settle_audio_context
from src.data.preparation import check_utterance
from src.data.utterance import Utterance
from src.utils.config import Config, load_config
from src.utils.errors import AudioError, CheckpointError, DataError
from src.utils.runtime import usable_cores
from tests.data.word_tokenizer import word_processor

ANY_DURATIONS = st.lists(st.floats(0.1, 30), min_size=1, max_size=60)
LIMITS = st.one_of(st.integers(1, 9), st.floats(5, 200))
COMPOSED = {
    "concatenate_prob": 0.5, "timestamp_prob": 0.5, "previous_text_prob": 0.5, "no_speech_fraction": 0.2,
    "max_concatenated_sec": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def clips(sample: list[Utterance]) -> list[Utterance]:
    return [check_utterance(u, Config().data) for u in sample[:14]]


def settings(**overrides: Any) -> Config:
    return load_config(
        None, overrides={"device": "cpu", "training.batch_size": 2, "inference.batch_size": 4, **overrides}
    )


def in_training(clips: list[Utterance], **overrides: Any) -> SpeechLoader:
    return create_loader(clips, word_processor(), settings(**overrides), shuffle=True)


def ids(loader: Any) -> list[list[str]]:
    return [batch["ids"] for batch in loader]


def split(batches: list[list[str]]) -> list[str]:
    return sorted(name for batch in batches for joined in batch for name in joined.split("+"))


def test_training_batches_are_composed_of_every_clip_once(clips: list[Utterance]) -> None:
    loader = in_training(clips, composition=COMPOSED)
    global_state = torch.get_rng_state()
    batches = list(loader)
    assert torch.equal(global_state, torch.get_rng_state())
    everything = sorted([*(u.id for u in clips), "no-speech-0001", "no-speech-0002", "no-speech-0003"])
    assert split([b["ids"] for b in batches]) == everything
    assert len(loader) == len(batches)
    assert any("+" in name for b in batches for name in b["ids"])
    assert {bool(t) for b in batches for t in b["timed"]} == {True, False}
    for batch in batches:
        for row, length in enumerate(batch["audio_lengths"]):
            assert batch["durations"][row] == int(length) / 16_000
            assert not batch["audio"][row, length:].any()
    loader.set_epoch(1)
    assert split(ids(loader)) == everything
    assert len(loader) == loader.batches_in(1)


def test_other_columns_come_as_they_are(clips: list[Utterance]) -> None:
    row = {"age": np.float64(31), "words": np.int64(3)}  # of a table of pandas
    [batch] = create_loader([replace(clips[0], meta=row)], word_processor(), settings())
    assert {name: type(batch["meta"][0][name]) for name in row} == {"age": np.float64, "words": np.int64}


def test_evaluation_batches_are_never_composed(clips: list[Utterance]) -> None:
    loader = create_loader(clips, word_processor(), settings(composition=COMPOSED))
    first = list(loader)
    assert [len(b["ids"]) for b in first] == [4, 4, 4, 2]
    assert split([b["ids"] for b in first]) == sorted(u.id for u in clips)
    assert not any(b["timed"].any() for b in first)
    next(iter(loader))  # a pass that is left
    assert ids(loader) == [b["ids"] for b in first]


def test_a_budget_counts_30_s_a_clip_where_every_clip_is_padded_to_it(
    clips: list[Utterance],
) -> None:
    budget: dict[str, Any] = {"training.batch_seconds": 95}
    assert max(map(len, in_training(clips, **{"model.audio_context": "full"}, **budget).batch_sampler)) == 3
    assert max(map(len, in_training(clips, **budget).batch_sampler)) > 10


def test_a_budget_is_that_of_so_many_clips_of_mean_length(clips: list[Utterance]) -> None:
    asked: dict[str, Any] = {"training.batch_size": 4, "training.batch_seconds": "auto"}
    mean_sec = sum(clip.duration_sec or 0.0 for clip in clips) / len(clips)
    sampler = in_training(clips, **asked).batch_sampler
    assert (sampler.batch_size, sampler.batch_seconds) == (None, pytest.approx(4 * mean_sec, abs=0.1))
    padded = in_training(clips, **asked, **{"model.audio_context": "full"}).batch_sampler  # all clips take as long
    assert (padded.batch_size, padded.batch_seconds) == (4, None)


def test_little_speech_is_padded_to_30_s_but_for_a_model_that_knows_its_own_length(clips: list[Utterance]) -> None:
    config = settings(**{"model.audio_context": "auto"})
    much = [replace(clips[0], duration_sec=30.0)] * 30
    found = [settle_audio_context(config, *given) for given in ((much,), (much[1:],), (much[1:], "dynamic"))]
    assert [context for _, context in found] == ["dynamic", "full", "dynamic"]
    assert [each.model.audio_context for each, _ in found] == ["dynamic", "full", "dynamic"]
    asked = settings(**{"model.audio_context": "dynamic"})
    assert settle_audio_context(asked, much[1:]) == (asked, "dynamic")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "composition", "processes"), [(0, COMPOSED, "1"), (2, {}, "1"), (2, COMPOSED, "2")]
)
def test_a_run_stopped_at_any_batch_goes_on_with_the_next(
    clips: list[Utterance], workers: int, composition: dict[str, float], processes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    monkeypatch.setenv("WORLD_SIZE", processes)
    for rank in range(int(processes)):
        monkeypatch.setenv("RANK", str(rank))
        straight = in_training(clips, composition=composition)
        options = {"composition": composition, "data.num_workers": workers}
        stopped, resumed = in_training(clips, **options), in_training(clips, **options)
        straight.set_epoch(3)
        whole = ids(straight)
        shares.append(whole)
        for at in range(len(whole) + 1):
            stopped.set_epoch(2)
            stopped.set_epoch(3)
            iterator = iter(stopped)
            assert [next(iterator)["ids"] for _ in range(at)] == whole[:at]
            state = json.loads(json.dumps(stopped.state_dict()))
            assert state["batches"] == at  # handed over, whatever waits in a worker
            resumed.load_state_dict(state)
            resumed.set_epoch(3)  # as the trainer does
            assert ids(resumed) == whole[at:]
            assert len(resumed) == len(whole)
    shared = split([batch for share in shares for batch in share])
    assert len(shared) == len(set(shared)) == len(clips) + 3 * bool(composition)
    assert len({len(share) for share in shares}) == 1


def test_a_state_of_other_data_settings_or_processes_is_refused(
    clips: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = in_training(clips).state_dict()

    def refused(utterances: list[Utterance], words: str, **overrides: Any) -> None:
        with pytest.raises(CheckpointError, match=words):
            in_training(utterances, **overrides).load_state_dict(state)

    refused(clips, "seed: 42 .*7", seed=7)
    refused(clips, "batch_size: 2 .*4", **{"training.batch_size": 4})
    refused(clips, r"batch_seconds: None .*60\.0", **{"training.batch_seconds": 60})
    refused(clips, "composition: ", composition={"timestamp_prob": 0.5})
    refused(clips[:13], "utterances: 14")
    refused([replace(clips[0], id="other"), *clips[1:]], "utterances: 14")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(clips, "world_size: 1 .*2")
    with pytest.raises(CheckpointError):
        in_training(clips).load_state_dict({"epoch": 1})


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_recording_that_cannot_be_decoded_is_named_without_a_workers_traceback(
    clips: list[Utterance], tmp_path: Path, workers: int
) -> None:
    lost = replace(clips[0], id="lost", audio=tmp_path / "lost.wav")
    loader = in_training([*clips[1:5], lost], **{"data.num_workers": workers})
    for _ in range(2):  # the workers are still there
        message = ""
        try:
            list(loader)
        except AudioError as err:  # not pytest.raises: it would hold the frame, and with it the workers
            message = str(err)
        assert message.startswith(f"utterance lost: {tmp_path}/lost.wav: ")
        assert "Traceback" not in message


@pytest.mark.slow
def test_workers_compute_on_one_thread_and_leave_interrupts_to_the_parent(
    clips: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(source: Any, *, name: str) -> np.ndarray:
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return np.array([torch.get_num_threads(), ignored, os.getpid()], dtype=np.float64)

    monkeypatch.setattr("src.data.loader.load_audio", look)
    loader = in_training(clips[:6], **{"training.batch_size": 1, "data.num_workers": 2})
    rows = np.concatenate([b["audio"].numpy() for b in loader])
    assert rows[:, :2].tolist() == [[1, 1]] * 6
    assert len(set(rows[:, 2])) == 2
    assert os.getpid() not in rows[:, 2]


def test_workers_go_by_the_usable_cores_and_by_where_the_model_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert usable_cores() == 2
    assert choose_workers("auto", on_cuda=True)[0] == 2
    assert choose_workers("auto", on_cuda=False)[0] == 0
    assert choose_workers(3, on_cuda=False)[0] == 3
    for processes in ("2", "8"):  # of one machine, which share its cores
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert usable_cores() == 1


# which clips make a batch, in which order, in which process


DURATIONS = (1 + 14 * torch.rand(203, generator=torch.Generator().manual_seed(0))).tolist()


def sampled(durations: list[float], limit: float, **options: Any) -> LengthBatchSampler:
    """Whole numbers limit the clips of a batch, others its seconds."""
    limits: dict[str, Any] = {"batch_size" if isinstance(limit, int) else "batch_seconds": limit}
    return LengthBatchSampler(durations, **limits, **{"seed": 1, "rank": 0, "world_size": 1, **options})


def seconds(batch: list[int], durations: list[float] = DURATIONS) -> float:
    return len(batch) * max(durations[i] for i in batch)


def keeps(durations: list[float], batch: list[int], limit: float) -> bool:
    if isinstance(limit, int):
        return 1 <= len(batch) <= limit
    return len(batch) == 1 or seconds(batch, durations) <= limit


@pytest.mark.parametrize("limit", [8, 120.0])
def test_batches_of_similar_length_waste_little(limit: float) -> None:
    batches = list(sampled(DURATIONS, limit, shuffle=True))
    padded = [seconds(batch) for batch in batches]
    unsorted = sum(seconds(list(range(at, min(at + 8, 203)))) for at in range(0, 203, 8))
    assert sum(padded) < sum(DURATIONS) / 0.88 < unsorted
    if limit == 120.0:
        assert sum(padded) / len(padded) > 0.8 * limit
        assert len({len(batch) for batch in batches}) > 3  # many short clips or few long ones


def test_evaluation_goes_from_long_to_short() -> None:
    order = [i for batch in sampled(DURATIONS, 8, shuffle=False) for i in batch]
    assert [DURATIONS[i] for i in order] == sorted(DURATIONS, reverse=True)


def test_the_order_is_that_of_earlier_versions() -> None:  # else a run of theirs would resume in another one
    sampler = sampled([float(1 + 7 * i % 11) for i in range(60)], 3, shuffle=True, seed=42)
    sampler.set_epoch(1)
    assert list(sampler)[:5] == [[31, 50, 39], [16, 38, 49], [5, 24, 35], [21, 54, 43], [26, 4, 15]]


@effort(max_examples=200, deadline=None)
@given(ANY_DURATIONS, LIMITS, st.integers(1, 7), st.integers(0, 3))
def test_processes_share_out_an_epoch(durations: list[float], limit: float, world_size: int, epoch: int) -> None:
    def batches(rank: int, world_size: int) -> list[list[int]]:
        planned = sampled(durations, limit, shuffle=True, rank=rank, world_size=world_size).batches(epoch)
        return [batch.tolist() for batch in planned]

    whole = batches(0, 1)
    if len(durations) < -(-len(whole) // world_size) * world_size:  # too few for every step
        with pytest.raises(DataError, match=f" {world_size} processes"):
            batches(0, world_size)
        return
    shares = [batches(rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    for dealt in (whole, [batch for share in shares for batch in share]):
        assert sorted(i for batch in dealt for i in batch) == list(range(len(durations)))
        assert all(keeps(durations, batch, limit) for batch in dealt)


@given(ANY_DURATIONS, LIMITS, st.integers(1, 7))
def test_evaluation_deals_out_the_batches_of_one_process(durations: list[float], limit: float, world_size: int) -> None:
    ranks = range(world_size)
    shares = [sampled(durations, limit, shuffle=False, rank=r, world_size=world_size).batches(0) for r in ranks]
    dealt = [shares[at % world_size][at // world_size] for at in range(sum(map(len, shares)))]
    assert dealt == sampled(durations, limit, shuffle=False).batches(0)
    assert all(keeps(durations, batch, limit) for batch in dealt)


def test_the_batches_of_a_step_are_of_similar_length() -> None:
    shares = [list(sampled(DURATIONS, 8, shuffle=True, rank=rank, world_size=4)) for rank in range(4)]
    steps = [[max(DURATIONS[i] for i in batch) for batch in step] for step in zip(*shares, strict=True)]
    assert np.mean([max(longest) / min(longest) for longest in steps]) < 1.5
    assert {longest[0] > 8 for longest in steps[:10]} == {True, False}  # short and long steps are mixed


@pytest.mark.parametrize("limits", [{}, {"batch_size": 2, "batch_seconds": 10.0}])
def test_a_size_and_a_budget_contradict(limits: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        LengthBatchSampler([1.0], **limits, shuffle=True)


def test_the_place_among_processes_comes_from_torch_or_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert current_shard() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    for other in (None, "2", "many"):
        if other:
            monkeypatch.setenv("WORLD_SIZE", other)
        with pytest.raises(DataError, match="WORLD_SIZE"):
            current_shard()
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert current_shard() == (2, 3)
    sampler = LengthBatchSampler([1.0, 2.0, 3.0], 1, shuffle=False)
    assert (sampler.rank, sampler.world_size) == (2, 3)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert current_shard() == (0, 1)
    finally:
        torch.distributed.destroy_process_group()


def test_a_batchs_generator_depends_on_seed_epoch_and_index_alone() -> None:
    def draw(*key: int) -> float:
        return float(torch.rand(1, generator=batch_generator(*key)))

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(s, e, i) for s in (0, 1) for e in (0, 1, 2) for i in range(20)}) == 120
