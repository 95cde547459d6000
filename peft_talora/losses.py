"""What logits and labels mean, and one loss per kind of task: a mean over the labelled pixels of the batch.

Axes: B images, C channels, H W pixels.

A batch without any labelled pixel gives exactly 0 with zero gradient, so that a batch may hold labels of some tasks
only. What an unlabelled pixel holds (NaN, inf) never matters. Losses are computed in float32 or wider.

Where a batch is cut into parts, a mean of the parts' means is not the mean of the whole: pixels of a part with few
labels would weigh more. So a loss takes `counts`, the labelled pixels of the whole batch, as `count_*` gives them of
its labels; then what it returns of each part adds up to the loss of the whole.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = 255
"""The integer label of a pixel that has none."""


def check_shapes(logits_BCHW: Tensor, labels: Tensor, channels: Collection[int], label_channels: int = 0) -> None:
    """Raise ValueError unless C is one of `channels` and `labels` are (B, H, W), or (B, `label_channels`, H, W)."""
    B, C, H, W = logits_BCHW.shape
    if C not in channels:
        raise ValueError(f"logits have {C} channels; allowed: {', '.join(map(str, channels))}")
    expected = (B, label_channels, H, W) if label_channels else (B, H, W)
    if labels.shape != expected:
        raise ValueError(f"labels are {tuple(labels.shape)}; logits {tuple(logits_BCHW.shape)} need {expected}")


def wrong_class_ids(labels: Tensor, classes: int) -> tuple[Tensor, str]:
    """Say which labels are neither a class id below `classes` nor `IGNORE_INDEX`, and in words what is allowed."""
    known = (labels >= 0) & (labels < classes) & (labels == labels.long())
    return ~known & (labels != IGNORE_INDEX), f"0 to {classes - 1}, and {IGNORE_INDEX} where unknown"


def has_depth(labels_BHW: Tensor) -> Tensor:
    """Say which pixels have a known depth: a finite number of metres above 0. Boolean, shape as given."""
    return labels_BHW.isfinite() & (labels_BHW > 0)


def has_normal(labels_B3HW: Tensor) -> Tensor:
    """Say which pixels have a known normal: a finite vector other than 0. Boolean (B, H, W)."""
    return labels_B3HW.isfinite().all(1) & (labels_B3HW != 0).any(1)


def class_ids(logits_BCHW: Tensor) -> Tensor:
    """Class ids (B, H, W), int64."""
    return logits_BCHW.max(1).indices  # on CPU several times faster than argmax


def foreground_probability(logits_BCHW: Tensor) -> Tensor:
    """Probability (B, H, W) of class 1, from 1 channel (sigmoid) or 2 (softmax), in float32 or wider."""
    logits_BCHW = _wide(logits_BCHW)
    background_BHW = logits_BCHW[:, 0] if logits_BCHW.shape[1] == 2 else 0
    return torch.sigmoid(logits_BCHW[:, -1] - background_BHW)


def unit_vectors(vectors_B3HW: Tensor) -> Tensor:
    """Divide vectors (B, 3, H, W) by their length, or by 1e-6 if shorter, in float32 or wider."""
    vectors_B3HW = _wide(vectors_B3HW)
    return vectors_B3HW * vectors_B3HW.square().sum(1, keepdim=True).clamp(min=1e-12).rsqrt()


def count_classes(labels_BHW: Tensor) -> Tensor:
    """Labelled pixels, (1,), int64: what `cross_entropy` is a mean over."""
    return (labels_BHW != IGNORE_INDEX).sum()[None]


def count_depth(labels_BHW: Tensor) -> Tensor:
    """Pixels of known depth, (1,), int64: what `masked_l1` is a mean over."""
    return has_depth(labels_BHW).sum()[None]


def count_normals(labels_B3HW: Tensor) -> Tensor:
    """Pixels of known normal, (1,), int64: what `cosine_loss` is a mean over."""
    return has_normal(labels_B3HW).sum()[None]


def count_both_classes(labels_BHW: Tensor) -> Tensor:
    """Pixels of class 1, and of class 0, (2,), int64: what `balanced_bce` takes means over."""
    positive_BHW = labels_BHW == 1
    return torch.stack([positive_BHW.sum(), ((labels_BHW != IGNORE_INDEX) & ~positive_BHW).sum()])


def cross_entropy(logits_BCHW: Tensor, labels_BHW: Tensor, counts: Tensor | None = None) -> Tensor:
    """Softmax cross-entropy of class labels, in nats.

    Args:
        logits_BCHW: one channel per class.
        labels_BHW: int64 class ids, `IGNORE_INDEX` where unknown.
        counts: `count_classes` of the whole batch; None: this is it.

    Returns:
        A scalar.

    Raises:
        ValueError: labels on the CPU hold anything else.
    """
    _check_class_ids(labels_BHW, logits_BCHW.shape[1])
    total = F.cross_entropy(_wide(logits_BCHW), labels_BHW, ignore_index=IGNORE_INDEX, reduction="sum")
    return _over(total, count_classes(labels_BHW) if counts is None else counts)


def masked_l1(logits_B1HW: Tensor, labels_BHW: Tensor, counts: Tensor | None = None) -> Tensor:
    """Absolute error of depth, in metres (as in MTAN, arXiv:1803.10704).

    Args:
        logits_B1HW: predicted depth in metres.
        labels_BHW: depth in metres; a pixel counts where it is finite and above 0.
        counts: `count_depth` of the whole batch; None: this is it.

    Returns:
        A scalar.
    """
    check_shapes(logits_B1HW, labels_BHW, channels=(1,))
    valid_BHW = has_depth(labels_BHW)
    error_BHW = (_wide(logits_B1HW)[:, 0] - labels_BHW.where(valid_BHW, 0)).abs()
    return _mean_where(valid_BHW, error_BHW, counts)


def cosine_loss(logits_B3HW: Tensor, labels_B3HW: Tensor, counts: Tensor | None = None) -> Tensor:
    """1 − cosine of the angle between predicted and true normal, from 0 to 2 (arXiv:1411.4734, section 4.2).

    Args:
        logits_B3HW: predicted normals of any length; here they are divided by it.
        labels_B3HW: unit vectors; a pixel counts where its vector is finite and not 0.
        counts: `count_normals` of the whole batch; None: this is it.

    Returns:
        A scalar.
    """
    check_shapes(logits_B3HW, labels_B3HW, channels=(3,), label_channels=3)
    valid_BHW = has_normal(labels_B3HW)
    cosine_BHW = (unit_vectors(logits_B3HW) * labels_B3HW.where(valid_BHW.unsqueeze(1), 0)).sum(1)
    return _mean_where(valid_BHW, 1 - cosine_BHW, counts)


def balanced_bce(logits_B1HW: Tensor, labels_BHW: Tensor, counts: Tensor | None = None) -> Tensor:
    """Binary cross-entropy in which both classes weigh the same however rare one is, in nats.

    As in HED (arXiv:1504.06375, equation 2) a positive pixel weighs the share of negatives in the batch and a negative
    pixel the share of positives. Here the weights are then scaled to sum to 1, which gives

        ½ (mean over positives of −log p  +  mean over negatives of −log(1 − p)),

    so that the size of the loss does not follow the share of edges. Where only one class occurs, its mean is the loss.

    Args:
        logits_B1HW: logit of p, the probability of class 1.
        labels_BHW: int64 in {0, 1, `IGNORE_INDEX`}.
        counts: `count_both_classes` of the whole batch; None: this is it.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes do not fit, or labels on the CPU hold anything else.
    """
    check_shapes(logits_B1HW, labels_BHW, channels=(1,))
    _check_class_ids(labels_BHW, 2)
    logits_BHW = _wide(logits_B1HW)[:, 0]
    positive_BHW = labels_BHW == 1
    negative_BHW = (labels_BHW != IGNORE_INDEX) & ~positive_BHW
    loss_BHW = F.binary_cross_entropy_with_logits(logits_BHW, positive_BHW.to(logits_BHW.dtype), reduction="none")
    counts = count_both_classes(labels_BHW) if counts is None else counts
    means = _mean_where(positive_BHW, loss_BHW, counts[:1]) + _mean_where(negative_BHW, loss_BHW, counts[1:])
    return means / (counts > 0).sum().clamp(min=1)


def focal_loss(logits_NHW: Tensor, targets_NHW: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of N binary masks, a mean over the pixels of each (arXiv:1708.02002, equation 5).

    Args:
        logits_NHW: of the probability of the mask.
        targets_NHW: the share of each pixel that the mask covers, in [0, 1], of the logits' dtype.
        alpha: weight of what is covered; the rest has 1 − alpha.
        gamma: power of the error by which easy pixels are weighed down.

    Returns:
        (N,).
    """
    logits_NHW = _wide(logits_NHW)
    loss_NHW = F.binary_cross_entropy_with_logits(logits_NHW, targets_NHW, reduction="none")
    weight_NHW = 1 - alpha + (2 * alpha - 1) * targets_NHW
    return (weight_NHW * (targets_NHW - torch.sigmoid(logits_NHW)).abs() ** gamma * loss_NHW).mean((-2, -1))


