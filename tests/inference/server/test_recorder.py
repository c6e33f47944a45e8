"""The recorder: its checks and its folder alone, and in a browser with a microphone that plays a file."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile as sf
from playwright.sync_api import Page, sync_playwright

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.preparation import prepare_datasets
from src.data.sources.catalog import read_folder
from src.data.utterance import Utterance
from src.data.vad import VoiceActivityDetector
from src.inference.server import recorder as recorder_module
from src.inference.server.recorder import (
    MAX_TAKE_SEC,
    Recorder,
    RecordingFolder,
    check_sentences,
    check_take,
    cover_words,
    launch_recorder,
    sentences_of_data,
)
from src.inference.server.served import ServedPage
from src.utils.config import Config, load_config
from src.utils.errors import AudioError, ConfigError, DataError
from tests.browser import CONTRASTS, NO_BROWSER, READABLE, launch_hearing, watched_page

SENTENCES = ["And so my fellow Americans.", "Größe <b>und</b> Maß.", "Third."]
DATE = datetime(2026, 11, 30, 11, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def vad() -> VoiceActivityDetector:
    return VoiceActivityDetector(Config().vad)


def as_pcm(samples: Waveform) -> np.ndarray:
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)


@pytest.fixture(scope="module")
def spoken(jfk: Waveform) -> Waveform:
    """And so my fellow Americans."""
    return jfk[: 3 * SAMPLE_RATE]


def padded(samples: Waveform, before_sec: float, after_sec: float) -> Waveform:
    noise = np.random.default_rng(0).normal(0, 1e-4, round(30 * SAMPLE_RATE)).astype(np.float32)
    return np.concatenate([noise[: round(before_sec * SAMPLE_RATE)], samples, noise[: round(after_sec * SAMPLE_RATE)]])


class TestChecks:
    def test_a_good_take_has_no_remark(self, spoken: Waveform, vad: VoiceActivityDetector) -> None:
        check = check_take(as_pcm(0.5 * spoken), SAMPLE_RATE, vad)
        assert (check.refusals, check.warnings) == ((), ())
        assert check.stats.duration_sec == 3.0

    def test_clipping_level_and_silence_are_named(self, spoken: Waveform, vad: VoiceActivityDetector) -> None:
        for samples, said in (
            (8 * spoken, "cut off"),
            (0.015 * spoken, "too quiet"),
            (padded(spoken, 4, 0), "before the speech"),
            (padded(spoken, 0, 4), "after the speech"),
            (padded(spoken, 2, 20), "of the time"),
        ):
            check = check_take(as_pcm(samples), SAMPLE_RATE, vad)
            assert any(said in warning for warning in check.warnings), said
            assert not check.refusals

    def test_clipping_is_found_at_the_rate_of_the_browser(self, spoken: Waveform, vad: VoiceActivityDetector) -> None:
        import soxr

        fine = soxr.resample(spoken, SAMPLE_RATE, 48_000)
        assert not check_take(as_pcm(0.5 * fine), 48_000, vad).warnings
        assert any("cut off" in each for each in check_take(as_pcm(4 * fine), 48_000, vad).warnings)

    def test_noise_without_speech_is_refused(self, vad: VoiceActivityDetector) -> None:
        noise = np.random.default_rng(0).normal(0, 0.02, 3 * SAMPLE_RATE).astype(np.float32)
        assert "no speech" in check_take(as_pcm(noise), SAMPLE_RATE, vad).refusals[0]

    def test_silence_and_a_click_are_refused(self, spoken: Waveform, vad: VoiceActivityDetector) -> None:
        for samples, said in ((np.zeros(SAMPLE_RATE), "silence only"), (spoken[:4000], "shorter"), ([], "shorter")):
            with pytest.raises(AudioError, match=said):
                check_take(as_pcm(np.array(samples)), SAMPLE_RATE, vad)


class TestSentences:
    def test_blank_and_repeated_lines_are_left_out_and_bad_ones_named(self) -> None:
        assert check_sentences(["  a  b ", "", "...", "a b", "c\r"]) == ["a b", "c"]
        for lines, said in (
            (["ok", "a\x07b"], "line 2: a control"),
            (["x" * 501], "line 1: over 500"),
            ([""], "0 sen"),
        ):
            with pytest.raises(DataError, match=said):
                check_sentences(lines)

    def test_the_first_transcripts_cover_the_vocabulary(self) -> None:
        texts = ["the cat", "the dog", "the cat and the dog ran home", "The cat.", "a bird sang"]
        listed = [Utterance(str(n), Path("x"), text) for n, text in enumerate(texts)]
        assert cover_words(listed, 10)[:3] == [texts[2], texts[4], texts[0]]
        assert len(cover_words(listed, 2)) == 2

    def test_they_are_of_the_training_part_of_the_data(self) -> None:
        sentences, language = sentences_of_data(load_config(None))
        assert (len(sentences), language) == (100, "en")
        mix = [{"source": "sample"}, {"source": "minds14", "max_train": 5}]
        assert sentences_of_data(load_config(None, overrides={"data.mix": mix}))[0] == sentences
        splits = prepare_datasets(load_config(None, overrides={"data": {"max_train": 1, "max_test": 5}}))
        assert not set(sentences) & {u.text for u in splits.test}


class TestFolder:
    def test_it_is_a_source_with_speakers_and_languages(self, tmp_path: Path, spoken: Waveform) -> None:
        folder = RecordingFolder(tmp_path / "new")
        for speaker, text in (("Ann", SENTENCES[0]), ("Ann", 'He said "=1+1", twice'), ("Bo / ../é", SENTENCES[0])):
            folder.keep(as_pcm(spoken), SAMPLE_RATE, text=text, speaker=speaker, language="de", date=DATE)
        read = read_folder(folder.path)
        assert [(u.text, u.speaker, u.language) for u in read] == [
            (SENTENCES[0], "Ann", "de"), ('He said "=1+1", twice', "Ann", "de"), (SENTENCES[0], "Bo / ../é", "de"),
        ]  # fmt: skip
        assert read[0].meta["date"] == "2026-11-30T11:00:00+00:00"
        assert all(isinstance(u.audio, Path) and u.audio.parent == folder.path for u in read)

    def test_one_voice_can_be_trained_on_and_three_are_kept_apart(self, tmp_path: Path, spoken: Waveform) -> None:
        folder = RecordingFolder(tmp_path)

        def splits(speaker: str, *texts: str) -> dict[str, str]:
            for text in texts:
                folder.keep(as_pcm(spoken), SAMPLE_RATE, text=text, speaker=speaker, language="en", date=DATE)
            return {u.id: u.meta.get("split", "") for u in read_folder(tmp_path)}

        assert set(splits("Ann", "one", "two").values()) == {""}  # too few sentences
        of_twenty = Counter(splits("Ann", *map(str, range(18))).values())
        assert of_twenty == {"train": 16, "validation": 2, "test": 2}
        assert {"test", "train", "validation"} == set(splits("Bo", "one", "two", "3").values())
        prepared = prepare_datasets(load_config(None, overrides={"data": {"source": "folder", "path": str(tmp_path)}}))
        assert not {u.text for u in prepared.train} & {u.text for u in prepared.test}
        assert set(splits("Cy", "one").values()) == {""}
        table = tmp_path / "metadata.csv"
        header, first, *_ = table.read_text().splitlines()
        table.write_text(f"{header},split\n{first},test\n")  # by hand
        assert sorted(splits("Ann", "b", "c", "d").values()) == ["test"] + ["train"] * 3

    def test_a_new_take_replaces_the_old_and_the_rest_stays(self, tmp_path: Path, spoken: Waveform) -> None:
        folder = RecordingFolder(tmp_path)
        for loudness in (0.1, 0.5):
            folder.keep(as_pcm(loudness * spoken), 48_000, text="a", speaker="Ann", language=None, date=DATE)
        (file,) = tmp_path.glob("*.flac")
        samples, rate = sf.read(file, dtype="int16")
        assert rate == 48_000
        np.testing.assert_array_equal(samples, as_pcm(0.5 * spoken))
        # a person edits the table, and removes a recording
        table = tmp_path / "metadata.csv"
        table.write_text(table.read_text().replace("date\n", "date,room\n").replace(":00\n", ":00,kitchen\n"))
        other = folder.keep(as_pcm(spoken), 48_000, text="b", speaker="Ann", language=None, date=DATE)
        assert [u.meta["room"] for u in read_folder(tmp_path)] == ["kitchen", ""]
        assert (folder.recorded("Ann"), folder.recorded("Bo")) == ({"a", "b"}, set())
        other.unlink()
        assert RecordingFolder(tmp_path).recorded("Ann") == {"a"}

    def test_a_full_disk_leaves_the_table_as_it_was(
        self, tmp_path: Path, spoken: Waveform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = RecordingFolder(tmp_path)
        folder.keep(as_pcm(spoken), SAMPLE_RATE, text="a", speaker="Ann", language=None, date=DATE)
        before = (tmp_path / "metadata.csv").read_bytes()

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(recorder_module, "write_text_atomic", full)
        with pytest.raises(OSError, match="No space"):
            folder.keep(as_pcm(spoken), SAMPLE_RATE, text="b", speaker="Ann", language=None, date=DATE)
        assert (tmp_path / "metadata.csv").read_bytes() == before
        assert folder.recorded("Ann") == {"a"}

    def test_a_folder_of_others_is_refused(self, tmp_path: Path) -> None:
        for name, content in (("data.csv", "file,text\na.wav,a\n"), ("metadata.csv", "file,text\na.wav,a\n")):
            (tmp_path / name).mkdir()
            (tmp_path / name / name).write_text(content)
            with pytest.raises(DataError, match=name):
                RecordingFolder(tmp_path / name)


class TestRequests:
    @pytest.fixture
    def recorder(self, tmp_path: Path, vad: VoiceActivityDetector) -> Recorder:
        return Recorder(SENTENCES, RecordingFolder(tmp_path / "kept"), language="en", vad=vad)

    @staticmethod
    def find(recorder: Recorder, at: int = 0, *, speaker: str = "Ann", unread: bool = True) -> dict[str, Any]:
        return asyncio.run(recorder.find({"speaker": speaker, "at": at, "unread": unread}))

    @staticmethod
    def send(recorder: Recorder, samples: Waveform, text: str = SENTENCES[0], **fields: Any) -> dict[str, Any]:
        pcm = as_pcm(samples).tobytes()
        parts = [pcm[at : at + 64_000] for at in range(0, max(1, len(pcm)), 64_000)]
        message = {"take": "t", "speaker": "Ann", "rate": SAMPLE_RATE, "text": text}
        reply: dict[str, Any] = {}
        for number, part in enumerate(parts):
            ends = {"first": number == 0, "last": number == len(parts) - 1}
            reply = asyncio.run(recorder.hear({**message, "pcm": base64.b64encode(part).decode(), **ends, **fields}))
            if reply:
                break
        return reply

    def test_it_goes_on_with_what_a_speaker_has_not_read(
        self, recorder: Recorder, spoken: Waveform, vad: VoiceActivityDetector
    ) -> None:
        assert self.find(recorder) == {"at": 0, "text": SENTENCES[0], "recorded": False, "done": 0, "total": 3}
        assert self.send(recorder, 0.5 * spoken) == {
            "kept": True, "remarks": [], "duration": "3.0 s", "level": "-18 dBFS", "noise": "-48 dBFS",
            "done": 1, "total": 3,
        }  # fmt: skip
        again = Recorder(SENTENCES, RecordingFolder(recorder.folder.path), language="en", vad=vad)
        assert self.find(again)["at"] == 1
        assert self.find(again, speaker=" Ann ")["at"] == 1
        assert self.find(again, speaker="Bo")["at"] == 0
        self.send(again, spoken, SENTENCES[2])
        assert self.find(again, 2)["at"] == 1  # round the end
        assert self.find(again, 2, unread=False)["recorded"]
        self.send(again, spoken, SENTENCES[1])
        assert self.find(again, 1) == {"at": 1, "text": SENTENCES[1], "recorded": True, "done": 3, "total": 3}

    def test_a_take_without_speech_is_not_kept(self, recorder: Recorder) -> None:
        noise = np.random.default_rng(0).normal(0, 0.02, 3 * SAMPLE_RATE).astype(np.float32)
        reply = self.send(recorder, noise)
        assert (reply["kept"], reply["done"]) == (False, 0)
        assert not list(recorder.folder.path.glob("*.flac"))

    @pytest.mark.parametrize(("sent", "said"), [
        ({"pcm": "no base64"}, "message of this page"), ({"pcm": "AAAA", "last": True}, "whole number"),
        ({"rate": 0}, "8000"), ({"text": "other"}, "not on the page"), ({"speaker": ""}, "message of this page"),
        ({"speaker": "=1+1"}, "letter or a digit"), ({"speaker": "nan"}, "no name"), ({"speaker": "x" * 61}, "60"),
        ({"first": False}, "lost"), ({"loud": 1}, "Extra inputs"), ({"pcm": "A" * (1 << 20)}, "262144"),
    ])  # fmt: skip
    def test_what_is_no_take_is_refused_in_a_line(
        self, recorder: Recorder, spoken: Waveform, sent: dict[str, Any], said: str
    ) -> None:
        assert said in self.send(recorder, spoken[:SAMPLE_RATE], **sent)["error"]
        assert not recorder._arriving
        assert not (recorder.folder.path / "metadata.csv").exists()

    def test_takes_are_bounded_in_length_and_number(self, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "30 s" in self.send(recorder, np.full(round((MAX_TAKE_SEC + 1) * SAMPLE_RATE), 0.1))["error"]
        for number in range(8):
            assert self.send(recorder, np.ones(9), take=f"{number}", last=False) == {}
        assert "8 takes are arriving" in self.send(recorder, np.ones(9), take="more")["error"]
        monkeypatch.setattr(recorder_module, "ARRIVAL_SEC", 0.0)  # those that nobody goes on with give way
        assert self.send(recorder, np.ones(9), take="more", last=False) == {}
        assert len(recorder._arriving) == 1

    def test_no_error_names_the_place_of_the_folder(self, recorder: Recorder) -> None:
        (recorder.folder.path / "metadata.csv").write_text("file,text\na.wav,a\n")
        error = self.find(recorder)["error"]
        assert error.startswith("kept/metadata.csv: ")
        assert self.send(recorder, np.zeros(0))["error"].startswith("shorter than")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedPage]:
    pytest.importorskip("gradio")
    with launch_recorder(tmp_path / "kept", SENTENCES, config=load_config(None)) as served:
        yield served


@pytest.fixture
def opened(served: ServedPage, spoken: Waveform, tmp_path: Path) -> Iterator[Page]:
    """A page whose microphone hears one sentence again and again."""
    heard = tmp_path / "heard.wav"
    sf.write(heard, padded(0.7 * spoken, 0.2, 0.3), SAMPLE_RATE)
    with sync_playwright() as playwright:
        browser = launch_hearing(playwright, str(heard))
        with watched_page(browser, served.url) as page:
            yield page
        browser.close()


def named(page: Page, speaker: str) -> None:
    page.locator(".speaker:enabled").fill(speaker)
    page.locator(".speaker").press("Tab")
    page.locator(".toggle:enabled").wait_for()


def recorded(page: Page, sec: float = 3.0) -> str:
    """Record so much, and return what the page says about it."""
    page.locator(".toggle:focus").wait_for()
    page.keyboard.press("Enter")
    page.wait_for_function("sec => parseFloat(document.querySelector('.time').textContent) > sec", arg=sec)
    page.keyboard.press("Enter")
    page.locator(".note p").first.wait_for()
    return page.locator(".note").inner_text()


@NO_BROWSER
@pytest.mark.slow
class TestInABrowser:
    def test_sentences_are_recorded_checked_played_and_trained_on(
        self, served: ServedPage, opened: Page, tmp_path: Path
    ) -> None:
        folder = tmp_path / "kept"
        opened.locator(".note", has_text="name for your voice").wait_for()
        for number, speaker in enumerate(("Ann", "Bo", "Cy")):
            named(opened, speaker)
            assert opened.locator(".sentence").inner_text() == SENTENCES[0]
            assert recorded(opened).startswith("Kept")
            assert len(list(folder.glob("*.flac"))) == number + 1
        assert float(opened.evaluate("document.querySelector('.player').duration")) > 3
        opened.locator(".next").click()
        opened.locator(".sentence", has_text="<b>und</b>").wait_for()
        assert "shorter" in recorded(opened, 0.1)
        opened.reload()  # it goes on where it was
        opened.locator(".sentence", has_text="<b>und</b>").wait_for()
        assert opened.locator(".speaker").input_value() == "Cy"
        assert opened.locator(".done").inner_text() == "1 of 3"
        opened.locator(".back").click()
        opened.locator(".note", has_text="is recorded").wait_for()
        before = next(folder.glob("Cy-*.flac")).read_bytes()
        assert recorded(opened, 4.0).startswith("Kept")
        assert next(folder.glob("Cy-*.flac")).read_bytes() != before
        splits = prepare_datasets(load_config(None, overrides={"data": {"source": "folder", "path": str(folder)}}))
        assert sorted(str(u.speaker) for u in splits.utterances) == ["Ann", "Bo", "Cy"]
        assert {u.text for u in splits.utterances} == {SENTENCES[0]}

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_it_can_be_read_in_any_light_and_on_a_phone(self, opened: Page, scheme: Any) -> None:
        opened.emulate_media(color_scheme=scheme)
        opened.set_viewport_size({"width": 390, "height": 800})
        opened.reload()
        named(opened, "Ann")
        opened.add_style_tag(content="* { transition: none !important }")
        contrasts = opened.evaluate(CONTRASTS, "h1, p, dt, dd, label, button:enabled")
        assert len(contrasts) > 10
        assert [text for ratio, text in contrasts if ratio < READABLE] == []
        assert opened.evaluate("document.documentElement.scrollWidth") == 390


def test_it_takes_no_large_upload(served: ServedPage) -> None:
    files = {"files": ("a.wav", bytes(2 << 20))}
    assert httpx.post(f"{served.url}gradio_api/upload", files=files).status_code == 413


def test_a_port_that_is_taken_is_said_and_the_folder_is_free_again(served: ServedPage, tmp_path: Path) -> None:
    port = int(served.url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match="another port"):
        launch_recorder(tmp_path / "other", SENTENCES, port=port)
    assert not (tmp_path / "other" / ".lock").exists()
