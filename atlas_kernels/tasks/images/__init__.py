"""Images on the user's disk: folders, the paper's data sets, out-of-domain tests.

Stands on nothing of ours; used by `learn` and above.
"""

from .catalog import CATALOG, load_images
from .folder import list_images, load_folder, readable
from .images import Images, LabelledImages
from .out_of_domain import OutOfDomain, load_out_of_domain
from .task import ImageTask

__all__ = [
    "CATALOG",
    "ImageTask",
    "Images",
    "LabelledImages",
    "OutOfDomain",
    "list_images",
    "load_folder",
    "load_images",
    "load_out_of_domain",
    "readable",
]
