"""Configured runs: their schema, what they work on, suites of them and their results.

Stands on `learn`; used by `report` and the command line. Its names are imported when they are used:
the command line's help needs none of them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
