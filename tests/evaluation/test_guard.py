from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile as sf

from src.data.audio import load_audio
from src.data.sources import hub
from src.data.sources.catalog import CLIP_TEXT, SAMPLE_CLIP
from src.data.sources.hub import fleurs_subsets
from src.data.utterance import Utterance
from src.evaluation import guard as guard_module
from src.evaluation.guard import GuardSet, evaluate_guard
from src.evaluation.report.run_files import latest_evaluations, load_metrics, load_predictions
from src.evaluation.report.summary import summarize_run
from src.utils.config import Config, load_config
from src.utils.errors import DataError, SourceUnavailableError
from src.utils.languages import WHISPER_LANGUAGES
from src.utils.tracking import ExperimentLogger
from tests.data.hub_layout import write_fleurs, write_librispeech


def guarded(guard: dict[str, Any], **other: Any) -> Config:
    return load_config(None, overrides={"device": "cpu", "guard": guard, **other})


def prepare(guard: dict[str, Any] | Config, exclude: list[Utterance] | None = None, **other: Any) -> GuardSet:
    config = guard if isinstance(guard, Config) else guarded(guard, **other)
    found = guard_module.prepare_guard_set(config, exclude=exclude or ())
    assert found is not None
    return found


def write_folder(path: Path, clips: list[Utterance], language: str = "") -> dict[str, str]:
    path.mkdir(parents=True)
    lines = ["file_name,text,speaker,language"]
    for clip in clips:
        sf.write(path / f"{clip.id}.flac", load_audio(clip.audio), 16_000)
        lines.append(f"{clip.id}.flac,{clip.text},{clip.speaker},{language}")
    (path / "metadata.csv").write_text("\n".join(lines) + "\n")
    return {"source": "folder", "path": str(path)}


@pytest.fixture(scope="module")
def by_speaker(sample: list[Utterance]) -> list[Utterance]:
    """36 clips of 12 speakers, speaker by speaker, as corpora are ordered."""
    clips: dict[str | None, list[Utterance]] = {}
    for utterance in sample:
        clips.setdefault(utterance.speaker, []).append(utterance)
    return [u for part in list(clips.values())[:12] for u in part[:3]]


