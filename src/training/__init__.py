"""Fine-tuning: the loop, what it trains, and what it keeps."""

from src.training.context_adaptation import AdaptationResult, adapt_context
from src.training.mixing import MixResult, choose_mix
from src.training.probe import propose_batch_seconds
from src.training.trainer import WhisperTrainer

__all__ = ["AdaptationResult", "MixResult", "WhisperTrainer", "adapt_context", "choose_mix", "propose_batch_seconds"]
