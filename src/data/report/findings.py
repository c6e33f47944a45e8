"""What the table of clips says that a person should know before training: each with its count, examples and advice.

A rule is a function from the table to findings; it reads columns and decodes nothing. "error" means that training or
measuring on this gives something wrong, "warning" that it costs quality, "info" is good to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from src.data.audio import SAMPLE_RATE
from src.data.labels import MAX_LABEL_TOKENS
from src.data.report.table import text_key
from src.data.utterance import SkippedUtterance

Level = Literal["error", "warning", "info"]
LEVELS: tuple[Level, ...] = ("error", "warning", "info")
NOT_MEASURED = "not measured"
MAX_EXAMPLES = 5
LITTLE_TRAINING_SEC = 600.0
NARROWBAND_HZ = 4_100.0  # telephone speech ends at 4 kHz, one bin of tolerance
CLIPPED_FRACTION = 0.0005  # clean speech: at most 0.0001
SILENT_FRACTION = 0.8
QUIET_DBFS = -45.0  # 16-bit noise is at -98
LONG_SILENCE_SEC = 2.0
SHORT_SEC = 0.5
FEW_TEST_SPEAKERS = 10  # below it a bootstrap interval over speakers is clearly too narrow
MANY = 0.05  # of the clips: a fault of the set, not of a few recordings
CAPITALS_SHARE = 0.9  # of a text's cased letters
_PUNCTUATION = frozenset(".,;:?!…。、，；：？！।¿¡")


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    Attributes:
        topic: what it is about, a word or two.
        message: what was found, with its count.
        advice: what to do about it; empty where there is nothing to do.
        ids: of clips that show it, five at most.
    """

    level: Level
    topic: str
    message: str
    advice: str = ""
    ids: tuple[str, ...] = ()


def find_all(clips: pd.DataFrame, skipped: Sequence[SkippedUtterance]) -> tuple[Finding, ...]:
    """Apply every rule.

    Args:
        clips: the columns of `CLIP_TYPES`.
    Returns: errors first, within a level in the order of the rules.
    """
    found = list(_find_skipped(skipped))
    for rule in (
        _find_amount, _find_rates, _find_levels, _find_speech, _find_pace, _find_same_audio, _find_same_texts,
        _find_speakers, _find_lengths, _find_styles,
    ):  # fmt: skip
        found += rule(clips)
    return sort_findings(found)


