from .config import Config, load_config
from .figures import save_figure
from .logging_config import setup_logging
from .memory import clean_up, watch_resources
from .mirror import DriveMirror, copy_verified
from .runtime import download_results, get_device, in_colab, mount_drive, set_seed, start_session, upload_files
from .tracking import ExperimentLogger
from .validation import EnvironmentReport, environment_report
from .versioning import DataVersionManager, ModelRegistry, get_git_revision

__all__ = [
    "Config",
    "DataVersionManager",
    "DriveMirror",
    "EnvironmentReport",
    "ExperimentLogger",
    "ModelRegistry",
    "clean_up",
    "copy_verified",
    "download_results",
    "environment_report",
    "get_device",
    "get_git_revision",
    "in_colab",
    "load_config",
    "mount_drive",
    "save_figure",
    "set_seed",
    "setup_logging",
    "start_session",
    "upload_files",
    "watch_resources",
]
