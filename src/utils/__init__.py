"""What every part needs: configuration, errors, devices, logging, run folders."""

from src.utils.colab import copy_verified, in_colab, mount_drive
from src.utils.config import Config, load_config
from src.utils.data_versions import DataVersionManager
from src.utils.figures import save_figure
from src.utils.logging_config import setup_logging
from src.utils.mirror import DriveMirror
from src.utils.registry import ModelRegistry
from src.utils.runtime import get_device, set_seed
from src.utils.tracking import ExperimentLogger
from src.utils.versioning import get_git_revision

__all__ = [
    "Config",
    "DataVersionManager",
    "DriveMirror",
    "ExperimentLogger",
    "ModelRegistry",
    "copy_verified",
    "get_device",
    "get_git_revision",
    "in_colab",
    "load_config",
    "mount_drive",
    "save_figure",
    "set_seed",
    "setup_logging",
]
