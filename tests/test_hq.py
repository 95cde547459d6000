"""SAM-HQ with a decoder that keeps SAM's masks right, and a SAM-HQ made of a SAM."""

import pytest
import torch
from conftest import make_sam
from family_models import SIZE
from family_models import make_sam_hq as make_random_sam_hq
from peft import get_peft_model
from transformers import SamHQModel
from transformers.models.sam_hq.modeling_sam_hq import SamHQMaskDecoder

from peft_talora.continual.hq import BRANCH, HQMaskDecoder, correct_decoder, make_sam_hq
from peft_talora.continual.kinds import domain_config
from peft_talora.sam_hq import SamHQAsSam, load_sam_hq


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def prompts(size: int) -> dict:
    """Three boxes for each of two images, so that images and prompts cannot be mistaken for each other."""
    corner = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(2)) * size / 2
    return {"input_boxes": torch.cat([corner, corner + size / 3], dim=-1)}


def with_right_upscaling(model: SamHQModel) -> SamHQModel:
    """transformers' own decoder, whose upscaling is given what comes out of the transformer, by hooks."""
    seen = []

    def upscaled(module, inputs):
        return (seen[-1][1].squeeze(1).transpose(1, 2).unflatten(2, inputs[0].shape[-2:]),)

    model.mask_decoder.transformer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.mask_decoder.upscale_conv1.register_forward_pre_hook(upscaled)
    return model


