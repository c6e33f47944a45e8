"""Write docs/CONFIGURATION.md: every setting with its type, range, default and effect.

    python scripts/configuration_reference.py [--check]

Types, ranges and the defaults of keys that are left out come from the pydantic models, values and effects from
config.yaml and its comments. With --check nothing is written, and the exit code is 1 if the file is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.utils.config import Config, flatten

CONFIG, REFERENCE = ROOT / "config.yaml", ROOT / "docs" / "CONFIGURATION.md"
INTRODUCTION = """<!-- Written by scripts/configuration_reference.py: edit config.yaml, src/utils/config.py -->
# Configuration

Every setting of [`config.yaml`](../config.yaml). The chosen profile overrides values of the file, and overrides take
precedence over both: `load_config(overrides={"training.epochs": 5})` in Python, `--set training.epochs=5` in scripts
that have it, the forms of the notebook. The default column shows the value in the file, then the value of a profile
that differs, then, as "left out", the value without the key or the file. Unknown keys, values out of range and settings
that contradict each other are all reported at once: see [Settings](TROUBLESHOOTING.md#settings).
"""
_TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`", "null": "`null`"}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


@dataclass(frozen=True)
class Setting:
    """One key.

    Attributes:
        key: dotted.
        allowed: type and range in words.
        left_out: the default of the model.
    """

    key: str
    allowed: str
    left_out: Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file is out of date")
    arguments = parser.parse_args()
    text, name = configuration_reference(), REFERENCE.relative_to(ROOT)
    if not arguments.check:
        REFERENCE.write_text(text, encoding="utf-8")
        print(name)
        return 0
    if REFERENCE.is_file() and REFERENCE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{name} is out of date; run: python scripts/configuration_reference.py", file=sys.stderr)
    return 1


def configuration_reference() -> str:
    """Return the whole text of docs/CONFIGURATION.md."""
    text = CONFIG.read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    profiles = {name: flatten(preset or {}) for name, preset in tree.pop("profiles").items()}
    values, comments = flatten(tree), dict(read_comments(text))
    schema = Config.model_json_schema()
    parts = [INTRODUCTION]
    sections: dict[str, list[Setting]] = {}
    for setting in settings(schema, schema["$defs"]):
        sections.setdefault(setting.key.partition(".")[0] if "." in setting.key else "", []).append(setting)
    for name, held in sections.items():
        what = f"{_sentence(comments[name])}\n\n" if comments.get(name) else ""
        rows = "\n".join(_row(setting, values, profiles, comments) for setting in held)
        head = "| key | allowed | default | effect |\n|---|---|---|---|"
        parts.append(f"## {name or 'Top level'}\n\n{what}{head}\n{rows}\n")
    return "\n".join(parts)


def settings(schema: Mapping[str, Any], sections: Mapping[str, Any], prefix: str = "") -> Iterator[Setting]:
    """Yield the keys of a section and its subsections, in the order of the models.

    Args:
        schema: JSON schema of the section.
        sections: the schemas that it refers to, by name.
        prefix: dotted key of the section, with a dot at the end.
    """
    for name, field in schema["properties"].items():
        if "$ref" in field:
            yield from settings(sections[field["$ref"].rsplit("/", 1)[-1]], sections, f"{prefix}{name}.")
        else:
            yield Setting(prefix + name, describe(field), field["default"])


def describe(field: Mapping[str, Any]) -> str:
    """Return type and range of a JSON schema in words."""
    if "anyOf" in field:
        return " or ".join(map(describe, field["anyOf"]))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of: {describe(field['items'])}"
    kind = "path" if field.get("format") == "path" else _TYPES[field["type"]]
    bounds = ", ".join(f"{word} {field[key]:g}" for key, word in _BOUNDS.items() if key in field)
    return f"{kind} ({bounds})" if bounds else kind


def read_comments(text: str) -> Iterator[tuple[str, str]]:
    """Yield each dotted key of a YAML text with the comment after it; keys without one are left out."""
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in node.value:
            is_block = isinstance(value, yaml.MappingNode) and not value.flow_style
            end = key.end_mark if is_block else value.end_mark
            comment = lines[end.line][end.column :].partition("# ")[2].strip()
            if comment:
                yield prefix + key.value, comment
            if is_block:
                yield from walk(value, f"{prefix}{key.value}.")

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    return walk(root, "")


def _row(
    setting: Setting, values: Mapping[str, Any], profiles: Mapping[str, Mapping[str, Any]], comments: Mapping[str, str]
) -> str:
    key = setting.key
    default = [_shown(values[key])]
    default += [f"{name} {_shown(preset[key])}" for name, preset in profiles.items() if key in preset]
    if setting.left_out != values[key]:
        default.append(f"left out {_shown(setting.left_out)}")
    cells = [f"`{key}`", setting.allowed, "; ".join(default), comments.get(key, "")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shown(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def _sentence(comment: str) -> str:
    return f"{comment[0].upper()}{comment[1:]}."


if __name__ == "__main__":
    sys.exit(main())
