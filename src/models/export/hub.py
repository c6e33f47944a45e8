"""Upload of an exported model to the Hugging Face Hub: opt-in, private by default, never over something else.

The token comes from the caller, or from where `huggingface_hub` finds it: HF_TOKEN, `hf auth login`, Colab's secrets.
It is in no log and no error: network errors are not chained, since their texts may quote the request's headers. Hidden
files stay here, such as the clips of the user's recordings in a checkpoint's folder.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from src.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, GGML_FILE, GGML_USAGE, absent_shards
from src.utils.errors import ModelError, WhisperASRError

logger = logging.getLogger(__name__)

TOKEN_PAGE = "https://huggingface.co/settings/tokens"
_ALWAYS = ("config.json", "tokenizer.json", "preprocessor_config.json")
# Files of each kind of export, as patterns; the key is the file that the kind is recognised by.
_EXPORTS = {
    "model.bin": ("model.bin", "vocabulary.*", *_ALWAYS),
    ADAPTER_CONFIG: (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *_ALWAYS),
    GGML_FILE: (GGML_FILE, GGML_USAGE, "config.json"),
    "onnx": ("onnx/encoder_model*.onnx", "onnx/decoder_model_merged*.onnx", "generation_config.json", *_ALWAYS),
    "config.json": ("model*.safetensors", "generation_config.json", *_ALWAYS),
}
# hf_xet, which sends the large files, raises RuntimeError
_NETWORK_ERRORS = (httpx.TransportError, ConnectionError, TimeoutError, RuntimeError)


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload an exported folder as a new repository; one that an earlier, broken upload left empty is filled.

    Args:
        folder: of `export_huggingface` or another export, with a model card.
        repo_id: "owner/name"; the owner is you, or an organisation in which you may write.
        private: False publishes the model.
        token: with the right to write; by default HF_TOKEN, the one of `hf auth login`, or Colab's secret HF_TOKEN.

    Returns:
        The repository's address.

    Raises:
        ModelError: the folder is not a complete export or has no README.md, or repo_id is malformed.
        WhisperASRError: no token, no network, no right, or a name that is taken; the message says what to do.
    """
    source = Path(folder)
    _check_export(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]{1,96}", repo_id, re.ASCII):
        raise ModelError(f"repo_id {repo_id!r}: write 'owner/name', of letters, digits, '-', '_' and '.'")
    token = (token or get_token() or "").strip()
    if not token:
        raise WhisperASRError(
            f"no Hugging Face token: make one with the right to write at {TOKEN_PAGE}; then in Colab add it as the "
            "secret HF_TOKEN (key symbol at the left) and allow the notebook to read it, elsewhere run: hf auth login"
        )
    api = HfApi(token=token)
    try:
        _create(api, repo_id, private)
        api.upload_folder(
            repo_id=repo_id, folder_path=source, commit_message=f"Upload {source.name}", ignore_patterns=[".*", "*/.*"]
        )
    except HfHubHTTPError as err:
        raise WhisperASRError(f"{repo_id}: {_refusal(_status(err), repo_id)}") from None
    except _NETWORK_ERRORS as err:
        raise WhisperASRError(
            f"{repo_id}: the Hugging Face Hub cannot be reached, or the connection broke off ({type(err).__name__}); "
            "check the network and that HF_HUB_OFFLINE is not set, then push again: it goes on where it stopped"
        ) from None
    url = f"{api.endpoint}/{repo_id}"
    logger.info("uploaded %s to %s (%s)", source, url, "private" if private else "public")
    return url


def _check_export(folder: Path) -> None:
    wanted = next((files for mark, files in _EXPORTS.items() if (folder / mark).exists()), None)
    if wanted is None:
        raise ModelError(
            f"{folder}: no exported model; export_huggingface, or another export of src.models, writes one"
        )
    missing = [pattern for pattern in wanted if not any(folder.glob(pattern))]
    if wanted is _EXPORTS["config.json"] and not missing:
        missing = absent_shards(folder)
    if missing:
        raise ModelError(f"{folder}: not a complete export, it lacks {', '.join(missing)}; export the model again")
    card = folder / "README.md"
    if not card.is_file() or not card.read_text(encoding="utf-8").strip():
        raise ModelError(
            f"{folder}: no {card.name}: a model is not published without its card; write_model_card writes one"
        )


def _create(api: HfApi, repo_id: str, private: bool) -> None:
    """Create the repository, or take one that is empty and as private as it should be."""
    try:
        api.create_repo(repo_id, private=private)
    except HfHubHTTPError as err:
        if _status(err) != 409:
            raise
        info = api.model_info(repo_id)
        files = {file.rfilename for file in info.siblings or ()} - {".gitattributes"}
        if files or info.private != private:
            held = f"holds {len(files)} files" if files else f"is {'private' if info.private else 'public'}"
            raise WhisperASRError(
                f"{repo_id}: the name is taken, by a repository that {held}; choose another name, or delete that one "
                f"at {api.endpoint}/{repo_id}/settings"
            ) from None


def _status(error: HfHubHTTPError) -> int | None:
    return None if error.response is None else error.response.status_code


def _refusal(status: int | None, repo_id: str) -> str:
    if status == 401:
        return f"the Hub does not accept the token: it is mistyped, expired or revoked; make a new one at {TOKEN_PAGE}"
    if status in (403, 404):
        owner = repo_id.split("/")[0]
        return (
            f"the token has no right to write there; make one with write access at {TOKEN_PAGE}, and check that "
            f"{owner!r} is your name or an organisation in which you may write"
        )
    return f"the Hub answered with HTTP status {status}; push again later, or see https://status.huggingface.co"
