"""From samples of a domain to batches: sizes, boxes, and an augmentation that never loses the object.

A sample is ``{"image": float32 (3, H, W) in [0, 1], "masks": bool (1, H, W), "name": str}``. Images reach the encoder
in one of two ways: ``"stretch"`` pulls height and width to the input's side (as CoSAM does), ``"longest_side"`` keeps
their ratio and pads at the right and bottom (as SAM does).

Axes: B images, P prompts of each, H W pixels of an image, S side of the encoder's input, h w the logits' grid.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import make_image_processor
from ..prompts import mask_boxes
from ..resize import resize_logits

RESIZES = ("stretch", "longest_side")


def resize_mask(mask_1HW: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (1, H, W) at another size: pixels that it covers by half; if there is none, all that it touches.

    So what is fine does not vanish.
    """
    if tuple(mask_1HW.shape[1:]) == tuple(size):
        return mask_1HW
    share = F.interpolate(mask_1HW[None].float(), size, mode="bilinear", antialias=True)[0]
    small = share >= 0.5
    return small if small.any() else F.adaptive_max_pool2d(mask_1HW.float(), size) > 0


def input_size(size: tuple[int, int], image_size: int, resize: str) -> tuple[int, int]:
    """Height and width that an image of `size` takes up in an input of `image_size` pixels.

    Raises:
        ValueError: For an unknown `resize`.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize is {resize!r}; allowed: {', '.join(RESIZES)}")
    if resize == "stretch":
        return image_size, image_size
    scale = image_size / max(size)
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def collate_domain(samples: Sequence[dict], image_size: int, resize: str = "stretch") -> dict:
    """Make a batch of what a promptable model is trained and measured with.

    ==================  =============================================================================================
    ``pixel_values``    (B, 3, S, S) float32: SAM's mean and deviation taken out, zeros where padded
    ``masks``           (B, 1, S, S) bool, False where padded
    ``boxes``           (B, 1, 4) float32: tight box of the mask at its own size, in pixels of the input
    ``names``           list of B str
    ``original_masks``  list of B bool (1, H, W), each at its own size
    ==================  =============================================================================================

    Args:
        samples: As the head of this module describes them.
        image_size: S in pixels.
        resize: ``"stretch"`` or ``"longest_side"``.

    Raises:
        ValueError: For an unknown `resize` or a mask without a pixel, by its name.
    """
    processor = make_image_processor(image_size)
    mean, deviation = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    pixel_values = torch.zeros(len(samples), 3, image_size, image_size)
    masks = torch.zeros(len(samples), 1, image_size, image_size, dtype=torch.bool)
    boxes = torch.zeros(len(samples), 1, 4)
    for row, sample in enumerate(samples):
        _check_mask(sample)
        H, W = sample["image"].shape[1:]
        height, width = input_size((H, W), image_size, resize)
        image = sample["image"]
        if (height, width) != (H, W):
            image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
        pixel_values[row, :, :height, :width] = (image - mean) / deviation
        masks[row, :, :height, :width] = resize_mask(sample["masks"], (height, width))
        # The prompt encoder adds half a pixel: places are those of pixels' middles, before and after scaling.
        scale = torch.tensor([width / W, height / H, width / W, height / H])
        boxes[row] = (mask_boxes(sample["masks"]) + 0.5) * scale - 0.5
    return {
        "pixel_values": pixel_values,
        "masks": masks,
        "boxes": boxes,
        "names": [sample["name"] for sample in samples],
        "original_masks": [sample["masks"] for sample in samples],
    }


def original_logits(
    logits_BPhw: Tensor, sizes: Sequence[tuple[int, int]], image_size: int, resize: str = "stretch"
) -> list[Tensor]:
    """The logits of each image (P, H, W) at its own size, float32: the way back from `collate_domain`.

    Args:
        logits_BPhw: Of the whole input, at any resolution.
        sizes: Height and width of each image in pixels.
        image_size: Side of the input in pixels.
        resize: As in `collate_domain`.

    Raises:
        ValueError: For an unknown `resize`.
    """
    restored = []
    for logits, size in zip(logits_BPhw, sizes, strict=True):
        if input_size(size, image_size, resize) == (image_size, image_size):
            logits = F.interpolate(logits[None].float(), (image_size, image_size), mode="bilinear")
            restored.append(F.interpolate(logits, tuple(size), mode="bilinear")[0])
        else:
            restored.append(resize_logits(logits[None], [tuple(size)], image_size)[0])
    return restored


class DomainAugmentation:
    """Random mirroring and scale jitter of a sample; its size stays, and so does its object.

    The image is scaled by a factor drawn evenly from `scales`; a larger one is cropped, a smaller one put at a random
    place on the image's mean colour. A crop holds the whole object where it fits, else a pixel of it at least; the
    factor is never so small that less than `least` of the image would be left of the object (nor is it raised above 1
    for that).

    Args:
        scales: Smallest and largest factor.
        flips: Probability of a mirroring, left-right and upside-down each.
        least: Share of the image.
    """

    def __init__(
        self,
        scales: tuple[float, float] = (0.1, 2.0),
        flips: tuple[float, float] = (0.5, 0.5),
        least: float = 1 / 1000,
    ):
        if not 0 < scales[0] <= scales[1]:
            raise ValueError(f"scales is {scales!r}; allowed: two positive numbers, the smaller one first")
        if not all(0 <= flip <= 1 for flip in flips):
            raise ValueError(f"flips is {flips!r}; allowed: probabilities from 0 to 1")
        if not 0 <= least <= 1:
            raise ValueError(f"least is {least!r}; allowed: shares from 0 to 1")
        self.scales, self.flips, self.least = tuple(scales), tuple(flips), least

    def __call__(self, sample: dict, generator: torch.Generator) -> dict:
        """Return an augmented sample, drawn from `generator`; the given one stays as it is.

        Raises:
            ValueError: For a mask without a pixel, by its name.
        """
        _check_mask(sample)
        draws = torch.rand(5, generator=generator).tolist()
        pixel = int(torch.randint(2**31, (), generator=generator))
        image, masks = sample["image"], sample["masks"]
        for flip, draw, axis in zip(self.flips, draws[:2], (-1, -2), strict=True):
            if draw < flip:
                image, masks = image.flip(axis), masks.flip(axis)
        low, high = self.scales
        scale = max(low + (high - low) * draws[2], self._smallest(masks))
        size = tuple(max(round(scale * length), 1) for length in masks.shape[1:])
        if size != tuple(masks.shape[1:]):
            image, masks = _place(image, masks, size, draws[3:], pixel)
        return {**sample, "image": image.contiguous(), "masks": masks.contiguous()}

    def _smallest(self, masks: Tensor) -> float:
        return min(math.sqrt(self.least / max(float(masks.float().mean()), 1e-9)), 1.0)


def _check_mask(sample: dict) -> None:
    if not sample["masks"].any():
        raise ValueError(f"sample {sample['name']!r} has an empty mask; allowed: masks of one pixel or more")


def _place(image: Tensor, masks: Tensor, size: tuple[int, int], draws: Sequence[float], pixel: int):
    """Scale to `size`, then crop from it or put it on a canvas of the old size, axis by axis."""
    old = tuple(masks.shape[1:])
    scaled = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    small = resize_mask(masks, size)
    places = small[0].nonzero()
    kept = places[pixel % len(places)].tolist()
    canvas = image.mean((1, 2), keepdim=True).expand_as(image).clone()
    mask = torch.zeros_like(masks)
    source, target = [slice(None)], [slice(None)]
    for axis, (length, window, draw) in enumerate(zip(size, old, draws, strict=True)):
        if length <= window:
            start = int(draw * (window - length + 1))
            source.append(slice(0, length))
            target.append(slice(start, start + length))
            continue
        first, last = int(places[:, axis].min()), int(places[:, axis].max())
        if last - first >= window:
            first = last = kept[axis]
        earliest, latest = max(last - window + 1, 0), min(first, length - window)
        start = earliest + int(draw * (latest - earliest + 1))
        source.append(slice(start, start + window))
        target.append(slice(0, window))
    canvas[tuple(target)], mask[tuple(target)] = scaled[tuple(source)], small[tuple(source)]
    return canvas, mask
