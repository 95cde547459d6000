"""The training step, evaluation and arguments, on a tiny real SAM."""

import weakref
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from PIL import Image

from peft_talora import (
    Collator,
    MSamModel,
    SyntheticScenes,
    TALoRAConfig,
    engine,
    evaluation,
    make_image_processor,
    make_task,
    orthogonality_loss,
    results,
    sources,
)
from peft_talora.data import SYNTHETIC_TASKS

TASKS = {name: SYNTHETIC_TASKS[name] for name in ("segmentation", "depth", "normals")}
WEIGHTS = {"segmentation": 1.0, "depth": 2.0, "normals": 4.0}


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def model(sam_folder):
    torch.manual_seed(0)
    model = MSamModel.from_pretrained(sam_folder, tasks=TASKS)
    with torch.no_grad():  # all channels of a head start equal, and rounding would decide between them
        for head in model.task_heads.values():
            head.no_mask_embed.weight += 0.3 * torch.randn_like(head.no_mask_embed.weight)
    return get_peft_model(model, TALoRAConfig(r=4, init_weights=False))


@pytest.fixture
def collator(model):
    base = model.get_base_model()
    return Collator([base.task(name) for name in base.task_names], make_image_processor(64))


@pytest.fixture
def scenes():
    return SyntheticScenes("train", num_images=5, size=64, tasks=list(TASKS))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_folded_and_sequential_give_the_same_losses_and_gradients(accelerator, model, collator, scenes):
    batch = collator([scenes[0], scenes[1]])
    model, batch["pixel_values"] = model.double(), batch["pixel_values"].double()
    found = {}
    for order in ("folded", "sequential"):
        model.zero_grad()
        losses = engine.backward(accelerator, model, batch, order, WEIGHTS)
        found[order] = losses, gradients(model)
    for name, loss in found["folded"][0].items():
        torch.testing.assert_close(found["sequential"][0][name], loss)
    assert max(grad.abs().max() for grad in found["folded"][1].values()) > 0.1
    for name, grad in found["folded"][1].items():
        scale = grad.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(found["sequential"][1][name] / scale, grad / scale, atol=1e-8, rtol=0, msg=name)


class HeldTensors:
    """What autograd holds for a backward pass beside the parameters, in bytes: `peak` is the most at a time."""

    def __init__(self, model):
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.held, self.peak = {}, 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.parameters:
            return (tensor,)
        key = storage.data_ptr()
        uses, size = self.held.get(key, (0, storage.nbytes()))
        self.held[key] = uses + 1, size
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        packed = Packed([tensor])
        weakref.finalize(packed, self.release, key)
        return packed

    def release(self, key):
        uses, size = self.held.pop(key)
        if uses > 1:
            self.held[key] = uses - 1, size

    def unpack(self, packed):
        return packed[0]


class Packed(list):
    """A list that can be referred to weakly."""


def test_task_by_task_holds_the_activations_of_one_task(accelerator, model, collator, scenes):
    batch = collator([scenes[0], scenes[1]])

    def peak(order, tasks):
        held = HeldTensors(model)
        with torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
            labels = {name: batch["labels"][name] for name in tasks}
            engine.backward(accelerator, model, {**batch, "labels": labels}, order, WEIGHTS)
        assert not held.held, "all is let go after backward"
        return held.peak

    alone = [peak("folded", [name]) for name in TASKS]
    assert peak("sequential", TASKS) < 1.02 * max(alone)
    assert peak("folded", TASKS) > 0.95 * sum(alone)


@pytest.mark.parametrize("order", ["folded", "sequential"])
def test_gradients_are_those_of_the_weighted_sum(accelerator, model, collator, scenes, order):
    batch = collator([scenes[0], scenes[1]])
    model, batch["pixel_values"] = model.double(), batch["pixel_values"].double()
    losses = engine.backward(accelerator, model, batch, order, WEIGHTS)
    found, expected = gradients(model), {}
    for task, weight in WEIGHTS.items():
        model.zero_grad()
        labels = {task: batch["labels"][task]}
        alone = engine.backward(accelerator, model, {**batch, "labels": labels}, order, {task: 1.0})
        torch.testing.assert_close(losses[task], alone[task])
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                expected[name] = expected.get(name, 0) + weight * parameter.grad
    for name, grad in found.items():
        scale = grad.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(expected[name] / scale, grad / scale, atol=1e-8, rtol=0, msg=name)


def test_weights_of_the_losses_are_those_of_the_kinds_or_as_given():
    tasks = engine.parse_tasks(sources.DataArguments(), ["segmentation", "facing=normals:3", "depth"])
    assert engine.parse_weights([], tasks) == {"segmentation": 1, "facing": 4, "depth": 1}
    assert engine.parse_weights(["facing=2.5", "depth=3"], tasks) == {"segmentation": 1, "facing": 2.5, "depth": 3}
    for text, message in (("edges=1", "name of segmentation, facing"), ("depth=0", "positive"), ("depth", "positive")):
        with pytest.raises(ValueError, match=message):
            engine.parse_weights([text], tasks)


