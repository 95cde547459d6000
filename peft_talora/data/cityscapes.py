"""Cityscapes (arXiv:1604.01685): as preprocessed for MTAN (arXiv:1803.10704), and as it is published itself.

=============  ========================================================================================================
cityscapes-7   128 × 256 pixels. Rows: ``image`` (3, H, W) in [0, 1], ``segmentation_7`` (H, W) from −1 (no label) to
               6, ``depth`` (1, H, W), which is inverse depth, 0 unknown; tanganke/cityscapes on the Hub, or a folder
               of its parquet files. Files: ``{train,val}/{image,label_7,depth}/<number>.npy`` of (H, W, 3), (H, W) and
               (H, W, 1)
cityscapes-19  1024 × 2048 pixels. ``leftImg8bit/<split>/<city>/<name>_leftImg8bit.png``, and by the same names
               ``gtFine/…_gtFine_labelIds.png``, ``disparity/…_disparity.png`` and ``camera/…_camera.json``. Disparity
               is in pixels, depth in metres
=============  ========================================================================================================
"""

import json
from functools import partial
from pathlib import Path

import numpy as np

from ..tasks import make_task
from .bad_samples import reading
from .columns import Column
from .format import Format, Row, list_numbered
from .values import DEPTH_MODES, to_array

CITYSCAPES_7 = Format(
    name="cityscapes-7",
    tasks=(make_task("segmentation", 7), make_task("inverse_depth", 1, "depth")),
    columns={
        "segmentation": Column("segmentation_7", ignored=(-1,)),
        "inverse_depth": Column("depth", inverse=True),
    },
    published=(
        "https://huggingface.co/datasets/tanganke/cityscapes (parquet) and https://github.com/lorenmt/mtan (npy)"
    ),
    images={"train": 2975, "val": 500},
    list_rows=partial(list_numbered, folders={"image": "image", "segmentation_7": "label_7", "depth": "depth"}),
    marker="{split}/image",
    hub="tanganke/cityscapes",
)

OFFICIAL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Ids in ``labelIds`` of the 19 classes that are evaluated, in the order of their train ids."""


def read_disparity(file: Path) -> np.ndarray:
    """Disparity (H, W) in pixels, 0 unknown, from a 16-bit png of 256 · disparity + 1."""
    raw = to_array(file, DEPTH_MODES, str(file)).astype(np.float32)
    return np.where(raw > 0, np.maximum(raw - 1, 0) / np.float32(256), 0)


def read_depth(files: tuple[Path, Path]) -> np.ndarray:
    """Depth (H, W) in metres, 0 unknown: focal length · baseline / disparity, of the files of disparity and camera.

    Raises:
        BadSample: the camera's file does not say its baseline and focal length.
    """
    disparity_file, camera_file = files
    with reading(disparity_file):
        disparity = read_disparity(disparity_file)
    with reading(camera_file):
        camera = json.loads(camera_file.read_text())
        try:
            factor = camera["extrinsic"]["baseline"] * camera["intrinsic"]["fx"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{camera_file} has no extrinsic.baseline and intrinsic.fx") from error
    return np.where(disparity > 0, factor / np.maximum(disparity, 1 / 256), 0)


def list_own(root: Path, split: str) -> list[Row]:
    """Rows of Cityscapes' own tree; labels that are missing are left out."""
    rows = []
    for image in sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png")):
        city, name = image.parent.name, image.name.removesuffix("_leftImg8bit.png")
        disparity = root / "disparity" / split / city / f"{name}_disparity.png"
        camera = root / "camera" / split / city / f"{name}_camera.json"
        labels = {
            "labelIds": root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png",
            "disparity": disparity,
        }
        row = {"name": name, "image": image, **{key: file for key, file in labels.items() if file.exists()}}
        if disparity.exists() and camera.exists():
            row["depth"] = (disparity, camera)
        rows.append(row)
    return rows


CITYSCAPES_19 = Format(
    name="cityscapes-19",
    tasks=(make_task("segmentation", 19), make_task("disparity", 1, "depth"), make_task("depth", 1)),
    columns={
        "segmentation": Column("labelIds", classes={theirs: ours for ours, theirs in enumerate(OFFICIAL_IDS)}),
        "disparity": Column("disparity", inverse=True, read=read_disparity),
        "depth": Column("depth", read=read_depth),
    },
    published="https://www.cityscapes-dataset.com (leftImg8bit, gtFine, disparity, camera)",
    images={"train": 2975, "val": 500},
    list_rows=list_own,
    marker="leftImg8bit/{split}",
)
