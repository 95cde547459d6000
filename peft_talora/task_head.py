"""One task's head: SAM's mask decoder, cut down to what a dense prediction uses, and its no-mask embeddings.

Axes: B images, N channels of the task, E no-mask embeddings, M masks per decoder pass (E·M = N), K tokens,
D decoder width, h w the encoder's grid. Masks are 4h × 4w: SAM's low-resolution masks.
"""

import torch
from torch import nn
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamFeedForward, SamLayerNorm, SamMaskDecoder, SamTwoWayTransformer

DECODER_MODES = ("channel", "token")


class MSamMaskDecoder(nn.Module):
    """SAM's mask decoder without prompts, IoU head and unused hyper-networks; parameters are named as in SAM.

    The tokens are the IoU token and `num_mask_tokens` mask tokens. Mask m is the product of hyper-network m, applied
    to what the transformer made of mask token m, with the upscaled image embedding; only the first `num_masks` tokens
    have a hyper-network. The IoU token and further mask tokens stay because the others attend to them. What is left
    out has no influence on these masks, and weights without a gradient would stop distributed training.
    """

    def __init__(self, config: SamMaskDecoderConfig, num_mask_tokens: int, num_masks: int):
        super().__init__()
        width = config.hidden_size
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(num_mask_tokens, width)
        self.transformer = SamTwoWayTransformer(config)
        self.upscale_conv1 = nn.ConvTranspose2d(width, width // 4, kernel_size=2, stride=2)
        self.upscale_layer_norm = SamLayerNorm(width // 4, data_format="channels_first")
        self.upscale_conv2 = nn.ConvTranspose2d(width // 4, width // 8, kernel_size=2, stride=2)
        self.activation = nn.GELU()
        self.output_hypernetworks_mlps = nn.ModuleList(
            SamFeedForward(width, width, width // 8, num_layers=3) for _ in range(num_masks)
        )

    def forward(self, image_embeddings_BDhw: torch.Tensor, image_positional_embeddings_1Dhw: torch.Tensor):
        """Masks (B, M, 4h, 4w) from image embeddings that already contain their dense (no-mask) embedding."""
        grid = image_embeddings_BDhw.shape[-2:]
        tokens_KD = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens_B1KD, image_B1LD = self.transformer(
            point_embeddings=tokens_KD.expand(len(image_embeddings_BDhw), 1, -1, -1),
            image_embeddings=image_embeddings_BDhw,
            image_positional_embeddings=image_positional_embeddings_1Dhw,
            attention_similarity=None,
        )
        upscaled = self.upscale_conv1(image_B1LD.squeeze(1).transpose(1, 2).unflatten(2, grid))
        upscaled = self.activation(self.upscale_layer_norm(upscaled))
        upscaled = self.activation(self.upscale_conv2(upscaled))
        mask_tokens_BKD = tokens_B1KD[:, 0, 1:]
        weights = [mlp(mask_tokens_BKD[:, m]) for m, mlp in enumerate(self.output_hypernetworks_mlps)]
        return (torch.stack(weights, dim=1) @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])


class MSamTaskHead(nn.Module):
    """Mask decoder and no-mask embeddings of one task of mSAM (arXiv 2403.10971), trained in full.

    | `decoder_mode` | no-mask embeddings E | mask tokens   | hyper-networks | passes | logits, channel n           |
    |----------------|----------------------|---------------|----------------|--------|-----------------------------|
    | `"channel"`    | N, one per channel   | all of SAM's  | 1              | N      | mask 0 of the pass with E_n |
    | `"token"`      | 1                    | N             | N              | 1      | mask n of the one pass      |

    "channel" is the paper's: the image embedding plus no-mask embedding E_n (broadcast over the grid) goes through
    the task's decoder once per channel. "token" is about N times cheaper and not the paper's.
    """

    def __init__(self, config: SamMaskDecoderConfig, channels: int, decoder_mode: str = "channel"):
        super().__init__()
        self.decoder_mode = decoder_mode
        self.channels = channels
        if decoder_mode == "channel":
            embeddings, tokens, masks = channels, config.num_multimask_outputs + 1, 1
        else:
            embeddings, tokens, masks = 1, channels, channels
        self.no_mask_embed = nn.Embedding(embeddings, config.hidden_size)
        self.mask_decoder = MSamMaskDecoder(config, tokens, masks)

    def forward(self, image_embeddings_BDhw: torch.Tensor, image_positional_embeddings_1Dhw: torch.Tensor):
        """Logits (B, N, 4h, 4w), never resized, from the encoder's output and the grid's positional embedding."""
        embeddings_BEDhw = image_embeddings_BDhw[:, None] + self.no_mask_embed.weight[:, :, None, None]
        masks = self.mask_decoder(embeddings_BEDhw.flatten(0, 1), image_positional_embeddings_1Dhw)
        return masks.reshape(len(image_embeddings_BDhw), -1, *masks.shape[-2:])

    def start_from_sam(self, mask_decoder: SamMaskDecoder, no_mask_embed: nn.Embedding) -> None:
        """Copy SAM's weights, in their precision and on their device, into this head (which may be on "meta").

        Every no-mask embedding starts as SAM's; in mode "token" every mask token and hyper-network as SAM's first.
        """
        start = {f"mask_decoder.{name}": value for name, value in mask_decoder.state_dict().items()}
        start["no_mask_embed.weight"] = no_mask_embed.weight[:1].expand(self.no_mask_embed.num_embeddings, -1)
        if self.decoder_mode == "token":
            tokens = self.mask_decoder.mask_tokens.num_embeddings
            start["mask_decoder.mask_tokens.weight"] = mask_decoder.mask_tokens.weight[:1].expand(tokens, -1)
        for m in range(len(self.mask_decoder.output_hypernetworks_mlps)):
            for name, value in mask_decoder.output_hypernetworks_mlps[0].state_dict().items():
                start[f"mask_decoder.output_hypernetworks_mlps.{m}.{name}"] = value
        own = {name: start[name].detach().clone(memory_format=torch.contiguous_format) for name in self.state_dict()}
        self.load_state_dict(own, assign=True)

    def start_from(self, head: "MSamTaskHead") -> None:
        """Copy another head's weights; where the numbers of channels differ, every channel starts as its first."""
        if self.channels == head.channels:
            own = {name: value.detach().clone() for name, value in head.state_dict().items()}
            self.load_state_dict(own, assign=True)
        else:
            self.start_from_sam(head.mask_decoder, head.no_mask_embed)
