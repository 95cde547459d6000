"""Samples from rows with named columns: of a table of ``datasets``, or of files that were listed.

A row is a mapping from column to value (see ``peft_talora.data.values``). `Column` says which one a task's labels are
in, and how they are to be translated; with those of all tasks, any data set of the Hub and any folder is read.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ..losses import IGNORE_INDEX
from ..tasks import Task
from .bad_samples import reading
from .values import CLASS_MODES, DEPTH_MODES, IMAGE_MODES, classes_of, image_of, plane_of, to_array, vectors_of

NAME = "name"  # the column of a row's name, where there is one
_ALWAYS_READ = {"column", "read"}
_READ_BY_KIND = {
    "depth": {"scale", "inverse"},
    "normals": {"signs"},
    "edges": {"ignored", "classes", "threshold"},
    "saliency": {"ignored", "classes", "threshold"},
}
_VECTOR_MODES = ("RGB",)
_MASK_MODES = ("1", *CLASS_MODES)


@dataclass(frozen=True)
class Column:
    """Where the labels of a task are, and what they are translated by.

    Attributes:
        column: its name.
        scale: of depth: metres per unit, which is 1 where it is in metres.
        ignored: of classes: ids that mean "no label".
        classes: of classes: id in the column → id of the task; all others are ignored. None: they stay as they are.
        threshold: of edges and saliency: what is above it is 1, the rest 0, but for ``ignored``. None: the column
            holds 0, 1 and 255.
        signs: of normals: by what their x, y and z are multiplied to point as `peft_talora.data` says.
        inverse: of depth: the column holds disparity or inverse depth, which grow where depth shrinks.
        read: value → array, or what becomes one, where it is neither an array nor an image.

    Raises:
        ValueError: one of them is of another form.
    """

    column: str
    scale: float = 1.0
    ignored: tuple[int, ...] = ()
    classes: Mapping[int, int] | None = None
    threshold: float | None = None
    signs: tuple[int, int, int] = (1, 1, 1)
    inverse: bool = False
    read: Callable[[Any], np.ndarray | None] | None = None

    def __post_init__(self):
        ids = [*self.ignored] if isinstance(self.ignored, tuple) else [self.ignored]
        if isinstance(self.classes, Mapping):
            ids += [*self.classes.keys(), *self.classes.values()]
        for name, right, allowed in (
            ("column", isinstance(self.column, str), "a name"),
            ("scale", _is_number(self.scale) and self.scale > 0, "a positive number"),
            ("ignored", isinstance(self.ignored, tuple), "a list of ids"),
            ("classes", self.classes is None or isinstance(self.classes, Mapping), "a mapping from id to id"),
            ("ignored and classes", all(type(number) is int for number in ids), "ids that are whole numbers"),
            ("threshold", self.threshold is None or _is_number(self.threshold), "a number"),
            ("threshold and classes", self.threshold is None or self.classes is None, "one of them"),
            ("signs", len(self.signs) == 3 and all(sign in (1, -1) for sign in self.signs), "three of 1 and -1"),
            ("inverse", isinstance(self.inverse, bool), "true or false"),
        ):
            if not right:
                value = ", ".join(repr(getattr(self, one)) for one in name.split(" and "))
                raise ValueError(f"{name} of the column {self.column!r}: {value}; allowed: {allowed}")

    def check(self, task: Task) -> None:
        """Raise ValueError for what the labels of the task are not translated by."""
        read = _READ_BY_KIND.get(task.kind, {"ignored", "classes"})
        for one in fields(self):
            if one.name in _ALWAYS_READ | read or getattr(self, one.name) == one.default:
                continue
            raise ValueError(
                f"task {task.name!r}: {one.name} of the column {self.column!r} is {getattr(self, one.name)!r}, but "
                f"labels of {task.kind} are translated by {', '.join(sorted(read))} alone"
            )

    def label(self, task: Task, value: Any, source: str) -> torch.Tensor | None:
        """The label of ``task`` that a value is; None where there is none. ``source`` names it in errors."""
        if self.read is not None:
            value = self.read(value)
            if value is None:
                return None
        if task.label_channels:
            vectors = vectors_of(to_array(value, _VECTOR_MODES, source), source)
            return torch.from_numpy(vectors * np.array(self.signs, dtype=np.float32)[:, None, None])
        if task.label_dtype.is_floating_point:
            depth = plane_of(to_array(value, DEPTH_MODES, source), source).astype(np.float32)
            return torch.from_numpy(depth * np.float32(self.scale))
        if self.threshold is not None:
            plane = plane_of(to_array(value, _MASK_MODES, source), source)
            if not np.isfinite(plane).all():
                raise ValueError(f"{source} holds {plane[~np.isfinite(plane)][0]}; allowed: finite numbers")
            above = (plane > self.threshold).astype(np.int64)
            return torch.from_numpy(np.where(np.isin(plane, self.ignored), IGNORE_INDEX, above))
        return torch.from_numpy(self._translate(classes_of(to_array(value, CLASS_MODES, source), source)))

    def _translate(self, ids: np.ndarray) -> np.ndarray:
        labels = ids.copy()
        if self.classes is not None:
            labels.fill(IGNORE_INDEX)
            for theirs, ours in self.classes.items():
                labels[ids == theirs] = ours
        labels[np.isin(ids, self.ignored)] = IGNORE_INDEX
        return labels


class ColumnDataset(torch.utils.data.Dataset):
    """Samples (see ``peft_talora.data``) of rows.

    A row without a value for a task, or with None, has no label of it. Values are checked when they are read: what is
    not allowed ends in a `BadSample` that names row and column, or the file.

    Args:
        rows: a sequence of mappings from column to value, such as a ``datasets.Dataset``.
        tasks: whose labels to read. Without any, samples have no labels.
        columns: task → where they are.
        image: column of the images.
        source: what the rows are called in errors.

    Raises:
        ValueError: a task has no column.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tasks: Sequence[Task],
        columns: Mapping[str, Column],
        image: str = "image",
        source: str = "rows",
    ):
        check_tasks(tasks, columns, source)
        self.rows, self.tasks, self.columns = rows, tuple(tasks), dict(columns)
        self.image, self.source = image, source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} rows")
        return self.sample(self.rows[index], index)

    def sample(self, row: Mapping[str, Any], index: int) -> dict:
        """The sample that a row is; ``index`` names it where it has no name."""
        name = str(row.get(NAME, index))
        image = self._read(row, index, self.image, self._image)
        labels = {}
        for task in self.tasks:
            column = self.columns[task.name]
            if row.get(column.column) is None:
                continue
            read = partial(self._label, task, column, tuple(image.shape[1:]))
            label = self._read(row, index, column.column, read)
            if label is not None:
                labels[task.name] = label
        if not labels and self.tasks:
            labels = {self.tasks[0].name: self.tasks[0].empty_label(tuple(image.shape[1:]))}
        return {"image": image, "labels": labels, "name": name}

    def _read(self, row, index, column, read):
        value = row.get(column)
        file = value[0] if isinstance(value, tuple) else value
        source = str(file) if isinstance(file, Path) else f"{self.source}, row {index}, column {column!r}"
        with reading(source):
            if value is None:
                raise ValueError(f"{source} is missing; the row has {', '.join(row)}")
            return read(value, source)

    @staticmethod
    def _image(value, source):
        return torch.from_numpy(image_of(to_array(value, IMAGE_MODES, source), source))

    @staticmethod
    def _label(task, column, size, value, source):
        label = column.label(task, value, source)
        if label is not None:
            task.check_label(label, size, source=source)
        return label


