"""SAM-HQ (arXiv 2306.01567), SAM and a branch for a finer mask, with a decoder that keeps SAM's own masks right.

transformers 5.23's decoder upscales the image embedding that goes into its transformer, height and width exchanged;
SAM and the published SAM-HQ upscale the one that comes out. `HQMaskDecoder` has the same parameters and does so too.

Axes: B images, P prompts of each, T tokens, M masks, D width of the decoder, C of the mask features, h w the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    SamHQConfig,
    SamHQMaskDecoderConfig,
    SamHQModel,
    SamHQPromptEncoderConfig,
    SamHQVisionConfig,
    SamModel,
)
from transformers.models.sam_hq.modeling_sam_hq import SamHQMaskDecoder

from ..sam_hq import same_values

BRANCH = (
    "hq_token",
    "hq_mask_mlp",
    "compress_vit_conv1",
    "compress_vit_norm",
    "compress_vit_conv2",
    "encoder_conv1",
    "encoder_norm",
    "encoder_conv2",
    "mask_conv1",
    "mask_norm",
    "mask_conv2",
)
"""Modules of the mask decoder that SAM does not have: what SAM-HQ trains."""


class HQMaskDecoder(SamHQMaskDecoder):
    """SAM-HQ's mask decoder, called as transformers calls its own.

    The HQ token goes through the transformer with SAM's tokens. Its mask is the product of what an MLP makes of it and
    of features fused from three sources, each brought to four times the grid: an early block of the encoder, the
    encoder's output, and the upscaled embedding of SAM's own masks (paper, section 3.2).
    """

    def forward(
        self,
        image_embeddings: Tensor,
        image_positional_embeddings: Tensor,
        sparse_prompt_embeddings: Tensor | None,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
        hq_token_only: bool,
        intermediate_embeddings: list[Tensor] | None = None,
        attention_similarity: Tensor | None = None,
        target_embedding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Masks and their predicted IoU.

        Args:
            image_embeddings: (B, D, h, w).
            image_positional_embeddings: (B, D, h, w).
            sparse_prompt_embeddings: (B, P, points, D); None for no prompt, which counts as one.
            dense_prompt_embeddings: (B, D, h, w), or that of one image for all.
            multimask_output: SAM's three masks, those with the highest predicted IoU first; False: its single mask.
            hq_token_only: The HQ mask alone; False: the sum of it and SAM's.
            intermediate_embeddings: Of the encoder's global blocks, each (B, h, w, width); the first is used.
            attention_similarity: Handed to the transformer.
            target_embedding: Handed to the transformer.

        Returns:
            Logits (B, P, M, 4h, 4w) and predicted IoU (B, P, M); with `hq_token_only` M is 1 for the logits.

        Raises:
            ValueError: If `intermediate_embeddings` is missing.
        """
        if not intermediate_embeddings:
            raise ValueError(
                f"`intermediate_embeddings` is {intermediate_embeddings!r}; the HQ mask needs the output of the "
                "encoder's first global block, beside `image_embeddings`."
            )
        prompts = 1 if sparse_prompt_embeddings is None else sparse_prompt_embeddings.shape[1]
        tokens_BPTD, image_XDhw = self._transform(
            image_embeddings + dense_prompt_embeddings,
            image_positional_embeddings,
            sparse_prompt_embeddings,
            attention_similarity=attention_similarity,
            target_embedding=target_embedding,
        )
        iou_token_BPD, mask_tokens_BPTD = tokens_BPTD[:, :, 0], tokens_BPTD[:, :, 1 : 1 + self.num_mask_tokens]
        features_XChw = self.activation(self.upscale_layer_norm(self.upscale_conv1(image_XDhw)))
        features_XChw = self.activation(self.upscale_conv2(features_XChw))
        early_BChw = self._image_features(image_embeddings, intermediate_embeddings[0])
        hq_features_XChw = self._refined(features_XChw) + early_BChw.repeat_interleave(prompts, 0)

        mlps = [*self.output_hypernetworks_mlps, self.hq_mask_mlp]
        weights_BPTC = torch.stack([mlp(mask_tokens_BPTD[:, :, i]) for i, mlp in enumerate(mlps)], dim=2)
        sam_BPMhw = _masks(weights_BPTC[:, :, :-1], features_XChw)
        hq_BPMhw = _masks(weights_BPTC[:, :, -1:], hq_features_XChw)
        sam_BPMhw, iou_BPM = _chosen(sam_BPMhw, self.iou_prediction_head(iou_token_BPD), multimask_output)
        return hq_BPMhw if hq_token_only else sam_BPMhw + hq_BPMhw, iou_BPM

    def _transform(self, image_BDhw: Tensor, positions_BDhw: Tensor, prompts_BPTD: Tensor | None, **others):
        """What the transformer makes of all tokens, (B, P, T, D), and of the image, per prompt (B · P, D, h, w)."""
        number = 1 if prompts_BPTD is None else prompts_BPTD.shape[1]
        own_TD = torch.cat([self.iou_token.weight, self.mask_tokens.weight, self.hq_token.weight])
        tokens_BPTD = own_TD.expand(len(image_BDhw), number, -1, -1)
        if prompts_BPTD is not None:
            tokens_BPTD = torch.cat([tokens_BPTD, prompts_BPTD], dim=2)
        tokens_BPTD, image_XNLD = self.transformer(
            point_embeddings=tokens_BPTD.to(own_TD.dtype),
            image_embeddings=image_BDhw.repeat_interleave(number, 0),
            image_positional_embeddings=positions_BDhw.repeat_interleave(number, 0),
            **others,
        )
        return tokens_BPTD, image_XNLD.squeeze(1).mT.unflatten(2, image_BDhw.shape[-2:])

    def _image_features(self, image_BDhw: Tensor, early_BhwD: Tensor) -> Tensor:
        """What an early block and the encoder's output say of edges and of the whole, (B, C, 4h, 4w)."""
        early_BChw = self.activation(self.compress_vit_norm(self.compress_vit_conv1(early_BhwD.movedim(-1, 1))))
        late_BChw = self.activation(self.encoder_norm(self.encoder_conv1(image_BDhw)))
        return self.compress_vit_conv2(early_BChw) + self.encoder_conv2(late_BChw)

    def _refined(self, features_XChw: Tensor) -> Tensor:
        return self.mask_conv2(self.activation(self.mask_norm(self.mask_conv1(features_XChw))))


