"""One configuration: a YAML file, a profile laid over it, overrides laid over that, checked as a whole.

Defaults live in the models of `config_schema` alone. All problems are reported at once, with the nearest valid key,
because a user who waits for a GPU should not meet them one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from src.utils.config_schema import Config
from src.utils.errors import ConfigError, did_you_mean

__all__ = ["DEFAULT_CONFIG_PATH", "Config", "flatten", "load_config", "load_profiles"]

DEFAULT_CONFIG_PATH = Path("config.yaml")


def load_config(
    path: str | Path | None = DEFAULT_CONFIG_PATH,
    *,
    profile: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Load, merge and check a configuration.

    Args:
        path: YAML file; None takes the defaults alone.
        profile: name under the file's `profiles:`; overrides the file's own `profile:` key.
        overrides: nested (`{"training": {"epochs": 1}}`) or dotted (`{"training.epochs": 1}`), applied last.
    Returns: a frozen `Config`.
    Raises: ConfigError: file absent, not YAML, or any key unknown, mistyped or contradictory; all are listed.
    """
    tree = {} if path is None else _read_yaml(Path(path))
    profiles = tree.pop("profiles", None) or {}
    problems = [] if isinstance(profiles, dict) else ["profiles: expected a mapping of name to settings"]
    if not problems:
        for name, preset in profiles.items():  # a typo in the profile not chosen today is still a typo
            problems += [f"profiles.{name}.{p}" for p in _problems(_merge(tree, {**(preset or {}), "profile": name}))]
        chosen = profile or tree.get("profile")
        if chosen is not None and chosen not in profiles:
            problems.append(
                f"profile: unknown profile {chosen!r}{did_you_mean(str(chosen), list(profiles))}; "
                f"known: {', '.join(profiles) or 'none'}"
            )
        elif chosen is not None:
            tree = _merge(tree, {**(profiles[chosen] or {}), "profile": chosen})
    merged = _merge(tree, _nest(overrides or {}))
    own = _problems(merged)
    # a fault of the shared part shows under every profile: say it once, under its own name
    problems = own + [p for p in problems if not any(p.endswith("." + o) for o in own)]
    if problems:
        where = f" in {path}" if path is not None else ""
        raise ConfigError("\n  - ".join([f"{len(problems)} problem(s){where}:", *problems]))
    return Config.model_validate(merged)


def load_profiles(path: str | Path = DEFAULT_CONFIG_PATH) -> dict[str, Config]:
    """Load a configuration under each of the profiles that it names, by name.

    Raises: ConfigError: as `load_config`.
    """
    names = _read_yaml(Path(path)).get("profiles") or {}
    return {name: load_config(path, profile=name) for name in names}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree of settings by dotted key, as `load_config` takes them.

    Args:
        prefix: put before each key, with its dot.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise ConfigError(f"{path}: no such file; run from the repository's folder or pass its path") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: not valid YAML: {err}") from err
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return tree


def _nest(overrides: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in overrides.items():
        *parents, leaf = key.split(".")
        branch: dict[str, Any] = {leaf: value}
        for parent in reversed(parents):
            branch = {parent: branch}
        nested = _merge(nested, branch)
    return nested


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_maps = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both_maps else value
    return merged


def _problems(tree: Mapping[str, Any]) -> list[str]:
    try:
        Config.model_validate(tree)
    except ValidationError as err:
        return [_describe(dict(e)) for e in err.errors()]
    return []


def _describe(error: dict[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    dotted = ".".join(location) or "config"
    if error["type"] == "extra_forbidden":
        return f"{dotted}: unknown key{did_you_mean(location[-1], _keys_at(location[:-1]))}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f" (given: {error['input']!r})"
    return f"{dotted}: {message}{given}"


def _keys_at(location: list[str]) -> list[str]:
    section: type[BaseModel] = Config
    for part in location:
        section = section.model_fields[part].annotation  # type: ignore[assignment]
    return list(section.model_fields)