def check_tasks(tasks: Sequence[Task], columns: Mapping[str, Column], source: str) -> None:
    """Raise ValueError for a task that has no column, or one that says what labels of its kind do not heed."""
    if missing := [task.name for task in tasks if task.name not in columns]:
        raise ValueError(f"{source} has no labels of {', '.join(missing)}; it has those of {', '.join(columns)}")
    for task in tasks:
        columns[task.name].check(task)


def read_column_map(file: str | Path) -> tuple[dict[str, Column], str]:
    """Columns of the tasks, and that of the images, from a YAML file.

    .. code-block:: yaml

        image: rgb                        # "image" where it is left out
        tasks:
          depth: {column: depth_map, scale: 0.001}
          disparity: {column: disparity, inverse: true}
          segmentation: {column: mask, ignored: [0], classes: {1: 0, 7: 1}}

    Raises:
        ValueError: the file has another form; the message names what is wrong.
    """
    allowed = "`image` and `tasks`, in which every task has a `column`"
    with open(file) as handle:
        try:
            found = yaml.safe_load(handle)
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is no YAML: {error}") from error
    if (
        not isinstance(found, Mapping)
        or not isinstance(found.get("tasks"), Mapping)
        or set(found) - {"image", "tasks"}
    ):
        raise ValueError(f"{file} is no map of columns; allowed: {allowed}")
    columns = {}
    for task, entry in found["tasks"].items():
        known = set(Column.__dataclass_fields__) - {"read"}
        if not isinstance(entry, Mapping) or "column" not in entry or set(entry) - known:
            raise ValueError(f"{file}: task {task!r} is {entry!r}; allowed: {', '.join(sorted(known))}; {allowed}")
        try:
            columns[task] = Column(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: task {task!r}: {error}") from error
    return columns, found.get("image", "image")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
