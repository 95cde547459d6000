"""Images and labels from folders of files.

=========  ==========================================================================================================
classes    segmentation, edges, saliency, parts: one-channel png of class ids, or integer npy (H, W)
depth      16-bit png in units of ``depth_scale`` metres (a millimetre by default), or npy (H, W) in metres; 0 unknown
normals    npy (3, H, W) or (H, W, 3) of unit vectors, 0 unknown; or 8-bit RGB png of 127.5 · (1 + vector), where
           vectors shorter than 0.1, such as the grey (128, 128, 128), are unknown and all others are renormalised
=========  ==========================================================================================================

Class ids count from 0, and 255 is ignored; of edges and saliency 1 is the positive class. A file of theirs that holds
255 and nothing but 0 and 255 looks like a white-on-black mask: it is refused unless ``ignored_classes`` names 255.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ..losses import IGNORE_INDEX
from ..tasks import Task
from .bad_samples import reading
from .edges import boundaries
from .values import IMAGE_MODES, IMAGE_SUFFIXES, image_of, to_array, vectors_of

LABEL_SUFFIXES = (".png", ".npy")
_SEGMENTATION = "segmentation"
_BINARY_KINDS = ("edges", "saliency")


class FolderDataset(torch.utils.data.Dataset):
    """Samples (see ``peft_talora.data``) from ``root/split/image/*`` and one folder per task beside ``image``.

    Files belong together by their stem, and samples are in the order of stems. An image may lack the labels of some
    tasks, not of all (but see ``allow_unlabelled``). Files are checked when they are read: what cannot be read, or has
    values that are not allowed, ends in a `BadSample` that names the file. Nothing is unpickled.

    Args:
        root: folder of the dataset.
        split: folder in ``root``, such as train or val.
        tasks: what to read; each task's folder has its name. Without any, samples have no labels.
        derive_edges: where a task of kind edges has no folder, make its labels from the folder of the first of
            ``tasks`` of kind segmentation, or else from a folder named ``segmentation``: boundaries between classes,
            and 255 along what is ignored.
        ignored_classes: folder name → class id of its files that means "no label", if not 255; it becomes 255.
            Giving 255 for edges or saliency says that 255 is meant so even in files of 0 and 255 only.
        depth_scale: metres per unit of a depth png.
        allow_unlabelled: take images without a label of any task as well, with a label of the first one that has no
            labelled pixel: the images are then the same ones whichever tasks are read.

    Raises:
        ValueError: a folder is missing or empty, stems are not unique, or an image has no label of any task.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        tasks: Sequence[Task],
        derive_edges: bool = False,
        ignored_classes: Mapping[str, int] | None = None,
        depth_scale: float = 0.001,
        allow_unlabelled: bool = False,
    ):
        folder = Path(root) / split
        self.tasks, self.depth_scale = tuple(tasks), depth_scale
        self.ignored_classes = dict(ignored_classes or {})
        self.images = _list_files(folder / "image", IMAGE_SUFFIXES)
        if not self.images:
            raise ValueError(
                f"{folder / 'image'} holds no images; allowed: files ending in {', '.join(IMAGE_SUFFIXES)}"
            )
        self.derived = {
            t.name for t in self.tasks if derive_edges and t.kind == "edges" and not (folder / t.name).is_dir()
        }
        segmentations = [t.name for t in self.tasks if t.kind == "segmentation"]
        self.derived_from = segmentations[0] if segmentations else _SEGMENTATION
        self._check_ignored_classes()
        self.labels = {t.name: _list_files(folder / self._folder_name(t), LABEL_SUFFIXES) for t in self.tasks}
        self.names = sorted(self.images)
        for name in self.names:
            if not allow_unlabelled and not any(name in files for files in self.labels.values()):
                raise ValueError(f"{self.images[name]} has no label of any task; tasks: {', '.join(self.labels)}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        name = self.names[index]
        with reading(self.images[name]):
            source = str(self.images[name])
            image = torch.from_numpy(image_of(to_array(self.images[name], IMAGE_MODES, source), source))
        labels = {}
        for task in self.tasks:
            path = self.labels[task.name].get(name)
            if path is not None:
                with reading(path):
                    label = self._read_label(task, path)
                    task.check_label(label, tuple(image.shape[1:]), source=str(path))
                labels[task.name] = label
        if not labels and self.tasks:
            labels = {self.tasks[0].name: self.tasks[0].empty_label(tuple(image.shape[1:]))}
        return {"image": image, "labels": labels, "name": name}

    def _folder_name(self, task):
        return self.derived_from if task.name in self.derived else task.name

    def _check_ignored_classes(self):
        folders = sorted({self._folder_name(task) for task in self.tasks})
        for name in self.ignored_classes:
            if name not in folders:
                raise ValueError(f"ignored_classes names {name!r}; allowed: {', '.join(folders)}")

    def _read_label(self, task, path):
        if task.label_channels:
            return torch.from_numpy(_read_vectors(path))
        if task.label_dtype.is_floating_point:
            return torch.from_numpy(_read_depth(path, self.depth_scale))
        classes = _read_classes(path)
        ignored = self.ignored_classes.get(self._folder_name(task), IGNORE_INDEX)
        if task.name in self.derived:
            return torch.from_numpy(boundaries(classes, ignored).astype(np.int64))
        if task.kind in _BINARY_KINDS and self.ignored_classes.get(task.name) != IGNORE_INDEX:
            _refuse_white_on_black(classes, task.name, path)
        if ignored != IGNORE_INDEX:
            classes = np.where(classes == ignored, IGNORE_INDEX, classes)
        return torch.from_numpy(classes.astype(np.int64))


def _list_files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files by stem."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is missing; expected: <root>/<split>/image and beside it one folder per task, by its name"
        )
    files = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes:
            continue
        if path.stem in files:
            raise ValueError(
                f"{path} and {files[path.stem].name} have the same stem; stems must be unique in a folder"
            )
        files[path.stem] = path
    return files


def _read_classes(path):
    classes = to_array(path, ("L", "P"), str(path))
    if not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(f"{path} holds {classes.dtype}; allowed: integer class ids")
    return classes


def _read_depth(path, scale):
    depth = to_array(path, ("I;16", "I;16B", "I"), str(path)).astype(np.float32)
    return depth if path.suffix.lower() == ".npy" else depth * np.float32(scale)


def _refuse_white_on_black(classes, task_name, path):
    """Raise ValueError for 0 and 255 only, which would silently load as 0 and ignored."""
    if (classes == IGNORE_INDEX).any() and np.isin(classes, (0, IGNORE_INDEX)).all():
        raise ValueError(
            f"{path}: label of task {task_name!r} holds {IGNORE_INDEX} and nothing but 0 and {IGNORE_INDEX}; allowed: "
            f"1 for the positive class, where {IGNORE_INDEX} means ignored. If {IGNORE_INDEX} is meant as ignored "
            f"here, say so by ignored_classes={{{task_name!r}: {IGNORE_INDEX}}}"
        )


def _read_vectors(path):
    vectors = to_array(path, ("RGB",), str(path))
    if path.suffix.lower() != ".npy":
        return vectors_of(vectors, str(path))
    vectors = vectors.astype(np.float32)
    return np.ascontiguousarray(vectors.transpose(2, 0, 1)) if vectors.ndim == 3 and vectors.shape[0] != 3 else vectors
