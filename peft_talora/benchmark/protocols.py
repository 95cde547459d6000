"""Named benchmark protocols: which tasks of which images, how split, and by which figures.

Figures of two protocols are never compared, however alike their names: 13 and 40 classes of NYUv2, 7 and 19 of
Cityscapes, and the two PASCAL-Context protocols with other saliency figures are different benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field, replace
from typing import Any

from ..losses import IGNORE_INDEX
from ..tasks import Task, default_weight, make_task


@dataclass(frozen=True)
class Protocol:
    """One benchmark: everything that two runs must share for their figures to be compared.

    Attributes:
        name: How results call it.
        tasks: What is predicted.
        images: Images of the splits `train`, `val` and `test`; None is any number. Where `val` is 0, train.py holds
            out a part of `train`.
        num_train_epochs: Passes over the training images.
        batch_size: Images per step.
        source: Where it is from.
        image_size: (height, width) of images and labels in pixels; None if they differ from image to image, or are
            generated in the size of the encoder's input.
        encoder_size: Long side of the encoder's input in pixels; None is the base checkpoint's own.
        figures: Task → the metrics that enter table and Δm; those of a task that is not named here all do.
        test_split: Folder of the split `test`.
        generated: Whether the images are generated scenes.
        data_format: How they are laid out otherwise: `folder` as `FolderDataset` reads them, or one of `FORMATS`.
        ignored_class: Class in the files of segmentation and parts that means "no label".
        derive_edges: Whether edges are the borders of segmentation.
    """

    name: str
    tasks: tuple[Task, ...]
    images: Mapping[str, int | None]
    num_train_epochs: int
    batch_size: int
    source: str
    image_size: tuple[int, int] | None = None
    encoder_size: int | None = None
    figures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    test_split: str = "test"
    generated: bool = False
    data_format: str = "folder"
    ignored_class: int = IGNORE_INDEX
    derive_edges: bool = False

    def __post_init__(self):
        directions = {task.name: task.metric().higher_is_better for task in self.tasks}
        for task, names in self.figures.items():
            for name in names:
                if name not in directions.get(task, {}):
                    raise ValueError(f"figures of {self.name!r} name {name!r} of task {task!r}; there is no such one")
        if self.generated and any(self.images[split] != self.images["train"] // 8 for split in ("val", "test")):
            raise ValueError(f"images of {self.name!r} are {self.images}; allowed: an eighth for val and test")

    @property
    def higher_is_better(self) -> dict[str, dict[str, bool]]:
        """Task → figure → direction, of the figures that enter table and Δm; each task's primary one first."""
        directions = {task.name: task.metric().higher_is_better for task in self.tasks}
        return {
            task: {name: directions[task][name] for name in self.figures.get(task, directions[task])}
            for task in directions
        }

    @property
    def folders(self) -> dict[str, str]:
        """Split (`train`, `val`, `test`) → its folder, of the splits that have images."""
        names = {"train": "train", "val": "val", "test": self.test_split}
        return {split: folder for split, folder in names.items() if self.images[split] != 0}

    def train_arguments(self) -> dict[str, Any]:
        """What the protocol asks of `recipes/train.py`, by argument, without where the data is."""
        arguments = {
            "tasks": [f"{task.name}={task.kind}:{task.out_channels}" for task in self.tasks],
            "loss_weights": [f"{task.name}={default_weight(task.kind):g}" for task in self.tasks],
            "val_split": self.folders.get("val"),
            "test_split": self.test_split,
            "num_train_epochs": self.num_train_epochs,
            "per_device_train_batch_size": self.batch_size,
            "image_size": self.encoder_size,
            "num_images": self.images["train"] if self.generated else None,
            "ignored_class": self.ignored_class,
            "derive_edges": self.derive_edges,
            "data_format": None if self.data_format == "folder" else [self.data_format],
        }
        return {name: value for name, value in arguments.items() if value is not None}

    def check_data_root(self, data_root: str | None) -> None:
        """Raise ValueError if the protocol needs a folder and there is none, or has no use for one."""
        if self.generated and data_root is not None:
            raise ValueError(f"`data_root` is {data_root!r}; the scenes of protocol {self.name!r} are generated")
        if not self.generated and data_root is None:
            tasks = ", ".join(task.name for task in self.tasks)
            what = f"{self.data_format} as it is published"
            if self.data_format == "folder":
                splits = ", ".join(self.folders.values())
                what = f"a folder with <split>/image and <split>/<task> for the splits {splits} and the tasks {tasks}"
            raise ValueError(f"protocol {self.name!r} needs `data_root`: {what} ({self.source})")

    def check_split(self, split: str, dataset: Sized) -> None:
        """Raise ValueError unless a split (`train`, `val` or `test`) has the protocol's images.

        Their number is compared, and the first one's size, so that other data does not get the protocol's name.
        """
        if self.images[split] not in (None, len(dataset)):
            raise ValueError(f"split {split!r} has {len(dataset)} images; {self.name!r} has {self.images[split]}")
        size = tuple(dataset[0]["image"].shape[1:])
        if self.image_size is not None and size != self.image_size:
            raise ValueError(f"split {split!r} has images of {size}; {self.name!r} has {self.image_size} pixels")


