from .alignment_heads import HeadSearch, find_alignment_heads, write_alignment_heads
from .captions import CaptionOptions, LiveCaptionWriter, cues_of_segments, make_cues, write_captions
from .engines import load_engine
from .files.recordings import with_clips
from .files.transcribe import BatchInference, Transcription
from .hotwords import rare_words
from .options import DecodingOptions
from .server.client import stream_to_server
from .server.host import ServedModel, ServerLimits
from .server.page import launch_demo
from .server.recorder import launch_recorder
from .server.server import CaptionServer
from .streaming.session import StreamingASR
from .streaming.view import LiveCaptions
from .torch_engine import decode

__all__ = [
    "BatchInference",
    "CaptionOptions",
    "CaptionServer",
    "DecodingOptions",
    "HeadSearch",
    "LiveCaptionWriter",
    "LiveCaptions",
    "ServedModel",
    "ServerLimits",
    "StreamingASR",
    "Transcription",
    "cues_of_segments",
    "decode",
    "find_alignment_heads",
    "launch_demo",
    "launch_recorder",
    "load_engine",
    "make_cues",
    "rare_words",
    "stream_to_server",
    "with_clips",
    "write_alignment_heads",
    "write_captions",
]
