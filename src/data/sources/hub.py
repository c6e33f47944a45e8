"""Data sets of the Hugging Face Hub, streamed: N clips cost N clips, whatever the size of the corpus.

`datasets` finds the files and reads the rows; recordings stay encoded, since its own decoder needs torchcodec and
FFmpeg. A folder that is laid out as on the Hub works like a data set of the Hub.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from src.data.sources.manifest import pick_column
from src.data.utterance import SPLIT_NAMES, Utterance, utterance_from_row, with_unique_ids
from src.utils.config import HubConfig
from src.utils.errors import DataError, SourceUnavailableError, first_line
from src.utils.files import expand_path
from src.utils.languages import code_of_language, language_name, parse_language

_T = TypeVar("_T")

PARQUET_REVISION = "refs/convert/parquet"  # the Hub's own conversion of data sets that are scripts
_OFFLINE_CHOICES = (
    "Offline there are data.source: sample (bundled), folder (your recordings), parquet (files that you downloaded) "
    "and common_voice (an archive of the corpus)"
)
# OSError has ConnectionError, FileNotFoundError (datasets' name for an unknown or unreachable data set) and time-outs
UNREACHABLE = (OSError, httpx.HTTPError, HfHubHTTPError)
ANSWER_SEC = 5.0  # for the Hub's first answer; its client itself waits forever
MIN_SPEAKERS = 10  # of a streamed set: an interval over fewer shows large differences only
_FLEURS = (  # subsets in languages of Whisper
    "af_za am_et ar_eg as_in az_az be_by bg_bg bn_in bs_ba ca_es cmn_hans_cn cs_cz cy_gb da_dk de_de el_gr en_us "
    "es_419 et_ee fa_ir fi_fi fil_ph fr_fr gl_es gu_in ha_ng he_il hi_in hr_hr hu_hu hy_am id_id is_is it_it "
    "ja_jp jv_id ka_ge kk_kz km_kh kn_in ko_kr lb_lu ln_cd lo_la lt_lt lv_lv mi_nz mk_mk ml_in mn_mn mr_in ms_my "
    "mt_mt my_mm nb_no ne_np nl_nl oc_fr pa_in pl_pl ps_af pt_br ro_ro ru_ru sd_in sk_sk sl_si sn_zw so_so sr_rs "
    "sv_se sw_ke ta_in te_in tg_tj th_th tr_tr uk_ua ur_pk uz_uz vi_vn yo_ng yue_hant_hk"
)


@dataclass(frozen=True)
class HubCorpus:
    """Where a corpus lies on the Hub; `data.hub` has the same names, and what it sets goes first."""

    id: str
    config: str | None = None  # subset
    train_split: str | None = None
    validation_split: str | None = None  # where there is none, it is cut from train
    test_split: str | None = None
    language: str | None = None  # of rows that do not say theirs; None takes it from the subset's name (en-US)
    revision: str | None = None  # a commit, or `PARQUET_REVISION` where main holds a script, which datasets 4 refuses
    audio_column: str | None = None  # found by type and name
    text_column: str | None = None  # found by name


CORPORA: dict[str, HubCorpus] = {  # `data.hub.revision` takes another commit
    "minds14": HubCorpus("PolyAI/minds14", "en-US", "train", revision="40ce77cb32a384e4d50a568e1ec39ac804019d33"),
    "librispeech": HubCorpus(
        "openslr/librispeech_asr", "clean", "train.100", "validation", "test", "en",
        revision="71cacbfb7e2354c4226d01e70d77d5fca3d04ba1",
    ),
    "fleurs": HubCorpus(
        "google/fleurs", None, "train", "validation", "test", revision=PARQUET_REVISION, text_column="raw_transcription"
    ),
    "speechocean762": HubCorpus(
        "mispeech/speechocean762", None, "train", None, "test", "en",
        revision="f95618ea1353303f34cf186b9c310fa2c1eb02c8",
    ),
}  # fmt: skip


def stream_hub(source: str, options: HubConfig) -> dict[str, Iterator[Utterance]]:
    """Open the splits that a named corpus has, or with "hub" any data set; rows arrive as they are asked for.

    Raises `SourceUnavailableError` without a network or such a data set, also while iterating.
    """
    base = CORPORA.get(source) or HubCorpus(str(options.id))
    if options.id is not None and not Path(options.id).is_dir():  # another data set: its main branch
        base = replace(base, revision=None)
    spec = replace(base, **{name: value for name, value in options.model_dump().items() if value})
    streams = _guarded(spec.id, lambda: _open(spec))
    # our names of the splits, and the data set's
    first = {SPLIT_NAMES[name.lower()]: name for name in reversed(list(streams)) if name.lower() in SPLIT_NAMES}
    asked = {"train": spec.train_split, "validation": spec.validation_split, "test": spec.test_split}
    names = {name: split or first.get(name) for name, split in asked.items()}
    missing = [split for split in names.values() if split and split not in streams]
    if missing or not names["train"]:
        what = f"no split {missing[0] if missing else 'train'!r} among {', '.join(streams)}"
        raise DataError(f"{spec.id}: {what}; set data.hub.train_split, validation_split and test_split")
    return {name: with_unique_ids(_rows(streams[split], name, spec)) for name, split in names.items() if split}


def _open(spec: HubCorpus) -> Mapping[str, Any]:
    """Return the streamed data set of each split."""
    from datasets import load_dataset  # seconds to import, and needed for the Hub alone

    folder = expand_path(spec.id)
    is_folder = folder.is_dir()
    without_card = spec.config and (folder / spec.config).is_dir() and not (folder / "README.md").is_file()
    opened: Mapping[str, Any]
    if spec.revision == PARQUET_REVISION or without_card:
        # the Hub's conversion holds <subset>/<split>/0000.parquet and no card that would say so
        root = str(folder) if is_folder else f"hf://datasets/{spec.id}@{PARQUET_REVISION}"
        asked = (spec.train_split or "train", spec.validation_split, spec.test_split)
        splits = {name.replace(".", "_"): name for name in asked if name}
        files = {key: f"{root}/{spec.config or 'default'}/{name}/*.parquet" for key, name in splits.items()}
        opened = load_dataset("parquet", data_files=files, streaming=True)  # refuses dots in names of splits
        return {name: opened[key] for key, name in splits.items()}
    revision = None if is_folder else spec.revision
    opened = load_dataset(str(folder) if is_folder else spec.id, spec.config, revision=revision, streaming=True)
    return opened


def _rows(stream: Any, split: str, spec: HubCorpus) -> Iterator[Utterance]:
    from datasets import Audio, ClassLabel

    features: Mapping[str, Any] | None = stream.features
    if features is None:
        raise DataError(f"{spec.id}: it does not say its columns; download it and use data.source: folder or parquet")
    typed = [name for name, feature in features.items() if isinstance(feature, Audio)]
    audio_column = spec.audio_column or (typed[0] if len(typed) == 1 else "")
    audio_column = audio_column or pick_column(typed or list(features), "audio", spec.id)
    text_column = spec.text_column or pick_column(list(features), "text", spec.id)
    for column in (audio_column, text_column):
        if column not in features:
            raise DataError(f"{spec.id}: no column {column!r}; it has {', '.join(features)}")
    labels = {name: feature for name, feature in features.items() if isinstance(feature, ClassLabel)}
    root = expand_path(spec.id)  # a local folder laid out as on the Hub may name its files
    language = spec.language or code_of_language(spec.config or "")  # of a subset's name such as en-US or hindi
    iterator = iter(stream.cast_column(audio_column, Audio(decode=False)))
    for index in itertools.count():
        if (row := _guarded(spec.id, lambda: next(iterator, None))) is None:
            return
        cell = row.pop(audio_column) or {}
        data, path = cell.get("bytes"), cell.get("path")
        if not (isinstance(data, bytes) or path):
            raise DataError(f"{spec.id}: a row has no recording; set data.hub.audio_column to the column that has")
        for name, feature in labels.items():
            row[name] = feature.int2str(row[name]) if isinstance(row.get(name), int) and row[name] >= 0 else None
        stem = PurePosixPath(path or row.get("path") or row.get("file") or "").stem
        audio: Path | bytes = data if isinstance(data, bytes) else Path(os.path.normpath(str(path)))
        if isinstance(audio, Path) and not (root.is_dir() and audio.is_relative_to(root.absolute())):
            raise DataError(f"{spec.id}: a row names {path}, which is no file of the data set; embed the recordings")
        yield utterance_from_row(
            {**row, "split": split}, audio, text_column=text_column, language=language,
            fallback_id=stem or f"{split}-{index:06d}",
        )  # fmt: skip


def _guarded(data_set: str, action: Callable[[], _T]) -> _T:
    """Do something that needs the network; say what went wrong and what can be done."""
    try:
        return action()
    except UNREACHABLE as err:
        raise SourceUnavailableError(
            f"data set {data_set!r} cannot be reached ({type(err).__name__}: {first_line(err)}). Check the "
            f"name and the network; for a gated one accept its terms and set HF_TOKEN. {_OFFLINE_CHOICES}"
        ) from err
    except RuntimeError as err:
        if "scripts are no longer supported" not in str(err):
            raise
        fix = f"set data.hub.revision: {PARQUET_REVISION}"
        raise DataError(f"data set {data_set!r} is a script, which datasets no longer runs; {fix}") from err
    except ValueError as err:  # unknown subset: the message lists those that exist; or a file that is not Parquet
        raise DataError(f"data set {data_set!r}: {err}; check data.hub.config, or fetch damaged files again") from err


# general speech: LibriSpeech for English, FLEURS (Conneau et al. 2022, arXiv:2205.12446) for others


@cache
def fleurs_subsets() -> dict[str, str]:
    """Return the subset of FLEURS in each language of Whisper that it has."""
    return {parse_language(subset.split("_")[0]): subset for subset in _FLEURS.split()}


def stream_general(language: str, split: str, *, task: str) -> tuple[str, Iterator[Utterance]]:
    """Open one split of the corpus of a language; return its name, and its clips in that language.

    Raises:
        SourceUnavailableError: no network, no corpus in the language, or one without translations; also on the way.
    """
    source, name, options = "librispeech", f"LibriSpeech {split}-clean", HubConfig()
    if language != "en":
        if task == "translate":
            raise SourceUnavailableError("FLEURS has transcripts, not translations")
        if language not in fleurs_subsets():
            raise SourceUnavailableError(f"FLEURS has no {language_name(language)}")
        options = HubConfig(config=fleurs_subsets()[language])
        source, name = "fleurs", f"FLEURS {options.config}"
    corpus = CORPORA[source].id
    try:
        if not Path(corpus).is_dir():  # without a network `datasets` itself asks for half a minute
            HfApi().dataset_info(corpus, timeout=ANSWER_SEC)
    except UNREACHABLE as err:
        raise SourceUnavailableError(f"{corpus}: {type(err).__name__}: {first_line(err)}") from err
    return name, (replace(u, language=language) for u in stream_hub(source, options)[split])


def spread(stream: Iterator[Utterance], *, max_per_speaker: int) -> Iterator[Utterance]:
    """Yield at most so many clips of each speaker; all without one.

    LibriSpeech is sorted by speaker, so that its beginning would be two voices. The rows in between are downloaded.
    """
    taken: Counter[str | None] = Counter()
    for utterance in stream:
        if utterance.speaker is None or taken[utterance.speaker] < max_per_speaker:
            taken[utterance.speaker] += 1
            yield utterance
