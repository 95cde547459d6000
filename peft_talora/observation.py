"""What trackers are told of a training run, through Accelerate, and pictures of predictions on the way.

=======================================  ==============================================================================
``loss/<task>``                          of a step's labelled pixels, of all batches and processes
``weight/<task>``                        of its loss in that step, or of its gradient (see `weighting`)
``cosine/<task>-<task>``                 between the gradients of two tasks' losses of the shared parameters
``learning_rate``                        of the step
``images_per_second``                    since these figures were last told, without validation
``memory_mib``                           the most that was held so far (see `results.peak_mib`)
``validation_loss``                      by which the checkpoint is chosen; ``validation_loss/<task>`` of a task alone
``validation/<task>/<metric>``           metrics, one of which may be called ``loss``
``predictions``                          validation images with labels and predictions
=======================================  ==============================================================================

Observing does not change a run: nothing that it draws or differentiates is left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image

from .balancing import Balancer, Batches
from .checkpoint import Progress
from .files import write_aside
from .results import peak_mib

PROJECT = "train"


@dataclass
class ObservationArguments:
    """What a training run tells of its course."""

    report_to: str | None = field(
        default=None, metadata={"help": "Tracker to tell, by Accelerate's name, such as 'tensorboard'. None: nobody."}
    )
    logging_steps: int = field(default=10, metadata={"help": "Steps between what the tracker is told."})
    cosine_steps: int | None = field(
        default=None,
        metadata={"help": "Steps between cosines of the tasks' gradients, each a backward pass per task."},
    )
    sample_steps: int | None = field(
        default=None, metadata={"help": "Steps between pictures of predictions, in `output_dir`/samples as well."}
    )


def check_observation(args: ObservationArguments) -> None:
    """Raise ValueError for a tracker that is not installed, or numbers of steps that are not positive."""
    available = sorted(str(name) for name in get_available_trackers())
    if args.report_to is not None and args.report_to not in available:
        raise ValueError(f"`report_to` is {args.report_to!r}; installed: {', '.join(available) or 'none'}.")
    for name in ("logging_steps", "cosine_steps", "sample_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}; allowed: 1 or more.")
    if args.cosine_steps is not None and args.report_to is None:
        raise ValueError(f"`cosine_steps` is {args.cosine_steps}, but `report_to` names no tracker to tell.")


@dataclass
class Observer:
    """Tells the accelerator's trackers, and writes pictures of predictions.

    Attributes:
        accelerator: The run's; its trackers are begun by `begin` and ended by `end`.
        args: What is told, and how often.
        balancers: What gives the gradients of the steps, by their tasks.
        every_task: Of all tasks together, whose gradients are compared. None: they are not.
        draw: Makes the picture of predictions; called in all processes, the main one's is kept.
        folder: Where pictures go.

    Raises:
        ValueError: If gradients are to be compared and there are no two tasks that share what is trained.
    """

    accelerator: Accelerator
    args: ObservationArguments
    balancers: Mapping[tuple[str, ...], Balancer]
    every_task: Balancer | None
    draw: Callable[[], Image.Image]
    folder: Path
    _told: tuple[int, float] = (0, 0.0)  # images and seconds when speed was last told

    def __post_init__(self):
        if self.every_task is not None and not self.every_task.shares():
            raise ValueError(f"`cosine_steps` is {self.args.cosine_steps}, but no two tasks share what is trained.")

    def begin(self, config: Mapping[str, Any], progress: Progress) -> None:
        """Begin, or go on after a resumption: what was told of steps after its checkpoint is taken back."""
        self._told = progress.images, progress.seconds
        if self.args.report_to is None:
            return
        kept = {"tensorboard": {"purge_step": progress.step + 1}} if progress.step else {}
        simple = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in config.items()
        }
        self.accelerator.init_trackers(PROJECT, config=simple, init_kwargs=kept)

    def step(self, progress: Progress, losses: Mapping[str, torch.Tensor], batches: Batches, rate: float) -> None:
        """Tell of a step that was taken of some batches, at a learning rate."""
        values: dict[str, float] = {}
        if self.args.report_to is not None and progress.step % self.args.logging_steps == 0:
            values |= {f"loss/{name}": value.item() for name, value in losses.items()}
            values |= {
                f"weight/{name}": float(w) for balancer in self.balancers.values() for name, w in balancer.used.items()
            }
            values["learning_rate"] = rate
            images, seconds = progress.images - self._told[0], progress.seconds - self._told[1]
            values["images_per_second"] = images / seconds
            values["memory_mib"] = peak_mib(self.accelerator.device)
            self._told = progress.images, progress.seconds
        if self.every_task is not None and progress.step % self.args.cosine_steps == 0:
            values |= {f"cosine/{a}-{b}": value for (a, b), value in self.every_task.cosines(batches).items()}
        if values:
            self.accelerator.log(values, step=progress.step)
        if self.args.sample_steps is not None and progress.step % self.args.sample_steps == 0:
            self._show(progress.step)

    def validated(self, step: int, metrics: Mapping[str, Mapping], losses: Mapping[str, float], loss: float) -> None:
        """Tell of a validation."""
        if self.args.report_to is None:
            return
        values = {f"validation/{task}/{name}": value for task, m in metrics.items() for name, value in m.items()}
        values |= {f"validation_loss/{task}": value for task, value in losses.items()}
        self.accelerator.log({**values, "validation_loss": loss}, step=step)

    def end(self) -> None:
        """End the trackers, and not the processes: another run may follow."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _show(self, step: int) -> None:
        picture = self.draw()
        if not self.accelerator.is_main_process:
            return
        with write_aside(self.folder) as aside:
            picture.save(aside / f"step-{step:06d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":  # other trackers take pictures in other forms
                tracker.log_images({"predictions": np.asarray(picture)[None]}, step=step, dataformats="NHWC")
