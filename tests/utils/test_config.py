from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from src.utils.config import Config, flatten, former_keys, load_config, load_profiles
from src.utils.errors import ConfigError, DataError
from src.utils.runtime import set_seed

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_file_states_the_defaults_except_for_its_profile() -> None:
    shipped, default = (flatten(config.model_dump()) for config in (load_config(ROOT / "config.yaml"), Config()))
    differing = {key: value for key, value in shipped.items() if value != default[key]}
    own = yaml.safe_load((ROOT / "config.yaml").read_text())["profiles"]["balanced"]  # profiles are in the file alone
    assert differing == {"profile": "balanced", **flatten(own)}
    assert set(load_profiles(ROOT / "config.yaml")) == {"demo", "balanced", "production"}  # each is valid


def test_every_profile_has_the_recipe() -> None:
    profiles = [load_config(ROOT / "config.yaml", profile=name) for name in ("demo", "balanced", "production")]
    shares = [(config.composition, config.training.prefix_prob) for config in profiles]
    assert shares == shares[:1] * 3
    assert shares[0][0].timestamp_prob > 0


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


def bomb(levels: int) -> str:
    rows = ["x: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"y{i}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]" for i in range(levels)]
    return "\n".join([*rows, f"training: {{epochs: *{chr(97 + levels)}}}"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("training:\n  epochs: 1\n  epochs: 2\n", r"'epochs' occurs twice(.|\n)*line 3"),
        ("profiles: {a: {training: {lora: {rank: 1, rank: 2}}}}", "'rank' occurs twice"),
        ("augmentation: {spec_augment: {time_masks: 1, 'time_masks': 2}}", "'time_masks' occurs twice"),
        ("training: {learning_rate: .inf}", r"training\.learning_rate: .*finite"),
        ("training: {epochs: -.inf}", r"training\.epochs: .*finite"),
        ("augmentation: {speed_factors: [1.0, .nan]}", r"speed_factors\.1: .*finite"),
        ("augmentation: {max_snr_db: .inf}", r"max_snr_db: .*finite"),
        ("inference: {logprob_threshold: -.inf}", r"logprob_threshold: .*finite"),
        ("training: {learning_rate: 1.0e+999}", r"learning_rate: .*finite"),
        ("training: {epochs: 100000000000000000000000000}", r"training\.epochs: larger than 2147483647"),
        ("training: {freeze_encoder: 100000000000000000000000000}", "freeze_encoder: larger than"),
        ("data: {num_workers: 100000000000000000000000000}", "num_workers: larger than"),
        ("training: {weight_decay: 1.0e+300}", "weight_decay: larger than"),
        ("seed: 9223372036854775808", "seed: larger than 9223372036854775807"),
        ("training: {epochs: " + "9" * 5000 + "}", "not valid YAML"),
        ("seed: 0x" + "f" * 5000, "seed: larger than"),
        (bomb(2), r"training\.epochs: Input should be a valid integer"),
        (bomb(6), "more than 10000 values"),
        (bomb(20), "more than 10000 values"),
        ("a: &a {k: 1}\n" + "".join(f"{y}: &{y} {{<<: [{','.join(['*' + x] * 9)}]}}\n"
                                     for x, y in zip("abcdef", "bcdefg", strict=True)), "more than 10000 values"),
        ("".join(f"k{i}: 1\n" for i in range(60_000)), "more than 10000 values"),
        ("a: &a x\nb: [" + "*a," * 200_000 + "*a]", "more than 10000 values"),
        ("training: {epochs: true}", r"training\.epochs: a number is needed, not true"),
        ("seed: no", "seed: a number is needed, not false"),
        ("[" * 5000 + "]" * 5000, "nested deeper than 20"), ("{a: " * 5000, "nested deeper"), ("- " * 3000, "nested"),
        ("training: &a {epochs: *a}", r"training\.epochs"), ("a: &a [*a]", "a: unknown key"),
        ("1: 2", "key '1' is no text"), ("null: 2", "is no text"), ("? [a]\n: b", "is no text"),
        ("!!python/object/apply:os.system [id]", "not valid YAML"), ("a: 2001-99-99", "not valid YAML"),
        ("!!int ''", "not valid YAML"), ("!!bool maybe", "not valid YAML"), ("!!timestamp x", "not valid YAML"),
        ("profile: [1]", "profile: Input should be a valid string"), ("profiles: {1: {}}", "is no text"),
        ("a: 1\n---\nb: 2", "not valid YAML"), ("training: \x00", "not valid YAML"),
        (b"seed: \xff", "not UTF-8 .byte 6"),
        ("seed: 1\n".encode("utf-16"), "not UTF-8"), (b"x" * (1 << 21), "larger than 1 MB"),
        ("\n".join(f"key{i}: 1" for i in range(2000)), r"^2000 problem(.|\n)*and 1970 more"),
        ("training: {epochs: '" + "x" * 500_000 + "'}", r"training\.epochs"), ("*" + "a" * 500_000, "undefined alias"),
        ("? " + "k" * 500_000 + "\n: 1", "unknown key|kkk"),
        ('inference: {hotwords: "\\ud800"}', "half of a character"),
        ('paths: {runs_dir: "a\\0b"}', r"paths\.runs_dir: .*no file"),
        ('paths: {runs_dir: "a\\ud800"}', r"paths\.runs_dir: .*no file"),
    ],
)  # fmt: skip
def test_hostile_files_are_refused_in_few_words(tmp_path: Path, text: str | bytes, problem: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=problem) as caught:
        load_config(path)
    assert "hostile.yaml" in str(caught.value)
    assert len(str(caught.value).encode()) <= 10_000


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    for path in (
        tmp_path,
        tmp_path / "pipe",
        "/dev/zero",
        tmp_path / "file" / "x",
        "x" * 5000,
        "a\0b",
        "~/absent.yaml",
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert len(str(caught.value)) < 1000


def test_aliases_and_merges_of_a_person_work(tmp_path: Path) -> None:
    path = tmp_path / "aliases.yaml"
    path.write_text(
        "profiles:\n  slow: &slow {training: &t {epochs: 7, batch_size: 2}}\n"
        "  slower: {<<: *slow, training: {<<: *t, epochs: 9}}\nprofile: slower\n"
    )
    assert (load_config(path).training.epochs, load_config(path).training.batch_size) == (9, 2)


def test_the_largest_seed_works() -> None:
    config = load_config(None, overrides={"seed": 2**63 - 1})
    assert set_seed(config.seed) == 2**63 - 1
    assert set_seed(7) == 7
    assert np.random.get_state()[1][0] == 7  # seeds below 2**32 draw as before


PATHS = {
    "paths.runs_dir": {}, "paths.checkpoints_dir": {}, "paths.cache_dir": {}, "augmentation.noise_dir": {},
    "checkpoints.mirror_dir": {}, "data.path": {"data.source": "folder"}, "guard.path": {"guard.source": "parquet"},
    "model.variant": {}, "data.hub.id": {"data.source": "hub"},
}  # fmt: skip


def test_every_path_is_among_those_that_are_tested() -> None:
    config = load_config(None, overrides={key: "x/y" for key in PATHS if key.startswith(("paths", "model"))})
    found = {key for key, value in flatten(config.model_dump()).items() if isinstance(value, Path)}
    fields = {
        "data.path",
        "guard.path",
        "augmentation.noise_dir",
        "checkpoints.mirror_dir",
        "model.variant",
        "data.hub.id",
    }
    assert found | fields == set(PATHS)


@pytest.mark.parametrize("key", PATHS)
def test_home_and_variables_are_expanded_in_every_path(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SPEECH", "/data/speech")
    for given, expected in {
        "~/a b": "/home/me/a b", "$SPEECH/x": "/data/speech/x", "${SPEECH}2/x": "/data/speech2/x",
        "$HOME/$SPEECH": "/home/me/data/speech", "plain/x~": "plain/x~",
    }.items():  # fmt: skip
        config = load_config(None, overrides={**PATHS[key], key: given})
        assert str(flatten(config.model_dump())[key]) == expected
        assert load_config(None, overrides=yaml.safe_load(config.to_yaml())) == config
    for given in ("$ABSENT/x", "${ABSENT}", "~nobody-of-this-name/x"):
        with pytest.raises(ConfigError, match=rf"{key}: .*(ABSENT is not set|no such user)"):
            load_config(None, overrides={**PATHS[key], key: given})


def test_a_name_with_a_dollar_sign_that_is_there_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a$b").mkdir()
    assert load_config(None, overrides={"paths.runs_dir": tmp_path / "a$b"}).paths.runs_dir == tmp_path / "a$b"


def test_no_error_is_longer_than_10_kb() -> None:
    for text in ("a" * 10**6, "\u0915" * 10**6, "\ud800" * 10**5):
        message = str(DataError(f"begin {text} end"))
        assert message.startswith("begin")
        assert message.endswith("end")
        assert len(message.encode("utf-8", "surrogatepass")) <= 10_000
    assert str(DataError("short")) == "short"


FORMER_CONFIG = """
project: {name: multilingual-asr, version: 1.0.0, seed: 42, device: cuda}
data:
  sampling_rate: 16000
  audio_max_length_sec: 30.0
  vad_threshold: 0.5
  datasets: [{name: common_voice, language: en, version: "11.0"}]
  augmentation: {enabled: false, speed_perturbation: [0.9, 1.1], pitch_shift_semitones: [-2, 2], noise_snr: 10}
model: {variants: {tiny: openai/whisper-tiny}, default_variant: small, language: english, freeze_layers: 0}
training: {batch_size: 8, num_epochs: 5, warmup_steps: 500, save_steps: 100, early_stopping_patience: 3, fp16: true}
evaluation: {metrics: [wer, cer], test_sets: [test_clean]}
inference:
  streaming: {buffer_size_sec: 2.0, overlap_sec: 0.2, vad_enabled: true, chunk_length: 1}
  temperature: 0.0
  num_beams: 1
mlops: {experiment_tracking: {backend: wandb, project_name: whisper-asr}, logging: {level: INFO}}
"""
TODAY = """
project.name tracking.project | project.seed seed | project.device device | project.version git revision
data.sampling_rate 16,000 Hz | data.audio_max_length_sec data.max_duration_sec | data.vad_threshold vad.threshold
data.datasets data.source | data.augmentation.enabled augmentation.enabled
data.augmentation.speed_perturbation augmentation.speed_factors | data.augmentation.noise_snr augmentation.min_snr_db
data.augmentation.pitch_shift_semitones augmentation.max_pitch_semitones
model.variants model.variant | model.default_variant model.variant | model.freeze_layers training.freeze_encoder
training.num_epochs training.epochs | training.warmup_steps training.warmup_ratio | training.fp16 precision
training.save_steps checkpoints.save_minutes | training.early_stopping_patience training.patience
evaluation.metrics language | evaluation.test_sets data.hub.test_split | inference.temperature inference.temperatures
inference.streaming.buffer_size_sec streaming.buffer_sec | inference.streaming.overlap_sec streaming.buffer_sec
inference.streaming.vad_enabled vad.threshold | inference.streaming.chunk_length streaming.min_chunk_sec
mlops.experiment_tracking.backend tracking.trackers | mlops.experiment_tracking.project_name tracking.project
mlops.logging setup_logging
"""


def test_keys_of_the_project_before_are_refused_with_todays(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(FORMER_CONFIG)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml")
    _, *problems = str(caught.value).split("\n  - ")
    said = dict(problem.split(": unknown key; ") for problem in problems)
    expected = dict(pair.strip().split(" ", 1) for pair in TODAY.strip().replace("\n", "|").split("|"))
    assert said.keys() == expected.keys()
    for key, today in expected.items():
        assert today in said[key], f"{key}: {said[key]}"


def test_every_former_key_leads_to_a_setting() -> None:
    known = flatten(Config().model_dump())
    for former, today in former_keys().items():
        if not today.startswith(("(", "--")):
            assert re.match(r"[\w.]+", today)[0] in known, former  # type: ignore[index]