_SEGMENTATION_13 = make_task("segmentation", 13)
_DEPTH, _NORMALS, _EDGES = make_task("depth", 1), make_task("normals", 3), make_task("edges", 1)
_PASCAL = (make_task("segmentation", 21), make_task("parts", 7))
_SCENES = {"train": 1024, "val": 128, "test": 128}
_F_ALONE = {"edges": ("ods_f",)}  # their loss says how sure a prediction is, not how good
_SCENE_SIZE = 64  # pixels; as many images as possible for the time

SYNTHETIC_3 = Protocol(
    name="synthetic-3",
    tasks=(make_task("segmentation", 10), _DEPTH, _NORMALS),
    images=_SCENES,
    num_train_epochs=3,
    batch_size=4,
    source="generated scenes of `SyntheticScenes`",
    encoder_size=_SCENE_SIZE,
    generated=True,
)

SYNTHETIC_6 = replace(
    SYNTHETIC_3,
    name="synthetic-6",
    tasks=(*SYNTHETIC_3.tasks, _EDGES, make_task("saliency", 1), make_task("parts", 9)),
    images={"train": 512, "val": 64, "test": 64},  # twice the tasks, hence half the images in the same time
    source="generated scenes of `SyntheticScenes`, all six tasks",
    figures=_F_ALONE,
)

# Class 11 is "void". Edges are the borders between classes, hence no independent annotation; along void they are
# unknown. Copies of the data are split in several ways: figures of two folders are not compared.
CAMVID_2 = Protocol(
    name="camvid-2",
    tasks=(make_task("segmentation", 11), _EDGES),
    images={"train": None, "val": 0, "test": None},
    num_train_epochs=8,
    batch_size=4,
    source="CamVid with 11 classes, in the folder's own split; its `val` is the test split here",
    image_size=(360, 480),
    encoder_size=96,
    figures=_F_ALONE,
    test_split="val",
    ignored_class=11,
    derive_edges=True,
)

# The split named `val` is the one that all papers report on, so it is the test split here and chooses nothing.
NYUV2_13 = Protocol(
    name="nyuv2-13",
    tasks=(_SEGMENTATION_13, _DEPTH, _NORMALS),
    images={"train": 795, "val": 0, "test": 654},
    num_train_epochs=200,
    batch_size=4,
    source="NYUv2 with 13 classes as preprocessed for MTAN (arXiv:1803.10704)",
    image_size=(288, 384),
    figures={
        "depth": ("absolute_error", "relative_error"),
        "normals": ("mean_angle", "median_angle", "within_11.25", "within_22.5", "within_30"),
    },
    test_split="val",
    data_format="nyuv2-13",
)

# What papers call depth here is inverse depth, not metres; 0 is unknown.
CITYSCAPES_7 = Protocol(
    name="cityscapes-7",
    tasks=(make_task("segmentation", 7), make_task("inverse_depth", 1, "depth")),
    images={"train": 2975, "val": 0, "test": 500},
    num_train_epochs=200,
    batch_size=8,
    source="Cityscapes with 7 classes as preprocessed for MTAN (arXiv:1803.10704)",
    image_size=(128, 256),
    figures={"inverse_depth": ("absolute_error", "relative_error")},
    test_split="val",
    data_format="cityscapes-7",
)

# Saliency by mIoU, normals by the mean angle alone. Labels of both are predictions of other networks. The papers' mIoU
# is the salient class's alone, averaged over images, at the best threshold; that of `SaliencyMetric` is the mean of
# both classes over all pixels at threshold 0.5, hence another figure.
PASCAL_MTLORA = Protocol(
    name="pascal-mtlora",
    tasks=(*_PASCAL, make_task("saliency", 1), _NORMALS),
    images={"train": 4998, "val": 0, "test": 5105},
    num_train_epochs=300,
    batch_size=32,
    source="PASCAL-Context as in MTLoRA (arXiv:2403.20320)",
    figures={"segmentation": ("miou",), "saliency": ("miou",), "normals": ("mean_angle",)},
    test_split="val",
    data_format="pascal-context",
)

# Saliency by maxF, and edges. Papers have odsF of the BSDS benchmark's MATLAB code; `EdgesMetric` says how ours
# differs. 16 epochs are the 40 000 steps of two images of InvPT's configuration.
PASCAL_INVPT = Protocol(
    name="pascal-invpt",
    tasks=(*_PASCAL, make_task("saliency", 2), _NORMALS, _EDGES),
    images={"train": 4998, "val": 0, "test": 5105},
    num_train_epochs=16,
    batch_size=2,
    source="PASCAL-Context as in InvPT (arXiv:2203.07997)",
    figures={
        "segmentation": ("miou",),
        "saliency": ("max_f",),
        "normals": ("mean_angle",),
        "edges": ("ods_f",),
    },
    test_split="val",
    data_format="pascal-context",
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (SYNTHETIC_3, SYNTHETIC_6, CAMVID_2, NYUV2_13, CITYSCAPES_7, PASCAL_MTLORA, PASCAL_INVPT)
}
"""The protocols by name."""
