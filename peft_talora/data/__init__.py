"""Datasets of dense labels, and the contract of a sample.

A sample is a dict of

==========  ==========================================================================================================
``image``   float32 (3, H, W) in [0, 1], RGB
``labels``  task name → label; a task without a label for this image is absent
``name``    str, unique in its split
==========  ==========================================================================================================

and a label has the size of the image:

====================  ================================================================================================
segmentation, parts   int64 (H, W): class ids, 255 ignored
edges, saliency       int64 (H, W): 0, 1, and 255 ignored
depth                 float32 (H, W): metres along the optical axis, 0 unknown
normals               float32 (3, H, W): unit vectors in camera coordinates, x right, y down, z forward into the scene,
                      on the camera's side of the surface (a wall seen head-on has (0, 0, −1)); the vector 0 unknown
====================  ================================================================================================

``ObjectScenes`` alone differs: it has masks of objects instead of labels, for promptable segmentation.

Datasets are sequences of samples (``__len__``, ``__getitem__``); a `Collator` makes batches of them.
"""

from .bad_samples import BadSample, readable
from .cityscapes import CITYSCAPES_7, CITYSCAPES_19
from .collate import Collator, make_image_processor
from .columns import Column, ColumnDataset, read_column_map
from .folder import FolderDataset
from .format import Format
from .mixed import MixedSampler, MixedTasks, shares_by_size
from .nyud import NYUD_40
from .nyuv2 import NYUV2_13
from .object_scenes import ObjectScenes
from .pascal_context import PASCAL_CONTEXT
from .rows import ColumnStream, open_rows, open_stream, open_table
from .synthetic import TASKS as SYNTHETIC_TASKS
from .synthetic import SyntheticScenes
from .transforms import AugmentedDataset, JointAugmentation

FORMATS = {f.name: f for f in (NYUV2_13, CITYSCAPES_7, CITYSCAPES_19, PASCAL_CONTEXT, NYUD_40)}
"""Published data sets that are read as they are, by name."""

__all__ = [
    "FORMATS",
    "SYNTHETIC_TASKS",
    "AugmentedDataset",
    "BadSample",
    "Collator",
    "Column",
    "ColumnDataset",
    "ColumnStream",
    "FolderDataset",
    "Format",
    "JointAugmentation",
    "MixedSampler",
    "MixedTasks",
    "ObjectScenes",
    "SyntheticScenes",
    "make_image_processor",
    "open_rows",
    "open_stream",
    "open_table",
    "read_column_map",
    "readable",
    "shares_by_size",
]
