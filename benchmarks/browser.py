"""Open an ONNX export in a browser: transformers.js in headless Chromium transcribes a clip.

    python benchmarks/browser.py --model exports/onnx [--file clip.wav] [--quick]
    python benchmarks/browser.py --model tiny.en

Another checkpoint is exported first. A local server gives the page the model, the clip and two packages of npm, which
are fetched once into the cache; nothing else is asked of any host. The clip is heard padded to 30 s, as the pipeline of
transformers.js does it, and by a model of dynamic context also at its own length. The last line printed is one JSON
object; the table is appended to docs/BENCHMARKS.md. It needs npm, playwright, and Chromium on the PATH.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.benchmarking import show
from scripts.command_line import add_model, path_argument
from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.features import padded_samples
from src.data.sources.catalog import SAMPLE_CLIP
from src.models.export.onnx import ENCODER_FILES
from src.models.export.verify import TRAILING_SILENCE_SEC
from src.utils.config import load_config
from src.utils.errors import MissingDependencyError
from src.utils.files import atomic_folder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# the first bundles the second's code, and loads its WebAssembly
PACKAGES = {
    "@huggingface/transformers@4.3.2": ("transformers.min.js",),
    "onnxruntime-web@1.31.0-dev.20260914-8d85527a0": (
        "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm",
    ),
}  # fmt: skip
LOADING_SEC = 300
PAGE = """<!doctype html><link rel="icon" href="data:,"><script type="module">
import { env, pipeline } from "./js/transformers.min.js";
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "./";
env.useBrowserCache = false;
env.backends.onnx.wasm.wasmPaths = new URL("./js/", location.href).href;
let asr;
window.loadModel = async dtype => { asr = await pipeline("automatic-speech-recognition", "model", { dtype }); };
// seconds, and the text; of the language, which is null for an English-only model
window.transcribe = async (samples, language) => {
  const audio = new Float32Array(await (await fetch("audio.f32")).arrayBuffer());
  const spoken = language ? { language, task: "transcribe" } : {};
  const began = performance.now();
  let text;
  if (samples === null) {
    text = (await asr(audio, spoken)).text;
  } else {
    const { input_features } = await asr.processor.feature_extractor(audio, { max_length: samples });
    const tokens = await asr.model.generate({ inputs: input_features, max_new_tokens: 224, ...spoken });
    text = asr.tokenizer.batch_decode(tokens, { skip_special_tokens: true })[0];
  }
  return [(performance.now() - began) / 1000, text.trim()];
};
</script>"""


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(given)
    cache_dir = load_config(None).paths.cache_dir
    try:
        scripts = fetch_packages(cache_dir)
        with exported(arguments.model) as folder:
            found = transcribe_in_browser(folder, load_audio(arguments.file), scripts, arguments.language)
    except MissingDependencyError as err:
        print(f"skipped: {err}", file=sys.stderr)
        return 1
    rows = [{"clip": how, "seconds": f"{sec:.1f}", "text": text} for how, (sec, text) in found.items()]
    note = f"{arguments.file.name}, {Path(arguments.model).name}; {', '.join(PACKAGES)}; one thread of WebAssembly"
    show("A clip in the browser", rows, note, record=not arguments.quick)
    print(json.dumps({how: {"sec": round(sec, 2), "text": text} for how, (sec, text) in found.items()}))
    return 0


def parse_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--file", type=path_argument, default=SAMPLE_CLIP, help="up to 30 s; default: the bundled clip")
    parser.add_argument("--language", help="of the clip, as a code; not for English-only models")
    parser.add_argument("--quick", action="store_true", help="print only")
    return parser.parse_args(given)


@contextmanager
def exported(model: str) -> Iterator[Path]:
    """Yield an ONNX folder: the one that is given, or a checkpoint's export in 8 bits, for the time of the block."""
    if any(Path(model, name).is_file() for name in ENCODER_FILES):
        yield Path(model)
        return
    from scripts.export import export

    with tempfile.TemporaryDirectory() as scratch:
        yield export(model, "onnx", "int8", Path(scratch, "onnx"))


def fetch_packages(cache_dir: Path) -> Path:
    """Return the folder of the page's scripts, fetched with npm into the cache if they are not there.

    Raises `MissingDependencyError` without npm, its registry, Chromium or playwright.
    """
    if CHROMIUM is None:
        raise MissingDependencyError("no Chromium on the PATH: apt-get install chromium")
    folder = cache_dir / "transformers_js" / "-".join(name.rpartition("@")[2] for name in PACKAGES)
    if folder.is_dir():
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise MissingDependencyError("no npm on the PATH: apt-get install npm")
    with atomic_folder(folder) as target, tempfile.TemporaryDirectory() as scratch:
        for name, files in PACKAGES.items():
            done = subprocess.run([npm, "pack", "--silent", name], cwd=scratch, capture_output=True, text=True)
            if done.returncode:
                raise MissingDependencyError(f"npm could not fetch {name}: {done.stderr.strip()[-300:]}")
            with tarfile.open(Path(scratch, done.stdout.split()[-1])) as archive:
                for file in files:
                    content = archive.extractfile(f"package/dist/{file}")
                    assert content is not None  # a member that is no file
                    (target / file).write_bytes(content.read())
    return folder


def transcribe_in_browser(
    folder: Path, audio: Waveform, scripts: Path, language: str | None = None, *, calls: int = 2
) -> dict[str, tuple[float, str]]:
    """Return seconds and text of a clip, (T,) at 16 kHz: "padded to 30 s", and "own length" if the model takes it.

    The times are those of the last call: in the first the browser compiles.
    """
    from playwright.sync_api import sync_playwright

    dtype = "fp32" if (folder / ENCODER_FILES[0]).is_file() else "q8"
    ways: dict[str, int | None] = {"padded to 30 s": None}
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("audio_context") == "dynamic":
        ways["own length"] = padded_samples(len(audio) + round(TRAILING_SILENCE_SEC * SAMPLE_RATE))
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch)
        (site / "model").symlink_to(folder.absolute())
        (site / "js").symlink_to(scripts)
        (site / "index.html").write_text(PAGE, encoding="utf-8")
        (site / "audio.f32").write_bytes(audio.astype("<f4").tobytes())
        with serve_folder(site) as url, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            page.set_default_timeout(LOADING_SEC * 1_000)
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(f"{url}/index.html")
            page.wait_for_function("() => window.transcribe !== undefined")
            page.evaluate("dtype => loadModel(dtype)", dtype)
            found = {}
            for how, samples in ways.items():
                for _ in range(calls):
                    sec, text = page.evaluate("given => transcribe(...given)", [samples, language])
                found[how] = sec, text
            browser.close()
    if elsewhere := [each for each in asked if not each.startswith((url, "data:", "blob:"))]:
        raise ValueError(f"the page asked other hosts: {', '.join(elsewhere[:3])}")
    return found


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine for the time of the block; yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
