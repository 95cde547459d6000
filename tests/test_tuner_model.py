"""TALoRAModel: targets, training, merging, several adapters, saving and copying."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import make_sam
from peft import PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from tuner_cases import (
    BATCH,
    MLP,
    MLP_2D,
    TASKS,
    TEXT,
    VISION,
    Case,
    adapt,
    adapted_layers,
    assert_close,
    assert_visibly_different,
    config_for,
    every_case,
    make_mlp,
    needs_peft_0_21,
    saying,
    trainable_names,
)

from peft_talora.tuner import TALoRAConfig, set_task

SAM_VISION = Case("sam-vision", make_sam, [r"attn.qkv"], ())


def adapter_names(model: nn.Module) -> set[str]:
    """The modules that are adapted, without PEFT's prefix."""
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if module in adapted_layers(model)
    }


def outputs_of(case: Case, model: nn.Module, tasks: list[str] = TASKS) -> list[torch.Tensor]:
    with torch.no_grad():
        return [case.call(model, case.inputs(), task_ids=[task] * BATCH) for task in tasks]


def assert_equal_outputs(case: Case, model: nn.Module, expected: list[torch.Tensor]) -> None:
    """Bit for bit, task by task."""
    assert_visibly_different(*expected)
    for actual, one in zip(outputs_of(case, model), expected, strict=True):
        assert torch.equal(actual, one)


def base_output(case: Case) -> torch.Tensor:
    with torch.no_grad():
        return case.call(case.build(), case.inputs())


class TestStart:
    @every_case
    @pytest.mark.parametrize("init_weights", ["lora", "orthogonal", "gaussian", True])
    def test_starts_as_the_base_model(self, case, init_weights):
        model, expected = adapt(case, init_weights=init_weights), base_output(case)
        assert expected.abs().mean() > 0.1
        for output in outputs_of(case, model):
            assert torch.equal(output, expected)

    @every_case
    def test_redrawn_core_does_not(self, case):
        assert_visibly_different(base_output(case), *outputs_of(case, adapt(case)))

    @every_case
    def test_disabled_adapter_is_the_base_model(self, case):
        model, expected = adapt(case), base_output(case)
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(case.call(model, case.inputs()), expected)
            assert torch.equal(case.call(model, case.inputs(), task_ids=[0, 2]), expected)
        assert_visibly_different(expected, outputs_of(case, model, ["depth"])[0])

    def test_default_rank_of_the_task_factor(self):
        for tasks, rank in ((["a"], 1), (["a", "b"], 2), (["a", "b", "c"], 3), (list("abcdef"), 4)):
            assert adapt(MLP_2D, task_names=tasks, r=3, r_task=None).peft_config["default"].r_task == rank

    def test_one_task_rank_for_several_tasks_warns(self):
        with pytest.warns(UserWarning, match=saying("`r_task=1`", "multiples of one matrix")):
            adapt(MLP_2D, r=3, r_task=1)
        adapt(MLP_2D, r=3, r_task=1, task_names=["a"])  # one task: nothing to warn of

    @pytest.mark.parametrize("ranks", [{"r": 5, "r_out": 2, "r_task": 2}, {"r": 2, "r_out": 5, "r_task": 2}], ids=str)
    def test_rank_deficient_core_warns_once(self, ranks):
        with pytest.warns(
            UserWarning, match=saying("rank-deficient", *(f"{k}={v}" for k, v in ranks.items()))
        ) as seen:
            adapt(MLP_2D, **ranks)
        assert len(seen) == 1

    def test_more_task_ranks_than_tasks_is_quiet(self):
        model = adapt(MLP_2D, r_task=4)  # pytest turns warnings into errors
        assert all(layer.talora_core["default"].shape[2] == 4 for layer in adapted_layers(model))

    def test_task_type_warns_that_task_ids_vanish(self):
        with pytest.warns(UserWarning, match=saying("task_type=", "`task_ids`", "`set_task`")):
            adapt(TEXT, task_type=TaskType.FEATURE_EXTRACTION)


