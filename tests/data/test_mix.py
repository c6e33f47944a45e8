"""Several sources as one training set, and general speech among it: small parts of the bundled speech."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile as sf

from src.data import SpeechLoader, build_data_report, create_loader
from src.data.audio import load_audio
from src.data.dataset import ExamplePlanner
from src.data.labels import LabelStyle, letters_of, source_text
from src.data.preparation import DatasetSplits, prepare_datasets, source_weights
from src.data.report.report import DataReport
from src.data.sources import hub
from src.data.sources.catalog import load_utterances
from src.data.utterance import Utterance
from src.evaluation import ModelEvaluator
from src.evaluation.slices import slice_columns, slice_rates
from src.utils.config import CompositionConfig, Config, load_config
from src.utils.errors import CheckpointError, ConfigError, DataError, SourceUnavailableError
from tests.data.hub_layout import write_librispeech, write_minds14
from tests.data.word_tokenizer import word_processor


def write(folder: Path, clips: Sequence[Utterance], **columns: Sequence[str]) -> dict[str, Any]:
    """Write a folder source; return its settings."""
    folder.mkdir(parents=True)
    lines = [",".join(["file_name", "text", "speaker", *columns])]
    for place, clip in enumerate(clips):
        sf.write(folder / f"{clip.id}.wav", load_audio(clip.audio), 16_000)
        row = [f"{clip.id}.wav", clip.text, str(clip.speaker), *(column[place] for column in columns.values())]
        lines.append(",".join(row))
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return {"source": "folder", "path": str(folder)}


def mixed(*sources: dict[str, Any], **other: Any) -> Config:
    return load_config(None, overrides={"data": {"mix": list(sources), "num_workers": 0}, **other})


def names(clips: Sequence[Utterance]) -> Counter[str]:
    return Counter(str(clip.meta.get("source")) for clip in clips)


@pytest.fixture(scope="module")
def by_speaker(sample: list[Utterance]) -> list[list[Utterance]]:
    """Four clips of each speaker that has as many."""
    clips: dict[str | None, list[Utterance]] = {}
    for utterance in sample:
        clips.setdefault(utterance.speaker, []).append(replace(utterance, meta={}))
    return [part[:4] for part in clips.values() if len(part) >= 4]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, by_speaker: list[list[Utterance]]) -> tuple[dict[str, Any], ...]:
    """Six speakers in capitals, and seven as sentences, one of which is in both."""
    first = [clip for part in by_speaker[:6] for clip in part]
    second = [replace(clip, text=f"{clip.text.capitalize()}.") for part in by_speaker[5:12] for clip in part]
    root = tmp_path_factory.mktemp("two")
    return write(root / "loud", first), write(root / "quiet", second)


@pytest.fixture(scope="module")
def splits(two: tuple[dict[str, Any], ...]) -> DatasetSplits:
    return prepare_datasets(mixed(*two))


def test_two_sources_are_one_set_with_their_names_and_disjoint_speakers(splits: DatasetSplits) -> None:
    assert splits.source == "loud + quiet"
    assert names(splits.utterances) == {"loud": 24, "quiet": 28}
    assert all(set(names(part)) == {"loud", "quiet"} for part in splits.parts.values())
    assert all(clip.id.startswith(f"{clip.meta['source']}/") for clip in splits.utterances)
    assert len({clip.id for clip in splits.utterances}) == 52  # four clips are in both
    assert splits.shared_speakers == ()
    assert set(splits.stats) == {clip.id for clip in splits.utterances}


def test_each_source_is_recased_by_itself(splits: DatasetSplits) -> None:
    for clip in splits.utterances:
        text = source_text(clip)
        assert clip.text == (f"{text.capitalize()}." if clip.meta["source"] == "loud" else text).replace(" i ", " I ")
    assert splits.label_case == "auto"
    lower = splits.with_label_case({("loud", None): LabelStyle("lower")})
    assert all(clip.text.islower() == (clip.meta["source"] == "loud") for clip in lower.train)
    assert all(clip.text.islower() for clip in splits.with_label_case("lower").train)


def test_a_source_keeps_the_case_that_was_asked_for(two: tuple[dict[str, Any], ...]) -> None:
    found = prepare_datasets(mixed(two[0] | {"label_case": "lower"}, two[1] | {"max_train": 3, "max_test": 1}))
    assert all(clip.text.islower() == (clip.meta["source"] == "loud") for clip in found.with_label_case("auto").train)
    assert names(found.train)["quiet"] == 3
    assert names(found.test)["quiet"] == 1


def test_the_whole_has_a_cap_too_and_the_rest_of_data_is_for_each_source(two: tuple[dict[str, Any], ...]) -> None:
    config = mixed(*two, **{"data.max_train": 10, "data.validation_fraction": 0.4, "data.min_duration_sec": 0.5})
    found, again = prepare_datasets(config), prepare_datasets(config)
    assert len(found.train) == 10
    assert found.train == again.train
    assert names(found.validation)["loud"] >= 8
    assert [each.min_duration_sec for each in config.data.mix] == [0.5, 0.5]
    assert load_config(None, overrides={"data": config.data.model_dump(mode="json")}).data == config.data


def test_speakers_of_a_given_test_are_left_out_of_the_training_of_other_sources(
    tmp_path: Path, by_speaker: list[list[Utterance]], caplog: pytest.LogCaptureFixture
) -> None:
    clips = [clip for part in by_speaker[:4] for clip in part]
    given = write(tmp_path / "a", clips, split=["test"] * 4 + ["validation"] * 4 + ["train"] * 8)
    other = write(tmp_path / "b", clips[:4] + clips[8:12], split=["train"] * 4 + ["test"] * 4)  # the other way round
    found = prepare_datasets(mixed(given, other))
    assert found.shared_speakers == ()
    assert [names(part) for part in found.parts.values()] == [{"a": 4}, {"a": 4}, {"a": 4, "b": 4}]
    assert "left out" in caplog.text
    free = write(tmp_path / "c", clips[:12])  # its speakers follow those of a
    found = prepare_datasets(mixed(given, free))
    assert {clip.speaker for clip in found.test} == {clips[0].speaker}
    assert names(found.test) == {"a": 4, "c": 4}


def test_one_voice_may_be_one_of_the_sources(tmp_path: Path, by_speaker: list[list[Utterance]]) -> None:
    own = write(tmp_path / "own", by_speaker[0])
    others = write(tmp_path / "others", [clip for part in by_speaker[1:5] for clip in part])
    found = prepare_datasets(mixed(own, others))
    assert names(found.train)["own"] == 4
    with pytest.raises(DataError, match="no source has the speakers for a test split"):
        prepare_datasets(mixed(own))


def test_languages_are_those_of_the_rows(tmp_path: Path, by_speaker: list[list[Utterance]]) -> None:
    german = write(tmp_path / "de", [c for p in by_speaker[:3] for c in p], language=["de"] * 12)
    plain = write(tmp_path / "plain", [c for p in by_speaker[3:6] for c in p])
    found = prepare_datasets(mixed(german, plain, model={"variant": "tiny", "language": "fr"}))
    assert {(clip.meta["source"], clip.language) for clip in found.utterances} == {("de", "de"), ("plain", "fr")}


def test_unavailable_sources_are_errors_and_names_differ(two: tuple[dict[str, Any], ...], tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailableError, match="gone"):
        prepare_datasets(mixed(two[0], {"source": "folder", "path": str(tmp_path / "gone")}))
    assert list(mixed(two[0], two[0], two[1] | {"name": "own"}).data.mixed) == ["loud", "loud-2", "own"]
    for wrong, named in (
        ({"mix": [{"source": "folder"}]}, "data.mix.0: source 'folder' needs"),
        ({"mix": [{"wieght": 2}]}, "data.mix.0.wieght: unknown key; did you mean 'weight'"),
        ({"mix": [{"weight": 0}]}, "data.mix.0.weight"),
        ({"mix": [{}], "sources": ["sample"]}, "data.sources"),
        ({"mix": [{}], "path": "x"}, "data.path"),
        ({"mix": [{"name": "a"}, {"name": "a"}]}, "names in data.mix"),
        ({"replay": {"source": "folder", "share": 0.1}}, "data.replay.path"),
        ({"replay": 0.9}, "data.replay.share"),
    ):
        with pytest.raises(ConfigError, match=named):
            load_config(None, overrides={"data": wrong})


def test_the_report_counts_by_source(splits: DatasetSplits, two: tuple[dict[str, Any], ...], tmp_path: Path) -> None:
    report = build_data_report(splits, mixed(*two))
    assert dict(zip(report.sources()["source"], report.sources()["train"], strict=True)) == names(splits.train)
    assert "quiet" in report.to_text()
    report.save(tmp_path)
    assert DataReport.load(tmp_path).sources().equals(report.sources())


# weights


def planner(weights: dict[str, float], counts: dict[str, int], **shares: Any) -> ExamplePlanner:
    clips = [
        Utterance(f"{name}{i}", b"", "x", f"s{i % 3}", duration_sec=1.0, meta={"source": name})
        for name, count in counts.items() for i in range(count)
    ]  # fmt: skip
    config = CompositionConfig(**shares)
    return ExamplePlanner(clips, [5] * len(clips), prefix_tokens=2, config=config, seed=1, weights=weights)


def heard(plan: ExamplePlanner, epoch: int) -> Counter[int]:
    return Counter(index for example in plan.plan(epoch) for index in example.indices)


@pytest.mark.parametrize("shares", [{}, {"concatenate_prob": 0.7, "previous_text_prob": 0.5}])
def test_weights_are_how_often_clips_are_heard_per_epoch_and_all_alike_in_the_end(shares: dict[str, float]) -> None:
    weights = {"a": 2.5, "b": 0.25}
    plan = planner(weights, {"a": 10, "b": 20, "c": 4}, **shares)
    total: Counter[int] = Counter()
    for epoch in range(4):
        found = heard(plan, epoch)
        assert sum(found[i] for i in range(10)) == 25
        assert sum(found[i] for i in range(10, 30)) == 5
        assert {found[i] for i in range(10)} == {2, 3}
        assert all(found[i] == 1 for i in range(30, 34))
        assert all(len(set(example.indices)) == len(example.indices) for example in plan.plan(epoch))
        again = planner(weights, {"a": 10, "b": 20, "c": 4}, **shares)
        assert list(again.plan(epoch)) == list(plan.plan(epoch))
        total += found
    assert {total[i] for i in range(10)} == {10}
    assert {total[i] for i in range(10, 30)} == {1}
    assert heard(plan, 0) != heard(plan, 1)


def test_weights_of_one_change_nothing() -> None:
    shares = {"concatenate_prob": 0.5, "timestamp_prob": 0.5}
    weighted = planner({"other": 2.0}, {"a": 9}, **shares)
    assert list(planner({}, {"a": 9}, **shares).plan(3)) == list(weighted.plan(3))


def loader(splits: DatasetSplits, config: Config) -> SpeechLoader:
    return create_loader(splits.train, word_processor(), config, shuffle=True)


def test_an_epoch_with_weights_resumes_where_it_stopped(splits: DatasetSplits, two: tuple[dict[str, Any], ...]) -> None:
    config = mixed(two[0] | {"weight": 2}, two[1] | {"weight": 0.5})
    whole = loader(splits, config)
    whole.set_epoch(1)
    batches = [batch["ids"] for batch in whole]
    seen = Counter(id.partition("/")[0] for ids in batches for id in ids)
    trained = names(splits.train)
    assert seen == {"loud": 2 * trained["loud"], "quiet": round(trained["quiet"] / 2)}
    begun = loader(splits, config)
    begun.set_epoch(1)
    iterator = iter(begun)
    first = [next(iterator)["ids"]]
    resumed = loader(splits, config)
    resumed.load_state_dict(begun.state_dict())
    assert first + [batch["ids"] for batch in resumed] == batches
    with pytest.raises(CheckpointError, match="weights"):
        loader(splits, mixed(*two)).load_state_dict(begun.state_dict())


# replay


def letters(clips: Sequence[Utterance]) -> set[str]:
    return {letters_of(source_text(clip)) for clip in clips}


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_replay_is_a_share_of_the_training_examples(two: tuple[dict[str, Any], ...], share: float) -> None:
    config = mixed(two[0] | {"weight": 3}, two[1], **{"data.replay": share})  # offline: the bundled sample
    found = prepare_datasets(config)
    count = len(list(loader(found, config).dataset.utterances))
    assert count == len(found.train)
    plan = [example for batch in loader(found, config) for example in batch["meta"]]
    replayed = sum(meta.get("source") == "replay" for meta in plan)
    assert replayed == max(1, round(share / (1 - share) * (len(plan) - replayed)))
    assert {clip.id.partition("/")[0] for clip in found.validation + found.test} == {"loud", "quiet"}
    assert found.source == "loud + quiet + replay"


def test_replay_has_nothing_of_validation_and_test(two: tuple[dict[str, Any], ...], sample: list[Utterance]) -> None:
    found = prepare_datasets(load_config(None, overrides={"data": {**two[0], "replay": 0.5}}))
    replayed = [clip for clip in found.train if clip.meta.get("source") == "replay"]
    measured = [*found.validation, *found.test]
    assert replayed
    assert not letters(replayed) & letters(measured)
    assert found.shared_speakers == ()
    assert not {clip.id for clip in measured if clip.id.startswith("replay/")}
    assert all(clip.id.count("/") == (clip in replayed) for clip in found.utterances)
    trained_on = [clip for clip in sample if letters_of(clip.text) in letters(replayed)]
    assert {clip.meta["split"] for clip in trained_on} == {"train"}


def test_a_folder_too_small_is_repeated_and_the_guard_set_is_never_taken(
    tmp_path: Path, two: tuple[dict[str, Any], ...], by_speaker: list[list[Utterance]]
) -> None:
    from src.evaluation import prepare_guard_set

    general = write(tmp_path / "general", [clip for part in by_speaker[14:16] for clip in part])
    data = {**two[1], "replay": {"share": 0.4, **general}, "num_workers": 0}
    config = load_config(None, overrides={"data": data, "guard": {**general, "max_clips": 5}, "model.language": "en"})
    found = prepare_datasets(config)
    replayed = [clip for clip in found.train if clip.meta.get("source") == "replay"]
    assert len(replayed) == 3
    own = len(found.train) - 3
    weight = source_weights(found.train, config.data)["replay"]
    assert round(3 * weight) == round(own * 0.4 / 0.6)
    guard = prepare_guard_set(config, exclude=found.train)
    assert guard is not None
    assert len(guard.utterances) == 5
    assert not letters(guard.utterances) & letters(replayed)
    whole = config.model_copy(update={"guard": config.guard.model_copy(update={"max_clips": 8})})
    with pytest.raises(SourceUnavailableError, match=r"no clip of .*general"):
        prepare_datasets(whole)


def test_replay_comes_from_the_training_split_of_the_corpus_of_its_language(
    tmp_path: Path, two: tuple[dict[str, Any], ...], by_speaker: list[list[Utterance]], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"train.100": by_speaker[14] + by_speaker[15], "validation": by_speaker[16], "test": by_speaker[17]}
    root = write_librispeech(tmp_path / "librispeech", parts)
    monkeypatch.setitem(hub.CORPORA, "librispeech", replace(hub.CORPORA["librispeech"], id=str(root)))
    found = prepare_datasets(mixed(*two, **{"data.replay": 0.1, "model.language": "en"}))
    replayed = [clip for clip in found.train if clip.meta["source"] == "replay"]
    assert letters(replayed) <= letters(parts["train.100"])
    assert {clip.language for clip in replayed} == {"en"}
    assert all(clip.text.endswith(".") and not clip.text.isupper() for clip in replayed)  # recased by itself
    with pytest.raises(SourceUnavailableError, match="Latin"):
        prepare_datasets(mixed(*two, **{"data.replay": 0.1, "model": {"variant": "tiny", "language": "la"}}))


def test_sources_of_a_mix_are_listed_with_their_names(two: tuple[dict[str, Any], ...]) -> None:
    assert names(load_utterances(mixed(*two).data)) == {"loud": 24, "quiet": 28}


def test_a_stream_is_one_of_the_sources(
    tmp_path: Path, two: tuple[dict[str, Any], ...], by_speaker: list[list[Utterance]]
) -> None:
    calls = write_minds14(tmp_path / "calls", [clip for part in by_speaker[20:24] for clip in part])
    stream = {"source": "minds14", "hub": {"id": str(calls)}, "max_train": 8, "max_validation": 1, "max_test": 1}
    found = prepare_datasets(mixed(two[0], stream))
    assert [names(part)["calls"] for part in found.parts.values()] == [8, 1, 1]
    assert all(clip.id.startswith("calls/") for clip in found.train if clip.meta["source"] == "calls")


def test_rates_are_sliced_by_source(
    splits: DatasetSplits, two: tuple[dict[str, Any], ...], small: tuple[Any, Any]
) -> None:
    test = [next(c for c in splits.test if c.meta["source"] == name) for name in ("loud", "quiet")]
    config = mixed(*two, device="cpu")
    rows = ModelEvaluator(*small, config).evaluate_dataset(create_loader(test, small[1], config)).rows
    assert "source" in slice_columns(rows)
    assert {part.value: part.n for part in slice_rates(rows, "source")} == names(test)
