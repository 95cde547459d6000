"""Domains inside one model: what one learns changes neither another nor the model."""

import json

import pytest
import torch
from continual_cases import (
    KINDS,
    STOCK,
    adapters_of,
    changed,
    config_of,
    make_base,
    masks,
    predict,
    snapshot,
    step,
)
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch.testing import assert_close

from peft_talora.continual.adapters import StockAdapters

DOMAINS = ["pits", "rails", "pills"]
every_kind = pytest.mark.parametrize("kind", KINDS)
stock_kind = pytest.mark.parametrize("kind", STOCK)


def trained_names(adapters) -> set[str]:
    return {name for name, p in adapters.base.named_parameters(remove_duplicate=False) if p.requires_grad}


def wrappers(model) -> list:
    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


@every_kind
class TestEveryKind:
    def test_a_new_domain_is_the_plain_model(self, kind, images):
        base = make_base(kind)
        with torch.no_grad():
            expected = masks(base, images)
        adapters = adapters_of(kind, DOMAINS[:1])
        assert_close(predict(adapters, "pits", images), expected)  # a copy of weights may be summed in another order
        step(adapters, "pits")
        assert (predict(adapters, "pits", images) - expected).abs().max() > 1e-3
        adapters.add("rails", config_of(kind, base))
        assert_close(predict(adapters, "rails", images), expected)
        assert_close(predict(adapters, None, images), expected)

    def test_training_a_domain_changes_no_other_and_not_the_model(self, kind, images):
        adapters = adapters_of(kind, DOMAINS)
        step(adapters, "pits")
        names = [None, "pits", "pills"]
        outputs = {name: predict(adapters, name, images) for name in names}
        before = snapshot(adapters.base)
        step(adapters, "rails")
        moved = changed(before, adapters.base)
        assert moved
        assert all("rails" in name.split(".") for name in moved)
        for name in names:
            assert torch.equal(predict(adapters, name, images), outputs[name]), name
        assert not torch.equal(predict(adapters, "rails", images), outputs[None])

    def test_exactly_its_own_parameters_have_gradients(self, kind):
        adapters = adapters_of(kind, DOMAINS)
        step(adapters, "pits")
        adapters.base.requires_grad_(True)  # whatever was trainable before
        given = adapters.train("rails")
        own = adapters.own_parameters("rails")
        assert {id(p) for p in given.values()} == {id(p) for p in own.values()}
        trained = [p for p in adapters.base.parameters() if p.requires_grad]
        assert {id(p) for p in trained} == {id(p) for p in own.values()}
        assert len(trained) == len(own)
        for name in ("pits", "pills"):
            assert not {id(p) for p in adapters.own_parameters(name).values()} & {id(p) for p in own.values()}
            assert adapters.own_parameters(name).keys() == own.keys()

    def test_nothing_else_ever_trains(self, kind, tmp_path):
        adapters = adapters_of(kind, DOMAINS)
        assert not trained_names(adapters)
        adapters.train("pits")
        adapters.freeze()
        assert not trained_names(adapters)
        for name in ("pits", None, "rails"):
            adapters.train("pits")
            adapters.activate(name)
            assert not trained_names(adapters)
        adapters.train("pits")
        adapters.add("bottles", config_of(kind, adapters.base))
        assert not trained_names(adapters)
        assert adapters.active == "pits"
        adapters.train("pits")
        adapters.unload("rails")
        assert not trained_names(adapters)
        adapters.train("pits")
        adapters.unload("pits")
        assert not trained_names(adapters)

    def test_removing_a_domain_leaves_the_rest(self, kind, images):
        adapters = adapters_of(kind, DOMAINS)
        for name in DOMAINS:
            step(adapters, name)
        expected = {name: predict(adapters, name, images) for name in (None, "pits", "pills")}
        adapters.activate("pits")
        adapters.unload("rails")
        assert adapters.resident() == ["pits", "pills"]
        assert adapters.active == "pits"
        with torch.no_grad():
            assert torch.equal(masks(adapters.base, images), expected["pits"])
        assert not any("rails" in name.split(".") for name, _ in adapters.base.named_parameters())
        for name, output in expected.items():
            assert torch.equal(predict(adapters, name, images), output)
        adapters.activate("pits")
        adapters.unload("pits")
        assert adapters.active is None
        with torch.no_grad():
            assert torch.equal(masks(adapters.base, images), expected[None])

    def test_all_can_go_and_others_come(self, kind, images):
        adapters = adapters_of(kind, ["pits"])
        plain = predict(adapters, None, images)
        step(adapters, "pits")
        adapters.unload("pits")
        assert adapters.resident() == []
        assert torch.equal(predict(adapters, None, images), plain)
        adapters.add("rails", config_of(kind, adapters.base))
        step(adapters, "rails")
        assert not torch.equal(predict(adapters, "rails", images), plain)
        assert torch.equal(predict(adapters, None, images), plain)

    def test_training_goes_on_where_it_stopped(self, kind, images):
        """Switching in between changes nothing."""
        adapters, others = adapters_of(kind, DOMAINS[:2]), adapters_of(kind, DOMAINS[:2])
        for model in (adapters, others):
            step(model, "rails")
        step(adapters, "rails")
        others.activate(None)
        predict(others, "pits", images)
        step(others, "rails")
        assert torch.equal(predict(adapters, "rails", images), predict(others, "rails", images))

    def test_domains_that_are_not_there(self, kind, tmp_path):
        adapters = adapters_of(kind, ["pits"])
        calls = [adapters.train, adapters.activate, adapters.unload, adapters.own_parameters]
        for call in [*calls, lambda name: adapters.save(name, tmp_path)]:
            with pytest.raises(ValueError, match=r"Domain 'rails' is not resident; .* are \['pits'\]"):
                call("rails")

    def test_names_that_are_refused(self, kind, images):
        adapters = adapters_of(kind, ["pits"])
        before = predict(adapters, "pits", images)
        for name in ("attn", "mask_decoder", "base_layer", "modules_to_save", "keys", "two words", "pits", "weight"):
            with pytest.raises(ValueError, match=f"Domain name '{name}' is not allowed"):
                adapters.add(name, config_of(kind, adapters.base))
        assert adapters.resident() == ["pits"]
        assert torch.equal(predict(adapters, "pits", images), before)


