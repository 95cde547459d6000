"""NYUv2 with 40 classes: as ASTMT (arXiv:1904.08918) put it together, and as it is passed on for MTLoRA ("NYUD").

=======================================  ==============================================================================
``gt_sets/{train,val}.txt``              names
``images/<name>.jpg``                    images
``segmentation/<name>.{png,mat}``        1 to 40; 0 is no label
``depth/<name>.{npy,mat}``               (H, W) in metres
``normals/<name>.{npy,jpg}``             (H, W, 3); in a jpg 127.5 · (1 + vector)
``edge/<name>.{npy,png}``                (H, W): 0 and 1, in a png 0 and 255
=======================================  ==============================================================================

The first one that there is; the second are ASTMT's. A ``mat`` has a variable of its folder's name, and reading it
needs SciPy: the extra ``[pascal]``. Normals keep the axes that the files have: angles between predictions and labels
are the same in any.
"""

from pathlib import Path
from typing import Any

from ..tasks import make_task
from .columns import Column
from .format import Format, Row, read_list
from .mat import load_mat

_FILES = {
    "segmentation": ("segmentation", (".png", ".mat")),
    "depth": ("depth", (".npy", ".mat")),
    "normals": ("normals", (".npy", ".jpg")),
    "edges": ("edge", (".npy", ".png")),
}


def read_label(file: Path) -> Any:
    """What a ``mat`` holds, and any other file as it is."""
    return load_mat(file, file.parent.name) if file.suffix == ".mat" else file


def list_rows(root: Path, split: str) -> list[Row]:
    """Rows of a split's files. Raises OSError without the split's list."""
    rows = []
    for name in read_list(root / "gt_sets" / f"{split}.txt"):
        row: Row = {"name": name, "image": root / "images" / f"{name}.jpg"}
        for column, (folder, suffixes) in _FILES.items():
            files = [root / folder / f"{name}{suffix}" for suffix in suffixes]
            row[column] = next((file for file in files if file.exists()), files[0])
        rows.append(row)
    return rows


NYUD_40 = Format(
    name="nyud-40",
    tasks=(make_task("segmentation", 40), make_task("depth", 1), make_task("normals", 3), make_task("edges", 1)),
    columns={
        "segmentation": Column(
            "segmentation", classes={number: number - 1 for number in range(1, 41)}, read=read_label
        ),
        "depth": Column("depth", read=read_label),
        "normals": Column("normals"),
        "edges": Column("edges", threshold=0.5),
    },
    published=(
        "https://data.vision.ee.ethz.ch/kmaninis/share/MTL/NYUD_MT.tgz, and in another form by what "
        "https://github.com/scale-lab/MTLoRA links to"
    ),
    images={"train": 795, "val": 654},
    list_rows=list_rows,
    marker="gt_sets",
)
