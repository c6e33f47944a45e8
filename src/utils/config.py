"""The configuration: every setting with its type, range and default, and the file that it is read from.

A YAML file, a profile merged into it, and overrides merged into that are checked as a whole: all problems are reported
at once, each with the nearest valid key. `config.yaml` says the unit and effect of every setting; its values are the
defaults below, except for `profile`.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from src.utils.errors import ConfigError, DataError, did_you_mean, visible
from src.utils.files import expand_path, project_file
from src.utils.languages import parse_language

DEFAULT_CONFIG_PATH = Path("config.yaml")
MAX_AUDIO_SEC = 30.0  # the length of Whisper's position table
MAX_NUMBER, MAX_SEED = 2**31 - 1, 2**63 - 1
MAX_FILE_BYTES, MAX_DEPTH, MAX_NODES = 1 << 20, 20, 10_000  # of a YAML file; nodes with aliases written out
MAX_LISTED, MAX_FORMER, MAX_PROBLEM_CHARS = 30, 100, 250  # in an error


class Section(BaseModel):
    """A part of the configuration: frozen; unknown keys and huge or infinite numbers are refused, paths expanded."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _usable(cls, given: Any, parse: Callable[[Any], Any], info: ValidationInfo) -> Any:
        value = parse(given)
        if isinstance(given, bool) and type(value) in (int, float):
            raise ValueError(f"a number is needed, not {str(given).lower()}")
        limit = MAX_SEED if info.field_name == "seed" else MAX_NUMBER
        if isinstance(value, int | float) and abs(value) > limit:
            raise ValueError(f"larger than {limit}")
        if isinstance(value, str) and re.search(r"[\ud800-\udfff]", value):
            raise ValueError("half of a character (a surrogate); write the text in UTF-8")
        is_name = isinstance(value, str) and info.field_name in ("variant", "id")  # or the path of a folder
        if not isinstance(value, Path) and not (is_name and ("$" in value or value.startswith("~"))):
            return value
        try:
            return type(value)(expand_path(value))
        except ConfigError as err:
            raise ValueError(str(err)) from err


VARIANTS = (
    "tiny", "tiny.en", "base", "base.en", "small", "small.en", "medium", "medium.en", "distil", "large-v3-turbo"
)  # fmt: skip


class PathsConfig(Section):
    """Folders, relative to the working directory."""

    runs_dir: Path = Path("runs")
    checkpoints_dir: Path = Path("checkpoints")
    cache_dir: Path = Field(Path("~/.cache/whisper_asr"), validate_default=True)


class ModelConfig(Section):
    """Which weights, for which language, and how much audio the encoder sees."""

    variant: str = "base"
    language: str | None = None  # Whisper's code; None ("auto") is what rows say, else what the model hears
    task: Literal["transcribe", "translate"] = "transcribe"
    audio_context: Literal["auto", "dynamic", "full"] = "dynamic"

    @field_validator("variant")
    @classmethod
    def _known_variant(cls, value: str) -> str:
        if value not in VARIANTS and "/" not in value and not Path(value).exists():
            known = f"known: {', '.join(VARIANTS)}, or the path of a folder with a checkpoint"
            raise ValueError(f"unknown variant {value!r}{did_you_mean(value, VARIANTS)}; {known}")
        return value

    @field_validator("language", mode="before")
    @classmethod
    def _code_of_language(cls, value: Any) -> Any:
        value = "no" if value is False else value  # as YAML reads Norwegian's code
        if not isinstance(value, str):
            return value
        try:
            return None if value.strip().lower() == "auto" else parse_language(value)
        except DataError as err:
            raise ValueError(str(err)) from err

    @model_validator(mode="after")
    def _language_fits_variant(self) -> Self:
        name = self.variant.removesuffix(".en")
        if name != self.variant and self.language not in (None, "en"):
            wanted = self.language
            raise ValueError(f"variant {self.variant!r} knows English only, language is {wanted!r}; use {name!r}")
        if name != self.variant and self.task == "translate":
            raise ValueError(f"variant {self.variant!r} cannot translate; use {name!r}")
        return self


SourceName = Literal["sample", "folder", "minds14", "librispeech", "speechocean762", "common_voice", "parquet", "hub"]
HUB_SOURCES = frozenset({"minds14", "librispeech", "speechocean762", "hub"})
PATH_SOURCES = {
    "folder": "a folder with audio, and a CSV, TSV or JSONL in it",
    "common_voice": "an archive, or the folder with clips/ and train.tsv",
    "parquet": "a Parquet file or a folder of them",
}


