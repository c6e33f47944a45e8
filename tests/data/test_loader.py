from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from src.data.dataset import DataCollator, ExamplePlanner, WhisperDataset
from src.data.labels import LabelEncoder
from src.data.loader import (
    LengthBatchSampler,
    Shard,
    SpeechLoader,
    batch_generator,
    choose_workers,
    create_loader,
    current_shard,
)
from src.data.preparation import check_utterance
from src.data.utterance import Utterance
from src.utils.config import CompositionConfig, Config, load_config
from src.utils.errors import AudioError, CheckpointError, DataError
from src.utils.runtime import usable_cores
from tests.data.word_tokenizer import word_processor

ROOT = Path(__file__).resolve().parents[2]
DURATIONS = st.lists(st.floats(0.1, 30), min_size=1, max_size=60)
COMPOSED = {
    "concatenate_prob": 0.5, "timestamp_prob": 0.5, "previous_text_prob": 0.5, "no_speech_fraction": 0.2,
    "max_concatenated_sec": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def clips(sample: list[Utterance]) -> list[Utterance]:
    return [check_utterance(u, Config().data) for u in sample[:14]]


@pytest.fixture(scope="module")
def processor() -> Any:
    return word_processor()


def settings(**overrides: Any) -> Config:
    return load_config(
        None, overrides={"device": "cpu", "training.batch_size": 2, "inference.batch_size": 4, **overrides}
    )


def with_audio(utterances: list[Utterance], processor: Any, load: Any, num_workers: int) -> SpeechLoader:
    """A loader that decodes with `load`, one clip a batch."""
    encoder = LabelEncoder(processor.tokenizer)
    dataset = WhisperDataset(utterances, encoder, load=load)
    planner = ExamplePlanner(
        utterances, [len(t) for t in dataset.tokens], prefix_tokens=2, config=CompositionConfig(), seed=0
    )
    sampler = LengthBatchSampler(planner.durations_sec, 1, shuffle=False, rank=0, world_size=1)
    return SpeechLoader(dataset, DataCollator(encoder.end_token), sampler, planner, num_workers=num_workers)


def ids(loader: Any) -> list[list[str]]:
    return [batch["ids"] for batch in loader]


def split(batches: list[list[str]]) -> list[str]:
    return sorted(name for batch in batches for joined in batch for name in joined.split("+"))


def first_error(loader: SpeechLoader) -> str:
    try:
        list(loader)
    except AudioError as err:  # not pytest.raises: it would hold the frame, and with it the workers, until a later test
        return str(err)
    raise AssertionError("no AudioError")


def test_training_batches_are_composed_of_every_clip_once(clips: list[Utterance], processor: Any) -> None:
    loader = create_loader(clips, processor, settings(composition=COMPOSED), shuffle=True)
    batches = list(loader)
    everything = sorted([*(u.id for u in clips), "no-speech-0001", "no-speech-0002", "no-speech-0003"])
    assert split([b["ids"] for b in batches]) == everything
    assert len(loader) == len(batches)
    joined = [name for b in batches for name in b["ids"] if "+" in name]
    assert joined
    assert {bool(t) for b in batches for t in b["timed"]} == {True, False}
    for batch in batches:
        for row, length in enumerate(batch["audio_lengths"]):
            assert batch["durations"][row] == int(length) / 16_000
            assert not batch["audio"][row, length:].any()
    loader.set_epoch(1)
    assert split(ids(loader)) == everything
    assert len(loader) == loader.batches_in(1)


def test_evaluation_batches_are_never_composed(clips: list[Utterance], processor: Any) -> None:
    loader = create_loader(clips, processor, settings(composition=COMPOSED))
    first = list(loader)
    assert [len(b["ids"]) for b in first] == [4, 4, 4, 2]
    assert split([b["ids"] for b in first]) == sorted(u.id for u in clips)
    assert not any(b["timed"].any() for b in first)
    assert ids(loader) == [b["ids"] for b in first]  # again from the start, also after a pass that was left
    next(iter(loader))
    assert ids(loader) == [b["ids"] for b in first]


def test_a_budget_counts_30_s_a_clip_where_every_clip_is_padded_to_it(clips: list[Utterance], processor: Any) -> None:
    budget: dict[str, Any] = {"training.batch_seconds": 95}
    full = create_loader(clips, processor, settings(**{"model.audio_context": "full"}, **budget), shuffle=True)
    assert max(map(len, full.batch_sampler)) == 3
    own = create_loader(clips, processor, settings(**budget), shuffle=True)
    assert max(map(len, own.batch_sampler)) > 10


def test_a_budget_that_full_context_batches_exceed_is_said(
    clips: list[Utterance], processor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    create_loader(clips, processor, settings(**{"training.batch_seconds": 60}), shuffle=True)
    assert "full_context_prob" not in caplog.text
    overrides = {"training.batch_seconds": 60, "training.full_context_prob": 0.1}
    create_loader(clips, processor, settings(**overrides), shuffle=True)
    assert "training.full_context_prob pads" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("composition", [{}, COMPOSED])
def test_a_run_stopped_at_any_batch_goes_on_with_the_next(
    clips: list[Utterance], processor: Any, workers: int, composition: dict[str, float]
) -> None:
    config = settings(composition=composition)
    straight = create_loader(clips, processor, config, shuffle=True)
    straight.set_epoch(3)
    whole = ids(straight)
    worked = settings(composition=composition, **{"data.num_workers": workers})
    stopped = create_loader(clips, processor, worked, shuffle=True)
    resumed = create_loader(clips, processor, worked, shuffle=True)
    for at in range(len(whole) + 1):
        stopped.set_epoch(2)
        stopped.set_epoch(3)
        iterator = iter(stopped)
        assert [next(iterator)["ids"] for _ in range(at)] == whole[:at]
        state = json.loads(json.dumps(stopped.state_dict()))
        assert state["batches"] == at  # handed over, whatever waits in a worker
        resumed.load_state_dict(state)
        resumed.set_epoch(3)  # as the trainer does
        assert resumed.start == at
        assert ids(resumed) == whole[at:]
        assert len(resumed) == len(whole)
        resumed.set_epoch(4)
        assert resumed.start == 0


def test_a_state_of_other_data_or_settings_is_refused_by_name(clips: list[Utterance], processor: Any) -> None:
    state = create_loader(clips, processor, settings(), shuffle=True).state_dict()

    def refused(utterances: list[Utterance], **overrides: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            create_loader(utterances, processor, settings(**overrides), shuffle=True).load_state_dict(state)
        return str(caught.value)

    assert "seed: 42 then, 7 now" in refused(clips, seed=7)
    assert "batch_size: 2 then, 4 now" in refused(clips, **{"training.batch_size": 4})
    assert "batch_seconds: None then, 60.0 now" in refused(clips, **{"training.batch_seconds": 60})
    assert "composition: " in refused(clips, composition={"timestamp_prob": 0.5})
    assert "utterances: 14 (" in refused(clips[:13])
    renamed = [replace(clips[0], id="other"), *clips[1:]]
    assert "utterances: 14 (" in refused(renamed)
    with pytest.raises(CheckpointError, match="not the state of a loader"):
        create_loader(clips, processor, settings()).load_state_dict({"epoch": 1})


def test_a_state_of_another_number_of_processes_is_refused(
    clips: list[Utterance], processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = create_loader(clips, processor, settings(), shuffle=True).state_dict()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CheckpointError, match="world_size: 1 then, 2 now"):
        create_loader(clips, processor, settings(), shuffle=True).load_state_dict(state)


PROCESS = """
import json, sys
from src.data.preparation import check_utterance
from src.data.loader import create_loader
from src.data.sources.catalog import load_utterances
from src.utils.config import load_config
from tests.data.word_tokenizer import word_processor
task = json.load(sys.stdin)
config = load_config(None, overrides=task["overrides"])
clips = [check_utterance(u, config.data) for u in load_utterances(config.data)[:14]]
loader = create_loader(clips, word_processor(), config, shuffle=True)
loader.load_state_dict(task["state"])
print(json.dumps([batch["ids"] for batch in loader]))
"""


@pytest.mark.slow
def test_two_processes_share_an_epoch_and_go_on_after_a_restart(
    clips: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {"device": "cpu", "training.batch_size": 2, "composition": COMPOSED, "data.num_workers": 1}
    before, restarted = [], []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        loader = create_loader(clips, word_processor(), load_config(None, overrides=overrides), shuffle=True)
        loader.set_epoch(1)
        before.append([batch["ids"] for batch in itertools.islice(loader, 2)])
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps({"overrides": overrides, "state": loader.state_dict()}))
        process.stdin.close()
        restarted.append(process)
    after = [json.loads(process.stdout.read()) for process in restarted if process.stdout is not None]
    assert [process.wait() for process in restarted] == [0, 0]
    shares = [[*a, *b] for a, b in zip(before, after, strict=True)]
    assert len(before[0]) == 2
    assert len(shares[0]) == len(shares[1])
    first, second = (set(split(share)) for share in shares)
    assert first & second == set()
    assert len(split(shares[0])) + len(split(shares[1])) == len(first | second) == 14 + 3


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_recording_that_cannot_be_decoded_is_named_without_a_workers_traceback(
    clips: list[Utterance], processor: Any, tmp_path: Path, workers: int
) -> None:
    lost = replace(clips[0], id="lost", audio=tmp_path / "lost.wav")
    config = settings(**{"data.num_workers": workers})
    loader = create_loader([*clips[1:5], lost], processor, config, shuffle=True)
    for _ in range(2):  # the workers are still there
        message = first_error(loader)
        assert message.startswith(f"utterance lost: {tmp_path}/lost.wav: no such file")
        assert "Traceback" not in message


@pytest.mark.slow
def test_workers_compute_on_one_thread_and_leave_interrupts_to_the_parent(
    clips: list[Utterance], processor: Any
) -> None:
    def look(source: Any, *, name: str) -> np.ndarray:
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return np.array([torch.get_num_threads(), ignored, os.getpid()], dtype=np.float64)

    rows = np.concatenate([b["audio"].numpy() for b in with_audio(clips[:6], processor, look, num_workers=2)])
    assert rows[:, 0].tolist() == [1] * 6
    assert rows[:, 1].tolist() == [1] * 6
    assert len(set(rows[:, 2])) == 2
    assert os.getpid() not in rows[:, 2]


def test_iterating_takes_nothing_from_the_global_generator(clips: list[Utterance], processor: Any) -> None:
    loader = create_loader(clips, processor, settings(), shuffle=True)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    yield


@pytest.mark.usefixtures("two_cores")
def test_workers_go_by_the_usable_cores_and_by_where_the_model_computes() -> None:
    assert usable_cores() == 2
    assert choose_workers("auto", on_cuda=True)[0] == 2
    assert choose_workers("auto", on_cuda=True, cores=64)[0] == 8
    assert choose_workers("auto", on_cuda=False)[0] == 0
    assert choose_workers(3, on_cuda=False)[0] == 3
    assert "2 usable" in choose_workers("auto", on_cuda=True)[1]


@pytest.mark.usefixtures("two_cores")
def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for processes in ("2", "8"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert usable_cores() == 1


# which clips make a batch, in which order, in which process


def padding_share(durations: list[float], batches: list[list[int]]) -> float:
    padded = sum(max(durations[i] for i in batch) * len(batch) for batch in batches)
    return 1 - sum(durations) / padded


@pytest.fixture
def durations() -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return (1 + 14 * torch.rand(203, generator=generator)).tolist()


def alone(durations: list[float], batch_size: int | None = None, **options: object) -> LengthBatchSampler:
    return LengthBatchSampler(durations, batch_size, rank=0, world_size=1, **options)  # type: ignore[arg-type]


def test_batches_of_similar_length_waste_little(durations: list[float]) -> None:
    sampler = LengthBatchSampler(durations, 8, shuffle=True, seed=1)
    unsorted = [list(range(at, min(at + 8, 203))) for at in range(0, 203, 8)]
    assert padding_share(durations, list(sampler)) < 0.12 < padding_share(durations, unsorted)


def test_a_budget_wastes_little_and_fills_its_batches(durations: list[float]) -> None:
    batches = list(alone(durations, batch_seconds=120, shuffle=True, seed=1))
    assert padding_share(durations, batches) < 0.12
    filled = [len(batch) * max(durations[i] for i in batch) for batch in batches]
    assert sum(filled) / len(filled) > 0.8 * 120
    assert len({len(batch) for batch in batches}) > 3  # many short clips or few long ones


def test_evaluation_goes_from_long_to_short(durations: list[float]) -> None:
    order = [i for batch in alone(durations, 8, shuffle=False) for i in batch]
    assert [durations[i] for i in order] == sorted(durations, reverse=True)


def test_the_order_is_that_of_earlier_versions() -> None:  # else a run of theirs would resume in another one
    durations = [float(1 + 7 * i % 11) for i in range(60)]
    sampler = LengthBatchSampler(durations, 3, shuffle=True, seed=42)
    sampler.set_epoch(1)
    assert list(sampler)[:5] == [[31, 50, 39], [16, 38, 49], [5, 24, 35], [21, 54, 43], [26, 4, 15]]


@effort(max_examples=150, deadline=None)
@given(DURATIONS, st.floats(5, 200), st.booleans(), st.integers(0, 3))
def test_a_budget_is_never_exceeded_but_by_a_clip_alone(
    durations: list[float], budget: float, shuffle: bool, epoch: int
) -> None:
    batches = alone(durations, batch_seconds=budget, shuffle=shuffle).batches(epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(durations)))
    assert all(len(b) == 1 or len(b) * max(durations[i] for i in b) <= budget for b in batches)


@effort(max_examples=200, deadline=None)
@given(DURATIONS, st.one_of(st.integers(1, 9), st.floats(5, 200)), st.integers(1, 7), st.integers(0, 3))
def test_processes_share_out_an_epoch(durations: list[float], limit: int | float, world_size: int, epoch: int) -> None:
    size = limit if isinstance(limit, int) else None
    budget = None if isinstance(limit, int) else limit

    def batches(rank: int, world_size: int) -> list[list[int]]:
        sampler = LengthBatchSampler(
            durations, size, batch_seconds=budget, shuffle=True, seed=3, rank=rank, world_size=world_size
        )
        assert sampler.batches(epoch) == sampler._plan(epoch)
        return sampler.batches(epoch)

    whole = len(batches(0, 1))
    if len(durations) < -(-whole // world_size) * world_size:  # a batch for every process at every step is impossible
        with pytest.raises(DataError, match=f"cannot be shared out to {world_size} processes"):
            batches(0, world_size)
        return
    shares = [batches(rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(durations)))
    assert all(batch for share in shares for batch in share)
    for batch in (b for share in shares for b in share):
        if budget is not None:
            assert len(batch) == 1 or len(batch) * max(durations[i] for i in batch) <= budget
        else:
            assert size is not None and len(batch) <= size


@given(DURATIONS, st.integers(1, 9), st.integers(1, 7))
def test_evaluation_deals_out_the_batches_of_one_process(durations: list[float], size: int, world_size: int) -> None:
    shares = [
        LengthBatchSampler(durations, size, shuffle=False, rank=rank, world_size=world_size).batches(0)
        for rank in range(world_size)
    ]
    dealt = [shares[at % world_size][at // world_size] for at in range(sum(map(len, shares)))]
    assert dealt == alone(durations, size, shuffle=False).batches(0)


def test_the_batches_of_a_step_are_of_similar_length(durations: list[float]) -> None:
    shares = [list(LengthBatchSampler(durations, 8, shuffle=True, seed=1, rank=r, world_size=4)) for r in range(4)]
    waits = []
    for step in zip(*shares, strict=True):
        longest = [max(durations[i] for i in batch) for batch in step]
        waits.append(max(longest) / min(longest))
    assert sum(waits) / len(waits) < 1.5
    assert (
        len({max(durations[i] for i in batch) > 8 for batch in shares[0][:10]}) == 2
    )  # short and long steps are mixed


def test_a_duration_that_is_not_above_zero_is_refused() -> None:
    for wrong in (float("nan"), 0.0, float("inf")):
        with pytest.raises(DataError, match="clip 1"):
            list(alone([1.0, wrong], 2, shuffle=True))


def test_a_size_and_a_budget_contradict() -> None:
    with pytest.raises(DataError, match="a size or a budget"):
        alone([1.0], 2, batch_seconds=10.0, shuffle=True)
    with pytest.raises(DataError, match="a size or a budget"):
        alone([1.0], shuffle=True)


def test_the_place_among_processes_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert current_shard() == Shard(0, 1)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(DataError, match="WORLD_SIZE None"):
        current_shard()
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert current_shard() == Shard(2, 3)
    assert LengthBatchSampler([1.0, 2.0, 3.0], 1, shuffle=False).shard == Shard(2, 3)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(DataError, match="rank 3 of 3"):
        current_shard()


def test_the_place_among_processes_comes_from_torch_where_it_is_initialised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert current_shard() == Shard(0, 1)
    finally:
        torch.distributed.destroy_process_group()
    assert current_shard() == Shard(1, 2)


def test_a_batchs_generator_depends_on_seed_epoch_and_index_alone() -> None:
    def draw(*key: int) -> float:
        return float(torch.rand(1, generator=batch_generator(*key)))

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(s, e, i) for s in (0, 1) for e in (0, 1, 2) for i in range(20)}) == 120
