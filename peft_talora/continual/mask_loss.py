"""The loss of promptable segmentation: cross-entropy and Dice at points, most of them where the model is unsure.

Axes: B images, P masks of each, H W pixels of the true masks, h w of the logits, N = B · P masks, S points of each.
Points are (x, y) in [0, 1]: (0, 0) is the upper left corner of the upper left pixel, whatever the resolution.
"""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import dice_loss

OVERSAMPLING = 3
UNCERTAIN = 0.75


class PointLoss:
    """Binary cross-entropy + Dice of masks at sampled points (PointRend, arXiv:1912.08193, section 3.1).

    `OVERSAMPLING` · S points are drawn evenly; of these the share `UNCERTAIN` · S is kept whose logits are nearest to
    0. The rest of the S points is drawn evenly. Logits and true masks are read at the points bilinearly, each at its
    own resolution, so that neither is resized. No gradient passes through the choice of points.

    Args:
        points: S, points of a mask.
        seed: Points depend on it and on the step alone; PyTorch's global generator is left as it was.

    Raises:
        ValueError: If `points` is not positive.
    """

    def __init__(self, points: int = 12544, seed: int = 0):
        if points < 1:
            raise ValueError(f"points: got {points}; needed is at least 1.")
        self.points, self.seed = points, seed

    def __call__(self, logits_BPhw: Tensor, masks_BPHW: Tensor, step: int) -> Tensor:
        """The loss, a mean over masks.

        Args:
            logits_BPhw: Of the probability of each mask.
            masks_BPHW: True masks, bool, of the same part of the image at any resolution.
            step: Number of the optimizer's step.

        Returns:
            A scalar; cross-entropy in nats, Dice from 0 to 1.

        Raises:
            ValueError: If B or P differ, or there is no mask.
        """
        if logits_BPhw.shape[:2] != masks_BPHW.shape[:2] or not masks_BPHW.numel():
            raise ValueError(
                f"masks: got {tuple(masks_BPHW.shape)}; logits {tuple(logits_BPhw.shape)} need as many masks of as "
                "many images, and at least one."
            )
        logits_N1hw, masks_N1HW = logits_BPhw.flatten(0, 1)[:, None], masks_BPHW.flatten(0, 1)[:, None]
        generator = torch.Generator().manual_seed(Random(f"points {self.seed} {step}").getrandbits(63))
        points_NS2 = sample_points(logits_N1hw, self.points, generator)
        logits_N1S = read_points(logits_N1hw, points_NS2)
        masks_N1S = read_points(masks_N1HW.to(logits_N1S.dtype), points_NS2)
        cross_entropy = F.binary_cross_entropy_with_logits(logits_N1S, masks_N1S)
        return cross_entropy + dice_loss(logits_N1S, masks_N1S).mean()


@torch.no_grad()
def sample_points(logits_N1hw: Tensor, points: int, generator: torch.Generator) -> Tensor:
    """Points of each mask as `PointLoss` says: (N, S, 2), on the logits' device.

    Args:
        logits_N1hw: Of each mask.
        points: S.
        generator: On the CPU, so that points are the same on every device.
    """
    N, uncertain = len(logits_N1hw), int(UNCERTAIN * points)
    even = torch.rand(N, OVERSAMPLING * points + points - uncertain, 2, generator=generator).to(logits_N1hw.device)
    candidates, rest = even.split([OVERSAMPLING * points, points - uncertain], dim=1)
    confidence_NS = read_points(logits_N1hw, candidates)[:, 0].abs()
    chosen = confidence_NS.topk(uncertain, dim=1, largest=False).indices
    return torch.cat([candidates.gather(1, chosen[..., None].expand(-1, -1, 2)), rest], dim=1)


def read_points(maps_NChw: Tensor, points_NS2: Tensor) -> Tensor:
    """Bilinear values (N, C, S) at points, in float32 or wider; beyond the middles of the outer pixels as there."""
    maps_NChw = maps_NChw.to(torch.promote_types(maps_NChw.dtype, torch.float32))
    grid = (2 * points_NS2 - 1)[:, :, None].to(maps_NChw.dtype)
    return F.grid_sample(maps_NChw, grid, mode="bilinear", padding_mode="border", align_corners=False)[..., 0]
