from .audio import SAMPLE_RATE, AudioCache, load_audio
from .augmentation.augmenter import AudioAugmenter, SpecAugment
from .augmentation.demo import demonstrate, draw_examples, players
from .dataset import DataCollator, WhisperDataset, decode_audio
from .features import LogMel
from .labels import LabelEncoder
from .loader import LengthBatchSampler, SpeechLoader, create_dataloaders, create_loader
from .preparation import DatasetSplits, prepare_datasets
from .preprocessing import AudioPreprocessor
from .report.figure import draw_data_report
from .report.report import DataReport, build_data_report
from .sources.catalog import SAMPLE_CLIP, choose_data
from .utterance import Utterance
from .vad import VoiceActivityDetector

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
    "choose_data",
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