def sort_findings(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Put errors first, then warnings."""
    return tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level)))


def count_clips(n: int) -> str:
    """Return "1 clip" or "2 clips"."""
    return f"{n:,} clip{'s' * (n != 1)}"


def _examples(clips: pd.DataFrame) -> tuple[str, ...]:
    return tuple(clips["id"].head(MAX_EXAMPLES))


def _find_skipped(skipped: Sequence[SkippedUtterance]) -> Iterator[Finding]:
    if not skipped:
        return
    of_duration = sum("data.max_duration_sec" in row.reason for row in skipped)
    yield Finding(
        "warning", "skipped", f"{count_clips(len(skipped))} left out while checking, {of_duration} for the duration",
        "read the reasons in the list of skipped clips; cut long recordings at pauses",
        tuple(row.id for row in skipped[:MAX_EXAMPLES]),
    )  # fmt: skip


def _find_amount(clips: pd.DataFrame) -> Iterator[Finding]:
    seconds = clips.groupby("split", sort=False)["duration_sec"].agg(["sum", "size"])
    parts = [f"{name} {row['sum'] / 60:.1f} min in {count_clips(int(row['size']))}" for name, row in seconds.iterrows()]
    little = float(clips.loc[clips["split"] == "train", "duration_sec"].sum()) < LITTLE_TRAINING_SEC
    yield Finding(
        "warning" if little else "info", "amount", ", ".join(parts),
        "under 10 minutes for training: record more, keep epochs few, and trust only the comparison with the stock "
        "model" if little else "",
    )  # fmt: skip


def _find_rates(clips: pd.DataFrame) -> Iterator[Finding]:
    low = clips[clips["sample_rate"] < SAMPLE_RATE]
    if len(low):
        lowest = int(low["sample_rate"].min())
        yield Finding(
            "warning", "sample rate",
            f"{count_clips(len(low))} of {len(clips):,} below {SAMPLE_RATE:,} Hz; at {lowest:,} Hz there is nothing "
            f"above {lowest // 2:,} Hz",
            "look for the original recordings; if the model will hear telephone speech, this is the right data",
            _examples(low),
        )  # fmt: skip
    narrow = clips[(clips["sample_rate"] >= SAMPLE_RATE) & (clips["bandwidth_hz"] <= NARROWBAND_HZ)]
    if len(narrow):
        yield Finding(
            "warning" if len(narrow) > MANY * len(clips) else "info", "bandwidth",
            f"{count_clips(len(narrow))} of {len(clips):,} with a high sample rate but nothing above 4 kHz: made from "
            "telephone speech, or filtered",
            "take the files from before they were converted, if there are any", _examples(narrow),
        )  # fmt: skip
    rates = clips["sample_rate"].value_counts()
    if len(rates) > 1:
        listed = ", ".join(f"{rate:,} Hz ({n:,})" for rate, n in rates.items())
        shares = (clips["bandwidth_hz"] <= NARROWBAND_HZ).groupby(clips["split"]).mean()
        differ = float(shares.max() - shares.min()) > 0.2
        yield Finding(
            "warning" if differ else "info", "mixed rates",
            f"sample rates are mixed: {listed}" + ("; the splits differ in how much is narrowband" if differ else ""),
            "training and test should sound alike: mix the rates in all splits" if differ else "",
        )  # fmt: skip


def _find_levels(clips: pd.DataFrame) -> Iterator[Finding]:
    clipped = clips[clips["clipped_fraction"] > CLIPPED_FRACTION].sort_values("clipped_fraction", ascending=False)
    if len(clipped):
        yield Finding(
            "warning" if len(clipped) > MANY * len(clips) else "info", "clipping",
            f"{count_clips(len(clipped))} of {len(clips):,} cut off at the loudest parts, the worst in "
            f"{clipped['clipped_fraction'].iloc[0]:.1%} of its samples",
            "lower the input level of new recordings; leave out what sounds broken", _examples(clipped),
        )  # fmt: skip
    silent = clips[clips["silent_fraction"] > SILENT_FRACTION]
    if len(silent):
        yield Finding(
            "warning", "silence", f"{count_clips(len(silent))} silent for more than {SILENT_FRACTION:.0%} of the time",
            "cut them to the speech; a text on silence teaches the model to invent words", _examples(silent),
        )  # fmt: skip
    quiet = clips[clips["loudness_dbfs"] < QUIET_DBFS]
    if len(quiet):
        yield Finding(
            "info", "level", f"{count_clips(len(quiet))} quieter than {QUIET_DBFS:.0f} dBFS",
            "the model hears each clip scaled by its loudest part, so noise comes up with the speech: record closer",
            _examples(quiet),
        )  # fmt: skip


def _find_speech(clips: pd.DataFrame) -> Iterator[Finding]:
    heard = clips[clips["speech_fraction"].notna()]
    if len(heard) < len(clips):
        what = f"on {len(heard):,} of {len(clips):,} clips, chosen by hash" if len(heard) else f"{NOT_MEASURED}"
        yield Finding("info", "speech detection", f"where speech is: {what}")
    mute = heard[heard["speech_fraction"] == 0]
    if len(mute):
        yield Finding(
            "error" if len(mute) > MANY * len(heard) else "warning", "no speech",
            f"{count_clips(len(mute))} of {len(heard):,} without any speech found, but with a transcript",
            "listen to them; remove those without speech, or the model learns to invent words", _examples(mute),
        )  # fmt: skip
    longest = heard[["leading_silence_sec", "trailing_silence_sec"]].max(axis=1)
    idle = heard[longest > LONG_SILENCE_SEC]
    if len(idle):
        yield Finding(
            "warning", "long silence",
            f"{count_clips(len(idle))} of {len(heard):,} with more than {LONG_SILENCE_SEC:.0f} s before or after the "
            f"speech, at most {longest.max():.1f} s",
            "cut the ends: silence costs compute and hides cut transcripts", _examples(idle),
        )  # fmt: skip


def _find_pace(clips: pd.DataFrame) -> Iterator[Finding]:
    odd = clips[clips["chars_per_sec_outlier"]]
    if not len(odd):
        return
    median = float(clips["chars_per_sec"].median())
    ratio = odd["chars_per_sec"] / median
    odd = odd.loc[ratio.where(ratio >= 1, 1 / ratio.clip(lower=1e-9)).sort_values(ascending=False).index]
    yield Finding(
        "warning", "pace",
        f"{count_clips(len(odd))} of {len(clips):,} far from the median of {median:.1f} characters a second: "
        f"{int((ratio >= 1).sum())} too fast, {int((ratio < 1).sum())} too slow",
        "listen to them: too fast is another clip's transcript or audio that was cut, too slow is missing words or "
        "long silence", _examples(odd),
    )  # fmt: skip


def _find_same_audio(clips: pd.DataFrame) -> Iterator[Finding]:
    copies = clips[clips["duplicate_audio_of"].notna()]
    if not len(copies):
        return
    originals = clips.set_index("id").loc[copies["duplicate_audio_of"].tolist()]
    across = copies[copies["split"].to_numpy() != originals["split"].to_numpy()]
    if len(across):
        yield Finding(
            "error", "same audio across splits",
            f"{count_clips(len(across))} also in another split: the test repeats what was trained on",
            "remove them from training, or from the test", _examples(across),
        )  # fmt: skip
    keys, other = copies["text"].map(text_key).to_numpy(), originals["text"].map(text_key).to_numpy()
    unlike = copies[keys != other]
    if len(unlike):
        yield Finding(
            "error", "same audio, other text",
            f"{count_clips(len(unlike))} with the audio of another clip but not its transcript: one of them is wrong",
            "listen, and keep the right one", _examples(unlike),
        )  # fmt: skip
    within = len(copies) - len(across)
    if within:
        same = copies[~copies["id"].isin(across["id"])]
        yield Finding(
            "warning", "same audio", f"{count_clips(within)} more than once in a split", "remove the copies",
            _examples(same),
        )  # fmt: skip


def _find_same_texts(clips: pd.DataFrame) -> Iterator[Finding]:
    repeated = clips[clips["duplicate_text_count"] > 1]
    if not len(repeated):
        return
    keys = clips["text"].map(text_key)
    trained = set(keys[clips["split"] == "train"])
    test = clips["split"] == "test"
    shared = clips[test & keys.isin(trained)]
    flattering = len(shared) > 0.2 * int(test.sum())
    yield Finding(
        "warning" if flattering else "info", "same texts",
        f"{count_clips(len(repeated))} with a text that occurs more than once; {len(shared):,} of {int(test.sum()):,} "
        "test texts are also in training",
        "the rates speak of known sentences: test on texts that are not in training" if flattering else "",
        _examples(shared if len(shared) else repeated),
    )  # fmt: skip


def _find_speakers(clips: pd.DataFrame) -> Iterator[Finding]:
    unknown = clips[clips["speaker"].isna()]
    if len(unknown):
        yield Finding(
            "warning", "unknown speakers",
            f"{count_clips(len(unknown))} of {len(clips):,} without a speaker: one voice may be in training and test",
            "add a speaker column; without it rates may flatter and intervals are over clips", _examples(unknown),
        )  # fmt: skip
    named = clips[clips["speaker"].notna()]
    splits_of = named.groupby("speaker")["split"].nunique()
    shared = splits_of[splits_of > 1].index
    if len(shared):
        rows = named[named["speaker"].isin(shared)]
        yield Finding(
            "warning", "shared speakers",
            f"{len(shared):,} speaker{'s' * (len(shared) != 1)} in more than one split, with {count_clips(len(rows))}",
            "right for a model of these voices only; else split by speaker", _examples(rows),
        )  # fmt: skip
    of_test = int(named.loc[named["split"] == "test", "speaker"].nunique())
    if 0 < of_test < FEW_TEST_SPEAKERS:
        yield Finding(
            "warning", "few test speakers",
            f"the test has {of_test} speaker{'s' * (of_test != 1)}: intervals over them are too narrow",
            f"take at least {FEW_TEST_SPEAKERS} speakers for the test",
        )  # fmt: skip


def _find_lengths(clips: pd.DataFrame) -> Iterator[Finding]:
    if clips["tokens"].isna().all():
        yield Finding("info", "tokens", f"length of the transcripts in tokens: {NOT_MEASURED}, no tokenizer was given")
    long = clips[(clips["tokens"] > MAX_LABEL_TOKENS).fillna(False)]
    if len(long):
        yield Finding(
            "error", "tokens",
            f"{count_clips(len(long))} with more than {MAX_LABEL_TOKENS} tokens (at most {clips['tokens'].max()}), "
            "which the decoder cannot take",
            "cut the recordings at pauses, or remove them", _examples(long),
        )  # fmt: skip
    short = clips[clips["duration_sec"] < SHORT_SEC]
    if len(short):
        yield Finding(
            "info", "short", f"{count_clips(len(short))} shorter than {SHORT_SEC} s",
            "check that no word was cut off", _examples(short),
        )  # fmt: skip


def _find_styles(clips: pd.DataFrame) -> Iterator[Finding]:
    texts = clips["text"]
    upper, lower = texts.map(lambda t: sum(map(str.isupper, t))), texts.map(lambda t: sum(map(str.islower, t)))
    rules = (
        ("capitals", "in capitals", upper > CAPITALS_SHARE * (upper + lower)),
        ("punctuation", "with punctuation", texts.map(lambda t: any(c in _PUNCTUATION for c in t))),
    )
    for topic, what, has in rules:
        share = float(has.mean())
        if MANY < share < 1 - MANY:
            fewer = clips[has if share < 0.5 else ~has]
            yield Finding(
                "warning", topic, f"styles are mixed: {share:.0%} of the transcripts are {what}",
                "write all in one style (data.label_case: sentence or lower): the model cannot guess which is wanted",
                _examples(fewer),
            )  # fmt: skip
        elif topic == "capitals" and share >= 1 - MANY:
            yield Finding(
                "warning", topic, "the transcripts are in capitals, which the stock model does not write",
                "set data.label_case to auto or sentence: fewer updates are needed",
            )  # fmt: skip
        elif topic == "punctuation" and share <= MANY:
            yield Finding(
                "info", topic, "the transcripts have no punctuation: the model will stop writing it",
                "set data.label_case to sentence for a full stop at least, if punctuation is wanted",
            )  # fmt: skip
    digits = clips[texts.map(lambda t: any(map(str.isdigit, t)))]
    if len(digits):
        yield Finding(
            "info", "digits", f"{count_clips(len(digits))} of {len(clips):,} with digits",
            "fine where every number is written so; mixed with number words, rates suffer", _examples(digits),
        )  # fmt: skip
