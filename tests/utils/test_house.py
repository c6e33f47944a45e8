"""The order of the house: which package may import which, what an import costs, what Colab would have to replace."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from src.data.sources.catalog import SAMPLES_DIR
from src.data.sources.hub import CORPORA
from src.models.weights import HUB_REPOSITORIES, PACKAGED_MODELS

ROOT = Path(__file__).resolve().parents[2]
ORDER = ["utils", "data", "models", "inference", "evaluation", "training"]
MAX_FLOORS = 8  # modules in the longest chain of imports within a package


def modules() -> dict[str, Path]:
    """All modules of `src` by dotted name; a package goes by its own name."""
    found = (ROOT / "src").rglob("*.py")
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in found}


def stubs() -> dict[str, str]:
    """The module that each public name of a package comes from, by dotted name."""
    found: dict[str, str] = {}
    for path in (ROOT / "src").rglob("*.pyi"):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                found |= {f"{package}.{alias.name}": f"{package}.{node.module}" for alias in node.names}
    return found


def imports_of(path: Path, known: dict[str, Path], public: dict[str, str]) -> set[str]:
    """The modules of `src` that a module imports anywhere: at the top, for types only, or within a function."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {public.get(n, n if n in known else str(node.module)) for n in names}
    return imported & known.keys()


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """What each module of `src` imports."""
    known, public = modules(), stubs()
    return {name: imports_of(path, known, public) for name, path in known.items()}


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package: str, graph: dict[str, set[str]]) -> None:
    allowed = set(ORDER[: ORDER.index(package) + 1])
    for name, imported in graph.items():
        if name.split(".")[1:2] == [package]:
            assert {other.split(".")[1] for other in imported} <= allowed, name


def test_no_module_imports_itself_through_others(graph: dict[str, set[str]]) -> None:
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("package", ORDER)
def test_a_package_has_at_most_eight_floors(package: str, graph: dict[str, set[str]]) -> None:
    inside = {name: {other for other in imported if other.startswith(f"src.{package}.")}
              for name, imported in graph.items() if name.startswith(f"src.{package}.")}  # fmt: skip
    floors: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(inside).static_order():
        floors[name] = 1 + max((floors[other] for other in inside[name]), default=0)
    assert max(floors.values()) <= MAX_FLOORS, sorted(floors.items(), key=lambda item: item[1])


def test_import_src_loads_no_torch() -> None:
    code = "import sys, src; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_library_never_prints() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path


@pytest.mark.parametrize("version", ["3.11", "3.13"])
def test_requirements_replace_nothing_that_colab_ships(version: str) -> None:
    colab = ROOT / "tests" / "data" / "colab_packages.txt"
    done = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-annotate", "--no-header",
         "--python-version", version, "-c", str(colab), str(ROOT / "requirements.txt")],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shipped = dict(line.split("==") for line in colab.read_text().splitlines() if "==" in line)
    resolved = dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.M))
    assert resolved["torch"] == shipped["torch"]
    replaced = {n: v for n, v in resolved.items() if n in shipped and shipped[n] != v}
    assert not replaced


def test_constraints_hold_colabs_versions() -> None:
    colab = (ROOT / "tests" / "data" / "colab_packages.txt").read_text()
    shipped = {n.lower(): v for n, v in re.findall(r"^([\w.-]+)==(\S+)", colab, re.M)}
    pinned = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert len(pinned) > 100
    assert not [(n, v) for n, v in pinned if n.lower() in shipped and shipped[n.lower()] != v]


def test_setup_installs_the_tested_set_by_its_hashes() -> None:
    pin = re.compile(r"^([\w.-]+)==([^\s;]+)", re.M)
    lock = (ROOT / "requirements-dev.lock").read_text()
    assert pin.findall(lock) == pin.findall((ROOT / "constraints.txt").read_text())
    demo = (ROOT / "requirements-demo.lock").read_text()
    for entry in (*re.split(r"\n(?=\w)", lock)[1:], *re.split(r"\n(?=\w)", demo)[1:]):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry[:80]
    assert "--require-hashes -r requirements-dev.lock" in (ROOT / "Makefile").read_text()


def test_whatever_comes_with_the_project_has_its_licence_in_the_table() -> None:
    table = (ROOT / "docs" / "LICENCES.md").read_text()
    packaged = {name for model in PACKAGED_MODELS.values() for name, _ in model.distributions}
    bundled = {path.name for path in SAMPLES_DIR.iterdir() if path.suffix != ".md"} | {"english_spelling.json"}
    corpora = {corpus.id for corpus in CORPORA.values()}
    for name in (*packaged, *bundled, *corpora, *HUB_REPOSITORIES.values(), "silero-vad"):
        assert f"`{name}`" in table, name
