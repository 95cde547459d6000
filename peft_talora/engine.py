"""What more than one recipe needs: arguments, the order of tasks, the training step.

Axes: B images, T tasks, C channels, H W pixels.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
import transformers
import yaml
from accelerate import Accelerator
from packaging.version import Version
from torch import nn
from transformers import HfArgumentParser, PreTrainedModel

from .data import SYNTHETIC_TASKS
from .msam_config import task_entries
from .sources import DataArguments
from .tasks import KINDS, Task, default_weight

TaskOrder = Literal["folded", "sequential"]
Updates = Literal["joint", "alternating"]
Activate = Callable[[Sequence[str]], None]
Arguments = TypeVar("Arguments")
Item = TypeVar("Item")


def parse_arguments(
    arguments: type[Arguments], argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> Arguments:
    """A recipe's arguments, from flags and from the YAML file that `--config` names; flags win.

    Args:
        arguments: A dataclass.
        argv: Flags; None takes the command line's.
        defaults: What replaces the dataclass's own defaults.

    Raises:
        ValueError: For a key in the file that the recipe does not know.
    """
    parser = HfArgumentParser(arguments)
    parser.add_argument("--config", help="YAML file of arguments; flags win.")
    parser.set_defaults(**(defaults or {}))
    argv = list(sys.argv[1:] if argv is None else argv)
    file = parser.parse_known_args(argv)[0].config
    if file is not None:
        with open(file) as handle:
            values = yaml.safe_load(handle) or {}
        known = {field.name for field in fields(arguments)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{file} has the unknown arguments {unknown}; `--help` lists the known ones.")
        argv = [*as_flags(values), *argv]
    values = vars(parser.parse_args(argv))
    values.pop("config")
    return arguments(**values)


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """The flags that say what arguments by name say; what is None is left out."""
    flags = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def parse_task(text: str, known: Mapping[str, int]) -> dict[str, Any]:
    """Parse a task as flags give it: `name=channels`, `name=kind:channels`, or `name` alone where it is known.

    Args:
        text: The flag's word.
        known: Channels by name.

    Returns:
        An entry of `MSamConfig.tasks`.

    Raises:
        ValueError: For anything else.
    """
    name, _, rest = text.partition("=")
    kind, _, channels = rest.rpartition(":")
    channels = channels or str(known.get(name, ""))
    if not channels.isdigit():
        raise ValueError(f"task {text!r}: write name=channels or name=kind:channels, for example segmentation=13.")
    kind = kind or name
    if kind not in KINDS:
        raise ValueError(
            f"task {text!r}: {kind!r} is none of the kinds {', '.join(KINDS)}; for a name of your own write "
            f"name=kind:channels, for example {name}=segmentation:{channels}."
        )
    return {"name": name, "kind": kind, "channels": int(channels)}


def parse_tasks(args: DataArguments, texts: Sequence[str]) -> list[dict[str, Any]]:
    """All tasks of a run as [`parse_task`] parses one; generated scenes know their channels.

    Raises:
        ValueError: As `parse_task` does, and for a name that occurs twice.
    """
    return task_entries([parse_task(text, {} if args.data_root else SYNTHETIC_TASKS) for text in texts])


def parse_weights(texts: Sequence[str], tasks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The weight of every task's loss: as given, else `default_weight` of its kind.

    Args:
        texts: `name=weight`, each of a task.
        tasks: Entries as [`parse_tasks`] gives them.

    Raises:
        ValueError: For an unknown task, or a weight that is no positive number.
    """
    weights = {task["name"]: default_weight(task["kind"]) for task in tasks}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in weights:
            raise ValueError(f"`loss_weights` has {text!r}; write name=weight, with a name of {', '.join(weights)}.")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise ValueError(f"`loss_weights` has {text!r}; a weight is a positive number.")
    return weights


