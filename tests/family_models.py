"""A tiny random model of every family that has default targets, weights redrawn so that outputs are of order 0.1–1.

Widths are 8 to 32, images 32 px. Windows do not divide the grids, so that padding is met, and there are global blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import make_sam
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedConfig,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VisionConfig,
    Sam2VisionModel,
    Sam3Config,
    Sam3Model,
    Sam3VisionConfig,
    Sam3VisionModel,
    Sam3ViTConfig,
    Sam3ViTModel,
    SamHQConfig,
    SamHQModel,
    SamHQVisionConfig,
    SamHQVisionModel,
    SamVisionConfig,
    SamVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModel
from transformers.utils import is_torchvision_available
from tuner_cases import Case

SIZE = 32
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": SIZE,
    "patch_size": 8,
}
SAM_VISION = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 4,
    "window_size": 3,
    "global_attn_indexes": [1],
    "num_pos_feats": 8,
    "mlp_dim": 48,
}


def draw(model_class: type, config: PreTrainedConfig) -> nn.Module:
    """A model in evaluation mode, all weights drawn anew: norms near one, matrices by their width."""
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.copy_(0.1 * torch.randn_like(parameter) + name.endswith("weight"))
            elif parameter.ndim > 1:
                parameter.normal_(std=0.7 * parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(std=0.3)
    return model.eval()


def make_sam_hq() -> SamHQModel:
    prompt = {"hidden_size": 16, "image_size": SIZE, "patch_size": 4, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "vit_dim": 32}
    config = SamHQConfig(vision_config=dict(SAM_VISION), prompt_encoder_config=prompt, mask_decoder_config=decoder)
    return draw(SamHQModel, config)


def sam2_vision() -> Sam2VisionConfig:
    """Three stages on grids of 8, 4 and 2: pooled queries where the width changes, a global block, a padded window."""
    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[SIZE, SIZE],
        blocks_per_stage=[1, 2, 3],
        embed_dim_per_stage=[8, 16, 32],
        num_attention_heads_per_stage=[1, 2, 2],
        window_size_per_stage=[4, 2, 3],
        global_attention_blocks=[4],
        num_query_pool_stages=2,
        window_positional_embedding_background_size=[2, 2],
    )
    return Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[32, 16, 8],
        backbone_feature_sizes=[[8, 8], [4, 4], [2, 2]],
        fpn_hidden_size=16,
        fpn_top_down_levels=[1, 2],
        num_feature_levels=3,
    )


def sam2_parts() -> dict:
    return {
        "vision_config": sam2_vision(),
        "prompt_encoder_config": {"hidden_size": 16, "image_size": SIZE, "patch_size": 16, "mask_input_channels": 4},
        "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    }


def make_sam2() -> Sam2Model:
    return draw(Sam2Model, Sam2Config(**sam2_parts()))


def make_sam2_video() -> Sam2VideoModel:
    memory = {
        "memory_attention_hidden_size": 16,
        "memory_attention_num_layers": 2,
        "memory_attention_num_attention_heads": 1,
        "memory_attention_feed_forward_hidden_size": 24,
        "memory_attention_rope_feat_sizes": [2, 2],
        "memory_encoder_hidden_size": 16,
        "memory_encoder_output_channels": 8,
        "mask_downsampler_embed_dim": 16,
        "memory_fuser_embed_dim": 16,
        "memory_fuser_intermediate_dim": 24,
        "image_size": SIZE,
    }
    model = draw(Sam2VideoModel, Sam2VideoConfig(**sam2_parts(), **memory))
    nn.init.ones_(model.mask_decoder.pred_obj_score_head.proj_out.bias)  # an object is seen, so there is a mask
    return model


def sam3_vision() -> Sam3VisionConfig:
    backbone = Sam3ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=4,
        window_size=3,
        global_attn_indexes=[1],
        pretrain_image_size=16,
    )
    sizes = [[32, 32], [16, 16], [8, 8]]
    return Sam3VisionConfig(backbone_config=backbone, fpn_hidden_size=16, backbone_feature_sizes=sizes)


def make_sam3() -> Sam3Model:
    part = {"hidden_size": 16, "num_attention_heads": 2}
    layered = {**part, "num_layers": 2, "intermediate_size": 24, "dropout": 0.0}
    text = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 24,
        "projection_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = Sam3Config(
        vision_config=sam3_vision(),
        text_config=text,
        geometry_encoder_config=dict(layered),
        detr_encoder_config=dict(layered),
        detr_decoder_config={**layered, "num_queries": 5},
        mask_decoder_config={**part, "num_upsampling_stages": 2},
    )
    return draw(Sam3Model, config)


def make_swin() -> SwinModel:
    sizes = {"image_size": SIZE, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
    return draw(SwinModel, SwinConfig(**sizes, window_size=3, drop_path_rate=0.0))


def points(batch: int) -> dict:
    """Three prompts of two points each per image."""
    return {"input_points": torch.full((batch, 3, 2, 2), 9.0), "input_labels": torch.ones(batch, 3, 2).long()}


def words(batch: int) -> dict:
    return {"input_ids": torch.tensor([[0, 4, 7, 1]]).expand(batch, -1), "attention_mask": torch.ones(batch, 4).long()}


@dataclass(frozen=True)
class Family(Case):
    """A case whose layers are found by default, and what these layers and the blocks' norms are called.

    Attributes:
        adapted: a pattern that the names of all adapted layers, and of no others, match.
        count: their number.
        norms: the same for the norms of the vision blocks.
        checkpointing: whether transformers offers activation checkpointing for the family.
    """

    adapted: str = ""
    count: int = 0
    norms: str = ""
    checkpointing: bool = True


def family(name: str, build: Callable[[], nn.Module], adapted: str, count: int, norms: str, **values) -> Family:
    values = {"targets": None, "sample": (3, SIZE, SIZE), "keyword": "pixel_values", **values}
    return Family(name, build, adapted=adapted, count=count, norms=norms, **values)


def vit(name: str, config: type, model: type, block: str, norms: str, **values) -> Family:
    def build() -> nn.Module:
        return draw(model, config(**VIT, **values))

    return family(name, build, rf"{block}\.attention\.[qkv]_proj", 6, rf"{block}\.{norms}")


MASKS = {"prompts": points, "output": "pred_masks"}
SAM_NAMES = r"(vision_encoder\.)?layers\.\d\.attn\.qkv", 3, r"vision_encoder\.layers\.\d\.layer_norm[12]"
HIERA = r"blocks\.\d\.attn\.qkv", 6, r"blocks\.\d\.layer_norm[12]"
SAM3_VIT = r"layers\.\d\.attention\.[qkv]_proj", 9, r"layers\.\d\.layer_norm[12]"
BEFORE_AFTER = r"layernorm_(before|after)"


def prefixed(prefix: str, names: tuple[str, int, str]) -> tuple[str, int, str]:
    adapted, count, norms = names
    return prefix + adapted, count, prefix + norms


FAMILIES = [
    family("sam", make_sam, SAM_NAMES[0], 4, SAM_NAMES[2], sample=(3, 64, 64), **MASKS),
    family("sam-vision", lambda: draw(SamVisionModel, SamVisionConfig(**SAM_VISION)), *SAM_NAMES),
    family("sam-hq", make_sam_hq, *SAM_NAMES, **MASKS),
    family("sam-hq-vision", lambda: draw(SamHQVisionModel, SamHQVisionConfig(**SAM_VISION)), *SAM_NAMES),
    family("sam2", make_sam2, *prefixed(r"vision_encoder\.backbone\.", HIERA), checkpointing=False, **MASKS),
    family(
        "sam2-vision",
        lambda: draw(Sam2VisionModel, sam2_vision()),
        *prefixed(r"backbone\.", HIERA),
        checkpointing=False,
    ),
    family("sam2-hiera", lambda: draw(Sam2HieraDetModel, sam2_vision().backbone_config), *HIERA, checkpointing=False),
    family(
        "sam3",
        make_sam3,
        *prefixed(r"vision_encoder\.backbone\.", SAM3_VIT),
        prompts=words,
        output="pred_masks",
        checkpointing=False,
    ),
    family(
        "sam3-vision",
        lambda: draw(Sam3VisionModel, sam3_vision()),
        *prefixed(r"backbone\.", SAM3_VIT),
        checkpointing=False,
    ),
    family("sam3-vit", lambda: draw(Sam3ViTModel, sam3_vision().backbone_config), *SAM3_VIT, checkpointing=False),
    vit("vit", ViTConfig, ViTModel, r"layers\.\d", BEFORE_AFTER),
    vit("deit", DeiTConfig, DeiTModel, r"layers\.\d", BEFORE_AFTER),
    vit("dinov2", Dinov2Config, Dinov2Model, r"encoder\.layer\.\d", r"norm[12]"),
    vit("dinov2-registers", Dinov2WithRegistersConfig, Dinov2WithRegistersModel, r"encoder\.layer\.\d", r"norm[12]"),
    vit("dinov3", DINOv3ViTConfig, DINOv3ViTModel, r"model\.layer\.\d", r"norm[12]", pos_embed_rescale=None),
    family(
        "swin",
        make_swin,
        r"encoder\.layers\.\d\.blocks\.\d\.attention\.[qkv]_proj",
        12,
        r"encoder\.layers\.\d\.blocks\.\d\.layernorm_(before|after)",
    ),
]
needs_torchvision = pytest.mark.skipif(
    not is_torchvision_available(), reason="transformers' SAM 3 needs torchvision, which is not installed"
)


def parameters(families: list[Family]) -> list:
    """The families as parameters of a test; SAM 3's are skipped where transformers cannot build them."""
    return [
        pytest.param(case, id=case.name, marks=[needs_torchvision] if "sam3" in case.name else []) for case in families
    ]