class TestTargets:
    def test_default_is_the_fused_layer_of_every_vision_block(self, sam):
        model = get_peft_model(sam, TALoRAConfig(task_names=TASKS))
        assert adapter_names(model) == {f"vision_encoder.layers.{i}.attn.qkv" for i in range(4)}

    def test_no_default_for_unknown_models(self):
        with pytest.raises(ValueError, match="target_modules"):
            get_peft_model(make_mlp(), TALoRAConfig())

    def test_regular_expression(self, sam):
        pattern = r".*vision_encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])"
        assert len(adapter_names(get_peft_model(sam, TALoRAConfig(target_modules=pattern)))) == 16

    @pytest.mark.parametrize(("blocks", "indices"), [(0, {0}), ([1, 3], {1, 3}), (None, {0, 1, 2, 3})])
    def test_layers_to_transform(self, sam, blocks, indices):
        """Block 0 is a block, not "none"."""
        config = TALoRAConfig(target_modules=["qkv"], layers_to_transform=blocks)
        assert adapter_names(get_peft_model(sam, config)) == {f"vision_encoder.layers.{i}.attn.qkv" for i in indices}

    def test_all_linear_and_exclude(self):
        assert adapter_names(adapt(MLP_2D, target_modules="all-linear")) == {"lin0", "lin1"}
        assert adapter_names(adapt(MLP_2D, exclude_modules=["lin1"])) == {"lin0"}

    def test_no_match_is_an_error(self):
        with pytest.raises(ValueError, match=saying("absent", "not found")):
            adapt(MLP_2D, target_modules=["absent"])

    def test_only_linear_layers(self, sam):
        with pytest.raises(ValueError, match=saying("neck.conv1: ", "Conv2d", "not supported")):
            get_peft_model(sam, TALoRAConfig(target_modules=["neck.conv1"]))

    def test_rank_too_large_names_the_layer(self):
        with pytest.raises(ValueError, match=saying("lin0: ", "`r`=7", "6 features", "`rank_pattern`")):
            adapt(MLP_2D, r=7, r_out=7)
        adapt(MLP_2D, r=7, r_out=4, rank_pattern={"lin0": 6, "lin1": 5})

    @pytest.mark.parametrize("inject", [get_peft_model, lambda base, config: inject_adapter_in_model(config, base)])
    def test_an_error_half_way_leaves_the_base_as_it_was(self, inject):
        base = make_mlp()
        layers, parameters = list(base.children()), dict(base.named_parameters())
        with pytest.raises(ValueError, match="lin1: "):
            inject(base, config_for(MLP_2D, r=4, r_out=4, rank_pattern={"lin1": 8}))
        assert list(base.children()) == layers
        assert dict(base.named_parameters()) == parameters
        assert trainable_names(base) == set(parameters)
        assert not base._forward_pre_hooks
        assert not base._forward_hooks
        model = get_peft_model(base, config_for(MLP_2D))
        assert_visibly_different(*outputs_of(MLP_2D, model))

    @pytest.mark.parametrize("targets", [["lin0", "lin1"], ["lin1"]])
    def test_an_error_half_way_leaves_the_other_adapter_as_it_was(self, targets):
        model = adapt(MLP_2D, target_modules=["lin0"])
        names, trainable, expected = list(model.state_dict()), trainable_names(model), outputs_of(MLP_2D, model)
        bad = config_for(MLP_2D, target_modules=targets, task_names=["a", "b"], rank_pattern={"lin1": 8})
        with pytest.raises(ValueError, match="lin1: "):
            model.add_adapter("bad", bad)
        state = model.base_model.task_state
        assert state.layers == adapted_layers(model)
        assert list(state.task_names) == list(model.peft_config) == ["default"]
        assert list(model.state_dict()) == names
        assert trainable_names(model) == trainable
        assert_equal_outputs(MLP_2D, model, expected)
        model.add_adapter("bad", config_for(MLP_2D, target_modules=targets))
        model.set_adapter("bad")
        assert_visibly_different(*outputs_of(MLP_2D, model))

    def test_rank_pattern_sets_both_ranks(self):
        model = adapt(MLP_2D, r=4, r_out=3, rank_pattern={"lin1": 4})
        first, second = adapted_layers(model)
        assert (first.r["default"], first.r_out["default"]) == (4, 3)
        assert (second.r["default"], second.r_out["default"]) == (4, 4)
        assert second.talora_core["default"].shape == (4, 4, 2)

    def test_rank_pattern_sets_each_rank_by_a_list(self):
        model = adapt(MLP_2D, r=4, r_out=3, rank_pattern={"lin1": [4, 2]})
        ranks = [(layer.r["default"], layer.r_out["default"]) for layer in adapted_layers(model)]
        assert ranks == [(4, 3), (4, 2)]

    def test_alpha_pattern_and_scaling(self):
        model = adapt(MLP_2D, r=4, alpha=8.0, alpha_pattern={"lin1": 2.0})
        assert [layer.scaling["default"] for layer in adapted_layers(model)] == [2.0, 0.5]

    def test_default_scaling_follows_the_rank_of_each_layer(self):
        model = adapt(MLP_2D, r=4, alpha=None, rank_pattern={"lin1": 2}, alpha_pattern={"lin1": 3})
        assert [layer.scaling["default"] for layer in adapted_layers(model)] == [0.5, 1.5]
        model = adapt(MLP_2D, r=4, alpha=None, rank_pattern={"lin1": 2})
        assert [layer.scaling["default"] for layer in adapted_layers(model)] == [0.5, 0.5]


