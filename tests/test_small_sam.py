"""The small random SAM is a real one: its embedding depends on the image."""

import pytest
import torch
from transformers import SamModel

from peft_talora import make_small_sam, save_small_sam


@torch.no_grad()
def test_two_images_give_embeddings_that_differ():
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    first, second = make_small_sam().vision_encoder(images).last_hidden_state
    assert (first - second).abs().mean() > 1e-2


def test_one_seed_gives_one_model_and_leaves_the_generator_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    folder = save_small_sam(tmp_path / "sam", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    saved, again, other = SamModel.from_pretrained(folder), make_small_sam(seed=3), make_small_sam(seed=4)
    for name, value in again.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name]), name
    assert not torch.equal(again.mask_decoder.iou_token.weight, other.mask_decoder.iou_token.weight)


@pytest.mark.parametrize("image_size", [0, 100])
def test_a_size_that_is_no_multiple_of_the_patch_is_named(image_size):
    with pytest.raises(ValueError, match=rf"`image_size` must be a positive multiple of 8; got {image_size}"):
        make_small_sam(image_size)
