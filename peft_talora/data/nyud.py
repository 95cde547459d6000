"""NYUv2 with 40 classes, as ASTMT (arXiv:1904.08918) put it together and MTLoRA reads it ("NYUD").

=====================================  ================================================================================
``gt_sets/{train,val}.txt``            names
``images/<name>.jpg``                  images
``segmentation/<name>.png``            1 to 40; 0 is no label
``depth/<name>.npy``                   (H, W) in metres
``normals/<name>.npy``                 (H, W, 3)
``edge/<name>.npy``                    (H, W), 0 and 1
=====================================  ================================================================================

Normals keep the axes that the files have: angles between predictions and labels are the same in any.
"""

from pathlib import Path

from ..tasks import make_task
from .columns import Column
from .format import Format, Row, read_list

_FILES = {
    "segmentation": "segmentation/{}.png",
    "depth": "depth/{}.npy",
    "normals": "normals/{}.npy",
    "edges": "edge/{}.npy",
}


def list_rows(root: Path, split: str) -> list[Row]:
    """Rows of a split's files."""
    return [
        {
            "name": name,
            "image": root / "images" / f"{name}.jpg",
            **{column: root / file.format(name) for column, file in _FILES.items()},
        }
        for name in read_list(root / "gt_sets" / f"{split}.txt")
    ]


NYUD_40 = Format(
    name="nyud-40",
    tasks=(make_task("segmentation", 40), make_task("depth", 1), make_task("normals", 3), make_task("edges", 1)),
    columns={
        "segmentation": Column("segmentation", classes={number: number - 1 for number in range(1, 41)}),
        "depth": Column("depth"),
        "normals": Column("normals"),
        "edges": Column("edges", threshold=0.5),
    },
    published="https://data.vision.ee.ethz.ch/kmaninis/share/MTL/NYUD_MT.tgz, and by https://github.com/scale-lab/MTLoRA",
    images={"train": 795, "val": 654},
    list_rows=list_rows,
    marker="gt_sets",
)
