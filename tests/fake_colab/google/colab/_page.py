"""A page in headless Chromium, whose microphone hears a recording."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

from playwright.sync_api import Page, sync_playwright

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
Result = TypeVar("Result")


class OutputPage:
    """Lives in a thread of its own: a kernel runs an event loop in its main thread, where playwright refuses to work.

    Args:
        recording: WAV file that the microphone hears once; None gives no microphone.
        allowed: whether the user lets the page use it.
        arguments: more of Chromium's.
    """

    def __init__(self, recording: Path | None, *, allowed: bool = True, arguments: Sequence[str] = ()) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _EmptyPage)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._thread = ThreadPoolExecutor(1)
        flags = ["--no-sandbox", *arguments]
        if recording is not None:
            flags += ["--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={recording}%noloop"]
        self._thread.submit(self._open, flags, allowed).result()
        self._is_open = True

    def evaluate(self, script: str, timeout_sec: float | None = None) -> Any:
        """Raises: TimeoutError: no value in time. playwright.sync_api.Error: the script fails, or the page is gone."""
        return self._thread.submit(lambda: self._page.evaluate(script)).result(timeout_sec)

    def do(self, action: Callable[[Page], Result]) -> Result:
        """Do something to the page, such as a click."""
        return self._thread.submit(lambda: action(self._page)).result()

    def close(self) -> None:
        """A second call does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        self._thread.submit(self._close).result()
        self._thread.shutdown()
        self._server.shutdown()

    def _open(self, flags: list[str], allowed: bool) -> None:
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        permissions = ["microphone"] if allowed else []
        self._page = self._browser.new_context(permissions=permissions).new_page()
        self._page.goto(f"http://localhost:{self._server.server_port}")  # getUserMedia wants https, or localhost

    def _close(self) -> None:
        self._browser.close()
        self._playwright.stop()


class _EmptyPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>Output</title><body></body>")

    def log_message(self, *arguments: Any) -> None:
        """Be quiet."""
