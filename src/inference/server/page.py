"""A web page to try models on: live captions, files, and two models side by side.

Everything stays between the browser and this process: no font, script or count comes from or goes to anywhere else.
`share=True` alone opens a tunnel through Gradio's servers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

from src.inference.engines import Engine, load_engine
from src.inference.server.connection import ServerLimits
from src.inference.server.page_backend import make_backend
from src.inference.server.page_files import MAX_UPLOAD_SEC
from src.inference.server.page_turns import SharedEngine, Turns
from src.inference.server.server import LOOPBACK
from src.utils.config import Config
from src.utils.errors import ConfigError, MissingDependencyError, ModelError

TUNED, STOCK = "tuned", "stock"
ModelSource = str | Path | Engine


class Demo:
    """A page that is being served; as a context manager, it closes at the end of the block.

    Attributes:
        url: where this machine opens it.
        share_url: where everybody does; None unless shared.
    """

    def __init__(self, page: Any, turns: Turns) -> None:
        self._page, self._turns = page, turns
        self.url: str = page.local_url
        self.share_url: str | None = page.share_url

    def __repr__(self) -> str:
        return f"Demo({self.share_url or self.url}); close() ends it"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving; what is being decoded is given up."""
        self._page.close(verbose=False)
        self._turns.close()


def launch_demo(
    model: Any = None,
    processor: Any = None,
    *,
    config: Config | None = None,
    stock: ModelSource | None = None,
    models: Mapping[str, ModelSource] | None = None,
    share: bool = False,
    server_name: str = LOOPBACK,
    port: int | None = None,
    limits: ServerLimits | None = None,
    max_upload_sec: float = MAX_UPLOAD_SEC,
    height: int = 860,
) -> Demo:
    """Serve the page, and show it below the cell of a notebook.

    Args:
        model: a `DynamicWhisper`, called "tuned" on the page; not needed with `models`.
        processor: its processor.
        config: `inference`, `streaming`, `model`, `vad` and `device`; defaults without.
        stock: to compare with: a variant such as "tiny.en", a folder, or an engine.
        models: more of them, by the name that the page shows. The first model of all is chosen at the start.
        share: open a public address through Gradio's servers: whoever knows it can use the page, for a week at most.
        server_name: to listen on; only this machine reaches the default.
        port: None takes a free one from 7860 on.
        limits: of live captions.
        max_upload_sec: of a file.
        height: of the frame in a notebook, pixels.
    Raises: MissingDependencyError: gradio is absent. ModelError: no model. ConfigError: the address or port cannot be
        had, or no tunnel can be opened. And what `load_engine` raises.
    """
    if (model is None) != (processor is None) or (model is None and not models):
        raise ModelError("launch_demo needs a model and its processor, or models={name: folder}")
    demo_page = _import_page()
    config = config or Config()
    turns = Turns()
    engines = {name: SharedEngine(engine, turns) for name, engine in _engines(model, processor, config, stock, models)}
    page = demo_page.build_page(make_backend(engines, config, limits=limits, max_upload_sec=max_upload_sec))
    try:
        demo_page.serve(page, share=share, server_name=server_name, server_port=port, height=height)
    except (OSError, ValueError) as err:
        turns.close()
        raise ConfigError(f"the page cannot listen on {server_name}:{port}: {err}; choose another port") from err
    demo = Demo(page, turns)
    if share and demo.share_url is None:
        demo.close()
        raise ConfigError("share=True, and no tunnel can be opened: see what is printed above; or leave share out")
    return demo


def _import_page() -> ModuleType:
    try:
        from src.inference.server import page_layout as demo_page
    except ImportError as err:
        raise MissingDependencyError(f"the web page needs gradio 6 ({err}): pip install gradio") from err
    return demo_page


def _engines(
    model: Any, processor: Any, config: Config, stock: ModelSource | None, models: Mapping[str, ModelSource] | None
) -> Iterator[tuple[str, Engine]]:
    if model is not None:
        from src.inference.decoding import TorchEngine

        yield TUNED, TorchEngine(model, processor)
    sources = dict(models or {}) | ({} if stock is None else {STOCK: stock})
    for name, source in sources.items():
        yield name, load_engine(source, config) if isinstance(source, str | Path) else source
