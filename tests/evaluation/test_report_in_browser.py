"""Reports as a person meets them: opened in a browser, clicked, heard, in light and dark, on a desk and on a phone."""

from __future__ import annotations

import copy
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from src.data.loader import create_loader
from src.data.preparation import check_utterance
from src.data.utterance import Utterance
from src.evaluation.evaluator import ModelEvaluator, Prediction
from src.evaluation.report.clips import clip_kinds
from src.evaluation.report.html import write_html_report
from src.evaluation.report.run_files import load_predictions
from src.evaluation.text import WHISPER_ENGLISH, word_counts
from src.utils.config import load_config
from src.utils.tracking import ExperimentLogger
from tests.evaluation.run_files import epoch, evaluation, prediction, steps, write

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on the PATH: apt-get install chromium"),
]
CLIPS, SYNTHETIC = 8, 2_000
ATTACK = "</script><script>document.title = 'attacked'</script><img src=x onerror=\"document.title = 'attacked'\">"
SENTENCE = "the cat sat by a quiet river and listens to every window in the mountain"
READABLE = 4.5  # contrast of text, WCAG 2 AA
TEXTS = (
    "h1, h2, h3, p, td, th, a, pre, summary, label, button, select, .figure, .av-pair > span, .av-head > *, .av-name"
)
CONTRASTS = """selectors => {
  const paint = (...colors) => {
    const context = new OffscreenCanvas(1, 1).getContext("2d");
    for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const light = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  return [...document.querySelectorAll(selectors)]
    .filter(e => e.textContent.trim() && e.checkVisibility() && !e.disabled).map(element => {
      const grounds = [];
      for (let e = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
      const ground = paint(...grounds), text = paint(...grounds, getComputedStyle(element).color);
      const [a, b] = [light(ground), light(text)].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), `${element.tagName}.${element.className}: ${element.textContent.slice(0, 40)}`];
    });
}"""


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
def real_run(tmp_path_factory: pytest.TempPathFactory, _tiny_en: tuple[Any, Any], sample: list[Utterance]) -> Path:
    """A run of stock weights, padded and, as "tuned", at a length that they do not know, with its report."""
    runs = tmp_path_factory.mktemp("runs")
    config = load_config(None, overrides={"device": "cpu", "paths.runs_dir": str(runs), "model.language": "en"})
    clips = [check_utterance(u, config.data) for u in sample if u.meta["split"] == "test"][:CLIPS]
    with ExperimentLogger(config, run_id="real") as experiment:
        for name, context in (("stock", "full"), ("tuned", "dynamic")):
            model, processor = copy.deepcopy(_tiny_en[0]), _tiny_en[1]
            model.audio_context = context
            loader = create_loader(clips, processor, config)
            ModelEvaluator(model, processor, config).evaluate_dataset(loader, name=name).save(experiment)
    write_html_report(experiment.dir, experiment.dir / "report.html", audio=clips)
    return experiment.dir


