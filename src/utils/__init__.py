"""What every part needs: configuration, errors, devices, logging, run folders."""

from src.utils.config import Config, load_config
from src.utils.logging_config import setup_logging
from src.utils.runtime import get_device, set_seed
from src.utils.tracking import ExperimentLogger
from src.utils.versioning import get_git_revision

__all__ = ["Config", "ExperimentLogger", "get_device", "get_git_revision", "load_config", "set_seed", "setup_logging"]
