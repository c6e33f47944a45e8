"""The live session: with a scripted decoder for its states, with real weights and speech for its text."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jiwer
import numpy as np
import pytest
import soundfile as sf

from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.vad import VADEvent, VoiceActivityDetector
from src.inference.options import DecodingOptions, DecodingResult
from src.inference.streaming.commit import word_key
from src.inference.streaming.events import Event
from src.inference.streaming.live import StreamingASR
from src.inference.words import Word
from src.utils.config import Config, VADConfig, load_config
from src.utils.errors import AudioError

JFK = Path(__file__).parents[3] / "src/data/samples/jfk.flac"
JFK_TEXT = "and so my fellow americans ask not what your country can do for you ask what you can do for your country"
PROCESSOR = SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda text, add_special_tokens: text.split()))


def clock_audio(duration_sec: float) -> Waveform:
    """Audio whose samples are their own position, so that a scripted decoder knows what it was given."""
    return np.arange(round(duration_sec * SAMPLE_RATE), dtype=np.float32)


def talk(*stretches: tuple[float, float], word_sec: float = 0.4) -> list[Word]:
    """Numbered words that fill stretches of time."""
    starts = [t for begin, end in stretches for t in np.arange(begin, end - word_sec + 1e-6, word_sec)]
    return [Word(f"w{i}", float(t), float(t) + word_sec, 0.9) for i, t in enumerate(starts)]


class ScriptedDecoder:
    """Hears the words of `script` that lie in the audio; the last one is garbled while it is being said."""

    def __init__(self, script: Sequence[Word]) -> None:
        self.script = script
        self.calls: list[tuple[float, float]] = []
        self.prompts: list[str] = []
        self.fail_at: set[int] = set()

    def __call__(
        self, model: Any, processor: Any, audios: Sequence[Waveform], options: DecodingOptions
    ) -> list[DecodingResult]:
        (audio,) = audios
        begin, end = float(audio[0]) / SAMPLE_RATE, float(audio[-1] + 1) / SAMPLE_RATE
        self.calls.append((begin, end))
        self.prompts.append(options.prompt)
        if len(self.calls) - 1 in self.fail_at:
            raise RuntimeError("CUDA error: device-side assert")
        words = []
        for word in self.script:
            if word.start_sec >= begin - 0.05 and word.start_sec < end - 0.05:
                text = word.text if word.end_sec <= end + 0.05 else "garbled"
                words.append(Word(text, word.start_sec - begin, min(word.end_sec, end) - begin, word.probability))
        return [DecodingResult(" ".join(w.text for w in words), (), -0.1, tuple(words))]


class ScriptedDetector:
    """A detector that knows where speech is; it reports with the delays of the real one."""

    def __init__(self, *speech: tuple[float, float]) -> None:
        self.config = VADConfig()
        self._speech = speech

    def stream(self) -> ScriptedDetector:
        copy = ScriptedDetector(*self._speech)
        copy._now, copy._open = 0.0, False
        return copy

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
    decoder: Callable[..., Any], *, detector: Any = None, clock: Callable[[], float] = lambda: 0.0, **streaming: Any
) -> StreamingASR:
    settings = {"policy": "local_agreement", "min_chunk_sec": 0.8, "display_guard_sec": 0.0, **streaming}
    config = load_config(None, overrides={"streaming": settings})
    return StreamingASR(
        None, PROCESSOR, vad=detector, config=config, context_silence_sec=2.0, clock=clock, decode_fn=decoder
    )


def feed_in_pieces(asr: StreamingASR, audio: Waveform, cuts: Sequence[int]) -> list[Event]:
    events = [event for piece in np.split(audio, cuts) for event in asr.feed(piece)]
    return events + asr.flush()


def text_of(words: Sequence[Word]) -> str:
    return " ".join(word.text for word in words)


def test_every_word_is_committed_once_over_many_buffers() -> None:
    script = talk((0.0, 60.0))
    decoder = ScriptedDecoder(script)
    asr = session(decoder, buffer_sec=6)
    events = feed_in_pieces(asr, clock_audio(60.0), range(0, 60 * SAMPLE_RATE, 12_800))
    assert asr.transcript == text_of(script)
    assert max(end - begin for begin, end in decoder.calls) <= 6.0
    assert events[-1].kind == "final"


def test_the_transcript_is_exactly_the_commits_and_events_are_numbered() -> None:
    asr = session(ScriptedDecoder(talk((0.0, 9.0), (11.0, 20.0))), detector=ScriptedDetector((0.0, 9.0), (11.0, 20.0)))
    events = feed_in_pieces(asr, clock_audio(21.0), [])
    assert " ".join(event.text for event in events if event.kind == "commit") == asr.transcript
    assert " ".join(event.text for event in events if event.kind == "final") == asr.transcript
    assert [event.sequence for event in events] == list(range(len(events)))
    times = [event.audio_sec for event in events]
    assert times == sorted(times)
    assert all(word.end_sec <= event.audio_sec for event in events for word in event.words)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("detector", [None, ScriptedDetector((0.5, 9.0), (9.8, 20.0))])
def test_any_chunking_gives_the_same_events(seed: int, detector: ScriptedDetector | None) -> None:
    script = talk((0.5, 9.0), (9.8, 20.0))
    audio = clock_audio(21.0)
    expected = feed_in_pieces(session(ScriptedDecoder(script), detector=detector, buffer_sec=5), audio, [])
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(audio), 70)).tolist()
    events = feed_in_pieces(session(ScriptedDecoder(script), detector=detector, buffer_sec=5), audio, cuts)
    assert events == expected


def test_silence_makes_no_model_call() -> None:
    decoder = ScriptedDecoder(talk((5.0, 7.0)))
    asr = session(decoder, detector=ScriptedDetector((5.0, 7.0)))
    asr.feed(clock_audio(30.0))
    assert all(5.0 < end < 7.6 for _, end in decoder.calls)
    assert asr.transcript == text_of(decoder.script)


def test_a_pause_makes_the_words_final_and_the_audio_before_it_stays_as_context() -> None:
    decoder = ScriptedDecoder(talk((0.0, 3.2), (4.4, 7.0)))
    asr = session(decoder, detector=ScriptedDetector((0.0, 3.2), (4.4, 7.0)))
    events = feed_in_pieces(asr, clock_audio(8.0), [])
    finals = [event for event in events if event.kind == "final"]
    assert [event.text for event in finals] == ["w0 w1 w2 w3 w4 w5 w6 w7", "w8 w9 w10 w11 w12 w13"]
    assert finals[0].audio_sec == pytest.approx(3.7, abs=0.05)
    assert {begin for begin, _ in decoder.calls} == {0.0}


def test_a_model_of_single_sentences_starts_afresh_after_a_pause_and_loses_no_word() -> None:
    decoder = ScriptedDecoder(talk((0.0, 3.2), (4.4, 7.0)))
    model = SimpleNamespace(config=SimpleNamespace(audio_context="dynamic"))
    asr = StreamingASR(
        model, PROCESSOR, vad=ScriptedDetector((0.0, 3.2), (4.4, 7.0)), clock=lambda: 0.0, decode_fn=decoder
    )
    feed_in_pieces(asr, clock_audio(8.0), [])
    assert decoder.calls[-1][0] == pytest.approx(4.0, abs=0.15)
    assert asr.transcript == text_of(decoder.script)


def test_speech_after_an_early_end_of_the_text_is_decoded_by_itself() -> None:
    script = talk((0.0, 3.2), (3.6, 8.0))

    class StopsAtPauses(ScriptedDecoder):
        def __call__(self, *args: Any) -> list[DecodingResult]:
            (result,) = super().__call__(*args)
            words = result.words or ()
            gaps = (i for i in range(1, len(words)) if words[i].start_sec - words[i - 1].end_sec > 0.3)
            return [DecodingResult("", (), 0.0, words[: next(gaps, len(words))])]

    asr = session(StopsAtPauses(script), detector=ScriptedDetector((0.0, 8.0)))
    feed_in_pieces(asr, clock_audio(9.0), [])
    assert asr.transcript == text_of(script)


def test_a_silence_above_two_seconds_drops_the_audio_and_its_text_becomes_the_prompt() -> None:
    decoder = ScriptedDecoder(talk((0.0, 3.2), (6.0, 8.0)))
    asr = session(decoder, detector=ScriptedDetector((0.0, 3.2), (6.0, 8.0)), max_prompt_tokens=3)
    feed_in_pieces(asr, clock_audio(8.0), [])
    assert decoder.calls[-1][0] == pytest.approx(5.6, abs=0.3)
    assert (decoder.prompts[0], decoder.prompts[-1]) == ("", "w5 w6 w7")
    assert asr.transcript == text_of(decoder.script)


def test_a_prompt_of_no_tokens_is_no_prompt() -> None:
    decoder = ScriptedDecoder(talk((0.0, 20.0)))
    feed_in_pieces(session(decoder, buffer_sec=4, max_prompt_tokens=0), clock_audio(20.0), [])
    assert set(decoder.prompts) == {""}


def test_words_outside_speech_are_not_committed() -> None:
    ghost = Word("Thank", 4.2, 4.4, 0.9)
    decoder = ScriptedDecoder([*talk((0.0, 3.2)), ghost])
    asr = session(decoder, detector=ScriptedDetector((0.0, 3.2), (5.0, 5.4)))
    feed_in_pieces(asr, clock_audio(6.5), [])
    assert decoder.calls[-1][1] > ghost.end_sec
    assert "Thank" not in asr.transcript


def test_hypotheses_that_never_agree_are_forced_out_of_a_full_buffer() -> None:
    script = talk((0.0, 30.0))
    calls = 0

    def restless(*args: Any) -> list[DecodingResult]:
        nonlocal calls
        calls += 1
        (result,) = ScriptedDecoder(script)(*args)
        words = tuple(Word(f"{w.text}v{calls}", w.start_sec, w.end_sec, 0.9) for w in result.words or ())
        return [DecodingResult("", (), 0.0, words)]

    asr = session(restless, buffer_sec=5)
    feed_in_pieces(asr, clock_audio(30.0), [])
    assert [word.text.split("v")[0] for word in asr.words] == [word.text for word in script]


def test_audio_without_words_does_not_fill_the_buffer() -> None:
    decoder = ScriptedDecoder([])
    asr = session(decoder, buffer_sec=4)
    assert feed_in_pieces(asr, clock_audio(60.0), []) == []
    assert max(end - begin for begin, end in decoder.calls) <= 4.0


def test_a_loop_is_decoded_again_without_the_prompt_and_never_committed() -> None:
    script = talk((0.0, 12.0))

    class LoopsWithPrompt(ScriptedDecoder):
        def __call__(self, *args: Any) -> list[DecodingResult]:
            (result,) = super().__call__(*args)
            if args[3].prompt:
                loop = tuple(Word("yes", 3.0 + 0.01 * i, 3.01 + 0.01 * i, 0.9) for i in range(20))
                return [DecodingResult("", (), 0.0, loop)]
            return [result]

    decoder = LoopsWithPrompt(script)
    asr = session(decoder, buffer_sec=4, max_prompt_tokens=48)
    feed_in_pieces(asr, clock_audio(12.0), [])
    assert any(decoder.prompts)
    assert asr.transcript == text_of(script)


def test_the_models_error_reaches_the_caller_with_its_time_and_no_audio_is_lost() -> None:
    script = talk((0.0, 10.0))
    decoder = ScriptedDecoder(script)
    decoder.fail_at = {4}
    asr = session(decoder)
    audio = clock_audio(10.0)
    with pytest.raises(RuntimeError, match="device-side assert") as caught:
        asr.feed(audio)
    assert caught.value.__notes__ == ["while streaming 0.00 to 4.06 s"]
    events = asr.feed(np.zeros(0, np.float32)) + asr.flush()
    assert asr.transcript == text_of(script)
    assert " ".join(event.text for event in events if event.kind == "commit") == asr.transcript


def test_an_error_in_the_last_update_can_be_tried_again() -> None:
    decoder = ScriptedDecoder(talk((0.0, 2.0)))
    decoder.fail_at = {2}
    asr = session(decoder)
    asr.feed(clock_audio(2.0))
    with pytest.raises(RuntimeError):
        asr.flush()
    asr.flush()
    assert asr.transcript == text_of(decoder.script)


def test_a_slow_model_is_asked_less_often_live_and_no_less_in_a_file(tmp_path: Path) -> None:
    now = 0.0

    def slow(*args: Any) -> list[DecodingResult]:
        nonlocal now
        now += 2.5
        return ScriptedDecoder([])(*args)

    live = session(slow, clock=lambda: now)
    live.feed(clock_audio(12.0))
    assert live.updates == 1 + 3  # at 0.8 s, then every 3 s
    assert live.longest_update_sec == 2.5
    sf.write(tmp_path / "a.wav", np.zeros(8 * SAMPLE_RATE), SAMPLE_RATE)
    result = session(slow, clock=lambda: now).stream_from_file(tmp_path / "a.wav")
    assert (result.updates, result.compute_sec, result.rtf) == (10, 25.0, 25.0 / 8)


def test_another_sample_rate_is_resampled_and_a_change_of_rate_is_refused() -> None:
    lengths = []

    def listen(model: Any, processor: Any, audios: Sequence[Waveform], options: Any) -> list[DecodingResult]:
        lengths.append(len(audios[0]))
        return [DecodingResult("", (), 0.0, ())]

    asr = session(listen)
    for block in np.split(np.zeros(96_000, np.float32), 20):
        asr.feed(block, sample_rate=48_000)
    with pytest.raises(AudioError, match="16000 Hz in a stream of 48000 Hz"):
        asr.feed(np.zeros(10, np.float32))
    asr.flush()
    assert lengths[-1] == pytest.approx(2 * SAMPLE_RATE, abs=2)


@pytest.mark.parametrize("samples", [np.zeros((2, 5), np.float32), np.zeros(5, np.int16), np.full(5, np.nan)])
def test_unfit_samples_are_refused(samples: Any) -> None:
    with pytest.raises(AudioError):
        session(ScriptedDecoder([])).feed(samples)


def test_memory_is_bounded_over_ten_minutes() -> None:
    asr = session(ScriptedDecoder([]), detector=ScriptedDetector(*[(t, t + 7.0) for t in range(0, 600, 10)]))
    minute = clock_audio(60.0)
    asr.feed(minute)
    tracemalloc.start()
    for _ in range(9):
        asr.feed(minute)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 1_000_000


def test_reset_begins_again_at_zero() -> None:
    decoder = ScriptedDecoder(talk((0.0, 4.0)))
    asr = session(decoder)
    first = feed_in_pieces(asr, clock_audio(4.0), [])
    asr.reset()
    assert (asr.transcript, asr.audio_sec, asr.updates) == ("", 0.0, 0)
    assert feed_in_pieces(asr, clock_audio(4.0), []) == first


def test_the_end_of_a_with_block_flushes() -> None:
    with session(ScriptedDecoder(talk((0.0, 2.0)))) as asr:
        asr.feed(clock_audio(2.0))
    assert asr.transcript == "w0 w1 w2 w3 w4"


def test_two_sessions_on_one_decoder_do_not_mix() -> None:
    decoder = ScriptedDecoder(talk((0.0, 8.0)))
    first, second = session(decoder), session(decoder)
    audio = clock_audio(8.0)
    for at in range(0, 4 * SAMPLE_RATE, 4_000):
        first.feed(audio[at : at + 4_000])
        second.feed(audio[2 * at : 2 * at + 8_000])
    first.flush()
    second.flush()
    assert first.transcript == text_of(talk((0.0, 4.0)))
    assert second.transcript == text_of(talk((0.0, 8.0)))


class TestWithRealSpeech:
    """Real detector, and stock tiny.en at full context."""

    @pytest.fixture(scope="class")
    def loaded(self) -> tuple[Any, Any]:
        from src.models.whisper_model import WhisperModelManager

        return WhisperModelManager(Config()).initialize_model("tiny.en")

    @pytest.fixture(scope="class")
    def detector(self) -> VoiceActivityDetector:
        return VoiceActivityDetector()

    def test_zeros_and_noise_give_no_model_call_and_no_word(self, detector: VoiceActivityDetector) -> None:
        decoder = ScriptedDecoder([])
        asr = session(decoder, detector=detector)
        noise = np.random.default_rng(0).normal(0, 0.003, 10 * SAMPLE_RATE).astype(np.float32)
        assert asr.feed(np.zeros(30 * SAMPLE_RATE, np.float32)) + asr.feed(noise) + asr.flush() == []
        assert decoder.calls == []

    @pytest.mark.slow
    def test_a_file_gives_its_text(self, loaded: tuple[Any, Any], detector: VoiceActivityDetector) -> None:
        config = load_config(None, overrides={"streaming.min_chunk_sec": 2.0})
        result = StreamingASR(*loaded, vad=detector, config=config).stream_from_file(JFK)
        heard = " ".join(word_key(emitted.word) for emitted in result.words)
        assert jiwer.wer(JFK_TEXT, heard) <= 0.15
        assert [emitted.word for emitted in result.words] == [
            word for event in result.events if event.kind == "commit" for word in event.words
        ]
        assert result.audio_sec == pytest.approx(11.0, abs=0.01)

    @pytest.mark.slow
    @pytest.mark.parametrize(("duration_sec", "expected"), [(1.9, "fellow"), (0.75, "and so")])
    def test_a_short_file_gives_its_text(
        self,
        loaded: tuple[Any, Any],
        detector: VoiceActivityDetector,
        tmp_path: Path,
        duration_sec: float,
        expected: str,
    ) -> None:
        sf.write(tmp_path / "short.wav", load_audio(JFK)[: round(duration_sec * SAMPLE_RATE)], SAMPLE_RATE)
        result = StreamingASR(*loaded, vad=detector).stream_from_file(tmp_path / "short.wav")
        assert expected in result.text.lower()
