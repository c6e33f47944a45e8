"""From audio to text: files in batches, and streams.

The names are in the stub next to this file and load when first used: importing one module does not import them all.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
