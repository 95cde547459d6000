"""The training step, evaluation, arguments and checkpoints, on a tiny real SAM."""

from dataclasses import dataclass, field

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model

from peft_talora import Collator, MSamModel, SyntheticScenes, TALoRAConfig, engine, make_image_processor

TASKS = {"segmentation": 9, "depth": 1, "normals": 3}


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def model(sam_folder):
    torch.manual_seed(0)
    tasks = {**TASKS, "segmentation": len(scenes_classes())}
    return get_peft_model(MSamModel.from_pretrained(sam_folder, tasks=tasks), TALoRAConfig(r=4, init_weights=False))


def scenes_classes():
    from peft_talora.data.synthetic import CLASSES

    return CLASSES


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
    found = {}
    for order in ("folded", "sequential"):
        model.zero_grad()
        losses = engine.backward(accelerator, model, batch, order)
        found[order] = losses, gradients(model)
    for name, loss in found["folded"][0].items():
        torch.testing.assert_close(found["sequential"][0][name], loss)
    assert max(grad.abs().max() for grad in found["folded"][1].values()) > 0.1
    for name, grad in found["folded"][1].items():
        scale = grad.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(found["sequential"][1][name] / scale, grad / scale, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("order", ["folded", "sequential"])
def test_figures_pool_over_the_split_whatever_the_batch_size(accelerator, model, collator, scenes, order):
    model.train()
    by_one, _ = engine.evaluate(accelerator, model, scenes, collator, batch_size=1)
    by_three, losses = engine.evaluate(accelerator, model, scenes, collator, batch_size=3, order=order)
    assert model.training
    assert list(by_one) == list(losses) == list(TASKS)
    for task, figures in by_one.items():
        assert by_three[task] == pytest.approx(figures, rel=1e-4), task


def test_predictions_have_the_size_of_the_images(model, collator, scenes):
    logits = engine.predict(model, collator, [scenes[0], scenes[1]])
    assert [tuple(value.shape) for value in logits[1].values()] == [
        (len(scenes_classes()), 64, 64),
        (1, 64, 64),
        (3, 64, 64),
    ]


def test_parameters_are_counted_by_what_they_belong_to(model):
    counts = engine.count_parameters(model)
    layer = 32 * 4 + 96 * 4 + 4 * 4 * 3 + 3 * 3
    assert counts["adapter"] == 4 * layer
    assert counts["other"] == 0
    heads = sum(p.numel() for n, p in model.named_parameters() if "task_heads" in n and "modules_to_save" in n)
    assert counts["heads"] == heads > 0


def test_task_order_is_chosen_by_the_device():
    assert engine.resolve_task_order("auto", torch.device("cpu")) == "sequential"
    assert engine.resolve_task_order("auto", torch.device("cuda")) == "folded"
    assert engine.resolve_task_order("folded", torch.device("cpu")) == "folded"
    with pytest.raises(ValueError, match="'folded', 'sequential' or 'auto'; got 'both'"):
        engine.resolve_task_order("both", torch.device("cpu"))


def test_tasks_are_parsed():
    assert engine.parse_task("depth", {"depth": 1}) == {"name": "depth", "kind": "depth", "channels": 1}
    assert engine.parse_task("roads=segmentation:2", {}) == {"name": "roads", "kind": "segmentation", "channels": 2}
    assert engine.parse_task("edges=1", {"edges": 5})["channels"] == 1
    for text in ("depth", "depth=", "depth=many", "depth=kind:"):
        with pytest.raises(ValueError, match=f"task '{text}': write name=channels"):
            engine.parse_task(text, {})


@dataclass
class Arguments(engine.DataArguments):
    rate: float = field(default=0.1, metadata={"help": "A number."})
    names: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "A list."})


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "arguments.yaml"
    file.write_text("rate: 0.2\nnames: [b, c]\nseed: 7\n")
    args = engine.parse_arguments(Arguments, ["--config", str(file), "--seed", "8"], defaults={"num_images": 3})
    assert (args.rate, args.names, args.seed, args.num_images) == (0.2, ["b", "c"], 8, 3)
    file.write_text("raet: 0.2\n")
    with pytest.raises(ValueError, match=r"unknown arguments \['raet'\]"):
        engine.parse_arguments(Arguments, ["--config", str(file)])
