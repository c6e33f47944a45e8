"""What a notebook can do with the page that shows a cell's output."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from google.colab._message import MessageError
from google.colab._page import OutputPage

_callbacks: dict[str, Callable[..., Any]] = {}


def eval_js(script: str, ignore_result: bool = False, timeout_sec: float | None = None) -> Any:
    """Evaluate JavaScript in the page, and return its value: None too where no answer comes in time."""
    try:
        answer = page().evaluate(script, timeout_sec)
    except TimeoutError:
        return None
    except Exception as err:
        raise MessageError(str(err)) from err
    return None if ignore_result else answer


def register_callback(function_name: str, callback: Callable[..., Any]) -> None:
    _callbacks[function_name] = callback


def invoke_function(function_name: str, *args: Any, **kwargs: Any) -> Any:
    """Call what was registered, as `google.colab.kernel.invokeFunction` does in the page."""
    return _callbacks[function_name](*args, **kwargs)


@cache
def page() -> OutputPage:
    """Return the page, opened by the first call."""
    recording = os.environ.get("FAKE_COLAB_MICROPHONE")
    opened = OutputPage(
        None if recording is None else Path(recording),
        allowed=os.environ.get("FAKE_COLAB_PERMISSION", "granted") == "granted",
    )
    atexit.register(opened.close)
    return opened
