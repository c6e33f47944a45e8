from .host import ServedModel, ServerLimits
from .server import CaptionServer

__all__ = ["CaptionServer", "ServedModel", "ServerLimits"]
