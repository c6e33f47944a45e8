"""Findings in the table of clips that a person should know before training, with counts, examples and advice.

A rule reads columns and decodes nothing. "error" means that training or measuring on this gives something wrong,
"warning" that it costs quality, "info" is good to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import langcodes
import pandas as pd
import regex

from src.data.audio import SAMPLE_RATE
from src.data.labels import MAX_LABEL_TOKENS, resolve_case
from src.data.utterance import SkippedUtterance
from src.utils.languages import UNSPACED, language_name, normalize_plain, text_language

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
FEW_TEST_SPEAKERS = 10  # below it an interval over speakers shows large differences only
MANY = 0.05  # of the clips: a fault of the set, not of a few recordings
FLATTERING_SHARE = 0.2  # of the test's texts that are in training too
_SAME_SCRIPT = 0.9  # of the most letters that are of a script of one language: Japanese is half Chinese characters
_PUNCTUATION = regex.compile(r"[\p{Terminal_Punctuation}…¿¡]")
_UNPUNCTUATED = frozenset({"th", "lo"})  # written without full stops and commas
_SCRIPTS = {"Hans": ("Hani",), "Hant": ("Hani",), "Jpan": ("Hani", "Hira", "Kana"), "Kore": ("Hang",)}
_BOTH_SCRIPTS = dict.fromkeys(("az", "bs", "kk", "sr", "tg", "tk", "tt", "uz"), ("Latn", "Cyrl"))  # in daily use
_RARE_SCRIPTS = {
    **dict.fromkeys(("az", "ha", "jw", "kk", "ms", "pa", "so", "su", "tg", "tk", "tt", "uz"), ("Arab",)),
    "ko": ("Hani",), "mn": ("Mong",), "sd": ("Deva",),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing to know: what it is about, what was found, what to do about it, and clips that show it."""

    level: Level
    topic: str
    message: str
    advice: str = ""
    ids: tuple[str, ...] = ()


def find_all(clips: pd.DataFrame, skipped: Sequence[SkippedUtterance], task: str) -> tuple[Finding, ...]:
    """Apply every rule to a table with the columns of `CLIP_TYPES` and to what was left out while checking."""
    of_duration = sum("data.max_duration_sec" in row.reason for row in skipped)
    left_out = _of(
        pd.DataFrame({"id": [row.id for row in skipped]}), "warning", "skipped",
        f"left out while checking, {of_duration} for the duration",
        "read the reasons in the list of skipped clips; cut long recordings at pauses",
    )  # fmt: skip
    by_language = list(clips.groupby(clips["language"].fillna(""), sort=False))
    alone = len(by_language) == 1
    texts = [found for code, part in by_language for found in _in_texts(part, str(code) or None, alone=alone)]
    others = [*_of_tokens(clips), *_between_splits(clips)]
    return sort_findings([*left_out, *_in_recordings(clips), *_in_languages(clips, task), *texts, *others])


