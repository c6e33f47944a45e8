from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from src.inference.streaming.commit import Event
from src.inference.streaming.simuleval import log_instance, write_log
from src.inference.words import Word

SAID = "the cat sat on the mat"


def event(kind: str, text: str, audio_sec: float, clock_sec: float, *, space: bool = True) -> Event:
    words = tuple(Word(text=each, start_sec=0.0, end_sec=1.0, probability=1.0, space=space) for each in text.split())
    return Event(kind, words, text, audio_sec, clock_sec, sequence=0)  # type: ignore[arg-type]


EVENTS = [
    event("partial", "the", 1.0, 1.2),
    event("commit", "the cat", 2.0, 2.5),
    event("commit", "sat", 3.0, 3.1),
    event("commit", "on the mat", 4.0, 4.4),
    event("final", SAID, 4.0, 4.5),
]


def test_each_word_has_the_audio_and_the_time_of_its_commit() -> None:
    live = log_instance(EVENTS, name="a.wav", audio_sec=5.0, reference=SAID)
    assert live == {
        "index": 0,
        "prediction": SAID,
        "delays": [2_000, 2_000, 3_000, 4_000, 4_000, 4_000],
        "elapsed": [2_500, 2_500, 3_100, 4_400, 4_400, 4_400],
        "prediction_length": 6,
        "reference": SAID,
        "source": ["a.wav"],
        "source_length": 5_000,
    }
    # fed at once, 1.5 s of computing in all: the clock began at 3.0, and the commits came before, then and after
    fast = [event("commit", "the cat", 2.0, 3.25), event("commit", "sat", 3.0, 4.5)]
    assert log_instance(fast, name="a.wav", audio_sec=5.0, computed_sec=1.5)["elapsed"] == [2_250, 2_250, 4_500]
    assert log_instance([], name="a.wav", audio_sec=5.0)["prediction"] == ""


def test_in_scripts_without_spaces_each_character_has_them_and_a_continued_word_has_those_of_its_end() -> None:
    events = [event("commit", "今天", 1.0, 1.0, space=False), event("commit", "好 吗", 2.0, 2.0, space=False)]
    row = log_instance(events, name="a.wav", audio_sec=2.0, characters=True)
    assert (row["prediction"], row["delays"]) == ("今天好吗", [1_000, 1_000, 2_000, 2_000])
    events = [event("commit", "a wheel", 1.0, 1.0), event("commit", "chair rolls", 2.0, 2.0, space=False)]
    row = log_instance(events, name="a.wav", audio_sec=2.0)
    assert (row["prediction"], row["delays"]) == ("a wheelchair rolls", [1_000, 2_000, 2_000])


@pytest.mark.parametrize("cut", [True, False])
def test_omnisteval_scores_the_log(
    cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = pytest.importorskip("omnisteval.cli", reason="pip install OmniSTEval")
    rows = [log_instance(EVENTS, name=f"{at}.wav", audio_sec=5.0, reference=SAID, index=at) for at in range(2)]
    segments = [[("the cat sat", 0.0, 2.5), ("on the mat", 2.5, 5.0)]] * 2 if cut else ()
    write_log(tmp_path / "log", rows, segments)
    log = tmp_path / "log"
    assert [json.loads(line)["index"] for line in (log / "instances.log").read_text().splitlines()] == [0, 1]
    given = ["longform", "--word_level", "--speech_segmentation", str(log / "segments.yaml"),
             "--ref_sentences_file", str(log / "references.txt"),
             "--hypothesis_file", str(log / "instances.log"), "--output_folder", str(tmp_path / "scores")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["omnisteval", *given])
    cli.main()
    scores = dict(line.split("\t") for line in (tmp_path / "scores" / "scores.tsv").read_text().splitlines())
    assert float(scores["chrf"]) == 100
    assert float(scores["ca_long_al"]) > float(scores["long_al"]) > 0
    assert f"Total Instances:   {4 if cut else 2}" in capsys.readouterr().out
