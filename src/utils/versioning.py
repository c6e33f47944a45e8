"""Provenance: git revision of the running code, checksums of data sets, and metrics of every registered model.

Data sets and models are kept in JSON files that people can read and git can store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import FiniteFloat, TypeAdapter

from src.utils.errors import DataError, ModelError, did_you_mean
from src.utils.files import PROJECT_ROOT, locked, read_json, sha256_of, write_json

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

_DIGEST_CHARS = 16  # hexadecimal, stored per clip: 64 bits distinguish two clips of one id
_LISTED_IDS = 20  # of each kind, in an error


def get_git_revision(folder: Path = PROJECT_ROOT) -> str | None:
    """Return the commit of a checkout, with `+changes` if tracked files differ; None without git or a commit.

    None also for an installed package, which may lie within somebody else's checkout.
    """
    if not (folder / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        return f"{revision}+changes" if git("status", "--porcelain", "--untracked-files=no") else revision
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


@dataclass(frozen=True)
class DatasetVersion:
    """A logged version of a data set."""

    dataset_name: str
    version: str
    metadata: Mapping[str, Any]
    clips: int
    checksum: str | None  # SHA-256 over all audio and texts in any order; None if logged without utterances
    git_revision: str | None  # of this code; None outside a checkout
    time: str  # UTC, ISO 8601
    digests: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)  # by id; one that is twice has two


class DataVersionManager:
    """Log versions of data sets; logging the same version again tells whether the data are still the same.

    Each version is a file of its own in a folder, which is made with the first. A clip's digest covers its encoded
    audio and its text; the version's checksum covers all digests in any order: the same set has the same checksum on
    every machine, and one changed transcript changes it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def log_dataset_version(
        self, *, dataset_name: str, version: str, metadata: Mapping[str, Any], utterances: Iterable[Any] = ()
    ) -> DatasetVersion:
        """Log a version of `Utterance`s; reads all of their audio.

        Logging the same content again updates metadata, time and revision.

        Raises:
            DataError: if the version exists with other content (the ids are listed), the metadata are not JSON, a
                recording cannot be read, or the folder cannot be written.
        """
        checksum, digests = _checksums(utterances)
        clips = sum(map(len, digests.values()))
        target = self._file(dataset_name, version)
        if target.exists() and (older := _load_version(target)).checksum != checksum:
            was, now = older.digests, digests
            changes = {
                "added": sorted(now.keys() - was.keys()),
                "removed": sorted(was.keys() - now.keys()),
                "changed": sorted(name for name in now.keys() & was.keys() if now[name] != was[name]),
            }
            listed = ""
            for kind, ids in changes.items():
                more = f" and {len(ids) - _LISTED_IDS} more" if len(ids) > _LISTED_IDS else ""
                listed += f"\n  - {kind}: {', '.join(ids[:_LISTED_IDS])}{more}" if ids else ""
            raise DataError(
                f"{dataset_name} {version} was logged on {older.time} with other content ({older.clips} clips, now "
                f"{clips}); restore the data, or give them a new version:{listed}"
            )
        try:
            metadata = json.loads(json.dumps(dict(metadata), allow_nan=False))  # as it will be read
        except (TypeError, ValueError) as err:
            raise DataError(f"{dataset_name} {version}: the metadata cannot be written as JSON: {err}") from err
        record = DatasetVersion(dataset_name, version, metadata, clips, checksum, get_git_revision(), _now(), digests)
        write_json(target, asdict(record))
        logger.info("%s %s: %d clips, checksum %s, in %s", dataset_name, version, clips, checksum, target)
        return record

    def versions(self) -> list[DatasetVersion]:
        """Return the logged versions from old to new; a damaged file is a `DataError`."""
        records = [_load_version(file) for file in self.path.glob("*.json")]
        return sorted(records, key=lambda record: (record.time, record.dataset_name, record.version))

    def _file(self, dataset_name: str, version: str) -> Path:
        # The hash distinguishes what the safe names do not: "a/b" and "a_b", or "A" and "a" where case is ignored.
        exact = hashlib.sha256(json.dumps([dataset_name, version]).encode()).hexdigest()[:8]
        safe = [re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:60] or "_" for name in (dataset_name, version)]
        return self.path / f"{safe[0]}--{safe[1]}--{exact}.json"


def _load_version(file: Path) -> DatasetVersion:
    parse = TypeAdapter(DatasetVersion).validate_python
    return read_json(file, parse, what="a data set version", fix="remove it, or fetch it again")


def _checksums(utterances: Iterable[Any]) -> tuple[str | None, dict[str, tuple[str, ...]]]:
    """Return one checksum over all clips (None without any) and the short digests by id.

    A clip's digest is SHA-256(SHA-256(audio) + SHA-256(text)). The checksum is over their sorted list, so the order
    does not matter and duplicates count.
    """
    clips: list[str] = []
    by_id: defaultdict[str, list[str]] = defaultdict(list)
    for utterance in utterances:
        audio = utterance.audio
        try:
            if isinstance(audio, Path):
                sound = bytes.fromhex(sha256_of(audio))
            else:
                sound = hashlib.sha256(audio if isinstance(audio, bytes) else audio.read()).digest()
        except OSError as err:
            where = str(audio) if isinstance(audio, Path) else "embedded audio"
            raise DataError(f"utterance {utterance.id} ({where}): cannot be read: {err.strerror}") from err
        clips.append(hashlib.sha256(sound + hashlib.sha256(utterance.text.encode()).digest()).hexdigest())
        by_id[utterance.id].append(clips[-1][:_DIGEST_CHARS])
    checksum = hashlib.sha256("".join(sorted(clips)).encode()).hexdigest() if clips else None
    return checksum, {name: tuple(sorted(by_id[name])) for name in sorted(by_id)}


