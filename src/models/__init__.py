"""A model, where it comes from and where it goes."""

from src.models.ct2_converter import convert_ct2_to_hf
from src.models.dynamic_context import DynamicWhisper
from src.models.export import export_ctranslate2, export_huggingface
from src.models.weights import resolve_weights
from src.models.whisper_model import WhisperModelManager

__all__ = [
    "DynamicWhisper",
    "WhisperModelManager",
    "convert_ct2_to_hf",
    "export_ctranslate2",
    "export_huggingface",
    "resolve_weights",
]
