from .ct2_to_hf import convert_ct2_to_hf
from .dynamic_context import DynamicWhisper
from .export.adapter import export_peft
from .export.ctranslate2 import export_ctranslate2
from .export.ggml import export_ggml
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
    "export_ggml",
    "export_huggingface",
    "export_onnx",
    "export_peft",
    "push_to_hub",
    "resolve_weights",
]
