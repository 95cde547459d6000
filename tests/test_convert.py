"""Adapters made out of adapters within a model: `add_weighted_adapter`, `compress`, and PEFT's own way to LoRA."""

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from test_msam_with_talora import TASKS as HEADS
from test_msam_with_talora import scramble
from torch import nn
from tuner_cases import (
    BATCH,
    MLP_2D,
    TASKS,
    VISION,
    adapt,
    adapted_layers,
    assert_close,
    assert_visibly_different,
    config_for,
    needs_peft_0_21,
    outputs_of_all,
    saying,
    trainable_names,
)

from peft_talora import MSamModel, TALoRAConfig, compress
from peft_talora.tuner.convert import adapted_layers as layers_of
from peft_talora.tuner.convert import exact_name, exact_names

OTHER = {"r": 3, "r_out": 4, "r_task": 3, "alpha": 5.0}


def two_adapters(case=MLP_2D, dtype=torch.float32, **values) -> PeftModel:
    model = adapt(case, dtype=dtype)
    torch.manual_seed(8)
    model.add_adapter("other", config_for(case, **{**OTHER, **values}))
    return model.eval()


def deltas(model, adapter_name) -> dict[str, torch.Tensor]:
    """(T, D_out, D_in) per layer of the adapter."""
    return {
        name: torch.stack([layer.get_delta_weight(adapter_name, task) for task in TASKS]).detach()
        for name, layer in layers_of(model.get_base_model(), adapter_name).items()
    }


def assert_weighted_sum(model, adapter_name, terms: dict[str, float], relative=1e-5) -> None:
    expected: dict[str, torch.Tensor] = {}
    for term, weight in terms.items():
        for name, delta in deltas(model, term).items():
            expected[name] = expected.get(name, 0) + weight * delta
    found = deltas(model, adapter_name)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert delta.abs().max() > 0.05, f"{name}: nothing is compared"
        assert_close(found[name], delta, relative)


def measured_error(model, adapter_name, original) -> float:
    exact, found = deltas(model, original), deltas(model, adapter_name)
    distance = sum((exact[name] - found[name]).double().square().sum() for name in exact)
    return (distance / sum(delta.double().square().sum() for delta in exact.values())).sqrt().item()


class TestCat:
    @pytest.mark.parametrize(
        "other",
        [
            {},
            {"r": 2, "r_out": 2, "r_task": 2},
            {"rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin0": 1.0}},
            {"target_modules": ["lin1"]},
            {"r": 6, "r_out": 5, "r_task": 3},  # 4 + 6 columns do not fit into 6 rows
        ],
        ids=["ranks", "fewer", "patterns", "layers", "too-many"],
    )
    def test_is_the_exact_sum(self, other):
        model = two_adapters(**other)
        errors = model.add_weighted_adapter(["other", "default"], [-1.3, 0.7], "sum")
        assert_weighted_sum(model, "sum", {"default": 0.7, "other": -1.3})
        assert errors.overall < 1e-12
        assert set(errors.layers) == {"lin0", "lin1"}

    def test_ranks_add_up_to_what_the_layer_has(self):
        model = two_adapters()
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
        config = model.peft_config["sum"]
        assert (config.r, config.r_out, config.r_task) == (7, 7, 3)
        assert config.rank_pattern == {"^lin0": [6, 7], "^lin1": [7, 5]}  # the layers are 6 → 9 → 5

    def test_one_adapter_is_scaled(self):
        model = two_adapters()
        model.add_weighted_adapter(["other"], [-2.0], "scaled")
        assert_weighted_sum(model, "scaled", {"other": -2.0})

    def test_three_adapters(self):
        model = two_adapters()
        model.add_adapter("third", config_for(MLP_2D, r=2, r_out=2))
        model.add_weighted_adapter(["third", "default", "other"], [0.5, 1.0, 2.0], "sum")
        assert_weighted_sum(model, "sum", {"third": 0.5, "default": 1.0, "other": 2.0})

    def test_a_layer_of_one_adapter_only_keeps_the_common_task_rank(self):
        model = two_adapters(target_modules=["lin1"])
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
        layer = model.get_base_model().lin0
        task_factor = torch.stack([layer.talora_task["sum"][task] for task in TASKS])
        assert task_factor.shape == (3, 3)
        assert torch.linalg.matrix_rank(task_factor) == 3  # the spare column can still learn
        assert (layer.talora_core["sum"][:, :, 2] == 0).all()

    def test_different_qkv_parts(self):
        model = adapt(VISION, target_modules=["qkv"], qkv_parts=["k", "v"])
        torch.manual_seed(8)
        model.add_adapter("other", config_for(VISION, target_modules=["qkv"], qkv_parts=["v"], **OTHER))
        model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "sum")
        assert model.peft_config["sum"].qkv_parts == ["k", "v"]
        assert_weighted_sum(model, "sum", {"default": 0.7, "other": -1.3})
        model.add_adapter("all", config_for(VISION, target_modules=["qkv", "proj"]))
        model.add_weighted_adapter(["all", "other"], [1.0, 1.0], "more")
        assert model.peft_config["more"].qkv_parts == ["q", "k", "v"]
        assert_weighted_sum(model, "more", {"all": 1.0, "other": 1.0})

    def test_the_forward_adds_it(self):
        model = two_adapters()
        model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "sum")
        model.set_adapter("sum")
        found = outputs_of_all(MLP_2D, model)
        for task, output in zip(TASKS, found, strict=True):
            base = MLP_2D.build()
            with torch.no_grad():
                for name, layer in base.named_children():
                    layer.weight += deltas(model, "sum")[name][TASKS.index(task)]
                assert_close(output, base(MLP_2D.inputs()))
        assert_visibly_different(*found)