class TestStock:
    @stock_kind
    def test_a_domain_s_folder_loads_alone(self, kind, images, tmp_path):
        adapters = adapters_of(kind, DOMAINS[:2])
        for name in DOMAINS[:2]:
            step(adapters, name)
            adapters.save(name, tmp_path / name)
        expected = {name: predict(adapters, name, images) for name in DOMAINS[:2]}
        assert not torch.equal(expected["pits"], expected["rails"])
        for name, output in expected.items():
            model = PeftModel.from_pretrained(make_base(kind), tmp_path / name)
            with torch.no_grad():
                assert torch.equal(masks(model.get_base_model(), images), output)
            assert {file.name for file in (tmp_path / name).iterdir()} == {
                "adapter_config.json",
                "adapter_model.safetensors",
            }

    @stock_kind
    def test_a_file_holds_one_domain_s_parameters_only(self, kind, tmp_path):
        adapters = adapters_of(kind, DOMAINS)
        step(adapters, "rails")
        adapters.save("rails", tmp_path)
        state, own = load_file(tmp_path / "adapter_model.safetensors"), adapters.own_parameters("rails")
        assert sum(tensor.numel() for tensor in state.values()) == sum(p.numel() for p in own.values())
        assert len(state) == len(own)
        assert not any(name in key for name in DOMAINS for key in state)

    @stock_kind
    def test_load_again_under_another_name(self, kind, images, tmp_path):
        adapters = adapters_of(kind, DOMAINS)
        for name in DOMAINS:
            step(adapters, name)
        expected = {name: predict(adapters, name, images) for name in (None, *DOMAINS)}
        adapters.save("rails", tmp_path)
        adapters.unload("rails")
        adapters.activate("pits")
        adapters.load("heavy", tmp_path)
        assert adapters.active == "pits"
        assert not trained_names(adapters)
        assert torch.equal(predict(adapters, "heavy", images), expected["rails"])
        for name in (None, "pits", "pills"):
            assert torch.equal(predict(adapters, name, images), expected[name])
        assert adapters.train("heavy")
        assert trained_names(adapters)

    def test_a_base_beside_the_domains_is_named_by_its_path(self, tmp_path):
        make_base("lora").save_pretrained(tmp_path / "base")
        adapters = StockAdapters(type(make_base("lora")).from_pretrained(tmp_path / "base"))
        adapters.add("pits", LoraConfig(target_modules=["qkv"]))
        adapters.save("pits", tmp_path / "pits")
        config = json.loads((tmp_path / "pits" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str((tmp_path / "base").resolve())
        assert config["auto_mapping"]["base_model_class"] == "SamModel"
        assert config["inference_mode"]
        assert not adapters.peft_model.peft_config["pits"].inference_mode

    def test_the_given_configuration_is_left_as_it_is(self):
        base = make_base("lora")
        config = LoraConfig(target_modules=["qkv"])
        before = config.to_dict()
        adapters = StockAdapters(base)
        adapters.add("pits", config)
        adapters.add("rails", config)
        assert config.to_dict() == before
        assert adapters.peft_model.peft_config["pits"] is not adapters.peft_model.peft_config["rails"]

    def test_domains_of_different_layers(self, images):
        adapters = StockAdapters(make_base("lora"))
        plain = predict(adapters, None, images)
        adapters.add("pits", LoraConfig(target_modules=["qkv"]))
        adapters.add("rails", LoraConfig(target_modules=["lin1"], modules_to_save=["mask_decoder"]))
        step(adapters, "rails")
        assert torch.equal(predict(adapters, "pits", images), plain)
        assert torch.equal(predict(adapters, None, images), plain)
        step(adapters, "pits")
        expected = predict(adapters, "pits", images)
        adapters.unload("rails")
        assert torch.equal(predict(adapters, "pits", images), expected)

    def test_no_dropout_in_evaluation(self, images):
        adapters = StockAdapters(make_base("lora"))
        adapters.add("pits", LoraConfig(target_modules=["qkv"], lora_dropout=0.5))
        step(adapters, "pits")
        assert torch.equal(predict(adapters, "pits", images), predict(adapters, "pits", images))
        adapters.base.train()
        adapters.add("rails", LoraConfig(target_modules=["qkv"], lora_dropout=0.5))
        assert all(module.training for module in adapters.base.modules())

    @stock_kind
    def test_without_domains_the_model_is_what_it_was(self, kind, images):
        base = make_base(kind)
        before = {name: id(module) for name, module in base.named_modules()}
        adapters = StockAdapters(base)
        for name in DOMAINS[:2]:
            adapters.add(name, config_of(kind, base))
        step(adapters, "rails")
        for name in DOMAINS[:2]:
            adapters.unload(name)
        assert {name: id(module) for name, module in base.named_modules()} == before
        assert StockAdapters(base).resident() == []

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (LoraConfig(target_modules=["qkv"], bias="all"), "`bias`='all' is not allowed"),
            (LoraConfig(target_modules=["qkv"], init_lora_weights="pissa"), "`init_lora_weights`='pissa' is not"),
            (PromptTuningConfig(num_virtual_tokens=2), "`peft_type` PROMPT_TUNING is not allowed"),
            (LoraConfig(target_modules=["nothing"]), r"not found"),
            (LoraConfig(target_modules=["qkv", "layer_norm2"], modules_to_save=["neck"]), "is not supported"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    @pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
    def test_a_refused_configuration_changes_nothing(self, config, message, first, images):
        adapters = StockAdapters(make_base("lora"))
        if not first:
            adapters.add("pits", LoraConfig(target_modules=["qkv"], init_lora_weights=False))
            adapters.activate("pits")
        with torch.no_grad():
            before, modules = masks(adapters.base, images), dict(adapters.base.named_modules())
        with pytest.raises(ValueError, match=message):
            adapters.add("rails", config)
        assert dict(adapters.base.named_modules()) == modules
        assert adapters.resident() == ([] if first else ["pits"])
        with torch.no_grad():
            assert torch.equal(masks(adapters.base, images), before)
        adapters.add("rails", LoraConfig(target_modules=["qkv"]))

    def test_one_method_for_all(self):
        adapters = adapters_of("lora", ["pits"])
        with pytest.raises(ValueError, match="different peft types"):
            adapters.add("rails", IA3Config(target_modules=["qkv"], feedforward_modules=[]))
        assert adapters.resident() == ["pits"]

    @pytest.mark.parametrize("name", ["lora", "a", "lora_A", "lora_pits"])
    def test_names_of_the_method_are_refused(self, name, sam):
        with pytest.raises(ValueError, match=f"Domain name '{name}' is not allowed: .* start by 'lora_'"):
            StockAdapters(sam).add(name, LoraConfig(target_modules=["qkv"]))

    def test_other_methods_of_peft(self, images, tmp_path):
        adapters = StockAdapters(make_base("lora"))
        for name in DOMAINS[:2]:
            adapters.add(name, IA3Config(target_modules=["qkv"], feedforward_modules=[]))
            step(adapters, name)
        expected = predict(adapters, "pits", images)
        adapters.save("pits", tmp_path)
        adapters.unload("pits")
        adapters.load("pits", tmp_path)
        assert torch.equal(predict(adapters, "pits", images), expected)

    def test_an_adapted_model_is_refused(self):
        adapters = adapters_of("lora", ["pits"])
        with pytest.raises(ValueError, match="`base` has adapters already"):
            StockAdapters(adapters.base)
