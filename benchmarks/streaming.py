"""Measure streaming: latency of every word, flicker and WER, for each policy, engine and kind of weights.

    python benchmarks/streaming.py --model FOLDER [--data FILE.parquet] [--clips 40] [--minutes 10] [--quick]

Streams are test clips and the public clip in a row with pauses of 0.3 to 0.8 s; one of 10 minutes; one with pink noise
at 10 dB that opens for 60 s of silence and 60 s of noise. True word ends come from forced alignment of the transcripts
with stock base, cut to speech. Audio arrives in real time on a virtual clock that advances by the measured computing
(`ReplayClock`), so that nothing sleeps. Offline is the same engine and weights on each clip alone. The last line
printed is one JSON object for the default policy on the first engine; tables are appended to docs/BENCHMARKS.md,
figures of a run on a CPU are written to docs/images/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.benchmarking import add_data, append_table, load_clips, percent, percent_interval
from scripts.command_line import model_argument, parse_settings, path_argument
from src.data.vad import VoiceActivityDetector
from src.evaluation.streaming import ReplayClock, WordTiming, log_streams, measure_stream, replay, time_words
from src.evaluation.streams import PUBLIC_CLIP, SpeechStream, WordAligner, add_noise, join_clips
from src.evaluation.visualization.speed import draw_emission, draw_tradeoff
from src.inference.engine_base import Engine, transcribe
from src.inference.engines import load_engine
from src.inference.options import DecodingOptions
from src.inference.streaming.session import StreamingASR, StreamingResult
from src.models.whisper_model import WhisperModelManager
from src.utils.config import Config, load_config
from src.utils.figures import save_figure
from src.utils.languages import parse_language

POLICIES = ("alignatt", "local_agreement", "chunk_merge")
FIGURES = {  # of the last line: the key in `measure_stream`'s row
    "wer_offline": "offline_rate",
    "wer_streaming": "rate",
    "commit_p50_sec": "commit_aware_p50_sec",
    "commit_p95_sec": "commit_aware_p95_sec",
    "unaware_p50_sec": "commit_unaware_p50_sec",
    "stable_p50_sec": "display_aware_p50_sec",
    "normalized_erasure": "normalized_erasure",
    "longest_update_sec": "longest_update_sec",
    "rtf": "rtf",
    "end_of_turn_p50_sec": "end_of_turn_aware_p50_sec",
}


@dataclass
class Measured:
    """Everything that was measured on one stream, by system."""

    stream: SpeechStream
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    timings: dict[str, tuple[WordTiming, ...]] = field(default_factory=dict)
    results: dict[str, StreamingResult] = field(default_factory=dict)


def main() -> int:
    arguments = parse_arguments()
    clean, long, noisy = streams(arguments)
    default = f"tuned {arguments.engines[0]} {arguments.policies[0]}"
    for weights, variant in (("tuned", arguments.model), ("stock", arguments.stock)):
        for engine_name in arguments.engines:
            is_default = (weights, engine_name) == ("tuned", arguments.engines[0])
            if arguments.quick and not is_default:
                continue
            engine = load_engine(variant, config_for(arguments, arguments.policies[0]), engine=engine_name)
            for policy in arguments.policies if is_default or arguments.full else arguments.policies[:1]:
                measure(clean, engine, f"{weights} {engine_name} {policy}", config_for(arguments, policy))
            if is_default:
                for other in (long, noisy):
                    measure(other, engine, default, config_for(arguments, arguments.policies[0]))
    record(arguments, [clean, long, noisy])
    if arguments.simuleval is not None:
        heard = [(each.stream, each.results[default]) for each in (clean, long, noisy)]
        log_streams(arguments.simuleval, heard, characters=clean.metrics[default]["metric"] == "CER")
    rows = {
        name: measured.metrics[default]
        for name, measured in zip(["clean", "long", "noisy"], [clean, long, noisy], strict=True)
    }
    print(
        json.dumps(
            {name: rows["clean"][key] for name, key in FIGURES.items()}
            | {"end_lag_sec": rows["long"]["lag_sec"], "words_on_silence": rows["noisy"]["words_without_speech"]}
        )
    )
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        type=model_argument,
        required=True,
        help="folder of a checkpoint that works at the audio's own length",
    )
    parser.add_argument(
        "--stock", type=model_argument, default="tiny.en", help="weights to compare with, padded to 30 s"
    )
    parser.add_argument("--aligner", default="base", help="weights that place the words of the transcripts")
    add_data(parser)
    parser.add_argument("--language", default="en", help="of the speech, code or name; default: %(default)s")
    parser.add_argument("--clips", type=int, default=40, help="at a stride over all")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the long stream")
    parser.add_argument("--device", default="cpu", help="cuda measures a GPU; the aligner runs there too")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["ctranslate2", "torch"],
        choices=("ctranslate2", "torch"),
        help="the first one's figures are in the last line",
    )
    parser.add_argument(
        "--policies", nargs="+", default=list(POLICIES), choices=POLICIES, help="the first one likewise"
    )
    parser.add_argument("--full", action="store_true", help="every policy on the other engine and on stock weights too")
    parser.add_argument("--set", action="append", default=[], metavar="streaming.KEY=VALUE", help="overrides a setting")
    parser.add_argument("--simuleval", type=path_argument, metavar="FOLDER", help="write a log for SimulEval")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--quick", action="store_true", help="under a minute: the default system, a few clips")
    arguments = parser.parse_args()
    arguments.language = parse_language(arguments.language)
    if arguments.quick:
        arguments.clips, arguments.minutes, arguments.aligner = 6, 0.5, arguments.stock
        arguments.policies = arguments.policies[:1]
    return arguments


def config_for(arguments: argparse.Namespace, policy: str) -> Config:
    """Return the configuration of a policy."""
    overrides: dict[str, Any] = {
        "device": arguments.device,
        "model": {"language": arguments.language},
        "streaming": {"policy": policy},
    }
    return load_config(None, overrides=overrides | parse_settings(arguments))


def streams(arguments: argparse.Namespace) -> tuple[Measured, Measured, Measured]:
    """Return the clean, the long and the noisy stream."""
    manager = WhisperModelManager(
        load_config(None, overrides={"device": arguments.device, "model": {"language": arguments.language}})
    )
    aligner = WordAligner(*manager.initialize_model(arguments.aligner), language=arguments.language)
    public = [PUBLIC_CLIP] if arguments.language == "en" else []
    clips = [aligner.align(utterance) for utterance in [*load_clips(arguments.data, arguments.clips), *public]]
    gap_sec = 5.0 if arguments.quick else 60.0
    clean = join_clips(clips, name="clips with pauses", seed=0)
    long = join_clips(clips, name=f"{arguments.minutes:g} min", seed=1, duration_sec=60 * arguments.minutes)
    noisy = add_noise(clean, snr_db=10, seed=2, silence_sec=gap_sec, noise_sec=gap_sec)
    return Measured(clean), Measured(long), Measured(noisy)


def measure(measured: Measured, engine: Engine, name: str, config: Config) -> None:
    """Let a session hear a stream live, on the virtual clock."""
    options = DecodingOptions.from_config(config)
    stream = measured.stream
    offline = [transcribe(engine, [clip], options)[0].text for clip in stream.clip_audios()]
    clock = ReplayClock()
    session = StreamingASR(engine=engine, vad=VoiceActivityDetector(config.vad), config=config, clock=clock)
    result, ended_at = replay(session, stream.audio, clock)
    language = config.model.language
    measured.metrics[name] = measure_stream(stream, result, ended_at=ended_at, offline=offline, language=language)
    measured.results[name] = result
    measured.timings[name] = time_words(stream, result.events, on_clock=True)
    row = table_row(name, measured.metrics[name])
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def table_row(name: str, row: dict[str, Any]) -> dict[str, str]:
    """Lay one session out."""

    def seconds(key: str) -> str:
        return "-" if row[key] is None else f"{row[key]:.2f}"

    return {
        "system": name,
        f"{row['metric']} %": percent_interval(row["rate"], row["low"], row["high"]),
        "offline %": percent(row["offline_rate"]),
        "S/D/I": f"{row['substitutions']}/{row['deletions']}/{row['insertions']}",
        "commit p50": seconds("commit_aware_p50_sec"),
        "p95": seconds("commit_aware_p95_sec"),
        "free compute p50": seconds("commit_unaware_p50_sec"),
        "display p50": seconds("display_aware_p50_sec"),
        "erasure": seconds("normalized_erasure"),
        "end of turn": seconds("end_of_turn_aware_p50_sec"),
        "longest update": seconds("longest_update_sec"),
        "RTF": seconds("rtf"),
        "lag": seconds("lag_sec"),
        "words without speech": "-" if row["words_without_speech"] is None else str(row["words_without_speech"]),
    }


def record(arguments: argparse.Namespace, measured: Sequence[Measured]) -> None:
    """Append the tables and draw the figures."""
    if arguments.quick or arguments.no_record:
        return
    for item in measured:
        stream = item.stream
        note = f"{stream.duration_sec:.0f} s, {len(stream.words)} words; seconds, aware of computing."
        rows = [table_row(name, metrics) for name, metrics in item.metrics.items()]
        append_table(f"Streaming: {stream.name}", rows, note=note)
    if arguments.device != "cpu":
        return
    images = ROOT / "docs" / "images"
    first = f"tuned {arguments.engines[0]} "

    def short(name: str) -> str:  # for the figures: only the policy if the engine is the first
        return name.removeprefix(first).replace(f"{arguments.engines[0]} ", "")

    shown = {short(name): words for name, words in measured[0].timings.items() if name.startswith(first)}
    save_figure(draw_emission(shown), images, "streaming_emission")
    points = [{**metrics, "name": short(name)} for name, metrics in measured[0].metrics.items()]
    save_figure(draw_tradeoff(points), images, "streaming_tradeoff")


if __name__ == "__main__":
    sys.exit(main())
