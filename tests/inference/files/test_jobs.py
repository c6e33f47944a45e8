from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from src.inference.engine_base import DecodingResult
from src.inference.files.jobs import JobReport, append_rows, deal, part_path, run_job
from src.inference.files.segmentation import TranscribedSegment
from src.inference.files.transcribe import Transcription
from src.utils.errors import DataError

SETTINGS = {"model": "tiny.en", "words": False, "temperatures": (0.0, 0.2)}


class Scripted:
    """Gives a text for each source, or an error, and remembers what it was asked for."""

    def __init__(self, bad: tuple[str, ...] = (), stop_at: str | None = None) -> None:
        self.bad, self.stop_at = bad, stop_at
        self.asked: list[str] = []

    def __call__(self, sources: list[str]) -> Iterator[Transcription]:
        for source in sources:
            if source == self.stop_at:
                raise KeyboardInterrupt
            self.asked.append(source)
            if source in self.bad:
                yield Transcription(source, None, float("nan"), error=f"{source}: damaged")
            else:
                yield Transcription(source, f"text of {source}", 2.0)


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def texts_of(output: Path) -> list[tuple[str, str | None]]:
    return [(row["source"], row["text"]) for row in rows_of(output)]


def job(output: Path, sources: list[str], transcribe: Callable[..., Any], **options: Any) -> JobReport:
    return run_job(output, sources, transcribe, settings=options.pop("settings", SETTINGS), **options)


def asked(output: Path, sources: list[str], **options: Any) -> list[str]:
    """Run a job and return what it had transcribed."""
    job(output, sources, engine := Scripted(), **options)
    return engine.asked


def test_a_stopped_job_goes_on_with_what_is_left(tmp_path: Path) -> None:
    output, sources = tmp_path / "new" / "rows.jsonl", ["a.wav", "b.wav", "c.wav", "a.wav"]
    with pytest.raises(KeyboardInterrupt):
        job(output, sources, first := Scripted(stop_at="c.wav"))
    assert [row["source"] for row in rows_of(output)] == first.asked == ["a.wav", "b.wav"]
    assert job(output, sources, second := Scripted()) == JobReport(recordings=3, audio_sec=6.0, failed=())
    assert second.asked == ["c.wav"]
    assert texts_of(output) == [(name, f"text of {name}") for name in sources[:3]]
    assert asked(output, sources) == []


