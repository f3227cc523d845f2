"""What people look at: tables, pictures, the page of a suite.

Stands on `experiments`; used by the command line. Its names are imported when they are used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
