"""What a promptable model is asked, in training and in evaluation, as arguments of transformers' `SamModel`.

Axes: B images, P masks of each, H W pixels of the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..prompts import random_points

PROMPTS = ("box", "points", "mask", "none")
POINTS = 10  # as CoSAM trains with
SURE = 8.0  # the logit of a mask that is given as a prompt, inside; outside it is its negative
PATCHES = 0.6  # of a random field, what is above: about a sixth


def check_prompts(kinds: Sequence[str]) -> None:
    """Raise ValueError unless all are kinds of prompts, and there is one."""
    if not kinds or not set(kinds) <= set(PROMPTS):
        raise ValueError(f"prompts are {list(kinds)}; allowed: one or more of {', '.join(PROMPTS)}")


def ask(batch: Mapping[str, Any], kind: str = "box") -> dict[str, Any]:
    """The arguments of a call: images, and what stands in the batch for that kind of prompt.

    ==========  =======================================================
    ``box``     the tight box of each mask
    ``points``  ``batch["points"]`` (B, P, N, 2), all of them inside
    ``mask``    ``batch["mask_prompts"]`` (B, 1, h, w), logits: a rough mask of what is meant
    ``none``    nothing: the model has to find what is meant by itself
    ==========  =======================================================
    """
    arguments = {"pixel_values": batch["pixel_values"], "multimask_output": False}
    if kind == "box":
        arguments["input_boxes"] = batch["boxes"]
    elif kind == "points":
        arguments["input_points"] = batch["points"]
        arguments["input_labels"] = torch.ones(
            batch["points"].shape[:3], dtype=torch.long, device=batch["points"].device
        )
    elif kind == "mask":
        arguments["input_masks"] = batch["mask_prompts"]
    return arguments


class TrainingPrompts:
    """One kind of prompt for each batch, drawn evenly, and its points or masks; a function of the seed and the step.

    Args:
        kinds: Of `PROMPTS`.
        seed: PyTorch's global generator is left as it was.
        mask_size: Side of the masks that the model takes as prompts; ``"mask"`` needs it.

    Raises:
        ValueError: For an unknown kind, or none.
    """

    def __init__(self, kinds: Sequence[str], seed: int = 0, mask_size: int | None = None):
        check_prompts(kinds)
        if "mask" in kinds and mask_size is None:
            raise ValueError("mask_size is None; prompts that are masks need the side that the model takes.")
        self.kinds, self.seed, self.mask_size = list(kinds), seed, mask_size

    def __call__(self, batch: Mapping[str, Any], step: int) -> dict[str, Any]:
        """A batch with ``"points"`` or ``"mask_prompts"`` where they are asked for, and the kind as ``"prompt"``."""
        random = Random(f"prompts {self.seed} {step}")
        kind = random.choice(self.kinds)
        masks_BPHW, drawn = batch["masks"], {}
        generator = torch.Generator().manual_seed(random.getrandbits(63))
        if kind == "points":
            drawn["points"] = inner_points(masks_BPHW.cpu(), generator)
        elif kind == "mask":
            drawn["mask_prompts"] = rough_masks(masks_BPHW.cpu(), self.mask_size, generator)
        return {**batch, "prompt": kind, **{name: value.to(masks_BPHW.device) for name, value in drawn.items()}}


def rough_masks(masks_B1HW: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """What somebody might have drawn in haste of each image's only mask: logits (B, 1, `size`, `size`).

    Near the outline, by a sixteenth of the image at most, pixels change sides in coarse random patches; what is far
    inside or outside stays. Thin masks lose and gain such patches over their whole length.

    Args:
        masks_B1HW: True masks.
        size: Side of what the model takes, in pixels.
        generator: On the CPU, as the masks are.

    Raises:
        ValueError: If images have several masks: SAM takes one mask as a prompt of an image.
    """
    if masks_B1HW.shape[1] != 1:
        raise ValueError(f"masks: got {masks_B1HW.shape[1]} of an image; as a prompt SAM takes one.")
    inside = F.adaptive_max_pool2d(masks_B1HW.float(), (size, size))
    reach = max(1, size // 16)
    window = {"kernel_size": 2 * reach + 1, "stride": 1, "padding": reach, "count_include_pad": False}
    share = F.avg_pool2d(inside, **window)
    coarse = torch.randn(len(inside), 1, 12, 12, generator=generator)
    patches = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False) > PATCHES
    return torch.where(inside.bool() ^ (patches & (share > 0) & (share < 1)), SURE, -SURE)


def inner_points(masks_BPHW: Tensor, generator: torch.Generator) -> Tensor:
    """`POINTS` points inside each mask, (B, P, N, 2), drawn one by one from all its pixels."""
    B, P = masks_BPHW.shape[:2]
    masks_NHW = masks_BPHW.flatten(0, 1)
    points = torch.stack([random_points(masks_NHW, generator) for _ in range(POINTS)], dim=1)
    return points.view(B, P, POINTS, 2)
