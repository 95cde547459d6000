"""What more than one recipe needs: arguments, data sets, the training step, evaluation.

Axes: B images, T tasks, C channels, H W pixels.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers
import yaml
from accelerate import Accelerator
from packaging.version import Version
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import HfArgumentParser, PreTrainedModel

from .data import SYNTHETIC_TASKS, Collator, FolderDataset, SyntheticScenes
from .losses import IGNORE_INDEX
from .metrics import Metric
from .tasks import KINDS, Task

TaskOrder = Literal["folded", "sequential"]
Arguments = TypeVar("Arguments")


@dataclass
class DataArguments:
    """Where a recipe's images and labels come from."""

    data_root: str | None = field(
        default=None, metadata={"help": "Folder with <split>/image and <split>/<task>. None: generated scenes."}
    )
    ignored_class: int = field(
        default=IGNORE_INDEX, metadata={"help": "Class in the files of segmentation and parts that means 'no label'."}
    )
    derive_edges: bool = field(default=False, metadata={"help": "Take edges from the borders of segmentation."})
    num_images: int = field(
        default=512, metadata={"help": "Generated scenes in the split `train`; others have an eighth."}
    )
    data_seed: int = field(default=0, metadata={"help": "Of generated scenes."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Images per evaluation pass and process."})
    num_threads: int | None = field(
        default=None, metadata={"help": "CPU threads per process; the order of sums depends on it. None: all cores."}
    )


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
        argv = [*_as_flags(values), *argv]
    values = vars(parser.parse_args(argv))
    values.pop("config")
    return arguments(**values)


def _as_flags(values: Mapping[str, Any]) -> list[str]:
    """The flags that say what a YAML file says; they are parsed, hence checked, like flags of the command line."""
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


def open_split(args: DataArguments, split: str, tasks: Sequence[Task], image_size: int) -> Dataset:
    """The samples of one split: of a folder, or generated.

    Args:
        args: Where from.
        split: Name of a folder, or of a set of generated scenes; splits share no scene.
        tasks: Whose labels to read.
        image_size: Of generated scenes, in pixels.

    Raises:
        ValueError: If generated scenes have more classes than a task.
    """
    if args.data_root is None:
        for task in tasks:
            if task.out_channels < SYNTHETIC_TASKS.get(task.name, 0):
                raise ValueError(
                    f"task {task.name!r} has {task.out_channels} channels; generated scenes need "
                    f"{SYNTHETIC_TASKS[task.name]}."
                )
        num_images = args.num_images if split == "train" else max(1, args.num_images // 8)
        return SyntheticScenes(split, num_images, image_size, args.data_seed, [task.name for task in tasks])
    folders = {task.name for task in tasks if task.kind in ("segmentation", "parts")}
    edges = [task for task in tasks if task.kind == "edges"]
    if args.derive_edges and not folders and any(not (Path(args.data_root, split, t.name)).is_dir() for t in edges):
        folders = {"segmentation"}
    ignored = {} if args.ignored_class == IGNORE_INDEX else dict.fromkeys(folders, args.ignored_class)
    return FolderDataset(args.data_root, split, tasks, args.derive_edges, ignored)


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


def resolve_task_order(order: str, device: torch.device) -> TaskOrder:
    """`auto` is task by task on a CPU, where it costs the same time and 1/T of the memory, and folded elsewhere.

    Raises:
        ValueError: For another word than `folded`, `sequential` or `auto`.
    """
    if order == "auto":
        return "sequential" if device.type == "cpu" else "folded"
    if order not in ("folded", "sequential"):
        raise ValueError(f"`task_order` must be 'folded', 'sequential' or 'auto'; got {order!r}.")
    return order


def task_groups(task_names: Sequence[str], order: TaskOrder) -> list[list[str]]:
    """The tasks of each pass through the encoder: all at once, or one after another."""
    return [list(task_names)] if order == "folded" else [[name] for name in task_names]


def backward(
    accelerator: Accelerator,
    model: nn.Module,
    batch: Mapping[str, Any],
    order: TaskOrder,
    regularizer: Callable[[], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Forward and backward of all tasks of a batch: the gradients of the sum of their losses.

    Task by task, each task's backward comes before the next one's forward, so that one task's activations are held at
    a time. Both orders give the same gradients.

    Args:
        accelerator: What `model` was prepared by.
        model: An mSAM, adapted or not.
        batch: As a `Collator` makes it, on the model's device.
        order: `folded` or `sequential`.
        regularizer: Gives a scalar that is added to the losses once, whatever the order.

    Returns:
        Each task's loss, detached.
    """
    losses = {}
    groups = task_groups(list(batch["labels"]), order)
    for group in groups:
        output = model(
            pixel_values=batch["pixel_values"],
            tasks=group,
            labels={name: batch["labels"][name] for name in group},
            original_sizes=batch["original_sizes"],
        )
        # With the last loss, in its one backward: several processes average the gradients of each backward once.
        last = regularizer is not None and group is groups[-1]
        accelerator.backward(output.loss + regularizer() if last else output.loss)
        losses |= {name: loss.detach() for name, loss in output.losses.items()}
    return losses


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    batch_size: int,
    order: TaskOrder = "sequential",
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """All metrics and losses of all tasks over a data set, pooled over its labelled pixels.

    Every process takes its share of the images and the counts are added, so each image counts once.

    Args:
        accelerator: Says on which device, and with which other processes.
        model: An mSAM, adapted or not; its mode (training or not) is restored.
        dataset: Of samples as `peft_talora.data` describes them.
        collator: Makes batches; its tasks are the ones evaluated.
        batch_size: Images per pass and process.
        order: `folded` or `sequential`.

    Returns:
        metrics by task and metric, and losses by task, of the tasks that have labels there.
    """
    model = accelerator.unwrap_model(model)
    was_training = model.training
    model.eval()
    with accelerator.split_between_processes(list(range(len(dataset)))) as indices:
        loader = DataLoader(Subset(dataset, indices), batch_size=batch_size, collate_fn=collator)
    metrics = {task.name: task.metric() for task in collator.tasks}
    sums = {task.name: torch.zeros(2, dtype=torch.float64) for task in collator.tasks}
    for batch in loader:
        pixel_values = batch["pixel_values"].to(accelerator.device)
        for group in task_groups([task.name for task in collator.tasks], order):
            with accelerator.autocast():
                output = model(pixel_values=pixel_values, tasks=group)
            logits = model.post_process(output.logits, batch["original_sizes"])
            for task in (task for task in collator.tasks if task.name in group):
                _count(task, logits[task.name].cpu(), batch["labels"][task.name], metrics[task.name], sums[task.name])
    model.train(was_training)
    return _pool(accelerator, metrics, sums)


def _count(task: Task, logits: torch.Tensor, labels: torch.Tensor, metric: Metric, total: torch.Tensor) -> None:
    metric.update(logits, labels)
    labelled = int(task.has_label(labels).sum())
    if labelled:
        total += torch.tensor([labelled * task.loss(logits, labels).item(), labelled], dtype=torch.float64)


def _pool(accelerator: Accelerator, metrics, sums) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    add = partial(accelerator.reduce, reduction="sum")
    figures, losses = {}, {}
    for name, metric in metrics.items():
        if accelerator.num_processes > 1:
            state = {key: add(value.to(accelerator.device)).cpu() for key, value in metric.state.items()}
            metric.reset()
            metric.merge(state)
            sums[name] = add(sums[name].to(accelerator.device)).cpu()
        figures[name] = metric.compute()
        total, labelled = sums[name].tolist()
        if labelled:
            losses[name] = total / labelled
    return figures, losses


@torch.no_grad()
def predict(model: PeftModel, collator: Collator, samples: Sequence[Mapping]) -> list[dict[str, torch.Tensor]]:
    """Each sample's logits (C, H, W) by task, at the size of its image, on the CPU; one image at a time."""
    model.eval()
    logits = []
    for sample in samples:
        batch = collator([sample])
        output = model(pixel_values=batch["pixel_values"].to(model.device))
        resized = model.post_process(output.logits, batch["original_sizes"])
        logits.append({name: value[0].cpu() for name, value in resized.items()})
    return logits


def count_parameters(model: PeftModel) -> dict[str, int]:
    """Trained parameters of the adapter proper, of the heads and of other modules (norms), and all parameters."""
    counts = {"adapter": 0, "heads": 0, "other": 0, "all": 0}
    for name, parameter in model.named_parameters():
        counts["all"] += parameter.numel()
        if not parameter.requires_grad:
            continue
        kind = "adapter"
        if ".modules_to_save." in name:
            kind = "heads" if ".task_heads." in name else "other"
        counts[kind] += parameter.numel()
    return counts
