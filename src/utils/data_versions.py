"""Which data made a result: one small file a version, with checksums of what was in it.

<path>/<data set>--<version>--<hash of both names>.json, written whole. Each clip's digest covers its audio as encoded
and its text; the version's checksum covers all of them in any order, so that the same set is the same version on every
machine, and one changed transcript is not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from src.utils.errors import DataError, did_you_mean
from src.utils.json_store import read_json, write_json
from src.utils.versioning import get_git_revision

logger = logging.getLogger(__name__)

_DIGEST_CHARS = 16  # hexadecimal, kept of each clip: 64 bits tell two clips of one id apart
_LISTED_IDS = 20  # of each kind, in an error


class ReadsBytes(Protocol):
    """An encoded recording that is read when it is needed."""

    def read(self) -> bytes:
        """Return the bytes of the encoded file."""
        ...


class Recorded(Protocol):
    """One recording with its transcript, as `src.data.Utterance` is."""

    @property
    def id(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def audio(self) -> Path | bytes | ReadsBytes: ...


@dataclass(frozen=True)
class DatasetVersion:
    """What was known of a data set when it was logged.

    Attributes:
        metadata: as given; must be possible in JSON.
        clips: number of utterances.
        checksum: SHA-256 over all audio and texts in any order; None if logged without utterances.
        git_revision: of this code; None outside a checkout.
        time: UTC, ISO 8601.
        digests: by utterance id, sorted; an id that occurs twice has two.
    """

    dataset_name: str
    version: str
    metadata: Mapping[str, Any]
    clips: int
    checksum: str | None
    git_revision: str | None
    time: str
    digests: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class DatasetChanges:
    """Sorted ids that are there now and were not, that were and are not, and whose audio or text differs."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]

    def __bool__(self) -> bool:
        """True if anything differs."""
        return bool(self.added or self.removed or self.changed)


