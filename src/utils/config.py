"""One configuration: a YAML file, a profile laid over it, overrides laid over that, checked as a whole.

Defaults live in these models alone. All problems are reported at once, with the nearest valid key, because a user who
waits for a GPU should not meet them one by one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from src.utils.errors import ConfigError

Variant = Literal[
    "tiny", "tiny.en", "base", "base.en", "small", "small.en", "medium", "medium.en", "distil", "large-v3-turbo"
]
VARIANTS: tuple[str, ...] = get_args(Variant)
DEFAULT_CONFIG_PATH = Path("config.yaml")
MAX_AUDIO_SEC = 30.0  # the length of Whisper's position table


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class PathsConfig(_Section):
    """Folders, relative to the working directory."""

    runs_dir: Path = Path("runs")
    checkpoints_dir: Path = Path("checkpoints")
    cache_dir: Path = Field(Path("~/.cache/whisper_asr"), validate_default=True)

    @field_validator("cache_dir")
    @classmethod
    def _expand_home(cls, value: Path) -> Path:
        return value.expanduser()


class ModelConfig(_Section):
    """Which weights, for which language, and how much audio the encoder sees."""

    variant: str = "tiny.en"
    language: str | None = None
    task: Literal["transcribe", "translate"] = "transcribe"
    audio_context: Literal["dynamic", "full"] = "dynamic"

    @field_validator("variant")
    @classmethod
    def _known_variant(cls, value: str) -> str:
        if value in VARIANTS or "/" in value or Path(value).exists():
            return value
        raise ValueError(
            f"unknown variant {value!r}{did_you_mean(value, VARIANTS)}; known: {', '.join(VARIANTS)}, "
            "or the path of a folder with a checkpoint"
        )

    @model_validator(mode="after")
    def _language_fits_variant(self) -> ModelConfig:
        if not self.variant.endswith(".en"):
            return self
        if self.language not in (None, "en"):
            raise ValueError(
                f"variant {self.variant!r} knows English only, language is {self.language!r}; "
                f"use {self.variant.removesuffix('.en')!r}"
            )
        if self.task == "translate":
            raise ValueError(f"variant {self.variant!r} cannot translate; use {self.variant.removesuffix('.en')!r}")
        return self


class DataConfig(_Section):
    """Where utterances come from and which are allowed in."""

    source: Literal["sample", "folder"] = "sample"
    path: Path | None = None
    max_train: int | None = Field(None, ge=1)
    max_validation: int | None = Field(None, ge=1)
    max_test: int | None = Field(None, ge=1)
    validation_fraction: float = Field(0.1, gt=0, lt=0.5)
    test_fraction: float = Field(0.1, gt=0, lt=0.5)
    min_duration_sec: float = Field(0.1, ge=0.1)
    max_duration_sec: float = Field(MAX_AUDIO_SEC, gt=0.1, le=MAX_AUDIO_SEC)
    label_case: Literal["auto", "keep", "lower", "sentence"] = "auto"
    on_error: Literal["raise", "skip"] = "raise"
    max_skip_fraction: float = Field(0.1, ge=0, le=1)
    num_workers: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _path_fits_source(self) -> DataConfig:
        if self.source == "folder" and self.path is None:
            raise ValueError("source 'folder' needs data.path: a folder with audio, and a CSV, TSV or JSONL in it")
        if self.source == "sample" and self.path is not None:
            raise ValueError("source 'sample' is bundled and takes no data.path; set data.source: folder")
        if self.min_duration_sec >= self.max_duration_sec:
            raise ValueError("min_duration_sec must be below max_duration_sec")
        return self


class TrainingConfig(_Section):
    """The loop."""

    epochs: int = Field(3, ge=1)
    batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    full_context_prob: float = Field(0.0, ge=0, le=1)
    max_trailing_silence_sec: float = Field(1.0, ge=0, le=5)


class EvaluationConfig(_Section):
    """How rates are measured."""

    bootstrap_samples: int = Field(2000, ge=100)
    confidence: float = Field(0.95, gt=0.5, lt=1)


class InferenceConfig(_Section):
    """Decoding of files; evaluation uses the same."""

    batch_size: int = Field(16, ge=1)
    num_beams: int = Field(1, ge=1)
    trailing_silence_sec: float = Field(0.5, ge=0, le=5)
    max_tokens_per_sec: float = Field(10.0, gt=0)


class VADConfig(_Section):
    """silero-vad."""

    threshold: float = Field(0.5, gt=0, lt=1)
    min_silence_sec: float = Field(0.5, gt=0)
    min_speech_sec: float = Field(0.1, ge=0)
    pad_sec: float = Field(0.1, ge=0)


class StreamingConfig(_Section):
    """The streaming state machine."""

    policy: Literal["local_agreement"] = "local_agreement"
    min_chunk_sec: float = Field(0.8, ge=0.1, le=5)
    buffer_sec: float = Field(12.0, ge=2, le=MAX_AUDIO_SEC - 1)
    max_prompt_tokens: int = Field(0, ge=0, le=223)


class Config(_Section):
    """The whole configuration."""

    profile: str | None = None
    seed: int = Field(42, ge=0)
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    paths: PathsConfig = PathsConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    inference: InferenceConfig = InferenceConfig()
    vad: VADConfig = VADConfig()
    streaming: StreamingConfig = StreamingConfig()

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML that `load_config` accepts; the profile is merged in already."""
        tree = self.model_dump(mode="json", exclude={"profile"})
        return f"# profile: {self.profile}\n{yaml.safe_dump(tree, sort_keys=False)}"


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


def did_you_mean(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


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
