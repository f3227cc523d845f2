"""``python -m atlas_kernels``: the same as the command ``atlas-kernels``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