class HubConfig(Section):
    """A data set on the Hugging Face Hub; for a named corpus, what to take instead of its defaults."""

    id: str | None = None
    config: str | None = None
    revision: str | None = None
    train_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    audio_column: str | None = None
    text_column: str | None = None


def _check_path(section: GuardConfig | ReplayConfig, key: str) -> None:
    needs_path = section.source in ("folder", "parquet")
    if needs_path and section.path is None:
        raise ValueError(f"{key}.source {section.source!r} needs {key}.path")
    if section.path is not None and not needs_path:
        raise ValueError(f"{key}.source {section.source!r} takes no {key}.path; set {key}.source: folder or parquet")


class SourceConfig(Section):
    """A source of utterances, and which of them are accepted."""

    source: SourceName = "sample"
    path: Path | None = None
    hub: HubConfig = HubConfig()
    max_train: int | None = Field(None, ge=1)
    max_validation: int | None = Field(None, ge=1)
    max_test: int | None = Field(None, ge=1)
    validation_fraction: float = Field(0.1, gt=0, lt=0.5)
    test_fraction: float = Field(0.1, gt=0, lt=0.5)
    min_duration_sec: float = Field(0.1, ge=0.1)
    max_duration_sec: float = Field(MAX_AUDIO_SEC, gt=0.1, le=MAX_AUDIO_SEC)
    cut: bool = False
    audio_track: int | None = Field(None, ge=1, le=255)
    label_case: Literal["auto", "keep", "lower", "sentence"] = "auto"
    on_error: Literal["raise", "skip"] = "raise"
    max_skip_fraction: float = Field(0.1, ge=0, le=1)

    @property
    def chosen_sources(self) -> tuple[SourceName, ...]:
        """The sources in the order in which they are tried."""
        return (self.source,)

    @model_validator(mode="after")
    def _options_fit_sources(self) -> Self:
        chosen = self.chosen_sources
        on_disk = [name for name in chosen if name in PATH_SOURCES]
        on_hub = [name for name in chosen if name in HUB_SOURCES]
        if len(set(chosen)) < len(chosen):
            raise ValueError("data.sources names a source twice; each can be tried once")
        if len(on_disk) > 1:
            raise ValueError(f"data.sources has {' and '.join(on_disk)}, but there is one data.path; keep one")
        if on_disk and self.path is None:
            raise ValueError(f"source {on_disk[0]!r} needs data.path: {PATH_SOURCES[on_disk[0]]}")
        if self.path is not None and chosen and not on_disk:
            raise ValueError(f"source {chosen[0]!r} takes no data.path; set data.source: {' or '.join(PATH_SOURCES)}")
        if "hub" in on_hub and self.hub.id is None:
            raise ValueError("source 'hub' needs data.hub.id, for example 'google/fleurs'")
        if self.hub != HubConfig() and chosen and len(on_hub) != 1:
            raise ValueError(f"data.hub describes one data set; of the sources, {len(on_hub)} are on the Hub")
        if self.min_duration_sec >= self.max_duration_sec:
            raise ValueError("min_duration_sec must be below max_duration_sec")
        return self


# what the sources of `data.mix` take from `data` where they do not say it themselves
_SHARED = (
    "validation_fraction", "test_fraction", "min_duration_sec", "max_duration_sec", "cut", "label_case", "on_error",
    "max_skip_fraction",
)  # fmt: skip
REPLAY = "replay"  # the name of general speech in `meta["source"]`


class MixedSourceConfig(SourceConfig):
    """One of several sources that are trained on together."""

    name: str | None = Field(None, pattern=r"^[^\s/\x00-\x1f]([^/\x00-\x1f]{0,58}[^\s/\x00-\x1f])?$")
    weight: float = Field(1.0, gt=0, le=100)

    @property
    def default_name(self) -> str:
        """The name of its folder, file or data set, else of the source."""
        parts = [self.hub.id.rpartition("/")[2] if self.hub.id else self.source, self.hub.config or ""]
        return visible(self.path.stem) if self.path is not None and self.path.stem else "-".join(filter(None, parts))


