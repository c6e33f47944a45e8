from .context_adaptation import AdaptationResult, adapt_context
from .mixing import MixResult, choose_mix
from .probe import propose_batch_seconds
from .trainer import WhisperTrainer

__all__ = [
    "AdaptationResult",
    "MixResult",
    "WhisperTrainer",
    "adapt_context",
    "choose_mix",
    "propose_batch_seconds",
]
