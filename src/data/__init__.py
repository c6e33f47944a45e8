"""From a source of speech to batches."""

from src.data.audio import SAMPLE_RATE, load_audio
from src.data.audio_cache import AudioCache
from src.data.augmentation import AudioAugmenter
from src.data.augmentation_demo import demonstrate, draw_examples, players
from src.data.batching import LengthBatchSampler
from src.data.dataset import DataCollator, WhisperDataset, decode_audio
from src.data.features import LogMel
from src.data.labels import LabelEncoder
from src.data.loader import SpeechLoader, create_dataloaders, create_loader
from src.data.preparation import DatasetSplits, prepare_datasets
from src.data.preprocessing import AudioPreprocessor
from src.data.report import DataReport, build_data_report
from src.data.report_figure import draw_data_report
from src.data.sources import SAMPLE_CLIP
from src.data.spec_augment import SpecAugment
from src.data.utterance import Utterance
from src.data.vad import VoiceActivityDetector

__all__ = [
    "SAMPLE_CLIP",
    "SAMPLE_RATE",
    "AudioAugmenter",
    "AudioCache",
    "AudioPreprocessor",
    "DataCollator",
    "DataReport",
    "DatasetSplits",
    "LabelEncoder",
    "LengthBatchSampler",
    "LogMel",
    "SpecAugment",
    "SpeechLoader",
    "Utterance",
    "VoiceActivityDetector",
    "WhisperDataset",
    "build_data_report",
    "create_dataloaders",
    "create_loader",
    "decode_audio",
    "demonstrate",
    "draw_data_report",
    "draw_examples",
    "load_audio",
    "players",
    "prepare_datasets",
]
