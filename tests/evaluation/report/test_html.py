from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from src.data.report.report import DataReport
from src.evaluation.report.html import write_html_report
from src.evaluation.report.run_files import load_metrics
from src.utils.config import Config
from src.utils.errors import DataError
from src.utils.tracking import ExperimentLogger
from tests.evaluation.run_files import append, evaluation, prediction, spoken_run, steps, write

ATTACK = "<script>alert(1)</script>"


class Page(HTMLParser):
    """A page as a browser would read it: tags with attributes, text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += f" {data}"

    def count(self, tag: str) -> int:
        return sum(each == tag for each, _ in self.tags)


def report(run_dir: Path) -> Page:
    return Page(write_html_report(run_dir, run_dir.parent / "report.html").read_text(encoding="utf-8"))


def test_the_page_begins_with_the_verdict_and_can_load_nothing(run_dir: Path, data_report: DataReport) -> None:
    data_report.save(run_dir)
    (run_dir / "config.yaml").write_text(
        f"data: {{source: folder, path: {run_dir}/speech}}\npaths: {{cache_dir: /home/ann}}\n"
    )
    page = report(run_dir)
    assert not re.search(f"{run_dir.parent}|/home/ann", (run_dir.parent / "report.html").read_text())
    links = [str(a["href"])[1:] for tag, a in page.tags if tag == "a"]
    assert links == [a["id"] for tag, a in page.tags if tag == "h2"]
    assert len(links) == 7
    top = page.text[: page.text.index("match error rate")]
    for part in ("0.370", "95% interval 0.320 to 0.420", "0.270", "-27.0 % against stock", "is better"):
        assert part in top
    assert page.count("img") == 5
    assert "Data report" in page.text
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"https?:|\bself\b|\*", policy)
    targets = [str(a[key]) for _, a in page.tags for key in ("src", "href") if key in a]
    assert [target for target in targets if not target.startswith(("data:", "#"))] == []


def test_the_languages_of_test_and_guard_set_are_shown(tmp_path: Path) -> None:
    run = spoken_run(tmp_path / "run", "zh", "hi")
    measured = [row for row in load_metrics(run) if row["event"] == "evaluation"]
    append(run, "metrics", *[row | {"name": f"{row['name']} (guard)"} for row in measured])
    text = report(run).text
    assert text.count("each language counts alike") == 2
    assert "Error rate by language" in text


def test_what_a_run_has_no_data_for_is_left_out_with_a_reason(tmp_path: Path) -> None:
    rows = [prediction("stock", i, 1) for i in range(8)]
    page = report(write(tmp_path / "untrained", [evaluation("stock", 0.3)], rows))
    assert page.count("img") == 4  # no curves of a training
    assert "no finished epoch yet" in page.text
    page = report(write(tmp_path / "unevaluated", steps(1)))
    assert page.text.count("nothing was evaluated in this run") == 2
    assert "data_report.json is not in the run's folder" in page.text
    with pytest.raises(DataError, match="nowhere"):
        write_html_report(tmp_path / "nowhere", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_what_a_user_named_is_text(tmp_path: Path) -> None:
    rows = [
        {**prediction(model, i, i % 2), "speaker": f"{ATTACK}{i % 3}", "meta": {ATTACK: f"{ATTACK}{i % 2}"}}
        for model in ("stock", ATTACK)
        for i in range(8)
    ]
    run = write(tmp_path / f"run {ATTACK.replace('/', '')}", [evaluation("stock", 0.3), evaluation(ATTACK, 0.2)], rows)
    (run / "config.yaml").write_text(f"model: {{variant: '{ATTACK}'}}\ndata: {{source: '{ATTACK}'}}\n")
    (run / "env.json").write_text(f'{{"gpu": "{ATTACK}", "none": null}}')
    page = report(run)
    assert page.count("script") == 2
    assert page.count("h1") == 1
    assert page.text.count(ATTACK) > 20


def test_the_experiments_own_files_are_read(config: Config) -> None:
    with ExperimentLogger(config, run_id="r1") as experiment:
        experiment.log("evaluation", **{k: v for k, v in evaluation("stock", 0.3).items() if k != "event"})
    text = report(experiment.dir).text
    assert text.startswith("Run r1")
    assert "transformers" in text
    assert f"variant: {config.model.variant}" in text
