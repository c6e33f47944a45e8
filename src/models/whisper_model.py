"""Loading of a model by name or folder: weights, device, language, and its processor."""

from __future__ import annotations

import logging
from typing import Any

from src.models.dynamic_context import DynamicWhisper, get_language
from src.models.loading import load_checkpoint
from src.models.weights import ResolvedWeights, resolve_weights
from src.utils.config import Config
from src.utils.runtime import get_device, keep_cudnn_out_of_attention

logger = logging.getLogger(__name__)


class WhisperModelManager:
    """Loads models for one configuration; `weights` says where the last one came from, None before the first."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.weights: ResolvedWeights | None = None

    def initialize_model(self, variant: str | None = None) -> tuple[DynamicWhisper, Any]:
        """Find, load and place a model.

        Args:
            variant: a name such as "base", or a checkpoint's folder; `model.variant` of the configuration by default.

        Returns:
            The model in float32 on the configured device, in evaluation mode, and its `WhisperProcessor`. Its
            generation config has the configured language and task; with `auto` those of the checkpoint stay.

        Raises:
            ModelError: no weights are available, the message lists what was tried; or they are damaged or no Whisper's.
            DeviceError: no such device.
        """
        settings, device = self._config.model, get_device(self._config.device)
        variant = variant or settings.variant
        keep_cudnn_out_of_attention(device)
        self.weights = resolve_weights(variant, cache_dir=self._config.paths.cache_dir)
        model, processor = load_checkpoint(self.weights.path)
        generation = model.generation_config
        if getattr(generation, "is_multilingual", False):
            if settings.language is not None:
                generation.language, generation.task = settings.language, settings.task
            generation.language = get_language(model)
        size, context = sum(p.numel() for p in model.parameters()) / 1e6, model.audio_context
        logger.info("model %s: %.1f M parameters, audio context %r, on %s", variant, size, context, device)
        return model.to(device).eval(), processor
