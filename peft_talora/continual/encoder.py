"""The pass through SAM's image encoder in parts, so that a domain can be chosen in the middle of it.

Axes: B images, h w the encoder's grid, D its width, C channels of the image embedding.
"""

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn


def embed_patches(encoder: nn.Module, pixel_values: Tensor) -> Tensor:
    """What enters block 0: patches (B, h, w, D) of images (B, 3, H, W), with their positions.

    Args:
        encoder: The `vision_encoder` of `SamModel`, `SamHQModel` or `MSamModel`, as in all of this file.
        pixel_values: As the encoder takes them.
    """
    hidden = encoder.patch_embed(pixel_values)
    return hidden if encoder.pos_embed is None else hidden + encoder.pos_embed


def run_blocks(
    encoder: nn.Module, hidden: Tensor, start: int = 0, stop: int | None = None, global_outputs: list | None = None
) -> Tensor:
    """Run blocks `start` to `stop` − 1.

    ``finish(encoder, run_blocks(encoder, embed_patches(encoder, x)))`` is bit for bit what ``encoder(x)`` gives as
    ``last_hidden_state``, wherever the pass is cut.

    Args:
        encoder: See `embed_patches`.
        hidden: (B, h, w, D), what enters block `start`.
        start: First block.
        stop: The first block that is not run; None: all are.
        global_outputs: A list to which the outputs of blocks without windows are added: together they are the
            ``intermediate_embeddings`` of a SAM-HQ encoder.

    Returns:
        (B, h, w, D), what enters block `stop`.

    Raises:
        ValueError: Unless 0 ≤ start ≤ stop ≤ number of blocks.
    """
    blocks = len(encoder.layers)
    stop = blocks if stop is None else stop
    if not 0 <= start <= stop <= blocks:
        raise ValueError(f"`start` is {start} and `stop` {stop}; allowed: 0 ≤ start ≤ stop ≤ {blocks}.")
    for block in encoder.layers[start:stop]:
        hidden = block(hidden)
        if global_outputs is not None and block.window_size == 0:
            global_outputs.append(hidden)
    return hidden


def finish(encoder: nn.Module, hidden: Tensor) -> Tensor:
    """The neck: the image embedding (B, C, h, w) of what the last block gives, (B, h, w, D)."""
    return encoder.neck(hidden)


def first_adapted_block(model: nn.Module, adapter: str | None = None) -> int:
    """The lowest block of the encoder that an adapter changes: the blocks below it are the base model's.

    Patch embedding and positions come before all blocks and count as block 0; the neck, behind which nothing is kept,
    counts as the last block. An encoder without any adapted module gives the number of blocks.

    Only modules that hold an adapter, or a copy of their own by `modules_to_save`, are seen: biases that PEFT trains
    in place (``bias="all"``) are the base model's own and belong to no adapter.

    Args:
        model: With a `vision_encoder`; a PEFT model or one that PEFT has changed.
        adapter: Only modules of this adapter count; None: of any.
    """
    blocks = len(model.vision_encoder.layers)
    lowest = blocks
    for name, module in model.vision_encoder.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        held = module._get_available_adapters()
        if held and (adapter is None or adapter in held):
            lowest = min(lowest, _block_of(name, blocks))
    return lowest


def _block_of(name: str, blocks: int) -> int:
    """The block in which a module of the encoder lies, by its name; see `first_adapted_block`."""
    match name.split("."):
        case ["layers", index, *_]:
            return int(index)
        case ["neck", *_]:
            return blocks - 1
        case _:
            return 0