class TestSvd:
    def test_cuts_to_the_ranks_and_tells_the_error(self):
        model = two_adapters()
        model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "sum")
        errors = model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "cut", "svd", 2, r_out=3, r_task=2)
        config = model.peft_config["cut"]
        assert (config.r, config.r_out, config.r_task) == (2, 3, 2)
        assert 0.1 < errors.overall < 1
        assert errors.overall == pytest.approx(measured_error(model, "cut", "sum"), rel=1e-5)
        for layer in adapted_layers(model):
            for factor in (layer.talora_in["cut"], layer.talora_out["cut"]):
                assert_close(factor.T @ factor, torch.eye(factor.shape[1]), 1e-5)

    def test_ranks_default_to_the_largest(self):
        model = two_adapters(r_out=5)
        model.add_weighted_adapter(["default", "other"], [1, 1], "cut", "svd")
        config = model.peft_config["cut"]
        assert (config.r, config.r_out, config.r_task) == (4, 5, 3)

    def test_is_exact_where_ranks_allow(self):
        model = two_adapters()
        errors = model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "sum", "svd", 7, r_task=3)
        assert_weighted_sum(model, "sum", {"default": 0.7, "other": -1.3})
        assert errors.overall < 1e-12


class TestTheNewAdapter:
    def test_is_not_active_and_changes_nothing(self):
        model = two_adapters()
        before, trained = outputs_of_all(MLP_2D, model), trainable_names(model)
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
        assert model.active_adapters == ["default"]
        assert trainable_names(model) == trained
        assert torch.equal(outputs_of_all(MLP_2D, model), before)

    def test_is_trained_once_it_is_active(self):
        model = two_adapters()
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
        model.set_adapter("sum")
        assert trainable_names(model) == {name for name, _ in model.named_parameters() if ".sum" in name}
        model(MLP_2D.inputs(), task_ids=["normals"] * BATCH).sum().backward()
        assert adapted_layers(model)[0].talora_core["sum"].grad.abs().max() > 0

    @pytest.mark.parametrize("training", [True, False])
    def test_is_in_the_models_mode(self, training):
        model = adapt(MLP_2D, dropout=0.5).train(training)
        compress(model, 4)
        model.set_adapter("compressed")
        one, two = (model(MLP_2D.inputs(), task_ids=["normals"] * BATCH) for _ in range(2))
        assert torch.equal(one, two) != training
        assert {layer.talora_dropout["compressed"].training for layer in adapted_layers(model)} == {training}

    def test_is_saved_and_loaded(self, tmp_path):
        model = two_adapters(target_modules=["lin1"])
        model.add_weighted_adapter(["default", "other"], [1, -1], "sum")
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        model.set_adapter("sum")
        loaded = PeftModel.from_pretrained(MLP_2D.build(), tmp_path / "sum")
        assert torch.equal(outputs_of_all(MLP_2D, loaded), outputs_of_all(MLP_2D, model))

    def test_has_the_dropout_of_the_first(self):
        model = adapt(MLP_2D, dropout=0.25)
        model.add_weighted_adapter(["default"], [1.0], "same")
        assert {layer.talora_dropout["same"].p for layer in adapted_layers(model)} == {0.25}

    def test_has_the_precision_of_the_others(self):
        model = two_adapters(dtype=torch.bfloat16)  # PEFT keeps the adapters of this base in float32
        model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "sum")
        assert {parameter.dtype for name, parameter in model.named_parameters() if ".sum" in name} == {torch.float32}
        assert_weighted_sum(model, "sum", {"default": 0.7, "other": -1.3})

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((["default", "absent"], [1, 1], "sum"), ["absent", "default"]),
            ((["default", "other"], [1], "sum"), ["weight for each"]),
            (([], [], "sum"), ["weight for each"]),
            ((["other", "other"], [1, 1], "sum"), ["different adapters"]),
            ((["default"], [1], "other"), ["'other'", "taken"]),
            ((["default"], [1], "depth"), ["'depth'", "not allowed"]),
            ((["default"], [1], "sum", "ties"), ["'cat' or 'svd'", "'ties'"]),
            ((["default"], [1], "sum", "cat", None, None, None, "other"), ["modules_from", "'other'"]),
            ((["default", "other"], [1, float("nan")], "sum"), ["`weights`", "nan", "finite"]),
            ((["default", "other"], [float("-inf"), 1], "sum"), ["`weights`", "-inf", "finite"]),
            ((["default"], [1], "sum", "svd", 0), ["`svd_rank`", "got 0", "at least 1"]),
            ((["default"], [1], "sum", "svd", 2, -1), ["`r_out`", "got -1"]),
            ((["default"], [1], "sum", "svd", 2, 2, 1.5), ["`r_task`", "got 1.5"]),
            ((["default"], [1], "sum", "cat", 2), ["'cat'", "{'svd_rank': 2}", "'svd'"]),
            ((["default"], [1], "sum", "cat", None, 3, 2), ["'cat'", "{'r_out': 3, 'r_task': 2}"]),
        ],
    )
    def test_refuses(self, arguments, words):
        model = two_adapters()
        before = list(model.state_dict())
        with pytest.raises(ValueError, match=saying(*words)):
            model.add_weighted_adapter(*arguments)
        assert list(model.state_dict()) == before
        assert list(model.peft_config) == ["default", "other"]

    def test_needs_the_same_tasks_in_the_same_order(self):
        model = two_adapters(task_names=TASKS[::-1])
        with pytest.raises(ValueError, match=saying("same order", *TASKS)):
            model.add_weighted_adapter(["default", "other"], [1, 1], "sum")

    @needs_peft_0_21
    @pytest.mark.parametrize("bias", ["all", "talora_only"])
    def test_biases_belong_to_one_adapter_only(self, bias):
        model = adapt(MLP_2D, bias=bias)
        before = list(model.state_dict())
        for make in (lambda: compress(model, 2), lambda: model.add_weighted_adapter(["default"], [1], "sum")):
            with pytest.raises(ValueError, match=saying("`bias`", f"{{'default': '{bias}'}}", "allowed: 'none'")):
                make()
        assert list(model.state_dict()) == before


