"""The web page: its parts alone, and in a browser with a microphone that plays a file."""

from __future__ import annotations

import asyncio
import base64
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import httpx
import numpy as np
import pytest
import soundfile as sf
from playwright.sync_api import Browser, Page, sync_playwright

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.sources.catalog import SAMPLE_CLIP
from src.inference.captions import CaptionOptions, make_cues, to_srt
from src.inference.engines import load_engine
from src.inference.files.segmentation import TranscribedSegment
from src.inference.files.transcribe import Transcription, Transcriptions
from src.inference.options import DecodingOptions
from src.inference.server.host import EngineInTurns, LiveHost, ServerLimits
from src.inference.server.page import Demo, LiveTabs, launch_demo, read_upload
from src.inference.server.protocol import write_samples
from src.inference.streaming.commit import Event
from src.inference.words import Word, join_words
from src.utils.config import load_config
from src.utils.errors import AudioError, ConfigError, MissingDependencyError, ModelError
from tests.browser import CONTRASTS, NO_BROWSER, PATIENCE_SEC, READABLE, launch_hearing, watched_page
from tests.inference.scripted import ScriptedEngine
from tests.inference.test_captions import parsed

MAX_UPLOAD_SEC = 20.0
ATTACK = "<img src=x onerror=\"document.title = 'attacked'\">"
WATCH = """() => {
  window.broken = [];
  let before = [];
  const said = () => [...document.querySelectorAll(".word")].map(word => word.textContent);
  new MutationObserver(() => {
    const now = said();
    if (now.length < before.length || before.some((word, i) => word !== now[i])) window.broken.push([before, now]);
    before = now;
  }).observe(document.querySelector(".page"), {childList: true, subtree: true, characterData: true});
}"""


class CountingSession:
    """Commits a word for each second heard, which names the loudness of its first sample."""

    def __init__(self) -> None:
        self.words: tuple[Word, ...] = ()
        self.audio_sec, self.sharers = 0.0, 0

    def feed(self, samples: Waveform, sample_rate: int) -> list[Event]:
        if samples[0] < 0:
            raise RuntimeError("CUDA error\nmore of it")
        self.audio_sec += len(samples) / sample_rate
        new = [Word(f"{samples[0]:.1f}", i, i + 1, 0.9) for i in range(len(self.words), int(self.audio_sec))]
        self.words += tuple(new)
        return [Event("commit", tuple(new), join_words(new), self.audio_sec, 0.0, 0)] if new else []

    def flush(self) -> list[Event]:
        return [Event("final", self.words, join_words(self.words), self.audio_sec, 0.0, 1)]


class Tabs:
    """A page's live tabs on a loop of their own."""

    def __init__(self, **limits: Any) -> None:
        def make_session(model: str) -> Any:
            if model != "tuned":
                raise ConfigError(f"model {model!r} is not on this page")
            return CountingSession()

        self.host = LiveHost(ServerLimits(**limits))
        self.tabs, self.runner = LiveTabs(self.host, make_session), asyncio.Runner()

    def __enter__(self) -> Tabs:
        return self

    def __exit__(self, *_: Any) -> None:
        self.runner.close()
        self.host.worker.shutdown()

    def answer(self, tab: str, loudness: float = 0.1, *, sec: float = 1.0, **fields: Any) -> dict[str, Any]:
        samples = np.full(round(sec * SAMPLE_RATE), loudness, np.float32)
        pcm = base64.b64encode(write_samples(samples, "s16le")).decode()
        message = {"tab": tab, "model": "tuned", "rate": SAMPLE_RATE, "pcm": pcm, **fields}
        return self.runner.run(self.tabs.answer(message))


def test_tabs_do_not_mix_and_the_last_answer_holds_the_captions() -> None:
    with Tabs() as page:
        for number in range(3):
            for tab, loudness in (("a", 0.1), ("b", 0.2)):
                page.answer(tab, loudness, first=number == 0)
        last = page.answer("a", 0.1, last=True)
        assert [event["kind"] for event in last["events"]] == ["commit", "final"]
        assert last["audio_sec"] == 4.0
        assert [cue[2] for cue in parsed(last["srt"])] == [("0.1 0.1 0.1 0.1",)]
        assert parsed(last["srt"]) == parsed(last["vtt"])
        assert len(page.host.sessions) == 1
        assert set(page.answer("a")) == {"error"}


