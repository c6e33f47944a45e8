"""Uploads against a fake of `HfApi`, the one class that would talk to the Hub."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from src.models.export import hub as hub_push
from src.models.export.hub import check_export, push_to_hub
from src.utils.errors import ModelError, WhisperASRError

SECRET = "hf_secretsecretsecret"
FILES = {
    "huggingface": ["model.safetensors", "generation_config.json"],
    "ctranslate2": ["model.bin", "vocabulary.json"],
    "onnx": ["generation_config.json", "onnx/encoder_model.onnx", "onnx/decoder_model_merged.onnx"],
}


class FakeHub:
    """One repository, or none; `create_error` and `upload_error` are raised, `uploads` are the calls that came."""

    endpoint = "https://huggingface.co"

    def __init__(self) -> None:
        self.create_error: Exception | None = None
        self.upload_error: Exception | None = None
        self.held = SimpleNamespace(private=True, siblings=[SimpleNamespace(rfilename=".gitattributes")])
        self.token: str | None = None
        self.created: list[tuple[str, bool]] = []
        self.uploads: list[dict[str, Any]] = []

    def open(self, token: str) -> FakeHub:
        self.token = token
        return self

    def create_repo(self, repo_id: str, *, private: bool) -> None:
        if self.create_error:
            raise self.create_error
        self.created.append((repo_id, private))

    def model_info(self, repo_id: str) -> SimpleNamespace:
        return self.held

    def upload_folder(self, **options: Any) -> None:
        if self.upload_error:
            raise self.upload_error
        self.uploads.append(options)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(hub_push, "HfApi", fake.open)
    monkeypatch.setattr(hub_push, "get_token", lambda: SECRET)
    return fake


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return make_export(tmp_path / "best_model_hf", "huggingface")


def make_export(folder: Path, kind: str) -> Path:
    shared = ["config.json", "tokenizer.json", "preprocessor_config.json", "README.md"]
    for name in [*shared, *FILES[kind]]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def refused(status: int) -> HfHubHTTPError:
    request = httpx.Request("POST", "https://huggingface.co/api", headers={"authorization": f"Bearer {SECRET}"})
    return HfHubHTTPError(f"{status} for {SECRET}", response=httpx.Response(status, request=request))


@pytest.mark.parametrize("kind", list(FILES))
def test_an_export_is_uploaded_as_a_private_repository_without_hidden_files(
    hub: FakeHub, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_export(tmp_path / kind, kind)
    with caplog.at_level(logging.DEBUG):
        assert push_to_hub(folder, "me/whisper-mine") == "https://huggingface.co/me/whisper-mine"
    assert hub.created == [("me/whisper-mine", True)]
    (upload,) = hub.uploads
    assert (upload["repo_id"], upload["folder_path"]) == ("me/whisper-mine", folder)
    assert upload["ignore_patterns"] == [".*", "*/.*"]
    assert hub.token == SECRET
    assert "private" in caplog.text
    assert SECRET not in caplog.text


def test_a_token_that_is_given_comes_before_the_one_that_is_found(hub: FakeHub, export: Path) -> None:
    push_to_hub(export, "me/mine", private=False, token=" hf_other\n")
    assert hub.token == "hf_other"  # a line end would end up in a header, and in its error
    assert hub.created == [("me/mine", False)]


@pytest.mark.parametrize("kind", list(FILES))
def test_each_absent_file_of_an_export_is_named_and_nothing_is_created(hub: FakeHub, tmp_path: Path, kind: str) -> None:
    for number, name in enumerate(["config.json", "tokenizer.json", *FILES[kind]]):
        folder = make_export(tmp_path / str(number), kind)
        (folder / name).unlink()
        with pytest.raises(ModelError, match=r"lacks|no exported model"):
            push_to_hub(folder, "me/mine")
    assert hub.token is None


def test_a_missing_shard_is_named(export: Path) -> None:
    (export / "model.safetensors").rename(export / "model-00001-of-00002.safetensors")
    (export / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    with pytest.raises(ModelError, match=r"it lacks model-00002-of-00002\.safetensors"):
        check_export(export)


@pytest.mark.parametrize("card", [None, " \n"])
def test_a_model_without_its_card_is_not_published(hub: FakeHub, export: Path, card: str | None) -> None:
    (export / "README.md").unlink()
    if card is not None:
        (export / "README.md").write_text(card)
    with pytest.raises(ModelError, match="write_model_card writes one"):
        push_to_hub(export, "me/mine")
    assert hub.token is None


@pytest.mark.parametrize("repo_id", ["mine", "me/mine/too", "me/", "me/my model", "https://huggingface.co/me/mine"])
def test_a_malformed_name_is_refused(hub: FakeHub, export: Path, repo_id: str) -> None:
    with pytest.raises(ModelError, match="write 'owner/name'"):
        push_to_hub(export, repo_id)


def test_no_token_says_where_to_put_one(hub: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_push, "get_token", lambda: None)
    with pytest.raises(WhisperASRError, match=r"settings/tokens.*Colab.*HF_TOKEN.*hf auth login"):
        push_to_hub(export, "me/mine")


@pytest.mark.parametrize("step", ["create_error", "upload_error"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (refused(401), "does not accept the token"),
        (refused(403), "no right to write there.*'me' is your name or an organisation"),
        (refused(503), "HTTP status 503; push again later"),
        (httpx.ConnectError(f"Bearer {SECRET}"), r"cannot be reached.*ConnectError.*check the network"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is not set"),
        (RuntimeError("Data processing error: CAS service error"), "then push again: it goes on where it stopped"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_refuses_says_the_fix_and_never_the_token(
    hub: FakeHub, export: Path, step: str, error: Exception, said: str
) -> None:
    setattr(hub, step, error)
    with pytest.raises(WhisperASRError, match=said) as caught:
        push_to_hub(export, "me/mine")
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__  # the first error is not printed with it
    assert hub.uploads == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held.siblings.append(SimpleNamespace(rfilename="model.bin")), "a repository that holds 1 files"),
        (lambda held: setattr(held, "private", False), "a repository that is public"),
    ],
)
def test_a_name_that_is_taken_is_left_alone(
    hub: FakeHub, export: Path, change: Callable[[SimpleNamespace], None], said: str
) -> None:
    hub.create_error = refused(409)
    change(hub.held)
    with pytest.raises(WhisperASRError, match=f"{said}; choose another name"):
        push_to_hub(export, "me/mine")
    assert hub.uploads == []


def test_a_repository_that_a_broken_upload_left_empty_is_filled(hub: FakeHub, export: Path) -> None:
    hub.create_error = refused(409)
    push_to_hub(export, "me/mine")
    assert len(hub.uploads) == 1
