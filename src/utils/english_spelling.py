"""The map from British to American spelling that Whisper's English text normaliser uses.

`english_spelling.json` is `whisper/normalizers/english.json` of openai-whisper 20250625 (PyPI source archive, MIT
licence, Copyright (c) 2022 OpenAI), unchanged. Hugging Face checkpoints ship the same map as `normalizer.json`.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from types import MappingProxyType

SPELLING_FILE = "english_spelling.json"
SPELLING_SHA256 = "6607f948be9824d2e1b2fa2223cd94c06c45afa4e05ea0e3d5e1f2bdffde2465"


@cache
def load_english_spelling() -> MappingProxyType[str, str]:
    """Return the map, British spelling to American (1,739 words, lower case), read-only because it is shared."""
    text = resources.files("src.utils").joinpath(SPELLING_FILE).read_text(encoding="utf-8")
    return MappingProxyType(json.loads(text))