@pytest.fixture
def with_heads(sam_folder):
    """An mSAM with two trained adapters, each with heads and norms of its own."""
    torch.manual_seed(0)
    model = get_peft_model(
        MSamModel.from_pretrained(sam_folder, tasks=HEADS), TALoRAConfig(r=4, init_weights=False, train_norms=True)
    )
    model.add_adapter("other", TALoRAConfig(r=3, init_weights=False, train_norms=True))
    scramble({name: wrapper.modules_to_save["other"] for name, wrapper in model.task_heads.items()})
    return model.eval()


class TestHeads:
    def test_that_differ_are_refused(self, with_heads):
        with pytest.raises(ValueError, match=saying("task_heads.segmentation", "modules_from", "'other'")):
            with_heads.add_weighted_adapter(["default", "other"], [1, 1], "sum")
        assert "sum" not in with_heads.peft_config

    @torch.no_grad()
    def test_come_from_the_adapter_that_is_named(self, with_heads, images):
        with_heads.add_weighted_adapter(["default", "other"], [0, 1], "sum", modules_from="other")
        outputs = []
        for name in ("default", "other", "sum"):
            with_heads.set_adapter(name)
            outputs.append(torch.cat(list(with_heads(pixel_values=images).logits.values()), dim=1))
        assert_visibly_different(*outputs[:2])
        assert_close(outputs[2], outputs[1], 1e-4)

    @torch.no_grad()
    def test_are_copied_where_one_adapter_has_them(self, with_heads, images):
        compress(with_heads, 3, r_task=3, adapter_name="other", new_adapter_name="small")
        with_heads.set_adapter("other")
        expected = with_heads(pixel_values=images).logits
        with_heads.set_adapter("small")
        for name, logits in with_heads(pixel_values=images).logits.items():
            assert_close(logits, expected[name], 1e-4)
        copied = with_heads.task_heads["depth"].modules_to_save
        assert not any(module.training for module in copied["small"].modules())
        assert copied["small"].no_mask_embed.weight is not copied["other"].no_mask_embed.weight


