from .batch import BatchInference
from .decoding import decode
from .engines import load_engine
from .options import DecodingOptions
from .streaming import StreamingASR
from .transcription import Transcription

__all__ = [
    "BatchInference",
    "DecodingOptions",
    "StreamingASR",
    "Transcription",
    "decode",
    "load_engine",
]
