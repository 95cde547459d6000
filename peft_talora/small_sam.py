"""A small SAM: a pre-trained checkpoint that lies in the package, and what has its shape but random weights.

`checkpoints/small-sam/README.md` says how the checkpoint was made (`recipes/pretrain_sam.py`) and how good it is.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

from .files import write_aside
from .resize import resize_positions

SMALL_SAM = str(Path(__file__).parent / "checkpoints" / "small-sam")
"""Folder of the pre-trained checkpoint: a stock SAM of 2.4 million parameters for images of 128 pixels."""
PATCH_SIZE = 8
WIDTH = 96


def make_small_sam(image_size: int = 128, seed: int = 0) -> SamModel:
    """A stock `SamModel` of 2.4 million random parameters, whose embedding depends on the image.

    transformers starts a vision encoder at a standard deviation of 1e-10 and positions at zero, so that every image
    gets the same embedding, and draws the frequencies of points some 80 times too high, so that points a pixel apart
    have nothing in common and no prompt can be learned. Here matrices keep the size of what they multiply (standard
    deviation 1/√fan-in), positions are small random vectors, and frequencies, tokens and the embeddings of prompts
    are N(0, 1), as in SAM's own code.

    Args:
        image_size: Input size in pixels, a multiple of 8.
        seed: Of the weights; PyTorch's global generator is left as it was.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: For an image size that is no positive multiple of 8.
    """
    if image_size <= 0 or image_size % PATCH_SIZE != 0:
        raise ValueError(f"`image_size` must be a positive multiple of {PATCH_SIZE}; got {image_size}.")
    sizes = {"image_size": image_size, "patch_size": PATCH_SIZE}
    vision = SamVisionConfig(
        hidden_size=160,
        output_channels=WIDTH,
        num_hidden_layers=6,
        num_attention_heads=5,
        window_size=4,
        global_attn_indexes=[2, 5],
        num_pos_feats=WIDTH // 2,
        mlp_dim=640,
        initializer_range=0.02,
        **sizes,
    )
    prompt = SamPromptEncoderConfig(hidden_size=WIDTH, mask_input_channels=16, **sizes)
    decoder = SamMaskDecoderConfig(
        hidden_size=WIDTH, mlp_dim=256, num_hidden_layers=2, num_attention_heads=4, iou_head_hidden_dim=WIDTH
    )
    config = SamConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder, initializer_range=0.02
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SamModel(config)
        _redraw(model)
    return model.eval()


@torch.no_grad()
def _redraw(model: SamModel) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            fan_in = module.weight[0].numel()
            if isinstance(module, nn.ConvTranspose2d):
                fan_in = module.weight.shape[0]
            nn.init.normal_(module.weight, std=1 / math.sqrt(fan_in))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    nn.init.normal_(model.vision_encoder.pos_embed, std=0.2)
    nn.init.normal_(model.shared_image_embedding.positional_embedding)


def take_over(model: SamModel, trained: SamModel) -> None:
    """Give a SAM the weights of one of another image size, in place; `trained` has that size too afterwards.

    Position tables are interpolated, as by `peft_talora.resize`.
    """
    resize_positions(trained.vision_encoder, model.config.vision_config.image_size)
    model.load_state_dict(trained.state_dict())


def save_small_sam(folder: str | Path, image_size: int = 128, seed: int = 0) -> str:
    """Save `make_small_sam(image_size, seed)` as a stock SAM checkpoint. Returns the folder's path."""
    with write_aside(folder) as aside:
        make_small_sam(image_size, seed).save_pretrained(aside)
    return str(folder)


def copy_small_sam(folder: str | Path) -> str:
    """Copy the pre-trained small SAM, so that an adapter's folder can hold its base. Returns the folder's path."""
    with write_aside(folder) as aside:
        for file in Path(SMALL_SAM).iterdir():
            shutil.copyfile(file, aside / file.name)  # not its mode: an installed package may be read-only
    return str(folder)
