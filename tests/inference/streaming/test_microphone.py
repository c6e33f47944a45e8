"""Microphones: a stand-in for sounddevice, and the browser in headless Chromium, which hears a recording."""

from __future__ import annotations

import base64
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile as sf
import soxr
from scipy.signal import correlate

from src.data.audio import SAMPLE_RATE, Waveform
from src.inference.options import DecodingOptions
from src.inference.streaming import microphone as streaming
from src.inference.streaming import session as live
from src.inference.streaming.microphone import BrowserMicrophone, Microphone, eval_in_colab, in_real_time
from src.inference.streaming.session import StreamingASR
from src.inference.words import Word
from src.utils.errors import AudioError, ConfigError, MissingDependencyError
from tests.inference.scripted import ScriptedEngine

RATE = 48_000


class PortAudioError(Exception):
    pass


class FakeSoundDevice(ModuleType):
    """Delivers one block a tenth of a second, from a thread of its own and in one memory, as PortAudio does."""

    PortAudioError = PortAudioError

    def __init__(self, blocks: int = 20, *, overflows: Sequence[int] = (), fail: str | None = None) -> None:
        super().__init__("sounddevice")
        self._blocks, self._overflows, self._fail = blocks, overflows, fail
        self.closed = False

    def query_devices(self, *, kind: str) -> dict[str, float]:
        if self._fail == "query":
            raise PortAudioError("Error querying device -1")
        return {"default_samplerate": float(RATE)}

    @contextmanager
    def InputStream(
        self, *, samplerate: int, channels: int, dtype: str, blocksize: int, callback: Any
    ) -> Iterator[None]:
        if self._fail == "open":
            raise PortAudioError("Device unavailable [PaErrorCode -9985]")
        assert (samplerate, channels, dtype) == (RATE, 1, "float32")
        self.thread = threading.Thread(target=self._deliver, args=(blocksize, callback))
        self.thread.start()
        try:
            yield
        finally:
            self.thread.join()
            self.closed = True

    def _deliver(self, blocksize: int, callback: Any) -> None:
        memory = np.empty((blocksize, 1), np.float32)
        for i in range(self._blocks):
            memory[:] = (i + 1) / 1000
            callback(memory, blocksize, None, SimpleNamespace(input_overflow=i in self._overflows))
        memory[:] = np.nan


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType | None], None]:
    return lambda module: monkeypatch.setitem(sys.modules, "sounddevice", module)


