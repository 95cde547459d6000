"""One metric per kind of task, and Δm, which sets them against single-task runs.

Axes: B images, C channels, H W pixels.

A metric pools over the pixels of the whole split: its state is sums, counts and histograms, from which `compute`
makes the figures at the end. Adding up the states of several processes gives the metric of all their images.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import IGNORE_INDEX, check_shapes, class_ids, foreground_probability, has_depth, has_normal, unit_vectors


class Metric(ABC):
    """Sums over the pixels of a split and the figures made from them.

    A figure for which no pixel was seen is NaN. Unlabelled pixels change nothing.

    Attributes:
        higher_is_better: the figures `compute` returns, in order, the primary one first.
        state: float64 CPU tensors; the state of two sets of images together is the sum of their states.
    """

    higher_is_better: dict[str, bool]

    def __init__(self, channels: Collection[int], label_channels: int = 0, **shapes: tuple[int, ...]):
        self._channels, self._label_channels, self._shapes = channels, label_channels, shapes
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.state = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in self._shapes.items()}

    @torch.no_grad()
    def update(self, logits_BCHW: Tensor, labels: Tensor) -> None:
        """Take in a batch: logits at the size of the labels, and labels as the loss of the same kind takes them."""
        check_shapes(logits_BCHW, labels, self._channels, self._label_channels)
        self.merge(self._count(logits_BCHW.float(), labels))

    def merge(self, other_state: Mapping[str, Tensor]) -> None:
        """Take in the images of another metric of the same kind, given by its `state`."""
        shapes = {key: tuple(value.shape) for key, value in other_state.items()}
        if shapes != self._shapes:
            raise ValueError(f"other_state holds {shapes}; {type(self).__name__} needs {self._shapes}")
        for key, value in other_state.items():
            self.state[key] += value.cpu().double()

    def compute(self) -> dict[str, float]:
        """Figures over all images taken in since the start or the last `reset`."""
        return {name: float(figure) for name, figure in zip(self.higher_is_better, self._figures(), strict=True)}

    @abstractmethod
    def _count(self, logits_BCHW: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """State of one batch alone."""

    @abstractmethod
    def _figures(self) -> Sequence[Tensor | float]:
        """What `compute` returns, in the order of `higher_is_better`."""


class _ConfusionMetric(Metric):
    """Counts how often each class (rows) was taken for each class (columns)."""

    def __init__(self, num_classes: int):
        super().__init__(channels=(num_classes,), confusion=(num_classes, num_classes))

    def _count(self, logits_BCHW: Tensor, labels_BHW: Tensor) -> dict[str, Tensor]:
        C, valid_BHW = logits_BCHW.shape[1], labels_BHW != IGNORE_INDEX
        pairs = labels_BHW[valid_BHW].long() * C + class_ids(logits_BCHW)[valid_BHW]
        return {"confusion": pairs.bincount(minlength=C * C).view(C, C)}


class SegmentationMetric(_ConfusionMetric):
    """Overlap of `num_classes` classes.

    - miou: intersection over union, mean over the classes that occur in label or prediction (0–1, higher is better)
    - pixel_accuracy: share of pixels given their class (0–1, higher is better)
    """

    higher_is_better = {"miou": True, "pixel_accuracy": True}

    def _figures(self) -> Sequence[Tensor | float]:
        confusion = self.state["confusion"]
        return _mean_iou(confusion), confusion.trace() / confusion.sum()


class PartsMetric(_ConfusionMetric):
    """Overlap of `num_classes` parts: the miou of `SegmentationMetric` alone."""

    higher_is_better = {"miou": True}

    def _figures(self) -> Sequence[Tensor | float]:
        return (_mean_iou(self.state["confusion"]),)


class DepthMetric(Metric):
    """Errors of predicted depth p against depth l, both in metres, as in arXiv:1406.2283.

    - absolute_error: mean of |p − l| (m, lower is better)
    - relative_error: mean of |p − l| / l (lower is better)
    - rmse: root of the mean of (p − l)² over all pixels of the split (m, lower is better)
    - delta_1.25: share with max(p/l, l/p) < 1.25, where p ≤ 0 is a miss (0–1, higher is better)
    """

    higher_is_better = {"absolute_error": False, "relative_error": False, "rmse": False, "delta_1.25": True}

    def __init__(self):
        super().__init__(channels=(1,), pixels=(), absolute=(), relative=(), squared=(), close=())

    def _count(self, logits_B1HW: Tensor, labels_BHW: Tensor) -> dict[str, Tensor]:
        valid_BHW = has_depth(labels_BHW)
        p, label = logits_B1HW[:, 0][valid_BHW], labels_BHW[valid_BHW].float()
        error = (p - label).abs()
        return {
            "pixels": valid_BHW.sum(),
            "absolute": error.sum(),
            "relative": (error / label).sum(),
            "squared": error.square().sum(),
            "close": ((p < 1.25 * label) & (label < 1.25 * p)).sum(),
        }

    def _figures(self) -> Sequence[Tensor | float]:
        mean = {key: value / self.state["pixels"] for key, value in self.state.items()}
        return mean["absolute"], mean["relative"], mean["squared"].sqrt(), mean["close"]


class NormalsMetric(Metric):
    """Angle between predicted normals, of any length, and true ones, as in arXiv:1411.4734.

    - mean_angle: a prediction of length 0 is 90° off (degrees, 0–180, lower is better)
    - median_angle: from a histogram of 0.01° bins, interpolated inside the bin (degrees, 0–180, lower is better)
    - within_11.25, within_22.5, within_30: share of pixels with a smaller angle (0–1, higher is better)
    """

    _LIMITS = {"within_11.25": 11.25, "within_22.5": 22.5, "within_30": 30.0}
    higher_is_better = {"mean_angle": False, "median_angle": False, **dict.fromkeys(_LIMITS, True)}
    _BINS = 180 * 100

    def __init__(self):
        super().__init__(channels=(3,), label_channels=3, angle=(), within=(3,), histogram=(self._BINS,))

    def _count(self, logits_B3HW: Tensor, labels_B3HW: Tensor) -> dict[str, Tensor]:
        p_B3HW, label_B3HW = unit_vectors(logits_B3HW), unit_vectors(labels_B3HW)
        # Kahan's half-angle form: unlike the arc cosine it keeps float32's digits near 0° and 180°.
        apart_BHW, along_BHW = ((p_B3HW + sign * label_B3HW).square().sum(1).sqrt() for sign in (-1, 1))
        angle = 2 * torch.atan2(apart_BHW, along_BHW)[has_normal(labels_B3HW)].rad2deg()
        return {
            "angle": angle.sum(),
            "within": torch.stack([(angle < limit).sum() for limit in self._LIMITS.values()]),
            "histogram": _histogram(angle.nan_to_num(180.0) / 180, self._BINS),
        }

    def _figures(self) -> Sequence[Tensor | float]:
        histogram = self.state["histogram"]
        pixels, below = histogram.sum(), histogram.cumsum(0)
        middle = torch.searchsorted(below, pixels / 2)
        median = (middle + 1 - (below[middle] - pixels / 2) / histogram[middle]) * 180 / self._BINS
        return self.state["angle"] / pixels, median, *(self.state["within"] / pixels)


class EdgesMetric(Metric):
    """F-measure of edges at the threshold that suits the whole split best, and the balanced loss.

    - ods_f: largest of 2PR / (P + R) over the thresholds 0.01, 0.02, …, 0.99 (0–1, higher is better)
    - loss: `balanced_bce` of all pixels of the split as one batch (nats, lower is better)

    P is the share of pixels at or above the threshold that have a labelled edge pixel near, R the share of labelled
    edge pixels that have a pixel at or above the threshold near. Near means in the square of 2·radius + 1 pixels
    around it, where radius is `tolerance` times the diagonal of the labels, rounded, and at least 1; images of several
    sizes in one batch are padded to the largest, whose diagonal it is. Unlabelled pixels neither count nor match.
    Without a labelled edge pixel ods_f is NaN. The MATLAB code of the BSDS benchmark thins the prediction and pairs
    pixels one to one; neither is done here: figures cannot be compared with those it gives.
    """

    higher_is_better = {"ods_f": True, "loss": False}
    _BINS = 100

    def __init__(self, tolerance: float = 0.0075):
        if tolerance < 0:
            raise ValueError(f"tolerance is {tolerance}; allowed: 0 or more, as a share of the image diagonal")
        self.tolerance = tolerance
        bins = (self._BINS,)
        super().__init__(channels=(1,), right=bins, wrong=bins, found=bins, positive_loss=(), negative_loss=())

    def _count(self, logits_B1HW: Tensor, labels_BHW: Tensor) -> dict[str, Tensor]:
        valid_BHW, edge_BHW = labels_BHW != IGNORE_INDEX, labels_BHW == 1
        p_BHW = foreground_probability(logits_B1HW)
        radius = max(1, round(self.tolerance * math.hypot(*labels_BHW.shape[1:])))
        near_edge_BHW = _largest_near(edge_BHW.float(), radius) > 0
        near_p_BHW = _largest_near(p_BHW.where(valid_BHW, 0), radius)
        loss_BHW = F.binary_cross_entropy_with_logits(logits_B1HW[:, 0], edge_BHW.float(), reduction="none")
        return {
            "right": _histogram(p_BHW[valid_BHW & near_edge_BHW], self._BINS),
            "wrong": _histogram(p_BHW[valid_BHW & ~near_edge_BHW], self._BINS),
            "found": _histogram(near_p_BHW[edge_BHW], self._BINS),
            "positive_loss": loss_BHW[edge_BHW].sum(),
            "negative_loss": loss_BHW[valid_BHW & ~edge_BHW].sum(),
        }

    def _figures(self) -> Sequence[Tensor | float]:
        right, wrong, found = (_at_or_above(self.state[key]) for key in ("right", "wrong", "found"))
        edges, pixels = self.state["found"].sum(), (self.state["right"] + self.state["wrong"]).sum()
        precision, recall = right / (right + wrong), found / edges
        f = (2 * precision * recall / (precision + recall)).nan_to_num(0)  # NaN where nothing is predicted or right
        means = torch.stack([self.state["positive_loss"] / edges, self.state["negative_loss"] / (pixels - edges)])
        occurs = torch.stack([edges, pixels - edges]) > 0
        return f.max() if edges else math.nan, means[occurs].mean()


class SaliencyMetric(Metric):
    """Match of salient pixels, predicted by 1 channel (sigmoid) or 2 (softmax).

    - max_f: largest of (1 + β²)PR / (β²P + R), β² = 0.3, over thresholds 1/256, …, 255/256 (0–1, higher is better)
    - miou: of salient and background at threshold 0.5, mean over those that occur (0–1, higher is better)

    P and R are precision and recall over all pixels of the split; without a salient pixel max_f is NaN. β² is
    that of Achanta et al., "Frequency-tuned salient region detection" (CVPR 2009).
    """

    higher_is_better = {"max_f": True, "miou": True}
    _BETA_SQUARED = 0.3
    _BINS = 256

    def __init__(self):
        super().__init__(channels=(1, 2), background=(self._BINS,), salient=(self._BINS,))

    def _count(self, logits_BCHW: Tensor, labels_BHW: Tensor) -> dict[str, Tensor]:
        p_BHW = foreground_probability(logits_BCHW)
        return {
            "background": _histogram(p_BHW[labels_BHW == 0], self._BINS),
            "salient": _histogram(p_BHW[labels_BHW == 1], self._BINS),
        }

    def _figures(self) -> Sequence[Tensor | float]:
        background, salient = self.state["background"], self.state["salient"]
        right, predicted = _at_or_above(salient), _at_or_above(background + salient)
        f = (1 + self._BETA_SQUARED) * right / (self._BETA_SQUARED * salient.sum() + predicted)
        confusion = torch.stack([background, salient]).view(2, 2, self._BINS // 2).sum(-1)
        return f.max() if salient.any() else math.nan, _mean_iou(confusion)


def metric_path(kind: str) -> str:
    """The folder of a kind's metric as a module of the library `evaluate`: `evaluate.load(metric_path("depth"))`.

    Args:
        kind: segmentation, parts, depth, normals, edges or saliency.

    Raises:
        ValueError: for another one.
    """
    folder = Path(__file__).parent / "evaluate_modules"
    kinds = sorted(path.parent.name for path in folder.glob("*/*.py"))
    if kind not in kinds:
        raise ValueError(f"kind {kind!r} is none of {', '.join(kinds)}")
    return str(folder / kind)


def delta_m(
    results: Mapping[str, Mapping[str, float]],
    baseline: Mapping[str, Mapping[str, float]],
    higher_is_better: Mapping[str, Mapping[str, bool]],
) -> float:
    """Mean relative gain over a baseline, in percent; above 0 is better than the baseline (arXiv:1904.08918).

    Δm = (100 / T) · Σ_t (1 / M_t) · Σ_m ± (result − baseline) / baseline, over the T tasks of `results` and the M_t
    figures of each; + where higher is better, − where lower is.

    Args:
        results: task → figure → value.
        baseline: the same of the runs to compare with; it may hold more, and no 0.
        higher_is_better: task → figure → direction, as in `Metric.higher_is_better`; it may hold more.
    """
    if not results or not all(results.values()):
        raise ValueError(f"results are {results}; allowed: one task or more, with one figure or more each")
    gain = 0.0
    for task, figures in results.items():
        for figure, value in figures.items():
            for name, table in (("baseline", baseline), ("higher_is_better", higher_is_better)):
                if figure not in table.get(task, {}):
                    raise ValueError(f"{name} lacks {figure!r} of task {task!r}")
            reference = baseline[task][figure]
            if reference == 0:
                raise ValueError(f"baseline of {task!r} has {figure!r} = 0; a relative gain needs another value")
            sign = 1 if higher_is_better[task][figure] else -1
            gain += sign * (value - reference) / reference / len(figures)
    return 100 * gain / len(results)


def _histogram(shares: Tensor, bins: int) -> Tensor:
    """Count values from 0 to 1 in equal bins; a NaN counts as 0."""
    return (shares.nan_to_num(0) * bins).long().clamp(max=bins - 1).bincount(minlength=bins)


def _at_or_above(histogram: Tensor) -> Tensor:
    """Count the values at or above each edge between two bins."""
    return histogram.flip(0).cumsum(0).flip(0)[1:]


def _largest_near(values_BHW: Tensor, radius: int) -> Tensor:
    """Largest value in the square of 2·radius + 1 pixels around each pixel: along rows, then along columns."""
    size = 2 * radius + 1
    rows_BHW = F.max_pool2d(values_BHW, (1, size), stride=1, padding=(0, radius))
    return F.max_pool2d(rows_BHW, (size, 1), stride=1, padding=(radius, 0))


def _mean_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, averaged over those that occur in label or prediction."""
    intersection = confusion.diag()
    union = confusion.sum(0) + confusion.sum(1) - intersection
    return (intersection / union)[union > 0].mean()
