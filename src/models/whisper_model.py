"""Loading of a model by name or folder: weights, device, language, and its processor."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import WhisperProcessor
from transformers import logging as transformers_logging

from src.models.dynamic_context import DynamicWhisper
from src.models.weights import ResolvedWeights, resolve_weights
from src.utils.config import Config
from src.utils.runtime import get_device, keep_cudnn_out_of_attention

logger = logging.getLogger(__name__)


class WhisperModelManager:
    """Loads models for one configuration.

    Attributes:
        weights: where the last model came from; None before the first.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.weights: ResolvedWeights | None = None

    def initialize_model(self, variant: str | None = None) -> tuple[DynamicWhisper, Any]:
        """Find, load and place a model.

        Args:
            variant: a name such as "base", or a checkpoint's folder; `model.variant` of the configuration by default.

        Returns:
            The model in float32 on the configured device, in evaluation mode, and its `WhisperProcessor`.

        Raises:
            ModelError: no weights are available; the message lists what was tried.
            DeviceError: no such device.
        """
        device = get_device(self._config.device)
        keep_cudnn_out_of_attention(device)
        self.weights = resolve_weights(variant or self._config.model.variant, cache_dir=self._config.paths.cache_dir)
        transformers_logging.disable_progress_bar()  # one bar per file of weights says nothing
        model = DynamicWhisper.from_pretrained(self.weights.path, dtype=torch.float32)
        processor = WhisperProcessor.from_pretrained(self.weights.path)
        self._set_language(model)
        logger.info(
            "model %s: %.1f M parameters, audio context %r, on %s",
            variant or self._config.model.variant,
            sum(p.numel() for p in model.parameters()) / 1e6,
            model.audio_context,
            device,
        )
        return model.to(device).eval(), processor

    def _set_language(self, model: DynamicWhisper) -> None:
        """Write language and task into the generation config, so that a saved checkpoint carries them."""
        model.config.forced_decoder_ids = None  # of old checkpoints; contradicts language and task
        model.generation_config.forced_decoder_ids = None
        if getattr(model.generation_config, "is_multilingual", False) and self._config.model.language is not None:
            model.generation_config.language = self._config.model.language
            model.generation_config.task = self._config.model.task