@pytest.mark.parametrize("given", [prompts(SIZE), {}], ids=["boxes", "no prompt"])
@pytest.mark.parametrize("multimask", [True, False], ids=["several", "one"])
@pytest.mark.parametrize("hq_only", [True, False], ids=["hq", "sum"])
@torch.no_grad()
def test_it_is_transformers_decoder_but_for_the_upscaling(images, given, multimask, hq_only):
    values = {**given, "multimask_output": multimask, "hq_token_only": hq_only}
    expected = with_right_upscaling(make_random_sam_hq())(images, **values)
    found = correct_decoder(make_random_sam_hq())(images, **values)
    assert found.pred_masks.shape[:3] == (2, 3 if given else 1, 3 if multimask and not hq_only else 1)
    assert found.pred_masks.std() > 0.1
    torch.testing.assert_close(found.pred_masks, expected.pred_masks, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.iou_scores, expected.iou_scores, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sam_s_own_masks_are_those_of_a_sam_with_the_additional_token(images, tmp_path):
    model = correct_decoder(make_random_sam_hq())
    sam_and_hq = model(images, **prompts(SIZE), multimask_output=False, hq_token_only=False).pred_masks
    own = sam_and_hq - model(images, **prompts(SIZE), multimask_output=False, hq_token_only=True).pred_masks
    model.save_pretrained(tmp_path)
    sam = load_sam_hq(tmp_path)
    expected = read_with_additional_token(sam, images)
    assert expected.std() > 0.1
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def read_with_additional_token(sam: SamHQAsSam, images: torch.Tensor) -> torch.Tensor:
    """SAM's single mask; the additional token is its last, for which it has no weights of its own."""
    decoder = sam.mask_decoder
    decoder.num_mask_tokens = 4
    return sam(images, **prompts(SIZE), multimask_output=False).pred_masks


class TestCorrectDecoder:
    def test_parameters_are_the_very_same(self):
        model = make_random_sam_hq()
        before = dict(model.named_parameters())
        model.mask_decoder.iou_token.weight.requires_grad_(False)
        assert correct_decoder(model) is model
        assert type(model.mask_decoder) is HQMaskDecoder
        assert not model.training
        assert not model.mask_decoder.training
        after = dict(model.named_parameters())
        assert before.keys() == after.keys()
        assert all(after[name] is parameter for name, parameter in before.items())
        assert not model.mask_decoder.iou_token.weight.requires_grad

    def test_twice_is_once(self):
        model = correct_decoder(make_random_sam_hq())
        decoder = model.mask_decoder
        assert correct_decoder(model).mask_decoder is decoder

    def test_an_adapted_decoder_is_refused(self):
        model = make_random_sam_hq()
        get_peft_model(model, domain_config("decoder", model))
        with pytest.raises(ValueError, match="is a ModulesToSaveWrapper; allowed is transformers' SamHQMaskDecoder"):
            correct_decoder(model)

    def test_early_features_are_needed(self, images):
        model = correct_decoder(make_random_sam_hq())
        embeddings, _ = model.get_image_embeddings(images)
        with pytest.raises(ValueError, match="`intermediate_embeddings` is None"):
            model(image_embeddings=embeddings, **prompts(SIZE))


class TestMakeSamHQ:
    size = 64

    @torch.no_grad()
    def test_masks_are_those_of_the_sam_with_one_token_more(self, sam, images):
        images = torch.nn.functional.interpolate(images, size=self.size)
        model = make_sam_hq(sam)
        values = {**prompts(self.size), "multimask_output": False}
        assert not model(images, **values, hq_token_only=True).pred_masks.any()
        decoder = sam.mask_decoder
        tokens = decoder.mask_tokens.weight.detach()
        decoder.mask_tokens.weight = torch.nn.Parameter(torch.cat([tokens, tokens[:1]]))
        expected = sam(images, **values)
        assert expected.pred_masks.std() > 0.1
        found = model(images, **values)
        torch.testing.assert_close(found.pred_masks, expected.pred_masks, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.iou_scores, expected.iou_scores, rtol=1e-5, atol=1e-5)

    def test_all_of_the_sam_is_taken_over_and_the_branch_alone_is_new(self, sam):
        model, state = make_sam_hq(sam), sam.state_dict()
        new = {name.split(".")[1] for name in model.state_dict().keys() - state.keys()}
        assert new == set(BRANCH)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
        assert model.config.mask_decoder_config.vit_dim == 32
        shared = {parameter.data_ptr() for parameter in sam.parameters()}
        assert not any(parameter.data_ptr() in shared for parameter in model.parameters())

    def test_the_branch_learns(self, sam, images):
        """The first step reaches what is zero, and the following ones what lies before it."""
        images = torch.nn.functional.interpolate(images, size=self.size)
        model = make_sam_hq(sam)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            masks = model(images, **prompts(self.size), multimask_output=False).pred_masks
            (masks - 1).square().mean().backward()
            optimizer.step()
        for name in BRANCH:
            assert any(p.grad.any() for p in model.mask_decoder.get_submodule(name).parameters()), name

    def test_the_seed_decides_and_the_global_generator_is_left_alone(self, sam):
        torch.manual_seed(3)
        state = torch.get_rng_state()
        first, again, other = make_sam_hq(sam), make_sam_hq(sam), make_sam_hq(sam, seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        weights = [model.mask_decoder.mask_conv1.weight for model in (first, again, other)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_dtype_and_mode_are_the_sam_s(self, sam):
        model = make_sam_hq(sam.to(torch.bfloat16))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert not model.training

    def test_a_saved_one_is_a_checkpoint_of_transformers(self, sam, images, tmp_path):
        images = torch.nn.functional.interpolate(images, size=self.size)
        model = make_sam_hq(sam)
        model.save_pretrained(tmp_path)
        loaded = SamHQModel.from_pretrained(tmp_path)
        assert type(loaded.mask_decoder) is SamHQMaskDecoder
        with torch.no_grad():
            expected = model(images, **prompts(self.size)).pred_masks
            assert torch.equal(correct_decoder(loaded)(images, **prompts(self.size)).pred_masks, expected)

    def test_an_encoder_without_global_blocks_is_refused(self):
        sam = make_sam()
        sam.config.vision_config.global_attn_indexes = []
        with pytest.raises(ValueError, match=r"`global_attn_indexes` is \[\]"):
            make_sam_hq(sam)
