from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from src.data.preparation import prepare_datasets
from src.data.report.report import build_data_report
from src.data.utterance import Utterance
from src.evaluation.report.html import main_model, more_rates, slice_table, write_html_report
from src.evaluation.report.origin import read_origin
from src.evaluation.report.summary import NOT_MEASURED, load_predictions, summarize_run
from src.utils.config import Config
from src.utils.data_versions import DataVersionManager
from src.utils.errors import DataError
from src.utils.tracking import ExperimentLogger
from tests.evaluation.run_files import evaluation, prediction, write

ATTACK = "<script>alert(1)</script>"
REVISION = "0123456789abcdef"


class Page(HTMLParser):
    """A report as a browser would read it: tags with attributes, text outside of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += f" {data}"


def report(run_dir: Path) -> Page:
    return Page(write_html_report(run_dir, run_dir.parent / "report.html"))


def test_both_models_their_intervals_and_the_verdict_are_at_the_top(run_dir: Path) -> None:
    text = report(run_dir).text
    top = text[text.index("How it was made Result") : text.index("match error rate")]
    for part in ("0.370", "95% interval 0.320 to 0.420", "0.270", "-27.0 % against stock", "the tuned model is better"):
        assert part in top


def test_every_section_is_there_and_the_links_lead_to_it(run_dir: Path) -> None:
    page = report(run_dir)
    links = [str(a["href"])[1:] for tag, a in page.tags if tag == "a"]
    assert links == ["result", "more-rates", "slices", "pictures", "clips", "data", "how-it-was-made"]
    assert set(links) <= {a.get("id") for tag, a in page.tags if tag == "h2"}


def test_the_page_can_load_nothing(run_dir: Path) -> None:
    page = report(run_dir)
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"https?:|\bself\b|\*", policy)
    targets = [str(a[key]) for _, a in page.tags for key in ("src", "href") if key in a]
    assert [target for target in targets if not target.startswith(("data:", "#"))] == []


def test_pictures_are_drawn_where_the_run_has_the_data_and_else_the_reason_is_said(run_dir: Path) -> None:
    assert [a["alt"] for tag, a in report(run_dir).tags if tag == "img"] == [
        "Training", "Word error rate by model", "Word error rate by clip length", "Kinds of errors",
        "Most frequent errors",
    ]  # fmt: skip
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    (run_dir / "metrics.jsonl").write_text("\n".join(line for line in lines if '"evaluation"' in line) + "\n")
    page = report(run_dir)
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 4
    assert "no finished epoch yet" in page.text


def test_pictures_of_the_callers_choice_replace_the_usual_ones(run_dir: Path) -> None:
    path = write_html_report(run_dir, run_dir / "r.html", figures={"My <picture>": Figure()})
    assert [a["alt"] for tag, a in Page(path).tags if tag == "img"] == ["My <picture>"]


def test_what_a_user_named_is_text(tmp_path: Path) -> None:
    rows = [
        {**prediction(model, i, i % 2), "speaker": f"{ATTACK}{i % 3}", "meta": {ATTACK: f"{ATTACK}{i % 2}"}}
        for model in ("stock", ATTACK)
        for i in range(8)
    ]
    run = write(tmp_path / "run", [evaluation("stock", 0.3), evaluation(ATTACK, 0.2)], rows)
    page = report(run)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 2
    assert ATTACK in page.text


def test_slices_stand_side_by_side_for_both_models(run_dir: Path) -> None:
    summary = summarize_run(run_dir)
    table = slice_table("speaker", load_predictions(run_dir), summary.evaluations)
    assert list(table.columns) == ["speaker", "clips", "words", "stock: WER", "tuned: WER", "interval over"]
    assert table["clips"].sum() == 40
    assert set(table["stock: WER"].str[:5]) == {"0.500"}
    assert set(table["tuned: WER"].str[:5]) == {"0.000", "0.250"}


def test_rates_that_were_not_measured_are_said_and_never_zero() -> None:
    full = evaluation("tuned", 0.2) | {"mer": 0.31, "empty_references": 0, "hallucinated_words": 0, "insertions": 1234}
    table = more_rates({"stock": evaluation("stock", 0.3), "tuned": full})
    assert list(table.columns) == ["stock", "tuned"]
    assert list(table.loc["match error rate (MER)"]) == [NOT_MEASURED, "0.310"]
    assert table.loc["words invented on them", "tuned"] == NOT_MEASURED  # there was no silence to invent them on
    assert table.loc["insertions", "tuned"] == "1,234"


def test_the_run_is_about_the_tuned_model() -> None:
    assert main_model(["tuned", "stock", "other"]) == "tuned"
    assert main_model(["stock", "mixed"]) == "mixed"
    assert main_model(["stock"]) == "stock"


def test_a_run_without_an_evaluation_says_so(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [{"event": "train_step", "step": 1, "epoch": 1, "loss": 2.0}])
    assert report(run).text.count("nothing was evaluated in this run") == 2
    with pytest.raises(DataError, match="nowhere: no such file; was the run started"):
        write_html_report(tmp_path / "nowhere", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_the_saved_data_report_is_shown(run_dir: Path, config: Config) -> None:
    assert "data_report.json is not in the run's folder" in report(run_dir).text
    small = config.model_copy(
        update={"data": config.data.model_copy(update={"max_train": 4, "max_validation": 2, "max_test": 2})}
    )
    build_data_report(prepare_datasets(small), small).save(run_dir)
    assert "Data report : sample, label case sentence" in report(run_dir).text


def test_how_to_make_it_again_is_read_from_the_runs_files(run_dir: Path, sample: list[Utterance]) -> None:
    environment = {"python": "3.11", "gpu": None, "git_revision": f"{REVISION}+changes"}
    (run_dir / "env.json").write_text(json.dumps(environment))
    (run_dir / "config.yaml").write_text("model: {variant: base.en}\npaths: {checkpoints_dir: kept}\n")
    DataVersionManager(run_dir / "data_versions").log_dataset_version(
        dataset_name="speech", version="v1", metadata={}, utterances=sample[:2]
    )
    origin = read_origin(run_dir)
    assert origin.commands(run_dir) == [
        f"git checkout {REVISION}  # and changes that were not committed",
        f"python scripts/train.py --config {run_dir}/config.yaml",
        f"python scripts/evaluate.py --config {run_dir}/config.yaml --model kept/best_model_hf --stock base.en",
    ]
    text = report(run_dir).text
    assert str(origin.data_versions[0].checksum) in text
    assert "variant: base.en" in text
    assert "gpu none" in text


def test_a_measurement_is_repeated_as_it_was_made(run_dir: Path) -> None:
    row = {"event": "measured", "model": "my model", "stock": None, "data": "d.parquet", "max_clips": 9}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert read_origin(run_dir).commands(run_dir)[-1] == (
        f"python scripts/evaluate.py --config {run_dir}/config.yaml --model 'my model' --data d.parquet --max-clips 9 "
        "--no-stock"
    )


def test_a_damaged_file_is_named(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("model: [")
    with pytest.raises(DataError, match=r"config\.yaml: damaged"):
        write_html_report(run_dir, run_dir / "r.html")


@pytest.mark.slow
def test_2500_clips_stay_below_10_mb(tmp_path: Path) -> None:
    words = "the quick brown fox jumps over the lazy dog and runs away"
    texts = {"reference": words, "hypothesis": words.replace("fox", "box")}
    rows = [
        {**prediction(model, i, 2), **texts, "meta": {"age": i % 80}}
        for model in ("stock", "tuned")
        for i in range(2500)
    ]
    run = write(tmp_path / "run", [evaluation("stock", 0.3), evaluation("tuned", 0.2)], rows)
    assert write_html_report(run, tmp_path / "r.html").stat().st_size < 10e6


def test_the_experiments_own_files_are_read(config: Config) -> None:
    with ExperimentLogger(config, run_id="r1") as experiment:
        experiment.log("evaluation", **{k: v for k, v in evaluation("stock", 0.3).items() if k != "event"})
    text = report(experiment.dir).text
    assert text.startswith("Run r1 Run r1")
    assert "transformers" in text
