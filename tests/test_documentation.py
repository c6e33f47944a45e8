"""Documentation says what is so: links lead somewhere, commands parse, quoted messages exist, the examples run."""

from __future__ import annotations

import argparse
import ast
import importlib
import operator
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import yaml

from scripts.configuration_reference import REFERENCE, configuration_reference
from src.utils.config import Config, flatten, load_config
from src.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/jimmy00415/COMP3057_Project/blob/main/"
NOTEBOOK = ROOT / "whisper_asr_colab.ipynb"
TROUBLESHOOTING = ROOT / "docs" / "TROUBLESHOOTING.md"
DOCUMENTS = sorted(
    path for place in ("*.md", "docs/**/*.md", "src/**/*.md", "checkpoints/*.md") for path in ROOT.glob(place)
)
CODE = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
# each page's examples go on from those of the pages before
PAGES = [
    "README.md",
    *(f"docs/{p}.md" for p in ("data", "training", "evaluation", "transcription", "export", "streaming")),
]
# sizes of the examples, so that they run in a minute on one core
SMALLER = {
    '"data.max_train": 32,': '"data.max_train": 16, "data.max_validation": 4, "data.max_test": 6,',
    'splits.test[:16], variants=["tiny.en", "base"]': 'splits.test[:2], variants=["tiny.en"], engines=["torch"]',
    "benchmark_single(load_audio(clip))": "benchmark_single(load_audio(clip)[:32_000])",
    "stream_from_file(clip, real_time=True,": "stream_from_file(clip,",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    """Return a document; of a notebook, the text of its Markdown cells."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def prose(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", text_of(path), flags=re.M | re.S)


def code_spans(path: Path) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(path))]


def anchors(path: Path) -> set[str]:
    """Return what GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> Iterator[tuple[str, Path, str]]:
    """Yield text, file and anchor of each link within the repository."""
    for text, target in re.findall(r"!?\[([^\]]*)\]\(([^)\s]+)\)", prose(path)):
        place, _, anchor = target.removeprefix(REPOSITORY).partition("#")
        if "://" not in place:
            base = ROOT if target.startswith(REPOSITORY) else path.parent
            yield text, (base / place if place else path), anchor


def test_links_and_named_files_lead_somewhere_and_code_is_where_it_is_said_to_be() -> None:
    of_code = 0
    for document in [*DOCUMENTS, NOTEBOOK]:
        for text, place, anchor in links(document):
            where = f"{name_of(document)}: [{text}] leads to {place.name}"
            assert place.exists(), where
            assert not anchor or anchor in anchors(place), f"{where}#{anchor}"
            if place.suffix == ".py" and re.fullmatch(r"`[\w.]+`", text) and not text.endswith(".py`"):
                module = importlib.import_module(".".join(place.resolve().relative_to(ROOT).with_suffix("").parts))
                operator.attrgetter(text.strip("`"))(module)
                of_code += 1
    assert of_code > 50
    for document in DOCUMENTS:
        for path in re.findall(r"\b(?:src|scripts|tests|docs)/[\w./-]*\w\.\w+", text_of(document)):
            assert (ROOT / path).exists(), f"{name_of(document)}: {path}"


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").split()) <= 1500


def test_settings_that_are_named_exist_and_take_the_value() -> None:
    keys = set(flatten(Config().model_dump()))
    sections = {key.rpartition(".")[0] for key in keys}
    for span in (span for document in DOCUMENTS for span in code_spans(document)):
        key, _, value = span.partition(": ")
        if not re.fullmatch(rf"({'|'.join(Config.model_fields)})\.[a-z][\w.]*", key) or key.endswith((".py", ".yaml")):
            continue
        assert key in keys | sections, f"`{span}`: no such setting"
        if value:
            try:
                load_config(None, overrides={key: yaml.safe_load(value)})
            except ConfigError as err:  # other keys may have to be set too; this one must be well
                assert f"- {key}" not in str(err), f"`{span}`: {err}"


def test_the_configuration_reference_is_up_to_date() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == configuration_reference()


def test_quoted_messages_are_those_of_the_code() -> None:
    templates, of_errors = message_templates()
    quotes = re.findall(r"^> `(.+)`$", text_of(TROUBLESHOOTING), re.M)
    assert len(quotes) > 40
    assert len(quotes) == len(re.findall(r"^>", text_of(TROUBLESHOOTING), re.M)), "a quotation of another form"
    for quote in quotes:
        kind, message = re.fullmatch(r"(?:(\w+Error): )?(.+)", quote).groups()  # type: ignore[union-attr]
        parts = [part for part in message.split("…") if part]
        assert sum(map(len, parts)) >= 12, f"{quote}: too little to look for"
        ordered = re.compile(".*".join(map(re.escape, parts)), re.S)
        candidates = [text for text in (of_errors.get(kind, []) if kind else templates) if parts[0] in text]
        assert any(map(ordered.search, candidates)), f"no such message: {quote}"


def message_templates() -> tuple[list[str], dict[str, list[str]]]:
    """Return all texts of the code with … for what is filled in, and those in each kind of error."""
    templates = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    of_errors: dict[str, list[str]] = {}
    for path in CODE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        templates += texts_in(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name.endswith("Error"):
                    of_errors.setdefault(name, []).extend(texts_in(node))
    return templates, of_errors


def texts_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[.\d]*[a-z]", "…", node.value)


class ParsedError(Exception):
    """Arguments were accepted; the script need not run."""


@pytest.mark.slow  # imports every script
def test_commands_name_targets_scripts_and_options_that_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *arguments: object) -> None:
        parse(parser, *arguments)  # type: ignore[call-overload]
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    accepted, refused = 0, []
    for source, words in commands():
        command = f"{source}: {' '.join(words)}"
        if words[0] == "make" and not {word for word in words[1:] if "=" not in word} <= targets:
            refused.append(command)
        for at, word in enumerate(words):
            if not re.fullmatch(r"(scripts|benchmarks)/\w+\.py", word):
                continue
            monkeypatch.setattr(sys, "argv", words[at:])
            try:
                importlib.import_module(word.removesuffix(".py").replace("/", ".")).main()
            except ParsedError:
                accepted += 1
            except SystemExit:
                refused.append(f"{command}\n  {capsys.readouterr().err.splitlines()[-1]}")
    assert not refused, "\n".join(refused)
    assert accepted > 40


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the commands of all documents, and those in the docstrings of scripts, as words."""
    texts = [(name_of(d), line) for d in DOCUMENTS for block in blocks(text_of(d), "sh") for line in lines_of(block)]
    texts += [(name_of(d), span) for d in DOCUMENTS for span in code_spans(d) if re.match(r"(python|make) \S", span)]
    for path in (path for path in CODE if path.parent.name == "scripts"):
        usage = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        texts += [(name_of(path), line.strip()) for line in lines_of(usage) if line.startswith("    python ")]
    for source, text in texts:
        words: list[str] = []
        for word in (each.strip("[]") for each in [*shlex.split(text, comments=True), "&&"]):
            if word == "&&" and words:
                yield source, words
                words = []
            elif word not in ("&&", "..."):
                words.append(word)


def lines_of(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


@pytest.mark.slow
def test_python_examples_run_in_order(tmp_path: Path) -> None:
    """In one namespace, in a folder with the code and its settings."""
    pages = [ROOT / page for page in PAGES]
    assert {page for page in DOCUMENTS if blocks(text_of(page), "python")} == set(pages)
    script = "\n".join(block for page in pages for block in blocks(text_of(page), "python"))
    for shown, smaller in SMALLER.items():
        assert script.count(shown) == 1, f"the examples no longer say {shown}"
        script = script.replace(shown, smaller)
    for name in ("src", "config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "examples.py").write_text(script, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "examples.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    made = ("report.html", "jfk.srt", "exported/int8/model.bin", "exported/onnx/config.json")
    assert all((tmp_path / name).stat().st_size > 0 for name in made)
