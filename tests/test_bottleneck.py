"""The bottleneck adapter: its formula, and what PEFT lets a user do with any method."""

import copy

import pytest
import torch
from conftest import make_sam
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

from peft_talora import MSamModel
from peft_talora.continual.bottleneck import BottleneckConfig, BottleneckLayer, Linear
from peft_talora.continual.hq import make_sam_hq

LAST_OF_MLP = {f"vision_encoder.layers.{block}.mlp.lin2" for block in range(4)}


def layers(model: nn.Module) -> dict[str, BottleneckLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}


def adapt(model: nn.Module, adapter_name: str = "default", **values) -> PeftModel:
    torch.manual_seed(5)
    return get_peft_model(model, BottleneckConfig(**{"r": 4, **values}), adapter_name=adapter_name).eval()


@torch.no_grad()
def encode(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.vision_encoder(images).last_hidden_state


class TestRegistration:
    def test_it_is_one_of_peft_s_methods(self):
        assert PeftType("BOTTLENECK") is PeftType.BOTTLENECK
        assert PeftType.BOTTLENECK in list(PeftType)
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.BOTTLENECK] is BottleneckConfig
        assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.BOTTLENECK] == "bottleneck_"


class TestConfig:
    def test_round_trip(self, tmp_path):
        config = BottleneckConfig(r=3, scaling=0.5, activation="relu", target_modules={"lin2", "lin1"})
        config.save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
        assert config.target_modules == ["lin1", "lin2"]

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"r": 0}, "`r` must be an integer of at least 1; got 0"),
            ({"scaling": float("nan")}, "`scaling` must be a finite number; got nan"),
            ({"activation": "tanh"}, r"`activation` must be one of \['gelu', 'relu'\]; got 'tanh'"),
            ({"dropout": 1.0}, "`dropout` must be at least 0 and less than 1; got 1.0"),
            ({"layers_to_transform": 0, "target_modules": ".*lin2"}, r"`layers_to_transform`=0 .* got '\.\*lin2'"),
        ],
    )
    def test_what_is_refused(self, values, message):
        with pytest.raises(ValueError, match=message):
            BottleneckConfig(**values)


class TestTargets:
    @pytest.mark.parametrize("family", ["sam", "sam_hq", "msam"])
    def test_the_last_of_each_mlp_and_nothing_of_the_mask_decoder(self, sam, sam_folder, family):
        models = {"sam": lambda: sam, "sam_hq": lambda: make_sam_hq(sam)}
        models["msam"] = lambda: MSamModel.from_pretrained(sam_folder, tasks={"depth": 1})
        assert layers(adapt(models[family]()).get_base_model()).keys() == LAST_OF_MLP

    def test_layers_can_be_chosen(self, sam):
        model = adapt(sam, target_modules=["mlp.lin1"], layers_to_transform=[1, 3], layers_pattern="layers")
        assert [name for name in layers(model.get_base_model()) if "vision" in name] == [
            "vision_encoder.layers.1.mlp.lin1",
            "vision_encoder.layers.3.mlp.lin1",
        ]

    def test_other_modules_are_refused(self, sam):
        with pytest.raises(ValueError, match=r"vision_encoder\.neck\.conv1: Conv2d is not supported"):
            adapt(sam, target_modules=["neck.conv1"])


class TestLayer:
    @pytest.mark.parametrize("activation", ["gelu", "relu"])
    def test_formula(self, activation):
        base = nn.Linear(6, 5)
        layer = Linear(base, "a", BottleneckConfig(r=3, scaling=0.7, activation=activation, init_weights=False))
        x = torch.randn(2, 4, 6)
        inner = getattr(nn.functional, activation)(x @ layer.bottleneck_down["a"].T)
        expected = base(x) + 0.7 * inner @ layer.bottleneck_up["a"].T
        torch.testing.assert_close(layer(x), expected)
        assert (layer(x) - base(x)).abs().max() > 0.01

    def test_starts_as_the_base_model(self, sam, images):
        expected = encode(sam, images)
        assert torch.equal(encode(adapt(sam), images), expected)

    def test_two_adapters_add(self, sam, images):
        model = adapt(sam, init_weights=False)
        layer = next(iter(layers(model).values()))
        model.add_adapter("other", BottleneckConfig(r=2, init_weights=False))
        x = torch.randn(2, 5, 64)
        base = layer.base_layer(x)
        parts = []
        for name in ("default", "other"):
            model.set_adapter(name)
            parts.append(layer(x) - base)
        model.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(layer(x), base + parts[0] + parts[1])
        assert min(part.abs().max() for part in parts) > 0.01

    def test_dropout_is_for_training(self, sam, images):
        model = adapt(sam, init_weights=False, dropout=0.5)
        assert torch.equal(encode(model, images), encode(model, images))
        model.train()
        assert not torch.equal(encode(model, images), encode(model, images))

    def test_half_precision_base(self, sam, images):
        model = adapt(sam.to(torch.bfloat16), init_weights=False)
        assert encode(model, images.bfloat16()).dtype == torch.bfloat16
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


class TestModel:
    def test_only_the_adapter_trains(self, sam):
        trained = {name for name, p in adapt(sam).named_parameters() if p.requires_grad}
        assert len(trained) == 2 * len(LAST_OF_MLP)
        assert all(".bottleneck_" in name for name in trained)

    def test_disable_and_delete(self, sam, images):
        expected = encode(sam, images)
        model = adapt(sam, init_weights=False)
        assert not torch.equal(encode(model, images), expected)
        with model.disable_adapter():
            assert torch.equal(encode(model, images), expected)
        model.add_adapter("other", BottleneckConfig(r=2))
        model.set_adapter("other")
        model.delete_adapter("default")
        assert torch.equal(encode(model, images), expected)
        assert not any("default" in name for name, _ in model.named_parameters())

    def test_save_and_load_round_trip(self, sam, images, tmp_path):
        model = adapt(sam, init_weights=False, scaling=0.5, activation="relu")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_sam(), tmp_path)
        assert torch.equal(encode(loaded, images), encode(model, images))

    def test_activation_checkpointing_gives_the_same_gradient(self, sam, images):
        grads = []
        for checkpointing in (False, True):
            model = adapt(copy.deepcopy(sam), init_weights=False).train()
            if checkpointing:
                model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
            model.get_base_model().vision_encoder(images).last_hidden_state.square().sum().backward()
            grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    @pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
    def test_it_cannot_be_merged(self, sam, images, method):
        model = adapt(sam, init_weights=False, modules_to_save=["mask_decoder"])
        before = encode(model, images)
        with pytest.raises(ValueError, match="cannot be merged"):
            getattr(model, method)()
        assert torch.equal(encode(model, images), before)
        with pytest.raises(ValueError, match="cannot be merged"):
            next(iter(layers(model).values())).merge()

    def test_unload_gives_the_base_back(self, sam, images):
        expected, decoder = encode(sam, images), type(sam.mask_decoder)
        base = adapt(sam, init_weights=False, modules_to_save=["mask_decoder"]).unload()
        assert torch.equal(encode(base, images), expected)
        assert not layers(base)
        assert type(base.mask_decoder) is decoder

    def test_low_memory_loading(self, sam, images, tmp_path):
        adapt(sam, init_weights=False).save_pretrained(tmp_path)
        models = [PeftModel.from_pretrained(make_sam(), tmp_path, low_cpu_mem_usage=low) for low in (False, True)]
        assert torch.equal(*(encode(model, images) for model in models))
