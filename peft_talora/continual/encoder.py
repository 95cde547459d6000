"""SAM's vision encoder in steps: to its first block, through some of its blocks, and to its end.

Composed they give what the encoder itself gives, bit for bit. Axes: B images, h w the grid, D its width, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn


def embed_patches(encoder: nn.Module, pixel_values: Tensor) -> Tensor:
    """What the first block sees of images (B, 3, H, W): (B, h, w, D)."""
    hidden = encoder.patch_embed(pixel_values)
    return hidden if encoder.pos_embed is None else hidden + encoder.pos_embed


def run_blocks(encoder: nn.Module, hidden: Tensor, start: int, stop: int) -> Tensor:
    """Through the blocks `start` … `stop` − 1: (B, h, w, D) → (B, h, w, D)."""
    for layer in encoder.layers[start:stop]:
        hidden = layer(hidden)
    return hidden


def finish(encoder: nn.Module, hidden: Tensor) -> Tensor:
    """From the last block's output to the image embeddings (B, C, h, w)."""
    return encoder.neck(hidden)
