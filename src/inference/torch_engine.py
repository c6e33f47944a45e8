"""The torch engine: any device, and the weights that training holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from src.data.audio import SAMPLE_RATE, Waveform
from src.inference.alignment import align_words
from src.inference.decoding import decode, encode, languages_of
from src.inference.options import DecodingOptions, DecodingResult
from src.inference.tokens import Vocabulary
from src.inference.words import Word
from src.models.dynamic_context import get_audio_context
from src.models.modes import evaluation_mode


class TorchEngine:
    """Decodes with a `DynamicWhisper`; see `Engine` for its methods.

    Args:
        model: in the context that its config says; it decodes in evaluation mode, and stays in the mode it is in.
        processor: of the model.
    """

    name = "torch"
    workers = 1

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor
        self.vocabulary = Vocabulary.of(processor.tokenizer)
        self.device = str(model.device)
        self.precision = str(model.dtype).removeprefix("torch.")
        self.audio_context = get_audio_context(model.config)

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Any:
        """Return the encoder's output, (B, positions, d_model) in `last_hidden_state`."""
        with evaluation_mode(self._model):
            return encode(self._model, audios, trailing_silence_sec)

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        """Decode what `encode` gave for these clips."""
        with evaluation_mode(self._model):
            return decode(self._model, self._processor, audios, options, encoder_outputs=encoded)

    def align(
        self, encoded: Any, audios: Sequence[Waveform], texts: Sequence[Sequence[int]], options: DecodingOptions
    ) -> list[tuple[Word, ...]]:
        """Place texts that are known in their clips."""
        start = self.vocabulary.start_sequence(options.language, options.task, timestamps=False)
        with evaluation_mode(self._model):
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

    @torch.inference_mode()
    def first_token(self, audio: Waveform, options: DecodingOptions) -> int:
        """Return the likeliest first token of a clip."""
        with evaluation_mode(self._model):
            encoded = encode(self._model, [audio], options.trailing_silence_sec)
            hidden = encoded.last_hidden_state  # (1, positions, d_model)
            (language,) = languages_of(self._model, self.vocabulary, encoded, options)
            start = self.vocabulary.start_sequence(language, options.task, timestamps=False)
            tokens = torch.tensor([start], device=hidden.device)
            output = self._model.model.decoder(input_ids=tokens, encoder_hidden_states=hidden, use_cache=True)
            return int(self._model.proj_out(output.last_hidden_state[:, -1]).argmax(dim=-1))

    def detect_languages(self, audios: Sequence[Waveform]) -> list[str | None]:
        """Return the likeliest language of each clip; None for an English-only model."""
        options = DecodingOptions()
        with evaluation_mode(self._model):
            encoded = encode(self._model, audios, options.trailing_silence_sec)
            return languages_of(self._model, self.vocabulary, encoded, options)
