"""What every section of the configuration is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

MAX_AUDIO_SEC = 30.0  # the length of Whisper's position table


class Section(BaseModel):
    """A part of the configuration: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
