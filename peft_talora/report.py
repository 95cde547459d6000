"""What a training run tells its user: `results.json`, a picture of predictions, lines of text."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from .data import Collator
from .evaluation import predict
from .files import finite, write_aside, write_json
from .hub import load, load_image_processor, results_table
from .plotting import draw_predictions
from .results import combine
from .sources import DataArguments, open_split
from .tasks import Task


def headline(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Each task's first metric, in a line."""
    return ", ".join(
        f"{task} {name} {value:.4f}" for task, m in metrics.items() for name, value in list(m.items())[:1]
    )


def table(results: Mapping[str, Any]) -> str:
    """The metrics before and after, one per line."""
    rows = [("task", "metric", "before", "after"), *results_table(results)]
    return "\n".join(f"{task:<14}{name:<18}{before:>10}{after:>10}" for task, name, before, after in rows)


def examples(dataset: Dataset) -> list[dict]:
    """Up to six samples, from all over a data set."""
    last, rows = len(dataset) - 1, min(6, len(dataset))
    return [dataset[round(row * last / max(1, rows - 1))] for row in range(rows)]


def write_report(
    folder: Path,
    results: Mapping[str, Any],
    tasks: Sequence[Task],
    samples: Sequence[Mapping],
    logits: Sequence[Mapping[str, torch.Tensor]],
) -> None:
    """Write `results.json`, and as `predictions.png` the samples with their labels and logits of the tasks."""
    with write_aside(folder) as aside:
        draw_predictions(tasks, samples, logits).save(aside / "predictions.png")
        save_results(aside / "results.json", results)


def save_results(file: Path, results: Mapping[str, Any]) -> None:
    """Write results as `evaluate.save` does: with time, commit, and versions of `evaluate` and Python.

    The path of the interpreter is left out: results are uploaded.
    """
    import evaluate  # takes seconds, and asks git, which there may not be

    content = finite(results)
    if shutil.which("git"):
        with _quiet_children():
            evaluate.save(file, **content)
        content = json.loads(file.read_text())
        del content["_interpreter_path"]
    write_json(file, content)


@contextmanager
def _quiet_children() -> Iterator[None]:
    """Outside a repository, git would say so on the terminal, as if something were wrong."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def write_combined_report(
    folder: Path, parts: Mapping[str, Path], args: DataArguments, split: str, own: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the figures of a run per task, each in its own folder, as those of one, and a picture of all tasks.

    Args:
        folder: Where to.
        parts: The folders of the runs by task.
        args: Where the images come from.
        split: Whose are shown.
        own: What the results say of themselves: method and arguments.

    Returns:
        The results.
    """
    results = combine({task: json.loads((part / "results.json").read_text()) for task, part in parts.items()})
    results = {**own, **results}
    args = replace(args, allow_unlabelled=True)
    tasks, samples, logits = [], [], []
    for part in parts.values():
        model = load(part)
        base = model.get_base_model()
        served = [base.task(name) for name in base.task_names]
        shown = examples(open_split(args, split, served, base.config.vision_config.image_size))
        predicted = predict(model, Collator(served, load_image_processor(part)), shown)
        tasks += served
        samples = samples or [{**sample, "labels": {}} for sample in shown]
        logits = logits or [{} for _ in shown]
        for row, sample in enumerate(shown):
            samples[row]["labels"] |= sample["labels"]
            logits[row] |= predicted[row]
    write_report(folder, results, tasks, samples, logits)
    return results
