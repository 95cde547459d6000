"""How well a model segments the test images of a domain, and where its router sends them.

Axes: B images, P masks of each, h w of the logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .batches import collate_domain, original_logits
from .prompting import ask
from .scores import MaskScores


@dataclass(frozen=True)
class Answer:
    """What a model says of a batch.

    Attributes:
        logits: Of the masks, (B, P, h, w).
        domains: Whose adapter each image was given; None where there is no router.
        encoder_passes: That each image took, (B,).
    """

    logits: Tensor
    domains: list[str] | None
    encoder_passes: Tensor


@dataclass(frozen=True)
class Measured:
    """Figures of one set of images.

    Attributes:
        scores: ``"iou"`` and ``"boundary_iou"`` in percent.
        chosen: Images by the domain whose adapter they were given; empty where there is no router.
        encoder_passes: Mean of an image.
    """

    scores: dict[str, float]
    chosen: dict[str, int]
    encoder_passes: float


@torch.no_grad()
def measure(
    answer: Callable[[Mapping[str, Any]], Answer],
    images: Dataset,
    image_size: int,
    resize: str = "stretch",
    prompt: str = "box",
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> Measured:
    """Ask a model for the masks of all images, and compare them at the images' own sizes.

    Args:
        answer: The arguments that `ask` makes → an `Answer`.
        images: Samples as `batches` describes them.
        image_size: Of the encoder's input, in pixels.
        resize: ``"stretch"`` or ``"longest_side"``.
        prompt: ``"box"`` or ``"none"``.
        batch_size: Images of a call.
        device: Where the model is.
    """
    scores, chosen, passes = MaskScores(), Counter(), []
    for begin in range(0, len(images), batch_size):
        samples = [images[index] for index in range(begin, min(begin + batch_size, len(images)))]
        batch = collate_domain(samples, image_size, resize)
        asked = ask(batch, prompt)
        said = answer({key: v.to(device) if torch.is_tensor(v) else v for key, v in asked.items()})
        masks = batch["original_masks"]
        sizes = [tuple(mask.shape[-2:]) for mask in masks]
        for logits, mask in zip(original_logits(said.logits.cpu(), sizes, image_size, resize), masks, strict=True):
            scores.update(logits > 0, mask)
        chosen.update(said.domains or ())
        passes.append(said.encoder_passes.float())
    return Measured(scores.compute(), dict(chosen), torch.cat(passes).mean().item())
