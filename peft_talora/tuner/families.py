"""What the tuner knows of single model families of transformers, by `model_type` and by module names."""

import re

_FUSED = ["attn.qkv"]
_SPLIT = ["attention.q_proj", "attention.k_proj", "attention.v_proj"]

# Queries, keys and values of the vision encoder. The names carry the attention's own ("attn", "attention"), which the
# text, decoder, memory and detector layers of these models do not share; lists, so that `layers_to_transform` works.
DEFAULT_TARGETS = {
    **dict.fromkeys(("sam", "msam", "sam_vision_model", "sam_hq", "sam_hq_vision_model"), _FUSED),
    **dict.fromkeys(("sam2", "sam2_video", "sam2_vision_model", "sam2_hiera_det_model"), _FUSED),
    **dict.fromkeys(("sam3", "sam3_vision_model", "sam3_vit_model"), _SPLIT),
    **dict.fromkeys(("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "swin"), _SPLIT),
}

# The two norms of a vision block, in the families above. Necks, text and detector layers carry the same names in other
# places; a block counts if it belongs to the `vision_encoder`, or else to a model that is all vision encoder.
BLOCK_NORMS = re.compile(
    r"((.*\.)?(vision_encoder|vit|deit|dinov2|dinov2_with_registers|dinov3_vit|swin)\.)?"
    r"((backbone|encoder|model)\.)*(layers?|blocks)\.\d+\.(blocks\.\d+\.)?"
    r"(layer_norm[12]|layernorm_(before|after)|norm[12])"
)

# Layers that get the outputs of all decoder layers at once, these on the leading axis: the task of a sample would be
# taken for the task of a decoder layer, without a word where the numbers happen to divide.
NOT_BY_SAMPLE = re.compile(r"(.*\.)?(detr_decoder\.box_head\..*|dot_product_scoring\.query_proj)")
