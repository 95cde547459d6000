"""What more than one recipe needs: the training step, evaluation, checkpoints.

Axes: B images, T tasks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from .data import Collator
from .hub import WEIGHTS_NAME, check_safetensors, write_json
from .tasks import Task

TaskOrder = Literal["folded", "sequential"]
_PROGRESS_NAME = "progress.json"


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
    accelerator: Accelerator, model: nn.Module, batch: Mapping[str, Any], order: TaskOrder
) -> dict[str, torch.Tensor]:
    """Forward and backward of all tasks of a batch: the gradients of the sum of their losses.

    Task by task, each task's backward comes before the next one's forward, so that one task's activations are held at
    a time. Both orders give the same gradients.

    Args:
        accelerator: What `model` was prepared by.
        model: An mSAM, adapted or not.
        batch: As a `Collator` makes it, on the model's device.
        order: `folded` or `sequential`.

    Returns:
        Each task's loss, detached.
    """
    losses = {}
    for group in task_groups(list(batch["labels"]), order):
        output = model(
            pixel_values=batch["pixel_values"],
            tasks=group,
            labels={name: batch["labels"][name] for name in group},
            original_sizes=batch["original_sizes"],
        )
        accelerator.backward(output.loss)
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
    """All metrics of all tasks over a data set, pooled over its pixels, and each task's mean loss per batch.

    Every process takes its share of the images and the counts are added, so each image counts once.

    Args:
        accelerator: Says on which device, and with which other processes.
        model: An mSAM, adapted or not; its mode (training or not) is restored.
        dataset: Of samples as `peft_talora.data` describes them.
        collator: Makes batches; its tasks are the ones evaluated.
        batch_size: Images per pass and process.
        order: `folded` or `sequential`.

    Returns:
        metrics by task and metric, and losses by task.
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


def _count(task: Task, logits: torch.Tensor, labels: torch.Tensor, metric, total: torch.Tensor) -> None:
    metric.update(logits, labels)
    if task.has_label(labels).any():
        total += torch.tensor([task.loss(logits, labels).item(), 1.0], dtype=torch.float64)


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
        total, batches = sums[name].tolist()
        losses[name] = total / batches if batches else float("nan")
    return figures, losses


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


@dataclass
class Progress:
    """How far a training run is: all that a checkpoint holds besides tensors.

    Attributes:
        tasks: The tasks, in order, each as in `MSamConfig.tasks`.
        step: Optimiser steps done.
        epoch: The epoch under way.
        batch: Batches done of that epoch.
        best_loss: Lowest validation loss (sum over the tasks) so far.
        best_step: Its step.
        images: Images trained on.
        seconds: Time spent in training steps.
        before: Test metrics before training.
        history: One entry per evaluation: step, losses and metrics on the validation images.
    """

    tasks: list[dict[str, Any]]
    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_loss: float | None = None
    best_step: int = 0
    images: int = 0
    seconds: float = 0.0
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def save_adapter_only(models: list[nn.Module], weights: list[dict], folder: str) -> None:
    """`Accelerator.save_state` hook: of a `PeftModel`, only what is trained is saved."""
    model = models[0]
    model = model.module if hasattr(model, "module") else model
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0], save_embedding_layers=False)
    save_file({name: value.contiguous() for name, value in state.items()}, Path(folder) / WEIGHTS_NAME)
    weights.clear()


def load_adapter_only(models: list[nn.Module], folder: str) -> None:
    """`Accelerator.load_state` hook, the counterpart of [`save_adapter_only`]."""
    model = models.pop()
    model = model.module if hasattr(model, "module") else model
    file = Path(folder) / WEIGHTS_NAME
    check_safetensors(file)
    set_peft_model_state_dict(model, load_file(file), adapter_name=model.active_adapters[0])


def save_checkpoint(accelerator: Accelerator, folder: Path, progress: Progress, keep: int) -> None:
    """Write `folder/checkpoint-<step>` aside and rename it when it is whole; keep the `keep` newest.

    Accelerate writes optimiser, scheduler, scaler and random states; the model's part is the adapter alone.
    """
    target = folder / f"checkpoint-{progress.step}"
    aside = folder / f".saving-checkpoint-{progress.step}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(aside / _PROGRESS_NAME, asdict(progress))
        _sync(aside)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def find_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The checkpoint to resume from: a path, or `latest` in `output_dir`.

    Raises:
        ValueError: If there is none.
    """
    if wanted == "latest":
        found = list_checkpoints(output_dir)
        if not found:
            raise ValueError(f"`resume_from_checkpoint` is 'latest', but {output_dir} holds no checkpoint-<step>.")
        return found[-1]
    path = Path(wanted)
    if not (path / _PROGRESS_NAME).is_file():
        raise ValueError(f"`resume_from_checkpoint`: {wanted} is no checkpoint; it has no {_PROGRESS_NAME}.")
    return path


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, tasks: list[dict[str, Any]]) -> Progress:
    """Restore a run, after `accelerator.prepare`. Returns how far it was.

    Raises:
        ValueError: If it was trained on other tasks than `tasks`.
        OSError: If its weights are damaged.
    """
    progress = Progress(**json.loads((checkpoint / _PROGRESS_NAME).read_text()))
    if progress.tasks != tasks:
        raise ValueError(
            f"{checkpoint} was trained on the tasks {_describe(progress.tasks)}, this run has {_describe(tasks)}: "
            "resume with the same tasks, or start anew in another `output_dir`."
        )
    accelerator.load_state(str(checkpoint))
    return progress


def _describe(tasks: list[dict[str, Any]]) -> dict[str, int]:
    return {task["name"]: task["channels"] for task in tasks}


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
