"""mSAM from a SAM-HQ checkpoint: an ordinary mSAM that starts as SAM-HQ's own SAM masks."""

import pytest
import torch
from family_models import SIZE, make_sam2, make_sam_hq
from peft import get_peft_model
from transformers import SamConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from peft_talora import TALoRAConfig, load, save_adapter
from peft_talora.msam import MSamConfig, MSamModel

TASKS = {"segmentation": 5, "depth": 1, "normals": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A saved SAM-HQ checkpoint."""
    path = tmp_path_factory.mktemp("sam-hq")
    make_sam_hq().save_pretrained(path)
    return str(path)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def sam_mask_0(images: torch.Tensor) -> torch.Tensor:
    """SAM's first mask, (B, 1, 4h, 4w), out of SAM-HQ, which returns it plus its finer mask, or the finer one alone.

    Hooks give the upscaling its input, the transformer's second output: see `sam_hq.py` on what transformers gives it.
    """
    model, seen = make_sam_hq(), []

    def upscaled(module, inputs):
        return (seen[-1][1].squeeze(1).transpose(1, 2).unflatten(2, inputs[0].shape[-2:]),)

    model.mask_decoder.transformer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.mask_decoder.upscale_conv1.register_forward_pre_hook(upscaled)
    both = model(images, multimask_output=False, hq_token_only=False).pred_masks[:, 0]
    return both - model(images, multimask_output=False, hq_token_only=True).pred_masks[:, 0]


def test_every_channel_starts_as_sam_hq_s_own_sam_mask(folder, images):
    with torch.no_grad():
        mask_0 = sam_mask_0(images)
        logits = MSamModel.from_pretrained(folder, tasks=TASKS)(images).logits
    assert mask_0.std() > 0.1
    for name, channels in TASKS.items():
        assert logits[name].shape == (2, channels, SIZE, SIZE)  # patches of 4 px, four pixels a patch
        torch.testing.assert_close(logits[name], mask_0.expand_as(logits[name]), rtol=1e-5, atol=1e-5)


def test_the_additional_token_matters(folder, images):
    """Without it the masks would be those of no SAM-HQ."""
    with torch.no_grad():
        model = MSamModel.from_pretrained(folder, tasks={"depth": 1})
        before = model(images).logits["depth"]
        model.task_heads["depth"].mask_decoder.mask_tokens.weight[4] += 1
        assert (model(images).logits["depth"] - before).abs().max() > 1e-3


def test_nothing_is_missing_and_only_the_second_branch_is_left_behind(folder):
    model, info = MSamModel.from_pretrained(folder, tasks=TASKS, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["unexpected_keys"]
    source, own = make_sam_hq().vision_encoder.state_dict(), model.vision_encoder.state_dict()
    assert source.keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in source.items())


@pytest.mark.parametrize("mode", ["channel", "token"])
def test_it_is_an_ordinary_msam(folder, images, tmp_path, mode):
    model = MSamModel.from_pretrained(folder, tasks=TASKS, decoder_mode=mode)
    assert type(model.config) is MSamConfig
    assert type(model.config.vision_config) is SamVisionConfig
    assert model.vision_encoder.config is model.config.vision_config
    assert type(model.vision_encoder) is SamVisionEncoder
    assert isinstance(model.config, SamConfig)
    assert "hq" not in str(model.state_dict().keys())
    model.save_pretrained(tmp_path)
    loaded = MSamModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, actual = model(images).logits, loaded(images).logits
    for name in TASKS:
        assert torch.equal(actual[name], expected[name])


def test_adapter_with_heads_round_trip(folder, images, tmp_path):
    torch.manual_seed(7)
    model = get_peft_model(MSamModel.from_pretrained(folder, tasks=TASKS), TALoRAConfig(r=4, init_weights=False))
    model.eval()
    save_adapter(model, tmp_path)
    with torch.no_grad():
        expected, actual = model(images).logits, load(tmp_path)(images).logits
    for name in TASKS:
        assert torch.equal(actual[name], expected[name])
    assert (expected["depth"] - expected["normals"][:, :1]).abs().max() > 0.05


def test_arguments_of_transformers_are_passed_on(folder):
    model = MSamModel.from_pretrained(
        folder, tasks={"depth": 1}, dtype=torch.bfloat16, attn_implementation="eager", image_size=48
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model(torch.zeros(1, 3, 48, 48, dtype=torch.bfloat16)).logits["depth"].shape == (1, 1, 48, 48)


def test_tasks_are_needed(folder):
    with pytest.raises(ValueError, match="stock SAM: say what to predict by tasks="):
        MSamModel.from_pretrained(folder)


def test_other_families_are_refused(tmp_path):
    make_sam2().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type 'sam2'; allowed are 'sam', 'sam_hq', 'msam'"):
        MSamModel.from_pretrained(tmp_path, tasks=TASKS)
