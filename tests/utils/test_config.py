from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.utils.config import Config, flatten, load_config, load_profiles
from src.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_file_states_the_defaults_except_for_its_profile() -> None:
    shipped, default = (flatten(config.model_dump()) for config in (load_config(ROOT / "config.yaml"), Config()))
    differing = {key: value for key, value in shipped.items() if value != default[key]}
    assert differing == {"profile": "balanced"}  # profiles are in the file alone
    assert set(load_profiles(ROOT / "config.yaml")) == {"demo", "balanced", "production"}  # each is valid


@pytest.mark.parametrize(
    ("given", "code"),
    [("auto", None), (None, None), ("German", "de"), ("cmn", "zh"), (False, "no")],  # YAML reads `no` as false
)
def test_a_language_is_a_code_of_whisper_or_none(given: Any, code: str | None) -> None:
    config = load_config(None, overrides={"model.language": given})
    assert config.model.language == code
    assert yaml.safe_load(config.to_yaml())["model"]["language"] == code


def test_a_language_without_a_token_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.language: language 'rw' is unknown to Whisper"):
        load_config(None, overrides={"model.language": "rw"})


def test_profile_overrides_the_file_and_overrides_override_the_profile() -> None:
    path = ROOT / "config.yaml"
    assert load_config(path).model.variant == "base"
    assert load_config(path, profile="demo").model.variant == "tiny.en"
    config = load_config(path, profile="demo", overrides={"model.variant": "small", "training": {"epochs": 9}})
    assert (config.model.variant, config.training.epochs, config.training.batch_size) == ("small", 9, 8)


def test_every_problem_is_listed_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "sed: 1\nmodel: {variant: tinny}\ntraining: {epoch: 3, batch_size: many}\n"
        "data: {source: folder}\nprofiles: {fast: {training: {learning_rat: 1}}}\nprofile: fst\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    for part in (
        "sed: unknown key; did you mean 'seed'?",
        "'tinny'; did you mean 'tiny'?",
        "training.epoch: unknown key; did you mean 'epochs'?",
        "training.batch_size: Input should be a valid integer",
        "data: source 'folder' needs data.path",
        "profiles.fast.training.learning_rat: unknown key; did you mean 'learning_rate'?",
        "unknown profile 'fst'; did you mean 'fast'?",
    ):
        assert part in message
    assert message.count("did you mean 'seed'") == 1
    with pytest.raises(ConfigError, match=r"^6 problem"):  # those of the chosen profile once, too
        load_config(path, profile="fast", overrides={"seed": 1})


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"model": {"variant": "tiny.en", "language": "de"}}, "English only"),
        ({"model": {"variant": "tiny.en", "task": "translate"}}, "cannot translate"),
        ({"data": {"source": "sample", "path": "somewhere"}}, "takes no data.path"),
        ({"data": {"source": "parquet"}}, "needs data.path: a Parquet file"),
        ({"data": {"sources": ["folder", "parquet"], "path": "x"}}, "folder and parquet"),
        ({"data": {"sources": ["sample", "sample"]}}, "twice"),
        ({"data": {"source": "hub"}}, "data.hub.id"),
        ({"data": {"hub": {"config": "en"}}}, "one data set"),
        ({"data": {"min_duration_sec": 9, "max_duration_sec": 3}}, "below max_duration_sec"),
        ({"data": {"num_workers": -1}}, r"data\.num_workers"),
        ({"augmentation": {"speed_factors": [3.0]}}, r"speed_factors\.0"),
        ({"augmentation": {"min_snr_db": 30}}, "min_snr_db must not exceed"),
        ({"training": {"mix_shares": [1.0]}}, r"mix_shares\.0"),
        ({"training": {"freeze_encoder": -1}}, "a number of layers"),
        ({"training": {"freeze_encoder": 1, "method": "lora"}}, "method: full"),
        ({"guard": {"source": "folder"}}, "needs guard.path"),
        ({"guard": {"path": "x"}}, "takes no guard.path"),
    ],
)
def test_contradictions_are_refused(overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(None, overrides=overrides)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "no such file"), ("model: [", "not valid YAML"), ("3", "expected a mapping of sections"),
        ("profiles: 3", "a mapping of name to settings"), ("profiles: {fast: 3}", "a mapping of name to settings"),
        ("training: {epochs: 1}\nseed: 1\ntraining: {batch_size: 2}\n", r"'training'(.|\n)*line 3"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_named(tmp_path: Path, text: str | None, problem: str) -> None:
    if text is not None:
        (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"some\.yaml(.|\n)*{problem}"):
        load_config(tmp_path / "some.yaml")
    with pytest.raises(ConfigError, match="unknown profile 'demo'; known: none"):
        load_config(None, profile="demo")


def test_a_saved_configuration_loads_to_the_same(tmp_path: Path) -> None:
    config = load_config(ROOT / "config.yaml", profile="demo")
    saved = tmp_path / "saved.yaml"
    saved.write_text(config.to_yaml())
    assert load_config(saved) == config.model_copy(update={"profile": None})
    assert config.to_yaml().startswith("# profile: demo\n")


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(None).seed = 1  # type: ignore[misc]


def test_every_key_is_in_the_shipped_file_with_a_comment_and_read_somewhere_in_src() -> None:
    text = (ROOT / "config.yaml").read_text().split("\nprofiles:")[0]
    code = "\n".join(p.read_text() for p in (ROOT / "src").rglob("*.py") if p.name != "config.py")
    keys = set(flatten(Config().model_dump()))
    assert keys <= set(flatten(yaml.safe_load(text)))
    for leaf in {key.rpartition(".")[2] for key in keys}:
        assert re.search(rf"^\s*{leaf}:.*(#|\n)", text, re.M)
        assert leaf == "profile" or re.search(rf'[."]{leaf}\b', code), leaf  # its name is read by load_config itself