def test_captions_of_a_live_recording_are_laid_out_as_its_language_is() -> None:
    said = tuple(Word(c, i / 4, (i + 1) / 4, 0.9, space=False) for i, c in enumerate("我们今天去公园散步" * 6))

    class Session(CountingSession):
        def feed(self, samples: Waveform, sample_rate: int) -> list[Event]:
            new, self.words = said[len(self.words) :], said
            return [Event("commit", new, "", 1.0, 0.0, 0, "zh")] if new else []

        def flush(self) -> list[Event]:
            return []

    for task, language in (("transcribe", "zh"), ("translate", "en")):
        with Tabs() as page:
            page.tabs = LiveTabs(page.host, lambda model: Session(), task=task)  # type: ignore[arg-type, return-value]
            assert page.answer("a", first=True)["language"] == "Chinese"
            assert page.answer("a", last=True)["srt"] == to_srt(make_cues(said, CaptionOptions.of(language)))


def test_sessions_are_bounded_and_the_idle_and_the_left_give_way() -> None:
    with Tabs(max_sessions=2, idle_sec=0.2) as page:
        assert "error" not in page.answer("a", first=True)
        assert "error" not in page.answer("b", first=True)
        assert "all 2 sessions are taken" in page.answer("c", first=True)["error"]
        assert "error" not in page.answer("b", first=True)  # its own does not count
        page.tabs.leave("a")
        assert "error" not in page.answer("c", first=True)
        page.runner.run(asyncio.sleep(0.5))
        idle = page.answer("b")  # its words are not lost
        assert (len(parsed(idle["srt"])), "nothing came" in idle["note"]) == (1, True)
        assert "error" not in page.answer("d", first=True)  # c has fallen silent too
        assert "0.2 s" in page.answer("c")["error"]
        assert "error" not in page.answer("e", first=True)


def test_a_recording_ends_at_its_limit_with_its_captions() -> None:
    with Tabs(max_session_sec=20.0) as page:
        page.answer("a", sec=0.5, first=True)
        for _ in range(19):
            assert "srt" not in page.answer("a")
        full = page.answer("a")
        assert (full["audio_sec"], "20 s" in full["note"]) == (20.0, True)
        assert len(parsed(full["srt"])) > 1
        assert not page.host.sessions


@pytest.mark.parametrize(("sent", "said"), [
    ({"pcm": "no base64"}, "base64"), ({"pcm": "AAAA"}, "whole number"), ({"pcm": "A" * (1 << 20)}, "262144"),
    ({"rate": 0}, "8000"), ({"model": "other"}, "'other' is not on this page"), ({"loud": True}, "Extra inputs"),
])  # fmt: skip
def test_what_is_no_message_is_refused_in_a_line(sent: dict[str, Any], said: str) -> None:
    with Tabs() as page:
        assert said in page.answer("a", **{"first": True, **sent})["error"]
        assert not page.host.sessions


def test_a_recording_that_fails_or_changes_its_rate_is_freed_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Tabs() as page:
        for tab in "abcd":
            page.answer(tab, first=True)
        assert page.answer("a", -0.5)["error"].startswith("RuntimeError: CUDA error; ")
        assert f"48000 Hz in a recording of {SAMPLE_RATE} Hz" in page.answer("b", rate=48_000)["error"]
        assert "error" not in page.answer("c")
        monkeypatch.setattr("src.inference.server.page.make_cues", lambda words: 1 / 0)  # outside of the session
        assert page.answer("d", last=True)["error"].startswith("ZeroDivisionError: ")
        assert len(page.host.sessions) == 1


