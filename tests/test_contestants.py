"""What a recipe trains and asks, by the names of a method and of a kind of adapter."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_sam
from moda_cases import ask, make_images
from transformers import SamHQModel, SamVisionModel

from peft_talora.continual.contestants import METHODS, default_rate, load_base, make_contestant
from peft_talora.continual.hq import HQMaskDecoder, make_sam_hq


class Named:
    name = "dark"


def contestant(method, adapter="lora", **options):
    base = make_sam_hq(make_sam()).eval() if adapter == "hq" else make_sam()
    loss = lambda logits, batch: logits.square().mean()  # noqa: E731
    batches = lambda domain: [{**ask(make_images("dark", 6)), "boxes": torch.zeros(6, 1, 4)}]  # noqa: E731
    return base, make_contestant(base, method, adapter, loss, batches, r=2, **options)


@pytest.mark.parametrize("method", METHODS)
def test_without_training_it_answers_as_the_plain_model(method):
    images = make_images("dark", 2)
    plain = make_sam().requires_grad_(False)(**ask(images)).pred_masks[:, :, 0]
    _, made = contestant(method)
    made.learner.begin(0, Named)
    with torch.no_grad():
        for parameter in made.learner.parameters():
            parameter.add_(0.3)
        zero_shot = made.zero_shot(ask(images))
        assert torch.equal(zero_shot.logits, plain)
        assert zero_shot.encoder_passes.tolist() == [1, 1]
        if method == "moda":
            made.learner.end(0, Named)
        answer = made.answer(ask(images))
    assert (answer.logits - plain).abs().max() > 1e-3
    assert answer.domains == (["dark"] * 2 if method == "moda" else None)
    assert (made.moda is not None) == (method == "moda")


def test_sizes_are_those_of_a_domain():
    _, shared = contestant("sequential")
    _, routed = contestant("moda")
    routed.learner.begin(0, Named)
    counted = sum(p.numel() for p in routed.learner.parameters())
    assert routed.own_parameters() == shared.own_parameters() == counted > 0


@pytest.mark.parametrize(("method", "field"), [("lwf", "strength"), ("ewc", "strength"), ("er", "size")])
def test_one_number_says_how_strongly_the_past_is_kept(method, field):
    assert getattr(contestant(method, strength=7)[1].learner, field) == 7


def test_bases_are_read_as_the_adapter_needs_them(sam_folder, tmp_path):
    assert type(load_base(sam_folder, "lora")).__name__ == "SamModel"
    assert isinstance(load_base(sam_folder, "hq"), SamHQModel)
    make_sam_hq(make_sam()).save_pretrained(tmp_path / "hq")
    assert isinstance(load_base(str(tmp_path / "hq"), "hq").mask_decoder, HQMaskDecoder)
    with pytest.raises(ValueError, match="is a 'sam_hq'; allowed: 'sam'"):
        load_base(str(tmp_path / "hq"), "lora")
    SamVisionModel(make_sam().config.vision_config).save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="is a 'sam_vision_model'; allowed"):
        load_base(str(tmp_path / "vision"), "lora")


def test_rates_are_those_that_were_chosen_for_the_published_table():
    """The project's own settings, which `recipes/benchmark_continual.py` chose on validation images."""
    file = Path(__file__).parent.parent / "docs" / "results" / "cosam-generated-settings.json"
    for entry, found in json.loads(file.read_text())["chosen"].items():
        assert default_rate(*entry.split("/")) == found["settings"]["learning_rate"], entry