@pytest.fixture
def librispeech(tmp_path: Path, by_speaker: list[Utterance], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder laid out as on the Hub, in the corpus's place."""
    splits = {"train.100": by_speaker[:2], "validation": by_speaker[2:4], "test": by_speaker}
    root = write_librispeech(tmp_path / "librispeech", splits)
    monkeypatch.setitem(hub.CORPORA, "librispeech", replace(hub.CORPORA["librispeech"], id=str(root)))


def test_offline_the_default_is_the_bundled_clip_and_a_source_that_was_asked_for_is_never_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert guard_module.prepare_guard_set(guarded({"source": "none"})) is None
    guard = prepare({})
    assert [u.text for u in guard.utterances] == [CLIP_TEXT]
    assert guard.utterances[0].duration_sec == pytest.approx(11, abs=0.1)
    assert "OfflineModeIsEnabled" in caplog.text
    for asked, named in (({"source": "librispeech"}, "librispeech"), ({"source": "parquet", "path": "gone"}, "gone")):
        with pytest.raises(SourceUnavailableError, match=named):
            prepare(asked)


@pytest.mark.usefixtures("librispeech")
def test_librispeech_is_spread_over_speakers(by_speaker: list[Utterance]) -> None:
    guard = prepare({"source": "auto", "max_clips": 10})
    assert (guard.name, guard.language) == ("LibriSpeech test-clean", "en")
    assert len(guard.utterances) == len({u.speaker for u in guard.utterances}) == 10
    assert guard.utterances[0].text == by_speaker[0].text.capitalize() + "."  # capitals are not Whisper's style
    more = prepare({"source": "librispeech", "max_clips": 20})
    assert [u.id for u in more.utterances] == [u.id for i, u in enumerate(by_speaker) if i % 3 < 2][:20]


@pytest.mark.usefixtures("librispeech")
def test_a_connection_that_breaks_gives_way_to_the_clip(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(stream: Iterator[Utterance], *, max_per_speaker: int) -> Iterator[Utterance]:
        yield next(stream)
        raise SourceUnavailableError("connection reset")

    monkeypatch.setattr(guard_module, "spread", broken)
    assert prepare({}).utterances[0].audio == SAMPLE_CLIP
    assert "connection reset" in caplog.text


def test_clips_of_the_training_data_are_left_out(
    tmp_path: Path, by_speaker: list[Utterance], caplog: pytest.LogCaptureFixture
) -> None:
    own = write_folder(tmp_path / "own", by_speaker[:6])
    config = guarded(own, data=own)
    whole = prepare(config).utterances
    assert len(whole) == 6
    assert len(prepare({**own, "max_clips": 4}).utterances) == 4
    assert "among the sources of the training data" in caplog.text
    recased = [replace(u, text=u.text.upper().rstrip(".")) for u in whole]
    assert [u.id for u in prepare(config, recased[:4]).utterances] == [u.id for u in whole[4:]]
    assert "4 clip(s)" in caplog.text
    with pytest.raises(DataError, match="6 clips"):
        prepare(config, recased)
    other_words = [replace(u, text="something else") for u in recased]  # two corpora may both have a clip 0001
    assert len(prepare(config, other_words).utterances) == 6


def test_the_guard_is_in_the_languages_of_the_training_data(
    tmp_path: Path, by_speaker: list[Utterance], caplog: pytest.LogCaptureFixture
) -> None:
    french = {"variant": "tiny", "language": "fr"}
    assert guard_module.prepare_guard_set(guarded({}, model=french)) is None
    assert "French" in caplog.text
    assert "OfflineModeIsEnabled" in caplog.text
    own = write_folder(tmp_path / "fr", by_speaker[:2], language="fr-FR")
    assert guard_module.prepare_guard_set(guarded(own, model={"variant": "tiny", "language": "en"})) is None
    assert prepare(own, model=french).language == "fr"
    table = tmp_path / "fr" / "metadata.csv"
    table.write_text(table.read_text().replace("fr-FR", "deu", 1))
    assert [u.language for u in prepare(own).utterances] == ["de", "fr"]  # nothing says which is wanted
    assert [u.language for u in prepare(own, model=french).utterances] == ["fr"]
    assert "clips in de are left out" in caplog.text
    train = [replace(by_speaker[9], language="de"), replace(by_speaker[10], language="fr")]
    assert prepare(own, train, model=french).language is None
    table.write_text(table.read_text().replace("fr-FR", "").replace("deu", ""))
    assert prepare(own, train[:1]).language == "de"


def test_each_language_has_its_corpus_and_what_has_none_is_said(
    tmp_path: Path, by_speaker: list[Utterance], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_fleurs(tmp_path / "fleurs", by_speaker, "hi_in")
    monkeypatch.setitem(hub.CORPORA, "fleurs", replace(hub.CORPORA["fleurs"], id=str(root)))
    codes = ["hi", "hi", "hi", "en", "en", "la"]
    train = [replace(u, id=f"train-{u.id}", language=code) for u, code in zip(by_speaker, codes, strict=False)]
    guard = prepare({"max_clips": 30}, train)
    assert guard.name == "FLEURS hi_in + bundled public clip"
    assert [u.language for u in guard.utterances] == ["hi"] * 10 + ["en"]
    assert list(guard.not_measured) == ["la"]
    assert "FLEURS has no Latin" in caplog.text
    assert prepare({"max_clips": 30}, model={"language": "hi"}).language == "hi"
    translating = guarded({}, model={"language": "hi", "task": "translate"})
    assert guard_module.prepare_guard_set(translating) is None


def test_every_subset_of_fleurs_belongs_to_one_language() -> None:
    subsets = fleurs_subsets()
    assert len(subsets) == 83
    assert set(subsets) <= set(WHISPER_LANGUAGES)
    assert [subsets[code] for code in ("zh", "yue", "no", "tl", "jw", "es")] == [
        "cmn_hans_cn", "yue_hant_hk", "nb_no", "fil_ph", "jv_id", "es_419",
    ]  # fmt: skip


def test_results_are_kept_apart_from_the_test_set(small: tuple[Any, Any], config: Config) -> None:
    model, processor = small
    tuned = copy.deepcopy(model)
    tuned.audio_context = "dynamic"
    with ExperimentLogger(config, run_id="r") as experiment:
        models = {"stock": model, "tuned": tuned}
        results = evaluate_guard(models, processor, prepare(config), config, experiment=experiment)
    assert list(results) == ["stock (guard)", "tuned (guard)"]
    assert [result.audio_context for result in results.values()] == ["full", "dynamic"]
    rows = load_metrics(experiment.dir)
    assert [row["event"] for row in rows] == ["guard", "evaluation", "evaluation"]
    assert latest_evaluations(rows) == {}
    assert load_predictions(experiment.dir) == {}
    assert list(load_predictions(experiment.dir, guard=True)) == list(results)
    assert f"{results['tuned (guard)'].wer:.3f}" in summarize_run(experiment.dir).to_text()
