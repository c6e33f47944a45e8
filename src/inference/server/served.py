"""A web page that is served by this process; it knows nothing of Gradio."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from src.utils.errors import ConfigError


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