def test_calls_of_an_engine_take_turns_in_the_order_in_which_they_came() -> None:
    host, done, may_end = LiveHost(), [], threading.Event()
    wrapped = SimpleNamespace(device="cpu", encode=[0].count, decode=[0].index)
    engine: Any = EngineInTurns(wrapped, lambda call: host.worker.submit(call).result())  # type: ignore[arg-type]
    first = host.worker.submit(may_end.wait)
    rest = [host.worker.submit(done.append, number) for number in range(20)]
    assert done == []
    may_end.set()
    assert (engine.device, engine.encode(0)) == ("cpu", 1)  # a call of what it wraps, after all others
    assert (first.result(), done) == (True, list(range(20)))
    assert all(each.done() for each in rest)
    with pytest.raises(ValueError, match="not in list"):
        engine.decode(1)
    host.worker.shutdown()


def test_a_tab_sends_one_message_at_a_time_and_others_are_heard_meanwhile() -> None:
    with Tabs() as page:
        page.answer("a", first=True)
        pcm = base64.b64encode(bytes(3200)).decode()

        async def flood() -> list[dict[str, Any]]:
            message = {"model": "tuned", "rate": SAMPLE_RATE, "pcm": pcm}
            many = [page.tabs.answer({"tab": "a", **message}) for _ in range(80)]
            return await asyncio.gather(*many, page.tabs.answer({"tab": "b", "first": True, **message}))

        *many, other = page.runner.run(flood())
        assert sum("error" not in each for each in many) == 1
        assert "error" not in other
        assert "error" not in page.answer("a")  # its recording goes on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of uploads."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("uploads")
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


class Jobs:
    """A page whose jobs wait until they are told to end, or that nobody waits for them."""

    def __init__(self) -> None:
        from src.inference.server import page_layout

        self.begun: list[str | None] = []
        self.left: list[str] = []
        self.ended = threading.Semaphore(0)
        self.page = page_layout.build_page(
            {"tuned": "scripted"}, hear=self.hear, leave=self.left.append, transcribe=self.transcribe
        )
        page_layout.serve(self.page)
        self.client = httpx.Client(base_url=self.page.local_url + "gradio_api/", timeout=PATIENCE_SEC)
        self.job = next(number for number, fn in self.page.fns.items() if getattr(fn.fn, "__name__", "") == "run")

    async def hear(self, message: Any) -> dict[str, Any]:
        return {}

    def transcribe(self, path: str | None, *models: str, gone: threading.Event) -> list[Transcriptions]:
        self.begun.append(path)
        gone.wait(PATIENCE_SEC)
        self.ended.release()
        raise AudioError("the tab has gone")

    def join(self, tab: str) -> httpx.Response:
        body = {"data": [None, "tuned"], "fn_index": self.job, "session_hash": tab}
        return self.client.post("queue/join", json=body)


@pytest.fixture(scope="module")
def jobs(folder: Path) -> Iterator[Jobs]:
    pytest.importorskip("gradio")
    jobs = Jobs()
    yield jobs
    jobs.page.close(verbose=False)


