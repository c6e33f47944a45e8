"""The live session: with a scripted engine for its states, with real weights and speech for its text."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import soundfile as sf

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.vad import VADEvent, VoiceActivityDetector
from src.inference.decoding import TorchEngine
from src.inference.engines import Engine, load_engine
from src.inference.options import DecodingOptions
from src.inference.streaming.commit import AlignAtt, CommitPolicy, Event, word_key
from src.inference.streaming.session import StreamingASR
from src.inference.words import Word
from src.utils.config import VADConfig, load_config
from src.utils.errors import AudioError, ModelError
from tests.inference.scripted import ScriptedEngine

JFK_TEXT = "and so my fellow americans ask not what your country can do for you ask what you can do for your country"


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
        self.script = script
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

    def __init__(self, *speech: tuple[float, float]) -> None:
        self._speech, self._now, self._open = speech, 0.0, False

    def stream(self) -> ScriptedDetector:
        return ScriptedDetector(*self._speech)

    def feed(self, samples: Waveform) -> list[VADEvent]:
        before, self._now = self._now, self._now + len(samples) / SAMPLE_RATE
        events = []
        for begin, end in self._speech:
            for kind, at, delay in (("start", begin, 0.15), ("end", end, 0.5)):
                if before < at + delay <= self._now:
                    self._open = kind == "start"
                    events.append(VADEvent(kind, at, self._now))
        return events

    def finish(self) -> list[VADEvent]:
        return [VADEvent("end", self._now, self._now)] if self._open else []


def session(
    hear: Callable[..., Any],
    *,
    detector: Any = None,
    clock: Callable[[], float] = lambda: 0.0,
    context: Any = "full",
    context_silence_sec: float | None = None,
    make_policy: Callable[[], CommitPolicy] | None = None,
    **streaming: Any,
) -> StreamingASR:
    settings = {"policy": "local_agreement", "min_chunk_sec": 0.8, "display_guard_sec": 0.0, **streaming}
    config = load_config(None, overrides={"streaming": settings})
    engine = ScriptedEngine(hear, audio_context=context)
    return StreamingASR(
        engine=engine, vad=detector, config=config, context_silence_sec=context_silence_sec, policy=make_policy,
        clock=clock,
    )  # fmt: skip


def feed_in_pieces(asr: StreamingASR, audio: Waveform, cuts: Sequence[int] = ()) -> list[Event]:
    events = [event for piece in np.split(audio, cuts) for event in asr.feed(piece)]
    return events + asr.flush()


def text_of(words: Sequence[Word]) -> str:
    return " ".join(word.text for word in words)


def test_every_word_is_committed_once_over_many_buffers() -> None:
    script = Script(talk((0.0, 60.0)))
    asr = session(script, buffer_sec=6)
    events = feed_in_pieces(asr, clock_audio(60.0), range(0, 60 * SAMPLE_RATE, 12_800))
    assert asr.transcript == text_of(script.script)
    assert max(end - begin for begin, end in script.calls) <= 6.0
    assert events[-1].kind == "final"
    assert feed_in_pieces(session(silent := Script([]), buffer_sec=4), clock_audio(60.0)) == []
    assert max(end - begin for begin, end in silent.calls) <= 4.0


def test_the_transcript_is_exactly_the_commits_and_events_are_numbered() -> None:
    speech = (0.0, 9.0), (11.0, 20.0)
    asr = session(Script(talk(*speech)), detector=ScriptedDetector(*speech))
    events = feed_in_pieces(asr, clock_audio(21.0))
    for kind in ("commit", "final"):
        assert " ".join(event.text for event in events if event.kind == kind) == asr.transcript
    assert asr.result(events).text == asr.transcript
    assert [event.sequence for event in events] == list(range(len(events)))
    times = [event.audio_sec for event in events]
    assert times == sorted(times)
    assert all(word.end_sec <= event.audio_sec for event in events for word in event.words)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("detector", [None, ScriptedDetector((0.5, 9.0), (9.8, 20.0))])
def test_any_chunking_gives_the_same_events(seed: int, detector: ScriptedDetector | None) -> None:
    script, audio = talk((0.5, 9.0), (9.8, 20.0)), clock_audio(21.0)
    expected = feed_in_pieces(session(Script(script), detector=detector, buffer_sec=5), audio)
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(audio), 70)).tolist()
    assert feed_in_pieces(session(Script(script), detector=detector, buffer_sec=5), audio, cuts) == expected


def test_a_policy_of_the_caller_replaces_the_configured_one() -> None:
    script, audio = talk((0.5, 9.0)), clock_audio(9.5)
    events = [
        feed_in_pieces(session(Script(script), **given), audio, range(16_000, len(audio), 16_000))
        for given in ({}, {"policy": "alignatt", "guard_sec": 1.5}, {"make_policy": lambda: AlignAtt(1.5)})
    ]
    assert events[0] != events[1] == events[2]


def test_silence_makes_no_model_call() -> None:
    script = Script(talk((5.0, 7.0)))
    asr = session(script, detector=ScriptedDetector((5.0, 7.0)))
    asr.feed(clock_audio(30.0))
    assert all(5.0 < end < 7.6 for _, end in script.calls)
    assert asr.transcript == text_of(script.script)
    asr = session(unasked := Script([]), detector=VoiceActivityDetector())
    noise = np.random.default_rng(0).normal(0, 0.003, 10 * SAMPLE_RATE).astype(np.float32)
    assert asr.feed(np.zeros(30 * SAMPLE_RATE, np.float32)) + asr.feed(noise) + asr.flush() == []
    assert unasked.calls == []


@pytest.mark.parametrize(
    ("given", "last_begin_sec"), [({}, 0.0), ({"context": "dynamic"}, 4.0), ({"context_silence_sec": 0.0}, 4.0)]
)
def test_a_pause_makes_the_words_final_and_only_a_model_of_single_sentences_begins_again(
    given: dict[str, Any], last_begin_sec: float
) -> None:
    speech = (0.0, 3.2), (4.4, 7.0)
    script = Script(talk(*speech))
    events = feed_in_pieces(session(script, detector=ScriptedDetector(*speech), **given), clock_audio(8.0))
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

    asr = session(stops_at_pauses, detector=ScriptedDetector((0.0, 8.0)))
    feed_in_pieces(asr, clock_audio(9.0))
    assert asr.transcript == text_of(script.script)


@pytest.mark.parametrize(("max_prompt_tokens", "prompt"), [(3, "w5 w6 w7"), (0, "")])
def test_after_two_seconds_of_silence_the_text_becomes_the_prompt(max_prompt_tokens: int, prompt: str) -> None:
    speech = (0.0, 3.2), (6.0, 8.0)
    script = Script(talk(*speech))
    asr = session(script, detector=ScriptedDetector(*speech), max_prompt_tokens=max_prompt_tokens)
    feed_in_pieces(asr, clock_audio(8.0))
    assert script.calls[-1][0] == pytest.approx(5.6, abs=0.3)
    assert (script.prompts[0], script.prompts[-1]) == ("", prompt)
    assert asr.transcript == text_of(script.script)


def test_words_outside_speech_are_not_committed() -> None:
    ghost = Word("Thank", 4.2, 4.4, 0.9)
    script = Script([*talk((0.0, 3.2)), ghost])
    asr = session(script, detector=ScriptedDetector((0.0, 3.2), (5.0, 5.4)))
    feed_in_pieces(asr, clock_audio(6.5))
    assert script.calls[-1][1] > ghost.end_sec
    assert "Thank" not in asr.transcript


def test_hypotheses_that_never_agree_are_forced_out_of_a_full_buffer() -> None:
    script = Script(talk((0.0, 30.0)))

    def restless(audio: Waveform, options: DecodingOptions) -> list[Word]:
        words = script(audio, options)
        return [Word(f"{w.text}v{len(script.calls)}", w.start_sec, w.end_sec, 0.9) for w in words]

    asr = session(restless, buffer_sec=5)
    feed_in_pieces(asr, clock_audio(30.0))
    assert [word.text.split("v")[0] for word in asr.words] == [word.text for word in script.script]


def test_a_loop_is_decoded_again_without_the_prompt_and_never_committed() -> None:
    script = Script(talk((0.0, 12.0)))

    def loops_with_prompt(audio: Waveform, options: DecodingOptions) -> list[Word]:
        words = script(audio, options)
        return [Word("yes", 3.0 + 0.01 * i, 3.01 + 0.01 * i, 0.9) for i in range(20)] if options.prompt else words

    asr = session(loops_with_prompt, buffer_sec=4, max_prompt_tokens=48)
    feed_in_pieces(asr, clock_audio(12.0))
    assert any(script.prompts)
    assert asr.transcript == text_of(script.script)


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
    assert asr.transcript == text_of(script.script)
    assert " ".join(event.text for event in events if event.kind == "commit") == asr.transcript


def test_a_slow_model_is_asked_less_often_live_and_no_less_in_a_file() -> None:
    now = 0.0

    def slow(*_: Any) -> list[Word]:
        nonlocal now
        now += 2.5
        return []

    live = session(slow, clock=lambda: now)
    live.feed(clock_audio(12.0))
    assert live.updates == 1 + 3  # at 0.8 s, then every 3 s
    assert live.longest_update_sec == 2.5
    result = session(slow, clock=lambda: now).stream_audio(np.zeros(8 * SAMPLE_RATE, np.float32))
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


def test_memory_is_bounded_over_ten_minutes() -> None:
    asr = session(Script([]), detector=ScriptedDetector(*[(t, t + 7.0) for t in range(0, 600, 10)]))
    minute = clock_audio(60.0)
    asr.feed(minute)
    tracemalloc.start()
    for _ in range(9):
        asr.feed(minute)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 1_000_000


def test_reset_begins_again_at_zero_and_a_with_block_flushes_at_its_end() -> None:
    asr = session(Script(talk((0.0, 4.0))))
    with asr:
        asr.feed(clock_audio(4.0))
    first = asr.words
    assert len(first) == 10
    asr.reset()
    assert (asr.transcript, asr.audio_sec, asr.updates) == ("", 0.0, 0)
    feed_in_pieces(asr, clock_audio(4.0))
    assert asr.words == first


def test_two_sessions_on_one_engine_do_not_mix() -> None:
    script = Script(talk((0.0, 8.0)))
    first, second = session(script), session(script)
    audio = clock_audio(8.0)
    for at in range(0, 4 * SAMPLE_RATE, 4_000):
        first.feed(audio[at : at + 4_000])
        second.feed(audio[2 * at : 2 * at + 8_000])
    first.flush()
    second.flush()
    assert first.transcript == text_of(talk((0.0, 4.0)))
    assert second.transcript == text_of(talk((0.0, 8.0)))


@pytest.mark.slow
class TestOnRealEngines:
    """AlignAtt on stock tiny.en at full context, and the real detector."""

    CONFIG = load_config(None, overrides={"device": "cpu", "streaming": {"policy": "alignatt", "min_chunk_sec": 1.0}})
    PHRASE = 5 * SAMPLE_RATE  # of the public clip, which pauses from 2.3 to 3.2 s and from 4.5 to 5.3 s
    PHRASE_WORDS = ("and", "so", "my", "fellow", "americans", "ask", "not")

    @pytest.fixture(scope="class")
    def engine(self) -> Engine:
        return load_engine("tiny.en", self.CONFIG, engine="ctranslate2", compute_type="float32")

    def listen(self, engine: Engine, pieces: Sequence[Waveform]) -> list[tuple[str, float, float]]:
        """Return each committed word with its end and how much audio had been heard."""
        asr = StreamingASR(
            engine=engine, vad=VoiceActivityDetector(self.CONFIG.vad), config=self.CONFIG, clock=lambda: 0.0
        )
        events = [event for piece in pieces for event in asr.feed(piece)] + asr.flush()
        commits = [event for event in events if event.kind == "commit"]
        return [(word_key(w), round(w.end_sec, 3), event.audio_sec) for event in commits for w in event.words]

    def test_any_chunks_of_samples_give_the_same_commits(self, engine: Engine, jfk: Waveform) -> None:
        audio = jfk[: self.PHRASE]
        whole = self.listen(engine, [audio])
        assert tuple(word for word, _, _ in whole) == self.PHRASE_WORDS
        assert len({heard_sec for _, _, heard_sec in whole}) > 1, "all came at the end"
        ragged = np.sort(np.random.default_rng(0).choice(len(audio), size=40, replace=False))
        for cuts in (np.arange(1, 300), ragged):
            assert self.listen(engine, np.split(audio, cuts)) == whole

    def test_both_engines_commit_the_same_words(self, engine: Engine, _tiny_en: Any, jfk: Waveform) -> None:
        both = [self.listen(each, [jfk[: self.PHRASE]]) for each in (TorchEngine(*_tiny_en), engine)]
        assert [(word, heard) for word, _, heard in both[0]] == [(word, heard) for word, _, heard in both[1]]

    @pytest.mark.parametrize("silence_sec", [0.8, 2.5])  # kept as context, and dropped
    def test_a_pause_in_a_sentence_costs_no_word(self, engine: Engine, jfk: Waveform, silence_sec: float) -> None:
        silence = np.zeros(round(silence_sec * SAMPLE_RATE), dtype=np.float32)
        heard = self.listen(engine, [np.insert(jfk[: self.PHRASE], round(2.8 * SAMPLE_RATE), silence)])
        assert tuple(word for word, _, _ in heard) == self.PHRASE_WORDS

    def test_files_of_any_length_give_their_text(self, _tiny_en: Any, jfk: Waveform, tmp_path: Path) -> None:
        config = load_config(None, overrides={"streaming.min_chunk_sec": 2.0})
        asr = StreamingASR(*_tiny_en, vad=VoiceActivityDetector(), config=config)
        for duration_sec, expected in ((11.0, JFK_TEXT), (1.9, "and so my fellow"), (0.75, "and so")):
            sf.write(tmp_path / "clip.wav", jfk[: round(duration_sec * SAMPLE_RATE)], SAMPLE_RATE)
            result = asr.stream_from_file(tmp_path / "clip.wav")
            heard = " ".join(word_key(word) for word in asr.words)
            assert jiwer.wer(expected, heard) <= 0.3, heard
            assert result.audio_sec == pytest.approx(duration_sec, abs=0.01)
