"""Fine-tuning: the training loop, checkpoints, and what comes before and after a training.

The names are in `__init__.pyi` and load when first used: importing one module does not import them all.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
