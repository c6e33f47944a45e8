"""The torch engine: any device, and the weights that training holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from src.data.audio import SAMPLE_RATE, Waveform
from src.inference.alignment import align_words
from src.inference.decoding import decode, encode, languages_of
from src.inference.options import DecodingOptions, DecodingResult
from src.inference.vocabulary import Vocabulary
from src.inference.words import Word
from src.models.dynamic_context import get_audio_context


class TorchEngine:
    """Decodes with a `DynamicWhisper`; see `Engine` for its methods.

    Args:
        model: in the context that its config says; it is put into evaluation mode.
        processor: of the model.
    """

    name = "torch"
    workers = 1

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model.eval(), processor
        self.vocabulary = Vocabulary.of(processor.tokenizer)
        self.device = str(model.device)
        self.precision = str(model.dtype).removeprefix("torch.")
        self.audio_context = get_audio_context(model.config)

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Any:
        """Return the encoder's output, (B, positions, d_model) in `last_hidden_state`."""
        return encode(self._model, audios, trailing_silence_sec)

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        """Decode what `encode` gave for these clips."""
        return decode(self._model, self._processor, audios, options, encoder_outputs=encoded)

    def align(
        self, encoded: Any, audios: Sequence[Waveform], texts: Sequence[Sequence[int]], options: DecodingOptions
    ) -> list[tuple[Word, ...]]:
        """Place texts that are known in their clips."""
        start = self.vocabulary.start_sequence(options.language, options.task, timestamps=False)
        return [
            align_words(
                self._model,
                self._processor.tokenizer,
                encoded.last_hidden_state[row : row + 1],
                sot_sequence=start,
                tokens=tokens,
                audio_sec=len(audio) / SAMPLE_RATE,
            )
            for row, (audio, tokens) in enumerate(zip(audios, texts, strict=True))
        ]

    def detect_languages(self, audios: Sequence[Waveform]) -> list[str | None]:
        """Return the likeliest language of each clip; None for an English-only model."""
        options = DecodingOptions()
        encoded = self.encode(audios, options.trailing_silence_sec)
        return languages_of(self._model, self.vocabulary, encoded, options)

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
