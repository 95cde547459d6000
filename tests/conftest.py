"""A tiny real SAM, shared by the tests: four blocks, windows, padding, relative positions; milliseconds a pass."""

import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # of rows that are read from parquet, and of metrics
os.environ |= dict.fromkeys(("HF_METRICS_CACHE", "HF_MODULES_CACHE"), os.environ["HF_DATASETS_CACHE"])

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    PreTrainedModel,
    SamConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

if Version(transformers.__version__) < Version("5.23"):  # the method's former name

    def _enable(self, activation_checkpointing_kwargs=None):
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    PreTrainedModel.activation_checkpointing_enable = _enable

IMAGE_SIZE = 64


def pytest_sessionfinish():
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def make_sam(seed: int = 0) -> SamModel:
    """A SamModel of width 32 on 64 px: grid 8 × 8, windows of 3 (so 9 × 9 after padding), global block 1.

    transformers starts the vision encoder at std 1e-10 and leaves positions at zero, so outputs would be about 1e-6
    and every tolerance test would prove nothing: all weights are drawn anew.
    """
    vision = SamVisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
        window_size=3,
        global_attn_indexes=[1],
        num_pos_feats=8,
        mlp_dim=64,
        initializer_range=0.02,
    )
    prompt = SamPromptEncoderConfig(hidden_size=16, image_size=IMAGE_SIZE, patch_size=8, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=32, num_hidden_layers=2, num_attention_heads=2, iou_head_hidden_dim=16
    )
    torch.manual_seed(seed)
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name or "norm" in name.split(".")[-2]:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.3 if parameter.ndim < 2 or "vision" not in name else 0.15)
    return model.eval()


@pytest.fixture
def sam() -> SamModel:
    return make_sam()


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory) -> str:
    """A saved stock SAM checkpoint, as ``facebook/sam-vit-base`` is one."""
    folder = tmp_path_factory.mktemp("sam")
    make_sam().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def images() -> torch.Tensor:
    """Two images as the encoder takes them: (2, 3, 64, 64), about standard normal."""
    return torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