class TestTraining:
    @every_case
    def test_only_the_adapter_trains(self, case):
        trained = trainable_names(adapt(case))
        assert trained
        assert all(".talora_" in name for name in trained)
        assert len(trained) == len(adapted_layers(adapt(case))) * (3 + len(TASKS))

    def test_modules_to_save_train_too(self, sam):
        model = get_peft_model(sam, TALoRAConfig(modules_to_save=["neck"]))
        rest = {name for name in trainable_names(model) if ".talora_" not in name}
        assert rest
        assert all(".neck.modules_to_save.default." in name for name in rest)

    def test_train_norms_are_those_of_the_blocks(self, sam):
        model = get_peft_model(sam, TALoRAConfig(train_norms=True))
        rest = {name for name in trainable_names(model) if ".talora_" not in name}
        assert rest == {
            f"base_model.model.vision_encoder.layers.{i}.layer_norm{j}.modules_to_save.default.{kind}"
            for i in range(4)
            for j in (1, 2)
            for kind in ("weight", "bias")
        }

    def test_train_norms_without_vision_blocks(self):
        with pytest.raises(ValueError, match=saying("`train_norms=True`", "layer_norm1")):
            adapt(MLP_2D, train_norms=True)

    @pytest.mark.parametrize(
        ("bias", "count"),
        [
            ("none", 0),
            pytest.param("talora_only", 1, marks=needs_peft_0_21),
            pytest.param("all", 2, marks=needs_peft_0_21),
        ],
    )
    def test_bias(self, bias, count):
        names = trainable_names(adapt(MLP_2D, bias=bias, target_modules=["lin0"]))
        assert len([name for name in names if name.endswith(".bias")]) == count

    def test_one_trained_row_moves_no_other(self):
        """Weight decay and momentum included: the rows are parameters of their own."""
        model = adapt(VISION)
        before = dict(zip(TASKS, outputs_of(VISION, model), strict=True))
        rows = [layer.talora_task["default"]["normals"] for layer in adapted_layers(model)]
        optimizer = torch.optim.AdamW(rows, lr=0.3, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            VISION.call(model, VISION.inputs(), task_ids=["depth", "normals"]).square().mean().backward()
            optimizer.step()
        after = dict(zip(TASKS, outputs_of(VISION, model), strict=True))
        assert_visibly_different(before["normals"], after["normals"])
        for task in ("depth", "edges"):
            assert torch.equal(before[task], after[task])

    def test_inference_mode_trains_nothing(self):
        assert trainable_names(adapt(MLP_2D, inference_mode=True)) == set()


class TestMerge:
    @every_case
    def test_merge_and_unmerge(self, case):
        model, x = adapt(case), case.inputs()
        expected, weights = outputs_of(case, model), [layer.weight.clone() for layer in adapted_layers(model)]
        for task, output in zip(TASKS, expected, strict=True):
            model.set_task(task)
            model.merge_adapter()
            assert_close(case.call(model, x), output, 1e-4)
            model.unmerge_adapter()
        for layer, weight in zip(adapted_layers(model), weights, strict=True):
            assert_close(layer.weight, weight)
        for actual, output in zip(outputs_of(case, model), expected, strict=True):
            assert_close(actual, output, 1e-4)

    @pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
    def test_nothing_is_merged_without_a_choice(self, method):
        model = adapt(VISION)
        weights = [layer.weight.clone() for layer in adapted_layers(model)]
        with pytest.raises(ValueError, match=saying("'default'", str(TASKS), "`set_task`")):
            getattr(model, method)()
        assert adapted_layers(model)
        for layer, weight in zip(adapted_layers(model), weights, strict=True):
            assert not layer.merged
            assert torch.equal(layer.weight, weight)

    @pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
    def test_nothing_is_merged_where_one_of_two_adapters_lacks_a_choice(self, method):
        model = adapt(MLP_2D)
        model.add_adapter("further", config_for(MLP_2D, **SECOND))
        model.base_model.set_adapter(["default", "further"])
        model.set_task("depth", "default")
        weights = [layer.weight.clone() for layer in adapted_layers(model)]
        with pytest.raises(ValueError, match=saying("'further'", "`set_task`")):
            getattr(model, method)()
        for layer, weight in zip(adapted_layers(model), weights, strict=True):
            assert not layer.merged
            assert torch.equal(layer.weight, weight)

    def test_choosing_a_task_while_merged_warns_and_unmerges(self):
        model, x = adapt(MLP_2D), MLP_2D.inputs()
        expected = outputs_of(MLP_2D, model)
        model.set_task("depth")
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging the model first"):
            model.set_task("edges")
        assert not any(layer.merged for layer in adapted_layers(model))
        assert_close(model(x), expected[2])

    def test_disabling_a_merged_adapter_gives_the_base_model(self):
        model, x = adapt(MLP_2D), MLP_2D.inputs()
        model.set_task("depth")
        model.merge_adapter()
        with model.disable_adapter():
            assert_close(model(x), base_output(MLP_2D))

    @every_case
    def test_merge_and_unload(self, case):
        model = adapt(case)
        expected = outputs_of(case, model)[1]
        model.set_task("normals")
        base = model.merge_and_unload(safe_merge=True)
        assert_is_plain(base, case)
        assert_close(case.call(base, case.inputs()), expected, 1e-4)

    @every_case
    def test_unload_gives_the_base_model_back(self, case):
        base = adapt(case).unload()
        assert_is_plain(base, case)
        assert torch.equal(case.call(base, case.inputs()), base_output(case))

    def test_unload_takes_wrapped_checkpoint_functions_off(self):
        model = adapt(VISION)
        base = model.get_base_model()
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        original = base.layers[0]._gradient_checkpointing_func
        model.train()
        VISION.call(model, VISION.inputs(), task_ids=[0, 2])
        assert base.layers[0]._gradient_checkpointing_func is not original
        base = model.unload()
        assert all(block._gradient_checkpointing_func is original for block in base.layers)

    @pytest.mark.parametrize("merge", [True, False])
    def test_unload_with_a_composite_module_to_save(self, merge, images):
        """PEFT's own replacement asks such a module for a weight."""
        model = adapt(VISION, target_modules=["qkv"], modules_to_save=["neck"])
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".neck.modules_to_save." in name:
                    p.add_(0.1)
        model.set_task("depth")
        expected = VISION.call(model, images)
        base = model.merge_and_unload() if merge else model.unload()
        assert_is_plain(base, VISION)
        if merge:
            assert_close(VISION.call(base, images), expected)

    def test_unloaded_model_can_be_adapted_again(self):
        model = get_peft_model(adapt(MLP_2D).unload(), config_for(MLP_2D))
        assert_visibly_different(*outputs_of(MLP_2D, model))


def assert_is_plain(base: nn.Module, case: Case) -> None:
    """No trace of the adapter: the modules, hooks and keys of a model that never had one."""
    fresh = case.build()
    assert {name: type(module) for name, module in base.named_modules()} == {
        name: type(module) for name, module in fresh.named_modules()
    }
    assert base.state_dict().keys() == fresh.state_dict().keys()
    for module, other in zip(base.modules(), fresh.modules(), strict=True):
        assert len(module._forward_hooks) == len(other._forward_hooks)
        assert len(module._forward_pre_hooks) == len(other._forward_pre_hooks)


SECOND = {"task_names": ["a", "b"], "r": 2, "r_out": 4, "r_task": 2, "alpha": 4.0}


class TestSeveralAdapters:
    def both(self, case: Case) -> tuple[PeftModel, torch.Tensor]:
        model = adapt(case)
        model.add_adapter("further", config_for(case, **SECOND))
        return model, case.inputs()

    @every_case
    def test_two_adapters_add(self, case):
        model, _ = self.both(case)
        model.base_model.set_adapter(["default", "further"])
        model.set_task("normals", "default")
        model.set_task("b", "further")
        layer = adapted_layers(model)[0]
        x = torch.randn(BATCH, 3, layer.in_features)
        delta = layer.get_delta_weight("default", "normals") + layer.get_delta_weight("further", "b")
        assert_close(layer(x), layer.base_layer(x) + x @ delta.T)
        with torch.no_grad():
            together = case.call(model, case.inputs())
            model.merge_adapter()
            assert_close(case.call(model, case.inputs()), together, 1e-4)
            model.unmerge_adapter()
            assert_close(case.call(model, case.inputs()), together, 1e-4)

    @every_case
    def test_set_adapter(self, case):
        model, x = self.both(case)
        expected = outputs_of(case, model)
        model.set_adapter("further")
        outputs = outputs_of(case, model, ["a", "b"])
        assert_visibly_different(*expected, *outputs)
        with pytest.raises(ValueError, match=saying("'depth'", "['a', 'b']")):
            case.call(model, x, task_ids=["depth", "depth"])
        model.set_adapter("default")
        assert_equal_outputs(case, model, expected)

    def test_choice_of_a_task_is_an_adapters_own(self):
        model, x = self.both(MLP_2D)
        first = outputs_of(MLP_2D, model)
        model.set_task("edges")
        model.set_adapter("further")
        with pytest.raises(ValueError, match="none is selected"):
            model(x)
        model.set_task("a")
        model.set_adapter("default")
        assert_close(model(x), first[2])

    def test_second_adapter_trains_once_it_is_chosen(self):
        model, _ = self.both(MLP_2D)
        assert {name for name in trainable_names(model) if "further" in name} == set()
        assert len(trainable_names(model)) == 2 * (3 + len(TASKS))
        model.set_adapter("further")
        assert all(".further" in name for name in trainable_names(model))
        assert len(trainable_names(model)) == 2 * (3 + 2)

    def test_second_adapter_on_other_layers_is_silent(self):
        model = adapt(MLP_2D, target_modules=["lin0"])
        expected = outputs_of(MLP_2D, model)
        model.add_adapter("further", config_for(MLP_2D, **SECOND, target_modules=["lin1"]))
        assert_equal_outputs(MLP_2D, model, expected)
        assert not any("further" in name for name in trainable_names(model))
        model.set_adapter("further")
        assert_visibly_different(*outputs_of(MLP_2D, model, ["a", "b"]), base_output(MLP_2D))

    def test_delete_adapter(self):
        model, x = self.both(MLP_2D)
        expected = outputs_of(MLP_2D, model)
        model.set_task("edges")
        model.delete_adapter("further")
        assert list(model.peft_config) == ["default"]
        assert not any("further" in name for name in model.state_dict())
        assert_equal_outputs(MLP_2D, model, expected)
        assert_close(model(x), expected[2])
        with pytest.raises(ValueError, match="'further'"):
            model.set_task("a", "further")

    def test_nothing_of_a_deleted_adapter_is_left_in_a_layer(self):
        """By the layer's own method, as transformers deletes: what is merged goes too."""
        model, _ = self.both(MLP_2D)
        model.set_task("a", "further")
        model.merge_adapter(["further"])

        def containers(layer: nn.Module) -> set[str]:
            attributes = {**vars(layer), **dict(layer.named_children())}
            types = (dict, nn.ModuleDict, nn.ParameterDict)
            return {key for key, value in attributes.items() if isinstance(value, types) and "further" in value}

        for layer in adapted_layers(model):
            assert containers(layer) == {*layer.adapter_layer_names, *layer.other_param_names}
            layer.delete_adapter("further")
            assert not containers(layer)

    def test_name_of_a_deleted_adapter_is_free_again(self):
        model, _ = self.both(MLP_2D)
        model.delete_adapter("further")
        model.add_adapter("further", config_for(MLP_2D, task_names=["c", "d", "e"]))
        model.set_adapter("further")
        assert_visibly_different(*outputs_of(MLP_2D, model, ["c", "d", "e"]))

    def test_delete_the_active_adapter(self):
        model, _ = self.both(MLP_2D)
        with pytest.warns(UserWarning, match="Setting active adapter to further"):
            model.delete_adapter("default")
        assert_visibly_different(*outputs_of(MLP_2D, model, ["a", "b"]))


class CountingMLP(MLP):
    """Counts how often its modules are walked through."""

    walks = 0

    def modules(self):
        self.walks += 1
        return super().modules()


def test_layers_that_are_enabled_walk_through_the_model_once():
    base = CountingMLP()
    model = get_peft_model(base, config_for(MLP_2D))
    layers = adapted_layers(model)
    base.walks = 0
    for layer in layers:
        layer.enable_adapters(True)
    assert len(layers) == 2
    assert base.walks == 1


class TestNames:
    """An adapter's name that PEFT's keys would confuse with another part of a name."""

    @pytest.mark.parametrize("name", ["lin0", "weight", "bias", *TASKS])
    def test_of_a_module_parameter_or_task(self, name):
        with pytest.raises(ValueError, match=saying(repr(name), "`adapter_name`")):
            adapt(MLP_2D, adapter_name=name)

    @pytest.mark.parametrize("name", ["attn", "qkv", "vision_encoder", "layers"])
    def test_of_a_path_component(self, sam, name):
        with pytest.raises(ValueError, match=saying(repr(name), "`adapter_name`")):
            get_peft_model(sam, TALoRAConfig(), adapter_name=name)

    def test_of_the_default_task(self):
        with pytest.raises(ValueError, match="'main'"):
            adapt(MLP_2D, adapter_name="main", task_names=None)

    def test_of_another_adapters_task(self):
        model = adapt(MLP_2D)
        with pytest.raises(ValueError, match="'edges'"):
            model.add_adapter("edges", config_for(MLP_2D, **SECOND))

    def test_task_of_another_adapters_name(self):
        model = adapt(MLP_2D, adapter_name="indoor")
        with pytest.raises(ValueError, match=saying("['indoor']", "adapters")):
            model.add_adapter("further", config_for(MLP_2D, task_names=["indoor", "outdoor"]))

    def test_adapters_name_may_lie_inside_a_module_name(self):
        model = adapt(MLP_2D, adapter_name="lin")
        assert list(model.peft_config) == ["lin"]
        state = get_peft_model_state_dict(model, adapter_name="lin")
        assert len(state) == len([name for name, _ in model.named_parameters() if "talora_" in name])


LOAD_IN_A_FRESH_PROCESS = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
import torch
from peft import PeftModel
from safetensors.torch import load_file
import peft_talora.tuner
from tuner_cases import VISION, outputs_of_all
model = PeftModel.from_pretrained(VISION.build(), sys.argv[2])
expected = load_file(sys.argv[2] + "/expected.safetensors")
assert torch.equal(outputs_of_all(VISION, model), expected["outputs"])
"""


class TestSave:
    @every_case
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_save_and_load_round_trip(self, case, low_cpu_mem_usage, tmp_path):
        tasks = ["normals", "edges", "depth"]  # not in alphabetical order
        model = adapt(case, task_names=tasks)
        expected = outputs_of(case, model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert loaded.peft_config["default"].task_names == tasks
        assert not loaded.training
        assert trainable_names(loaded) == set()
        for (name, saved), (other, value) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
            assert name == other
            assert torch.equal(saved, value), name
        assert_equal_outputs(case, loaded, expected)
        trained = PeftModel.from_pretrained(case.build(), tmp_path, is_trainable=True)
        assert trainable_names(trained) == trainable_names(model)

    def test_fresh_process(self, tmp_path, request):
        from tuner_cases import outputs_of_all

        model = adapt(VISION)
        model.save_pretrained(tmp_path)
        save_file({"outputs": outputs_of_all(VISION, model)}, tmp_path / "expected.safetensors")
        command = [sys.executable, "-c", LOAD_IN_A_FRESH_PROCESS, str(request.path.parent), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("adapter_name", ["default", "mine"])
    def test_keys(self, adapter_name, tmp_path):
        """Without the adapter's name, so that it can be loaded under another."""
        adapt(MLP_2D, adapter_name=adapter_name).save_pretrained(tmp_path)
        folder = tmp_path if adapter_name == "default" else tmp_path / adapter_name
        parts = ["in", "out", "core", "task.depth", "task.edges", "task.normals"]
        assert set(load_file(folder / "adapter_model.safetensors")) == {
            f"base_model.model.{layer}.talora_{part}" for layer in ("lin0", "lin1") for part in parts
        }

    def test_other_adapter_name(self, tmp_path):
        model = adapt(MLP_2D)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(MLP_2D.build(), tmp_path, adapter_name="mine")
        assert_equal_outputs(MLP_2D, loaded, outputs_of(MLP_2D, model))
        loaded.load_adapter(tmp_path, "again", low_cpu_mem_usage=True)
        with torch.no_grad():
            for name, p in loaded.named_parameters():
                if ".mine" in name:
                    p.zero_()
        loaded.set_adapter("again")
        assert_equal_outputs(MLP_2D, loaded, outputs_of(MLP_2D, model))

    def test_several_adapters_are_saved_apart(self, tmp_path):
        model = adapt(MLP_2D, adapter_name="one")
        model.add_adapter("two", config_for(MLP_2D, **SECOND))
        expected = outputs_of(MLP_2D, model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(MLP_2D.build(), tmp_path / "two", adapter_name="two")
        loaded.load_adapter(tmp_path / "one", "one")
        model.set_adapter("two")
        for one, other in zip(
            outputs_of(MLP_2D, model, ["a", "b"]), outputs_of(MLP_2D, loaded, ["a", "b"]), strict=True
        ):
            assert torch.equal(one, other)
        loaded.set_adapter("one")
        assert_equal_outputs(MLP_2D, loaded, expected)

    @needs_peft_0_21
    def test_modules_to_save_and_norms_and_biases(self, tmp_path, images):
        values = {"target_modules": ["qkv"], "modules_to_save": ["neck"], "train_norms": True, "bias": "talora_only"}
        case = Case("sam", make_sam, ["qkv"], ())
        model = adapt(case, **values)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.05)
        model.set_task("edges")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_sam(), tmp_path)
        loaded.set_task("edges")
        encoders = [m.get_base_model().vision_encoder for m in (model, loaded)]
        one, other = (encoder(images).last_hidden_state for encoder in encoders)
        assert_visibly_different(one, make_sam().vision_encoder(images).last_hidden_state)
        assert torch.equal(one, other)

    def test_modules_to_save_the_model_does_not_have(self, sam):
        """For example an adapter with task heads on a stock SAM, which PEFT would load without them."""
        with pytest.raises(ValueError, match=saying("`modules_to_save`", "'task_heads.depth'", "SamModel")):
            get_peft_model(sam, TALoRAConfig(modules_to_save=["task_heads.depth"]))


