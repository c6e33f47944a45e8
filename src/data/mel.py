"""Names of `features`, where they were until their users have moved."""

from src.data.features import CONTEXT_SAMPLES as CONTEXT_SAMPLES
from src.data.features import HOP_SAMPLES as HOP_SAMPLES
from src.data.features import log_mel as log_mel
from src.data.features import padded_samples as padded_samples
