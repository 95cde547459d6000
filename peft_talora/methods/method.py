"""How an mSAM can be trained: TA-LoRA and the baselines that it is compared with, each one object.

All adapters have the same target layers, rank and norms, and all methods the same heads. The shared methods (`-hps`,
hard parameter sharing) serve all heads by one encoder pass; single-task learning (`-stl`) is one such run per task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from peft import PeftModel
from transformers import SamImageProcessorPil

from ..engine import TaskOrder, Updates, keep_active, own_name, resolve_task_order
from ..hub import save_adapter
from ..msam import MSamModel
from ..tuner import orthogonality_loss
from . import mtlora
from .adapters import AdapterArguments, add_lora, add_nothing, add_talora, unfreeze_encoder

Regularizer = Callable[[], torch.Tensor]


def one_pass(order: str, device: torch.device) -> TaskOrder:
    """The encoder's output is that of all tasks, so `auto` is one pass on every device."""
    return resolve_task_order(order, device, task_conditional=False)


def task_by_task(order: str, device: torch.device) -> TaskOrder:
    """Each task has layers of its own that cannot share a pass. Raises ValueError for another order."""
    if order == "folded":
        raise ValueError("`task_order` is 'folded'; with a LoRA per task allowed: 'sequential' and 'auto'.")
    return resolve_task_order("sequential" if order == "auto" else order, device)


def unregularized(model: PeftModel, args: AdapterArguments) -> None:
    """Nothing is added to the losses."""


def keep_orthonormal(model: PeftModel, args: AdapterArguments) -> Regularizer | None:
    """`orthogonality_loss`, if it has a weight."""
    return (lambda: args.orthogonality * orthogonality_loss(model)) if args.orthogonality else None


def save_all(
    model: PeftModel, tasks: Sequence[str], folder: Path, image_processor: SamImageProcessorPil | None, card: str
) -> None:
    """One adapter folder holds all tasks."""
    save_adapter(model, folder, image_processor, card)


@dataclass(frozen=True)
class Method:
    """One way to train an mSAM.

    Attributes:
        name: what `--method` calls it.
        add: model and arguments → the `PeftModel` to train, whose outputs are still those of the model.
        reads: the names of the `AdapterArguments` that mean something to it.
        learning_rate: where to start tuning, for AdamW: the best one on synthetic-3, see `recipes/benchmark.py`.
        updates: the ways of `engine.update_groups` that differ for it, the better one there first.
        resolve_order: asked-for task order and device → the order; see `engine.task_groups`.
        activate: called with the model and the tasks of every encoder pass, before it.
        own_parts: task → the parts of the names of parameters, between their dots, that say they are its own.
        regularizer: model and arguments → what gives a scalar to add to the losses, or None.
        save: writes an adapter folder of some of the tasks, with image processor and model card.
        folder_per_task: whether each task is saved in a folder of its own, rather than all tasks in one.
        alone: the method of the run that each task gets of its own; None if one run trains all tasks.
    """

    name: str
    add: Callable[[MSamModel, AdapterArguments], PeftModel]
    reads: frozenset[str]
    learning_rate: float
    updates: tuple[Updates, ...] = ("joint",)
    resolve_order: Callable[[str, torch.device], TaskOrder] = one_pass
    activate: Callable[[PeftModel, Sequence[str]], None] = keep_active
    own_parts: Callable[[str], tuple[str, ...]] = own_name
    regularizer: Callable[[PeftModel, AdapterArguments], Regularizer | None] = unregularized
    save: Callable[[PeftModel, Sequence[str], Path, SamImageProcessorPil | None, str], None] = save_all
    folder_per_task: bool = False
    alone: str | None = None

    def check(self, args: AdapterArguments) -> None:
        """Raise ValueError for an argument that this method does not read and that is not at its default."""
        plain = AdapterArguments()
        for name in (field.name for field in fields(AdapterArguments)):
            value, default = getattr(args, name), getattr(plain, name)
            if name not in self.reads | {"method"} and value != default:
                raise ValueError(
                    f"`{name}` is {value!r}, but the method {self.name!r} does not read it: leave it out."
                )


_ALL = frozenset(field.name for field in fields(AdapterArguments))
_LORA = frozenset({"r", "alpha", "dropout", "target_modules", "train_norms"})

_SHARED: tuple[Updates, ...] = ("alternating", "joint")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "talora",
            add_talora,
            _ALL,
            3e-3,
            _SHARED,
            resolve_order=resolve_task_order,
            regularizer=keep_orthonormal,
        ),
        Method("lora-stl", add_lora, _LORA, 3e-3, alone="lora-hps"),
        Method("lora-hps", add_lora, _LORA, 3e-3, _SHARED),
        Method("full-stl", unfreeze_encoder, frozenset(), 1e-3, alone="full-hps"),
        Method("full-hps", unfreeze_encoder, frozenset(), 1e-3, _SHARED),
        Method("heads", add_nothing, frozenset(), 3e-3),
        Method(
            "mtlora",
            mtlora.add_loras,
            _LORA | {"r_task"},
            3e-3,
            _SHARED,
            resolve_order=task_by_task,
            activate=mtlora.activate,
            own_parts=mtlora.own_parts,
            save=mtlora.save_task,
            folder_per_task=True,
        ),
    )
}
"""The methods by name."""


def find_method(name: str) -> Method:
    """The method of that name. Raises ValueError if there is none."""
    if name not in METHODS:
        raise ValueError(f"`method` is {name!r}; allowed: {', '.join(METHODS)}.")
    return METHODS[name]
