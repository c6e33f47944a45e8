"""Chromium of the tests that open a page, what the page may not do, and the contrast of what it shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
NO_BROWSER = pytest.mark.skipif(not CHROMIUM, reason="no chromium on the PATH: apt-get install chromium")
PATIENCE_SEC = 120.0  # a test must not fail because the machine is busy
READABLE = 4.5  # contrast of text, WCAG 2 AA
# the contrast and the beginning of each visible text
CONTRASTS = """selectors => {
  const paint = (...colors) => {
    const context = new OffscreenCanvas(1, 1).getContext("2d");
    for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const light = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  return [...document.querySelectorAll(selectors)]
    .filter(e => e.textContent.trim() && e.checkVisibility()).map(element => {
      const grounds = [];
      for (let e = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
      const ground = paint(...grounds), text = paint(...grounds, getComputedStyle(element).color);
      const [a, b] = [light(ground), light(text)].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), `${element.tagName}.${element.className}: ${element.textContent.slice(0, 40)}`];
    });
}"""


def launch_hearing(playwright: Playwright, recording: str) -> Browser:
    """Start a browser whose microphone plays a WAV file again and again, or once where %noloop follows its name."""
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    flags.append(f"--use-file-for-fake-audio-capture={recording}")
    return playwright.chromium.launch(executable_path=CHROMIUM, args=flags)


@contextmanager
def watched_page(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """Open a page without errors that asks nothing of other hosts."""
    page = browser.new_page(**options)
    page.set_default_timeout(PATIENCE_SEC * 1000)
    said: list[str] = []
    own = (url, "data:", "blob:")
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("console", lambda line: said.append(line.text) if "js_on_load" in line.text else None)
    page.on("request", lambda request: None if request.url.startswith(own) else said.append(request.url))
    page.goto(url)
    yield page
    assert said == [], said
    page.close()
