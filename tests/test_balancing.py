"""A step with weighed tasks: the same gradients however a batch is cut, in batches or over processes."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from balancing_cases import BATCH, DTYPES, GIVEN, KINDS, TASKS, batch_of, make_collator, make_model, outcome, train
from safetensors.torch import load_file

from peft_talora import MSamModel, Task, engine, make_task, orthogonality_loss
from peft_talora.balancing import Balancer
from peft_talora.methods import METHODS, AdapterArguments
from peft_talora.weighting import WEIGHTINGS, GradientWeighting, make_weighting


class Plain(GradientWeighting):
    """The sum of the gradients, by way of each one apart."""

    def combine(self, losses_S, gradients_SN, labelled_S, step):
        self.labelled = labelled_S.tolist()
        return self.weighed_sum(torch.ones_like(losses_S), gradients_SN), torch.ones_like(losses_S)

    def note(self, losses_S, labelled_S, epoch):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def model(sam_folder):
    return make_model(sam_folder)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict, expected: dict, tolerance=1e-8):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(found[name] / scale, value / scale, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("regularized", [False, True])
def test_gradients_apart_sum_to_those_of_the_sum(accelerator, model, regularized):
    collator = make_collator(model)
    regularizer = (lambda: 10 * orthogonality_loss(model)) if regularized else None
    batches = [batch_of(collator, 0, range(BATCH))]
    found = {}
    for weighting in (Plain(list(TASKS)), make_weighting("equal", list(TASKS))):
        model.zero_grad()
        balancer = Balancer(accelerator, model, collator.tasks, weighting, regularizer=regularizer)
        losses = balancer.backward(batches, 0)
        found[type(weighting)] = gradients(model), {name: loss.item() for name, loss in losses.items()}
    first, second = found.values()
    assert_same(first[0], second[0])
    assert first[1] == pytest.approx(second[1], rel=1e-12)
    assert max(value.abs().max() for value in first[0].values()) > 0.1


def test_what_belongs_to_one_task_has_its_own_weight(accelerator, model):
    class Own(Plain):
        def combine(self, losses_S, gradients_SN, labelled_S, step):
            own_S = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
            return self.weighed_sum(torch.ones_like(losses_S), gradients_SN), own_S

    collator = make_collator(model)
    batches = [batch_of(collator, 0, range(BATCH))]
    Balancer(accelerator, model, collator.tasks, Plain(list(TASKS))).backward(batches, 0)
    plain = gradients(model)
    model.zero_grad()
    Balancer(accelerator, model, collator.tasks, Own(list(TASKS))).backward(batches, 0)
    own = gradients(model)
    weights = dict(zip(TASKS, (1.0, 10.0, 100.0), strict=True))
    seen = set()
    for name, value in own.items():
        task = next((task for task in TASKS if task in name.split(".")), None)
        seen.add((task, "talora_task" in name))
        torch.testing.assert_close(value, weights.get(task, 1.0) * plain[name])
    assert seen == {(None, False), *((task, kind) for task in TASKS for kind in (True, False))}


def test_a_lora_of_one_task_has_its_own_weight(accelerator, sam_folder):
    class Own(Plain):
        def combine(self, losses_S, gradients_SN, labelled_S, step):
            self.numbers = gradients_SN.shape[1]
            return self.weighed_sum(torch.zeros_like(losses_S), gradients_SN), torch.ones_like(losses_S)

    method = METHODS["mtlora"]
    model = method.add(MSamModel.from_pretrained(sam_folder, tasks=TASKS), AdapterArguments(method="mtlora", r=4))
    model, collator, weighting = model.double(), make_collator(model), Own(list(TASKS))
    activate = partial(method.activate, model)
    balancer = Balancer(accelerator, model, collator.tasks, weighting, activate=activate, own_parts=method.own_parts)
    balancer.backward([batch_of(collator, 0, range(BATCH))], 0)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    shared = {n for n in trained if ".shared." in n and ".lora_" in n} | {n for n in trained if ".layer_norm" in n}
    shared = {name for name in shared if "task_heads" not in name}
    assert weighting.numbers == sum(trained[name].numel() for name in shared)
    moved = {name for name, parameter in trained.items() if parameter.grad is not None and parameter.grad.any()}
    assert not moved & shared
    for task in TASKS:
        assert any(f"own_{task}" in name.split(".") and "lora_B" in name for name in moved)
        assert any(f"task_heads.{task}." in name for name in moved)


def test_a_weighting_of_gradients_needs_shared_parameters(accelerator, sam_folder):
    model = METHODS["heads"].add(MSamModel.from_pretrained(sam_folder, tasks=TASKS), AdapterArguments(method="heads"))
    with pytest.raises(ValueError, match="tasks share no parameter that is trained"):
        Balancer(accelerator, model, make_collator(model).tasks, make_weighting("db-mtl", list(TASKS)))


@pytest.mark.parametrize("kind", ["fixed", "uncertainty", "db-mtl", "famo", "pcgrad"])
def test_accumulated_batches_are_one_batch(kind, sam_folder):
    """Though labels are spread unevenly over them, and in the last step nobody has one of the tasks."""
    whole, losses, *_ = train(sam_folder, kind, steps=4)
    parts, losses_of_parts, *_ = train(sam_folder, kind, accumulate=2, steps=4)
    assert_same(parts, whole)
    for one, other in zip(losses_of_parts, losses, strict=True):
        assert list(one) == list(other)
        assert {k: v.item() for k, v in one.items()} == pytest.approx({k: v.item() for k, v in other.items()})
    assert "normals" not in losses[-1]
    assert "normals" in losses[0]


@pytest.fixture(scope="module")
def by_two(sam_folder, tmp_path_factory):
    """The folder of what two processes learnt."""
    folder = tmp_path_factory.mktemp("two")
    cases = Path(__file__).parent / "balancing_cases.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(cases)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, sam_folder, str(folder)], env=environment, check=True, timeout=300)
    return folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_does(kind, dtype, sam_folder, by_two):
    """Twenty steps with partial labels, of the same images."""
    two = load_file(by_two / f"{kind}-{dtype}.safetensors".replace("torch.", ""))
    one = outcome(sam_folder, kind, dtype)
    assert two.keys() == one.keys()
    close = {"parameters": 1e-8, "losses": 1e-6} if dtype is torch.float64 else {"parameters": 1e-5, "losses": 1e-4}
    for name, value in one.items():
        if name == "seconds" or (dtype is torch.float32 and name.endswith("k_proj.bias")):
            continue  # the true gradient of a key's bias is zero: Adam makes whole steps of what rounding leaves
        tolerance = close["losses" if name.startswith(("loss.", "logits.")) else "parameters"]
        torch.testing.assert_close(two[name], value, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_a_task_of_one_s_own_is_weighed_by_its_labelled_pixels(accelerator, model):
    """A loss that takes no counts: parts of a batch have shares of it by their labelled pixels."""
    plain = make_task("depth", 1)
    task = Task(
        "depth",
        "mine",
        1,
        lambda logits, labels: plain.loss(logits, labels),
        plain.metric,
        plain.decode,
        label_dtype=torch.float32,
        ignored_label=0.0,
        find_wrong=plain.find_wrong,
    )
    drawn = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 1, 8, 8, generator=drawn), torch.rand(3, 8, 8, generator=drawn)
    labels[0, 3:] = 0
    for one in (plain, task):
        counts = one.count(labels)
        assert counts.tolist() == [3 * 8 + 2 * 64]
        parts = [one.loss_of_part(logits[k : k + 1], labels[k : k + 1], counts) for k in range(3)]
        torch.testing.assert_close(sum(parts), one.loss(logits, labels))
    assert task.loss_of_part(logits[:1], 0 * labels[:1], counts) == 0


@pytest.mark.parametrize("name", ["segmentation", "edges", "saliency", "parts", "depth", "normals"])
def test_parts_of_a_batch_add_up_to_its_loss(name):
    channels = {"segmentation": 4, "edges": 1, "saliency": 1, "parts": 3, "depth": 1, "normals": 3}[name]
    task = make_task(name, channels)
    drawn = torch.Generator().manual_seed(0)
    logits = torch.randn(3, channels, 8, 8, generator=drawn, dtype=torch.float64)
    if name == "normals":
        labels = torch.nn.functional.normalize(torch.randn(3, 3, 8, 8, generator=drawn), dim=1)
    elif name == "depth":
        labels = torch.rand(3, 8, 8, generator=drawn) + 0.1
    else:
        labels = torch.randint(max(2, channels), (3, 8, 8), generator=drawn)
        labels[1] = labels[1].clamp(max=0)  # of edges: one part has no positives
    labels[0, ..., 2:, :] = task.ignored_label
    labels[2] = task.ignored_label
    counts = task.count(labels)
    parts = [task.loss_of_part(logits[k : k + 1], labels[k : k + 1], counts) for k in range(3)]
    torch.testing.assert_close(sum(parts), task.loss(logits, labels))
    means = sum(task.loss(logits[k : k + 1], labels[k : k + 1]) for k in range(3)) / 3
    assert (sum(parts) - means).abs() > 1e-3
    assert parts[2] == 0
    nothing = torch.zeros_like(counts)
    assert task.loss_of_part(logits[2:], labels[2:], nothing) == 0


@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_every_weighting_trains(kind, sam_folder):
    own, losses, *_ = train(sam_folder, kind, steps=3, dtype=torch.float32)
    assert all(value.isfinite().all() for value in own.values())
    assert len(losses) == 3


@pytest.mark.parametrize("kind", ["fixed", "uncertainty", "gls", "famo", "pcgrad"])
def test_a_step_without_any_label_changes_nothing(kind, accelerator, model):
    collator = make_collator(model)
    batch = batch_of(collator, 0, range(BATCH))
    empty = {task.name: torch.full_like(batch["labels"][task.name], task.ignored_label) for task in collator.tasks}
    weighting = make_weighting(kind, list(TASKS), GIVEN)
    state = copy.deepcopy(weighting.state_dict())
    balancer = Balancer(accelerator, model, collator.tasks, weighting)
    assert balancer.backward([{**batch, "labels": empty}], 0) == {}
    balancer.after([{**batch, "labels": empty}])
    assert all(value.abs().max() == 0 for value in gradients(model).values())
    assert str(weighting.state_dict()) == str(state)


def test_checkpointing_does_not_change_what_pcgrad_gives(accelerator, model):
    collator = make_collator(model)
    batches, found = [batch_of(collator, 0, range(BATCH))], []
    for checkpointed in (False, True):
        if checkpointed:
            engine.enable_activation_checkpointing(model.get_base_model())
            model.train()
        model.zero_grad()
        weighting = make_weighting("pcgrad", list(TASKS), seed=1)
        Balancer(accelerator, model, collator.tasks, weighting).backward(batches, 0)
        found.append(gradients(model))
    assert_same(*found)


def test_what_cannot_be_weighed_is_refused(accelerator, model):
    collator, weighting = make_collator(model), make_weighting("gls", list(TASKS))
    balancer = Balancer(accelerator, model, collator.tasks, weighting)
    with pytest.raises(ValueError, match="`task_order` is 'folded'"):
        replace(balancer, order="folded")
    accelerator.state._mixed_precision = "fp16"
    try:
        with pytest.raises(ValueError, match="'fp16'"):
            replace(balancer)
    finally:
        accelerator.state._mixed_precision = "no"
    replace(balancer, order="folded", weighting=make_weighting("fixed", list(TASKS), GIVEN))


def test_deepspeed_takes_a_step_in_every_backward_pass(accelerator, model, monkeypatch):
    collator, weighting = make_collator(model), make_weighting("fixed", list(TASKS), GIVEN)
    balancer = Balancer(accelerator, model, collator.tasks, weighting)
    monkeypatch.setitem(accelerator.state.__dict__, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match=r"'sequential' and .* 1; with DeepSpeed"):
        replace(balancer)
    replace(balancer, order="folded")
    monkeypatch.setattr(accelerator, "gradient_accumulation_steps", 2)
    with pytest.raises(ValueError, match=r"'folded' and .* 2; with DeepSpeed"):
        replace(balancer, order="folded")