@pytest.mark.parametrize("order", ["folded", "sequential"])
def test_a_regularizer_is_added_once(accelerator, model, collator, scenes, order):
    batch = collator([scenes[0], scenes[1]])
    engine.backward(accelerator, model, batch, order, WEIGHTS)
    without = gradients(model)
    model.zero_grad()
    engine.backward(accelerator, model, batch, order, WEIGHTS, lambda: 10 * orthogonality_loss(model))
    found = gradients(model)
    model.zero_grad()
    (10 * orthogonality_loss(model)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and "talora" in name:
            torch.testing.assert_close(found[name], without[name] + parameter.grad, msg=name)
            assert "talora_core" not in name or parameter.grad.abs().max() > 0.01


@pytest.mark.parametrize("order", ["folded", "sequential"])
def test_figures_pool_over_the_split_whatever_the_batch_size(accelerator, model, collator, scenes, order):
    model.train()
    by_one, _ = evaluation.evaluate(accelerator, model, scenes, collator, batch_size=1)
    by_three, losses = evaluation.evaluate(accelerator, model, scenes, collator, batch_size=3, order=order)
    assert model.training
    assert list(by_one) == list(losses) == list(TASKS)
    for task, figures in by_one.items():
        assert by_three[task] == pytest.approx(figures, rel=1e-4), task


def test_predictions_have_the_size_of_the_images(model, collator, scenes):
    logits = evaluation.predict(model, collator, [scenes[0], scenes[1]])
    shapes = {name: tuple(value.shape) for name, value in logits[1].items()}
    assert shapes == {name: (channels, 64, 64) for name, channels in TASKS.items()}


def test_parameters_are_counted_by_what_they_belong_to(model):
    counts = results.count_parameters(model)
    layer = 32 * 4 + 96 * 4 + 4 * 4 * 3 + 3 * 3
    assert counts["adapter"] == 4 * layer
    assert counts["other"] == 0
    heads = sum(p.numel() for n, p in model.named_parameters() if "task_heads" in n and "modules_to_save" in n)
    assert counts["heads"] == heads > 0


def test_joint_updates_are_one_step_and_alternating_ones_a_step_per_task_in_turn():
    names = ["a", "b", "c"]
    assert engine.update_groups(names, "joint", 5) == [["a", "b", "c"]]
    groups = [engine.update_groups(names, "alternating", step) for step in range(4)]
    assert groups[:3] == [[["a"], ["b"], ["c"]], [["b"], ["c"], ["a"]], [["c"], ["a"], ["b"]]]
    assert groups[3] == groups[0]
    assert list(engine.whole_chunks(range(5), 2)) == [[0, 1], [2, 3]]
    assert list(engine.whole_chunks([0], 2)) == []


def test_task_order_is_chosen_by_the_device():
    assert engine.resolve_task_order("auto", torch.device("cpu")) == "sequential"
    assert engine.resolve_task_order("auto", torch.device("cuda")) == "folded"
    assert engine.resolve_task_order("folded", torch.device("cpu")) == "folded"
    assert engine.resolve_task_order("auto", torch.device("cpu"), task_conditional=False) == "folded"
    assert engine.resolve_task_order("sequential", torch.device("cpu"), task_conditional=False) == "sequential"
    with pytest.raises(ValueError, match="'folded', 'sequential' or 'auto'; got 'both'"):
        engine.resolve_task_order("both", torch.device("cpu"))


def test_tasks_are_parsed():
    assert engine.parse_task("depth", {"depth": 1}) == {"name": "depth", "kind": "depth", "channels": 1}
    assert engine.parse_task("roads=segmentation:2", {}) == {"name": "roads", "kind": "segmentation", "channels": 2}
    assert engine.parse_task("edges=1", {"edges": 5})["channels"] == 1
    for text in ("depth", "depth=", "depth=many", "depth=kind:"):
        with pytest.raises(ValueError, match=f"task '{text}': write name=channels"):
            engine.parse_task(text, {})
    with pytest.raises(ValueError, match=r"task 'roads=2': 'roads' is none of the kinds .* roads=segmentation:2\."):
        engine.parse_task("roads=2", {})


@dataclass
class Arguments(sources.DataArguments):
    rate: float = field(default=0.1, metadata={"help": "A number."})
    names: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "A list."})


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "arguments.yaml"
    file.write_text("rate: 0.2\nnames: [b, c]\ndata_seed: 7\n")
    args = engine.parse_arguments(Arguments, ["--config", str(file), "--data_seed", "8"], defaults={"num_images": 3})
    assert (args.rate, args.names, args.data_seed, args.num_images) == (0.2, ["b", "c"], 8, 3)
    file.write_text("raet: 0.2\n")
    with pytest.raises(ValueError, match=r"unknown arguments \['raet'\]"):
        engine.parse_arguments(Arguments, ["--config", str(file)])


@pytest.mark.parametrize("names", [["edges"], ["segmentation", "edges"]])
def test_edges_are_derived_without_the_borders_of_what_is_ignored(names, tmp_path):
    for folder in ("image", "segmentation"):
        (tmp_path / "train" / folder).mkdir(parents=True)
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "train" / "image" / "a.png")
    classes = np.array([[0, 0, 1, 1, 7, 7]] * 4, np.uint8)
    Image.fromarray(classes).save(tmp_path / "train" / "segmentation" / "a.png")
    tasks = [make_task(name, {"segmentation": 2, "edges": 1}[name]) for name in names]
    args = sources.DataArguments(data_root=str(tmp_path), ignored_class=7, derive_edges=True)
    labels = sources.open_split(args, "train", tasks, image_size=64)[0]["labels"]
    assert labels["edges"][0].tolist() == [0, 1, 1, 255, 255, 255]
