"""Write docs/CONFIGURATION.md: every setting with its type, range, default and effect.

    python scripts/configuration_reference.py

Types, ranges and the defaults of keys that are left out come from the pydantic models, values and effects from
config.yaml and its comments. A test fails while the file is out of date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
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


def main() -> None:
    REFERENCE.write_text(configuration_reference(), encoding="utf-8")
    print(REFERENCE.relative_to(ROOT))


def configuration_reference() -> str:
    """Return the whole text of docs/CONFIGURATION.md."""
    text = CONFIG.read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    profiles = {name: flatten(preset or {}) for name, preset in tree.pop("profiles").items()}
    values, comments = flatten(tree), dict(read_comments(text))
    schema = Config.model_json_schema()
    sections: dict[str, list[str]] = {}
    for key, field in settings(schema, schema["$defs"]):
        default = [_shown(values[key])]
        default += [f"{name} {_shown(preset[key])}" for name, preset in profiles.items() if key in preset]
        if field["default"] != values[key]:
            default.append(f"left out {_shown(field['default'])}")
        cells = [f"`{key}`", describe(field), "; ".join(default), comments.get(key, "")]
        row = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        sections.setdefault(key.rpartition(".")[0].partition(".")[0], []).append(row)
    parts = [INTRODUCTION]
    for name, rows in sections.items():
        comment = comments.get(name, "")
        what = f"{comment[0].upper()}{comment[1:]}.\n\n" if comment else ""
        head = "| key | allowed | default | effect |\n|---|---|---|---|"
        parts.append(f"## {name or 'Top level'}\n\n{what}{head}\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def settings(
    schema: Mapping[str, Any], sections: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the dotted keys of a section and its subsections with their JSON schemas, in the order of the models."""
    for name, field in schema["properties"].items():
        if "$ref" in field:
            yield from settings(sections[field["$ref"].rsplit("/", 1)[-1]], sections, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def describe(field: Mapping[str, Any]) -> str:
    """Return type and range of a JSON schema in words."""
    if "anyOf" in field:
        return " or ".join(map(describe, field["anyOf"]))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of: {describe(field['items'])}"
    if "$ref" in field:
        return "mapping"
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


def _shown(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    main()