class DataVersionManager:
    """Log versions of data sets, and tell later whether the data are still those.

    Args:
        path: folder of the files; made when the first version is logged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def log_dataset_version(
        self, *, dataset_name: str, version: str, metadata: Mapping[str, Any], utterances: Iterable[Recorded] = ()
    ) -> DatasetVersion:
        """Write down a version; reads all of its audio.

        Logging the same content again renews metadata, time and revision.

        Raises: DataError: the version is there with other content, the metadata are no JSON, a recording cannot be
            read, or the folder not be written.
        """
        checksum, digests = _checksums(utterances)
        older = self._find(dataset_name, version)
        if older is not None and older.checksum != checksum:
            raise DataError(
                f"{dataset_name} {version} was logged on {older.time} with other content ({older.clips} clips, now "
                f"{sum(map(len, digests.values()))}); give the new data a new version, or see what changed: compare()"
            )
        record = DatasetVersion(
            dataset_name,
            version,
            _as_json(metadata, f"{dataset_name} {version}"),
            clips=sum(map(len, digests.values())),
            checksum=checksum,
            git_revision=get_git_revision(),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            digests=digests,
        )
        target = self._file(dataset_name, version)
        write_json(target, asdict(record))
        logger.info("%s %s: %d clips, checksum %s, in %s", dataset_name, version, record.clips, checksum, target)
        return record

    def versions(self, dataset_name: str | None = None) -> list[DatasetVersion]:
        """Return the logged versions, of one data set or all, from old to new.

        Raises: DataError: a file is damaged.
        """
        records = [_load(file) for file in sorted(self.path.glob("*.json"))]
        chosen = [record for record in records if dataset_name in (None, record.dataset_name)]
        return sorted(chosen, key=lambda record: (record.time, record.dataset_name, record.version))

    def compare(self, dataset_name: str, version: str, utterances: Iterable[Recorded]) -> DatasetChanges:
        """Tell what differs between the utterances and a logged version; reads all audio.

        Raises: DataError: no such version, or one that was logged without its utterances.
        """
        record = self._find(dataset_name, version)
        if record is None:
            known = [f"{r.dataset_name} {r.version}" for r in self.versions()]
            hint = did_you_mean(f"{dataset_name} {version}", known)
            raise DataError(f"{dataset_name} {version}: no such version in {self.path}{hint}")
        if record.checksum is None:
            raise DataError(f"{dataset_name} {version} was logged without its utterances: there is nothing to compare")
        now = _checksums(utterances)[1]
        return DatasetChanges(
            added=tuple(sorted(now.keys() - record.digests.keys())),
            removed=tuple(sorted(record.digests.keys() - now.keys())),
            changed=tuple(sorted(i for i in now.keys() & record.digests.keys() if now[i] != record.digests[i])),
        )

    def verify(self, dataset_name: str, version: str, utterances: Iterable[Recorded]) -> None:
        """Make sure that the utterances are those of a logged version; reads all audio.

        Raises: DataError: they are not; lists the ids that were added, removed and changed. And as `compare`.
        """
        changes = self.compare(dataset_name, version, utterances)
        if changes:
            listed = "".join(f"\n  - {name}: {_shorten(ids)}" for name, ids in asdict(changes).items() if ids)
            raise DataError(f"the data are not {dataset_name} {version} any more:{listed}")

    def _find(self, dataset_name: str, version: str) -> DatasetVersion | None:
        file = self._file(dataset_name, version)
        return _load(file) if file.exists() else None

    def _file(self, dataset_name: str, version: str) -> Path:
        # The hash keeps apart what the safe names do not: "a/b" and "a_b", and "A" and "a" where case is ignored.
        exact = hashlib.sha256(json.dumps([dataset_name, version]).encode()).hexdigest()[:8]
        return self.path / f"{_safe(dataset_name)}--{_safe(version)}--{exact}.json"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:60] or "_"


def _shorten(ids: tuple[str, ...]) -> str:
    more = f" and {len(ids) - _LISTED_IDS} more" if len(ids) > _LISTED_IDS else ""
    return ", ".join(ids[:_LISTED_IDS]) + more


def _as_json(metadata: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the metadata as they will be read again."""
    try:
        loaded: dict[str, Any] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as err:
        raise DataError(f"{what}: the metadata cannot be written as JSON: {err}") from err
    return loaded


def _checksums(utterances: Iterable[Recorded]) -> tuple[str | None, dict[str, tuple[str, ...]]]:
    """Return one checksum over all clips (None without any) and the short digests by id.

    A clip's digest is SHA-256(SHA-256(audio) + SHA-256(text)); their sorted list is a multiset's: order is nothing,
    duplicates count.
    """
    clips: Counter[str] = Counter()
    by_id: defaultdict[str, list[str]] = defaultdict(list)
    for utterance in utterances:
        text = hashlib.sha256(utterance.text.encode("utf-8")).digest()
        digest = hashlib.sha256(_audio_sha256(utterance) + text).hexdigest()
        clips[digest] += 1
        by_id[utterance.id].append(digest[:_DIGEST_CHARS])
    checksum = hashlib.sha256("".join(sorted(clips.elements())).encode()).hexdigest() if clips else None
    return checksum, {name: tuple(sorted(by_id[name])) for name in sorted(by_id)}


def _audio_sha256(utterance: Recorded) -> bytes:
    audio = utterance.audio
    try:
        if isinstance(audio, Path):
            with audio.open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        return hashlib.sha256(audio if isinstance(audio, bytes) else audio.read()).digest()
    except OSError as err:
        where = str(audio) if isinstance(audio, Path) else "embedded audio"
        raise DataError(f"utterance {utterance.id} ({where}): cannot be read: {err.strerror}") from err


def _load(file: Path) -> DatasetVersion:
    return read_json(file, _to_version, what="a data set version", fix="remove it, or fetch it again")


def _to_version(row: Any) -> DatasetVersion:
    digests = {name: tuple(digests) for name, digests in row["digests"].items()}
    return DatasetVersion(**{**row, "digests": digests})
