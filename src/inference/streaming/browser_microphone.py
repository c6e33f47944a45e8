"""The browser's microphone, for notebooks in the cloud: the page records and queues, Python fetches what has come.

The kernel of Google Colab has no audio device, but it can evaluate JavaScript in the output of the cell that runs.
There an AudioWorklet queues blocks of samples, and each call of `take()` answers with all that waits as 16-bit PCM. The
page asks for 16 kHz, a third of what a device delivers, because it all travels through the notebook's connection.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import time
from collections.abc import Callable, Generator, Mapping
from types import MappingProxyType
from typing import Any

from src.data.audio import SAMPLE_RATE, Waveform
from src.inference.server.protocol import read_samples
from src.inference.streaming.microphone import MAX_QUEUED_SEC, PATIENCE_SEC, check_duration
from src.utils.errors import AudioError, MissingDependencyError
from src.utils.templates import read_template

logger = logging.getLogger(__name__)

EvalJs = Callable[[str], Any]

BLOCK_FRAMES = 2_048  # a power of 2, as a ScriptProcessor wants it: 0.13 s at 16 kHz
TAKE_SEC = 5.0  # of audio in one answer at most; more would be one message of megabytes after a pause in reading
TAKE_WAIT_SEC = 1.0  # the page waits so long for a first block before it answers with none
ABANDONED_SEC = 120.0  # without a reader: the kernel has died, and the page lets go of the microphone
ANSWER_SEC = 10.0  # without an answer to a script the page is gone
ASK_SEC = 60.0  # for a person to allow the microphone, or to click

_FIXES: Mapping[str, str] = MappingProxyType(  # names of DOMException, as getUserMedia raises them
    {
        "NotAllowedError": "allow it for this page (the icon beside the address), and run the cell again",
        "NotFoundError": "plug a microphone in, and run the cell again",
        "NotReadableError": "close the program that holds it, and run the cell again",
        "SecurityError": "open the notebook over https",
    }
)
_ENDINGS: Mapping[str, str] = MappingProxyType(
    {
        "ended": "the browser's microphone was unplugged, or its permission withdrawn; run the cell again",
        "abandoned": "the page closed the browser's microphone, because nothing was read from it for "
        f"{ABANDONED_SEC:.0f} s; use a faster model or machine",
        "gone": "the page with the microphone was closed or loaded again; keep it open, and run the cell again",
    }
)
_PATIENCE: Mapping[str, tuple[float, str]] = MappingProxyType(
    {
        "asking": (ASK_SEC, "nobody answered the browser's question whether this page may use the microphone"),
        "paused": (ASK_SEC, "the browser wants a click before it records, and nobody clicked 'Start recording'"),
        "recording": (PATIENCE_SEC, "the browser's microphone delivers nothing; is it muted?"),
    }
)

_TAKE = """window.whisperMicrophone ? window.whisperMicrophone.take() : { state: "gone" }"""
_CLOSE = """window.whisperMicrophone?.close(), true"""


class BrowserMicrophone:
    """Records for a given time from the microphone of the browser that shows the notebook.

    A button in the cell's output ends it earlier.

    Args:
        duration_sec: how much audio to record.
        eval_js: evaluates JavaScript in the page and returns its value, that of a promise once it is settled; raises
            `AudioError` where the page does not answer.
        clock: seconds, monotone.

    Attributes:
        sample_rate: of the blocks, Hz: 16,000, except in browsers that do not resample; final at the first block.
        overruns: blocks that were lost because nobody fetched them in time.
    Raises: ConfigError: a duration that is not positive.
    """

    def __init__(
        self, duration_sec: float, *, eval_js: EvalJs | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        check_duration(duration_sec)
        self._duration_sec, self._clock = duration_sec, clock
        self._eval_js = eval_js or eval_in_colab
        self.sample_rate, self.overruns = SAMPLE_RATE, 0

    def blocks(self) -> Generator[Waveform, None, None]:
        """Yield (T,) float32 blocks until `duration_sec` of audio has come, or the button is clicked.

        Raises: AudioError: the browser has no microphone or may not use it, the microphone or the page goes away, or
            nothing comes: for 5 s while it records, for 60 s while a person is asked.
        """
        self._eval_js(_open_script())
        try:
            yield from self._recorded()
        finally:
            with contextlib.suppress(AudioError):  # a page that is gone holds no microphone
                self._eval_js(_CLOSE)
        if self.overruns:
            logger.warning("%d blocks of microphone audio were lost: decoding is slower than speech", self.overruns)

    def _recorded(self) -> Generator[Waveform, None, None]:
        heard, last_state, since_sec = 0, "", self._clock()
        while heard < self._wanted_samples():
            state, samples = self._take()
            if len(samples):
                yield samples[: self._wanted_samples() - heard]
                heard += len(samples)
            elif state == "stopped":
                return
            elif state == last_state:
                patience_sec, complaint = _PATIENCE[state]
                if self._clock() - since_sec > patience_sec:
                    raise AudioError(f"{complaint} ({patience_sec:.0f} s); run the cell again")
                continue
            last_state, since_sec = state, self._clock()

    def _wanted_samples(self) -> int:
        return round(self._duration_sec * self.sample_rate)

    def _take(self) -> tuple[str, Waveform]:
        """Fetch the state and what waits; what was heard before an end comes before its error."""
        answer = self._eval_js(_TAKE)
        state = answer["state"]
        samples = read_samples(base64.b64decode(answer.get("pcm", "")), "s16le")
        if len(samples):
            self.sample_rate = round(answer["rate"])
        elif state == "failed":
            name, message = answer["error"]["name"], answer["error"]["message"]
            fix = _FIXES.get(name, "try another browser")
            raise AudioError(f"the browser gives no microphone ({name}: {message}); {fix}")
        elif state in _ENDINGS:
            raise AudioError(_ENDINGS[state])
        self.overruns = answer.get("lost", self.overruns)
        return state, samples


def eval_in_colab(script: str) -> Any:
    """Evaluate JavaScript in the output of the cell that runs.

    Raises: MissingDependencyError: not in Colab. AudioError: the script fails, or the page does not answer.
    """
    try:
        from google.colab import errors, output
    except ImportError as err:
        raise MissingDependencyError(
            "the browser's microphone can be reached in Google Colab only; elsewhere `Microphone` records"
        ) from err
    try:
        answer = output.eval_js(script, timeout_sec=ANSWER_SEC)
    except errors.Error as err:  # a MessageError
        raise AudioError(f"the notebook's page refused a script: {err}; load the page again") from err
    if answer is None:  # the scripts here all have a value
        raise AudioError(f"the notebook's page did not answer for {ANSWER_SEC:.0f} s; {_ENDINGS['gone']}")
    return answer


def _open_script() -> str:
    options = {
        "rate": SAMPLE_RATE,
        "blockFrames": BLOCK_FRAMES,
        "queueSec": MAX_QUEUED_SEC,
        "takeSec": TAKE_SEC,
        "waitMs": 1000 * TAKE_WAIT_SEC,
        "abandonedMs": 1000 * ABANDONED_SEC,
    }
    body = "".join(read_template("src.inference", name) for name in ("audio_source.js", "browser_microphone.js"))
    return f'((options) => {{\n"use strict";\n{body}}})({json.dumps(options)})'
