"""SAM-HQ read as a SAM: its encoder, and what its mask decoder needs for SAM's own masks.

SAM-HQ (arXiv 2306.01567) is SAM and a small second branch: a fifth output token beside SAM's four mask tokens, and
convolutions that make a finer mask of it and of early features. mSAM trains decoders of its own, so the branch is left
behind. The token stays, as a further mask token: SAM's tokens attend to it, so SAM-HQ's masks depend on it.

SAM and the published SAM-HQ upscale the image embedding that comes out of the decoder's transformer, and so does mSAM.
transformers 5.23's `SamHQModel` upscales the one that goes in, height and width exchanged: its masks are others.
"""

from dataclasses import fields

import torch
from torch import nn
from transformers import (
    PreTrainedConfig,
    SamConfig,
    SamHQConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)


class SamHQAsSam(SamModel):
    """A SamModel with the weights of a SAM-HQ checkpoint and its additional token."""

    config: SamHQConfig  # what a checkpoint holds; the model itself has the SamConfig made from it
    _keys_to_ignore_on_load_unexpected = [r"^mask_decoder\.(hq_mask_mlp|compress_vit|encoder_|mask_conv|mask_norm)"]

    def __init__(self, config: SamHQConfig):
        super().__init__(_sam_config(config))
        self.mask_decoder.hq_token = nn.Embedding(1, self.config.mask_decoder_config.hidden_size)

    def join_tokens(self) -> None:
        """Make the additional token the last mask token."""
        decoder = self.mask_decoder
        tokens = torch.cat([decoder.mask_tokens.weight, decoder.hq_token.weight])
        decoder.mask_tokens = nn.Embedding.from_pretrained(tokens.detach(), freeze=False)
        del decoder.hq_token
        self.config.mask_decoder_config.num_multimask_outputs += 1


def load_sam_hq(*args, **kwargs):
    """As `SamModel.from_pretrained`, from a SAM-HQ checkpoint: a SamModel with one mask token more."""
    loaded = SamHQAsSam.from_pretrained(*args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True gives a tuple
    model.join_tokens()
    return loaded


def _sam_config(config: SamHQConfig) -> SamConfig:
    sam = SamConfig(
        vision_config=same_values(config.vision_config, SamVisionConfig),
        prompt_encoder_config=same_values(config.prompt_encoder_config, SamPromptEncoderConfig),
        mask_decoder_config=same_values(config.mask_decoder_config, SamMaskDecoderConfig),
        initializer_range=config.initializer_range,
        dtype=config.dtype,
    )
    sam._attn_implementation = config._attn_implementation
    sam._name_or_path = config._name_or_path
    return sam


def same_values(config: PreTrainedConfig, kind: type[PreTrainedConfig], **others) -> PreTrainedConfig:
    """A config of that kind with the values of all its fields; `others` are those that `config` does not have."""
    names = [field.name for field in fields(kind) if field.init and field.name not in others]
    return kind(**{name: getattr(config, name) for name in names}, **others)