def test_a_tab_has_one_job_which_ends_when_the_tab_has_gone(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.inference.server.page_layout.ALIVE_SEC", 0.1)
    assert jobs.join("a").status_code == 200
    with jobs.client.stream("GET", "queue/data", params={"session_hash": "a"}) as events:
        lines = (line for line in events.iter_lines() if "process_" in line)
        assert "process_starts" in next(lines)
        assert jobs.join("a").status_code == 200
        assert "transcribed already" in next(line for line in lines if "process_completed" in line)
        assert len(jobs.begun) == 1
    assert jobs.ended.acquire(timeout=PATIENCE_SEC)
    assert [jobs.join(f"{number}").status_code for number in range(30)].count(503) >= 10  # two run, 16 wait


def test_no_upload_stays_whatever_its_name_and_no_other_request_is_large(jobs: Jobs, folder: Path) -> None:
    from src.inference.server.page_layout import MAX_BODY, sweep_uploads

    for name in ("talk.wav", "..", ".", "?", "a/../b.wav", "n" * 300 + ".wav", "\u4f60\u597d.wav", ".hidden", "a\nb"):
        jobs.client.post("upload", files={"files": (name, name.encode())})
        jobs.client.post("upload", files={"other": (name, name.encode())})
    assert any(folder.rglob("talk.wav"))
    sweep_uploads(jobs.page, 3600)
    assert any(folder.rglob("talk.wav"))
    sweep_uploads(jobs.page, 0)
    assert [path for path in folder.rglob("*") if not path.name.endswith("_edit_history")] == []  # Gradio's, empty
    large = bytes(MAX_BODY + 1)
    assert jobs.client.post("component_server", content=large).status_code == 413
    parts = (large[:1000] for _ in range(MAX_BODY // 1000 + 1))
    assert jobs.client.post("component_server", content=parts).status_code >= 400
    assert jobs.client.post("upload", files={"files": ("large.wav", large)}).status_code == 200


def words(text: str) -> tuple[Word, ...]:
    return tuple(Word(each, float(i), i + 0.5, 0.9) for i, each in enumerate(text.split()))


def test_words_differ_that_the_other_text_lacks() -> None:
    page_layout = pytest.importorskip("src.inference.server.page_layout")
    for first, second, expected in (
        ("The box was large.", "the box, was large", (set(), set())),
        ("the box was large", "the fox was very large", ({1}, {1, 3})),
        ("", "hello there", (set(), {0, 1})),
        ("你 好。", "“你 好", (set(), set())),
        ("क्या ?", "क्या।", ({1}, set())),
    ):
        assert tuple(map(set, page_layout.differing_words(words(first), words(second)))) == expected


def transcribed(*segments: Sequence[Word]) -> Transcriptions:
    parts = tuple(
        TranscribedSegment(said[0].start_sec, said[-1].end_sec, said[0].text, -0.1, None, 1.0, 0.0, tuple(said), None)
        for said in segments
    )
    whole = tuple(word for said in segments for word in said)
    return Transcriptions((Transcription("array 0", "", 66.0, parts, whole),), 3.3)


def test_a_transcript_is_text_marks_what_is_unsure_and_carries_its_captions() -> None:
    page_layout = pytest.importorskip("src.inference.server.page_layout")
    sure, unsure = Word("sure", 0.0, 0.5, 0.9), Word(ATTACK, 0.5, 1.0, 0.2)
    done = transcribed((sure, unsure), (Word("end", 65.0, 65.5, float("nan")),))
    html = page_layout.results_html(["a"], [done], 'a"b')
    compared = page_layout.results_html(["<img>", "b"], [done, transcribed()], "")
    assert "<img" not in html + compared
    assert html.count('class="unsure" data-start="0.50" data-tip="0.50 to 1.00 s, 20%"') == 1
    assert 'data-start="65.00" data-tip="65.00 to 65.50 s">end<' in html
    assert "<time>1:05</time>" in html
    assert "<dd>0.050</dd>" in html
    assert (compared.count("<mark "), compared.count("no words")) == (3, 1)
    srt = unquote(html.split('download="a&#34;b.srt" href="data:text/plain;charset=utf-8,')[1].split('"')[0])
    assert parsed(srt)[0][0] == 0.0


def test_an_upload_is_refused_by_name(tmp_path: Path) -> None:
    sf.write(tmp_path / "long.wav", np.zeros(3 * 8000), 8000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    for name in ("long.wav", "broken.wav"):
        with pytest.raises(AudioError, match=f"^{name}: "):
            read_upload(tmp_path / name, max_sec=2.0)
    assert len(read_upload(tmp_path / "long.wav", max_sec=3.0)) == 3 * SAMPLE_RATE


def test_what_is_missing_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError):
        launch_demo()
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "src.inference.server.page_layout", raising=False)
    monkeypatch.delattr("src.inference.server.page_layout", raising=False)
    with pytest.raises(MissingDependencyError, match="pip install gradio"):
        launch_demo(models={"tuned": "tiny.en"})


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    """Stock tiny.en in 8 bits, under two names."""
    config = load_config(None, overrides={"device": "cpu"})
    engine = load_engine("tiny.en", config, engine="ctranslate2")
    with launch_demo(models={"tuned": engine}, stock=engine, config=config, max_upload_sec=MAX_UPLOAD_SEC) as demo:
        yield demo


@pytest.fixture(scope="module")
def browsers(jfk: Waveform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Browser]]:
    """Two browsers whose microphones hear "ask not what your country can do for you", and what comes before it."""
    folder, cut, second = tmp_path_factory.mktemp("heard"), 3 * SAMPLE_RATE, np.zeros(SAMPLE_RATE, np.float32)
    with sync_playwright() as playwright:
        started = []
        for number, clip in enumerate([jfk[cut : 8 * SAMPLE_RATE], jfk[:cut]]):
            path = folder / f"{number}.wav"
            sf.write(path, np.concatenate([second, clip, second]), SAMPLE_RATE)
            started.append(launch_hearing(playwright, f"{path}%noloop"))
        yield started
        for each in started:
            each.close()


@contextmanager
def opened(browser: Browser, demo: Demo, *, width: int = 1280, scheme: Any = "light") -> Iterator[Page]:
    """A page that is ready to record."""
    with watched_page(browser, demo.url, viewport={"width": width, "height": 900}, color_scheme=scheme) as page:
        page.locator(".toggle:enabled").wait_for()
        yield page


TEXTS = "h1, h3, p, dt, dd, time, a, button:enabled, .word, .partial, mark, [data-start], .legend span"


def uploaded(page: Page, tab: str, path: Path) -> None:
    page.get_by_role("tab", name=tab).click()
    page.locator(f"#{tab.lower()}-audio input[type=file]").set_input_files(path)
    page.locator(f"#{tab.lower()}-audio audio").wait_for()


def captions_of(page: Page, link: str) -> str:
    with page.expect_download() as download:
        page.locator(link).click()
    return download.value.path().read_text(encoding="utf-8")


@NO_BROWSER
@pytest.mark.slow
class TestInABrowser:
    def test_tabs_show_their_own_words_and_give_captions(self, browsers: list[Browser], demo: Demo) -> None:
        with opened(browsers[0], demo) as first, opened(browsers[1], demo) as second:
            for page in (first, second):
                page.evaluate(WATCH)
                page.locator(".toggle").click()
            for page, end, other in ((first, "can do for you", "fellow"), (second, "fellow Americans", "country")):
                page.wait_for_function("end => document.querySelector('.page').textContent.includes(end)", arg=end)
                page.locator(".toggle").click()
                page.locator(".live .files").wait_for()
                text = " ".join(page.locator(".page").inner_text().split())
                assert other not in text
                assert page.evaluate("window.broken") == []
                assert page.locator(".count").inner_text() == str(len(text.split()))
                assert re.fullmatch(r"\d+\.\d s", page.locator(".delay").inner_text())
                cues = parsed(captions_of(page, ".live .srt"))
                assert " ".join(line for *_, lines in cues for line in lines) == text
                page.locator(".clear").click()
                assert text not in page.locator(".page").inner_text()

    def test_a_script_without_spaces_is_shown_without_spaces(self, browsers: list[Browser]) -> None:
        said = "今天天气很好我们去公园明天下雨请大家带伞"

        def hear(audio: Waveform, options: DecodingOptions) -> list[Word]:
            text = said[: round(2 * len(audio) / SAMPLE_RATE)] if audio.any() else ""
            return [Word(char, i / 2, (i + 1) / 2, 0.9, space=False) for i, char in enumerate(text)]

        engine: Any = ScriptedEngine(hear, languages=("en", "zh"), detect=lambda audio: ("zh", 0.95))
        config = load_config(None, overrides={"device": "cpu"})
        with launch_demo(models={"tuned": engine}, config=config) as demo, opened(browsers[0], demo) as page:
            page.locator(".toggle").click()
            page.locator(".word").nth(5).wait_for()
            page.locator(".toggle").click()
            page.locator(".live .files").wait_for()
            shown = page.locator(".page").text_content() or ""
            assert shown == said[: len(shown)]
            assert len(shown) > 5
            assert page.locator(".count").inner_text() == str(page.locator(".word").count()) == str(len(shown))
            assert page.locator(".language").inner_text() == "Chinese"
            assert "".join(line for *_, lines in parsed(captions_of(page, ".live .srt")) for line in lines) == shown

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_every_text_has_the_contrast_of_wcag_aa(self, browsers: list[Browser], demo: Demo, scheme: str) -> None:
        from src.inference.server.page_layout import results_html

        shown = [transcribed(words("sure unsure")), transcribed(words("sure"))]
        results = [results_html(["a"], shown[:1], "a"), results_html(["a", "b"], shown, "a")]
        with opened(browsers[0], demo, scheme=scheme) as page:
            live = '<p><span class="word">said</span> <span class="partial">perhaps</span></p>'
            page.evaluate("html => { document.querySelector('.page').innerHTML += html; }", "".join([live, *results]))
            page.add_style_tag(content="* { transition: none !important }")
            for state in ("idle", "live"):
                page.evaluate("state => { document.querySelector('.live').dataset.state = state; }", state)
                contrasts = page.evaluate(CONTRASTS, TEXTS)
                assert len(contrasts) > 30
                assert [text for ratio, text in contrasts if ratio < READABLE] == []

    def test_a_tab_that_is_closed_frees_its_session(self, browsers: list[Browser], demo: Demo) -> None:
        with opened(browsers[0], demo) as page:
            page.locator(".toggle").click()
            page.locator(".heard", has_text=re.compile("0:0[1-9]")).wait_for()
            assert len(demo.host.sessions) == 1
        give_up = time.monotonic() + PATIENCE_SEC
        while demo.host.sessions and time.monotonic() < give_up:
            time.sleep(0.1)
        assert not demo.host.sessions

    def test_a_file_becomes_words_that_play_and_captions(self, browsers: list[Browser], demo: Demo) -> None:
        with opened(browsers[0], demo) as page:
            uploaded(page, "File", SAMPLE_CLIP)
            page.locator("#transcribe").click()
            page.locator("#file-result .files").wait_for()
            shown = page.locator("#file-result [data-start]")
            text = " ".join(shown.all_inner_texts())
            assert "what you can do for your country." in text
            starts = [float(start) for start in shown.evaluate_all("words => words.map(word => word.dataset.start)")]
            assert starts == sorted(starts)
            cues = parsed(captions_of(page, "#file-result a >> text=SRT"))
            assert " ".join(line for *_, lines in cues for line in lines) == text
            shown.last.click()
            page.locator("#file-result .now").wait_for()
            assert page.evaluate("document.querySelector('#file-audio audio').currentTime") >= starts[-1]

    def test_models_stand_side_by_side(
        self, browsers: list[Browser], demo: Demo, jfk: Waveform, tmp_path: Path
    ) -> None:
        sf.write(tmp_path / "short.wav", jfk[: 3 * SAMPLE_RATE], SAMPLE_RATE)
        with opened(browsers[0], demo, width=390) as page:
            uploaded(page, "Compare", tmp_path / "short.wav")
            page.locator("#compare").click()
            page.locator("#compare-result .sides").wait_for()
            assert page.locator(".side h3").all_inner_texts() == ["stock", "tuned"]
            assert all("fellow Americans" in text for text in page.locator(".side p").all_inner_texts())
            assert page.locator("#compare-result mark[data-start]").count() == 0  # it is the same model
            assert page.evaluate("document.documentElement.scrollWidth") == 390

    @pytest.mark.parametrize(
        ("name", "silence_sec", "said"),
        [("broken", None, "broken.wav: "), ("long", 21, "scripts/transcribe.py"), ("silent", 1, "found in silent.wav")],
    )
    def test_an_upload_without_text_is_answered_by_name(
        self, browsers: list[Browser], demo: Demo, tmp_path: Path, name: str, silence_sec: int | None, said: str
    ) -> None:
        path = tmp_path / f"{name}.wav"
        path.write_bytes(b"RIFF")
        if silence_sec:
            sf.write(path, np.zeros(silence_sec * SAMPLE_RATE), SAMPLE_RATE)
        with opened(browsers[0], demo) as page:
            uploaded(page, "File", path)
            page.locator("#transcribe").click()
            page.get_by_text(said).wait_for()
