"""Names of `preprocessing`, where they were until their users have moved."""

from src.data.preprocessing import ClipStats as ClipStats
from src.data.preprocessing import measure_clip as measure_clip
