"""The library behaves as recorded in expected.json.

After an intended change, record it anew: python tests/golden/behaviour.py --out tests/golden/expected.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.behaviour import SECTIONS, measure
from tests.golden.comparison import Tolerance, compare

EXPECTED: dict[str, Any] = json.loads((Path(__file__).parent / "expected.json").read_text(encoding="utf-8"))
NUMBERS = Tolerance(absolute=1e-3, relative=1e-3)
TEXTS = Tolerance(absolute=1e-3, relative=1e-3, word_error_rate=0.01, shift_sec=0.05, share_of_words=0.95)
TOLERANCES = {
    "public": Tolerance(),
    "splits": Tolerance(absolute=1e-6),
    "labels": Tolerance(),
    "exports": Tolerance(),
    "losses": Tolerance(relative=1e-3),
    **dict.fromkeys(("transcripts", "long_file", "captions", "streams", "rates"), TEXTS),
}


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return measure()


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_behaviour_is_as_recorded(section: str, measured: dict[str, Any]) -> None:
    found = compare(EXPECTED[section], measured[section], TOLERANCES.get(section, NUMBERS))
    assert not found.problems, "\n".join(found.problems)
