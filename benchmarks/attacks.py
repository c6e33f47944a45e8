"""The attacks of the drill: each tries to do harm in an empty folder, and returns if it could not.

To add one, write a function of a folder below, with `@attack`; where it succeeds it raises `BrokenError`, `WeakError`
or an AssertionError. Import what it needs inside of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MAX_MESSAGE = 10_000  # characters of an error
AttackFunction = Callable[[Path], object]


class Attack(NamedTuple):
    """A function, and how long it may take."""

    call: AttackFunction
    limit_sec: float


class BrokenError(Exception):
    """The attack did harm."""


class WeakError(Exception):
    """It did no lasting harm, and was not answered well."""


ATTACKS: dict[str, Attack] = {}


def attack(limit_sec: float = 60.0) -> Callable[[AttackFunction], AttackFunction]:
    """Register a function under its name."""

    def register(function: AttackFunction) -> AttackFunction:
        assert function.__name__ not in ATTACKS, function.__name__
        ATTACKS[function.__name__] = Attack(function, limit_sec)
        return function

    return register


def must_refuse(call: Callable[[], object], *names: str, what: str = "it") -> str:
    """Check that a call raises an error of the project, short, that has all names in it; return its text."""
    from src.utils.errors import WhisperASRError

    try:
        returned = call()
    except WhisperASRError as err:
        text = str(err)
    except Exception as err:
        raise BrokenError(f"{what}: {type(err).__name__} of a library: {str(err)[:200]}") from err
    else:
        raise BrokenError(f"{what} was taken: {str(returned)[:200]}")
    if len(text) > MAX_MESSAGE:
        raise WeakError(f"{what}: a message of {len(text)} characters")
    if missing := [name for name in names if name not in text]:
        raise WeakError(f"{what}: the message lacks {missing}: {text[:200]}")
    return text
