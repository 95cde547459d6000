"""How well a stream of domains was learnt: scores of masks, and what their matrix says.

Axes: P masks of an image, H W pixels, T stages of learning, K domains.

R[t, i] is the score on domain i after stage t, in percent; domain i is learnt in stage i. Learning all domains at once
is one stage of K domains: then `last` alone means something.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..prompts import mask_iou

BAND = 0.02
"""Width of the outline that boundary IoU compares, as a share of the image's diagonal."""


def boundary_iou(masks_PHW: Tensor, targets_PHW: Tensor) -> Tensor:
    """Intersection over union of the inner outlines of pairs of masks (arXiv:2103.16562).

    The outline of a mask are its pixels at most d pixels (chessboard king's moves) away from one outside it, where
    d = max(1, round(`BAND` · diagonal)) and everything beyond the border of the image lies outside.

    Args:
        masks_PHW: Predicted masks, bool.
        targets_PHW: True masks, bool, of the same size.

    Returns:
        float32 (P,), from 0 to 1; of two empty masks 1.
    """
    return mask_iou(_outlines(masks_PHW), _outlines(targets_PHW))


def _outlines(masks_PHW: Tensor) -> Tensor:
    reach = max(1, round(BAND * math.hypot(*masks_PHW.shape[-2:])))
    outside = F.pad(~masks_PHW, (reach,) * 4, value=True)[:, None].float()
    # The largest value of a square is that of the largest values of its rows.
    near = F.max_pool2d(F.max_pool2d(outside, (1, 2 * reach + 1), stride=1), (2 * reach + 1, 1), stride=1)
    return masks_PHW & near[:, 0].bool()


class MaskScores:
    """IoU and boundary IoU of images, in percent: the mean over the masks of each, then the mean over images."""

    def __init__(self):
        self.iou: list[float] = []
        self.boundary_iou: list[float] = []

    def update(self, masks_PHW: Tensor, targets_PHW: Tensor) -> None:
        """Add an image: predicted and true masks, bool, at its own size.

        Raises:
            ValueError: If the shapes differ, or there is no mask.
        """
        if masks_PHW.shape != targets_PHW.shape or masks_PHW.ndim != 3 or not len(masks_PHW):
            raise ValueError(
                f"masks: got {tuple(masks_PHW.shape)} and targets {tuple(targets_PHW.shape)}; needed are equal shapes "
                "(P, H, W) with at least one mask."
            )
        self.iou.append(100 * mask_iou(masks_PHW, targets_PHW).mean().item())
        self.boundary_iou.append(100 * boundary_iou(masks_PHW, targets_PHW).mean().item())

    def compute(self) -> dict[str, float]:
        """Percent by name, ``"iou"`` and ``"boundary_iou"``; larger is better.

        Raises:
            ValueError: If no image was added.
        """
        if not self.iou:
            raise ValueError("no image was added; there is no mean of nothing.")
        return {name: math.fsum(values) / len(values) for name, values in vars(self).items()}


def last(R: Sequence[Sequence[float]] | Tensor) -> float:
    """Mean score over all K domains after the last stage."""
    return _matrix(R)[-1].mean().item()


def average(R: Sequence[Sequence[float]] | Tensor) -> float:
    """Mean over stages t of the mean score on the domains learnt by then, i ≤ t."""
    R_TK = _matrix(R)
    return torch.stack([row[: t + 1].mean() for t, row in enumerate(R_TK)]).mean().item()


def forgetting(
    R: Sequence[Sequence[float]] | Tensor, best: Literal["before_last", "ever", "when_learnt"] = "before_last"
) -> float:
    """Mean over the domains i learnt before the last stage N of (a former score − R[N, i]), in points; less is better.

    ===============  ==============================================================================================
    ``best``         the former score
    ===============  ==============================================================================================
    ``before_last``  the best before the last stage, max of R[t, i] over i ≤ t < N; negative where the last is best
    ``ever``         the best of all, max over i ≤ t ≤ N; never negative
    ``when_learnt``  R[i, i], the diagonal: forgetting is minus the backward transfer of arXiv:1706.08840
    ===============  ==============================================================================================

    Returns:
        Points; 0 after one stage, before which nothing can be forgotten.

    Raises:
        ValueError: For another `best`, or if `R` is no matrix as the head of this module describes it.
    """
    R_TK = _matrix(R)
    N = len(R_TK) - 1
    ends = {"before_last": lambda i: N, "ever": lambda i: N + 1, "when_learnt": lambda i: i + 1}
    if best not in ends:
        raise ValueError(f"best: got {best!r}; allowed are {', '.join(map(repr, ends))}.")
    drops = [(R_TK[i : ends[best](i), i].max() - R_TK[N, i]).item() for i in range(N)]
    return math.fsum(drops) / N if N else 0.0


def forward_transfer(R: Sequence[Sequence[float]] | Tensor, zero_shot: Sequence[float] | Tensor) -> float:
    """Mean over domains i > 0 of R[i − 1, i] − `zero_shot`[i]: what earlier domains gave (arXiv:1706.08840).

    Args:
        R: The matrix; domains whose former stage is not in it are left out.
        zero_shot: Scores (K,) of the model before the first stage, in percent.

    Returns:
        Points; more is better. 0 if there is no such domain.

    Raises:
        ValueError: If the numbers of domains differ.
    """
    R_TK, zero_shot_K = _matrix(R), torch.as_tensor(zero_shot, dtype=torch.float64)
    T, K = R_TK.shape
    if zero_shot_K.shape != (K,):
        raise ValueError(f"zero_shot: got shape {tuple(zero_shot_K.shape)}; R has {K} domains.")
    gains = [(R_TK[i - 1, i] - zero_shot_K[i]).item() for i in range(1, min(T + 1, K))]
    return math.fsum(gains) / len(gains) if gains else 0.0


def _matrix(R: Sequence[Sequence[float]] | Tensor) -> Tensor:
    """As float64 (T, K)."""
    R_TK = torch.as_tensor(R, dtype=torch.float64)
    if R_TK.ndim != 2 or not 0 < R_TK.shape[0] <= R_TK.shape[1]:
        raise ValueError(
            f"R: got shape {tuple(R_TK.shape)}; needed is (stages, domains), no more stages than domains."
        )
    if not R_TK.isfinite().all():
        raise ValueError(f"R: got {R_TK[~R_TK.isfinite()][0].item()}; every score must be a finite number.")
    return R_TK
