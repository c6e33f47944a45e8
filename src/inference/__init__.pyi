from .batch import BatchInference
from .caption_files import LiveCaptionWriter, write_captions
from .captions import CaptionOptions, cues_of_segments, make_cues
from .client import stream_to_server
from .connection import ServerLimits
from .decoding import decode
from .demo import launch_demo
from .engines import load_engine
from .head_search import HeadSearch, find_alignment_heads, write_alignment_heads
from .live_view import LiveCaptions
from .options import DecodingOptions
from .server import CaptionServer
from .streaming import StreamingASR
from .transcription import Transcription

__all__ = [
    "BatchInference",
    "CaptionOptions",
    "CaptionServer",
    "DecodingOptions",
    "HeadSearch",
    "LiveCaptionWriter",
    "LiveCaptions",
    "ServerLimits",
    "StreamingASR",
    "Transcription",
    "cues_of_segments",
    "decode",
    "find_alignment_heads",
    "launch_demo",
    "load_engine",
    "make_cues",
    "stream_to_server",
    "write_alignment_heads",
    "write_captions",
]
