"""The microphone, through a stand-in for sounddevice whose failures are injected."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from src.inference.options import DecodingResult
from src.inference.server.client import in_real_time
from src.inference.streaming import live as streaming
from src.inference.streaming import microphone as microphone_module
from src.inference.streaming.live import StreamingASR
from src.inference.streaming.microphone import Microphone
from src.inference.words import Word
from src.utils.config import Config
from src.utils.errors import AudioError, ConfigError, MissingDependencyError

RATE = 48_000


class PortAudioError(Exception):
    pass


class FakeSoundDevice(ModuleType):
    """Delivers one block of ones a tenth of a second, from a thread of its own, as PortAudio does."""

    def __init__(self, blocks: int, *, overflows: Sequence[int] = (), fail: str | None = None) -> None:
        super().__init__("sounddevice")
        self.PortAudioError = PortAudioError
        self.callback_threads: set[int] = set()
        self.closed = False
        fake = self

        class InputStream:
            def __init__(self, *, samplerate: int, channels: int, dtype: str, blocksize: int, callback: Any) -> None:
                if fail == "open":
                    raise PortAudioError("Device unavailable [PaErrorCode -9985]")
                assert (samplerate, channels, dtype) == (RATE, 1, "float32")
                self._blocksize, self._callback = blocksize, callback
                self._thread = threading.Thread(target=self._deliver)

            def _deliver(self) -> None:
                fake.callback_threads.add(threading.get_ident())
                memory = np.empty((self._blocksize, 1), np.float32)  # used again for each block
                for i in range(blocks):
                    memory[:] = (i + 1) / 1000
                    self._callback(memory, self._blocksize, None, SimpleNamespace(input_overflow=i in overflows))
                memory[:] = np.nan

            def __enter__(self) -> Any:
                self._thread.start()
                return self

            def __exit__(self, *error: Any) -> None:
                self._thread.join()
                fake.closed = True

        self.InputStream = InputStream
        self._fail = fail

    def query_devices(self, *, kind: str) -> dict[str, float]:
        if self._fail == "query":
            raise PortAudioError("Error querying device -1")
        return {"default_samplerate": float(RATE)}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType | None], None]:
    return lambda module: monkeypatch.setitem(sys.modules, "sounddevice", module)


def test_all_audio_arrives_in_order_and_no_more_than_asked(install: Callable[..., None]) -> None:
    fake = FakeSoundDevice(blocks=12)
    install(fake)
    microphone = Microphone(1.0)
    audio = np.concatenate(list(microphone.blocks()))
    assert len(audio) == RATE
    np.testing.assert_allclose(audio[:: RATE // 10], np.arange(1, 11) / 1000)
    assert (microphone.overruns, fake.closed) == (0, True)


def test_overruns_of_the_device_are_counted(install: Callable[..., None]) -> None:
    install(FakeSoundDevice(blocks=10, overflows=[2, 5]))
    microphone = Microphone(1.0)
    list(microphone.blocks())
    assert microphone.overruns == 2


def test_blocks_that_a_slow_consumer_cannot_take_are_counted(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(microphone_module, "MAX_QUEUED_SEC", 0.3)
    install(FakeSoundDevice(blocks=0))
    microphone = Microphone(1.0)
    for _ in range(5):
        microphone._enqueue(np.zeros((4_800, 1), np.float32), 4_800, None, None)
    assert microphone.overruns == 2


def test_a_device_that_delivers_nothing_is_an_error(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(microphone_module, "PATIENCE_SEC", 0.05)
    fake = FakeSoundDevice(blocks=3)
    install(fake)
    with pytest.raises(AudioError, match="delivered nothing"):
        list(Microphone(1.0).blocks())
    assert fake.closed


@pytest.mark.parametrize(("fail", "message"), [("query", "no usable microphone"), ("open", "Device unavailable")])
def test_a_device_that_fails_is_an_audio_error(install: Callable[..., None], fail: str, message: str) -> None:
    install(FakeSoundDevice(blocks=1, fail=fail))
    with pytest.raises(AudioError, match=message):
        list(Microphone(1.0).blocks())


def test_absent_package_is_an_error_with_the_line_that_installs_it(install: Callable[..., None]) -> None:
    install(None)
    with pytest.raises(MissingDependencyError, match="pip install sounddevice"):
        Microphone(1.0)


def test_a_duration_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="duration_sec is 0"):
        Microphone(0)


def session(decode_fn: Any) -> StreamingASR:
    processor = SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda text, add_special_tokens: text.split()))
    return StreamingASR(None, processor, config=Config(), context_silence_sec=2.0, decode_fn=decode_fn)


def say_hello(*_: Any) -> list[DecodingResult]:
    return [DecodingResult("hello", (), 0.0, (Word("hello", 0.1, 0.5, 0.9),))]


def test_a_session_decodes_in_the_callers_thread_and_shows_events_as_they_come(install: Callable[..., None]) -> None:
    fake = FakeSoundDevice(blocks=20)
    install(fake)
    decoding_threads = set()

    def decode(model: Any, processor: Any, audios: Any, options: Any) -> list[DecodingResult]:
        decoding_threads.add(threading.get_ident())
        return [DecodingResult("hello", (), 0.0, (Word("hello", 0.1, 0.5, 0.9),))]

    shown: list[Any] = []
    result = session(decode).stream_from_microphone(2.0, on_event=shown.append)
    assert (result.text, result.overruns) == ("hello", 0)
    assert tuple(shown) == result.events
    assert result.audio_sec == pytest.approx(2.0, abs=0.01)
    assert decoding_threads == {threading.get_ident()}
    assert fake.callback_threads.isdisjoint(decoding_threads)


def test_the_models_error_closes_the_device_and_reaches_the_caller(install: Callable[..., None]) -> None:
    fake = FakeSoundDevice(blocks=20)
    install(fake)

    def fail(*_: Any) -> list[DecodingResult]:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        session(fail).stream_from_microphone(2.0)
    assert fake.closed


def test_outside_colab_this_machine_records_and_the_log_says_so(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    install(FakeSoundDevice(blocks=5))
    caplog.set_level("INFO", "src.inference.streaming.live")
    assert session(say_hello).stream_from_microphone(0.5).audio_sec == pytest.approx(0.5, abs=0.01)
    assert caplog.messages == ["recording 0.5 s from this machine's microphone at 48000 Hz"]


def test_a_script_in_colab_has_no_page_and_is_told_to_use_a_cell(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(None)
    monkeypatch.setattr(streaming, "in_colab", lambda: True)
    with pytest.raises(MissingDependencyError, match="in Colab record from a cell of the notebook"):
        session(say_hello).stream_from_microphone(1.0)


def test_a_file_in_real_time_gives_what_the_file_gives_at_its_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, now = tmp_path / "tone.wav", [0.0]
    sf.write(path, np.sin(np.arange(32_000) / 10), 16_000)

    def sleep(sec: float) -> None:
        now[0] += sec

    monkeypatch.setattr(streaming, "in_real_time", partial(in_real_time, clock=lambda: now[0], sleep=sleep))
    shown: list[tuple[float, Any]] = []
    asr = session(say_hello)
    result = asr.stream_from_file(path, real_time=True, on_event=lambda event: shown.append((now[0], event)))
    assert result.text == asr.stream_from_file(path).text == "hello"
    assert [event for _, event in shown] == list(result.events)
    assert all(event.audio_sec <= at_sec + 1e-6 for at_sec, event in shown)
    assert now[0] == pytest.approx(2.0)
