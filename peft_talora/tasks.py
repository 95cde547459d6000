"""What a model predicts: each task is one object with its loss, its metric and what its labels look like.

Axes: B images, C channels, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .losses import (
    IGNORE_INDEX,
    balanced_bce,
    class_ids,
    cosine_loss,
    count_both_classes,
    count_classes,
    count_depth,
    count_normals,
    cross_entropy,
    foreground_probability,
    masked_l1,
    unit_vectors,
    wrong_class_ids,
)
from .metrics import DepthMetric, EdgesMetric, Metric, NormalsMetric, PartsMetric, SaliencyMetric, SegmentationMetric


def check_task_name(name: str) -> None:
    """Raise ValueError unless `name` is an identifier that can be a key of both of PyTorch's containers.

    A task's head is in an `nn.ModuleDict` and its parameters may be in an `nn.ParameterDict`, hence no instance of
    either may have an attribute of that name.
    """
    if (
        not isinstance(name, str)
        or not name.isidentifier()
        or name in {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())}
    ):
        raise ValueError(
            f"{name!r} cannot name a task; allowed are Python identifiers that are no attribute of "
            "torch.nn.ModuleDict or torch.nn.ParameterDict (such as 'keys', 'get', 'training' or 'type')."
        )


def check_class_ids(label_HW: Tensor, out_channels: int) -> tuple[Tensor, str]:
    """Say which pixels hold neither a class id nor `IGNORE_INDEX`, and what is allowed; 1 channel tells 2 classes."""
    return wrong_class_ids(label_HW, max(2, out_channels))


def check_metres(label_HW: Tensor, out_channels: int) -> tuple[Tensor, str]:
    """Say which pixels hold no depth, and what is allowed."""
    return ~(label_HW.isfinite() & (label_HW >= 0)), "finite metres above 0, and 0 where unknown"


def check_unit_vectors(label_3HW: Tensor, out_channels: int) -> tuple[Tensor, str]:
    """Say which pixels hold no unit vector (to 1 %), and what is allowed."""
    unit_HW = (label_3HW.float().square().sum(0).sqrt() - 1).abs() <= 1e-2
    return ~unit_HW & (label_3HW != 0).any(0), "vectors of length 1, and the vector 0 where unknown"


@dataclass(frozen=True)
class Task:
    """One dense prediction.

    `make_task` makes those of the six usual kinds; for any other, give a `Task` of your own.

    Attributes:
        name: how model, data and results call it; see `check_task_name`.
        kind: what sort of prediction it is, one of `KINDS` or a word of your own.
        out_channels: C, the channels of the model's logits.
        loss: logits (B, C, H, W) and labels → scalar.
        metric: makes a fresh metric.
        decode: logits (B, C, H, W) → prediction as a label looks: class ids (B, H, W), metres (B, H, W), unit vectors
            (B, 3, H, W); for edges and saliency the probability (B, H, W).
        label_channels: 0 if a label is (H, W), 3 if it is (3, H, W).
        label_dtype: of the labels.
        ignored_label: what a pixel without label holds, in every channel.
        find_wrong: label and C → which pixels (H, W) hold a wrong value, and in words which values are allowed.
        counts: labels → how many pixels (K,) the loss takes its means over. With it, `loss` takes those of a whole
            batch as its third argument, and what it gives of parts adds up. None: a part's loss is weighed by its
            labelled pixels.
    """

    name: str
    kind: str
    out_channels: int
    loss: Callable[..., Tensor]
    metric: Callable[[], Metric] = field(compare=False)  # a partial differs from its own copy
    decode: Callable[[Tensor], Tensor]
    label_channels: int = 0
    label_dtype: torch.dtype = torch.int64
    ignored_label: float = IGNORE_INDEX
    find_wrong: Callable[[Tensor, int], tuple[Tensor, str]] = check_class_ids
    counts: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self):
        check_task_name(self.name)
        if self.out_channels < 1:
            raise ValueError(f"out_channels of task {self.name!r} is {self.out_channels}; allowed: 1 or more")

    def empty_label(self, size: tuple[int, int]) -> Tensor:
        """Label of `size` (height, width) without any labelled pixel: stands for a missing one, and pads."""
        return torch.full(self._label_shape(size), self.ignored_label, dtype=self.label_dtype)

    def has_label(self, labels: Tensor) -> Tensor:
        """Say which pixels are labelled: boolean (…, H, W) from (…, H, W), or from (…, 3, H, W) for vectors."""
        labels = labels if self.label_channels else labels.unsqueeze(-3)
        return (labels != self.ignored_label).any(-3) & labels.isfinite().all(-3)

    def count(self, labels: Tensor) -> Tensor:
        """How many labelled pixels (K,) there are, by what the loss takes means over."""
        return self.has_label(labels).sum()[None] if self.counts is None else self.counts(labels)

    def loss_of_part(self, logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
        """What a part of a batch adds to the loss of the whole.

        Args:
            logits: (B, C, H, W) of the part.
            labels: of the part.
            counts: (K,) of the whole, as `count` gives them, on the same device.
        """
        if self.counts is not None:
            return self.loss(logits, labels, counts)
        share = self.count(labels)[0] / counts[0].where(counts[0] > 0, 1)
        return self.loss(logits, labels) * share

    def check_label(self, label: Tensor, size: tuple[int, int], source: str) -> None:
        """Raise ValueError, naming `source` (a file), unless `label` is one of this task and of `size` in pixels."""
        about = f"{source}: label of task {self.name!r}"
        if label.shape != self._label_shape(size):
            raise ValueError(f"{about} is {tuple(label.shape)}; allowed: {self._label_shape(size)}")
        if label.is_floating_point() != self.label_dtype.is_floating_point:
            raise ValueError(f"{about} is of {label.dtype}; allowed: {self.label_dtype}")
        wrong_HW, allowed = self.find_wrong(label, self.out_channels)
        if wrong_HW.any():
            value = label[..., wrong_HW][..., 0].tolist()
            raise ValueError(f"{about} holds {value}; allowed: {allowed}")

    def _label_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return (self.label_channels, *size) if self.label_channels else tuple(size)


def decode_metres(logits_B1HW: Tensor) -> Tensor:
    """Depth in metres (B, H, W), as predicted."""
    return logits_B1HW[:, 0]


def make_segmentation(name: str, channels: int) -> Task:
    """Semantic segmentation into `channels` classes."""
    _require(channels, 2, IGNORE_INDEX, name, "segmentation")
    metric = partial(SegmentationMetric, channels)
    return Task(name, "segmentation", channels, cross_entropy, metric, class_ids, counts=count_classes)


def make_depth(name: str, channels: int) -> Task:
    """Depth in metres."""
    _require(channels, 1, 1, name, "depth")
    return Task(
        name,
        "depth",
        channels,
        masked_l1,
        DepthMetric,
        decode_metres,
        label_dtype=torch.float32,
        ignored_label=0.0,
        find_wrong=check_metres,
        counts=count_depth,
    )


def make_normals(name: str, channels: int) -> Task:
    """Surface normals."""
    _require(channels, 3, 3, name, "normals")
    return Task(
        name,
        "normals",
        channels,
        cosine_loss,
        NormalsMetric,
        unit_vectors,
        label_channels=3,
        label_dtype=torch.float32,
        ignored_label=0.0,
        find_wrong=check_unit_vectors,
        counts=count_normals,
    )


def make_edges(name: str, channels: int) -> Task:
    """Edges: class 1."""
    _require(channels, 1, 1, name, "edges")
    return Task(name, "edges", channels, balanced_bce, EdgesMetric, foreground_probability, counts=count_both_classes)


def make_saliency(name: str, channels: int) -> Task:
    """What stands out: class 1, from 1 channel (sigmoid) or 2 (softmax)."""
    _require(channels, 1, 2, name, "saliency")
    loss, counts = (balanced_bce, count_both_classes) if channels == 1 else (cross_entropy, count_classes)
    return Task(name, "saliency", channels, loss, SaliencyMetric, foreground_probability, counts=counts)


def make_parts(name: str, channels: int) -> Task:
    """Parts of people or objects, `channels` classes with the background."""
    _require(channels, 2, IGNORE_INDEX, name, "parts")
    metric = partial(PartsMetric, channels)
    return Task(name, "parts", channels, cross_entropy, metric, class_ids, counts=count_classes)


KINDS: dict[str, Callable[[str, int], Task]] = {
    "segmentation": make_segmentation,
    "depth": make_depth,
    "normals": make_normals,
    "edges": make_edges,
    "saliency": make_saliency,
    "parts": make_parts,
}
"""The six usual kinds of task, and what makes a task of each from its name and channels."""


def default_weight(kind: str) -> float:
    """The weight of a task's loss beside other tasks': 4 for normals, whose 1 − cosine is small, and 1 for others.

    These are the weights of the TA-LoRA paper (arXiv 2403.10971) for segmentation, depth and normals.
    """
    return 4.0 if kind == "normals" else 1.0


def make_task(name: str, channels: int, kind: str | None = None) -> Task:
    """Make a task of one of the six usual kinds.

    Args:
        name: the task's own name.
        channels: of the logits: the classes of segmentation and parts, 1 of depth and edges, 3 of normals, 1 or 2 of
            saliency.
        kind: one of `KINDS`; None if it is the name.

    Raises:
        ValueError: the kind is unknown, or the name or channels do not fit.
    """
    kind = name if kind is None else kind
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} of task {name!r} is none of {', '.join(KINDS)}; a Task can be given instead")
    return KINDS[kind](name, channels)


def _require(channels: int, least: int, most: int, name: str, kind: str) -> None:
    if not least <= channels <= most:
        allowed = least if least == most else f"{least} to {most}"
        raise ValueError(f"channels of task {name!r} of kind {kind!r} is {channels}; allowed: {allowed}")
