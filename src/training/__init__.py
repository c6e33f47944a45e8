"""The training loop."""

from src.training.trainer import WhisperTrainer

__all__ = ["WhisperTrainer"]
