"""The encoder in parts is the encoder; where adapters begin."""

import pytest
import torch
from conftest import make_sam
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import SamHQVisionConfig
from transformers.models.sam_hq.modeling_sam_hq import SamHQVisionEncoder

from peft_talora.continual.encoder import embed_patches, finish, first_adapted_block, run_blocks

BLOCKS = 4


def make_hq_encoder() -> SamHQVisionEncoder:
    """SAM-HQ's encoder with the weights of the tiny SAM's, which has the same modules."""
    sam = make_sam()
    settings = sam.config.vision_config.to_dict() | {"model_type": "sam_hq_vision_model"}
    encoder = SamHQVisionEncoder(SamHQVisionConfig(**settings))
    encoder.load_state_dict(sam.vision_encoder.state_dict())
    return encoder.eval()


@pytest.mark.parametrize("cut", range(BLOCKS + 1))
@torch.no_grad()
def test_the_parts_are_the_whole_wherever_it_is_cut(sam, images, cut):
    encoder = sam.vision_encoder
    hidden = run_blocks(encoder, embed_patches(encoder, images), 0, cut)
    whole = finish(encoder, run_blocks(encoder, hidden, cut))
    assert torch.equal(whole, encoder(images).last_hidden_state)
    assert 0.1 < whole.std() < 10


@torch.no_grad()
def test_without_positions(sam, images):
    encoder = sam.vision_encoder
    encoder.pos_embed = None
    whole = finish(encoder, run_blocks(encoder, embed_patches(encoder, images)))
    assert torch.equal(whole, encoder(images).last_hidden_state)


@torch.no_grad()
def test_sam_hq_with_what_its_decoder_takes_of_the_blocks(images):
    encoder, found = make_hq_encoder(), []
    hidden = run_blocks(encoder, embed_patches(encoder, images), 0, 2, found)
    whole = finish(encoder, run_blocks(encoder, hidden, 2, global_outputs=found))
    output = encoder(images)
    assert torch.equal(whole, output.last_hidden_state)
    assert len(found) == len(output.intermediate_embeddings) == 1
    assert torch.equal(found[0], output.intermediate_embeddings[0])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 5)])
def test_blocks_that_are_not_there_are_refused(sam, images, start, stop):
    with pytest.raises(ValueError, match=r"allowed: 0 ≤ start ≤ stop ≤ 4"):
        run_blocks(sam.vision_encoder, embed_patches(sam.vision_encoder, images), start, stop)


@pytest.mark.parametrize(
    ("first", "config"),
    [
        (0, LoraConfig(target_modules=["qkv"])),
        (2, LoraConfig(target_modules=["qkv", "lin2"], layers_to_transform=[2, 3], layers_pattern="layers")),
        (0, LoraConfig(target_modules=["patch_embed.projection"])),
        (0, LoraConfig(target_modules=["layers.3.attn.qkv"], modules_to_save=["patch_embed"])),
        (3, LoraConfig(target_modules=["layers.3.attn.qkv", "neck.conv1"])),
        (1, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=["vision_encoder.layers.1"])),
        (BLOCKS - 1, LoraConfig(target_modules=["vision_encoder.neck.conv1"])),
        (BLOCKS, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=["mask_decoder"])),
    ],
)
def test_the_first_adapted_block(sam, first, config):
    assert first_adapted_block(sam) == BLOCKS
    model = get_peft_model(sam, config)
    assert first_adapted_block(model) == first_adapted_block(sam) == first_adapted_block(model, "default") == first
    assert first_adapted_block(model, "other") == BLOCKS


def test_the_first_block_of_each_adapter_alone(sam):
    model = get_peft_model(sam, LoraConfig(target_modules=["layers.3.attn.qkv"]), "late")
    model.add_adapter("early", LoraConfig(target_modules=["layers.1.attn.qkv", "layers.3.attn.qkv"]))
    assert [first_adapted_block(model, name) for name in ("late", "early")] == [3, 1]
    assert first_adapted_block(model) == 1
    model.delete_adapter("early")
    assert first_adapted_block(model) == 3


def test_blocks_below_the_first_are_the_base_model_s(sam, images):
    before = embed_patches(sam.vision_encoder, images)
    below, above = (run_blocks(sam.vision_encoder, before, 0, stop) for stop in (2, 3))
    model = get_peft_model(
        sam,
        LoraConfig(
            target_modules=["qkv"], layers_to_transform=[2], layers_pattern="layers", init_lora_weights="gaussian"
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    first = first_adapted_block(model)
    assert torch.equal(run_blocks(sam.vision_encoder, before, 0, first), below)
    assert not torch.allclose(run_blocks(sam.vision_encoder, before, 0, first + 1), above)
