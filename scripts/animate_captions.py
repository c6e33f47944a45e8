"""Draw the live captions of a recording as a short animation (GIF), each event when it came.

    python scripts/animate_captions.py talk.wav --model exported/int8 --output captions.gif --seconds 6

The recording is heard in real time, so the animation has the delays of this machine. Words that are final are black,
words that may still change grey.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from scripts.command_line import model_argument, path_argument

WIDTH, HEIGHT, MARGIN = 720, 116, 20
COMMITTED, PARTIAL, BAR, BACKGROUND = "#111111", "#8c8c8c", "#0072b2", "#ffffff"
COLOURS = 16  # of a frame
FONT_SIZE, LINES = 24, 2
HOLD_SEC = 1.5  # the last frame is read before the animation begins again
Frame = tuple[float, str, str]  # seconds since the recording began, final text, text that may change


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording", type=path_argument)
    parser.add_argument("--model", type=model_argument, required=True)
    parser.add_argument("--output", type=path_argument, default=Path("captions.gif"))
    parser.add_argument("--seconds", type=float, default=6.0, help="of the recording")
    arguments = parser.parse_args()
    frames = record(arguments.recording, arguments.model, arguments.seconds)
    for at, committed, partial in frames:
        print(f"{at:5.2f} s  {committed} | {partial}")
    save_animation(frames, arguments.output, arguments.seconds)
    print(f"{arguments.output}: {len(frames)} frames, {arguments.output.stat().st_size / 1e3:.0f} kB")
    return 0


def record(recording: Path, model: str, seconds: float) -> list[Frame]:
    """Stream the beginning of a recording in real time; return what was shown, and when."""
    from src.data import SAMPLE_RATE, VoiceActivityDetector, load_audio
    from src.inference import StreamingASR, load_engine
    from src.inference.streaming.microphone import in_real_time
    from src.utils import load_config

    config = load_config()
    engine = load_engine(model, config)
    asr = StreamingASR(engine=engine, vad=VoiceActivityDetector(config.vad), config=config)
    audio = load_audio(recording)
    asr.stream_audio(audio[: 2 * SAMPLE_RATE])  # the first call is slower than the others
    asr.reset()
    began, committed, frames = time.perf_counter(), "", [(0.0, "", "")]
    for block in in_real_time(audio[: round(seconds * SAMPLE_RATE)]):
        for event in asr.feed(block, SAMPLE_RATE):
            space = " " if event.space else ""
            if event.kind == "commit":
                committed += space + event.text
            if event.kind != "final":
                partial = space + event.text if event.kind == "partial" else ""
                frames.append((time.perf_counter() - began, committed, partial))
    return frames


def save_animation(frames: list[Frame], output: Path, seconds: float) -> None:
    """Write a GIF that shows each frame until the next one came."""
    font = ImageFont.truetype(findfont("DejaVu Sans"), FONT_SIZE)
    tick_sec = 0.1  # the bar moves in between
    images = []
    for number in range(round(seconds / tick_sec)):
        now = number * tick_sec
        _, committed, partial = [frame for frame in frames if frame[0] <= now][-1]
        images.append(draw(committed, partial, now / seconds, font))
    durations = [round(1000 * tick_sec)] * len(images)
    durations[-1] += round(1000 * HOLD_SEC)
    first, *others = images
    first.save(output, save_all=True, append_images=others, duration=durations, loop=0, optimize=False)


def draw(committed: str, partial: str, share: float, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draw one frame: the last lines of the text, and how much of the recording was heard."""
    image = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(image)
    lines: list[list[tuple[str, str]]] = [[]]
    width = 0.0
    for text, colour in ((committed, COMMITTED), (partial, PARTIAL)):
        for word in text.split():
            wide = font.getlength(f"{word} ")
            if width + wide > WIDTH - 2 * MARGIN:
                lines.append([])
                width = 0.0
            lines[-1].append((word, colour))
            width += wide
    for row, line in enumerate(lines[-LINES:]):
        x = float(MARGIN)
        for word, colour in line:
            pen.text((x, MARGIN + row * 1.4 * FONT_SIZE), word, fill=colour, font=font)
            x += font.getlength(f"{word} ")
    pen.rectangle((0, HEIGHT - 5, share * WIDTH, HEIGHT), fill=BAR)
    return image.quantize(COLOURS, dither=Image.Dither.NONE)


if __name__ == "__main__":
    sys.exit(main())
