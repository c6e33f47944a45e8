"""The notebook keeps its rules, and runs from the first cell to the last in a real kernel."""

from __future__ import annotations

import ast
import builtins
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "whisper_asr_colab.ipynb"
REPOSITORY = "https://github.com/jimmy00415/COMP3057_Project"
FORBIDDEN = (ast.FunctionDef, ast.ClassDef, ast.Try, ast.For, ast.While, ast.BinOp)


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_valid_small_and_stripped_and_cells_are_thin(notebook: Any, code_cells: list[Any]) -> None:
    nbformat.validate(notebook)
    assert len(code_cells) <= 30
    assert NOTEBOOK.stat().st_size < 60_000
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells)
    assert "widgets" not in notebook.metadata
    for cell in code_cells:
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(lines) <= 15, cell.source
        for node in ast.walk(ast.parse(cell.source)):
            path_join = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)  # folder / "name"
            assert path_join or not isinstance(node, FORBIDDEN), cell.source


def test_no_name_is_used_for_two_things(code_cells: list[Any]) -> None:
    bound: dict[str, int] = {}
    for index, cell in enumerate(code_cells):
        assigned = [node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)]
        for name in (n.id for node in assigned for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)):
            assert bound.setdefault(name, index) == index, f"{name} is bound in two cells"


def test_a_quick_restart_gives_all_that_run_all_skips(code_cells: list[Any]) -> None:
    """Of `if not QUICK_RESTART`, only the other branch runs."""
    known = set(dir(builtins)) | {"display"}
    for cell in code_cells:
        tree = ast.parse(cell.source)
        for node in tree.body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "not QUICK_RESTART":
                node.body = [ast.Pass()]
        for node in ast.walk(tree):
            known |= {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
            known |= {(alias.asname or alias.name) for alias in getattr(node, "names", ())}
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert used <= known, f"{used - known} in {cell.source}"


def test_the_first_screen_has_three_choices_and_the_controls_of_before_have_their_names(
    notebook: Any, code_cells: list[Any]
) -> None:
    title, choose, *_ = notebook.cells
    assert "Run all" in title.source and "data:image/png;base64," in title.source
    assert re.findall(r"^(\w+) = .*#@param", choose.source, re.M) == ["DATA_SOURCE", "DATA_PATH", "LANGUAGE", "PROFILE"]
    advanced = "\n".join(cell.source for cell in code_cells if cell.source.startswith("#@title Advanced"))
    controls = ("MODEL_VARIANT", "TRAIN_SAMPLES", "VAL_SAMPLES", "TRAIN_EPOCHS", "BATCH_SIZE", "LEARNING_RATE")
    assert set(controls) <= set(re.findall(r"^(\w+) = .*#@param", advanced, re.M))


def test_cells_hide_their_code_under_a_title_and_help_is_in_the_errors(notebook: Any, code_cells: list[Any]) -> None:
    assert all(cell.source.startswith("#@title") and cell.metadata.cellView == "form" for cell in code_cells)
    assert not any("TROUBLESHOOTING" in cell.source for cell in notebook.cells)


@pytest.mark.slow  # starts a kernel
def test_an_error_in_the_notebook_ends_in_a_link_to_its_explanation() -> None:
    start = "from src.utils import load_config, start_session\nstart_session()"
    wrong = nbformat.v4.new_code_cell("load_config(None, overrides={'training.epoch': 1})")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(start), wrong])
    with pytest.raises(CellExecutionError):
        NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    (error,) = [output for output in wrong.outputs if output.output_type == "error"]
    shown = "\n".join(error.traceback)
    assert "did you mean 'epochs'" in shown
    assert re.search(r"TROUBLESHOOTING\.md#settings$", shown)


def test_badge_and_set_up_point_to_the_published_repository(notebook: Any, code_cells: list[Any]) -> None:
    badge = f"{REPOSITORY.replace('https://github.com', '')}/blob/main/{NOTEBOOK.name}"
    assert badge in notebook.cells[0].source
    set_up = next(cell.source for cell in code_cells if "git" in cell.source and "clone" in cell.source)
    assert re.search(rf'REPOSITORY = "{REPOSITORY}"  #@param', set_up)
    assert "check=True" in set_up


def test_set_up_clones_a_fork_into_a_fresh_runtime_and_not_into_a_checkout(
    code_cells: list[Any], tmp_path: Path
) -> None:
    """Run the cell alone, as a script, against a small repository that stands for a fork."""
    fork = tmp_path / "fork.git"
    (fork / "src" / "utils").mkdir(parents=True)
    (fork / "src" / "utils" / "config.py").write_text("")
    (fork / "src" / "utils" / "__init__.py").write_text("def start_session(drive_folder): ...")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "."], [*identity, "commit", "-qm", "fork"]):
        subprocess.run(["git", *arguments], cwd=fork, check=True)
    set_up = next(cell.source for cell in code_cells if "clone" in cell.source)
    script = set_up.replace(REPOSITORY, fork.as_uri()) + "\nprint(os.getcwd())"
    runtime = tmp_path / "content"
    runtime.mkdir()
    for folder in (runtime, runtime, runtime / "fork"):  # first time, restarted runtime, inside the checkout
        done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(runtime / "fork")
    assert sorted(p.name for p in runtime.iterdir()) == ["fork"]


@pytest.mark.slow
def test_run_all_with_the_demo_profile_ends_green(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/run_demo.py", "--quick", "--runs-dir", str(tmp_path), "--run-id", "quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(figures) == {"stock_wer", "tuned_wer", "streaming_wer", "rtf"}
    assert all(isinstance(value, float) and value > 0 for value in figures.values())
    run_dir = tmp_path / "quick"
    for name in (
        "notebook.html", "config.yaml", "env.json", "metrics.jsonl", "predictions.jsonl",
        "data_report.json", "data_report_clips.csv", "figures/data_report.png", "figures/augmentation.png",
        "figures/training_analysis.png",
        "figures/stock_against_tuned.svg", "figures/wer_by_slice.png", "figures/confusions.png", "figures/words.png",
        "figures/rtf_by_batch.png", "figures/modes.png", "figures/comprehensive.png", "figures/comprehensive.pdf",
        "report.html", "../quick.zip",
        "checkpoints/best_model_hf/model.safetensors", "ctranslate2_int8/model.bin",
    ):  # fmt: skip
        assert (run_dir / name).stat().st_size > 0, name
    assert not (run_dir / "notebook.ipynb").exists()
    page = (run_dir / "notebook.html").read_text()
    # one is the live plot, one in the introduction
    assert page.count('src="data:image/png;base64') == 13, "the pictures are not shown"
    assert page.count("<audio") == 9  # a clip in six ways, the best and the worst one, a transcribed file
    assert page.count('class="alignment-view"') == 1
    assert list((run_dir / "checkpoints").glob("best_*_hf/README.md")), "no model card"
    assert len(list((run_dir / "data_versions").glob("*.json"))) == 1
    names = zipfile.ZipFile(tmp_path / "quick.zip").namelist()
    assert {"report.html", "captions.srt", "figures/comprehensive.pdf", "model/model.safetensors"} <= set(names)
    assert not any(part.startswith(".") for name in names for part in name.split("/"))
