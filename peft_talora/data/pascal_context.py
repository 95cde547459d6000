"""PASCAL-Context with five tasks, as ASTMT (arXiv:1904.08918) put it together and MTLoRA and InvPT read it.

============================================  =========================================================================
``ImageSets/Context/{train,val}.txt``         names
``JPEGImages/<name>.jpg``                     images
``semseg/{VOC12,pascal-context}/<name>.png``  20 classes and background, 255 ignored; the first one that there is
``human_parts/<name>.mat``                    PASCAL-Part (arXiv:1406.2031): 24 parts of each person, which become 6
``sal_distill/<name>.png``                    saliency, a prediction of another network: above half of 255 is salient
``normals_distill/<name>.png``                normals likewise, 127.5 · (1 + vector); they are labels where the class
                                              is one of NYUv2's too
``pascal-context/trainval/<name>.mat``        ``LabelMap`` of 459 classes, whose borders are the edges
``json/{nyu,context}_classes.json``           names of NYUv2's classes, and ids by name of PASCAL-Context's
============================================  =========================================================================

An image without a person has no label of parts. Edges are two pixels wide (see `boundaries`), not thinned to one.
Reading ``mat`` needs SciPy: the extra ``[pascal]``.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..tasks import make_task
from .bad_samples import reading
from .columns import Column
from .edges import boundaries
from .format import Format, Row, read_list
from .mat import load_mat
from .values import to_array

PERSON = 15  # of PASCAL VOC's classes
PARTS = {
    1: ("hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"),
    2: ("neck", "torso"),
    3: ("luarm", "ruarm"),
    4: ("lhand", "llarm", "rhand", "rlarm"),
    5: ("luleg", "ruleg"),
    6: ("lfoot", "llleg", "rfoot", "rlleg"),
}
"""Class → what PASCAL-Part calls its parts: head, torso, upper and lower arms, upper and lower legs; 0 is all else."""
_CLASS_OF_PART = {part: number for number, parts in PARTS.items() for part in parts}


def read_parts(file: Path) -> np.ndarray | None:
    """Parts (H, W) of all people of an image; None if nobody's parts are annotated.

    Raises:
        ValueError: the file has another structure, or a part of another name.
    """
    try:
        objects = load_mat(file, "anno")[0, 0]["objects"].ravel()
        label = None
        for person in (one for one in objects if int(one["class_ind"].item()) == PERSON):
            for part in person["parts"].ravel():
                label = np.zeros(person["mask"].shape, dtype=np.int64) if label is None else label
                label[part["mask"] > 0] = _CLASS_OF_PART[str(part["part_name"].item())]
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no annotation of PASCAL-Part: {error!r}") from error
    return label


def read_context(file: Path) -> np.ndarray:
    """The classes (H, W) of PASCAL-Context. Raises BadSample if the file has none."""
    return load_mat(file, "LabelMap").astype(np.int64)


def read_edges(file: Path) -> np.ndarray:
    """Edges (H, W): borders between the classes of PASCAL-Context."""
    return boundaries(read_context(file)).astype(np.int64)


@lru_cache
def classes_with_normals(nyu: Path, context: Path) -> frozenset[int]:
    """Ids of the classes of PASCAL-Context that are NYUv2's too, for which normals were learnt.

    Raises:
        BadSample: a file does not hold what it should.
    """
    with reading(nyu):
        wanted = json.loads(nyu.read_text())
        if not isinstance(wanted, (list, dict)):
            raise ValueError(f"{nyu} has another form; expected: names")
    with reading(context):
        ids = json.loads(context.read_text())
        if not isinstance(ids, dict):
            raise ValueError(f"{context} has another form; expected: a mapping from name to id")
    # Both data sets have televisions, by different names.
    return frozenset(ids[name] for name in (*wanted, "tvmonitor") if name in ids and name != "unknown")


def read_normals(files: tuple[Path, Path, Path, Path]) -> np.ndarray:
    """Normals (3, H, W), 0 where the class has none: of the files of normals, classes, and both lists of names."""
    image, context, *lists = files
    with reading(image):
        vectors = to_array(image, ("RGB",), str(image)).astype(np.float32) / np.float32(127.5) - 1
    classes = read_context(context)
    if classes.shape != vectors.shape[1:]:
        raise ValueError(f"{image} is {vectors.shape[1:]} pixels, {context} {classes.shape}")
    return vectors * np.isin(classes, list(classes_with_normals(*lists)))


def list_rows(root: Path, split: str) -> list[Row]:
    """Rows of a split's files, whether they are there or not. Raises OSError without the split's list."""
    rows, lists = [], tuple(root / "json" / f"{name}_classes.json" for name in ("nyu", "context"))
    for name in read_list(root / "ImageSets" / "Context" / f"{split}.txt"):
        context = root / "pascal-context" / "trainval" / f"{name}.mat"
        row = {
            "name": name,
            "image": root / "JPEGImages" / f"{name}.jpg",
            "segmentation": root / "semseg" / "VOC12" / f"{name}.png",
            "parts": root / "human_parts" / f"{name}.mat",
            "saliency": root / "sal_distill" / f"{name}.png",
            "normals": (root / "normals_distill" / f"{name}.png", context, *lists),
            "edges": context,
        }
        if not row["segmentation"].exists():
            row["segmentation"] = root / "semseg" / "pascal-context" / f"{name}.png"
        rows.append(row)
    return rows


PASCAL_CONTEXT = Format(
    name="pascal-context",
    tasks=(
        make_task("segmentation", 21),
        make_task("parts", 7),
        make_task("saliency", 1),
        make_task("normals", 3),
        make_task("edges", 1),
    ),
    columns={
        "segmentation": Column("segmentation"),
        "parts": Column("parts", read=read_parts),
        "saliency": Column("saliency", threshold=127.5),
        "normals": Column("normals", read=read_normals),
        "edges": Column("edges", read=read_edges),
    },
    published=(
        "https://data.vision.ee.ethz.ch/kmaninis/share/MTL/PASCAL_MT.tgz; json/ is fblib/util/db_info of "
        "https://github.com/facebookresearch/astmt"
    ),
    images={"train": 4998, "val": 5105},
    list_rows=list_rows,
    marker="ImageSets/Context",
)
