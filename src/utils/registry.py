"""Which model is the best so far, and what made it: run, data version, checkpoint, code.

One JSON file holds all models, so that it can be read by people and kept in git. Every registration reads it and writes
it whole under a lock: concurrent writers wait for each other and lose nothing, readers need no lock. That suits
thousands of models, not millions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.utils.errors import ModelError, did_you_mean
from src.utils.json_store import locked, read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

REGISTRY_FILE = "registry.json"  # in a folder
FORMAT = 1  # raise it when the fields change


@dataclass(frozen=True)
class RegisteredModel:
    """What was known of a model when it was registered.

    Attributes:
        version: 1, 2, ... of this model_id.
        metrics: None where the value was not finite.
        git_revision: of the code; None outside a checkout.
        created: UTC, ISO 8601.
        run, checkpoint: paths or names, as given.
        data_version: as `DataVersionManager` knows it.
        base_model: what was fine-tuned.
    """

    model_id: str
    version: int
    created: str
    metrics: Mapping[str, float | None]
    git_revision: str | None
    run: str | None = None
    data_version: str | None = None
    checkpoint: str | None = None
    base_model: str | None = None
    notes: str = ""


class ModelRegistry:
    """Register models, and find the best.

    Args:
        path: a `.json` file, or a folder, in which it is `registry.json`; made when the first model is registered.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = Path(path) if Path(path).suffix == ".json" else Path(path) / REGISTRY_FILE

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
        """Add a model; it is on the disk when this returns. A known model_id gets a new version, the older ones stay.

        Args:
            metrics: numbers by name. One that is not finite is stored as missing, with a warning, and never wins.
        Raises:
            ModelError: no model_id, or a metric is no number.
            DataError: the file is damaged (it stays as it is), or cannot be written.
        """
        if not model_id.strip():
            raise ModelError("register_model: model_id is empty; give the model a name")
        checked = _check_metrics(metrics, model_id)
        with locked(self.file):
            models = self.list_models()
            model = RegisteredModel(
                model_id,
                version=1 + max((m.version for m in models if m.model_id == model_id), default=0),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                metrics=checked,
                git_revision=git_revision,
                run=None if run is None else str(run),
                data_version=data_version,
                checkpoint=None if checkpoint is None else str(checkpoint),
                base_model=base_model,
                notes=notes,
            )
            write_json(self.file, {"format": FORMAT, "models": [asdict(m) for m in [*models, model]]}, durable=True)
        logger.info("registered %s version %d in %s", model_id, model.version, self.file)
        return model

    def list_models(self) -> list[RegisteredModel]:
        """Return all versions of all models in the order of registration; none without a file.

        Raises: DataError: the file is damaged or cannot be read.
        """
        if not self.file.exists():
            return []
        fix = "restore an older copy, or move it away to begin anew; it was not changed"
        return read_json(self.file, _to_models, what="a model registry", fix=fix)

    def get(self, model_id: str, version: int | None = None) -> RegisteredModel:
        """Return one version of a model, the newest by default.

        Raises: ModelError: no such model or version. DataError: as `list_models`.
        """
        models = self.list_models()
        versions = {m.version: m for m in models if m.model_id == model_id}
        if not versions:
            hint = did_you_mean(model_id, sorted({m.model_id for m in models}))
            raise ModelError(f"{model_id}: no such model in {self.file}{hint}; list_models() shows all")
        chosen = max(versions) if version is None else version
        if chosen not in versions:
            known = ", ".join(map(str, sorted(versions)))
            raise ModelError(f"{model_id}: no version {chosen} in {self.file}; there are {known}")
        return versions[chosen]

    def best(self, metric: str = "wer", *, lower_is_better: bool = True) -> RegisteredModel:
        """Return the best version of all models; of equals the one that was registered first.

        Raises: ModelError: no model has the metric. DataError: as `list_models`.
        """
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
        """Return a table: one row a version in the order of registration, one column a metric after the other fields.

        A metric named like a field has `metrics.` before its name; missing values are nan.

        Raises: DataError: as `list_models`.
        """
        import pandas as pd  # here, so that `import src.utils` and registering stay light

        columns = [f.name for f in fields(RegisteredModel) if f.name != "metrics"]
        models = self.list_models()
        frame = pd.DataFrame([[getattr(m, name) for name in columns] for m in models], columns=columns)
        for metric in dict.fromkeys(name for m in models for name in m.metrics):
            values = [m.metrics.get(metric) for m in models]
            frame[f"metrics.{metric}" if metric in columns else metric] = pd.Series(values, dtype="float64")
        return frame


def _check_metrics(metrics: Mapping[str, float | None], model_id: str) -> dict[str, float | None]:
    checked: dict[str, float | None] = {}
    for name, value in metrics.items():
        try:
            if not isinstance(name, str) or isinstance(value, str | bool):
                raise TypeError(f"a {type(value).__name__}")
            number = None if value is None else float(value)
        except (TypeError, ValueError) as err:
            raise ModelError(f"{model_id}: metric {name!r} is {value!r}, expected a name and one number") from err
        if number is None or not math.isfinite(number):
            logger.warning("%s: metric %s is %s; stored as missing", model_id, name, value)
            number = None
        checked[name] = number
    return checked


def _to_models(content: Any) -> list[RegisteredModel]:
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']}, this library reads {FORMAT}")
    models = [RegisteredModel(**row) for row in content["models"]]
    for model in models:
        values = [value for value in model.metrics.values() if value is not None]
        if not isinstance(model.version, int) or not all(isinstance(v, float) and math.isfinite(v) for v in values):
            raise TypeError(f"version or metrics of {model.model_id} are no numbers")
    return models
