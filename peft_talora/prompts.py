"""Prompts from masks, and masks from label maps: what promptable segmentation is trained and measured with.

Axes: N masks, H W pixels. Points are (x, y) and boxes (left, top, right, bottom), in pixels, at the middle of the
pixels they name, as transformers' `SamModel` takes them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_boxes(masks_NHW: Tensor) -> Tensor:
    """The smallest box around each mask: float32 (N, 4).

    Raises:
        ValueError: If a mask is empty.
    """
    _check_masks(masks_NHW)
    sides = []
    for axis in (1, 2):  # what is left of rows (H) gives x, of columns (W) gives y
        line = masks_NHW.any(axis).float()
        length = line.shape[1]
        sides += [line.argmax(1), length - 1 - line.flip(1).argmax(1)]
    left, right, top, bottom = sides
    return torch.stack([left, top, right, bottom], dim=1).float()


def jitter_boxes(boxes_N4: Tensor, generator: torch.Generator, share: float = 0.1) -> Tensor:
    """Boxes whose edges are moved by normal noise of `share` of their side (SAM, arXiv:2304.02643, appendix A).

    The noise is clamped to ±2 deviations: no edge moves by more than 2 · `share` of the side.
    """
    sides = (boxes_N4[:, 2:] - boxes_N4[:, :2]).repeat(1, 2)
    return boxes_N4 + share * sides * torch.randn(boxes_N4.shape, generator=generator).clamp(-2, 2)


def random_points(masks_NHW: Tensor, generator: torch.Generator) -> Tensor:
    """A point of each mask, all its pixels being equally likely: float32 (N, 2).

    Raises:
        ValueError: If a mask is empty.
    """
    _check_masks(masks_NHW)
    index = torch.multinomial(masks_NHW.flatten(1).float(), 1, generator=generator)[:, 0]
    return _points(index, masks_NHW.shape[2])


def central_points(masks_NHW: Tensor) -> Tensor:
    """The point of each mask that is farthest from its outline (and from the border of the image): float32 (N, 2).

    Distances are those of a chessboard king. Among points equally far, the one nearest to their own mean is taken.

    Raises:
        ValueError: If a mask is empty.
    """
    _check_masks(masks_NHW)
    left, distance = masks_NHW[:, None].float(), torch.zeros_like(masks_NHW, dtype=torch.float32)
    while left.any():
        distance += left[:, 0]
        left = -F.max_pool2d(F.pad(-left, (1, 1, 1, 1)), 3, stride=1)
    H, W = masks_NHW.shape[1:]
    deepest = distance == distance.amax((1, 2), keepdim=True)
    y, x = torch.meshgrid(torch.arange(H).float(), torch.arange(W).float(), indexing="ij")
    mean_y, mean_x = (
        (deepest * place).sum((1, 2), keepdim=True) / deepest.sum((1, 2), keepdim=True) for place in (y, x)
    )
    away = ((y - mean_y).square() + (x - mean_x).square()).masked_fill(~deepest, torch.inf)
    return _points(away.flatten(1).argmin(1), W)


def regions(labels_HW: Tensor, ignored: int | None = None, least: int = 1) -> Tensor:
    """The connected components of equal labels (neighbours by edge), largest first: bool (N, H, W).

    Args:
        labels_HW: Integers.
        ignored: A label that is no region.
        least: Smaller components are left out, in pixels.
    """
    H, W = labels_HW.shape
    ids = torch.arange(1, H * W + 1).view(H, W)
    same = [labels_HW[1:] == labels_HW[:-1], labels_HW[:, 1:] == labels_HW[:, :-1]]
    while True:
        before = ids.clone()
        for axis, equal in enumerate(same):
            low, high = ids.narrow(axis, 0, ids.shape[axis] - 1), ids.narrow(axis, 1, ids.shape[axis] - 1)
            larger = torch.maximum(low, high)
            torch.where(equal, larger, low, out=low)
            torch.where(equal, torch.maximum(low, high), high, out=high)
        ids = ids.flatten()[ids.flatten() - 1].view(H, W)  # to the id of the pixel that gave it its id
        if torch.equal(ids, before):
            break
    found, counts = ids.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    kept = [k for k, count in zip(found[order].tolist(), counts[order].tolist(), strict=True) if count >= least]
    kept = [k for k in kept if labels_HW.flatten()[k - 1] != ignored] if ignored is not None else kept
    return torch.stack([ids == k for k in kept]) if kept else torch.zeros((0, H, W), dtype=torch.bool)


def mask_iou(masks_NHW: Tensor, targets_NHW: Tensor) -> Tensor:
    """Intersection over union of pairs of boolean masks: float32 (N,); of two empty ones 1. Broadcasts."""
    intersection = (masks_NHW & targets_NHW).sum((-2, -1))
    union = (masks_NHW | targets_NHW).sum((-2, -1))
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)


def _points(index_N: Tensor, width: int) -> Tensor:
    return torch.stack([index_N % width, index_N // width], dim=1).float()


def _check_masks(masks_NHW: Tensor) -> None:
    empty = ~masks_NHW.flatten(1).any(1)
    if empty.any():
        raise ValueError(f"mask {int(empty.nonzero()[0])} of {len(masks_NHW)} is empty; a prompt needs a pixel of it")
