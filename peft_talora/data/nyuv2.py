"""NYUv2 with 13 classes as preprocessed for MTAN (arXiv:1803.10704): 288 × 384 pixels.

=======  ==============================================================================================================
rows     ``image`` (3, H, W) in [0, 1], ``segmentation`` (H, W) from −1 (no label) to 12, ``depth`` (1, H, W) in
         metres, ``normal`` (3, H, W); tanganke/nyuv2 on the Hub, or a folder of its parquet files
files    ``{train,val}/{image,label,depth,normal}/<number>.npy`` of (H, W, 3), (H, W), (H, W, 1) and (H, W, 3)
=======  ==============================================================================================================

Normals keep the axes that the files have: angles between predictions and labels are the same in any.
"""

from functools import partial

from ..tasks import make_task
from .columns import Column
from .format import Format, list_numbered

NYUV2_13 = Format(
    name="nyuv2-13",
    tasks=(make_task("segmentation", 13), make_task("depth", 1), make_task("normals", 3)),
    columns={
        "segmentation": Column("segmentation", ignored=(-1,)),
        "depth": Column("depth"),
        "normals": Column("normal"),
    },
    published="https://huggingface.co/datasets/tanganke/nyuv2 (parquet) and https://github.com/lorenmt/mtan (npy)",
    images={"train": 795, "val": 654},
    list_rows=partial(
        list_numbered,
        folders={"image": "image", "segmentation": "label", "depth": "depth", "normal": "normal"},
    ),
    marker="{split}/image",
    hub="tanganke/nyuv2",
)