class ReplayConfig(Section):
    """General speech among the training examples, against forgetting; a number alone is its share."""

    share: float = Field(0.0, ge=0, le=0.5)
    source: Literal["auto", "sample", "librispeech", "folder", "parquet"] = "auto"
    path: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _share_alone(cls, value: Any) -> Any:
        return {"share": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _path_fits_source(self) -> Self:
        _check_path(self, "data.replay")
        return self


class DataConfig(SourceConfig):
    """Where utterances come from and which are accepted."""

    sources: tuple[SourceName, ...] = ()
    mix: tuple[MixedSourceConfig, ...] = Field((), max_length=50)
    replay: ReplayConfig = ReplayConfig()
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    cache_decoded: bool = False

    @property
    def chosen_sources(self) -> tuple[SourceName, ...]:
        """The sources in the order in which they are tried: `sources`, or `source` alone; none where they are mixed."""
        return () if self.mix else self.sources or (self.source,)

    @property
    def mixed(self) -> dict[str, MixedSourceConfig]:
        """The sources of `mix` by name: their own, or that of their data, numbered where several have the same."""
        taken = {each.name for each in self.mix}
        found: dict[str, MixedSourceConfig] = {}
        for each in self.mix:
            name, number = each.name or each.default_name, 2
            while each.name is None and (name in found or name in taken or name == REPLAY):
                name, number = f"{each.default_name}-{number}", number + 1
            found[name] = each
        return found

    @property
    def parts(self) -> dict[str | None, DataConfig]:
        """The settings of each source of `mix` by its name, as if it were alone; or of these, without a name."""
        if not self.mix:
            return {None: self}
        common = {"num_workers": self.num_workers, "cache_decoded": self.cache_decoded}
        return {
            name: DataConfig.model_validate({**each.model_dump(exclude={"name", "weight"}), **common})
            for name, each in self.mixed.items()
        }

    @property
    def label_cases(self) -> dict[str, Literal["auto", "keep", "lower", "sentence"]]:
        """`label_case` of each source that is mixed with others, by name; replay included."""
        cases = {name: each.label_case for name, each in self.mixed.items()}
        return {**cases, REPLAY: "auto"} if self.replay.share else cases

    @model_validator(mode="before")
    @classmethod
    def _share_with_mix(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping) or not isinstance(tree.get("mix"), list | tuple):
            return tree
        shared = {key: tree[key] for key in _SHARED if key in tree}
        mix = [{**shared, **each} if isinstance(each, Mapping) else each for each in tree["mix"]]
        return {**tree, "mix": mix}

    @model_validator(mode="after")
    def _mix_is_alone(self) -> Self:
        names = [each.name for each in self.mix if each.name is not None]
        if self.mix and self.sources:
            raise ValueError("data.mix trains on all of its sources, data.sources on the first available; set one")
        if self.mix and (self.path is not None or self.hub != HubConfig()):
            raise ValueError("each source of data.mix has its own path and hub; remove data.path and data.hub")
        if len(set(names)) < len(names) or REPLAY in names:
            raise ValueError(f"the names in data.mix must differ from one another and from {REPLAY!r}: {names}")
        return self


class CompositionConfig(Section):
    """Training examples that are more than one clip with its text."""

    no_speech_fraction: float = Field(0.0, ge=0, le=0.2)
    concatenate_prob: float = Field(0.0, ge=0, le=1)
    max_concatenated_sec: float = Field(MAX_AUDIO_SEC, gt=1, le=MAX_AUDIO_SEC)
    timestamp_prob: float = Field(0.0, ge=0, le=1)
    previous_text_prob: float = Field(0.0, ge=0, le=1)


class SpecAugmentConfig(Section):
    """Masks on the log-mel spectrogram (Park et al. 2019), over real frames only."""

    time_masks: int = Field(2, ge=0)
    max_time_mask_fraction: float = Field(0.05, ge=0, le=0.5)
    frequency_masks: int = Field(2, ge=0)
    max_frequency_mask_bins: int = Field(10, ge=0)


class AugmentationConfig(Section):
    """Changes of the training audio, drawn for each clip in each epoch; each is off at probability 0."""

    enabled: bool = True
    speed_factors: tuple[Annotated[float, Field(ge=0.5, le=2)], ...] = Field((0.9, 1.0, 1.1), min_length=1)
    pitch_prob: float = Field(0.2, ge=0, le=1)
    max_pitch_semitones: float = Field(2.0, ge=0, le=4)
    noise_prob: float = Field(0.2, ge=0, le=1)
    noise_dir: Path | None = None
    min_snr_db: float = 5.0
    max_snr_db: float = 25.0
    max_gain_db: float = Field(6.0, ge=0, le=20)
    room_prob: float = Field(0.0, ge=0, le=1)
    codec_prob: float = Field(0.0, ge=0, le=1)
    spec_augment_prob: float = Field(0.5, ge=0, le=1)
    spec_augment: SpecAugmentConfig = SpecAugmentConfig()

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        if self.min_snr_db > self.max_snr_db:
            raise ValueError("min_snr_db must not exceed max_snr_db")
        return self


class LoRAConfig(Section):
    """Low-rank adapters (Hu et al. 2021) on the model's linear layers, through PEFT."""

    rank: int = Field(32, ge=1)
    alpha: int = Field(64, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class TrainingConfig(Section):
    """The training loop."""

    epochs: int = Field(3, ge=1)
    batch_size: int = Field(16, ge=1)
    batch_seconds: Annotated[float, Field(gt=0)] | Literal["auto"] | None = None
    gradient_accumulation_steps: int = Field(1, ge=1)
    method: Literal["auto", "full", "lora"] = "auto"
    lora: LoRAConfig = LoRAConfig()
    freeze_encoder: bool | int = False
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    learning_rate: float | None = Field(None, gt=0)
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    grad_spike_factor: float = Field(10.0, gt=1)
    max_nonfinite_steps: int = Field(10, ge=1)
    patience: int | None = Field(None, ge=1)
    full_context_prob: float = Field(0.1, ge=0, le=1)
    prefix_prob: float = Field(0.0, ge=0, le=1)
    max_trailing_silence_sec: float = Field(1.0, ge=0, le=5)
    gradient_checkpointing: bool = False
    compile: bool = False
    shard_model: bool = False
    fp16_initial_scale: float = Field(1024.0, gt=0)
    fp16_growth_interval: int = Field(2000, ge=1)
    mix_shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.25, 0.5, 0.75)

    @model_validator(mode="after")
    def _freezing_fits_method(self) -> Self:
        if self.freeze_encoder < 0:
            raise ValueError(f"freeze_encoder is {self.freeze_encoder}; give true, false, or a number of layers")
        if self.method == "lora" and self.freeze_encoder:
            raise ValueError("freeze_encoder is for method: full; method: lora freezes all full weights already")
        return self


class CheckpointsConfig(Section):
    """Periodic checkpoints and their copy in another folder."""

    save_minutes: float | None = Field(10.0, ge=0)
    save_total_limit: int = Field(2, ge=1)
    mirror_dir: Path | None = None
    mirror_mb_per_sec: float = Field(25.0, gt=0)


class TrackingConfig(Section):
    """Where a run is recorded in addition to its own metrics.jsonl."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    project: str = "whisper_asr"


class GuardConfig(Section):
    """Speech from elsewhere, on which fine-tuning must not make the model worse."""

    source: Literal["auto", "none", "clip", "librispeech", "folder", "parquet"] = "auto"
    path: Path | None = None
    max_clips: int = Field(100, ge=1)

    @model_validator(mode="after")
    def _path_fits_source(self) -> Self:
        _check_path(self, "guard")
        return self


class EvaluationConfig(Section):
    """How rates are measured."""

    bootstrap_samples: int = Field(2000, ge=100)
    confidence: float = Field(0.95, gt=0.5, lt=1)


class InferenceConfig(Section):
    """Decoding of files; evaluation uses the batch size, beams, pause and token cap as well."""

    engine: Literal["auto", "torch", "ctranslate2"] = "auto"
    compute_type: str = "auto"
    batch_size: int = Field(16, ge=1)
    num_beams: int = Field(1, ge=1)
    trailing_silence_sec: float = Field(0.5, ge=0, le=5)
    max_tokens_per_sec: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    temperatures: tuple[Annotated[float, Field(ge=0, le=2)], ...] = Field((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), min_length=1)
    compression_ratio_threshold: float | None = Field(2.4, gt=1)
    logprob_threshold: float | None = Field(None, lt=0)
    no_speech_threshold: float | None = Field(0.6, gt=0, lt=1)
    max_segment_sec: float = Field(28.0, ge=2, le=29.5)
    join_pause_sec: float | None = Field(None, ge=0)
    initial_prompt: str = ""
    hotwords: str = ""
    hotword_strength: float = Field(3.0, ge=0, le=20)


class VADConfig(Section):
    """silero-vad."""

    threshold: float = Field(0.5, gt=0, lt=1)
    min_silence_sec: float = Field(0.5, gt=0)
    min_speech_sec: float = Field(0.1, ge=0)
    pad_sec: float = Field(0.1, ge=0)


class StreamingConfig(Section):
    """The streaming state machine."""

    policy: Literal["alignatt", "local_agreement", "chunk_merge"] = "alignatt"
    guard_sec: float = Field(0.55, ge=0, le=3)
    display_guard_sec: float = Field(0.2, ge=0, le=3)
    end_of_turn_sec: float = Field(0.3, gt=0, le=3)
    min_chunk_sec: float = Field(0.3, ge=0.1, le=5)
    buffer_sec: float = Field(12.0, ge=2, le=MAX_AUDIO_SEC - 1)
    max_prompt_tokens: int = Field(0, ge=0, le=223)


class Config(Section):
    """The whole configuration."""

    profile: str | None = None
    seed: int = Field(42, ge=0)
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    paths: PathsConfig = PathsConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    composition: CompositionConfig = CompositionConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    tracking: TrackingConfig = TrackingConfig()
    guard: GuardConfig = GuardConfig()
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
        path: YAML file; None takes the defaults alone. Where the working folder has no config.yaml, the project's.
        profile: name under the file's `profiles:`; takes precedence over the file's own `profile:` key.
        overrides: nested (`{"training": {"epochs": 1}}`) or dotted (`{"training.epochs": 1}`), applied last.

    Raises:
        ConfigError: if the file is absent or not YAML, or any key is unknown, mistyped or contradictory; lists all.
    """
    tree = {} if path is None else _read_yaml(path)
    profiles = tree.pop("profiles", None) or {}
    problems = []
    if not isinstance(profiles, dict) or not all(isinstance(preset, dict | None) for preset in profiles.values()):
        problems.append("profiles: expected a mapping of name to settings")
    else:
        shared, chosen = set(_problems(tree)), profile or tree.get("profile")
        chosen = chosen if isinstance(chosen, str) else None  # else one of the problems
        for name, preset in profiles.items():  # a typo in a profile that is not chosen is still a typo
            found = _problems(_merge(tree, preset or {})) if name != chosen else []
            problems += [f"profiles.{name}.{problem}" for problem in found if problem not in shared]
        if chosen in profiles:
            tree = _merge(tree, {**(profiles[chosen] or {}), "profile": chosen})
        elif chosen is not None:
            hint, known = did_you_mean(str(chosen), list(profiles)), ", ".join(profiles) or "none"
            problems.append(f"profile: unknown profile {chosen!r}{hint}; known: {known}")

    for key, value in (overrides or {}).items():
        for part in reversed(str(key).split(".")):
            value = {part: value}
        tree = _merge(tree, value)
    if problems := _problems(tree) + problems:
        where = f" in {str(path)[:500]}" if path is not None else ""
        shown = problems[:MAX_LISTED]  # and every key of before, each with where it is set today
        shown += [p for p in problems[MAX_LISTED:] if "; today: " in p or "; gone: " in p][:MAX_FORMER]
        listed = [p if len(p) <= MAX_PROBLEM_CHARS else f"{p[:MAX_PROBLEM_CHARS]}..." for p in shown]
        more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise ConfigError("\n  - ".join([f"{len(problems)} problem(s){where}:", *listed, *more]))
    return Config.model_validate(tree)


def load_profiles(path: str | Path = DEFAULT_CONFIG_PATH) -> dict[str, Config]:
    """Load a configuration once for each of its profiles, by name; raises `ConfigError` as `load_config` does."""
    names = _read_yaml(path).get("profiles") or {}
    return {name: load_config(path, profile=name) for name in names}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree of settings by dotted key, as `load_config` takes them; `prefix` ends in a dot."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _read_yaml(given: str | Path) -> dict[str, Any]:
    path = expand_path(given)
    if path == DEFAULT_CONFIG_PATH and not path.exists():
        path = project_file(path.name)
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: not a file; pass the path of a YAML file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as err:
        raise ConfigError(f"{path}: no such file; run from the repository's folder or pass its path") from err
    except OSError as err:
        raise ConfigError(f"{str(path)[:500]}: cannot be read: {err.strerror}; check the path") from err
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MB, which no configuration is; check the path")
    try:
        tree = parse_yaml(data.decode("utf-8-sig"))
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: not UTF-8 (byte {err.start}); save it again as UTF-8") from err
    except ConfigError as err:
        raise ConfigError(f"{path}: {err}") from err
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return tree or {}


def parse_yaml(text: str) -> Any:
    """Parse one YAML document of plain data; raises `ConfigError` if it is not, or is built to be large."""
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as err:
        raise ConfigError(f"not valid YAML: {str(err)[:1000] or type(err).__name__}") from err


class _PlainLoader(yaml.SafeLoader):
    """Refuses keys that occur twice (YAML takes the last) or are no text, deep nesting, and aliases that multiply."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._composed = 0  # the second counts aliases, too
        self._sizes: dict[int, int] = {}  # nodes below a node, with aliases written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._composed += 1
        if self._depth > MAX_DEPTH or self._composed > MAX_NODES:
            is_deep = self._depth > MAX_DEPTH
            limit = f"nested deeper than {MAX_DEPTH} levels" if is_deep else f"more than {MAX_NODES} values"
            raise yaml.composer.ComposerError(None, None, limit, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and id(node) not in self._sizes:  # else an alias
            below = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
            below = [] if isinstance(node, yaml.ScalarNode) else below
            size = 1 + sum(self._sizes.get(id(part), MAX_NODES) for part in below)  # unknown: it contains itself
            if size > MAX_NODES:
                raise yaml.composer.ComposerError(
                    None, None, f"more than {MAX_NODES} values, with aliases written out", node.start_mark
                )
            self._sizes[id(node)] = size
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key, _ in node.value:
                is_text = key.tag in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
                if not is_text or key.value in keys:
                    problem = "occurs twice" if is_text else "is no text; quote it"
                    shown = f"the key {str(key.value)[:100]!r} {problem}"
                    raise yaml.constructor.ConstructorError(None, None, shown, key.start_mark)
                keys.add(key.value)
        return node


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
        errors: list[dict[str, Any]] = [dict(error) for error in err.errors()]
        found = [problem for error in errors[:MAX_FORMER] for problem in _describe(error)]
        return found + [".".join(map(str, error["loc"])) for error in errors[MAX_FORMER:]]  # counted, not shown
    return []


def _describe(error: dict[str, Any]) -> list[str]:
    *parents, leaf = map(str, error["loc"] or ("config",))
    dotted = ".".join([*parents, leaf])
    if error["type"] == "extra_forbidden":
        section: type[BaseModel] = Config
        for part in parents:
            if not part.isdigit():  # else the place in a list
                kind: Any = section.model_fields[part].annotation
                section = get_args(kind)[0] if get_args(kind) else kind
        return _describe_unknown(dotted, error["input"], list(section.model_fields))
    try:
        given = "" if error["type"] == "value_error" else f" (given: {repr(error['input'])[:100]})"
    except ValueError:  # Python writes no integer of more than 4,300 digits
        given = ""
    return [f"{dotted}: {error['msg'].removeprefix('Value error, ')}{given}"]


def _describe_unknown(dotted: str, value: Any, siblings: list[str]) -> list[str]:
    """Say where an unknown key is set today, or its nearest sibling; of a whole section this for each of its keys."""
    name = dotted.rpartition(".")[2]
    all_former, typo = former_keys(), did_you_mean(name, siblings)
    former = all_former.get(dotted) or all_former.get(name)
    if former is None and not typo:
        if isinstance(value, Mapping) and value:
            below = [(f"{dotted}.{key}", each) for key, each in [*value.items()][:MAX_FORMER]]
            return [line for key, each in below for line in _describe_unknown(key, each, [])]
        keys = _keys_by_name()
        near = [name] if name in keys else difflib.get_close_matches(name, [*keys, *all_former], 1, cutoff=0.75)
        # where several sections have the name, the one whose name is in the key, too
        for each in near:
            shared = {key: len({*key.split(".")} & {*dotted.split(".")}) for key in keys.get(each, ())}
            former = max(shared, key=shared.__getitem__) if shared else all_former[each]
    if former is None:
        return [f"{dotted}: unknown key{typo}"]
    return [f"{dotted}: unknown key; " + (f"gone: {former[1:-1]}" if former.startswith("(") else f"today: {former}")]


@functools.cache
def former_keys() -> dict[str, str]:
    """Return where settings of earlier versions and other toolkits are set today, or in brackets why they are gone."""
    text = Path(__file__).with_name("former_settings.yaml").read_text(encoding="utf-8")
    return {name: today for today, names in parse_yaml(text).items() for name in names.split()}


@functools.cache
def _keys_by_name() -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for key in flatten(Config().model_dump()):
        keys.setdefault(key.rpartition(".")[2], []).append(key)
    return keys
