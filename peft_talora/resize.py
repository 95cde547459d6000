"""All interpolation of mSAM: of logits to the images' own sizes, of position tables to another input size.

Axes: B images, N channels, h w the logits' grid, H W pixels of the images. Sizes are (height, width) in pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.sam.modeling_sam import SamVisionEncoder


def size_list(sizes: torch.Tensor | Sequence, count: int) -> list[tuple[int, int]]:
    """One (height, width) per image, from one for all `count` images or one for each.

    Raises:
        ValueError: for any other shape.
    """
    sizes = torch.as_tensor(sizes)
    if sizes.shape not in ((2,), (count, 2)):
        raise ValueError(f"sizes: got shape {tuple(sizes.shape)}; allowed are (2,) and ({count}, 2).")
    return [(height, width) for height, width in sizes.expand(count, 2).tolist()]


def resize_logits(
    logits_BNhw: torch.Tensor,
    sizes: list[tuple[int, int]],
    input_size: int,
    canvas: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Logits (B, N, *canvas) in float32 at the images' own sizes, each in the upper left corner, zeros around it.

    As SAM does: bilinearly to the padded input of `input_size`, cropped to the part that the image fills (its long
    side is `input_size`, the other one rounded as in SAM's processor), bilinearly to the image's size. Images of one
    size go together. `canvas` is by default the largest height and the largest width in `sizes`.

    Raises:
        ValueError: if an image is larger than the canvas.
    """
    canvas = canvas or (max(height for height, _ in sizes), max(width for _, width in sizes))
    resized = logits_BNhw.new_zeros(*logits_BNhw.shape[:2], *canvas, dtype=torch.float32)
    for size in dict.fromkeys(sizes):
        height, width = size
        if height > canvas[0] or width > canvas[1]:
            raise ValueError(f"original_sizes: an image of {size} does not fit into its label of {canvas}.")
        rows = [row for row, other in enumerate(sizes) if other == size]
        scale = input_size / max(size)
        logits = F.interpolate(logits_BNhw[rows].float(), (input_size, input_size), mode="bilinear")
        logits = logits[..., : int(height * scale + 0.5), : int(width * scale + 0.5)]
        resized[rows, :, :height, :width] = F.interpolate(logits, size, mode="bilinear")
    return resized


@torch.no_grad()
def resize_positions(encoder: SamVisionEncoder, image_size: int) -> None:
    """Set the encoder's input size, in pixels: its position tables are linearly interpolated, in place.

    These are the absolute table, over the grid, and the relative tables of the global blocks, over all distances in
    it. The relative tables of windowed blocks depend on the window only and stay. The present size changes nothing.

    Raises:
        ValueError: if `image_size` is no multiple of the patch size.
    """
    patch_size = encoder.config.patch_size
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(f"image_size: got {image_size}; allowed are multiples of the patch size, {patch_size}.")
    grid = image_size // patch_size
    if encoder.pos_embed is not None:
        table = _interpolate(encoder.pos_embed.permute(0, 3, 1, 2), (grid, grid)).permute(0, 2, 3, 1)
        encoder.pos_embed = nn.Parameter(table.contiguous(), encoder.pos_embed.requires_grad)
    for layer in encoder.layers:
        if layer.window_size == 0 and layer.attn.use_rel_pos:
            for name in ("rel_pos_h", "rel_pos_w"):
                old = layer.attn.get_parameter(name)
                table = _interpolate(old.T[None, :, None], (1, 2 * grid - 1))[0, :, 0].T
                setattr(layer.attn, name, nn.Parameter(table.contiguous(), old.requires_grad))
    encoder.image_size = encoder.config.image_size = image_size
    encoder.patch_embed.image_size = (image_size, image_size)
    encoder.patch_embed.num_patches = grid * grid


def _interpolate(table: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(table.float(), size, mode="bilinear").to(table.dtype)
