from .ct2_to_hf import convert_ct2_to_hf
from .dynamic_context import DynamicWhisper
from .export.ctranslate2 import export_ctranslate2
from .export.hub import push_to_hub
from .export.huggingface import export_huggingface
from .export.onnx import export_onnx
from .weights import resolve_weights
from .whisper_model import WhisperModelManager

__all__ = [
    "DynamicWhisper",
    "WhisperModelManager",
    "convert_ct2_to_hf",
    "export_ctranslate2",
    "export_huggingface",
    "export_onnx",
    "push_to_hub",
    "resolve_weights",
]
