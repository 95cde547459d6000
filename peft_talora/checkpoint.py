"""Checkpoints of a training run: written aside and renamed when whole, so that a kill at any moment leaves none half.

A checkpoint's `manifest.json`, written last, has the SHA-256 of all its other files; they are compared before any of
them is loaded.

Accelerate writes optimiser, scheduler, scaler and random states, and reads them without unpickling objects
(`weights_only`); the model's part are its adapters alone, as safetensors.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import extract_model_from_parallel, set_seed
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .files import check_safetensors, digest, sync, sync_one, write_aside, write_json
from .hub import WEIGHTS_NAME
from .sharding import taking_whole, whole_state

MANIFEST_NAME = "manifest.json"
PROGRESS_NAME = "progress.json"
BEST_NAME = "best.safetensors"
LEARNT_NAME = "learnt.pt"
FREE_ARGUMENTS = frozenset(
    {"output_dir", "data_root", "mix", "save_steps", "save_total_limit", "resume_from_checkpoint", "push_to_hub"}
    | {
        "num_threads",
        "dataloader_num_workers",
        "measure_before",
        "allow_reshard",
        "auto_find_batch_size",
    }
    | {"report_to", "logging_steps", "cosine_steps", "sample_steps"}
)
"""Arguments of train.py that do not decide a run's course: where it reads and writes, how often it saves and reports,
on how many cores."""
SHARES = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps")
"""Arguments whose product is the images of a step: how a step is shared out does not decide which they are."""


class Stateful(Protocol):
    """What is saved with a checkpoint beside what Accelerate knows."""

    def state_dict(self) -> dict[str, Any]:
        """What it has learnt."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""


@dataclass
class Progress:
    """How far a training run is: all that a checkpoint holds besides tensors.

    Attributes:
        tasks: The tasks, in order, each as in `MSamConfig.tasks`.
        arguments: What else decides the run's course; a resumed run must have the same.
        step: Steps done, each of one batch or of several accumulated ones; with alternating updates, one per task.
        epoch: The epoch under way.
        batch: Batches done of that epoch.
        best_loss: Lowest validation loss (weighted sum over the tasks) so far.
        best_step: Its step.
        images: Images trained on.
        seconds: Time spent in training steps.
        step_seconds: Of the latest steps each one's own time, without loading data, validating and saving.
        before: Test metrics before training.
        history: One entry per evaluation: step, losses and metrics on the validation images.
        origin: What the run began on: hardware and versions of libraries, where a recipe reports them.
    """

    tasks: list[dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_loss: float | None = None
    best_step: int = 0
    images: int = 0
    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)

    def note_validation(self, metrics: dict[str, dict[str, float]], losses: dict[str, float], loss: float) -> bool:
        """Add the figures of the validation images to the history; whether `loss`, of all tasks, is the lowest yet."""
        self.history.append({"step": self.step, "loss": loss, "losses": losses, "metrics": metrics})
        if self.best_loss is not None and loss >= self.best_loss:
            return False
        self.best_loss, self.best_step = loss, self.step
        return True


def save_adapter_only(models: list[nn.Module], weights: list[dict], folder: str) -> None:
    """`Accelerator.save_state` hook: of a `PeftModel`, its adapters are saved and no more, once for all processes.

    Beside them Accelerate writes all of a model that FSDP splits.
    """
    weights.clear()
    model = extract_model_from_parallel(models[0])
    whole = whole_state(model)
    if PartialState().is_main_process:
        _save_adapters(model, whole, Path(folder))


def load_adapter_only(models: list[nn.Module], folder: str) -> None:
    """`Accelerator.load_state` hook, the counterpart of [`save_adapter_only`]."""
    if models:  # none where FSDP splits it: Accelerate has loaded it
        _load_adapters(extract_model_from_parallel(models.pop()), Path(folder))


def _save_adapters(model: PeftModel, whole: dict[str, Tensor], folder: Path) -> None:
    state = {}
    for adapter, prefix in _prefixes(model).items():
        own = get_peft_model_state_dict(model, whole, adapter_name=adapter, save_embedding_layers=False)
        state |= {prefix + name: value.contiguous() for name, value in own.items()}
    save_file(state, folder / WEIGHTS_NAME)


def _load_adapters(model: PeftModel, folder: Path) -> None:
    file = folder / WEIGHTS_NAME
    check_safetensors(file)
    state = load_file(file)
    with taking_whole(model):
        for adapter, prefix in _prefixes(model).items():
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            set_peft_model_state_dict(model, own, adapter_name=adapter)


