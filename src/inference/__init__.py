"""From audio to text: files in batches, and streams."""

from src.inference.batch import BatchInference, Transcription
from src.inference.decoding import DecodingOptions, decode
from src.inference.streaming import StreamingASR

__all__ = ["BatchInference", "DecodingOptions", "StreamingASR", "Transcription", "decode"]
