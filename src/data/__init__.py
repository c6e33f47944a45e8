"""From a source of speech to batches."""

from src.data.audio import SAMPLE_RATE, load_audio
from src.data.dataset import DataCollator, LengthBatchSampler, WhisperDataset, create_dataloaders, create_loader
from src.data.features import LogMel
from src.data.labels import LabelEncoder
from src.data.preparation import DatasetSplits, prepare_datasets
from src.data.sources import SAMPLE_CLIP
from src.data.utterance import Utterance
from src.data.vad import VoiceActivityDetector

__all__ = [
    "SAMPLE_CLIP",
    "SAMPLE_RATE",
    "DataCollator",
    "DatasetSplits",
    "LabelEncoder",
    "LengthBatchSampler",
    "LogMel",
    "Utterance",
    "VoiceActivityDetector",
    "WhisperDataset",
    "create_dataloaders",
    "create_loader",
    "load_audio",
    "prepare_datasets",
]
