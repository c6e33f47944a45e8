"""Coverage: the speech of a clip that its text leaves out, found by the times of its words.

A decoder may stop at a pause, or skip a sentence, and be sure of what it wrote: its log-probability says nothing about
it. The alignment does. It has to pass through all of the audio, so that the word before or after skipped speech lasts
far longer than its tokens need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from src.data.vad import SpeechSegment
from src.inference.words import Word

UNCOVERED_SEC = 0.8  # speech after the last word that shows that the decoder stopped early
ALIGN_SLACK_SEC = 0.2  # how far a word's time may lie outside padded speech

# Words in a row take up to 2.5 times the ordinary time of their tokens, and 1.5 s. Of 87 segments of slow learners one
# is above (SpeechOcean762, tuned tiny.en). Tuned on single Mandarin sentences, base left some out in 12 of 15:
# nine are above, the other three stop early (2026-11-30).
SLOW_SPEECH = 2.5
SKIPPED_SEC = 1.5


class Uncovered(NamedTuple):
    """Speech that a text leaves out; None where it leaves out none."""

    skipped: SpeechSegment | None = None  # within a run of words, which last too long
    rest: SpeechSegment | None = None  # after the last word; all of it where there is no text


def uncovered_speech(words: Sequence[Word], speech: Sequence[SpeechSegment], *, tokens_per_sec: float) -> Uncovered:
    """Find speech that the tokens of its words do not explain, and speech after the last word.

    Words have numbers of tokens, of which the language has `tokens_per_sec` in ordinary speech; the speech is without
    padding. Both are in order, on the same time axis.
    """

    def speech_sec(start_sec: float, end_sec: float) -> float:
        return sum(max(0.0, min(span.end_sec, end_sec) - max(span.start_sec, start_sec)) for span in speech)

    if not speech:
        return Uncovered()
    # the run of words with the most time beyond what its tokens need
    skipped, rest, most_sec, run_sec, run_from_sec = None, None, SKIPPED_SEC, 0.0, 0.0
    for word in words:
        run_from_sec = run_from_sec if run_sec > 0 else word.start_sec
        needed_sec = word.tokens * SLOW_SPEECH / tokens_per_sec
        run_sec = max(run_sec, 0.0) + speech_sec(word.start_sec, word.end_sec) - needed_sec
        if run_sec >= most_sec:
            most_sec, skipped = run_sec, SpeechSegment(run_from_sec, word.end_sec)
    last_sec = words[-1].end_sec if words else speech[0].start_sec - ALIGN_SLACK_SEC
    if speech_sec(last_sec + ALIGN_SLACK_SEC, speech[-1].end_sec) >= UNCOVERED_SEC:
        rest = SpeechSegment(last_sec if words else speech[0].start_sec, speech[-1].end_sec)
    return Uncovered(skipped, rest)
