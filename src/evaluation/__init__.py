"""From text to numbers, tables and figures.

The names are in the stub `__init__.pyi` and load when first used: importing one module does not import them all.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