def set_threads(args: DataArguments, accelerator: Accelerator) -> None:
    """Give every process its share of the machine's cores, or what `args.num_threads` says, and note it there.

    `accelerate launch` starts processes with one thread, which leaves the other cores idle where there is no GPU.
    """
    if args.num_threads is None:
        args.num_threads = max(1, (os.cpu_count() or 1) // accelerator.num_processes)
    torch.set_num_threads(args.num_threads)


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the model's blocks in backward, by the name that the installed transformers has for it."""
    if Version(transformers.__version__) >= Version("5.23"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def resolve_task_order(order: str, device: torch.device, task_conditional: bool = True) -> TaskOrder:
    """`auto` is task by task on a CPU, where it costs the same time and 1/T of the memory, and folded elsewhere.

    Where the encoder's output does not depend on the task (`task_conditional` of the mSAM is False), it is folded: one
    pass serves all heads.

    Raises:
        ValueError: For another word than `folded`, `sequential` or `auto`.
    """
    if order == "auto":
        return "sequential" if task_conditional and device.type == "cpu" else "folded"
    if order not in ("folded", "sequential"):
        raise ValueError(f"`task_order` must be 'folded', 'sequential' or 'auto'; got {order!r}.")
    return order


def task_groups(task_names: Sequence[str], order: TaskOrder) -> list[list[str]]:
    """The tasks of each pass through the encoder: all at once, or one after another."""
    return [list(task_names)] if order == "folded" else [[name] for name in task_names]


def update_groups(task_names: Iterable[str], updates: Updates, step: int) -> list[list[str]]:
    """The tasks of each optimiser step that a batch gives.

    AdamW's steps have one size: where the gradients of the tasks are orthogonal and equally large, a step of the sum
    of all losses takes each task 1/sqrt(T) as far as a step of its own. With a step per task, every task takes as many
    as if it were trained alone. Another task begins each time, so that none is always the last.

    Args:
        task_names: All tasks.
        updates: `joint`, one step of the weighted sum of all losses, or `alternating`, one per task.
        step: Batches that were trained on before.
    """
    names = list(task_names)
    if updates == "joint":
        return [names]
    first = step % len(names)
    return [[name] for name in (*names[first:], *names[:first])]


def whole_chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items each; what is left over is left out."""
    iterator = iter(items)
    while len(chunk := list(islice(iterator, size))) == size:
        yield chunk


def keep_active(*_: Any) -> None:
    """Nothing needs to be switched before an encoder pass: the model itself knows its tasks."""


def own_name(task: str) -> tuple[str, ...]:
    """What in the names of parameters says that they are of a task alone: its name."""
    return (task,)


def widest_float(device: torch.device) -> torch.dtype:
    """What sums over pixels and processes are taken in on a device; MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def count_labels(
    accelerator: Accelerator, tasks: Sequence[Task], batches: Sequence[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """The labelled pixels (K,) of a step by task, as `Task.count`: of all its batches and of all processes."""
    device = accelerator.device
    own = {
        task.name: sum(task.count(batch["labels"][task.name].to(device)) for batch in batches).to(widest_float(device))
        for task in tasks
    }
    if accelerator.num_processes == 1:
        return own
    # In one tensor: a process waits for the others once.
    whole = accelerator.reduce(torch.cat(list(own.values())), "sum")
    return dict(zip(own, whole.split([len(counts) for counts in own.values()]), strict=True))


def counts_of_part(accelerator: Accelerator, counts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The counts by which each batch's losses become parts of the step's; None where the step is one batch.

    Gradients are averaged over the processes, and Accelerate divides every loss by the number of accumulated batches:
    the counts are smaller by both, so that what comes out is the sum of the parts.
    """
    parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
    return None if parts == 1 else {name: value / parts for name, value in counts.items()}


def losses_of(
    accelerator: Accelerator,
    model: nn.Module,
    batch: Mapping[str, Any],
    group: Sequence[str],
    activate: Activate = keep_active,
    pixel_counts: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The losses of the tasks of one pass through the encoder; the arguments are those of [`backward`]."""
    activate(group)
    with accelerator.autocast():
        output = model(
            pixel_values=batch["pixel_values"],
            tasks=group,
            labels={name: batch["labels"][name] for name in group},
            pixel_counts=pixel_counts,
            original_sizes=batch["original_sizes"],
        )
    return output.losses


def fork_random(device: torch.device) -> AbstractContextManager:
    """Inside, random numbers are drawn as ever; after it, as if none had been. Those of MPS alone are drawn on."""
    if device.type in ("cpu", "mps"):
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def backward(
    accelerator: Accelerator,
    model: nn.Module,
    batch: Mapping[str, Any],
    order: TaskOrder,
    weights: Mapping[str, float],
    regularizer: Callable[[], torch.Tensor] | None = None,
    activate: Activate = keep_active,
    pixel_counts: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Forward and backward of all tasks of a batch: the gradients of the weighted sum of their losses.

    Task by task, each task's backward comes before the next one's forward, so that one task's activations are held at
    a time. Both orders give the same gradients.

    Args:
        accelerator: What `model` was prepared by.
        model: An mSAM, adapted or not.
        batch: As a `Collator` makes it, on the model's device.
        order: `folded` or `sequential`.
        weights: Of the losses, by task.
        regularizer: Gives a scalar that is added to the losses once, whatever the order.
        activate: Called with the tasks of each pass before it.
        pixel_counts: As `counts_of_part` gives them.

    Returns:
        Each task's loss, detached, without its weight.
    """
    losses = {}
    groups = task_groups(list(batch["labels"]), order)
    for group in groups:
        found = losses_of(accelerator, model, batch, group, activate, pixel_counts)
        # With the last loss, in its one backward: several processes average the gradients of each backward once.
        last = regularizer is not None and group is groups[-1]
        loss = sum(weights[name] * loss for name, loss in found.items())
        accelerator.backward(loss + regularizer() if last else loss)
        losses |= {name: loss.detach() for name, loss in found.items()}
    return losses
