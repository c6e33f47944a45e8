"""Terms that recordings are expected to have: a bias towards their tokens, which decides between near alternatives.

Whisper knows a name or a term of a field when it is told, as a prompt, but a prompt takes positions of the decoder, and
a model that was tuned without prompts gets worse by them. The bias is that of shallow fusion with a trie over the
terms' tokens (Zhao et al. 2019, "Shallow-Fusion End-to-End Contextual Biasing"). It needs no access to the decoder's
loop: a text is decoded, the first token is sought that the bias would have changed, and decoding goes on from there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from src.data.sources.manifest import read_text
from src.utils.errors import DataError
from src.utils.files import expand_path

BEGIN_SHARE = 0.5  # of the strength, for the first token of a term: with all of it, terms begin where none is said
RARE_COUNT, RARE_CHARACTERS = 2, 5  # of rare words: at most so often, and at least so long

_Node = dict[int, "_Node"]


class HotwordBias:
    """What is added to the log-probabilities of tokens that begin a term or continue one.

    Terms count as they are spelt, in lower case and with a capital. `encode` gives the tokens of a text, `end` is the
    token that ends one; `strength` is in nats.
    """

    def __init__(
        self, terms: Iterable[str], encode: Callable[[str], Sequence[int]], *, end: int, strength: float
    ) -> None:
        self._strength, self._end = strength, end
        self._root: _Node = {}
        for term in terms:
            for spelling in {term, term.lower(), term[:1].upper() + term[1:].lower()}:
                node = self._root
                for token in encode(spelling):
                    node = node.setdefault(token, {})

    def first_change(self, tokens: Sequence[int], logits: NDArray[np.float32]) -> tuple[int, int] | None:
        """Return the first place where a token of a term beats the one that was taken, and that token.

        `logits` (places, vocabulary) are those of the newest tokens and of the one after them; older tokens are given,
        and a term may have begun in them.
        """
        first, active = len(tokens) + 1 - len(logits), list[_Node]()
        for at in range(len(tokens) + 1):
            taken = tokens[at] if at < len(tokens) else self._end
            # times are above the end token: they stay, and so does the end after one
            is_free = taken <= self._end and not (taken == self._end and at and tokens[at - 1] > taken)
            if at >= first and is_free:
                raised = dict.fromkeys(self._root, self._strength * BEGIN_SHARE)
                for node in active:
                    raised |= dict.fromkeys(node, self._strength)
                scores = logits[at - first, list(raised)] + np.fromiter(raised.values(), dtype=np.float32)
                best = list(raised)[int(scores.argmax())]
                if scores.max() > logits[at - first, taken] + raised.get(taken, 0.0):
                    return at, best
            if at < len(tokens):
                active = [node[tokens[at]] for node in [*active, self._root] if tokens[at] in node]
        return None


def read_hotwords(given: str) -> tuple[str, ...]:
    """Return the terms of a setting: separated by commas or lines, or the path of a .txt file with one per line.

    Raises:
        DataError: the file is not there, or is not text.
    """
    if given.strip().lower().endswith(".txt") and "\n" not in given:
        path = expand_path(given.strip())
        if not path.is_file():
            raise DataError(
                f"hotwords: there is no file {path}; write the terms, separated by commas, or a file's path"
            )
        found = read_text(path).splitlines()
    else:
        found = re.split(r"[,;\n、，]", given)
    return tuple(dict.fromkeys(term for term in (" ".join(each.split()) for each in found) if term))


def rare_words(texts: Iterable[str]) -> list[str]:
    """Return the words of transcripts that are long and seldom, by the alphabet: names and terms are among them."""
    counts = Counter(word.strip("'’-") for text in texts for word in re.findall(r"[\w'’-]+", text))
    return sorted(word for word, count in counts.items() if count <= RARE_COUNT and len(word) >= RARE_CHARACTERS)
