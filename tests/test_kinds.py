"""The kinds of adapters, by name, on the models that they are for."""

import pytest
import torch
from continual_cases import BOXES, adapters_of, make_msam, predict, step
from peft import PeftModel

from peft_talora.continual.adapters import StockAdapters
from peft_talora.continual.bottleneck import BottleneckConfig
from peft_talora.continual.hq import correct_decoder, make_sam_hq
from peft_talora.continual.kinds import domain_config, make_adapters
from peft_talora.continual.shared_factors import SharedFactorAdapters

DOMAINS = ["pits", "rails"]


def test_what_is_adapted(sam):
    adapters = make_adapters(sam, config := domain_config("lora", sam, r=3))
    assert type(adapters) is StockAdapters
    adapters.add("pits", config)
    names = adapters.own_parameters("pits")
    assert len(names) == 4 * 4 * 2
    assert all(name.startswith("vision_encoder.layers.") for name in names)
    assert {min(p.shape) for p in names.values()} == {3}


def test_the_decoder_of_each_family(sam, sam_folder):
    assert domain_config("decoder", sam).modules_to_save == ["mask_decoder"]
    msam = make_msam(sam_folder)
    assert domain_config("decoder", msam).modules_to_save == ["task_heads.depth", "task_heads.edges"]


def test_the_hq_branch_is_all_that_a_sam_lacks(sam):
    base = make_sam_hq(sam)
    adapters = make_adapters(base, config := domain_config("hq", base))
    adapters.add("pits", config)
    own = {name.replace("modules_to_save.", "") for name in adapters.own_parameters("pits")}
    assert own == base_names(make_sam_hq(sam)) - base_names(sam)


def test_the_corrected_decoder_reads_a_domain_made_on_it(images, tmp_path):
    adapters = adapters_of("hq", ["pits"])
    step(adapters, "pits", steps=3)
    adapters.save("pits", tmp_path)
    expected = predict(adapters, "pits", images)
    adapters.unload("pits")
    adapters.base.save_pretrained(tmp_path / "base")
    base = correct_decoder(type(adapters.base).from_pretrained(tmp_path / "base"))
    model = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        found = model(pixel_values=images, input_boxes=BOXES, multimask_output=False).pred_masks
    assert torch.equal(found, expected)


def test_ta_lora_shares_factors(sam):
    assert type(make_adapters(sam, domain_config("talora", sam))) is SharedFactorAdapters


def test_the_bottleneck_s_width(sam):
    assert domain_config("adapter", sam, r=5) == BottleneckConfig(r=5)


def test_what_is_refused(sam):
    with pytest.raises(ValueError, match=r"`kind` must be one of .* got 'prompt'"):
        domain_config("prompt", sam)
    with pytest.raises(ValueError, match=r"needs a SamHQModel, .* got a SamModel"):
        domain_config("hq", sam)


@pytest.mark.parametrize("kind", ["lora", "talora", "adapter", "decoder"])
def test_in_front_of_several_tasks(kind, sam_folder, images):
    base = make_msam(sam_folder)
    adapters = make_adapters(base, config := domain_config(kind, base, r=4))
    for name in DOMAINS:
        adapters.add(name, config)
        for parameter in adapters.train(name).values():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    outputs = []
    for name in (None, *DOMAINS):
        adapters.activate(name)
        with torch.no_grad():
            outputs.append(base(images).logits)
    for task in ("depth", "edges"):
        assert not torch.equal(outputs[0][task], outputs[1][task])
        assert not torch.equal(outputs[1][task], outputs[2][task])


def base_names(model) -> set[str]:
    return {name for name, _ in model.named_parameters()}
