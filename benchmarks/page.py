"""Measure how soon the page shows what was said: from the first speech to the first caption in a browser.

    python benchmarks/page.py [--quick] [--model FOLDER]

Headless Chromium opens the page, and its microphone hears a recording after a second of silence. The time is the
browser's own: from when it was given the microphone, less where silero-vad finds the first speech in the recording. It
needs playwright, and Chromium on the PATH. The last line printed is one JSON object; the table is appended to
docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import soundfile
from playwright.sync_api import Playwright, sync_playwright

from scripts.benchmarking import append_table, read, strided
from scripts.command_line import model_argument, path_argument
from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.sources.catalog import SAMPLE_PARQUET
from src.data.vad import VoiceActivityDetector
from src.inference.server.page import launch_demo
from src.utils import load_config

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SILENCE_SEC = 1.0
PATIENCE_MS = 60_000
# notes when the microphone is there, and when the first caption, and the first that is final
WATCH = """() => {
  const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  navigator.mediaDevices.getUserMedia = async wishes => {
    const stream = await open(wishes);
    window.opened = performance.now();
    return stream;
  };
  const note = (name, selector) => {
    const shown = [...document.querySelectorAll(selector)].some(place => place.textContent.trim());
    if (shown && window[name] === undefined) window[name] = performance.now();
  };
  new MutationObserver(() => {
    note("shown", ".page .partial, .page .word");
    note("final", ".page .word");
  }).observe(document.querySelector(".page"), {childList: true, subtree: true, characterData: true});
}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=model_argument, default="tiny.en", help="variant, or a folder with a tuned model or its export"
    )
    parser.add_argument(
        "--data", type=path_argument, default=SAMPLE_PARQUET, help="Parquet in the Hugging Face audio layout"
    )
    parser.add_argument("--clips", type=int, default=20, help="at a stride")
    parser.add_argument("--quick", action="store_true", help="under a minute: three clips, nothing recorded")
    parser.add_argument("--no-record", action="store_true", help="append no table")
    arguments = parser.parse_args()
    if CHROMIUM is None:
        print("no Chromium on the PATH: apt-get install chromium", file=sys.stderr)
        return 1
    audios = [load_audio(u.audio) for u in strided(read(arguments.data), 3 if arguments.quick else arguments.clips)]
    figures = summarize(measure(arguments.model, audios))
    rows = [{"what": name.replace("_", " "), "value": f"{value:.2f} s"} for name, value in figures.items()]
    print("\n".join(f"{row['what']:>28}  {row['value']}" for row in rows))
    if not (arguments.quick or arguments.no_record):
        note = f"{len(audios)} clips, one after another, {arguments.model}; browser and server on the same machine."
        append_table("First caption of the page", rows, note=note)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
    return 0


def measure(model: str, audios: Sequence[Waveform]) -> list[tuple[float, float]]:
    """Return, for each clip, the seconds from the first speech to the first caption, and to the first final word."""
    config = load_config(None, overrides={"device": "cpu"})
    onsets = [segments[0].start_sec for segments in VoiceActivityDetector(config.vad).speech_segments_batch(audios)]
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        sync_playwright() as playwright,
        launch_demo(models={"model": model}, config=config) as demo,
    ):
        recording = Path(folder) / "heard.wav"
        for audio, onset in zip(audios, onsets, strict=True):
            silence = np.zeros(round(SILENCE_SEC * SAMPLE_RATE), np.float32)
            soundfile.write(recording, np.concatenate([silence, audio, silence]), SAMPLE_RATE)
            seen = watch(playwright, demo.url, recording)
            spoken = seen["opened"] + 1000 * (SILENCE_SEC + onset)
            found.append(((seen["shown"] - spoken) / 1000, (seen["final"] - spoken) / 1000))
    return found


def watch(playwright: Playwright, url: str, recording: Path) -> dict[str, Any]:
    """Open the page in a browser of its own, press Start, and wait for the first final word."""
    microphone = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    arguments = ["--no-sandbox", *microphone, f"--use-file-for-fake-audio-capture={recording}%noloop"]
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
    try:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(url)
        page.locator(".toggle:enabled").wait_for()
        page.evaluate(WATCH)
        page.locator(".toggle").click()
        page.wait_for_function("window.final !== undefined")
        return dict(page.evaluate("({opened: window.opened, shown: window.shown, final: window.final})"))
    finally:
        browser.close()


def summarize(found: Sequence[tuple[float, float]]) -> dict[str, float]:
    shown, final = zip(*found, strict=True)
    return {
        "first_caption_p50_sec": statistics.median(shown),
        "first_caption_longest_sec": max(shown),
        "first_final_p50_sec": statistics.median(final),
        "first_final_longest_sec": max(final),
    }


if __name__ == "__main__":
    sys.exit(main())
