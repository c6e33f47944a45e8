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

from src.data.dataset import DataCollator, ExamplePlanner, WhisperDataset
from src.data.labels import LabelEncoder
from src.data.loader import LengthBatchSampler, SpeechLoader, choose_workers, create_loader
from src.data.preparation import check_utterance
from src.data.utterance import Utterance
from src.utils.config import CompositionConfig, Config, load_config
from src.utils.errors import AudioError, CheckpointError
from src.utils.runtime import usable_cores
from tests.data.word_tokenizer import word_processor

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
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


def test_decoded_clips_are_cached_where_the_configuration_says(
    clips: list[Utterance], processor: Any, tmp_path: Path
) -> None:
    cached = settings(**{"data.cache_decoded": True, "paths.cache_dir": str(tmp_path)})
    plain = create_loader(clips, processor, settings())
    for _ in range(2):  # written, then read
        for batch, expected in zip(create_loader(clips, processor, cached), plain, strict=True):
            assert batch["ids"] == expected["ids"]
            assert float((batch["audio"] - expected["audio"]).abs().max()) <= 1.6e-5
    assert len(list((tmp_path / "audio").rglob("*.flac"))) == len(clips)


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
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert usable_cores() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert usable_cores() == 1


def test_the_choice_of_workers_is_logged_with_its_reason(
    clips: list[Utterance], processor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        create_loader(clips, processor, settings(), shuffle=True)
    assert "0 process(es) decode audio (the model computes on the same cores" in caplog.text