def sort_findings(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Put errors first, then warnings."""
    return tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level)))


def counted(count: int, noun: str = "clip") -> str:
    """Return "1 clip" or "2 clips"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def text_key(text: str, language: str | None = None) -> str:
    """Return what two transcripts have in common that differ in case and punctuation only."""
    return ("" if language in UNSPACED else " ").join(normalize_plain(text, language).split())


def text_keys(clips: pd.DataFrame) -> pd.Series[str]:
    """Return the `text_key` of each row."""
    keys = [text_key(text, language) for text, language in zip(clips["text"], clips["language"], strict=True)]
    return pd.Series(keys, clips.index)


def fits_script(text: str, language: str) -> bool:
    """Whether a quarter of a text's letters are of a script of its language: names and terms may be of others."""
    return 4 * _count_letters(text, language, rare=True) >= sum(map(str.isalpha, text))


def languages_of_script(texts: Sequence[str], languages: Sequence[str]) -> list[str]:
    """Return those of the languages that are usually written in the script of texts; all for Latin, as many can be."""
    text = "".join(texts)
    counts = {language: _count_letters(text, language, rare=False) for language in languages}
    most = max(counts.values(), default=0)
    if _count_letters(text, "en", rare=False) >= most:
        return list(languages)
    return [language for language, count in counts.items() if count >= _SAME_SCRIPT * most]


def _count_letters(text: str, language: str, *, rare: bool) -> int:
    letters = _letters_of(language, rare)
    return sum(char.isalpha() and letters.match(char) is not None for char in text)


@cache
def _letters_of(language: str, rare: bool) -> regex.Pattern[str]:
    usual = str(langcodes.Language.get(language).maximize().script)
    scripts = (*_SCRIPTS.get(usual, (usual,)), *_BOTH_SCRIPTS.get(language, ()))
    scripts += _RARE_SCRIPTS.get(language, ()) if rare else ()
    return regex.compile("[" + "".join(rf"\p{{scx={name}}}" for name in scripts) + "]")


def _of(clips: pd.DataFrame, level: Level, topic: str, message: str, advice: str) -> list[Finding]:
    """Return one finding on these clips, with their number before the message; none where there are none."""
    examples = tuple(clips["id"].head(MAX_EXAMPLES))
    return [Finding(level, topic, f"{counted(len(clips))} {message}", advice, examples)] if examples else []


def _in_recordings(clips: pd.DataFrame) -> Iterator[Finding]:
    total, rates = len(clips), clips["sample_rate"]
    seconds = clips.groupby("split", sort=False)["duration_sec"].agg(["sum", "size"])
    parts = [f"{name} {row['sum'] / 60:.1f} min in {counted(int(row['size']))}" for name, row in seconds.iterrows()]
    little = float(clips.loc[clips["split"] == "train", "duration_sec"].sum()) < LITTLE_TRAINING_SEC
    advice = "under 10 minutes for training: record more, and trust only the comparison with the stock model"
    yield Finding("warning" if little else "info", "amount", ", ".join(parts), advice * little)
    yield from _of(
        clips[clips["duration_sec"] < SHORT_SEC], "info", "short", f"shorter than {SHORT_SEC} s",
        "check that no word was cut off",
    )  # fmt: skip

    lowest = int(rates.min())
    yield from _of(
        clips[rates < SAMPLE_RATE], "warning", "sample rate",
        f"of {total:,} below {SAMPLE_RATE:,} Hz, resampled to it; at {lowest:,} Hz there is nothing above "
        f"{lowest // 2:,} Hz",
        "look for the original recordings; if the model will hear telephone speech, this is the right data",
    )  # fmt: skip
    is_narrow = clips["bandwidth_hz"] <= NARROWBAND_HZ
    narrow = clips[(rates >= SAMPLE_RATE) & is_narrow]
    yield from _of(
        narrow, "warning" if len(narrow) > MANY * total else "info", "bandwidth",
        f"of {total:,} with a high sample rate but nothing above 4 kHz: made from telephone speech, or filtered",
        "take the files from before they were converted, if there are any",
    )  # fmt: skip
    if rates.nunique() > 1:
        listed = ", ".join(f"{rate:,} Hz ({n:,})" for rate, n in rates.value_counts().items())
        shares = is_narrow.groupby(clips["split"]).mean()
        differ = float(shares.max() - shares.min()) > 0.2
        yield Finding(
            "warning" if differ else "info", "mixed rates",
            f"sample rates are mixed: {listed}" + "; the splits differ in how much is narrowband" * differ,
            "training and test should sound alike: mix the rates in all splits" * differ,
        )  # fmt: skip

    clipped = clips[clips["clipped_fraction"] > CLIPPED_FRACTION].sort_values("clipped_fraction", ascending=False)
    worst = clips["clipped_fraction"].max()
    yield from _of(
        clipped, "warning" if len(clipped) > MANY * total else "info", "clipping",
        f"of {total:,} cut off at the loudest parts, the worst in {worst:.1%} of its samples",
        "lower the input level of new recordings; leave out what sounds broken",
    )  # fmt: skip
    yield from _of(
        clips[clips["silent_fraction"] > SILENT_FRACTION], "warning", "silence",
        f"silent for more than {SILENT_FRACTION:.0%} of the time",
        "cut them to the speech; a text on silence teaches the model to invent words",
    )  # fmt: skip
    yield from _of(
        clips[clips["loudness_dbfs"] < QUIET_DBFS], "info", "level", f"quieter than {QUIET_DBFS:.0f} dBFS",
        "the model hears each clip scaled by its loudest part, so noise comes up with the speech: record closer",
    )  # fmt: skip

    heard = clips[clips["speech_fraction"].notna()]
    if len(heard) < total:
        what = f"on {len(heard):,} of {total:,} clips, chosen by hash" if len(heard) else NOT_MEASURED
        yield Finding("info", "speech detection", f"where speech is: {what}")
    mute = heard[heard["speech_fraction"] == 0]
    yield from _of(
        mute, "error" if len(mute) > MANY * len(heard) else "warning", "no speech",
        f"of {len(heard):,} without any speech found, but with a transcript",
        "listen to them; remove those without speech, or the model learns to invent words",
    )  # fmt: skip
    longest = heard[["leading_silence_sec", "trailing_silence_sec"]].max(axis=1)
    yield from _of(
        heard[longest > LONG_SILENCE_SEC], "warning", "long silence",
        f"of {len(heard):,} with over {LONG_SILENCE_SEC:.0f} s before or after speech, at most {longest.max():.1f} s",
        "cut the ends: silence costs compute and hides cut transcripts",
    )  # fmt: skip


def _in_languages(clips: pd.DataFrame, task: str) -> Iterator[Finding]:
    languages, total = clips["language"], len(clips)
    sizes = languages.value_counts()
    if len(sizes) > 1:
        listed = ", ".join(f"{language_name(str(code))} {counted(n)}" for code, n in sizes.items())
        yield Finding("info", "languages", listed)
    yield from _of(
        clips[languages.isna()], "info", "language", f"of {total:,} without a mark of their language",
        "add a column language, or set model.language; else they get the language that the model hears in most of them",
    )  # fmt: skip
    trained = set(languages[clips["split"] == "train"])
    unseen = clips[(clips["split"] == "test") & languages.notna() & ~languages.isin(trained)]
    named = ", ".join(map(language_name, unseen["language"].unique()))
    yield from _of(
        unseen, "warning", "languages", f"of the test in languages without training clips: {named}",
        "their rates tell what was forgotten, not what was learned: add such clips to the training, or measure apart",
    )  # fmt: skip
    written = [text_language(language, task) for language in languages]
    unlike = [
        code is not None and not fits_script(text, code) for text, code in zip(clips["text"], written, strict=True)
    ]
    yield from _of(
        clips[unlike], "warning", "script",
        f"of {total:,} with a text that is not in the script of its language",
        "correct the mark or the transcript: the model is told the language, and writes it in its own script",
    )  # fmt: skip


def _of_tokens(clips: pd.DataFrame) -> Iterator[Finding]:
    if clips["tokens"].isna().all():
        yield Finding("info", "tokens", f"length of the transcripts in tokens: {NOT_MEASURED}, no tokenizer was given")
    yield from _of(
        clips[(clips["tokens"] > MAX_LABEL_TOKENS).fillna(False)], "error", "tokens",
        f"with more than {MAX_LABEL_TOKENS} tokens (at most {clips['tokens'].max()}), which the decoder cannot take",
        "cut the recordings at pauses, or remove them",
    )  # fmt: skip


def _in_texts(clips: pd.DataFrame, language: str | None, *, alone: bool) -> Iterator[Finding]:
    """Find what is odd among the texts of one language; the messages name it unless it is alone."""
    total, texts = len(clips), clips["text"]
    within = "" if alone else f" in {language_name(language)}" if language else " without a mark"
    median = float(clips["chars_per_sec"].median())
    odd = clips[clips["chars_per_sec_outlier"]]
    ratio = odd["chars_per_sec"] / median
    farthest = ratio.where(ratio >= 1, 1 / ratio.clip(lower=1e-9)).sort_values(ascending=False).index
    yield from _of(
        odd.loc[farthest], "warning", "pace",
        f"of {total:,}{within} far from the median of {median:.1f} characters per second: "
        f"{int((ratio >= 1).sum())} too fast, {int((ratio < 1).sum())} too slow",
        "listen: too fast is another clip's transcript or cut audio, too slow is missing words or long silence",
    )  # fmt: skip

    in_capitals = texts.map(lambda t: resolve_case([t], "auto") != "keep")
    punctuated = texts.map(lambda t: _PUNCTUATION.search(t) is not None)
    for topic, what, has in (("capitals", "in capitals", in_capitals), ("punctuation", "with punctuation", punctuated)):
        share = float(has.mean())
        if MANY < share < 1 - MANY:
            fewer = clips[has if share < 0.5 else ~has]
            yield Finding(
                "warning", topic, f"styles are mixed: {share:.0%} of the transcripts{within} are {what}",
                "write all in one style (data.label_case: sentence or lower): the model cannot guess which is wanted",
                tuple(fewer["id"].head(MAX_EXAMPLES)),
            )  # fmt: skip
    if in_capitals.mean() >= 1 - MANY:
        yield Finding(
            "warning", "capitals", f"the transcripts{within} are in capitals, which the stock model does not write",
            "set data.label_case to auto or sentence: fewer updates are needed",
        )  # fmt: skip
    if punctuated.mean() <= MANY and language not in _UNPUNCTUATED:
        yield Finding(
            "info", "punctuation", f"the transcripts{within} have no punctuation: the model will stop writing it",
            "set data.label_case to sentence for a full stop at least, if punctuation is wanted",
        )  # fmt: skip
    yield from _of(
        clips[texts.map(lambda t: any(map(str.isdigit, t)))], "info", "digits", f"of {total:,}{within} with digits",
        "fine where every number is written so; mixed with number words, rates suffer",
    )  # fmt: skip


def _between_splits(clips: pd.DataFrame) -> Iterator[Finding]:
    keys = text_keys(clips)
    copies = clips[clips["duplicate_audio_of"].notna()]
    originals = clips.set_index("id").loc[copies["duplicate_audio_of"].tolist()]
    across = copies["split"].to_numpy() != originals["split"].to_numpy()
    unlike = keys[copies.index].to_numpy() != text_keys(originals).to_numpy()
    yield from _of(
        copies[across], "error", "same audio across splits",
        "also in another split: the test repeats what was trained on", "remove them from training, or from the test",
    )  # fmt: skip
    yield from _of(
        copies[unlike], "error", "same audio, other text",
        "with the audio of another clip but not its transcript: one of them is wrong", "listen, and keep the right one",
    )  # fmt: skip
    yield from _of(copies[~across], "warning", "same audio", "more than once in a split", "remove the copies")

    repeated, test = clips[clips["duplicate_text_count"] > 1], clips["split"] == "test"
    shared = clips[test & keys.isin(set(keys[clips["split"] == "train"]))]
    flattering = len(shared) > FLATTERING_SHARE * int(test.sum())
    if len(repeated):
        yield Finding(
            "warning" if flattering else "info", "same texts",
            f"{counted(len(repeated))} with a text that occurs more than once; {len(shared):,} of "
            f"{int(test.sum()):,} test texts are also in training",
            "the rates speak of known sentences: test on texts that are not in training" * flattering,
            tuple((shared if len(shared) else repeated)["id"].head(MAX_EXAMPLES)),
        )  # fmt: skip

    named = clips[clips["speaker"].notna()]
    yield from _of(
        clips[clips["speaker"].isna()], "warning", "unknown speakers",
        f"of {len(clips):,} without a speaker: one voice may be in training and test",
        "add a speaker column; without it rates may flatter and intervals are over clips",
    )  # fmt: skip
    common = named[named.groupby("speaker")["split"].transform("nunique") > 1]
    n = common["speaker"].nunique()
    yield from _of(
        common, "warning", "shared speakers", f"of {counted(n, 'speaker')} that are in more than one split",
        "right for a model of these voices only; else split by speaker",
    )  # fmt: skip
    n = named.loc[named["split"] == "test", "speaker"].nunique()
    if 0 < n < FEW_TEST_SPEAKERS:
        yield Finding(
            "warning", "few test speakers", f"the test has {counted(n, 'speaker')}: their intervals are wide",
            f"take at least {FEW_TEST_SPEAKERS} speakers for the test",
        )  # fmt: skip
