"""A training step in which the tasks are weighed against each other: see `weighting`.

Axes: T tasks of which S have labels in this step, N shared parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from .engine import (
    Activate,
    TaskOrder,
    backward,
    count_labels,
    counts_of_part,
    fork_random,
    keep_active,
    losses_of,
    own_name,
    task_groups,
    widest_float,
)
from .sharding import refuse_split
from .tasks import Task
from .weighting import FAMO, GradientWeighting, Weighting

Batches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Balancer:
    """Gives a model the gradients of a step, with its tasks weighed.

    Attributes:
        accelerator: What `model` was prepared by.
        model: An mSAM, adapted or not.
        tasks: Those that are trained.
        weighting: Of these tasks.
        order: Of their passes; one after another where the weighting takes the gradients of each apart.
        activate: Called with the tasks of each pass before it.
        regularizer: Gives a scalar that is added to the losses, unweighed.
        own_parts: Task → the parts of the names of parameters, between their dots, that say they are its own.
        used: The weights of the last step by task, of those that had labels; where gradients are weighed, those of
            the shared parameters. They may be on the device: nobody waits for it unless they are looked at.

    Raises:
        ValueError: If the weighting does not go with the order, the precision or the way of several processes.
    """

    accelerator: Accelerator
    model: nn.Module
    tasks: Sequence[Task]
    weighting: Weighting
    order: TaskOrder = "sequential"
    activate: Activate = keep_active
    regularizer: Callable[[], Tensor] | None = None
    own_parts: Callable[[str], Collection[str]] = own_name
    named: dict[str, nn.Parameter] = field(init=False)
    used: dict[str, float | Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "named", {n: p for n, p in self.model.named_parameters() if p.requires_grad})
        kind, accumulated = self.accelerator.distributed_type, self.accelerator.gradient_accumulation_steps
        if kind is DistributedType.DEEPSPEED and (self.order != "folded" or accumulated > 1):
            raise ValueError(
                f"`task_order` is {self.order!r} and `gradient_accumulation_steps` {accumulated}; with DeepSpeed, "
                "which takes a step in every backward pass, allowed: 'folded' and 1."
            )
        if self.regularizer is not None and kind is DistributedType.FSDP:
            refuse_split(self.accelerator, "a regulariser")
        if not isinstance(self.weighting, GradientWeighting):
            return
        if not self._parted()[1]:
            raise ValueError("tasks share no parameter that is trained: there are no gradients to weigh.")
        if self.order != "sequential":
            raise ValueError(
                f"`task_order` is {self.order!r}; a weighting that needs each task's gradients allows: 'sequential'."
            )
        if self.accelerator.mixed_precision == "fp16":
            raise ValueError(
                "mixed precision is 'fp16', whose gradients are scaled; a weighting that needs gradients allows: "
                "'no', 'bf16'."
            )
        refuse_split(self.accelerator, "a weighting that needs gradients")

    def backward(self, batches: Batches, step: int, epoch: int = 0) -> dict[str, Tensor]:
        """The gradients of a step, where there were none.

        Args:
            batches: As a `Collator` makes them; those that are accumulated.
            step: Number of the step.
            epoch: The one under way.

        Returns:
            Each task's loss of the whole step, of all batches and processes; tasks without any label are left out.
        """
        batches = self._own_labels(batches)
        counts = count_labels(self.accelerator, self.tasks, batches)
        labelled_S = self._labelled(counts)
        parts = counts_of_part(self.accelerator, counts)
        if isinstance(self.weighting, GradientWeighting):
            losses_T = self._weigh_gradients(batches, parts, labelled_S, step)
        else:
            losses_T = self._weigh_losses(batches, parts, step, epoch)
        if len(labelled_S):
            self.weighting.note(losses_T[labelled_S], labelled_S, epoch)
        return {self.tasks[index].name: losses_T[index] for index in labelled_S.tolist()}

    def after(self, batches: Batches) -> None:
        """Show the weighting what the optimiser's step did to the losses of its images, where it asks for that."""
        if not isinstance(self.weighting, FAMO):
            return
        batches = self._own_labels(batches)
        counts = count_labels(self.accelerator, self.tasks, batches)
        parts = counts_of_part(self.accelerator, counts)
        labelled_S = self._labelled(counts)
        if not len(labelled_S):
            return
        with torch.no_grad():
            sums = [self._losses(batch, parts) for batch in batches]
        self.weighting.note_after(self._whole(sums)[labelled_S], labelled_S)

    def cosines(self, batches: Batches) -> dict[tuple[str, str], float]:
        """The cosine between the gradients of every two tasks that have labels, of the parameters that are shared.

        No parameter is given a gradient; random numbers are drawn as if this had not been called.
        """
        batches = self._own_labels(batches)
        counts = count_labels(self.accelerator, self.tasks, batches)
        labelled = self._labelled(counts).tolist()
        parts, shared = counts_of_part(self.accelerator, counts), self._parted()[1]
        with fork_random(self.accelerator.device):
            rows = [sum(self._gradient(task.name, batch, parts, shared) for batch in batches) for task in self.tasks]
        unit_TN = nn.functional.normalize(self._average(torch.stack(rows)).to(widest_float(rows[0].device)), dim=1)
        cosine_TT = (unit_TN @ unit_TN.T).tolist()
        return {
            (self.tasks[a].name, self.tasks[b].name): cosine_TT[a][b]
            for place, a in enumerate(labelled)
            for b in labelled[place + 1 :]
        }

    def _gradient(self, task: str, batch: Mapping[str, Any], parts, shared: Sequence[nn.Parameter]) -> Tensor:
        """This process's gradient (N,) of a task's loss.

        It is taken past data parallelism, which notes what any backward pass uses, `no_sync` or not, and waits in the
        next one for the gradients of all that.
        """
        model, scaler = self.accelerator.unwrap_model(self.model), self.accelerator.scaler
        loss = losses_of(self.accelerator, model, batch, [task], self.activate, parts)[task]
        if scaler is not None:
            loss = loss * scaler.get_scale()  # in float16 small gradients would vanish; the angles stay
        gradients = torch.autograd.grad(loss, shared, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def _note_used(self, weights: Mapping[str, float | Tensor]) -> None:
        self.used.clear()
        self.used.update(weights)

    def shares(self) -> bool:
        """Whether there is anything to compare gradients of: several tasks, and parameters that they share."""
        return len(self.tasks) > 1 and bool(self._parted()[1])

    def _parted(self) -> tuple[dict[str, list[str]], list[nn.Parameter]]:
        """The names of each task's own parameters, and the parameters that are shared."""
        own = {task.name: _own(self.named, self.own_parts(task.name)) for task in self.tasks}
        alone = {name for names in own.values() for name in names}
        return own, [parameter for name, parameter in self.named.items() if name not in alone]

    def _gradients(self, shared: Sequence[nn.Parameter], batches: Batches, parts) -> tuple[Tensor, Tensor]:
        """Each task's gradient of the shared parameters (T, N), and its loss (T,), of the whole step.

        Shared parameters are left without gradients, each task's own with those of this process.
        """
        rows, losses = [], [{} for _ in batches]
        for task in self.tasks:
            for batch, found in zip(batches, losses, strict=True):
                part = {**batch, "labels": {task.name: batch["labels"][task.name]}}
                with self.accelerator.no_sync(self.model):
                    found |= backward(
                        self.accelerator, self.model, part, "sequential", {task.name: 1.0}, None, self.activate, parts
                    )
            rows.append(_taken(shared))
        return self._average(torch.stack(rows)), self._whole(losses)

    def _labelled(self, counts: Mapping[str, Tensor]) -> Tensor:
        """Positions (S,) of the tasks that have labels in a step."""
        return torch.tensor([bool(counts[task.name].sum() > 0) for task in self.tasks]).nonzero()[:, 0]

    def _own_labels(self, batches: Batches) -> list[dict[str, Any]]:
        names = [task.name for task in self.tasks]
        return [{**batch, "labels": {name: batch["labels"][name] for name in names}} for batch in batches]

    def _weigh_losses(self, batches: Batches, parts, step: int, epoch: int) -> Tensor:
        values = self.weighting.weights(step, epoch).tolist()
        weights = dict(zip((task.name for task in self.tasks), values, strict=True))
        self._note_used(weights)
        losses = []
        for batch in batches:
            # Several processes average their gradients once, with those of the last batch.
            with self.accelerator.no_sync(self.model) if batch is not batches[-1] else nullcontext():
                losses.append(
                    backward(
                        self.accelerator,
                        self.model,
                        batch,
                        self.order,
                        weights,
                        self.regularizer,
                        self.activate,
                        parts,
                    )
                )
        return self._whole(losses)

    def _weigh_gradients(self, batches: Batches, parts, labelled_S: Tensor, step: int) -> Tensor:
        own, shared = self._parted()
        gradients_TN, losses_T = self._gradients(shared, batches, parts)
        gradient_N, w_S = gradients_TN.new_zeros(gradients_TN.shape[1]), losses_T[labelled_S]
        if len(labelled_S):
            gradients_SN = gradients_TN[labelled_S.to(gradients_TN.device)]
            gradient_N, w_S = self.weighting.combine(losses_T[labelled_S], gradients_SN, labelled_S, step)
            names = [self.tasks[index].name for index in labelled_S.tolist()]
            self._note_used(dict(zip(names, self.weighting.latest_S, strict=True)))
        _give(shared, gradient_N)
        for index, weight in zip(labelled_S.tolist(), w_S.tolist(), strict=True):
            for name in own[self.tasks[index].name]:
                parameter = self.named[name]
                if parameter.grad is not None:
                    parameter.grad = weight * self._average(parameter.grad)
        if self.regularizer is not None:
            # Every process has the same one, of parameters alone: there is nothing to average.
            with self.accelerator.no_sync(self.model):
                scale = self.accelerator.gradient_accumulation_steps
                self.accelerator.backward(scale * self.regularizer())
        return losses_T

    def _losses(self, batch: Mapping[str, Any], parts) -> dict[str, Tensor]:
        losses = {}
        for group in task_groups([task.name for task in self.tasks], self.order):
            losses |= losses_of(self.accelerator, self.model, batch, group, self.activate, parts)
        return losses

    def _whole(self, losses: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The losses (T,) of the step from those of its batches, float64 on the CPU."""
        steps = self.accelerator.gradient_accumulation_steps
        wide = widest_float(self.accelerator.device)
        sums_T = torch.stack(
            [sum(found[task.name].detach().to(wide) for found in losses) / steps for task in self.tasks]
        )
        return self._average(sums_T).cpu().double()

    def _average(self, values: Tensor) -> Tensor:
        return values if self.accelerator.num_processes == 1 else self.accelerator.reduce(values, "mean")


def _own(named: Mapping[str, nn.Parameter], parts: Collection[str]) -> list[str]:
    """Names of the parameters that belong to a task alone: its head, its row of the task factor, its adapter."""
    return [name for name in named if not {*parts}.isdisjoint(name.split("."))]


def _taken(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradients as one row (N,), zeros where there is none; the parameters are left without."""
    row = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat(row)


def _give(parameters: Sequence[nn.Parameter], gradient_N: Tensor) -> None:
    """Give parameters their parts of a row."""
    for parameter, part in zip(
        parameters, gradient_N.split([parameter.numel() for parameter in parameters]), strict=True
    ):
        parameter.grad = part.view_as(parameter).clone()
