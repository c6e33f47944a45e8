"""The order of the house: which package may import which, what an import costs, what Colab would have to replace."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ORDER = ["utils", "data", "models", "inference", "evaluation", "training"]


def imported_packages(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("src.")}
    return found


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package: str) -> None:
    allowed = set(ORDER[: ORDER.index(package) + 1])
    for path in (ROOT / "src" / package).rglob("*.py"):
        assert imported_packages(path) <= allowed, path


def modules() -> dict[str, Path]:
    """All modules of `src` by dotted name; a package goes by its own name."""
    found = (ROOT / "src").rglob("*.py")
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in found}


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of `src` that a module imports when it is imported itself."""
    imported: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= (names & known.keys()) or {node.module}
    return imported & known.keys()


def test_no_module_imports_itself_through_others() -> None:
    known = modules()
    sorter = graphlib.TopologicalSorter({name: imports_of(path, known) for name, path in known.items()})
    sorter.prepare()  # raises CycleError, which names the modules


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
