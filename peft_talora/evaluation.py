"""What a model is worth: its metrics and losses over a data set, and its predictions of single images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from .data import Collator
from .engine import Activate, TaskOrder, keep_active, task_groups
from .metrics import Metric
from .tasks import Task


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    batch_size: int,
    order: TaskOrder = "sequential",
    activate: Activate = keep_active,
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """All metrics and losses of all tasks over a data set.

    Metrics are pooled over its labelled pixels: every process takes its share of the images and the counts are added,
    so each image counts once. Losses are means of those of the batches, by their labelled pixels; that of edges, or of
    saliency of one channel, balances each batch by itself, so it depends on which images make a batch. All processes
    make as many passes, as a model that is split over them demands.

    Args:
        accelerator: Says on which device, and with which other processes.
        model: An mSAM, adapted or not; its mode (training or not) is restored.
        dataset: Of samples as `peft_talora.data` describes them.
        collator: Makes batches; its tasks are the ones evaluated.
        batch_size: Images per pass and process.
        order: `folded` or `sequential`.
        activate: Called with the tasks of each pass before it.

    Returns:
        metrics by task and metric, and losses by task, of the tasks that have labels there.
    """
    model = accelerator.unwrap_model(model)
    was_training = model.training
    model.eval()
    images = list(range(len(dataset)))
    with accelerator.split_between_processes(images) as own:
        left = len(own)
    with accelerator.split_between_processes(images, apply_padding=True) as padded:
        # From the global generator, the loader would draw a number, and shift the dropout of the steps to come.
        drawn = torch.Generator()
        loader = DataLoader(Subset(dataset, padded), batch_size=batch_size, collate_fn=collator, generator=drawn)
    metrics = {task.name: task.metric() for task in collator.tasks}
    sums = {task.name: torch.zeros(2, dtype=torch.float64) for task in collator.tasks}
    for batch in loader:
        pixel_values = batch["pixel_values"].to(accelerator.device)
        for group in task_groups([task.name for task in collator.tasks], order):
            activate(group)
            with accelerator.autocast():
                output = model(pixel_values=pixel_values, tasks=group)
            logits = model.post_process(output.logits, batch["original_sizes"])
            for task in (task for task in collator.tasks if task.name in group and left > 0):
                counted = logits[task.name][:left].cpu(), batch["labels"][task.name][:left]
                _count(task, *counted, metrics[task.name], sums[task.name])
        left -= len(pixel_values)
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
def predict(
    model: PeftModel,
    collator: Collator,
    samples: Sequence[Mapping],
    order: TaskOrder = "folded",
    activate: Activate = keep_active,
) -> list[dict[str, torch.Tensor]]:
    """Each sample's logits (C, H, W) by task, at the size of its image, on the CPU; one image at a time."""
    model.eval()
    predictions = []
    for sample in samples:
        batch, logits = collator([sample]), {}
        for group in task_groups([task.name for task in collator.tasks], order):
            activate(group)
            logits |= model(pixel_values=batch["pixel_values"].to(model.device), tasks=group).logits
        resized = model.post_process(logits, batch["original_sizes"])
        predictions.append({name: value[0].cpu() for name, value in resized.items()})
    return predictions
