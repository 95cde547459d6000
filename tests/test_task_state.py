"""How the task of every sample reaches the layers: arguments, lasting choices, checkpointing, exceptions, heads."""

import pytest
import torch
import torch._dynamo.testing
from conftest import make_sam
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from tuner_cases import (
    BATCH,
    CASES,
    MLP,
    MLP_2D,
    TASKS,
    TEXT,
    VISION,
    Case,
    adapt,
    adapted_layers,
    assert_close,
    assert_same_gradients,
    assert_visibly_different,
    config_for,
    every_case,
    folded,
    gradients,
    saying,
    trainable_names,
)

from peft_talora.tuner import TALoRAConfig, set_task, use_task

CHECKPOINTED = [case for case in CASES if case in (TEXT, VISION)]


def each_task_alone(case: Case, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(T · B, ...), task-major, one call per task."""
    outputs = []
    for task in TASKS:
        with use_task(model, task):
            outputs.append(case.call(model, x))
    assert_visibly_different(*outputs)
    return torch.cat(outputs)


def number_of_calls_in_backward(model: nn.Module, loss: torch.Tensor) -> int:
    """How often adapted layers run again while the loss goes backward."""
    calls = []
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in adapted_layers(model)]
    loss.backward()
    for handle in handles:
        handle.remove()
    return len(calls)


class TestRouting:
    @every_case
    def test_folded_forward_equals_each_task_alone(self, case):
        model, x = adapt(case), case.inputs()
        expected = each_task_alone(case, model, x)
        many, ids = folded(x)
        assert_close(case.call(model, many, task_ids=ids), expected)

    @every_case
    def test_mixed_batch_equals_each_sample_alone(self, case):
        model, x = adapt(case), case.inputs(5)
        ids = [2, 0, 0, 1, 2]
        alone = [case.call(model, row[None], task_ids=[TASKS[task]]) for row, task in zip(x, ids, strict=True)]
        assert_close(case.call(model, x, task_ids=ids), torch.cat(alone))

    @every_case
    def test_all_forms_of_task_ids_are_equal(self, case):
        model, x = adapt(case), case.inputs()
        expected = case.call(model, x, task_ids=torch.tensor([2, 0]))
        forms = [[2, 0], (2, 0), ["edges", "depth"], ["edges", 0], torch.tensor([2, 0], dtype=torch.int32)]
        forms.append(list(torch.tensor([2, 0])))
        for form in forms:
            assert torch.equal(case.call(model, x, task_ids=form), expected), form

    @every_case
    def test_chosen_task_equals_task_ids(self, case):
        model, x = adapt(case), case.inputs()
        for task in TASKS:
            model.set_task(task)
            expected = case.call(model, x, task_ids=[task] * BATCH)
            assert_close(case.call(model, x), expected)
            assert_close(case.call(model, x, task_ids=None), expected)

    @every_case
    def test_task_ids_stand_over_the_chosen_task(self, case):
        model, x = adapt(case), case.inputs()
        expected = case.call(model, x, task_ids=[2, 0])
        model.set_task("normals")
        assert torch.equal(case.call(model, x, task_ids=[2, 0]), expected)

    def test_order_of_the_names_is_the_meaning_of_an_index(self):
        tasks = ["zebra", "mouse", "ant"]
        model, x = adapt(MLP_2D, task_names=tasks), MLP_2D.inputs()
        by_name = [model(x, task_ids=[task] * BATCH) for task in tasks]
        assert_visibly_different(*by_name)
        for index, expected in enumerate(by_name):
            assert torch.equal(model(x, task_ids=[index] * BATCH), expected)
            model.set_task(index)
            assert_close(model(x), expected)

    def test_a_row_belongs_to_its_name(self):
        """With only the row of one task not zero, only that task's output leaves the base model's."""
        model, x = adapt(MLP_2D), MLP_2D.inputs()
        with torch.no_grad():
            for layer in adapted_layers(model):
                for task, row in layer.talora_task["default"].items():
                    row.fill_(1.0 if task == "normals" else 0.0)
        with model.disable_adapter():
            base = model(x)
        for task in TASKS:
            assert torch.equal(model(x, task_ids=[task] * BATCH), base) is (task != "normals")

    def test_sub_model_takes_task_ids_too(self, images):
        """The encoder inside SamModel, called for itself."""
        case = Case("sam", make_sam, [f"vision_encoder.layers.{i}.attn.qkv" for i in range(4)], ())
        model = adapt(case)
        encoder = model.get_base_model().vision_encoder
        outputs = [encoder(images, task_ids=[task] * BATCH).last_hidden_state for task in TASKS]
        assert_visibly_different(*outputs)
        model.set_task("edges")
        assert_close(encoder(images).last_hidden_state, outputs[2])
        mixed = encoder(images, task_ids=["normals", "edges"]).last_hidden_state
        assert_close(mixed, torch.stack([outputs[1][0], outputs[2][1]]))

    def test_model_hands_task_ids_down(self, images):
        case = Case("sam", make_sam, [f"vision_encoder.layers.{i}.attn.qkv" for i in range(4)], ())
        model = adapt(case)
        points = torch.full((BATCH, 1, 1, 2), 30.0)

        def masks(**kwargs):
            return model(pixel_values=images, input_points=points, **kwargs).pred_masks

        by_task = [masks(task_ids=[task] * BATCH) for task in TASKS]
        assert_visibly_different(*by_task)
        assert_close(masks(task_ids=[2, 0]), torch.stack([by_task[2][0], by_task[0][1]]))
        with use_task(model, "normals"):
            assert_close(masks(), by_task[1])

    def test_sub_model_that_a_later_adapter_adapts(self):
        """Each adapter of its own half: both halves take `task_ids`."""

        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.left, self.right = TEXT.build(), TEXT.build()

            def forward(self, x):
                return TEXT.call(self.left, x) + TEXT.call(self.right, x)

        model = get_peft_model(Two(), config_for(TEXT, target_modules=["left.encoder.layer.0.output.dense"]))
        model.add_adapter("further", config_for(TEXT, target_modules=["right.encoder.layer.0.output.dense"]))
        model.set_adapter("further")
        right = model.get_base_model().right
        assert_visibly_different(*(TEXT.call(right, TEXT.inputs(), task_ids=[task] * BATCH) for task in TASKS))
        for handle in ("left", "right"):
            assert getattr(model.unload(), handle)._forward_pre_hooks == {}


class TestGradients:
    """Every way of computing the sum of all tasks' losses gives the same gradients, parameters' and input's."""

    def weights(self, case: Case, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """A different linear loss for every task and sample: (T, B, ...)."""
        with torch.no_grad():
            shape = case.call(model, x, task_ids=[0] * BATCH).shape
        return torch.randn(len(TASKS), *shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)

    def reference(self, case: Case, model: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> dict:
        """Task by task: forward and backward of each before the next."""
        found = []
        for task, weight in zip(TASKS, weights, strict=True):
            model.set_task(task)
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            (case.call(model, leaf) * weight).sum().backward()
            grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            found.append({**grads, "input": leaf.grad})
        model.set_task(None)
        zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
        total = {**zeros, "input": torch.zeros_like(x)}
        for grads in found:
            for name, grad in grads.items():
                total[name] = total[name] + (0 if grad is None else grad)
        return total

    def losses(self, case: Case, model: nn.Module, weights: torch.Tensor) -> dict:
        def folded_batch(x):
            many, ids = folded(x)
            return (case.call(model, many, task_ids=ids) * weights.flatten(0, 1)).sum()

        def task_ids(x):
            calls = [case.call(model, x, task_ids=[task] * BATCH) for task in TASKS]
            return sum((output * weight).sum() for output, weight in zip(calls, weights, strict=True))

        def chosen_tasks(x):
            total = 0
            for task, weight in zip(TASKS, weights, strict=True):
                model.set_task(task)
                total = total + (case.call(model, x) * weight).sum()
            model.set_task("normals")  # stands when the backward pass runs: must not matter
            return total

        def contexts(x):
            total = 0
            for task, weight in zip(TASKS, weights, strict=True):
                with use_task(model, task):
                    total = total + (case.call(model, x) * weight).sum()
            return total

        return {"folded": folded_batch, "task_ids": task_ids, "set_task": chosen_tasks, "use_task": contexts}

    @every_case
    @pytest.mark.parametrize("way", ["folded", "task_ids", "set_task", "use_task"])
    def test_all_ways_agree(self, case, way):
        model, x = adapt(case, dtype=torch.float64).double(), case.inputs(dtype=torch.float64)
        weights = self.weights(case, model, x)
        expected = self.reference(case, model, x, weights)
        assert_same_gradients(gradients(model, x, self.losses(case, model, weights)[way]), expected)

    @pytest.mark.parametrize("case", CHECKPOINTED, ids=lambda case: case.name)
    @pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
    @pytest.mark.parametrize("way", ["folded", "task_ids", "set_task", "use_task"])
    def test_activation_checkpointing_gives_the_same_gradient(self, case, use_reentrant, way):
        model, x = adapt(case, dtype=torch.float64).double(), case.inputs(dtype=torch.float64)
        weights = self.weights(case, model, x)
        expected = self.reference(case, model, x, weights)
        model.get_base_model().activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": use_reentrant}
        )
        model.train()
        loss = self.losses(case, model, weights)[way]
        assert_same_gradients(gradients(model, x, loss), expected)
        recomputed = number_of_calls_in_backward(model, loss(x.clone().requires_grad_()))
        assert recomputed > len(adapted_layers(model)) / 2  # a block's last layers need not run again
        # The checkpointed forward itself leaves nothing behind.
        model.set_task(None)
        with pytest.raises(ValueError, match="none is selected"):
            case.call(model, x.clone().requires_grad_())

    @pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
    def test_mixed_batch_under_checkpointing(self, use_reentrant):
        model, x = adapt(VISION, dtype=torch.float64).double(), VISION.inputs(dtype=torch.float64)
        weights = self.weights(VISION, model, x)[0]

        def loss(images):
            output = VISION.call(model, images, task_ids=["edges", "depth"])
            model.set_task("normals")
            return (output * weights).sum()

        def parameters_with_gradient():
            found = gradients_or_zero(model, x, loss)
            assert found["input"].abs().max() > 1e-3
            return found

        expected = parameters_with_gradient()
        model.get_base_model().activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": use_reentrant}
        )
        model.train()
        actual = parameters_with_gradient()
        for name, grad in expected.items():
            assert_close(actual[name], grad, 1e-9)
            assert bool(grad.any()) is not name.endswith(".normals"), name

    def test_checkpointing_enabled_before_the_adapter(self):
        base = make_sam().vision_encoder
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(7)
        model = get_peft_model(
            base, TALoRAConfig(task_names=TASKS, target_modules=["qkv"], init_weights=False)
        ).train()
        x, ids = folded(VISION.inputs())
        VISION.call(model, x, task_ids=ids).square().mean().backward()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def gradients_or_zero(model: nn.Module, x: torch.Tensor, loss) -> dict:
    """As `gradients`, for losses in which some task has no sample."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    loss(x).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    trained = {name: found[name] for name, p in model.named_parameters() if p.requires_grad}
    return {**trained, "input": x.grad}


class TestRejects:
    @pytest.mark.parametrize(
        ("ids", "words"),
        [
            ([0], ["`task_ids`", "1 entries", "batch of 2"]),
            ([0, 1, 2, 0], ["`task_ids`", "4 entries", "batch of 2"]),
            (torch.tensor([0, 1, 2]), ["`task_ids`", "3 entries", "batch of 2"]),
            (["depth", "colour"], ["'colour'", str(TASKS)]),
            ([0, 3], ["index 3", "out of range", str(TASKS)]),
            ([-1, 0], ["index -1", "out of range", str(TASKS)]),
            (torch.tensor([0, 3]), ["index 3", "out of range", str(TASKS)]),
            (torch.tensor([0, -1]), ["index -1", "out of range", str(TASKS)]),
            (torch.tensor([[0], [1]]), ["`task_ids`", "one dimension"]),
            (torch.tensor(1), ["`task_ids`", "one dimension"]),
            (torch.tensor([0.0, 1.0]), ["`task_ids`", "int64", "float32"]),
            (torch.tensor([True, False]), ["`task_ids`", "int64", "bool"]),
            ("depth", ["`task_ids`", "one task per sample", "'depth'"]),
            (1, ["`task_ids`", "one task per sample", "1"]),
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("case", [MLP_2D, VISION], ids=lambda case: case.name)
    def test_task_ids(self, case, ids, words):
        model, x = adapt(case), case.inputs()
        with pytest.raises(ValueError, match=saying(*words)):
            case.call(model, x, task_ids=ids)
        assert model.base_model.task_state.calls == []
        assert case.call(model, x, task_ids=[0, 1]).isfinite().all()

    def test_fraction_as_a_task(self):
        model = adapt(MLP_2D)
        with pytest.raises(TypeError, match="integer"):
            model(MLP_2D.inputs(), task_ids=[0.5, 1])
        with pytest.raises(TypeError, match="integer"):
            model.set_task(0.5)

    @every_case
    def test_several_tasks_and_none_selected(self, case):
        model, x = adapt(case), case.inputs()
        with pytest.raises(ValueError, match=saying("'default'", str(TASKS), "`task_ids`", "`set_task`")):
            case.call(model, x)
        model.set_task("depth")
        case.call(model, x)
        model.set_task(None)
        with pytest.raises(ValueError, match="none is selected"):
            case.call(model, x)

    @pytest.mark.parametrize(("task", "words"), [("colour", ["'colour'", str(TASKS)]), (3, ["index 3"])])
    def test_unknown_task_leaves_the_choice(self, task, words):
        model, x = adapt(MLP_2D), MLP_2D.inputs()
        model.set_task("edges")
        expected = model(x)
        with pytest.raises(ValueError, match=saying(*words)):
            model.set_task(task)
        with pytest.raises(ValueError, match=saying(*words)):
            adapted_layers(model)[0].get_delta_weight("default", task)
        assert torch.equal(model(x), expected)

    def test_unknown_adapter(self):
        with pytest.raises(ValueError, match=saying("'other'", "['default']")):
            adapt(MLP_2D).set_task("depth", "other")

    def test_model_without_an_adapter(self):
        model = MLP_2D.build()
        with pytest.raises(ValueError, match=saying("MLP", "no TA-LoRA adapter")):
            set_task(model, "depth")
        with pytest.raises(ValueError, match="no TA-LoRA adapter"), use_task(model, "depth"):
            pass

    def test_samples_that_are_not_the_slowest_axis(self):
        class Transposing(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(6, 4)

            def forward(self, x):
                return self.inner(x.transpose(0, 1))

        model = get_peft_model(Transposing(), TALoRAConfig(task_names=TASKS, target_modules=["inner"], r=2))
        with pytest.raises(ValueError, match=saying("leading size of 3", "2 entries", "slowest axis")):
            model(torch.ones(2, 3, 6), task_ids=[0, 1])


class TestOneTask:
    @every_case
    def test_needs_no_selection(self, case):
        model, x = adapt(case, task_names=None), case.inputs()
        assert model.peft_config["default"].task_names == ["main"]
        assert model.peft_config["default"].r_task == 2
        output = case.call(model, x)
        with model.disable_adapter():
            assert_visibly_different(output, case.call(model, x))
        model.set_task("main")
        assert torch.equal(case.call(model, x), output)
        assert torch.equal(case.call(model, x, task_ids=[0] * BATCH), output)


class TestAfterAnException:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("case", [MLP_2D, VISION], ids=lambda case: case.name)
    def test_next_call_behaves(self, case, error):
        model, x = adapt(case), case.inputs()
        expected = case.call(model, x, task_ids=[2, 0])
        last = adapted_layers(model)[-1]

        def fail(*_):
            raise error("in the middle")

        handle = last.register_forward_pre_hook(fail)
        with pytest.raises(error, match="in the middle"):
            case.call(model, x, task_ids=[1, 1])
        handle.remove()
        with pytest.raises(ValueError, match="none is selected"):
            case.call(model, x)
        with pytest.raises(ValueError, match="none is selected"):
            last.get_delta_weight("default")
        model.set_task("edges")
        assert torch.equal(last.get_delta_weight("default"), last.get_delta_weight("default", "edges"))
        assert torch.equal(case.call(model, x, task_ids=[2, 0]), expected)

    def test_a_direct_call_leaves_nothing_behind(self):
        """Around it is no `PeftModel`, whose context would take back what the hooks leave."""
        base, x = adapt(MLP_2D).get_base_model(), MLP_2D.inputs()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            base(x[:, :5], task_ids=[1, 1])
        with pytest.raises(ValueError, match="none is selected"):
            base.lin0(x)

    def test_a_failed_recomputation_leaves_the_choice(self):
        model, x = adapt(TEXT), TEXT.inputs().requires_grad_()
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        model.set_task("depth")
        output = TEXT.call(model, x)
        model.set_task("edges")
        expected = TEXT.call(model, x)
        assert_visibly_different(output, expected)

        def fail(*_):
            raise RuntimeError("in the middle")

        handle = adapted_layers(model)[0].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            output.sum().backward()
        handle.remove()
        assert torch.equal(TEXT.call(model, x), expected)


class TestUseTask:
    def test_restores_and_nests(self):
        model, x = adapt(MLP_2D), MLP_2D.inputs()
        by_task = {}
        for task in TASKS:
            with use_task(model, task) as inside:
                assert inside is model
                by_task[task] = model(x)
        assert_visibly_different(*by_task.values())
        with use_task(model, "depth"):
            with use_task(model, "edges"):
                assert torch.equal(model(x), by_task["edges"])
                model.set_task("normals")
                assert torch.equal(model(x), by_task["normals"])
            assert torch.equal(model(x), by_task["depth"])
        with pytest.raises(ValueError, match="none is selected"):
            model(x)

    def test_restores_after_an_exception(self):
        model, x = adapt(MLP_2D), MLP_2D.inputs()
        model.set_task("depth")
        expected = model(x)

        def fail():
            with use_task(model, "edges"):
                raise RuntimeError("inside")

        with pytest.raises(RuntimeError, match="inside"):
            fail()
        assert torch.equal(model(x), expected)
        with pytest.raises(ValueError, match="colour"), use_task(model, "colour"):
            pass
        assert torch.equal(model(x), expected)

    def test_of_one_adapter_among_two(self):
        model, x = adapt(MLP_2D), MLP_2D.inputs()
        model.add_adapter("second", config_for(MLP_2D, task_names=["a", "b"]))
        model.base_model.set_adapter(["default", "second"])
        model.set_task("edges", "default")
        with use_task(model, "b", "second"):
            assert model(x).isfinite().all()
        with pytest.raises(ValueError, match="'second'"):
            model(x)

    def test_what_is_restored_is_a_task_not_a_position(self):
        model, x = adapt(MLP_2D), MLP_2D.inputs()
        model.set_task("edges")
        expected = model(x)
        with use_task(model, "normals"):
            model.remove_task("depth")
            model.rename_task("edges", "borders")
        assert torch.equal(model(x), expected)
        with use_task(model, "normals"), use_task(model, "normals"):
            model.remove_task("borders")
            model.add_task("borders", init="copy:normals")
        with pytest.raises(ValueError, match="none is selected"):
            model(x)

    def test_an_adapter_that_was_replaced_has_no_choice(self):
        model, x = adapt(MLP_2D), MLP_2D.inputs()
        model.add_adapter("second", config_for(MLP_2D))
        model.set_task("edges", "second")
        with use_task(model, "depth"):
            model.delete_adapter("second")
            model.add_adapter("second", config_for(MLP_2D))
        model.set_adapter("second")
        with pytest.raises(ValueError, match="none is selected"):
            model(x)

    def test_a_merged_model_is_unmerged(self):
        model, x = adapt(MLP_2D), MLP_2D.inputs()
        model.set_task("depth")
        expected = model(x)
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging the model first"), use_task(model, "edges"):
            assert_visibly_different(model(x), expected)
        assert_close(model(x), expected)
        assert not any(layer.merged for layer in adapted_layers(model))


class Heads(nn.Module):
    """A base model with a head per task, as the contract of `TALoRAModel` has it."""

    def __init__(self):
        super().__init__()
        sam = make_sam()
        self.vision_encoder = sam.vision_encoder
        self.task_heads = nn.ModuleDict({task: nn.Conv2d(16, 1, 1) for task in ["normals", "depth", "edges"]})
        self.task_conditional = False
        self.merged_task = None
        self.seen: list[bool] = []

    def forward(self, pixel_values, tasks=None, task_ids=None):
        self.seen.append(self.task_conditional)
        names = list(self.task_heads)
        if task_ids is not None:
            indices = [names.index(task) if isinstance(task, str) else int(task) for task in task_ids]
            features = self.encode(pixel_values, torch.tensor(indices))
            return torch.cat([self.task_heads[names[i]](f[None]) for i, f in zip(indices, features, strict=True)])
        wanted = names if tasks is None else list(tasks)
        if self.merged_task is not None and wanted != [self.merged_task]:
            raise ValueError(f"only {self.merged_task}, not {wanted}")
        ids = torch.tensor([names.index(task) for task in wanted]).repeat_interleave(len(pixel_values))
        features = self.encode(pixel_values.repeat(len(wanted), 1, 1, 1), ids).chunk(len(wanted))
        return {task: self.task_heads[task](part) for task, part in zip(wanted, features, strict=True)}

    def encode(self, pixel_values, ids):
        kwargs = {"task_ids": ids} if self.task_conditional else {}
        return self.vision_encoder(pixel_values, **kwargs).last_hidden_state


def adapt_heads(**values) -> PeftModel:
    torch.manual_seed(7)
    base = Heads().eval()
    return get_peft_model(base, TALoRAConfig(**{"target_modules": ["qkv"], "init_weights": False, **values}))


class TestHeads:
    """Contract with a base model that keeps one head per task."""

    def test_config_is_filled_in_from_the_heads(self):
        config = adapt_heads().peft_config["default"]
        assert config.task_names == ["normals", "depth", "edges"]
        assert config.modules_to_save == ["task_heads.normals", "task_heads.depth", "task_heads.edges"]
        assert config.r_task == 3

    def test_what_the_config_says_stands(self):
        config = adapt_heads(task_names=["edges", "depth"], modules_to_save=["task_heads.edges"]).peft_config[
            "default"
        ]
        assert config.task_names == ["edges", "depth"]
        assert config.modules_to_save == ["task_heads.edges"]

    def test_unknown_tasks(self):
        with pytest.raises(ValueError, match=saying("['colour']", "['normals', 'depth', 'edges']")):
            adapt_heads(task_names=["depth", "colour"])

    def test_heads_train_with_the_adapter(self):
        model = adapt_heads()
        trained = {name.split(".")[3] for name, p in model.named_parameters() if p.requires_grad and "heads" in name}
        assert trained == {"normals", "depth", "edges"}

    def test_all_tasks_at_once_equal_each_alone(self, images):
        model = adapt_heads()
        outputs = model(images)
        assert list(outputs) == ["normals", "depth", "edges"]
        assert_visibly_different(*outputs.values())
        for task, expected in outputs.items():
            (alone,) = model(images, tasks=[task]).values()
            assert_close(alone, expected)
            assert_close(model(images, task_ids=[task] * BATCH), expected)

    def test_order_of_the_adapter_may_differ_from_that_of_the_heads(self, images):
        """An index in `task_ids` is a head's; a name is a name."""
        model, other = adapt_heads(), adapt_heads(task_names=["edges", "normals", "depth"])
        other.load_state_dict(model.state_dict())
        expected = model(images)
        for task, output in other(images).items():
            assert torch.equal(output, expected[task]), task
        for ids in ([2, 0], torch.tensor([2, 0]), ["edges", "normals"]):
            actual = other(images, task_ids=ids)
            assert torch.equal(actual, model(images, task_ids=ids))
            assert_close(actual, torch.stack([expected["edges"][0], expected["normals"][1]]))
        other.set_task(0)  # a head's too
        assert list(other(images)) == ["normals"]
        other.train_only([0])
        assert {name.split(".")[-1] for name in trainable_names(other) if "talora" in name} == {"normals"}
        other.merge_adapter()
        assert other.get_base_model().merged_task == "normals"

    def test_task_without_a_row(self, images):
        model = adapt_heads(task_names=["edges", "depth"])
        assert model(images, task_ids=["edges", "depth"]).shape[0] == BATCH
        for ids in (["edges", "normals"], [2, 0], torch.tensor([2, 0])):
            with pytest.raises(ValueError, match=saying("'normals'", "['edges', 'depth']")):
                model(images, task_ids=ids)

    def test_an_adapter_of_one_head_serves_it_alone(self, images):
        model = adapt_heads(task_names=["depth"], alpha=64)
        outputs = model(images)
        assert list(outputs) == list(model(images, tasks=None)) == ["depth"]
        assert_close(model(images, task_ids=["depth"] * BATCH), outputs["depth"])
        for call in ({"tasks": ["normals"]}, {"tasks": ["depth", "normals"]}, {"task_ids": ["depth", "normals"]}):
            with pytest.raises(ValueError, match=saying("'normals'", "['depth']")):
                model(images, **call)
        with model.disable_adapter():
            base = model(images)
        assert list(base) == ["normals", "depth", "edges"]
        assert_visibly_different(base["depth"], outputs["depth"])
        model.merge_adapter()
        assert model.get_base_model().merged_task == "depth"
        assert_close(model(images)["depth"], outputs["depth"])
        with pytest.raises(ValueError, match="only depth"):
            model(images, tasks=["normals"])

    def test_no_tasks_means_those_that_are_served(self, images):
        model = adapt_heads(task_names=["edges", "normals"])
        assert list(model(images)) == ["normals", "edges"]  # in the order of the heads
        model.add_adapter("second", TALoRAConfig(task_names=["edges", "depth"], target_modules=["proj"]))
        model.add_adapter("third", TALoRAConfig(task_names=["all"], target_modules=["lin1"], modules_to_save=[]))
        model.set_adapter("third")
        assert list(model(images)) == ["normals", "depth", "edges"]
        model.base_model.set_adapter(["default", "third"])
        assert list(model(images)) == ["normals", "edges"]

    def test_chosen_task_is_what_no_tasks_means(self, images):
        model = adapt_heads()
        expected = model(images)
        model.set_task("depth")
        output = model(images)
        assert list(output) == ["depth"]
        assert_close(output["depth"], expected["depth"])
        assert list(model(images, tasks=["edges", "normals"])) == ["edges", "normals"]
        assert list(model(images, ["edges"])) == ["edges"]
        assert list(model(images, tasks=None)) == ["depth"]
        model.set_task(None)
        assert list(model(images)) == ["normals", "depth", "edges"]

    def test_task_conditional_follows_the_adapter(self, images):
        model = adapt_heads()
        base = model.get_base_model()

        def seen() -> bool:
            base.seen.clear()
            model(images, tasks=["depth"])
            assert base.seen == [base.task_conditional]
            return base.task_conditional

        assert base.task_conditional is True
        assert seen() is True
        with model.disable_adapter():
            assert seen() is False
        assert seen() is True
        model.add_adapter("single", TALoRAConfig(task_names=["shared"], target_modules=["qkv"], modules_to_save=[]))
        assert seen() is True
        model.set_adapter("single")
        assert base.task_conditional is False
        assert seen() is False
        model.set_adapter("default")
        assert base.task_conditional is True
        model.set_task("depth")
        model.merge_adapter()
        assert base.task_conditional is False
        assert seen() is False
        model.unmerge_adapter()
        assert seen() is True
        base = model.unload()
        assert base.task_conditional is False

    def test_base_without_the_contract_is_left_alone(self):
        model = adapt(MLP_2D)
        model.set_task("depth")
        model.merge_adapter()
        assert not {"task_conditional", "merged_task"} & set(vars(model.get_base_model()))

    def test_merged_task_follows_the_merge(self, images):
        model = adapt_heads()
        base, expected = model.get_base_model(), model(images)
        assert base.merged_task is None
        model.set_task("depth")
        model.merge_adapter()
        assert base.merged_task == "depth"
        assert_close(model(images, tasks=["depth"])["depth"], expected["depth"])
        assert list(model(images)) == ["depth"]  # the chosen task, as before merging
        for tasks in (["edges"], ["depth", "edges"]):
            with pytest.raises(ValueError, match="only depth"):
                model(images, tasks=tasks)
        model.unmerge_adapter()
        assert base.merged_task is None
        assert_close(model(images, tasks=["edges"])["edges"], expected["edges"])

    @pytest.mark.parametrize(
        "choose", [set_task, lambda model, task: model.set_task(task)], ids=["function", "method"]
    )
    def test_choosing_another_task_unmerges(self, choose, images):
        model = adapt_heads()
        base, expected = model.get_base_model(), model(images)
        model.set_task("depth")
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging the model first"):
            choose(model, "edges")
        assert (base.merged_task, base.task_conditional) == (None, True)
        assert_close(model(images)["edges"], expected["edges"])

    def test_disabling_a_merged_adapter_unmerges(self, images):
        model = adapt_heads()
        base, weights = model.get_base_model(), [layer.weight.clone() for layer in adapted_layers(model)]
        model.set_task("depth")
        model.merge_adapter()
        with model.disable_adapter():
            model(images, tasks=["edges"])
            assert base.merged_task is None
        for layer, weight in zip(adapted_layers(model), weights, strict=True):
            assert_close(layer.weight, weight)

    def test_merge_and_unload_keeps_the_task_and_the_trained_heads(self, images):
        model = adapt_heads()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "modules_to_save" in name:
                    p.add_(1.0)
        expected = model(images)
        model.set_task("edges")
        base = model.merge_and_unload()
        assert type(base) is Heads
        assert (base.merged_task, base.task_conditional) == ("edges", False)
        assert_close(base(images, tasks=["edges"])["edges"], expected["edges"])
        assert {type(head) for head in base.task_heads.values()} == {nn.Conv2d}
        assert not adapted_layers(base)

    def test_merged_task_of_the_base_itself_stays(self, images):
        """A base that was merged and unloaded before may get a further adapter."""
        model = adapt_heads()
        model.set_task("edges")
        base = model.merge_and_unload()
        again = get_peft_model(base, TALoRAConfig(task_names=["x"], target_modules=["proj"], modules_to_save=[]))
        again(images, tasks=["edges"])
        assert again.unload().merged_task == "edges"

    def test_adapter_of_one_task_merges_without_a_mark(self, images):
        model = adapt_heads(task_names=["shared"])
        expected = model(images)
        model.merge_adapter()
        assert model.get_base_model().merged_task is None
        for task, output in model(images).items():
            assert_close(output, expected[task])


class TestMerged:
    @pytest.mark.parametrize("case", [MLP_2D, VISION], ids=lambda case: case.name)
    def test_task_ids_are_refused(self, case):
        model, x = adapt(case), case.inputs()
        model.set_task("normals")
        model.merge_adapter()
        with pytest.raises(ValueError, match=saying("`task_ids`", "'normals'", "unmerge_adapter")):
            case.call(model, x, task_ids=[1, 1])
        merged = case.call(model, x)
        model.unmerge_adapter()
        assert_close(merged, case.call(model, x, task_ids=[1, 1]), 1e-4)


class TestCompile:
    @pytest.mark.parametrize("case", [MLP_2D, VISION], ids=lambda case: case.name)
    def test_one_graph_for_all_tasks(self, case):
        model, x = adapt(case), case.inputs()
        ids = [torch.tensor(pair) for pair in ([0, 1], [2, 2], [1, 0])]
        with torch.no_grad():
            expected = [case.call(model, x, task_ids=pair) for pair in ids]
            torch._dynamo.reset()
            counted = torch._dynamo.testing.CompileCounterWithBackend("eager")
            compiled = torch.compile(model, fullgraph=True, backend=counted)
            for pair, output in zip(ids, expected, strict=True):
                assert_close(case.call(compiled, x, task_ids=pair), output)
        assert counted.frame_count == 1

    def test_choosing_another_task_compiles_nothing_anew(self):
        model, x = adapt(MLP_2D), MLP_2D.inputs()
        torch._dynamo.reset()
        counted = torch._dynamo.testing.CompileCounterWithBackend("eager")
        compiled = torch.compile(model, fullgraph=True, backend=counted)
        for task in TASKS:
            model.set_task(task)
            assert_close(compiled(x), model(x))
        assert counted.frame_count == 1

    def test_gradients(self):
        model, x = adapt(MLP_2D), MLP_2D.inputs()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        many, ids = folded(x)
        expected = gradients(model, many, lambda v: model(v, task_ids=ids).square().sum())
        actual = gradients(model, many, lambda v: compiled(v, task_ids=ids).square().sum())
        assert_same_gradients(actual, expected, 1e-5)


class Checkpointed(MLP):
    """A model that recomputes itself, by no function of transformers."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def adapt_two_tasks(model: nn.Module) -> PeftModel:
    config = TALoRAConfig(task_names=["a", "b"], target_modules=["lin0"], r=2, init_weights=False)
    return get_peft_model(model, config)


def test_recomputation_by_a_model_s_own_checkpointing_is_refused():
    torch.manual_seed(0)
    model = adapt_two_tasks(Checkpointed())
    x = torch.randn(BATCH, 6)
    model.set_task("a")
    y = model(x)
    model.set_task("b")
    for output in (y, model(x, task_ids=["a", "b"])):
        with pytest.raises(RuntimeError, match="recomputed in backward by a checkpoint function of the model's own"):
            output.sum().backward()


def test_recomputation_of_the_whole_call_is_right():
    torch.manual_seed(0)
    model = adapt_two_tasks(MLP())
    x = torch.randn(BATCH, 6)

    def call(x):
        return model(x, task_ids=["a", "b"])

    expected = gradients(model, x, lambda x: call(x).square().sum())
    found = gradients(model, x, lambda x: checkpoint(call, x, use_reentrant=False).square().sum())
    assert_same_gradients(found, expected)


def test_a_choice_that_one_adapter_does_not_know_changes_none():
    model = adapt_two_tasks(MLP())
    model.add_adapter("second", TALoRAConfig(task_names=["a", "c"], target_modules=["lin0"], r=2))
    model.base_model.set_adapter(["default", "second"])
    model.set_task("a")
    with pytest.raises(ValueError, match=saying("'b'", "['a', 'c']")):
        model.set_task("b")
    with pytest.raises(ValueError, match=saying("'b'", "['a', 'c']")), use_task(model, "b"):
        pass
    assert {name: int(index) for name, index in model.base_model.task_state.selected.items()} == {
        "default": 0,
        "second": 0,
    }


def test_task_ids_of_a_one_task_adapter_are_checked_too():
    model = get_peft_model(MLP(), TALoRAConfig(target_modules=["lin0"], r=2))
    x = torch.randn(BATCH, 6)
    assert model(x, task_ids=["main", 0]).shape == (BATCH, 5)
    for task_ids in (["zzz", "main"], [0, 7], torch.tensor([0, -3]), [True, False], []):
        with pytest.raises(ValueError, match=r"tasks are \['main'\]|`task_ids` is empty"):
            model(x, task_ids=task_ids)
