"""The figures of a training run: what it trained, what a step took, and how those of several runs become one."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Collection, Mapping
from typing import Any

import accelerate
import peft
import torch
import transformers
from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from .checkpoint import Progress
from .version import __version__

WARM_UP = 3
KEPT_STEPS = 1000
_RESIDENT = ("cpu", "mps")  # devices whose tensors are in the memory of the process
# In the figures of several runs each of these is a mapping from the task.
_BY_TASK = ("best_step", "history")
_SAME = ("images", "seed", "task_order", "device", "mixed_precision", "processes", "versions")


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Trained parameters by what they belong to, and all that the model uses.

    Returns:
        `adapter`: the low-rank updates; `encoder`: the encoder, where it is trained as a whole; `heads`; `other`:
        other modules trained in full, such as norms; `all`: these and the frozen ones, without the originals that PEFT
        keeps of modules trained in full.
    """
    counts = {"adapter": 0, "encoder": 0, "heads": 0, "other": 0, "all": 0}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        counts["all"] += parameter.numel()
        if not parameter.requires_grad:
            continue
        module, saved, _ = name.partition(".modules_to_save.")
        kind = "adapter"
        if saved:
            kind = "heads" if ".task_heads." in module else "other"
            kind = "encoder" if module.endswith("vision_encoder") else kind
        counts[kind] += parameter.numel()
    return counts


def seconds_since(begun: float, device: torch.device) -> float:
    """Seconds since `time.perf_counter()` was `begun`, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begun


def note_step(progress: Progress, seconds: float) -> None:
    """Keep the time of an optimiser step; the oldest are forgotten."""
    progress.step_seconds = [*progress.step_seconds, seconds][-KEPT_STEPS:]


def forget_peak(device: torch.device) -> None:
    """Let `peak_mib` be that of a new run; the resident set of a process cannot forget."""
    if device.type not in _RESIDENT:
        torch.accelerator.reset_peak_memory_stats(device)


def peak_mib(device: torch.device) -> float:
    """Most memory that this process held so far, in MiB: an accelerator's tensors, else its resident set."""
    if device.type not in _RESIDENT:
        return torch.accelerator.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def of_run(accelerator: Accelerator, model: PeftModel, progress: Progress) -> dict[str, Any]:
    """What `results.json` says of the course of a finished run, beside test metrics, data and arguments.

    Args:
        accelerator: The run's.
        model: What was trained.
        progress: The finished run's.
    """
    best = next(entry for entry in progress.history if entry["step"] == progress.best_step)
    return {
        "validation": {name: best[name] for name in ("metrics", "losses", "loss")},
        "parameters": count_parameters(model),
        "images_per_second": progress.images / progress.seconds,
        "step_seconds": statistics.median(progress.step_seconds[WARM_UP:] or progress.step_seconds),
        "peak_mib": peak_mib(accelerator.device),
        "best_step": progress.best_step,
        "history": progress.history,
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "versions": {
            "peft_talora": __version__,
            **{module.__name__: module.__version__ for module in (torch, transformers, peft, accelerate)},
        },
    }


def restrict(results: Mapping[str, Any], tasks: Collection[str]) -> dict[str, Any]:
    """The results of an adapter of these tasks alone: their test metrics, on the same images.

    All else stays that of the run, which trained all of its tasks together: parameters, validation, time and memory.
    """
    only = {
        moment: {name: metrics for name, metrics in results[moment].items() if name in tasks}
        for moment in ("before", "after")
    }
    return {**results, **only, "arguments": {**results["arguments"], "allow_unlabelled": True}}


def combine(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a run per task as those of one that trains all of them.

    Metrics and losses are put together. The loss of all tasks, parameters and the time of a step are sums (a step is
    then one of every run), peak memory is the largest. The rest is the same in all runs, or is given by task.
    """
    first = next(iter(runs.values()))
    together = {moment: _merged(run[moment] for run in runs.values()) for moment in ("before", "after")}
    validation = {part: _merged(run["validation"][part] for run in runs.values()) for part in ("metrics", "losses")}
    validation["loss"] = sum(run["validation"]["loss"] for run in runs.values())
    parameters = {kind: sum(run["parameters"][kind] for run in runs.values()) for kind in first["parameters"]}
    return {
        **together,
        "validation": validation,
        "parameters": parameters,
        "images_per_second": 1 / sum(1 / run["images_per_second"] for run in runs.values()),
        "step_seconds": sum(run["step_seconds"] for run in runs.values()),
        "peak_mib": max(run["peak_mib"] for run in runs.values()),
        **{name: {task: run[name] for task, run in runs.items()} for name in _BY_TASK},
        **{name: first[name] for name in _SAME},
    }


def _merged(mappings) -> dict[str, Any]:
    return {key: value for mapping in mappings for key, value in mapping.items()}
