"""Errors: one class per kind of problem, so that callers catch exactly what they can handle."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

MAX_MESSAGE_BYTES = 9000  # a damaged file may put megabytes into a message


class WhisperASRError(Exception):
    """Base of every error that this library raises on purpose; the middle of a huge message is left out."""

    def __str__(self) -> str:
        """Return the message, of which at most `MAX_MESSAGE_BYTES` are kept."""
        text = super().__str__()
        data = text.encode("utf-8", "surrogatepass")
        if len(data) <= MAX_MESSAGE_BYTES:
            return text
        ends = (data[: MAX_MESSAGE_BYTES // 2], data[-MAX_MESSAGE_BYTES // 2 + 100 :])
        return " [...] ".join(part.decode("utf-8", "ignore") for part in ends)


class ConfigError(WhisperASRError):
    """The configuration is wrong; the message lists every problem found."""


class DataError(WhisperASRError):
    """A data set, manifest or label cannot be used."""


class SourceUnavailableError(DataError):
    """A whole source is unavailable: no network, no such folder or data set. `data.sources` may name another."""


class AudioError(DataError):
    """A recording cannot be decoded or has no usable signal."""


class DeviceError(WhisperASRError):
    """The requested device or precision is not available on this machine."""


class OutOfMemoryError(DeviceError):
    """The GPU or the machine had no memory left."""


class ModelError(WhisperASRError):
    """Weights, processor or audio context do not fit what was asked."""


class MissingDependencyError(WhisperASRError):
    """An optional package is absent; the message contains the line that installs it."""


class CheckpointError(WhisperASRError):
    """A checkpoint is absent, incomplete or damaged."""


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def visible(text: object) -> str:
    r"""Return a name or text with control characters, line ends and lone surrogates as escapes, such as `\n`."""
    text = str(text)
    if text.isprintable():  # nearly all are, and rows come by the million
        return text
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class WriteError(WhisperASRError, OSError):
    """A file or folder cannot be written: `WriteError(errno, strerror, path)`."""

    def __str__(self) -> str:
        """Name the path and the fix."""
        return f"{self.filename}: cannot be written: {self.strerror}; free space there, or choose another folder"


def listed_problems(errors: Sequence[Mapping[str, Any]]) -> str:
    """Return the first three of a pydantic `ValidationError`, whose own first line only counts them."""
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in errors[:3])


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
