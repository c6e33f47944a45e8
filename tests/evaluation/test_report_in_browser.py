"""Reports as a person meets them: opened in a browser, clicked, heard, in light and dark, on a desk and on a phone."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from src.data.utterance import Utterance
from src.evaluation.evaluator import Prediction
from src.evaluation.metrics import WHISPER_ENGLISH, word_counts
from src.evaluation.report.clips import clip_kinds
from src.evaluation.report.html import write_html_report
from src.evaluation.report.run_files import load_predictions
from tests.browser import CHROMIUM, CONTRASTS, NO_BROWSER, READABLE
from tests.evaluation.run_files import epoch, evaluation, prediction, steps, write

pytestmark = [pytest.mark.slow, NO_BROWSER]
CLIPS = 2_000
ATTACK = "</script><script>document.title = 'attacked'</script><img src=x onerror=\"document.title = 'attacked'\">"
SENTENCE = "the cat sat by a quiet river and listens to every window in the mountain"
TEXTS = (
    "h1, h2, h3, p, td, th, a, pre, summary, label, button:enabled, select:enabled, .figure, .av-pair > span, "
    ".av-head > :not(:disabled), .av-name"
)
PLAY = """async () => {
  const player = document.querySelector("audio");
  const moved = new Promise(done =>
    player.addEventListener("timeupdate", () => { if (player.currentTime > 0.3) done(player.currentTime); }));
  await player.play();
  return [await moved, player.duration];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, sample: list[Utterance]) -> Path:
    """Two models on 2,000 synthetic clips, among them loops, silence, empty outputs and markup, with their report."""
    rows, words = [], SENTENCE.split()
    for model, share in (("stock", 0.2), ("tuned", 0.1)):
        texts, noise = random.Random(0), random.Random(model)
        references = [" ".join(texts.choices(words, k=texts.randint(3, 12))) if i % 40 else "" for i in range(CLIPS)]
        hypotheses = [" ".join(w for w in text.split() if noise.random() > share) for text in references]
        hypotheses = ["" if i % 101 == 5 else "of course " * 9 if i % 97 == 0 else h for i, h in enumerate(hypotheses)]
        references[7], hypotheses[7] = ATTACK, f"{ATTACK} now"
        for i, count in enumerate(word_counts(references, hypotheses, WHISPER_ENGLISH)):
            said = {"reference": references[i], "hypothesis": hypotheses[i], **vars(count)}
            rows.append({**prediction(model, i, 0), **said, "meta": {"gender": "mf"[i % 2]}})
    metrics = [*steps(60), epoch(1, 0.3, True), epoch(2, 0.2, True), evaluation("stock", 0.3), evaluation("tuned", 0.2)]
    folder = write(tmp_path_factory.mktemp("runs") / "large", metrics, rows)
    audio = [replace(clip, id=f"u{97 * i}") for i, clip in enumerate(sample[:8])]  # loops, the worst
    write_html_report(folder, folder / "report.html", audio=audio)
    return folder


def found_of(page: Page) -> tuple[int, int]:
    """Return what the view says it found, and of how many."""
    match = re.match(r"(\d+) of (\d+) clip", page.locator(".av-count").inner_text())
    assert match is not None
    return int(match[1]), int(match[2])


@contextmanager
def quiet(browser: Browser, run: Path, *, scheme: str = "light", width: int = 1280) -> Iterator[Page]:
    """Open a run's report; it may log no error and ask for nothing but itself and what it carries."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})  # type: ignore[arg-type]
    page.set_default_timeout(300_000)  # ms; a test must not fail because the machine is busy
    said: list[str] = []
    page.on("console", lambda message: said.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda request: said.append(f"request: {request.url}"))
    page.goto((run / "report.html").as_uri())
    page.locator(".av-clip").first.wait_for()
    yield page
    assert [line[:200] for line in said if not line.startswith(("request: file:", "request: data:"))] == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_report_is_quiet_fits_and_reads_well(browser: Browser, run: Path, scheme: str, width: int) -> None:
    with quiet(browser, run, scheme=scheme, width=width) as page:
        contrasts = page.evaluate(CONTRASTS, TEXTS)
        assert len(contrasts) > 200
        assert [text for ratio, text in contrasts if ratio < READABLE] == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_players_play_and_filter_and_search_find_all(browser: Browser, run: Path) -> None:
    models = load_predictions(run)
    rows, stock = models["tuned"], {row.id: row for row in models["stock"]}

    def with_kind(rows: list[Prediction], kind: str) -> int:
        return sum(kind in clip_kinds(row, WHISPER_ENGLISH) for row in rows)

    with quiet(browser, run) as page:
        assert page.locator("audio").count() == 8
        heard, seconds = page.evaluate(PLAY)
        assert 0.3 < heard <= seconds
        assert found_of(page) == (CLIPS, CLIPS)
        for kind in ("error", "substitution", "deletion", "insertion", "loop", "empty", "invented", "perfect"):
            page.locator(".av-filter").select_option(kind)
            assert found_of(page) == (with_kind(rows, kind), CLIPS), kind
            assert found_of(page)[0] > 0
        page.locator(".av-filter").select_option("worse")
        assert found_of(page)[0] == sum(row.errors > stock[row.id].errors for row in rows)

        page.locator(".av-filter").select_option("all")
        page.locator(".av-search").fill("quiet RIVER")
        texts = {row.id: (row.reference, row.hypothesis, stock[row.id].hypothesis) for row in rows}
        expected = [row for row in rows if any("quiet river" in text for text in texts[row.id])]
        assert found_of(page) == (len(expected), CLIPS)
        page.locator(".av-filter").select_option("perfect")
        assert found_of(page)[0] == with_kind(expected, "perfect")
        page.locator(".av-search").fill("nobody says this")
        assert found_of(page)[0] == 0


def test_clips_are_drawn_a_page_at_a_time_and_markup_as_text(browser: Browser, run: Path) -> None:
    with quiet(browser, run) as page:
        assert page.locator(".av-clip").count() == 25
        for button, place in (("next", "26 to 50"), ("previous", "1 to 25")):
            page.get_by_role("button", name=button).click()
            assert place in page.locator(".av-count").inner_text()
        assert page.get_by_role("button", name="previous").is_disabled()
        page.locator(".av-search").fill("attacked")
        assert found_of(page)[0] == 1
        page.locator("summary", has_text="as written").click()
        assert ATTACK in page.locator(".av-list").inner_text()
        assert page.title() == "Run large"
        assert page.locator("main script").count() == 2
