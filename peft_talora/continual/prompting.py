"""What a promptable model is asked, in training and in evaluation, as arguments of transformers' `SamModel`.

Axes: B images, P masks of each, H W pixels of the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..prompts import random_points

PROMPTS = ("box", "points", "none")
POINTS = 10  # as CoSAM trains with


def check_prompts(kinds: Sequence[str]) -> None:
    """Raise ValueError unless all are kinds of prompts, and there is one."""
    if not kinds or not set(kinds) <= set(PROMPTS):
        raise ValueError(f"prompts are {list(kinds)}; allowed: one or more of {', '.join(PROMPTS)}")


def ask(batch: Mapping[str, Any], kind: str = "box") -> dict[str, Any]:
    """The arguments of a call: images, and what stands in the batch for that kind of prompt.

    ==========  =======================================================
    ``box``     the tight box of each mask
    ``points``  ``batch["points"]`` (B, P, N, 2), all of them inside
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
    return arguments


class TrainingPrompts:
    """One kind of prompt for each batch, drawn evenly, and its points; a function of the seed and the step.

    Args:
        kinds: Of `PROMPTS`.
        seed: PyTorch's global generator is left as it was.

    Raises:
        ValueError: For an unknown kind, or none.
    """

    def __init__(self, kinds: Sequence[str], seed: int = 0):
        check_prompts(kinds)
        self.kinds, self.seed = list(kinds), seed

    def __call__(self, batch: Mapping[str, Any], step: int) -> dict[str, Any]:
        """A batch with ``"points"`` as well where they are asked for, and with the kind as ``"prompt"``."""
        random = Random(f"prompts {self.seed} {step}")
        kind = random.choice(self.kinds)
        if kind != "points":
            return {**batch, "prompt": kind}
        generator = torch.Generator().manual_seed(random.getrandbits(63))
        return {
            **batch,
            "prompt": kind,
            "points": inner_points(batch["masks"].cpu(), generator).to(batch["masks"].device),
        }


def inner_points(masks_BPHW: Tensor, generator: torch.Generator) -> Tensor:
    """`POINTS` points inside each mask, (B, P, N, 2), drawn one by one from all its pixels."""
    B, P = masks_BPHW.shape[:2]
    masks_NHW = masks_BPHW.flatten(0, 1)
    points = torch.stack([random_points(masks_NHW, generator) for _ in range(POINTS)], dim=1)
    return points.view(B, P, POINTS, 2)