class TestCompress:
    def test_is_exact_where_ranks_allow(self):
        model = two_adapters()
        errors = compress(model, 4, adapter_name="other")
        assert errors.overall < 1e-12
        assert_weighted_sum(model, "compressed", {"other": 1.0})
        config = model.peft_config["compressed"]
        assert (config.r, config.r_out, config.r_task) == (3, 4, 3)  # what the adapter has, not what was asked

    def test_error_falls_with_the_rank(self):
        model = two_adapters()
        errors = [compress(model, r, new_adapter_name=f"r{r}").overall for r in (1, 2, 3, 4)]
        for r, error in enumerate(errors, start=1):
            assert error == pytest.approx(measured_error(model, f"r{r}", "default"), abs=1e-6)
        assert errors[0] > 0.3
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-12

    def test_ties_the_tasks(self):
        model = two_adapters()
        with pytest.warns(UserWarning, match="r_task=1"):
            compress(model, 4, r_task=1)
        for delta in deltas(model, "compressed").values():
            assert torch.linalg.matrix_rank(delta.flatten(1)) == 1

    @pytest.mark.parametrize(
        ("ranks", "words"),
        [({"r": -1}, ["`r`", "-1"]), ({"r": 0}, ["`r`", "0"]), ({"r": 2, "r_task": True}, ["`r_task`", "True"])],
        ids=str,
    )
    def test_refuses_ranks_below_one(self, ranks, words):
        model = two_adapters()
        with pytest.raises(ValueError, match=saying(*words, "at least 1")):
            compress(model, **ranks)
        assert list(model.peft_config) == ["default", "other"]

    def test_needs_one_active_adapter(self):
        model = two_adapters()
        model.base_model.set_adapter(["default", "other"])
        with pytest.raises(ValueError, match=saying("'default'", "'other'", "adapter_name")):
            compress(model, 2)


class Nested(nn.Module):
    """Names that are endings of others, and one that the dot of another matches as a pattern."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"lin": nn.Linear(6, 6)})
        self.block_lin = nn.Linear(6, 6)

    def forward(self, x):
        return self.block_lin(self.block["lin"](self.lin(x)))


def test_names_match_themselves_only():
    """Both ways: a key that would match too much, and one that would match too little."""
    every = ["lin", "block.lin", "block_lin"]
    for name in every:
        model = get_peft_model(Nested(), LoraConfig(target_modules=exact_names([name])))
        assert model.targeted_module_names == [name]
        model = get_peft_model(Nested(), LoraConfig(r=3, target_modules=every, rank_pattern={exact_name(name): 2}))
        layers = {other: model.get_base_model().get_submodule(other) for other in every}
        assert {other: layer.r["default"] for other, layer in layers.items()} == {**dict.fromkeys(every, 3), name: 2}


class TestPeftsOwnWayToLora:
    """PEFT exports the selected task by an SVD of the dense update; heads, which it cannot take, are not there."""

    @pytest.mark.parametrize(("rank", "error"), [(3, 1e-6), (0.9999999, 1e-3), (1, None)])
    def test_convert_to_lora(self, rank, error):
        model = adapt(MLP_2D)
        for task in TASKS:
            model.set_task(task)
            config, state = convert_to_lora(model, rank=rank)
            assert isinstance(config, LoraConfig)
            for name, delta in deltas(model, "default").items():
                expected = delta[TASKS.index(task)]
                a, b = (state[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
                distance = (b @ a - expected).norm() / expected.norm()
                assert distance < error if error else 0.1 < distance < 1

    def test_save_as_lora(self, tmp_path):
        model = adapt(VISION)
        with torch.no_grad():
            model.set_task("edges")
            save_as_lora(tmp_path, model, rank=4)
            lora = PeftModel.from_pretrained(VISION.build(), tmp_path)
            assert_close(VISION.call(lora, VISION.inputs()), VISION.call(model, VISION.inputs()), 1e-5)

    def test_needs_a_selected_task(self):
        with pytest.raises(ValueError, match="none is selected"):
            convert_to_lora(adapt(MLP_2D), rank=3)
