from .batch import BatchInference
from .caption_files import LiveCaptionWriter, write_captions
from .captions import CaptionOptions, cues_of_segments, make_cues
from .client import stream_to_server
from .connection import ServerLimits
from .decoding import decode
from .engines import load_engine
from .options import DecodingOptions
from .server import CaptionServer
from .streaming import StreamingASR
from .transcription import Transcription

__all__ = [
    "BatchInference",
    "CaptionOptions",
    "CaptionServer",
    "DecodingOptions",
    "LiveCaptionWriter",
    "ServerLimits",
    "StreamingASR",
    "Transcription",
    "cues_of_segments",
    "decode",
    "load_engine",
    "make_cues",
    "stream_to_server",
    "write_captions",
]