def _prefixes(model: PeftModel) -> dict[str, str]:
    """What the names of each adapter's tensors begin with: a single one's are those of its own folder."""
    names = list(model.peft_config)
    return {names[0]: ""} if len(names) == 1 else {name: f"{name}/" for name in names}


def save_best(accelerator: Accelerator, model: nn.Module, folder: Path) -> None:
    """Keep the adapter as the best so far, in `folder/best`; called in all processes."""
    model = accelerator.unwrap_model(model)
    whole = whole_state(model)
    if accelerator.is_main_process:
        with write_aside(folder / "best") as aside:
            _save_adapters(model, whole, aside)


def load_best(accelerator: Accelerator, model: nn.Module, folder: Path) -> None:
    """Put the best adapter so far into the model, in every process."""
    accelerator.wait_for_everyone()
    _load_adapters(accelerator.unwrap_model(model), folder / "best")


def save_checkpoint(
    accelerator: Accelerator, folder: Path, progress: Progress, keep: int, learnt: Sequence[Stateful] = ()
) -> None:
    """Write `folder/checkpoint-<step>` aside and rename it when it is whole; keep the `keep` newest.

    The best adapter so far goes along. Checkpoints of later steps are removed as well: they are of a run that was
    given up for this one.

    Args:
        accelerator: What model, optimiser and scheduler were prepared by.
        folder: The run's output folder.
        progress: How far it is.
        keep: How many checkpoints stay.
        learnt: What else has a state, of tensors, numbers and containers; the same in all processes.

    Raises:
        ValueError: If `keep` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"`save_total_limit` is {keep}; allowed: 1 or more.")
    target = folder / f"checkpoint-{progress.step}"
    aside = folder / f".saving-checkpoint-{progress.step}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if progress.best_loss is not None:
            shutil.copyfile(folder / "best" / WEIGHTS_NAME, aside / BEST_NAME)
        if learnt:  # not by `register_for_checkpointing`: what Accelerate writes by it, it unpickles whatever it is
            torch.save([part.state_dict() for part in learnt], aside / LEARNT_NAME)
        write_json(aside / PROGRESS_NAME, asdict(progress))
        files = sorted(file for file in aside.rglob("*") if file.is_file())
        write_json(aside / MANIFEST_NAME, {file.relative_to(aside).as_posix(): digest(file) for file in files})
        sync(aside)
        replaced = folder / f"{target.name}.replaced"
        if target.exists():
            if replaced.exists():
                _remove(replaced)
            target.rename(replaced)  # where it is still found
        aside.rename(target)
        sync_one(folder)
        if replaced.exists():
            _remove(replaced)
        found = list_checkpoints(folder)
        newest = found.index(target) + 1
        for old in found[newest:] + found[: max(0, newest - keep)]:
            _remove(old)
    accelerator.wait_for_everyone()


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; one that another of its step is about to replace among them."""
    found = [file.parent for file in folder.glob(f"checkpoint-*/{MANIFEST_NAME}")]
    named = [(re.fullmatch(r"checkpoint-(\d+)(\.replaced)?", path.name), path) for path in found]
    order = [(int(match[1]), match[2] is None, path) for match, path in named if match]
    return [path for *_, path in sorted(order)]


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
    if not (path / MANIFEST_NAME).is_file():
        raise ValueError(f"`resume_from_checkpoint`: {wanted} is no checkpoint; it has no {MANIFEST_NAME}.")
    return path


def read_progress(checkpoint: Path) -> Progress:
    """How far a checkpoint's run was. Raises OSError, naming it, if one of its files is damaged or missing."""
    _check_files(checkpoint)
    return Progress(**json.loads((checkpoint / PROGRESS_NAME).read_text()))


