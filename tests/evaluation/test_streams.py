"""Streams of clips: every word stands where it is said, whatever is joined, repeated or mixed in."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from src.data.audio import SAMPLE_RATE
from src.data.utterance import Utterance
from src.data.vad import SpeechSegment
from src.evaluation import streams
from src.evaluation.streams import PAUSE_SEC, PUBLIC_CLIP, AlignedClip, SpeechStream, add_noise, join_clips
from src.inference.words import Word
from src.utils.errors import DataError

# of jfk.flac, by an HMM aligner (pocketsphinx 5.1); pauses follow "Americans", "not" and "you,"
JFK_ENDS = {"fellow": 1.63, "Americans": 2.16, "not": 4.30, "country": 6.42, "you,": 7.67, "country.": 10.46}
OFFSETS = {"the": (0.1, 0.4), "cat": (0.4, 0.9), "sat": (0.0, 0.5), "up": (0.0, 0.3)}


def clip(name: str, duration_sec: float, text: str) -> AlignedClip:
    """A clip of a tone."""
    audio = 0.1 * np.sin(np.arange(round(duration_sec * SAMPLE_RATE)) * 0.3).astype(np.float32)
    return AlignedClip(name, text, audio, tuple(Word(word, *OFFSETS[word], 0.9) for word in text.split()))


CLIPS = [clip("a", 1.0, "the cat"), clip("b", 0.5, "sat"), clip("c", 0.7, "up")]


def assert_words_stand_in_their_clips(stream: SpeechStream) -> None:
    for word in stream.words:
        start_sec = stream.clips[word.clip].start_sec
        assert word.text in stream.clips[word.clip].text
        assert (word.start_sec - start_sec, word.end_sec - start_sec) == pytest.approx(OFFSETS[word.text])


def test_clips_are_joined_with_pauses_of_silence() -> None:
    stream = join_clips(CLIPS, name="three", seed=7)
    assert [(each.id, each.text) for each in stream.clips] == [("a", "the cat"), ("b", "sat"), ("c", "up")]
    for heard, original in zip(stream.clip_audios(), CLIPS, strict=True):
        np.testing.assert_array_equal(heard, original.audio)
    ends = [*(each.start_sec for each in stream.clips[1:]), stream.duration_sec]
    for each, next_sec in zip(stream.clips, ends, strict=True):
        assert PAUSE_SEC[0] <= next_sec - each.end_sec <= PAUSE_SEC[1]
        assert not stream.audio[round(each.end_sec * SAMPLE_RATE) : round(next_sec * SAMPLE_RATE)].any()
    assert_words_stand_in_their_clips(stream)
    assert stream.repeats == 1
    np.testing.assert_array_equal(join_clips(CLIPS, name="three", seed=7).audio, stream.audio)


def test_too_few_clips_are_repeated_in_another_order_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        stream = join_clips(CLIPS, name="long", seed=7, duration_sec=60)
    assert 60 <= stream.duration_sec < 60 + 1.0 + PAUSE_SEC[1]
    ids = [each.id for each in stream.clips]
    passes = [ids[at : at + 3] for at in range(0, len(ids) - 3, 3)]
    assert passes[0] == ["a", "b", "c"]
    assert all(sorted(each) == ["a", "b", "c"] for each in passes)
    assert len({tuple(each) for each in passes}) > 2
    assert f"heard {stream.repeats} times" in caplog.text
    assert_words_stand_in_their_clips(stream)
    assert len(join_clips(CLIPS, name="short", seed=7, duration_sec=1.1).clips) == 1
    with pytest.raises(DataError, match="no clip"):
        join_clips([], name="none", seed=7)


def test_noise_has_the_ratio_asked_and_the_middle_is_silence_and_noise_alone() -> None:
    stream = join_clips(CLIPS, name="speech", seed=7)
    noisy = add_noise(stream, snr_db=6, seed=1, silence_sec=2, noise_sec=3)
    (silence, noise) = noisy.no_speech
    assert (silence[1] - silence[0], noise[1] - noise[0], silence[1]) == pytest.approx((2, 3, noise[0]))
    assert noisy.duration_sec == pytest.approx(stream.duration_sec + 5)
    inside = [noisy.audio[round(a * SAMPLE_RATE) : round(b * SAMPLE_RATE)] for a, b in noisy.no_speech]
    assert not inside[0].any()
    power = float(np.mean(inside[1].astype(float) ** 2))
    speech = float(np.mean(stream.audio.astype(float) ** 2))
    assert 10 * np.log10(speech / power) == pytest.approx(6, abs=1.0)  # pink: its level wanders over 3 s
    kept = np.delete(noisy.audio, slice(round(silence[0] * SAMPLE_RATE), round(noise[1] * SAMPLE_RATE)))
    added = kept.astype(float) - stream.audio
    assert 10 * np.log10(speech / np.mean(added**2)) == pytest.approx(6, abs=1e-3)
    assert_words_stand_in_their_clips(noisy)
    assert all(a.end_sec < b.start_sec for a, b in itertools.pairwise(noisy.clips))
    assert not any(b < word.end_sec and word.start_sec < e for word in noisy.words for b, e in noisy.no_speech)


def test_loud_noise_does_not_clip_and_no_stretch_need_be_opened() -> None:
    stream = join_clips(CLIPS[:1], name="speech", seed=7)
    loud = add_noise(stream, snr_db=-30, seed=1, silence_sec=0, noise_sec=0)
    assert np.abs(loud.audio).max() == pytest.approx(1.0)
    assert (loud.no_speech, len(loud.audio)) == ((), len(stream.audio))


def test_a_word_that_runs_into_a_pause_is_cut_to_its_speech() -> None:
    speech = [SpeechSegment(0.3, 1.0), SpeechSegment(2.0, 3.0)]
    words = [Word("and", 0.0, 0.6, 1), Word("so", 0.6, 2.1, 1), Word("ask", 2.1, 3.4, 1), Word("not", 4.0, 4.2, 1)]
    cut = [(word.start_sec, word.end_sec) for word in streams.cut_to_speech(words, speech)]
    assert cut == [(0.3, 0.6), (0.6, 1.0), (2.1, 3.0), (4.0, 4.2)]  # "not" is in no speech: as it was
    assert list(streams.cut_to_speech(words, [])) == words


def test_aligned_words_end_where_an_aligner_of_another_kind_has_them(_tiny_en: tuple[Any, Any]) -> None:
    aligner = streams.WordAligner(*_tiny_en)
    aligned = aligner.align(PUBLIC_CLIP)
    assert " ".join(word.text for word in aligned.words) == PUBLIC_CLIP.text
    ends = [word.end_sec for word in aligned.words]
    assert ends == sorted(ends)
    found = {word.text: word.end_sec for word in aligned.words}  # the last "country."
    assert {text: found[text] for text in JFK_ENDS} == pytest.approx(JFK_ENDS, abs=0.3)
    with pytest.raises(DataError, match="utterance mute: no transcript"):
        aligner.align(Utterance("mute", PUBLIC_CLIP.audio, " "))


@pytest.mark.slow
def test_in_a_script_without_spaces_each_character_has_its_time(base: Any, espeak: Any) -> None:
    text = "今天天气很好，我们去公园。"
    clip = Utterance("zh", espeak(text, "cmn"), text, language="zh")
    aligned = streams.WordAligner(*base, language=None).align(clip)
    assert "".join(word.text for word in aligned.words) == text
    assert len(aligned.words) == 11  # punctuation belongs to the character before it
    ends = [word.end_sec for word in aligned.words]
    assert ends == sorted(ends)
    assert max(np.diff(ends)) < 1.5
    assert aligned.language == join_clips([aligned], name="one", seed=0).language == "zh"


def test_a_stream_takes_clips_from_all_over_and_pauses_between(sample: list[Utterance]) -> None:
    stream = streams.make_stream(sample, num_clips=3, seed=1)
    assert stream.ids == (sample[0].id, sample[250].id, sample[-1].id)
    assert stream.text == " ".join(sample[i].text for i in (0, 250, -1))
    paused_sec = stream.duration_sec - sum(sample[i].meta["duration"] for i in (0, 250, -1))
    assert 3 * 0.3 < paused_sec < 3 * 0.8
    mixed = [replace(u, language="hi" if i < 3 else "en") for i, u in enumerate(sample[:5])]
    one = streams.make_stream(mixed, num_clips=5, seed=1)  # a session has one language
    assert (one.language, len(one.clips)) == ("hi", 3)
    with pytest.raises(DataError, match="no utterance"):
        streams.make_stream([], num_clips=3, seed=1)