class TestCopies:
    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    @every_case
    def test_equal_and_independent(self, case, clone):
        model, x = adapt(case), case.inputs()
        expected = outputs_of(case, model)
        model.set_task("depth")
        if case is VISION:
            model.get_base_model().activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
            model.train()
            case.call(model, x)  # wraps the checkpoint functions
        other = clone(model)
        assert_equal_outputs(case, other, expected)
        assert_close(case.call(other, x), expected[0])  # the choice is copied ...
        other.set_task("edges")
        assert_close(case.call(other, x), expected[2])
        assert_close(case.call(model, x), expected[0])  # ... and then the copy's own
        assert other.base_model.task_state is adapted_layers(other)[0].task_state
        assert other.base_model.task_state.base is other.get_base_model()
        assert {id(p) for p in other.parameters()}.isdisjoint({id(p) for p in model.parameters()})
        case.call(other, x).square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
        assert_is_plain(other.unload(), case)
        assert_close(case.call(model, x), expected[0])


class TestWithoutPeftModel:
    @every_case
    def test_injected_adapter(self, case):
        base = case.build()
        torch.manual_seed(7)
        model = inject_adapter_in_model(config_for(case), base)
        expected = outputs_of(case, adapt(case))
        assert_equal_outputs(case, model, expected)
        set_task(model, "normals")
        assert_close(case.call(model, case.inputs()), expected[1])


class TestPrecision:
    @pytest.mark.parametrize("case", [MLP_2D, VISION], ids=lambda case: case.name)
    def test_bfloat16_base_keeps_float32_parameters(self, case):
        model = adapt(case, dtype=torch.bfloat16)
        reference = adapt(case)
        reference.load_state_dict(model.state_dict())
        assert {p.dtype for n, p in model.named_parameters() if p.requires_grad} == {torch.float32}
        x = case.inputs()
        with torch.no_grad():
            output = case.call(model, x.bfloat16(), task_ids=[0, 2])
            expected = case.call(reference, x, task_ids=[0, 2])
        assert output.dtype == torch.bfloat16
        assert output.isfinite().all()
        assert_close(output, expected, 2e-2)

    @pytest.mark.parametrize("case", [MLP_2D, VISION], ids=lambda case: case.name)
    def test_autocast(self, case):
        model = adapt(case)
        with torch.no_grad():
            expected = case.call(model, case.inputs(), task_ids=[0, 2])
            with torch.autocast("cpu", torch.bfloat16):
                output = case.call(model, case.inputs(), task_ids=[0, 2])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert output.isfinite().all()
        assert_close(output, expected, 2e-2)