@dataclass(frozen=True)
class RegisteredModel:
    """A model as it was registered."""

    model_id: str
    version: int  # 1, 2, ... of this model_id
    created: str  # UTC, ISO 8601
    metrics: Mapping[str, FiniteFloat | None]  # None if the value was not finite
    git_revision: str | None
    run: str | None = None  # path or name
    data_version: str | None = None  # as `DataVersionManager` knows it
    checkpoint: str | None = None  # path or name
    base_model: str | None = None  # what was fine-tuned
    notes: str = ""


@dataclass(frozen=True)
class _Registry:
    format: Literal[1]  # raise it when the fields change
    models: list[RegisteredModel]


class ModelRegistry:
    """Register models, and find the best.

    One JSON file contains all models. Every registration reads it and replaces it under a lock: concurrent writers
    wait for each other and lose nothing, and readers need no lock.

    Args:
        path: a `.json` file, or a folder for `registry.json`; made when the first model is registered.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = Path(path) if Path(path).suffix == ".json" else Path(path, "registry.json")

    def register_model(
        self,
        *,
        model_id: str,
        metrics: Mapping[str, float | None],
        git_revision: str | None,
        run: str | Path | None = None,
        data_version: str | None = None,
        checkpoint: str | Path | None = None,
        base_model: str | None = None,
        notes: str = "",
    ) -> RegisteredModel:
        """Add a model; it is on the disk when this returns. A known model_id gets a new version, older ones stay.

        A metric that is not finite is stored as missing, with a warning, and never wins.

        Raises:
            ModelError: if model_id is empty or a metric is not a number.
            DataError: if the file is damaged (it stays as it is) or cannot be written.
        """
        if not model_id.strip():
            raise ModelError("register_model: model_id is empty; give the model a name")
        checked: dict[str, float | None] = {}
        for name, value in metrics.items():
            try:
                number = math.nan if value is None else float(value)
            except (TypeError, ValueError) as err:
                raise ModelError(f"{model_id}: metric {name} is {value!r}; expected one number") from err
            checked[name] = number if math.isfinite(number) else None
            if checked[name] is None:
                logger.warning("%s: metric %s is %s; stored as missing", model_id, name, value)
        try:
            with locked(Path(f"{self.file}.lock")):
                models = self.list_models()
                version = 1 + max((m.version for m in models if m.model_id == model_id), default=0)
                model = RegisteredModel(
                    model_id, version, _now(), checked, git_revision, None if run is None else str(run), data_version,
                    None if checkpoint is None else str(checkpoint), base_model, notes,
                )  # fmt: skip
                write_json(self.file, asdict(_Registry(1, [*models, model])), durable=True)
        except OSError as err:
            raise DataError(f"{self.file}: cannot be locked for writing: {err}; choose a local disk") from err
        logger.info("registered %s version %d in %s", model_id, model.version, self.file)
        return model

    def list_models(self) -> list[RegisteredModel]:
        """Return all versions of all models in the order of registration; a damaged file is a `DataError`."""
        if not self.file.exists():
            return []
        parse = TypeAdapter(_Registry).validate_python
        fix = "restore an older copy, or move it away to start a new one; it was not changed"
        return read_json(self.file, parse, what="a model registry", fix=fix).models

    def best(self, metric: str = "wer", *, lower_is_better: bool = True) -> RegisteredModel:
        """Return the best version of all models, of equals the first; raises `ModelError` if none has the metric."""
        models = self.list_models()
        rated = [(value, m) for m in models if (value := m.metrics.get(metric)) is not None]
        if not rated:
            known = sorted({name for m in models for name, value in m.metrics.items() if value is not None})
            raise ModelError(
                f"{self.file}: none of {len(models)} models has the metric {metric!r}{did_you_mean(metric, known)}; "
                f"known: {', '.join(known) or 'none'}"
            )
        sign = 1 if lower_is_better else -1
        return min(rated, key=lambda pair: sign * pair[0])[1]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per version in the order of registration, with one column per field and metric.

        A metric with the name of a field becomes `metrics.<name>`; missing values are nan.
        """
        import pandas as pd  # `import src.utils` and registering stay light

        columns = [f.name for f in fields(RegisteredModel) if f.name != "metrics"]
        models = self.list_models()
        frame = pd.DataFrame([[getattr(m, name) for name in columns] for m in models], columns=columns)
        for metric in dict.fromkeys(name for m in models for name in m.metrics):
            values = [m.metrics.get(metric) for m in models]
            frame[f"metrics.{metric}" if metric in columns else metric] = pd.Series(values, dtype="float64")
        return frame


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