def dice_loss(logits_NHW: Tensor, targets_NHW: Tensor) -> Tensor:
    """1 − Dice coefficient of N binary masks, with 1 added above and below (arXiv:1606.04797).

    Args:
        logits_NHW: of the probability of the mask.
        targets_NHW: the share of each pixel that the mask covers, in [0, 1].

    Returns:
        (N,), each from 0 to 1.
    """
    probability_NHW = torch.sigmoid(_wide(logits_NHW))
    overlap = (probability_NHW * targets_NHW).sum((-2, -1))
    return 1 - (2 * overlap + 1) / (probability_NHW.sum((-2, -1)) + targets_NHW.sum((-2, -1)) + 1)


def _check_class_ids(labels: Tensor, classes: int) -> None:
    """Raise ValueError for labels on the CPU that `wrong_class_ids` finds."""
    # On an accelerator, reading the answer back would make every step wait for the device; it would split a compiled
    # graph as well.
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong, allowed = wrong_class_ids(labels, classes)
    if wrong.any():
        raise ValueError(f"labels hold {labels[wrong][0].item()}; allowed: {allowed}")


def _wide(logits: Tensor) -> Tensor:
    """As float32, or as it is where already wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean_where(valid: Tensor, values: Tensor, counts: Tensor | None = None) -> Tensor:
    """Sum over the valid pixels over their number, or over the (1,) `counts`; 0 without any."""
    return _over(values.where(valid, 0).sum(), valid.sum()[None] if counts is None else counts)


def _over(total: Tensor, counts: Tensor) -> Tensor:
    """A sum over its (1,) count; 0 where there is nothing to sum."""
    count = counts[0].to(total.dtype)
    return total / count.where(count > 0, 1)
