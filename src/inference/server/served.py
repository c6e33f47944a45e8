"""What the web pages of this process share: serving, messages of their scripts, errors in a line; nothing of Gradio."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from src.inference.server.protocol import MAX_WIRE_RATE, MIN_WIRE_RATE, StreamError
from src.utils.errors import ConfigError, WhisperASRError, first_line

logger = logging.getLogger(__name__)

MAX_CHARS = 1 << 18  # of a message's audio: 1 s of int16 at the highest rate, in base64


class ServedPage(ExitStack):
    """A page that is served until `close`, or the end of a `with` block.

    `serve` is that of `page_layout`. `ending` is called after the page is closed, and if it cannot be served:
    `ConfigError` for an address or port that is unavailable, or no tunnel.
    """

    def __init__(
        self,
        page: Any,
        *,
        serve: Callable[..., None],
        ending: Callable[[], object],
        share: bool,
        server_name: str,
        port: int | None,
        uploads: bool = True,
    ) -> None:
        super().__init__()
        self.callback(ending)
        try:
            serve(page, uploads=uploads, share=share, server_name=server_name, server_port=port)
        except (OSError, ValueError) as err:
            self.close()
            raise ConfigError(f"the page cannot listen on {server_name}:{port}: {err}; choose another port") from err
        self.callback(page.close, verbose=False)  # the first to be called
        self.url: str = page.local_url  # on this machine
        self.share_url: str | None = page.share_url  # for everybody; None unless shared
        if share and self.share_url is None:
            self.close()
            raise ConfigError("share=True, and no tunnel can be opened: see what is printed above; or leave share out")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.share_url or self.url}); close() ends it"


class PageMessage(BaseModel):
    """What the script of a page sends."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def read(cls, message: Mapping[str, Any]) -> Self:
        """Return a message that is one of this page, else raise StreamError."""
        try:
            return cls.model_validate(message)
        except ValidationError as err:
            raise _foreign(err.errors()[0]["msg"]) from err


class AudioMessage(PageMessage):
    """A part of a recording, samples as base64 of "s16le"; the first has `first`, the last has `last`."""

    rate: int = Field(ge=MIN_WIRE_RATE, le=MAX_WIRE_RATE)
    pcm: str = Field(max_length=MAX_CHARS)
    first: bool = False
    last: bool = False

    def decoded(self) -> bytes:
        """Return the audio, or raise StreamError."""
        try:
            return base64.b64decode(self.pcm, validate=True)
        except binascii.Error as err:
            raise _foreign(f"the audio is not base64: {err}") from err


def _foreign(wrong: str) -> StreamError:
    return StreamError("bad_message", f"not a message of this page: {wrong}", fix="reload the page")


def complaint(err: Exception) -> str:
    """Return an error in a line; log the traceback of one that no user has caused."""
    if isinstance(err, WhisperASRError):
        return first_line(err)
    logger.error("a request failed", exc_info=err)
    return f"{type(err).__name__}: {first_line(err)}; the server's log has the traceback"
