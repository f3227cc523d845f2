"""Fast, small composition of task vectors: theta_j = theta0_j + sum_i lambda_ij * tau_ij.

Names are imported when they are used: ``import atlas_kernels`` alone loads neither PyTorch nor a
device nor a compiler.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
