"""Uploads against a fake of `HfApi`, the one class that would talk to the Hub."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY, Mock

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from src.models.export import hub as hub_push
from src.models.export.hub import push_to_hub
from src.utils.errors import ModelError, WhisperASRError

SECRET = "hf_secretsecretsecret"
FILES = {
    "huggingface": ["model.safetensors", "generation_config.json"],
    "ctranslate2": ["model.bin", "vocabulary.json"],
    "ggml": ["ggml-model.bin", "USAGE.md"],
    "peft": ["adapter_config.json", "adapter_model.safetensors"],
    "onnx": ["generation_config.json", "onnx/encoder_model.onnx", "onnx/decoder_model_merged.onnx"],
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for `HfApi` with one private, empty repository."""
    api = Mock(endpoint="https://huggingface.co")
    api.return_value = api
    api.model_info.return_value = SimpleNamespace(private=True, siblings=[SimpleNamespace(rfilename=".gitattributes")])
    monkeypatch.setattr(hub_push, "HfApi", api)
    monkeypatch.setattr(hub_push, "get_token", lambda: SECRET)
    return api


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
    hub: Mock, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_export(tmp_path / kind, kind)
    with caplog.at_level(logging.DEBUG):
        assert push_to_hub(folder, "me/whisper-mine") == "https://huggingface.co/me/whisper-mine"
    hub.assert_called_once_with(token=SECRET)
    hub.create_repo.assert_called_once_with("me/whisper-mine", private=True)
    hub.upload_folder.assert_called_once_with(
        repo_id="me/whisper-mine", folder_path=folder, commit_message=ANY, ignore_patterns=[".*", "*/.*"]
    )
    assert "private" in caplog.text
    assert SECRET not in caplog.text


def test_a_given_token_comes_first_and_a_failed_upload_goes_on(hub: Mock, export: Path) -> None:
    hub.create_repo.side_effect = [refused(409), None]  # the repository is there, empty and private
    push_to_hub(export, "me/mine", token=" hf_other\n")
    hub.assert_called_once_with(token="hf_other")  # a line end would end up in a header, and in its error
    push_to_hub(export, "me/mine", private=False)
    hub.create_repo.assert_called_with("me/mine", private=False)
    assert hub.upload_folder.call_count == 2


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in FILES for name in ["config.json", *FILES[kind]]])
def test_an_absent_file_of_an_export_is_named_and_nothing_created(
    hub: Mock, tmp_path: Path, kind: str, name: str
) -> None:
    (make_export(tmp_path, kind) / name).unlink()
    with pytest.raises(ModelError, match=r"lacks|no exported model"):
        push_to_hub(tmp_path, "me/mine")
    hub.assert_not_called()


def test_a_missing_shard_and_a_missing_card_are_named(hub: Mock, export: Path) -> None:
    (export / "README.md").write_text(" \n")
    for _ in range(2):
        with pytest.raises(ModelError, match="write_model_card"):
            push_to_hub(export, "me/mine")
        (export / "README.md").unlink(missing_ok=True)
    (export / "model.safetensors").rename(export / "model-00001-of-00002.safetensors")
    (export / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors"):
        push_to_hub(export, "me/mine")
    hub.assert_not_called()


def test_a_malformed_name_and_no_token_are_refused(hub: Mock, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for repo_id in ("mine", "me/mine/too", "me/", "me/my model", "https://huggingface.co/me/mine"):
        with pytest.raises(ModelError, match="'owner/name'"):
            push_to_hub(export, repo_id)
    monkeypatch.setattr(hub_push, "get_token", lambda: None)
    with pytest.raises(WhisperASRError, match=r"settings/tokens.*HF_TOKEN"):
        push_to_hub(export, "me/mine")


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (refused(401), "settings/tokens"),
        (refused(403), "'me'"),
        (refused(503), "503"),
        (httpx.ConnectError(f"Bearer {SECRET}"), "ConnectError"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (RuntimeError("Data processing error: CAS service error"), "RuntimeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_refusal_never_says_the_token(hub: Mock, export: Path, step: str, error: Exception, said: str) -> None:
    getattr(hub, step).side_effect = error
    with pytest.raises(WhisperASRError, match=said) as caught:
        push_to_hub(export, "me/mine")
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__  # the first error is not printed with it


def test_a_name_that_is_taken_is_left_alone(hub: Mock, export: Path) -> None:
    hub.create_repo.side_effect = refused(409)
    for private, files in ((False, 0), (True, 1)):
        hub.model_info.return_value = SimpleNamespace(
            private=private, siblings=[SimpleNamespace(rfilename="model.bin")] * files
        )
        with pytest.raises(WhisperASRError, match="1 files" if private else "public"):
            push_to_hub(export, "me/mine")
    hub.upload_folder.assert_not_called()