def test_all_audio_arrives_in_order_and_what_is_lost_is_counted(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(fake := FakeSoundDevice(blocks=12, overflows=[2, 5]))
    microphone = Microphone(1.0)
    audio = np.concatenate(list(microphone.blocks()))
    assert len(audio) == RATE
    np.testing.assert_allclose(audio[:: RATE // 10], np.arange(1, 11) / 1000)
    assert (microphone.overruns, fake.closed) == (2, True)
    monkeypatch.setattr(streaming, "MAX_QUEUED_SEC", 0.3)  # a consumer that is too slow
    microphone = Microphone(1.0)
    for _ in range(5):
        microphone._enqueue(np.zeros((4_800, 1), np.float32), 4_800, None, None)
    assert microphone.overruns == 2


def test_a_device_that_fails_or_is_silent_is_an_audio_error(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PATIENCE_SEC", 0.05)
    for fake in (FakeSoundDevice(fail="query"), FakeSoundDevice(fail="open"), silent := FakeSoundDevice(blocks=3)):
        install(fake)
        with pytest.raises(AudioError):
            list(Microphone(1.0).blocks())
    assert silent.closed


def session(hear: Callable[..., Any] = lambda *_: [Word("hello", 0.1, 0.5, 0.9)]) -> StreamingASR:
    return StreamingASR(engine=ScriptedEngine(hear))


def test_what_cannot_record_is_refused_with_what_to_do(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Microphone, BrowserMicrophone):
        with pytest.raises(ConfigError, match="duration_sec is 0"):
            kind(0)
    with pytest.raises(MissingDependencyError, match="Colab"):
        list(BrowserMicrophone(1.0).blocks())
    install(None)
    monkeypatch.setattr(live, "in_colab", lambda: True)  # a script there has no page
    with pytest.raises(MissingDependencyError, match="pip install sounddevice"):
        session().stream_from_microphone(1.0)


def test_a_session_decodes_in_the_callers_thread_as_events_come(install: Any) -> None:
    install(fake := FakeSoundDevice())
    decoding_threads = set()

    def hear(audio: Waveform, options: DecodingOptions) -> list[Word]:
        decoding_threads.add(threading.current_thread())
        return [Word("hello", 0.1, 0.5, 0.9)]

    shown: list[Any] = []
    result = session(hear).stream_from_microphone(2.0, on_event=shown.append)
    assert (result.text, result.overruns, result.events) == ("hello", 0, tuple(shown))
    assert result.audio_sec == pytest.approx(2.0, abs=0.01)
    assert decoding_threads == {threading.current_thread()} != {fake.thread}
    install(fake := FakeSoundDevice())
    with pytest.raises(ZeroDivisionError):
        session(lambda *_: 1 / 0).stream_from_microphone(2.0)
    assert fake.closed


def test_a_file_in_real_time_gives_its_text_at_its_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, now = tmp_path / "tone.wav", [0.0]
    sf.write(path, np.sin(np.arange(32_000) / 10), 16_000)

    def sleep(sec: float) -> None:
        now[0] += sec

    monkeypatch.setattr(live, "in_real_time", partial(in_real_time, clock=lambda: now[0], sleep=sleep))
    shown: list[tuple[float, Any]] = []
    asr = session()
    result = asr.stream_from_file(path, real_time=True, on_event=lambda event: shown.append((now[0], event)))
    assert result.text == asr.stream_from_file(path).text == "hello"
    assert [event for _, event in shown] == list(result.events)
    assert all(event.audio_sec <= at_sec + 1e-6 for at_sec, event in shown)
    assert now[0] == pytest.approx(2.0)


FAKE_COLAB = Path(__file__).parents[2] / "fake_colab"
NO_WORKLETS = "Object.defineProperty(AudioContext.prototype, 'audioWorklet', { value: undefined })"
NO_RESAMPLING = """(() => {
  const create = AudioContext.prototype.createMediaStreamSource;
  AudioContext.prototype.createMediaStreamSource = function (stream) {
    if (this.sampleRate === 16000) throw new DOMException("different sample-rate", "NotSupportedError");
    return create.call(this, stream);
  };
})()"""
NO_DEVICE = """navigator.mediaDevices.getUserMedia = async () => {
  throw new DOMException("Requested device not found", "NotFoundError"); }, true"""
CLICK_FIRST = """(() => {
  const resume = AudioContext.prototype.resume;
  const clicked = new Promise((done) => document.addEventListener("click", done));
  AudioContext.prototype.resume = async function () { await clicked; return resume.call(this); };
})()"""
LISTEN = """(() => {
  const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  navigator.mediaDevices.getUserMedia = async (wish) => { window.heard = await ask(wish); return window.heard; };
})()"""


@contextmanager
def importable_colab() -> Iterator[None]:
    """`google.colab` is the stand-in, and afterwards absent again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FAKE_COLAB)
        yield
    for name in [name for name in sys.modules if name.startswith("google.colab")]:
        del sys.modules[name]


@pytest.fixture
def colab(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This is a notebook in Colab."""
    monkeypatch.setattr(live, "in_notebook", lambda: True)
    with importable_colab():
        yield


@pytest.fixture(scope="module")
def shared_page(tmp_path_factory: pytest.TempPathFactory, jfk: np.ndarray) -> Iterator[Any]:
    """A page in a browser whose microphone hears the public clip."""
    with importable_colab():
        from google.colab._page import CHROMIUM, OutputPage
    if not CHROMIUM:
        pytest.skip("no chromium on the PATH: apt-get install chromium")
    recording = tmp_path_factory.mktemp("microphone") / "jfk.wav"
    sf.write(recording, jfk, SAMPLE_RATE, subtype="PCM_16")
    page = OutputPage(recording)
    yield page
    page.close()


@pytest.fixture
def page(shared_page: Any) -> Any:
    """A page as it is when it has just been loaded."""
    shared_page.do(lambda page: page.reload())
    return shared_page


def click(page: Any, label: str) -> None:
    page.do(lambda page: page.get_by_role("button", name=label).click())


def places_of(heard: np.ndarray, said: np.ndarray) -> list[tuple[int, int]]:
    """Return, for each quarter of a second of the first that is found in the second, its place in both, in samples."""
    size, places = SAMPLE_RATE // 4, []
    energies = np.convolve(said**2, np.ones(size), "valid")
    for at in range(0, len(heard) - size, size):
        window = heard[at : at + size]
        likeness = correlate(said, window, "valid") / np.sqrt(energies * (window**2).sum() + 1e-6)
        if likeness.max() > 0.95:
            places.append((at, int(likeness.argmax())))
    return places


@pytest.mark.slow
class TestInABrowser:
    @pytest.mark.parametrize("lack", ["", NO_WORKLETS, NO_RESAMPLING], ids=["all", "no worklets", "no resampling"])
    def test_all_that_was_said_arrives_in_order_at_its_rate(self, page: Any, jfk: np.ndarray, lack: str) -> None:
        page.evaluate(lack)
        microphone = BrowserMicrophone(2.0, eval_js=page.evaluate)
        heard = np.concatenate(list(microphone.blocks()))
        assert len(heard) == 2 * microphone.sample_rate
        assert (microphone.sample_rate == SAMPLE_RATE) == (lack != NO_RESAMPLING)
        found = places_of(soxr.resample(heard, microphone.sample_rate, SAMPLE_RATE), jfk[: 4 * SAMPLE_RATE])
        assert len(found) >= 3
        # on a busy machine the browser's device loses blocks or puts silence between them; it never turns them round
        assert all(later > earlier for (_, earlier), (_, later) in itertools.pairwise(found))
        lags = [in_said - in_heard for in_heard, in_said in found]
        assert any(abs(later - earlier) < 0.01 * SAMPLE_RATE for earlier, later in itertools.pairwise(lags))
        assert (microphone.overruns, page.evaluate("window.whisperMicrophone.state")) == (0, "closed")

    def test_buttons_begin_and_end_a_recording_and_free_the_device(self, page: Any) -> None:
        page.evaluate(LISTEN)
        page.evaluate(CLICK_FIRST)
        states: list[str] = []

        def evaluate(script: str) -> Any:
            answer = page.evaluate(script)
            states.append(answer["state"] if isinstance(answer, dict) else "")
            if states[-1] == "paused" and states.count("paused") == 1:
                click(page, "Start recording")
            return answer

        blocks = BrowserMicrophone(60.0, eval_js=evaluate).blocks()
        next(blocks)
        assert states.index("paused") < states.index("recording")
        click(page, "Stop recording")
        list(blocks)
        assert page.evaluate("window.whisperMicrophone.state") == "stopped"
        assert page.evaluate("document.querySelectorAll('button').length") == 0
        assert page.evaluate("window.heard.getTracks().map((track) => track.readyState)") == ["ended"]

    def test_what_a_slow_reader_loses_is_counted(
        self, page: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(streaming, "MAX_QUEUED_SEC", 0.5)
        microphone = BrowserMicrophone(1.0, eval_js=page.evaluate)
        blocks = microphone.blocks()
        heard = len(next(blocks))
        page.do(lambda page: page.wait_for_function("window.whisperMicrophone.lost >= 2"))
        waiting = next(blocks)
        assert 0.3 * SAMPLE_RATE < len(waiting) <= 0.5 * SAMPLE_RATE
        assert heard + len(waiting) + sum(map(len, blocks)) == SAMPLE_RATE
        assert microphone.overruns >= 2
        assert "blocks of microphone audio were lost" in caplog.text

    def test_a_refused_permission_and_a_missing_device_are_errors(self, page: Any) -> None:
        page.do(lambda page: page.context.clear_permissions())
        with pytest.raises(AudioError, match="NotAllowedError"):
            list(BrowserMicrophone(1.0, eval_js=page.evaluate).blocks())
        page.do(lambda page: page.context.grant_permissions(["microphone"]))
        page.evaluate(NO_DEVICE)
        with pytest.raises(AudioError, match="NotFoundError"):
            list(BrowserMicrophone(1.0, eval_js=page.evaluate).blocks())

    @pytest.mark.parametrize("ending", ["ended", "abandoned", "gone"])
    def test_a_microphone_that_goes_away_is_an_error_after_what_it_heard(
        self, page: Any, monkeypatch: pytest.MonkeyPatch, ending: str
    ) -> None:
        if ending == "abandoned":
            monkeypatch.setattr(streaming, "ABANDONED_SEC", 2.0)
        page.evaluate(LISTEN)
        blocks = BrowserMicrophone(60.0, eval_js=page.evaluate).blocks()
        next(blocks)
        if ending == "ended":
            page.evaluate("window.heard.getTracks()[0].dispatchEvent(new Event('ended'))")
        elif ending == "gone":
            page.do(lambda page: page.reload())
        else:  # nobody reads
            page.do(lambda page: page.wait_for_function("window.whisperMicrophone.state === 'abandoned'"))
        with pytest.raises(AudioError) as caught:
            list(blocks)
        assert str(caught.value) == streaming._ENDINGS[ending]

    @pytest.mark.usefixtures("colab")
    def test_in_colab_the_browsers_microphone_is_streamed(self, page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from google.colab import output

        monkeypatch.setattr(output, "page", lambda: page)
        result = session().stream_from_microphone(2.0)
        assert (result.text, result.overruns) == ("hello", 0)
        assert result.audio_sec == pytest.approx(2.0, abs=0.1)


def answer(state: str, samples: int = 0, **fields: Any) -> dict[str, Any]:
    pcm = base64.b64encode(np.full(samples, 1 << 14, "<i2").tobytes()).decode()
    return {"state": state, "error": None, "lost": 0, "rate": SAMPLE_RATE, "pcm": pcm, **fields}


class ScriptedPage:
    """Gives answers to `take`, the last one for ever, a second each."""

    def __init__(self, *answers: dict[str, Any] | BaseException) -> None:
        self._answers, self.now, self.closed = list(answers), 0.0, False

    def __call__(self, script: str) -> Any:
        if script == streaming._TAKE:
            self.now += 1.0
            given = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
            if isinstance(given, BaseException):
                raise given
            return given
        self.closed = script == streaming._CLOSE
        return True

    def blocks(self) -> Any:
        return BrowserMicrophone(1.0, eval_js=self, clock=lambda: self.now).blocks()


@pytest.mark.parametrize(("state", "wait_sec"), [("asking", 60), ("paused", 60), ("recording", 5)])
def test_patience_has_an_end(state: str, wait_sec: float) -> None:
    page = ScriptedPage(answer(state))
    with pytest.raises(AudioError):
        list(page.blocks())
    assert (page.now, page.closed) == (pytest.approx(wait_sec + 2), True)


def test_a_permission_that_comes_late_and_pauses_in_the_sound_are_no_errors() -> None:
    silence = [answer("recording")] * 5
    page = ScriptedPage(
        *[answer("asking")] * 50, *silence, answer("recording", 8_000), *silence, answer("recording", 9_000)
    )
    blocks = list(page.blocks())
    assert [len(block) for block in blocks] == [8_000, 8_000]
    assert {float(value) for block in blocks for value in block} == {0.5}


def test_the_page_is_closed_whatever_ends_the_reading() -> None:
    page = ScriptedPage(answer("recording", 100), KeyboardInterrupt())
    blocks = page.blocks()
    next(blocks)
    blocks.close()
    assert page.closed
    with pytest.raises(KeyboardInterrupt):
        list(page.blocks())
    assert page.closed


@pytest.mark.usefixtures("colab")
def test_a_colab_page_that_fails_or_never_answers_is_an_audio_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from google.colab import output
    from google.colab._message import MessageError

    answers = [MessageError("TypeError: Failed to fetch"), True, answer("recording", 160), None, None]  # None: too late
    monkeypatch.setattr(output, "eval_js", Mock(side_effect=answers))
    with pytest.raises(AudioError, match="Failed to fetch"):
        eval_in_colab("1")
    blocks = BrowserMicrophone(1.0).blocks()
    assert len(next(blocks)) == 160
    with pytest.raises(AudioError, match="10 s"):
        next(blocks)