@pytest.fixture(scope="module")
def large_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models on 2,000 synthetic clips, among them loops, silence, empty outputs and markup."""
    words = SENTENCE.split()
    rows = []
    for model, share in (("stock", 0.2), ("tuned", 0.1)):
        texts, noise = random.Random(0), random.Random(model)
        references = [
            " ".join(texts.choices(words, k=texts.randint(3, 12))) if i % 40 else "" for i in range(SYNTHETIC)
        ]
        hypotheses = [" ".join(w for w in text.split() if noise.random() > share) for text in references]
        hypotheses = ["" if i % 101 == 5 else "of course " * 9 if i % 97 == 0 else h for i, h in enumerate(hypotheses)]
        references[7], hypotheses[7] = ATTACK, f"{ATTACK} now"
        for i, count in enumerate(word_counts(references, hypotheses, WHISPER_ENGLISH)):
            said = {"reference": references[i], "hypothesis": hypotheses[i], **vars(count)}
            rows.append({**prediction(model, i, 0), **said, "meta": {"gender": "mf"[i % 2]}})
    metrics = [*steps(60), epoch(1, 0.3, True), epoch(2, 0.2, True), evaluation("stock", 0.3), evaluation("tuned", 0.2)]
    run = write(tmp_path_factory.mktemp("runs") / "large", metrics, rows)
    write_html_report(run, run / "report.html")
    return run


def found_of(page: Page) -> tuple[int, int]:
    """Return what the view says it found, and of how many."""
    match = re.match(r"(\d+) of (\d+) clip", page.locator(".av-count").inner_text())
    assert match is not None
    return int(match[1]), int(match[2])


@contextmanager
def quiet(browser: Browser, run: Path, **options: Any) -> Iterator[Page]:
    """Open a run's report; it may log no error and ask for nothing but itself and what it carries."""
    page = browser.new_page(
        color_scheme=options.get("scheme", "light"), viewport={"width": options.get("width", 1280), "height": 900}
    )
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
def test_a_real_report_is_quiet_fits_and_reads_well(browser: Browser, real_run: Path, scheme: str, width: int) -> None:
    with quiet(browser, real_run, scheme=scheme, width=width) as page:
        contrasts = page.evaluate(CONTRASTS, TEXTS)
        assert len(contrasts) > 200
        assert [text for ratio, text in contrasts if ratio < READABLE] == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_a_player_plays(browser: Browser, real_run: Path) -> None:
    with quiet(browser, real_run) as page:
        assert page.locator("audio").count() == CLIPS
        heard, seconds = page.evaluate(PLAY)
        assert 0.3 < heard <= seconds
        worst = page.locator(".av-clip").first.locator(".av-head").inner_text()
        lengths = [row.duration_sec for row in load_predictions(real_run)["tuned"] if row.id in worst]
        assert f"{seconds:.0f}" in {f"{each:.0f}" for each in lengths}


def test_filter_and_search_find_as_many_clips_as_there_are(browser: Browser, large_run: Path) -> None:
    models = load_predictions(large_run)
    rows, stock = models["tuned"], {row.id: row for row in models["stock"]}

    def with_kind(rows: list[Prediction], kind: str) -> int:
        return sum(kind in clip_kinds(row, WHISPER_ENGLISH) for row in rows)

    with quiet(browser, large_run) as page:
        assert found_of(page) == (SYNTHETIC, SYNTHETIC)
        for kind in ("error", "substitution", "deletion", "insertion", "loop", "empty", "invented", "perfect"):
            page.locator(".av-filter").select_option(kind)
            assert found_of(page) == (with_kind(rows, kind), SYNTHETIC), kind
            assert found_of(page)[0] > 0
        page.locator(".av-filter").select_option("worse")
        assert found_of(page)[0] == sum(row.errors > stock[row.id].errors for row in rows)

        page.locator(".av-filter").select_option("all")
        page.locator(".av-search").fill("quiet RIVER")
        expected = [
            row
            for row in rows
            if any("quiet river" in text for text in (row.reference, row.hypothesis, stock[row.id].hypothesis))
        ]
        assert found_of(page) == (len(expected), SYNTHETIC)
        page.locator(".av-filter").select_option("perfect")
        assert found_of(page)[0] == with_kind(expected, "perfect")
        page.locator(".av-search").fill("nobody says this")
        assert found_of(page)[0] == 0


def test_2000_clips_are_drawn_a_page_at_a_time(browser: Browser, large_run: Path) -> None:
    with quiet(browser, large_run) as page:
        assert page.locator(".av-clip").count() == 25
        page.get_by_role("button", name="next").click()
        assert "26 to 50" in page.locator(".av-count").inner_text()
        page.get_by_role("button", name="previous").click()
        assert "1 to 25" in page.locator(".av-count").inner_text()
        assert page.get_by_role("button", name="previous").is_disabled()


def test_markup_in_a_transcript_is_shown_as_text(browser: Browser, large_run: Path) -> None:
    with quiet(browser, large_run) as page:
        page.locator(".av-search").fill("attacked")
        assert found_of(page)[0] == 1
        page.locator("summary", has_text="as written").click()
        assert ATTACK in page.locator(".av-list").inner_text()
        assert page.title() == "Run large"
        assert page.locator("main script").count() == 2
