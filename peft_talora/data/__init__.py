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
from .collate import Collator, make_image_processor
from .folder import FolderDataset
from .mixed import MixedSampler, MixedTasks, shares_by_size
from .object_scenes import ObjectScenes
from .synthetic import TASKS as SYNTHETIC_TASKS
from .synthetic import SyntheticScenes
from .transforms import AugmentedDataset, JointAugmentation

__all__ = [
    "SYNTHETIC_TASKS",
    "AugmentedDataset",
    "BadSample",
    "Collator",
    "FolderDataset",
    "JointAugmentation",
    "MixedSampler",
    "MixedTasks",
    "ObjectScenes",
    "SyntheticScenes",
    "make_image_processor",
    "readable",
    "shares_by_size",
]