def test_a_row_that_a_kill_cut_off_is_made_again(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    asked(output, ["a.wav", "b.wav"])
    whole = output.read_bytes()
    for cut in (1, 20, len(whole.splitlines(keepends=True)[1])):  # the line end alone, in the row, the whole row
        output.write_bytes(whole[:-cut])
        assert asked(output, ["a.wav", "b.wav"]) == ["b.wav"]
        assert output.read_bytes() == whole
    output.write_bytes(whole + b"\0" * 100)  # a power cut
    assert (asked(output, ["a.wav", "b.wav"]), output.read_bytes()) == ([], whole)


def test_errors_are_rows_and_tried_again_only_when_asked(tmp_path: Path) -> None:
    output, sources = tmp_path / "rows.jsonl", ["a.wav", "b.wav", "c.wav"]
    report = job(output, sources, Scripted(bad=("a.wav", "b.wav")))
    assert report.failed == (("a.wav", "a.wav: damaged"), ("b.wav", "b.wav: damaged"))
    assert rows_of(output)[0]["text"] is rows_of(output)[0]["duration_sec"] is None
    assert asked(output, sources) == []
    report = job(output, sources, again := Scripted(bad=("b.wav",)), retry_errors=True)
    assert again.asked == ["a.wav", "b.wav"]
    assert report.failed == (("b.wav", "b.wav: damaged"),)
    assert texts_of(output) == [("a.wav", "text of a.wav"), ("b.wav", None), ("c.wav", "text of c.wav")]


@pytest.mark.parametrize("kept", [".jsonl", ".part-00001"], ids=["output", "part"])
def test_a_recording_replaced_under_its_name_is_read_again(tmp_path: Path, kept: str) -> None:
    output, sources = tmp_path / "rows.jsonl", [str(tmp_path / name) for name in ("a.wav", "b.wav", "late.wav")]
    for source in sources[:2]:
        Path(source).write_bytes(b"first")
    job(output, sources, Scripted(bad=(sources[2],)))
    assert rows_of(output)[0]["size_bytes"] == 5
    if kept != output.suffix:  # of a launch of several processes that was killed
        output.rename(part_path(output, 1))
    assert asked(output, sources) == []
    Path(sources[0]).write_bytes(b"second")  # by its size
    os.utime(sources[1], ns=(1, 1))  # by its time
    Path(sources[2]).write_bytes(b"here now")
    engine = Scripted(bad=(sources[0],))
    report = job(output, sources, engine)
    assert engine.asked == sources
    assert [source for source, _ in report.failed] == sources[:1]  # the text of the first recording is not kept
    assert [row["source"] for row in rows_of(output)] == sources
    Path(sources[1]).unlink()
    assert asked(output, sources) == []


def test_rows_of_older_versions_count(tmp_path: Path) -> None:
    output, source = tmp_path / "rows.jsonl", tmp_path / "a.wav"
    source.write_bytes(b"")
    job(output, [], Scripted())
    append_rows(output, [Transcription(str(source), "text", 1.0).to_json()])
    assert asked(output, [str(source)]) == []


def test_other_settings_other_processes_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    asked(output, ["a.wav"])
    with pytest.raises(DataError, match=r"'tiny\.en'.*'base'"):
        asked(output, ["b.wav"], settings={**SETTINGS, "model": "base"})
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        job(output, ["b.wav"], lambda sources: job(output, sources, Scripted()))
    with pytest.raises(DataError, match=r"1 of 2 .* b\.wav"):
        job(output, ["a.wav", "b.wav"], lambda sources: [])
    whole = output.read_bytes()
    output.write_bytes(b"oops\n" + whole)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1"):
        asked(output, ["a.wav"])
    output.write_bytes(whole)
    (tmp_path / "rows.jsonl.job.json").unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl\.job\.json.* give another output"):
        asked(output, ["b.wav"])
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        asked(output / "rows.jsonl", ["a.wav"])


def test_parts_of_any_number_of_processes_are_joined_in_order(tmp_path: Path) -> None:
    output, sources = tmp_path / "rows.jsonl", ["a.wav", "b.wav", "c.wav", "d.wav"]
    job(output, ["z.wav", "d.wav"], Scripted(bad=("d.wav",)))
    for part, source in ((2, "b.wav"), (7, "d.wav")):
        append_rows(part_path(output, part), [Transcription(source, f"part {part}", 1.0).to_json()])
    with part_path(output, 7).open("ab") as file:
        file.write(b'{"source": "c.wav", "te')  # killed there
    assert asked(output, sources) == ["a.wav", "c.wav"]
    texts = ["text of a.wav", "part 2", "text of c.wav", "part 7", "text of z.wav"]
    assert texts_of(output) == list(zip([*sources, "z.wav"], texts, strict=True))
    assert not list(tmp_path.glob("*.part-*"))


def test_names_and_numbers_that_json_cannot_hold_come_back(tmp_path: Path) -> None:
    output, name = tmp_path / "rows.jsonl", "caf\udce9.wav"  # a name that is not UTF-8
    segment = TranscribedSegment.of(DecodingResult("naïve", (), avg_logprob=float("nan")), 0.0, 1.0, 0.0)
    job(output, [name], lambda sources: [Transcription(name, "naïve", 1.0, (segment,))])
    (row,) = rows_of(output)
    assert (row["source"], row["text"], row["segments"][0]["avg_logprob"]) == (name, "naïve", None)
    assert asked(output, [name]) == []


def test_shares_take_as_long_as_each_other_in_every_format(tmp_path: Path) -> None:
    sizes = {"a.wav": 800, "b.wav": 500, "c.wav": 400, "d.wav": 100, "e.mp3": 9, "f.mp3": 8, "gone.wav": None}
    for name, size in sizes.items():
        if size is not None:
            (tmp_path / name).write_bytes(bytes(size))
    sources = [str(tmp_path / name) for name in sizes]
    shares = [[Path(source).name for source in share] for share in deal(sources, 2)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    assert {"a.wav", "d.wav"} <= set(shares[0])
    assert {"b.wav", "c.wav"} <= set(shares[1])
    assert len({"e.mp3", "f.mp3"} & set(shares[0])) == 1
    assert deal(sources[:1], 3) == [[sources[0]], [], []]


def launch(processes: int, *arguments: object) -> int:
    """Run job_processes.py in so many processes, and return the exit code."""
    script = str(Path(__file__).parents[1] / "job_processes.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), script, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300).returncode


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_and_one_that_goes_on_do_each_file_once(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{i:02d}.wav") for i in range(12)]
    listed, output = tmp_path / "sources.txt", tmp_path / "rows.jsonl"
    listed.write_text("\n".join(names))
    assert launch(2, tmp_path / "two", listed, output, "die") != 0
    assert not output.exists()
    assert sorted(path.name for path in tmp_path.glob("*.part-*")) == ["rows.jsonl.part-00000", "rows.jsonl.part-00001"]
    assert launch(1, tmp_path / "one", listed, output, "live") == 0
    found = json.loads((tmp_path / "one" / "found-0.json").read_text())
    assert found == {"processes": 1, "recordings": 12, "audio_sec": 12.0}
    done = [line for path in tmp_path.glob("*/done-*.txt") for line in path.read_text().splitlines()]
    assert sorted(done) == [row["source"] for row in rows_of(output)] == names
    assert not list(tmp_path.glob("*.part-*"))
