"""Tensors in and out: checkpoints of any origin, and safetensors that describe themselves.

Knows no task vectors and no models. Below everything: any room may use it. Its names are
imported when they are used: writing a text file needs no PyTorch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
