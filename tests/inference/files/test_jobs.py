from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from src.inference.files.jobs import JobReport, RowWriter, deal, part_path, run_job
from src.inference.files.transcribe import TranscribedSegment, Transcription
from src.inference.options import DecodingResult
from src.utils.errors import DataError
from tests.training.launching import collect, launch

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


def job(output: Path, sources: list[str], transcribe: Callable[..., Any], **options: Any) -> JobReport:
    return run_job(output, sources, transcribe, settings=options.pop("settings", SETTINGS), **options)


def test_a_stopped_job_goes_on_with_what_is_left(tmp_path: Path) -> None:
    output, sources = tmp_path / "new" / "rows.jsonl", ["a.wav", "b.wav", "c.wav", "a.wav"]
    with pytest.raises(KeyboardInterrupt):
        job(output, sources, first := Scripted(stop_at="c.wav"))
    assert [row["source"] for row in rows_of(output)] == first.asked == ["a.wav", "b.wav"]
    report = job(output, sources, second := Scripted())
    assert second.asked == ["c.wav"]
    assert report == JobReport(recordings=3, audio_sec=6.0, failed=())
    assert [row["text"] for row in rows_of(output)] == [f"text of {name}.wav" for name in "abc"]
    job(output, sources, third := Scripted())
    assert third.asked == []


def test_a_row_that_a_kill_cut_off_is_made_again(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    job(output, ["a.wav", "b.wav"], Scripted())
    whole = output.read_bytes()
    for cut in (1, 20, len(whole.splitlines(keepends=True)[1])):  # the line end alone, in the row, the whole row
        output.write_bytes(whole[:-cut])
        job(output, ["a.wav", "b.wav"], again := Scripted())
        assert again.asked == ["b.wav"]
        assert output.read_bytes() == whole
    output.write_bytes(whole + b"\0" * 100)  # a power cut
    job(output, ["a.wav", "b.wav"], none := Scripted())
    assert (none.asked, output.read_bytes()) == ([], whole)


def test_a_damaged_row_in_the_middle_is_named(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    job(output, ["a.wav", "b.wav"], Scripted())
    output.write_bytes(b"oops\n" + output.read_bytes())
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: .*remove the line"):
        job(output, ["a.wav"], Scripted())


def test_errors_are_rows_and_tried_again_only_when_asked(tmp_path: Path) -> None:
    output, sources = tmp_path / "rows.jsonl", ["a.wav", "b.wav", "c.wav"]
    report = job(output, sources, Scripted(bad=("a.wav", "b.wav")))
    assert report.failed == (("a.wav", "a.wav: damaged"), ("b.wav", "b.wav: damaged"))
    assert rows_of(output)[0]["text"] is rows_of(output)[0]["duration_sec"] is None
    job(output, sources, kept := Scripted())
    assert kept.asked == []
    report = job(output, sources, again := Scripted(bad=("b.wav",)), retry_errors=True)
    assert again.asked == ["a.wav", "b.wav"]
    assert report.failed == (("b.wav", "b.wav: damaged"),)
    assert [(row["source"], row["error"] is None) for row in rows_of(output)] == [
        ("a.wav", True), ("b.wav", False), ("c.wav", True),
    ]  # fmt: skip


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    job(output, ["a.wav"], Scripted())
    with pytest.raises(DataError, match=r"begun with model 'tiny\.en', now 'base'; go on with the same, or give"):
        job(output, ["b.wav"], Scripted(), settings={**SETTINGS, "model": "base"})
    (tmp_path / "rows.jsonl.job.json").unlink()
    with pytest.raises(DataError, match=r"no rows\.jsonl\.job\.json says how"):
        job(output, ["b.wav"], Scripted())


def test_one_process_at_a_time_has_a_job(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match="another process works on it"):
        job(output, ["a.wav"], lambda sources: job(output, sources, Scripted()))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        job(tmp_path / "file" / "rows.jsonl", ["a.wav"], Scripted())


def test_parts_of_any_number_of_processes_are_joined_in_order(tmp_path: Path) -> None:
    output, sources = tmp_path / "rows.jsonl", ["a.wav", "b.wav", "c.wav", "d.wav"]
    job(output, ["z.wav", "d.wav"], Scripted(bad=("d.wav",)))
    for part, source in ((2, "b.wav"), (7, "d.wav")):
        with RowWriter(part_path(output, part)) as rows:
            rows.append(Transcription(source, f"part {part}", 1.0).to_json())
    with part_path(output, 7).open("ab") as file:
        file.write(b'{"source": "c.wav", "te')  # killed there
    job(output, sources, last := Scripted())
    assert last.asked == ["a.wav", "c.wav"]
    assert [(row["source"], row["text"]) for row in rows_of(output)] == [
        ("a.wav", "text of a.wav"), ("b.wav", "part 2"), ("c.wav", "text of c.wav"), ("d.wav", "part 7"),
        ("z.wav", "text of z.wav"),
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.part-*"))


def test_a_recording_without_a_row_is_named(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match=r"1 of 2 recordings have no row, the first is b\.wav"):
        job(output, ["a.wav", "b.wav"], lambda sources: Scripted()(sources[:1]))


def test_names_and_numbers_that_json_cannot_hold_come_back(tmp_path: Path) -> None:
    output, name = tmp_path / "rows.jsonl", "caf\udce9.wav"  # a name that is not UTF-8
    result = DecodingResult("naïve", (), avg_logprob=float("nan"))
    segment = TranscribedSegment.of(result, 0.0, 1.0)
    report = job(output, [name], lambda sources: [Transcription(name, "naïve", 1.0, (segment,))])
    assert report.recordings == 1
    (row,) = rows_of(output)
    assert (row["source"], row["text"], row["segments"][0]["avg_logprob"]) == (name, "naïve", None)
    job(output, [name], again := Scripted())
    assert again.asked == []


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
    assert [name for name in sizes if name in shares[0]] == shares[0]
    assert deal(sources[:1], 3) == [[sources[0]], [], []]


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_and_one_that_goes_on_do_each_file_once(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "job_processes.py"
    names = [str(tmp_path / f"{i:02d}.wav") for i in range(12)]
    listed, output = tmp_path / "sources.txt", tmp_path / "rows.jsonl"
    listed.write_text("\n".join(names))
    killed = launch(script, tmp_path / "two", 2, listed, output, "die")
    assert killed.wait(timeout=300) != 0
    assert not output.exists()
    assert sorted(path.name for path in tmp_path.glob("*.part-*")) == ["rows.jsonl.part-00000", "rows.jsonl.part-00001"]
    (found,) = collect(tmp_path / "one", launch(script, tmp_path / "one", 1, listed, output, "live"), 1)
    assert found == {"processes": 1, "recordings": 12, "audio_sec": 12.0}
    done = [line for path in tmp_path.glob("*/done-*.txt") for line in path.read_text().splitlines()]
    assert sorted(done) == names
    assert [row["source"] for row in rows_of(output)] == names
    assert not list(tmp_path.glob("*.part-*"))
