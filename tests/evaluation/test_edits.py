from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from src.evaluation.edits import align_words, word_counts
from src.evaluation.text import PLAIN

texts = st.lists(st.sampled_from(["the", "a", "cat", "dog", "sat"]), max_size=8).map(" ".join)


def test_an_alignment_done_by_hand() -> None:
    steps = align_words("The cat sat on the big mat.", "a cat sat the big mat now", PLAIN)
    assert [(step.edit, step.reference, step.hypothesis) for step in steps] == [
        ("substitute", "the", "a"),
        ("equal", "cat", "cat"),
        ("equal", "sat", "sat"),
        ("delete", "on", None),
        ("equal", "the", "the"),
        ("equal", "big", "big"),
        ("equal", "mat", "mat"),
        ("insert", None, "now"),
    ]


@given(texts, texts)
def test_an_alignment_has_the_counts_of_its_row_and_both_texts(reference: str, hypothesis: str) -> None:
    steps = align_words(reference, hypothesis, PLAIN)
    (counts,) = word_counts([reference], [hypothesis], PLAIN)
    edits = [step.edit for step in steps]
    assert [edits.count(edit) for edit in ("substitute", "delete", "insert")] == [
        counts.substitutions, counts.deletions, counts.insertions,
    ]  # fmt: skip
    assert " ".join(step.reference for step in steps if step.reference is not None) == reference
    assert " ".join(step.hypothesis for step in steps if step.hypothesis is not None) == hypothesis
    assert (counts.hits, counts.hypothesis) == (edits.count("equal"), len(hypothesis.split()))


def test_an_empty_side_is_all_edits() -> None:
    assert [step.edit for step in align_words("", "thank you", PLAIN)] == ["insert", "insert"]
    assert [step.edit for step in align_words("thank you", "", PLAIN)] == ["delete", "delete"]
    assert align_words("", "", PLAIN) == ()
