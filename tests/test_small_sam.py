"""The small random SAM is a real one, its embedding depends on the image; the pre-trained one has learned."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import SamConfig, SamModel

from peft_talora import SMALL_SAM, load_image_processor, make_small_sam, promptable, save_small_sam
from peft_talora.data import ObjectScenes
from peft_talora.small_sam import copy_small_sam


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


@pytest.fixture(scope="module")
def pretrained():
    """The checkpoint of the package, as a user reads it."""
    model, info = SamModel.from_pretrained(SMALL_SAM, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def test_the_pretrained_one_is_a_stock_sam_in_float32(pretrained, capfd, caplog):
    SamModel.from_pretrained(SMALL_SAM)
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    assert "Warning" not in capfd.readouterr().err
    state = pretrained.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    for name, value in load_file(Path(SMALL_SAM) / "model.safetensors").items():
        assert value.dtype == torch.float16, name
        assert value.isfinite().all(), name
        assert torch.equal(state[name], value.float()), name


def test_the_pretrained_one_is_small():
    assert sum(file.stat().st_size for file in Path(SMALL_SAM).iterdir()) <= 10 * 2**20


def shape_of(config: SamConfig) -> dict:
    """What a configuration says of shapes and arithmetic, without where it came from and how it is stored."""
    free = {"dtype", "_name_or_path", "transformers_version", "architectures"}
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    return {part: {k: v for k, v in getattr(config, part).to_dict().items() if k not in free} for part in parts}


def test_the_pretrained_one_has_the_shape_of_the_random_one(pretrained):
    random = make_small_sam()
    assert shape_of(pretrained.config) == shape_of(random.config)
    shapes = {name: value.shape for name, value in random.state_dict().items()}
    assert shapes == {name: value.shape for name, value in pretrained.state_dict().items()}
    assert load_image_processor(SMALL_SAM).size["longest_edge"] == 128


def test_the_pretrained_one_segments_and_the_random_one_does_not(pretrained):
    models = {"pre-trained": pretrained, "random": make_small_sam()}
    figures = promptable.measure(models, ObjectScenes("test", 6))
    learned, random = figures["pre-trained"], figures["random"]
    assert learned["box"] > random["box"] + 0.3
    assert learned["best of 3"] > random["best of 3"] + 0.2
    assert learned["no prompt"] > random["no prompt"]


def test_a_copy_is_the_pretrained_one_and_its_owner_can_write_it(tmp_path):
    folder = copy_small_sam(tmp_path / "new" / "base")
    assert folder == str(tmp_path / "new" / "base")
    assert copy_small_sam(folder) == folder  # over an earlier one
    copied = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    assert copied == {file.name: file.read_bytes() for file in Path(SMALL_SAM).iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= copied.keys()
    assert all(os.access(file, os.W_OK) for file in Path(folder).iterdir())