def load_checkpoint(
    accelerator: Accelerator,
    checkpoint: Path,
    folder: Path,
    wanted: Progress,
    reshard: Collection[str] = (),
    learnt: Sequence[Stateful] = (),
) -> Progress:
    """Restore a run, after `accelerator.prepare`; the best adapter goes back to `folder/best`.

    Args:
        accelerator: What model, optimiser and scheduler were prepared by.
        checkpoint: As [`find_checkpoint`] gives it.
        folder: The run's output folder.
        wanted: The run to resume, at its beginning: its tasks and arguments.
        reshard: Those of `SHARES` that may be other than they were, as long as a step has as many images. The steps
            stay those of the same images; only what is drawn while they are taken, such as dropout, becomes other.
        learnt: As [`save_checkpoint`] has it.

    Returns:
        How far the run was.

    Raises:
        ValueError: If it was trained on other tasks or with other arguments; the message names them.
        OSError: If one of its files is damaged; the message names it.
    """
    progress = read_progress(checkpoint)
    if progress.tasks != wanted.tasks:
        raise ValueError(
            f"{checkpoint} was trained on the tasks {_describe(progress.tasks)}, this run has "
            f"{_describe(wanted.tasks)}: resume with the same tasks, or start anew in another `output_dir`."
        )
    processes = progress.arguments.get("num_processes", accelerator.num_processes)
    if reshard:
        _share_out(progress, wanted.arguments, reshard, checkpoint)
    check_same_arguments(progress.arguments, wanted.arguments, checkpoint)
    accelerator.load_state(str(checkpoint))
    if learnt:
        for part, state in zip(learnt, torch.load(checkpoint / LEARNT_NAME, weights_only=True), strict=True):
            part.load_state_dict(state)
    if processes != accelerator.num_processes:
        for scheduler in accelerator._schedulers:  # each has taken a step per process, and will
            scheduler.scheduler.last_epoch *= accelerator.num_processes / processes
        if accelerator.process_index >= processes:
            set_seed(Random(f"{progress.step} {accelerator.process_index}").getrandbits(32))
    if accelerator.is_main_process and progress.best_loss is not None:
        with write_aside(folder / "best") as aside:
            shutil.copyfile(checkpoint / BEST_NAME, aside / WEIGHTS_NAME)
    return progress


def check_same_arguments(trained: dict[str, Any], wanted: dict[str, Any], source: Path) -> None:
    """Raise ValueError, naming what differs, unless a run was trained with the arguments that are wanted now."""
    now = json.loads(json.dumps(wanted))
    differing = [f"{name}={trained.get(name)!r} (now {now[name]!r})" for name in now if trained.get(name) != now[name]]
    if differing:
        text = f"{source} was trained with {', '.join(differing)}: resume with the same arguments"
        if all(entry.partition("=")[0] in SHARES for entry in differing):
            text += ", or share a step out otherwise by `allow_reshard` where there is one"
        raise ValueError(text + ".")


def _check_files(checkpoint: Path) -> None:
    file = checkpoint / MANIFEST_NAME
    try:
        known = json.loads(file.read_text())
        known = {PROGRESS_NAME: known[PROGRESS_NAME], **known}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OSError(f"{file}: missing, truncated or corrupt: {error}") from error
    for name, expected in known.items():
        file = checkpoint / name
        if not file.is_file() or digest(file) != expected:
            raise OSError(f"{file}: missing, truncated or corrupt: it is not what the run has written")


def share_alike(trained: dict[str, Any], wanted: dict[str, Any], names: Collection[str], source: Path) -> dict:
    """A run's arguments with the shares of a step that are wanted now.

    Args:
        trained: The run's.
        wanted: Those of now.
        names: Those of `SHARES` that may differ.
        source: Where the run's are from.

    Raises:
        ValueError: If a step then had another number of images.
    """
    before, now = (math.prod(arguments.get(name, 1) for name in SHARES) for arguments in (trained, wanted))
    if before != now:
        described = ", ".join(f"{name}={wanted[name]}" for name in SHARES if name in wanted)
        raise ValueError(
            f"{source} has {before} images a step, and {described} make {now}: give such that make {before}."
        )
    return {**trained, **{name: wanted[name] for name in names if name in wanted}}


def _share_out(progress: Progress, wanted: dict[str, Any], names: Collection[str], checkpoint: Path) -> None:
    """Count the batches that were done of the epoch as those of the shares that are wanted now."""
    trained = progress.arguments
    progress.arguments = share_alike(trained, wanted, names, checkpoint)
    # A checkpoint lies between steps: what was done of the epoch is a whole number of any shares of a step.
    done = progress.batch * trained["num_processes"] * trained["per_device_train_batch_size"]
    progress.batch = done // (wanted["num_processes"] * wanted["per_device_train_batch_size"])


def _describe(tasks: list[dict[str, Any]]) -> dict[str, int]:
    return {task["name"]: task["channels"] for task in tasks}


def _remove(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_NAME).unlink(missing_ok=True)  # first, so that a kill leaves no half that looks whole
    shutil.rmtree(checkpoint)
