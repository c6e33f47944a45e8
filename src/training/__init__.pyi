from .adapt import AdaptationResult, adapt_context
from .mixing import MixResult, choose_mix
from .preflight import Preflight, preflight, propose_batch_seconds
from .restart import RestartedRun, restart, spare_checkpoints, stored_report
from .trainer import WhisperTrainer

__all__ = [
    "AdaptationResult",
    "MixResult",
    "Preflight",
    "RestartedRun",
    "WhisperTrainer",
    "adapt_context",
    "choose_mix",
    "preflight",
    "propose_batch_seconds",
    "restart",
    "spare_checkpoints",
    "stored_report",
]
