"""Comparison of two measurements of `behaviour.py`, section by section, with tolerances."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jiwer

_CAPTION_TIME = re.compile(r"(\d+):(\d\d):(\d\d)[.,](\d{3})")


@dataclass(frozen=True)
class Tolerance:
    """How far two values of a section may lie apart."""

    absolute: float = 0.0  # of numbers; this or `relative` has to hold
    relative: float = 0.0
    word_error_rate: float = 0.0  # over all texts of the section together
    shift_sec: float = 0.0  # of a word's times
    share_of_words: float = 1.0  # at least so many have to be in place


EXACT = Tolerance()


@dataclass
class Comparison:
    """Result of comparing a section."""

    problems: list[str] = field(default_factory=list)  # one line for each difference beyond the tolerance
    largest_difference: float = 0.0  # of two numbers
    word_error_rate: float = 0.0  # over all texts
    misplaced_words: float = 0.0  # share of words that are absent, or at another time


def compare(expected: Mapping[str, Any], actual: Mapping[str, Any], tolerance: Tolerance = EXACT) -> Comparison:
    """Compare a section; keys are special as `behaviour.py` says, all else that is not a float has to be equal."""
    walk = _Walk(tolerance)
    walk.visit("", "", expected, actual)
    return walk.finish()


class _Walk:
    """Visits two trees together and gathers what differs."""

    def __init__(self, tolerance: Tolerance) -> None:
        self._tolerance = tolerance
        self._found = Comparison()
        self._texts: list[tuple[str, str]] = []
        self._words = self._misplaced = 0

    def visit(self, path: str, key: str, expected: Any, actual: Any) -> None:
        if key == "names":
            missing = sorted(set(expected) - set(actual))
            self._check(not missing, f"{path}: missing {', '.join(missing)}")
        elif key == "text":
            self._texts.append((expected, actual))
        elif key == "words":
            self._place(path, expected, actual)
        elif key == "captions":
            self._captions(path, expected, actual)
        elif isinstance(expected, Mapping) and isinstance(actual, Mapping):
            self._check(set(expected) == set(actual), f"{path}: keys {sorted(set(expected) ^ set(actual))} in one only")
            for name in expected.keys() & actual.keys():
                kind = "text" if key == "texts" else name
                self.visit(f"{path}.{name}".strip("."), kind, expected[name], actual[name])
        elif isinstance(expected, list) and isinstance(actual, list):
            self._check(len(expected) == len(actual), f"{path}: {len(expected)} values, now {len(actual)}")
            for index, (a, b) in enumerate(zip(expected, actual, strict=False)):
                self.visit(f"{path}[{index}]", "", a, b)
        elif {type(expected), type(actual)} in ({float}, {float, int}):
            difference = abs(expected - actual)
            self._found.largest_difference = max(self._found.largest_difference, difference)
            allowed = max(self._tolerance.absolute, self._tolerance.relative * abs(expected))
            self._check(difference <= allowed, f"{path}: {expected}, now {actual}")
        else:
            self._check(expected == actual, f"{path}: {expected!r:.80}, now {actual!r:.80}")

    def finish(self) -> Comparison:
        """Judge what only a whole section tells: texts and word times."""
        found, tolerance = self._found, self._tolerance
        spoken = [pair for pair in self._texts if pair[0].strip()]
        invented = [pair[1] for pair in self._texts if not pair[0].strip() and pair[1].strip()]
        if spoken:
            found.word_error_rate = float(jiwer.wer([a for a, _ in spoken], [b for _, b in spoken]))
        if found.word_error_rate > tolerance.word_error_rate or invented:
            changed = [f"{a!r:.100}, now {b!r:.100}" for a, b in self._texts if a != b]
            found.problems.append(f"word error rate of the texts {found.word_error_rate:.2%}: " + "; ".join(changed))
        if tolerance == EXACT and not found.word_error_rate:
            self._check(all(a == b for a, b in self._texts), "texts differ in their spaces")
        if self._words:
            found.misplaced_words = self._misplaced / self._words
        if found.misplaced_words > 1 - tolerance.share_of_words + 1e-9:
            limit = f"{tolerance.shift_sec} s"
            found.problems.append(f"{self._misplaced} of {self._words} words are absent or moved by more than {limit}")
        return found

    def _place(self, path: str, expected: Sequence[Any], actual: Sequence[Any]) -> None:
        """Match words in order by their text and compare their times."""
        self._words += max(len(expected), len(actual))
        before, now = ([row[0] for row in rows] for rows in (expected, actual))
        in_place = 0
        for match in difflib.SequenceMatcher(None, before, now, autojunk=False).get_matching_blocks():
            for a, b in zip(expected[match.a :][: match.size], actual[match.b :][: match.size], strict=True):
                shift = max((abs(x - y) for x, y in zip(a[1:], b[1:], strict=True)), default=0.0)
                self._found.largest_difference = max(self._found.largest_difference, shift)
                in_place += shift <= self._tolerance.shift_sec + 1e-6
        self._misplaced += max(len(expected), len(actual)) - in_place

    def _captions(self, path: str, expected: str, actual: str) -> None:
        """Compare the texts of two caption files, a line break counting as a word, and the times of their cues."""
        texts = [_CAPTION_TIME.sub("", text).replace("\n", " \\n ") for text in (expected, actual)]
        self._texts.append((texts[0], texts[1]))
        before, now = (
            [["", 3600 * int(h) + 60 * int(m) + int(s) + int(ms) / 1000] for h, m, s, ms in _CAPTION_TIME.findall(text)]
            for text in (expected, actual)
        )
        self._place(path, before, now)

    def _check(self, holds: bool, problem: str) -> None:
        if not holds:
            self._found.problems.append(problem)
