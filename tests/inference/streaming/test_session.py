"""The live session: with a scripted engine for its states, with real weights and speech for its text."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.vad import VADEvent, VoiceActivityDetector
from src.inference.engine_base import DecodingResult
from src.inference.engines import load_engine
from src.inference.options import DecodingOptions
from src.inference.streaming.commit import AlignAtt, ChunkMerge, CommitPolicy, Event, LocalAgreement, word_key
from src.inference.streaming.session import StreamingASR
from src.inference.torch_engine import TorchEngine
from src.inference.words import Word, join_words, place_words
from src.utils.config import VADConfig, load_config
from src.utils.errors import AudioError, ModelError
from src.utils.languages import graphemes, join_texts
from tests.inference.scripted import ScriptedEngine
from tests.inference.test_words import TEXTS


def clock_audio(duration_sec: float) -> Waveform:
    """Audio whose samples are their own position, so that a scripted engine knows what it was given."""
    return np.arange(round(duration_sec * SAMPLE_RATE), dtype=np.float32)


def talk(*stretches: tuple[float, float], word_sec: float = 0.4) -> list[Word]:
    """Numbered words that fill stretches of time."""
    starts = [t for begin, end in stretches for t in np.arange(begin, end - word_sec + 1e-6, word_sec)]
    return [Word(f"w{i}", float(t), float(t) + word_sec, 0.9) for i, t in enumerate(starts)]


class Script:
    """Hears the words of `script` that lie in the audio; the last one is garbled while it is being said."""

    def __init__(self, script: Sequence[Word]) -> None:
        self.script, self.text = script, join_words(script)
        self.calls: list[tuple[float, float]] = []
        self.prompts: list[str] = []
        self.fail_at: set[int] = set()

    def __call__(self, audio: Waveform, options: DecodingOptions) -> list[Word]:
        begin, end = float(audio[0]) / SAMPLE_RATE, float(audio[-1] + 1) / SAMPLE_RATE
        self.calls.append((begin, end))
        self.prompts.append(options.prompt)
        if len(self.calls) - 1 in self.fail_at:
            raise RuntimeError("CUDA error: device-side assert")
        heard = [word for word in self.script if begin - 0.05 <= word.start_sec < end - 0.05]
        texts = [word.text if word.end_sec <= end + 0.05 else "garbled" for word in heard]
        return [
            Word(text, word.start_sec - begin, min(word.end_sec, end) - begin, 0.9)
            for text, word in zip(texts, heard, strict=True)
        ]


class ScriptedDetector:
    """A detector that knows where speech is; it reports with the delays of the real one."""

    config = VADConfig()

    def __init__(self, *speech: tuple[float, float], silence_sec: float = 0.5) -> None:
        self._speech, self._silence_sec, self._now, self._open = speech, silence_sec, 0.0, False

    def stream(self, min_silence_sec: float) -> ScriptedDetector:
        return ScriptedDetector(*self._speech, silence_sec=min_silence_sec)

    def feed(self, samples: Waveform) -> list[VADEvent]:
        before, self._now = self._now, self._now + len(samples) / SAMPLE_RATE
        events = []
        for begin, end in self._speech:
            for kind, at, delay in (("start", begin, 0.15), ("end", end, self._silence_sec)):
                if before < at + delay <= self._now:
                    self._open = kind == "start"
                    events.append(VADEvent(kind, at, self._now))
        return events

    def finish(self) -> list[VADEvent]:
        return [VADEvent("end", self._now, self._now)] if self._open else []


def session(
    hear: Callable[..., Any], *, vad: Any = None, context: Any = "full", given: Any = None, engine: Any = None,
    **streaming: Any,
) -> StreamingASR:  # fmt: skip
    chosen: dict[str, Any] = {
        "policy": "local_agreement",
        "min_chunk_sec": 0.8,
        "display_guard_sec": 0.0,
        "end_of_turn_sec": 0.5,
    }
    chosen |= streaming
    engine = ScriptedEngine(hear, audio_context=context, **(engine or {}))
    config = load_config(None, overrides={"streaming": chosen})
    return StreamingASR(engine=engine, vad=vad, config=config, **({"clock": lambda: 0.0} | (given or {})))


def feed_in_pieces(asr: StreamingASR, audio: Waveform, cuts: Sequence[int] = ()) -> list[Event]:
    events = [event for piece in np.split(audio, cuts) for event in asr.feed(piece)]
    return events + asr.flush()


def joined(events: Iterable[Event]) -> str:
    """Join texts as a client does."""
    text = ""
    for event in events:
        text += " " * event.space + event.text
    return text


def test_every_word_is_committed_once_over_many_buffers() -> None:
    script = Script(talk((0.0, 60.0)))
    asr = session(script, buffer_sec=6)
    events = feed_in_pieces(asr, clock_audio(60.0), range(0, 60 * SAMPLE_RATE, 12_800))
    assert asr.transcript == script.text
    assert max(end - begin for begin, end in script.calls) <= 6.0
    assert events[-1].kind == "final"
    assert feed_in_pieces(session(silent := Script([]), buffer_sec=4), clock_audio(60.0)) == []
    assert max(end - begin for begin, end in silent.calls) <= 4.0


@pytest.mark.parametrize("vad", [None, ScriptedDetector((0.5, 9.0), (9.8, 20.0))])
def test_any_chunking_gives_the_same_events_whose_commits_are_the_transcript(vad: ScriptedDetector | None) -> None:
    script, audio = Script(talk((0.5, 9.0), (9.8, 20.0))), clock_audio(21.0)
    asr = session(script, vad=vad, buffer_sec=5)
    events = feed_in_pieces(asr, audio)
    for kind in ("commit", "final"):
        assert joined(event for event in events if event.kind == kind) == asr.transcript
    assert asr.result(events).text == asr.transcript
    assert [event.sequence for event in events] == list(range(len(events)))
    times = [event.audio_sec for event in events]
    assert times == sorted(times)
    assert all(word.end_sec <= event.audio_sec for event in events for word in event.words)
    cuts = np.sort(np.random.default_rng(0).integers(0, len(audio), 70)).tolist()
    asr.reset()
    assert (asr.transcript, asr.audio_sec, asr.updates) == ("", 0.0, 0)
    assert feed_in_pieces(asr, audio, cuts) == events


VERSE = "一二三四五六七八九十百千万亿" * 18  # four characters a second


class Reader:
    """Hears `VERSE` right; a character that has begun when the audio ends is not heard yet."""

    def __init__(self, *, runs: bool) -> None:
        self.runs = runs
        self.prefixes: list[str] = []

    def __call__(self, audio: Waveform, options: DecodingOptions) -> list[Word]:
        begin, end = float(audio[0]) / SAMPLE_RATE, float(audio[-1] + 1) / SAMPLE_RATE
        self.prefixes.append(options.prefix)
        heard = VERSE[int(begin * 4) : int(end * 4)]
        if self.runs:  # as one word, whose end is that of the audio
            return [Word(heard, 0.0, end - begin, 0.9)] if heard else []
        return [Word(char, i / 4, (i + 1) / 4, 0.9, space=False) for i, char in enumerate(heard)]


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize("policy", ["alignatt", "local_agreement", "chunk_merge"])
def test_a_script_without_spaces_is_committed_whole_and_once(policy: str, runs: bool) -> None:
    for pieces in (4_800, 12_345):
        asr = session(reader := Reader(runs=runs), policy=policy, min_chunk_sec=0.3)
        events = feed_in_pieces(asr, clock_audio(60.0), range(0, 60 * SAMPLE_RATE, pieces))
        assert asr.transcript == VERSE[:240]
        assert asr.result(events).text == joined(e for e in events if e.kind == "commit") == asr.transcript
        assert " " not in "".join(reader.prefixes)
        assert all(prefix in VERSE for prefix in reader.prefixes)
        assert any(reader.prefixes) == (policy == "alignatt")
        late_sec = [e.audio_sec - word.end_sec for e in events if e.kind == "commit" for word in e.words]
        assert max(late_sec) < 2.5


class Teller(ScriptedEngine):
    """Hears a text as tokens, whose times it takes otherwise each time; goes on after the tokens that it is given."""

    def __init__(
        self, vocabulary: Any, text: str, rng: np.random.Generator, pause_sec: float, shake_sec: float
    ) -> None:
        super().__init__(lambda *_: [], audio_context="full")
        self.language = "en"
        self.vocabulary, self.rng, self.shake_sec = vocabulary, rng, shake_sec
        cuts = [0, *sorted(rng.integers(1, len(text), len(text) // 4)), len(text)]  # tokens that no encoder makes
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
        coded = [vocabulary._tokenizer.encode(piece, add_special_tokens=False).ids for piece in pieces]
        self.tokens = [token for piece in coded for token in piece]
        counts = [word.tokens for word in place_words(vocabulary, self.tokens)]
        self.whole = {0, *itertools.accumulate(counts)}  # where whole characters end
        half = min(self.whole, key=lambda at: abs(at - len(self.tokens) / 2))
        self.turns = [(0.0, half * 0.12), (half * 0.12 + pause_sec, len(self.tokens) * 0.12 + pause_sec)]
        at = np.arange(len(self.tokens) + 1)
        self.begin_sec, self.end_sec = at * 0.12 + (at >= half) * pause_sec, at * 0.12 + (at > half) * pause_sec
        self.forced: list[tuple[int, ...]] = []

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        begin, end = float(audios[0][0]) / SAMPLE_RATE, float(audios[0][-1] + 1) / SAMPLE_RATE
        first = int(np.searchsorted(self.begin_sec, begin - 0.06))
        stop = int(np.searchsorted(self.end_sec[1:], end + 0.01))
        self.forced.append(given := options.prefix_tokens)
        if given:  # the very tokens that were heard there
            near = [at for at in range(len(self.tokens)) if tuple(self.tokens[at : at + len(given)]) == given]
            assert near, (given, self.tokens)
            first = min(near, key=lambda at: abs(at - first))
        first = min(at for at in self.whole if at >= first)
        stop = max(at for at in self.whole if at <= max(stop, first + len(given)))
        heard = self.tokens[first:stop]
        times = np.append(self.begin_sec[first:stop], self.end_sec[stop]) - begin
        shake_sec = self.shake_sec if given else 0.0
        shaken = np.sort(times + self.rng.uniform(-shake_sec, shake_sec, len(times))).clip(0, end - begin)
        words = place_words(self.vocabulary, heard, entered_sec=shaken, probabilities=[0.9] * len(heard))
        return [DecodingResult(join_words(words), tuple(heard), -0.1, words, "en")]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("policy", ["alignatt", "local_agreement"])
def test_any_script_is_forced_in_the_tokens_that_were_heard(base_vocabulary: Any, policy: str, text: str) -> None:
    text = join_texts([text] * 2)
    trials = [(0.0, 29.0, 0, 0.5), (0.0, 3.0, 20, 0.05), (1.0, 4.0, 0, 0.05)]
    for seed, (pause_sec, buffer_sec, prompt, shake_sec) in enumerate(trials):
        engine = Teller(base_vocabulary, text, np.random.default_rng(seed), pause_sec, shake_sec)
        streaming = {"policy": policy, "min_chunk_sec": 0.3, "buffer_sec": buffer_sec, "max_prompt_tokens": prompt}
        config = load_config(None, overrides={"streaming": streaming})
        asr = StreamingASR(engine=engine, vad=ScriptedDetector(*engine.turns) if pause_sec else None, config=config)
        events = feed_in_pieces(asr, clock_audio(engine.turns[-1][1] + pause_sec))
        commits = [event for event in events if event.kind == "commit"]
        assert joined(commits) == asr.transcript == text
        assert [w for e in events if e.kind == "final" for w in e.words] == [w for e in commits for w in e.words]
        # each commit ends with a token and with a character
        ends = {base_vocabulary.decode(engine.tokens[:at]).strip() for at in engine.whole}
        for count in range(1, len(commits) + 1):
            assert joined(commits[:count]) in ends
        assert any(engine.forced) == (policy == "alignatt")


def unsteady(rng: np.random.Generator, script: Sequence[Word], steady: float) -> Callable[..., list[Word]]:
    """Hear the words of a script, each time spelt and timed otherwise, and some not at all; 1.0 hears them right."""

    def hear(audio: Waveform, options: DecodingOptions) -> list[Word]:
        begin, end = float(audio[0]) / SAMPLE_RATE, float(audio[-1] + 1) / SAMPLE_RATE
        words, last, shake = [], 0.0, 0.2 * (1.0 - steady)
        for word in script:
            if not begin - 0.05 <= word.start_sec < end - 0.05 or rng.random() > 0.9 + steady:
                continue
            start = max(last, word.start_sec - begin + rng.normal(0, shake))
            last = min(max(start + 0.02, word.end_sec - begin + rng.normal(0, shake)), end - begin)
            variant = f"v{rng.integers(3)}" if rng.random() >= steady else ""
            text = f"{word.text}{variant}" if word.end_sec <= end + 0.05 else f"half{rng.random()}"
            words.append(Word(text, min(start, last), last, 0.9))
        return words

    return hear


@pytest.mark.parametrize("policy", [lambda: AlignAtt(0.55), LocalAgreement, ChunkMerge])
@given(seed=st.integers(0, 10_000), steady=st.sampled_from([0.0, 0.5, 1.0]), buffer_sec=st.sampled_from([2.0, 4.0]))
@settings(max_examples=15, deadline=None)
def test_no_audio_is_dropped_while_it_has_an_uncommitted_hypothesis(
    policy: Callable[[], CommitPolicy], seed: int, steady: float, buffer_sec: float
) -> None:
    rng = np.random.default_rng(seed)
    script = talk((0.0, 20.0), word_sec=float(rng.choice([0.1, 0.3, 1.1, 3.0])))
    made = policy()
    update, flush, tail = made.update, made.flush, []

    def watched_update(words: Sequence[Word], *, audio_end_sec: float) -> Any:
        committed, tail[:] = update(words, audio_end_sec=audio_end_sec)
        return committed, tuple(tail)

    def watched_flush(words: Sequence[Word]) -> Any:
        tail[:] = [word for word in tail if word not in words]
        return flush(words)

    made.update, made.flush = watched_update, watched_flush  # type: ignore[method-assign]
    asr = session(unsteady(rng, script, steady), buffer_sec=buffer_sec, given={"policy": lambda: made})
    for piece in np.split(clock_audio(20.0), range(0, 20 * SAMPLE_RATE, 512)):
        asr.feed(piece)
        assert all(word.start_sec >= asr._start / SAMPLE_RATE - 1e-3 for word in tail)
        assert len(asr._audio) / SAMPLE_RATE <= buffer_sec + 0.04
    asr.flush()
    if steady == 1.0 and not isinstance(made, ChunkMerge) and script[0].end_sec < buffer_sec / 2:
        assert asr.transcript == join_words(script)


def test_a_policy_of_the_caller_replaces_the_configured_one() -> None:
    script, audio = talk((0.5, 9.0)), clock_audio(9.5)
    options: list[dict[str, Any]] = [
        {}, {"policy": "alignatt", "guard_sec": 1.5}, {"given": {"policy": lambda: AlignAtt(1.5)}},
    ]  # fmt: skip
    first, second, third = (feed_in_pieces(session(Script(script), **each), audio) for each in options)
    assert first != second == third


def test_silence_makes_no_model_call() -> None:
    script = Script(talk((5.0, 7.0)))
    asr = session(script, vad=ScriptedDetector((5.0, 7.0)))
    asr.feed(clock_audio(30.0))
    assert all(5.0 < end < 7.6 for _, end in script.calls)
    assert asr.transcript == script.text
    asr = session(unasked := Script([]), vad=VoiceActivityDetector())
    noise = np.random.default_rng(0).normal(0, 0.003, 10 * SAMPLE_RATE).astype(np.float32)
    assert asr.feed(np.zeros(30 * SAMPLE_RATE, np.float32)) + asr.feed(noise) + asr.flush() == []
    assert unasked.calls == []


@pytest.mark.parametrize(
    ("options", "last_begin_sec"),
    [({}, 0.0), ({"context": "dynamic"}, 4.0), ({"given": {"context_silence_sec": 0.0}}, 4.0)],
)
def test_a_pause_makes_the_words_final_and_only_a_model_of_single_sentences_begins_again(
    options: dict[str, Any], last_begin_sec: float
) -> None:
    speech = (0.0, 3.2), (4.4, 7.0)
    script = Script(talk(*speech))
    events = feed_in_pieces(session(script, vad=ScriptedDetector(*speech), **options), clock_audio(8.0))
    finals = [event for event in events if event.kind == "final"]
    assert [event.text for event in finals] == ["w0 w1 w2 w3 w4 w5 w6 w7", "w8 w9 w10 w11 w12 w13"]
    assert finals[0].audio_sec == pytest.approx(3.7, abs=0.05)
    assert script.calls[-1][0] == pytest.approx(last_begin_sec, abs=0.15)


def test_speech_after_an_early_end_of_the_text_is_decoded_by_itself() -> None:
    script = Script(talk((0.0, 3.2), (3.6, 8.0)))

    def stops_at_pauses(audio: Waveform, options: DecodingOptions) -> list[Word]:
        words = script(audio, options)
        gaps = (i for i in range(1, len(words)) if words[i].start_sec - words[i - 1].end_sec > 0.3)
        return words[: next(gaps, len(words))]

    asr = session(stops_at_pauses, vad=ScriptedDetector((0.0, 8.0)))
    feed_in_pieces(asr, clock_audio(9.0))
    assert asr.transcript == script.text


@pytest.mark.parametrize(("max_prompt_tokens", "prompt"), [(3, "w5 w6 w7"), (0, "")])
def test_after_two_seconds_of_silence_the_text_becomes_the_prompt(max_prompt_tokens: int, prompt: str) -> None:
    speech = (0.0, 3.2), (6.0, 8.0)
    script = Script(talk(*speech))
    asr = session(script, vad=ScriptedDetector(*speech), max_prompt_tokens=max_prompt_tokens)
    feed_in_pieces(asr, clock_audio(8.0))
    assert script.calls[-1][0] == pytest.approx(5.6, abs=0.3)
    assert (script.prompts[0], script.prompts[-1]) == ("", prompt)
    assert asr.transcript == script.text


def test_words_outside_speech_are_not_committed() -> None:
    ghost = Word("Thank", 4.2, 4.4, 0.9)
    script = Script([*talk((0.0, 3.2)), ghost])
    asr = session(script, vad=ScriptedDetector((0.0, 3.2), (5.0, 5.4)))
    feed_in_pieces(asr, clock_audio(6.5))
    assert script.calls[-1][1] > ghost.end_sec
    assert "Thank" not in asr.transcript


def test_a_partial_that_comes_to_nothing_is_withdrawn() -> None:
    hypotheses = iter([[Word("um", 0.1, 0.5, 0.9)]])
    asr = session(lambda *_: next(hypotheses, []), vad=ScriptedDetector((0.0, 1.5)), min_chunk_sec=1.2)
    events = feed_in_pieces(asr, clock_audio(3.0))
    assert [(event.kind, event.text) for event in events] == [("partial", "um"), ("partial", "")]


def test_hypotheses_that_never_agree_are_forced_out_of_a_full_buffer() -> None:
    script = Script(talk((0.0, 30.0)))

    def restless(audio: Waveform, options: DecodingOptions) -> list[Word]:
        words = script(audio, options)
        return [Word(f"{w.text}v{len(script.calls)}", w.start_sec, w.end_sec, 0.9) for w in words]

    asr = session(restless, buffer_sec=5)
    feed_in_pieces(asr, clock_audio(30.0))
    assert [word.text.split("v")[0] for word in asr.words] == script.text.split()


def test_a_loop_is_decoded_again_without_the_prompt_and_never_committed() -> None:
    script = Script(talk((0.0, 12.0)))

    def loops_with_prompt(audio: Waveform, options: DecodingOptions) -> list[Word]:
        words = script(audio, options)
        return [Word("yes", 3.0 + 0.01 * i, 3.01 + 0.01 * i, 0.9) for i in range(20)] if options.prompt else words

    asr = session(loops_with_prompt, buffer_sec=4, max_prompt_tokens=48)
    feed_in_pieces(asr, clock_audio(12.0))
    assert any(script.prompts)
    assert asr.transcript == script.text


def test_the_models_error_reaches_the_caller_with_its_time_and_no_audio_is_lost() -> None:
    script = Script(talk((0.0, 10.0)))
    script.fail_at = {4}
    asr = session(script)
    with pytest.raises(RuntimeError) as caught:
        asr.feed(clock_audio(10.0))
    assert caught.value.__notes__ == ["while streaming 0.00 to 4.06 s"]
    events = asr.feed(np.zeros(0, np.float32))
    script.fail_at = {len(script.calls)}  # the last update
    with pytest.raises(RuntimeError):
        asr.flush()
    events += asr.flush()
    assert asr.transcript == script.text == asr.result(events).text


def test_a_slow_model_is_asked_less_often_live_and_no_less_in_a_file() -> None:
    now = 0.0

    def slow(*_: Any) -> list[Word]:
        nonlocal now
        now += 2.5
        return []

    asr = session(slow, given={"clock": lambda: now})
    asr.feed(clock_audio(12.0))
    assert asr.updates == 1 + 3  # at 0.8 s, then every 3 s
    assert asr.longest_update_sec == 2.5
    result = asr.stream_audio(np.zeros(8 * SAMPLE_RATE, np.float32))
    assert (result.updates, result.compute_sec, result.rtf) == (10, 25.0, 25.0 / 8)


def test_another_sample_rate_is_resampled_and_a_change_of_rate_is_refused() -> None:
    lengths: list[int] = []
    asr = session(lambda audio, options: lengths.append(len(audio)) or [])  # type: ignore[func-returns-value]
    for block in np.split(np.zeros(96_000, np.float32), 20):
        asr.feed(block, sample_rate=48_000)
    with pytest.raises(AudioError, match=r"16000 .* 48000 Hz"):
        asr.feed(np.zeros(10, np.float32))
    asr.flush()
    assert lengths[-1] == pytest.approx(2 * SAMPLE_RATE, abs=2)


def test_unfit_samples_and_no_model_are_refused() -> None:
    for samples in (np.zeros((2, 5), np.float32), np.zeros(5, np.int16), np.full(5, np.nan)):
        with pytest.raises(AudioError):
            session(Script([])).feed(samples)
    with pytest.raises(ModelError):
        StreamingASR()


LANGUAGES = ("de", "en", "zh")


class Ear:
    """Detects by how much audio it is given, and says in which language it was asked to decode."""

    def __init__(self, *guesses: tuple[float, str, float]) -> None:
        self.guesses = guesses  # from so many seconds on: code, probability
        self.asked: list[float] = []

    def detect(self, audio: Waveform) -> tuple[str, float]:
        sec = len(audio) / SAMPLE_RATE
        self.asked.append(sec)
        return next((code, p) for since, code, p in reversed(self.guesses) if sec >= since)

    def hear(self, audio: Waveform, options: DecodingOptions) -> list[Word]:
        begin, end = float(audio[0]) / SAMPLE_RATE, float(audio[-1] + 1) / SAMPLE_RATE
        times = np.arange(np.ceil(begin * 2) / 2, end - 0.5 + 1e-6, 0.5)
        return [Word(f"{options.language}{t:g}", t - begin, t - begin + 0.5, 0.9) for t in times]

    def session(self, **given: Any) -> StreamingASR:
        return session(self.hear, min_chunk_sec=0.3, engine={"languages": LANGUAGES, "detect": self.detect}, **given)


def spoken(events: Iterable[Event]) -> set[str]:
    return {word.text[:2] for event in events for word in event.words}


def test_the_language_is_detected_once_on_enough_speech_and_then_kept() -> None:
    ear = Ear((0.0, "en", 0.5), (2.5, "de", 0.6), (5.0, "zh", 0.99))
    asr = ear.session(vad=ScriptedDetector((0.0, 8.0), (12.0, 20.0)))
    events = asr.feed(clock_audio(2.9))
    assert {event.kind for event in events} == {"partial"}  # a guess is shown, and not committed
    assert "en" in spoken(events)
    events += asr.feed(clock_audio(22.0)[round(2.9 * SAMPLE_RATE) :]) + asr.flush()
    assert spoken(event for event in events if event.kind == "commit") == {"de"}
    assert min(ear.asked) >= 1.0
    assert max(ear.asked) < 3.5
    assert (asr.language, asr.result(events).language) == ("de", "de")
    assert {event.language for event in events if event.kind != "partial"} == {"de"}
    asr.reset()
    assert asr.language is None


def test_a_probable_language_is_kept_earlier_and_short_utterances_count_together() -> None:
    sure = Ear((0.0, "zh", 0.5), (1.2, "de", 0.95), (2.0, "en", 0.95))
    events = feed_in_pieces(sure.session(vad=None), clock_audio(6.0))
    assert spoken(event for event in events if event.kind == "commit") == {"de"}
    assert max(sure.asked) < 2.0
    # 0.45 s is too short to show a guess; what is committed where it ends is decoded in the best one
    short = Ear((0.0, "zh", 0.5))
    asr = short.session(vad=ScriptedDetector(*[(t, t + 0.45) for t in range(0, 40, 4)]))
    events = feed_in_pieces(asr, clock_audio(40.0))
    assert len([event for event in events if event.kind == "final"]) == 10
    assert len(short.asked) == 7  # of 0.45 s each
    assert asr.language == "zh"


@pytest.mark.parametrize(("given", "own", "used"), [("zh", "de", "zh"), (None, "de", "de")])
def test_a_given_language_and_the_checkpoints_own_need_no_detection(given: str | None, own: str, used: str) -> None:
    engine = ScriptedEngine(Ear().hear, languages=LANGUAGES)
    engine.language = own
    asr = StreamingASR(engine=engine, config=load_config(None, overrides={"model.language": given}))
    assert spoken(feed_in_pieces(asr, clock_audio(3.0))) == {used}
    assert asr.language == used


def test_a_buffer_holds_no_more_than_the_decoder_can_write() -> None:
    lengths = {}
    for rate in (10.0, 100.0):  # English; Georgian
        script = Script(talk((0.0, 40.0)))
        asr = session(script, engine={"tokens_per_sec": rate})
        feed_in_pieces(asr, clock_audio(40.0))
        assert asr.transcript == script.text
        lengths[rate] = max(end - begin for begin, end in script.calls)
    assert lengths[10.0] == pytest.approx(12.0, abs=0.1)
    assert lengths[100.0] == pytest.approx(443 / 60, abs=0.1)  # at 1.5 times the ordinary rate, 100 / 2.5


def test_a_text_that_ends_at_a_limit_is_continued_and_else_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    script = Script(talk((0.0, 10.0)))

    class Limited(ScriptedEngine):
        limit = 7  # words
        until_sec = math.inf

        def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
            (result,) = super().decode(encoded, audios, options)
            words = result.words or ()
            if len(words) <= self.limit or len(audios[0]) > self.until_sec * SAMPLE_RATE:
                return [result]
            last = replace(words[self.limit - 1], text="w")  # within a word
            return [replace(result, words=(*words[: self.limit - 1], last), truncated=True)]

    engine = Limited(script)
    result = StreamingASR(engine=engine, config=load_config(None)).stream_audio(clock_audio(10.0))
    assert (result.text, result.truncated) == (script.text, 0)
    assert not caplog.text
    engine.limit, engine.until_sec = 1, 4.0  # hypotheses that later ones correct
    result = StreamingASR(engine=engine, config=load_config(None)).stream_audio(clock_audio(10.0))
    assert (result.text, result.truncated) == (script.text, 0)
    engine.until_sec = math.inf
    assert StreamingASR(engine=engine, config=load_config(None)).stream_audio(clock_audio(10.0)).truncated > 0
    assert "streaming.buffer_sec" in caplog.text


def test_two_sessions_on_one_engine_in_two_threads_are_apart() -> None:
    engine, audio = ScriptedEngine(Script(script := talk((0.0, 20.0)))), clock_audio(20.0)
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda _: StreamingASR(engine=engine).stream_audio(audio).text, range(2)))
    assert texts == [join_words(script)] * 2


def test_memory_is_bounded_over_ten_minutes() -> None:
    asr = session(Script([]), vad=ScriptedDetector(*[(t, t + 7.0) for t in range(0, 600, 10)]))
    minute = clock_audio(60.0)
    asr.feed(minute)
    tracemalloc.start()
    for _ in range(9):
        asr.feed(minute)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 1_000_000


@pytest.mark.slow
class TestOnRealEngines:
    """AlignAtt on stock tiny.en at full context, and the real detector."""

    CONFIG = load_config(None, overrides={"device": "cpu", "streaming": {"policy": "alignatt", "min_chunk_sec": 1.0}})
    PHRASE = 5 * SAMPLE_RATE  # of the public clip, which pauses from 2.3 to 3.2 s and from 4.5 to 5.3 s

    def listen(self, engine: Any, audio: Waveform) -> list[tuple[str, float]]:
        """Return each committed word with how much audio had been heard."""
        vad = VoiceActivityDetector(self.CONFIG.vad)
        asr = StreamingASR(engine=engine, vad=vad, config=self.CONFIG, clock=lambda: 0.0)
        commits = [event for event in asr.feed(audio) + asr.flush() if event.kind == "commit"]
        return [(word_key(word), event.audio_sec) for event in commits for word in event.words]

    def test_both_engines_commit_the_same_words_and_a_pause_costs_none(self, _tiny_en: Any, jfk: Waveform) -> None:
        engine = load_engine("tiny.en", self.CONFIG, engine="ctranslate2", compute_type="float32")
        whole = self.listen(engine, jfk[: self.PHRASE])
        assert whole == self.listen(TorchEngine(*_tiny_en), jfk[: self.PHRASE])
        assert len({heard_sec for _, heard_sec in whole}) > 1, "all came at the end"
        for silence_sec in (0.8, 2.5):  # kept as context, and dropped
            silence = np.zeros(round(silence_sec * SAMPLE_RATE), dtype=np.float32)
            heard = self.listen(engine, np.insert(jfk[: self.PHRASE], round(2.8 * SAMPLE_RATE), silence))
            assert " ".join(word for word, _ in heard) == "and so my fellow americans ask not"

    @pytest.mark.parametrize(("voice", "code", "text"), [
        ("ja", "ja", "あしたの あさ、きたの ほうで おおあめが ふるそうです。"),
        ("cmn-latn-pinyin", "zh", "wo3 ge1ge5 zuo2tian1 wan3shang5 zai4 shi4chang3 shang5 mai3 le5 ping2guo3"),
    ])  # fmt: skip
    def test_commits_without_spaces_are_the_text(
        self, base: Any, espeak: Callable[[str, str], bytes], voice: str, code: str, text: str
    ) -> None:
        audio = load_audio(espeak(text, voice))
        overrides: dict[str, Any] = {"device": "cpu", "model.language": code}
        engine = TorchEngine(*base)
        (offline,) = engine.decode(engine.encode([audio], 0.5), [audio], DecodingOptions(language=code))
        # a beginning that is forced ends within a run of characters, and nothing comes between
        beginning = offline.text[: len(offline.text) // 2]
        given = DecodingOptions(language=code, prefix=beginning, word_timestamps=True)
        (forced,) = engine.decode(engine.encode([audio], 0.5), [audio], given)
        assert join_words(forced.words or ()) == forced.text
        assert forced.text.startswith(beginning)
        assert not forced.text.startswith(f"{beginning} ")
        # all at once is the text of the clip; piece by piece commits are the transcript
        for chunk_sec in (5.0, 1.0):
            config = load_config(None, overrides={**overrides, "streaming.min_chunk_sec": chunk_sec})
            asr = StreamingASR(engine=engine, vad=None, config=config)
            events = asr.feed(audio) + asr.flush()
            assert joined(event for event in events if event.kind == "commit") == asr.transcript
            assert all(len(graphemes(word.text.strip("、。，"))) == 1 or word.text.isascii() for word in asr.words)
            if len(audio) < chunk_sec * SAMPLE_RATE:
                assert asr.transcript == offline.text