def _masks(weights_BPMC: Tensor, features_XChw: Tensor) -> Tensor:
    """The products of weights and the features of their prompt, (B, P, M, h, w)."""
    features_BPCL = features_XChw.flatten(2).unflatten(0, weights_BPMC.shape[:2])
    return (weights_BPMC @ features_BPCL).unflatten(-1, features_XChw.shape[-2:])


def _chosen(masks_BPMhw: Tensor, iou_BPM: Tensor, several: bool) -> tuple[Tensor, Tensor]:
    """SAM's masks for an ambiguous prompt, best first; or its mask for a clear one."""
    if not several:
        return masks_BPMhw[:, :, :1], iou_BPM[:, :, :1]
    iou_BPM, order_BPM = iou_BPM[:, :, 1:].sort(dim=2, descending=True)
    return masks_BPMhw[:, :, 1:].take_along_dim(order_BPM[..., None, None], dim=2), iou_BPM


def correct_decoder(model: SamHQModel) -> SamHQModel:
    """Put `HQMaskDecoder` into a SAM-HQ, with the very parameters that its decoder has. Returns the model.

    Raises:
        ValueError: If its mask decoder is no plain one of transformers, for an adapter wraps it, say.
    """
    old = model.mask_decoder
    if type(old) is HQMaskDecoder:
        return model
    if type(old) is not SamHQMaskDecoder:
        raise ValueError(f"`model.mask_decoder` is a {type(old).__name__}; allowed is transformers' SamHQMaskDecoder.")
    with torch.device("meta"):
        decoder = HQMaskDecoder(model.config.mask_decoder_config)
    for name, parameter in old.named_parameters():  # loading would have all of them trained
        decoder.get_parameter(name).requires_grad_(parameter.requires_grad)
    decoder.load_state_dict(old.state_dict(keep_vars=True), assign=True)
    model.mask_decoder = decoder.train(old.training)
    return model


def make_sam_hq(sam: SamModel, seed: int = 0) -> SamHQModel:
    """A SAM-HQ with the weights of a SAM, whose branch is yet to be trained: the HQ mask is zero.

    Its masks are those of the SAM with one token more in the decoder. SAM's tokens attend to it, so they are close to
    SAM's own, not equal: the token starts as a copy of the one for SAM's single mask.

    Args:
        sam: Not adapted; it is left as it is.
        seed: Of the branch; PyTorch's global generator is left as it was.

    Raises:
        ValueError: If the encoder has no global block, whose output the branch reads.
    """
    vision = sam.config.vision_config
    if not [i for i in vision.global_attn_indexes if i < vision.num_hidden_layers]:
        raise ValueError(
            f"`global_attn_indexes` is {vision.global_attn_indexes}; SAM-HQ reads the output of a global block."
        )
    config = SamHQConfig(
        vision_config=same_values(vision, SamHQVisionConfig),
        prompt_encoder_config=same_values(sam.config.prompt_encoder_config, SamHQPromptEncoderConfig),
        mask_decoder_config=same_values(
            sam.config.mask_decoder_config, SamHQMaskDecoderConfig, vit_dim=vision.hidden_size
        ),
        initializer_range=sam.config.initializer_range,
        dtype=sam.config.dtype,
    )
    config._attn_implementation = sam.config._attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = correct_decoder(SamHQModel(config))
        for name in BRANCH:
            for module in model.mask_decoder.get_submodule(name).modules():
                if isinstance(module, (nn.Linear, nn.ConvTranspose2d, nn.Conv2d, nn.LayerNorm)):
                    module.reset_parameters()
    model.load_state_dict(sam.state_dict(), strict=False)
    with torch.no_grad():
        model.mask_decoder.hq_token.weight.copy_(model.mask_decoder.mask_tokens.weight[:1])
        nn.init.zeros_(model.mask_decoder.hq_mask_mlp.proj_out.weight)
        nn.init.zeros_(model.mask_decoder.hq_mask_mlp.proj_out.bias)
    return model.to(sam.device, sam.dtype).train(sam.training)
