"""Growing: tasks are added to an adapter, removed and renamed; and what the tasks of an adapter have in common.

A task is a row in every adapted layer and, on a base with `task_heads`, a head, of which PEFT's `ModulesToSaveWrapper`
holds a copy per adapter. An adapter that all heads share (its one task is called as none of them) has one update
for all of them, so there a task is a head alone. Everything is checked before anything is changed.

Axes: L layers, T tasks, K rank of the task factor, O R ranks of the output and the input factor.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .config import TIED_TASKS, TALoRAConfig, check_task_names
from .layer import TALoRALayer
from .task_state import TaskState, task_index

_COPY = "copy:"


@dataclass
class TaskAffinity:
    """How alike the tasks of an adapter are: cosines between them, in [-1, 1], as float64 on the CPU.

    A row says how a task mixes the slices of a layer's core, so its cosine depends on how the factors share out the
    same update; that of the updates ΔW does not. It is NaN where a row or an update is zero, which has no direction.

    Attributes:
        task_names: The T tasks, in order.
        layers: Names of the L layers that have the adapter.
        rows_by_layer: (L, T, T), cosines of the task rows.
        rows: (T, T), their mean over the layers (a layer's scale is arbitrary), without those that are NaN.
        updates_by_layer: (L, T, T), cosines of ΔW in the Frobenius inner product.
        updates: (T, T), cosines of the updates of all layers taken as one vector.
    """

    task_names: list[str]
    layers: list[str]
    rows_by_layer: torch.Tensor
    rows: torch.Tensor
    updates_by_layer: torch.Tensor
    updates: torch.Tensor


def find_adapter(state: TaskState, adapter_name: str | None) -> str:
    """The adapter of that name, or the one that is active. Raises ValueError if there is none, or more than one."""
    if adapter_name is None:
        active = state.active_adapters()
        if len(active) != 1:
            raise ValueError(f"`adapter_name` is needed where not exactly one adapter is active; active are {active}.")
        return active[0]
    if adapter_name not in state.task_names:
        raise ValueError(f"Unknown adapter {adapter_name!r}; the TA-LoRA adapters are {list(state.task_names)}.")
    return adapter_name


def add_task(
    state: TaskState,
    configs: dict[str, TALoRAConfig],
    name: str,
    head: dict[str, Any],
    init: str,
    freeze_others: bool,
    adapter_name: str | None,
) -> None:
    """See [`TALoRAModel.add_task`]; `head` holds the arguments that only a head needs."""
    adapter_name = find_adapter(state, adapter_name)
    shared, known = state.is_shared(adapter_name), state.served(adapter_name)
    _check_unmerged(state)
    _check_name(name, [*known, *_shared_names(state, known)], configs)
    source = _find_source(init, known)
    if state.head_names is None and head != dict.fromkeys(head):
        raise ValueError(
            f"{type(state.base).__name__} has no task heads: leave out `kind` and `channels`; got {head}."
        )
    layers = [] if shared else _layers_with(state, adapter_name)
    if layers:
        _warn(layers, adapter_name, len(known) + 1, trains=source is not None and not freeze_others)
    if state.head_names is not None:
        _add_head(state, adapter_name, name, head, source)
        _list_saved_modules(state, configs)
    for layer in layers:
        layer.add_row(adapter_name, name, source)
    if not shared:
        _set_names(state, configs, adapter_name, [*known, name])
    if freeze_others:
        state.trained_only[adapter_name] = [name]
    elif adapter_name in state.trained_only:
        state.trained_only[adapter_name].append(name)
    state.sync()


def remove_task(state: TaskState, configs: dict[str, TALoRAConfig], name: str, adapter_name: str | None) -> None:
    """See [`TALoRAModel.remove_task`]."""
    adapter_name = find_adapter(state, adapter_name)
    shared, known = state.is_shared(adapter_name), state.served(adapter_name)
    _check_unmerged(state)
    index = _index_of_name(name, known)
    if len(known) == 1:
        raise ValueError(f"{name!r} is the only task of adapter {adapter_name!r}; `delete_adapter` deletes it whole.")
    if state.head_names is not None:
        _remove_head(state, adapter_name, name)
        _list_saved_modules(state, configs)
    if not shared:
        for layer in _layers_with(state, adapter_name):
            layer.remove_row(adapter_name, name)
        _set_names(state, configs, adapter_name, [task for task in known if task != name])
        _drop_from_selection(state, adapter_name, index)
    if adapter_name in state.trained_only:
        state.trained_only[adapter_name] = [task for task in state.trained_only[adapter_name] if task != name]
    state.sync()


def rename_task(
    state: TaskState, configs: dict[str, TALoRAConfig], old: str, new: str, adapter_name: str | None
) -> None:
    """See [`TALoRAModel.rename_task`]."""
    adapter_name = find_adapter(state, adapter_name)
    _check_unmerged(state)
    heads = state.head_names or []
    _index_of_name(old, list(dict.fromkeys([*heads, *state.task_names[adapter_name]])))
    renamed = [n for n, own in state.task_names.items() if old in own and (n == adapter_name or old in heads)]
    for taken in (
        [*heads, *(_shared_names(state, heads) if old in heads else [])],
        *(state.task_names[name] for name in renamed),
    ):
        _check_name(new, taken, configs)
    if old in heads:
        state.base.rename_task_head(old, new)
        state.head_names[heads.index(old)] = new
        state.grown_heads = {new if name == old else name for name in state.grown_heads}
        _list_saved_modules(state, configs)
    for name in renamed:
        for layer in _layers_with(state, name):
            layer.rename_row(name, old, new)
        _set_names(state, configs, name, [new if task == old else task for task in state.task_names[name]])
    for name in state.trained_only if old in heads else renamed:
        tasks = state.trained_only.get(name, [])
        tasks[:] = [new if task == old else task for task in tasks]


def drop_unserved_heads(state: TaskState, configs: dict[str, TALoRAConfig]) -> None:
    """Drop the heads that growing made and that no adapter serves any more; while merged, heads stay."""
    served = {task for name in state.task_names for task in state.served(name)}
    unserved = [name for name in state.head_names or [] if name in state.grown_heads - served]
    if not unserved or any(layer.merged for layer in state.layers):
        return
    for name in unserved:
        _drop_head(state, name)
    _list_saved_modules(state, configs)


def choose_trained(state: TaskState, tasks: str | list[str | int] | None, adapter_name: str | None) -> None:
    """See [`TALoRAModel.train_only`]."""
    adapter_name = find_adapter(state, adapter_name)
    _check_unmerged(state)
    known = state.served(adapter_name)
    names = [state.task_name(task, known) for task in ([tasks] if isinstance(tasks, str) else tasks or [])]
    if tasks is not None and not names:
        raise ValueError(f"`tasks` is empty; name some of {known}, or give None to train the whole adapter.")
    state.trained_only.pop(adapter_name, None)
    if tasks is not None:
        state.trained_only[adapter_name] = names
    state.release_freeze()
    state.thaw(adapter_name)
    state.hold_freeze()


@torch.no_grad()
def task_affinity(state: TaskState, adapter_name: str | None) -> TaskAffinity:
    """See [`TALoRAModel.task_affinity`]."""
    adapter_name = find_adapter(state, adapter_name)
    names = {module: name for name, module in state.base.named_modules()}
    layers, task_names = _layers_with(state, adapter_name), list(state.task_names[adapter_name])
    rows_LTK = [_rows(layer, adapter_name, task_names) for layer in layers]
    inner_LTT = torch.stack([_inner_products(layer, adapter_name, task_names) for layer in layers])
    rows_by_layer = torch.stack([_cosines(rows_TK @ rows_TK.T) for rows_TK in rows_LTK])
    return TaskAffinity(
        task_names=task_names,
        layers=[names[layer] for layer in layers],
        rows_by_layer=rows_by_layer,
        rows=rows_by_layer.nanmean(0),
        updates_by_layer=_cosines(inner_LTT),
        updates=_cosines(inner_LTT.sum(0)),
    )


def _rows(layer: TALoRALayer, adapter_name: str, task_names: list[str]) -> torch.Tensor:
    rows = layer.talora_task[adapter_name]
    return torch.stack([rows[name] for name in task_names]).cpu().double()


def _inner_products(layer: TALoRALayer, adapter_name: str, task_names: list[str]) -> torch.Tensor:
    """⟨ΔW_a, ΔW_b⟩ = s² · tr(C_aᵀ (UᵀU) C_b (VᵀV)), (T, T): by the small factors, without any ΔW."""
    factors = (layer.talora_core, layer.talora_out, layer.talora_in)
    core_ORK, out_DO, in_DR = (factor[adapter_name].cpu().double() for factor in factors)
    core_TOR = torch.einsum("tk,ork->tor", _rows(layer, adapter_name, task_names), core_ORK)
    turned_TOR = (out_DO.T @ out_DO) @ core_TOR @ (in_DR.T @ in_DR)
    return layer.scaling[adapter_name] ** 2 * torch.einsum("aor,bor->ab", core_TOR, turned_TOR)


def _cosines(inner_TT: torch.Tensor) -> torch.Tensor:
    """Cosines from inner products, (..., T, T)."""
    norms_T = inner_TT.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return (inner_TT / (norms_T[..., None] * norms_T[..., None, :])).clamp(-1, 1)


def _layers_with(state: TaskState, adapter_name: str) -> list[TALoRALayer]:
    return [layer for layer in state.layers if adapter_name in layer.talora_core]


def _check_unmerged(state: TaskState) -> None:
    merged = sorted({name for layer in state.layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(f"Tasks cannot change while adapters {merged} are merged; call `unmerge_adapter` first.")


def _index_of_name(name: str, known: list[str]) -> int:
    if not isinstance(name, str):
        raise ValueError(f"Tasks are removed and renamed by name; got {name!r}, and the tasks are {known}.")
    return task_index(name, known)


def _check_name(name: str, taken: list[str], configs: dict[str, TALoRAConfig]) -> None:
    check_task_names([*taken, name])
    if name in configs:
        raise ValueError(f"Task name {name!r} is not allowed: an adapter has this name.")


def _shared_names(state: TaskState, known: list[str]) -> list[str]:
    """Names that no head may get: those of the adapters that all heads share tell that they do."""
    own = {state.task_names[name][0] for name in state.task_names if state.is_shared(name)}
    return sorted(own - set(known))


def _find_source(init: str, known: list[str]) -> str | None:
    if init == "zero":
        return None
    if not isinstance(init, str) or not init.startswith(_COPY) or init.removeprefix(_COPY) not in known:
        raise ValueError(f"`init` must be 'zero' or '{_COPY}<task>' with one of the tasks {known}; got {init!r}.")
    return init.removeprefix(_COPY)


def _warn(layers: list[TALoRALayer], adapter_name: str, num_tasks: int, trains: bool) -> None:
    cores = [layer.talora_core[adapter_name] for layer in layers]
    if num_tasks == 2 and cores[0].shape[2] == 1:
        warnings.warn(TIED_TASKS, stacklevel=4)
    outputs = [layer.talora_out[adapter_name] for layer in layers]
    if not trains and not any(core.any() and out.any() for core, out in zip(cores, outputs, strict=True)):
        warnings.warn(
            f"The core or the output factor of adapter {adapter_name!r} is zero in every layer, as before training. "
            "The new row gets no gradient until it has moved: train the other tasks first.",
            stacklevel=4,
        )


def _set_names(state: TaskState, configs: dict[str, TALoRAConfig], adapter_name: str, task_names: list[str]) -> None:
    state.task_names[adapter_name] = task_names
    configs[adapter_name].task_names = list(task_names)


def _drop_from_selection(state: TaskState, adapter_name: str, index: int) -> None:
    for choice in (state.selected, *state.suspended):
        selected = choice.pop(adapter_name, None)
        if selected is not None and int(selected) != index:
            choice[adapter_name] = selected - int(int(selected) > index)


def _add_head(state: TaskState, adapter_name: str, name: str, arguments: dict[str, Any], source: str | None) -> None:
    """A head whose original starts from another original, and the adapter's copy of it from that of `source`."""
    heads = state.base.task_heads
    original = _whole_head(next(iter(heads.values())))
    trained = None if source is None else _whole_head(heads[source], adapter_name)
    if name not in heads:
        state.base.add_task_head(name, start=original, **arguments)
        state.head_names.append(name)
        state.grown_heads.add(name)
    elif arguments != dict.fromkeys(arguments):
        raise ValueError(f"The model has a head for {name!r}: leave out `kind` and `channels`; got {arguments}.")
    heads = state.base.task_heads
    if isinstance(heads[name], ModulesToSaveWrapper):
        heads[name].update(adapter_name)
    else:
        heads[name] = ModulesToSaveWrapper(heads[name], adapter_name).train(heads.training)
        heads[name].set_adapter([])
    if trained is not None:
        heads[name].modules_to_save[adapter_name].start_from(trained)
    if adapter_name in state.active_adapters():
        heads[name].set_adapter(adapter_name)
    if state.layers[0].disable_adapters:
        heads[name].enable_adapters(False)


def _remove_head(state: TaskState, adapter_name: str, name: str) -> None:
    """The head goes with the last adapter that serves it; until then, only the adapter's copy of it."""
    others = [other for other in state.task_names if other != adapter_name and name in state.served(other)]
    head = state.base.task_heads[name]
    if not others:
        _drop_head(state, name)
    elif state.is_shared(adapter_name):
        raise ValueError(f"The head of {name!r} cannot be removed: adapters {others} serve it too.")
    elif isinstance(head, ModulesToSaveWrapper):
        head.delete_adapter(adapter_name, [other for other in head.active_adapters if other != adapter_name])


def _drop_head(state: TaskState, name: str) -> None:
    state.base.remove_task_head(name)
    state.head_names.remove(name)
    state.grown_heads.discard(name)


def _whole_head(head: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """The adapter's copy of a head if it has one, else the original."""
    if isinstance(head, ModulesToSaveWrapper):
        head = dict(head.modules_to_save.items()).get(adapter_name, head.original_module)
    if any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in head.modules()):
        raise ValueError(
            "Layers inside the task heads are adapted; heads can be added only where they train as a whole."
        )
    return head


def _list_saved_modules(state: TaskState, configs: dict[str, TALoRAConfig]) -> None:
    """Say in `modules_to_save` what is wrapped now, by full names."""
    modules = dict(state.base.named_modules())
    wrappers = {name: module for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}
    for adapter_name, config in configs.items():
        config.modules_to_save = [name for name, wrap in wrappers.items() if adapter_name in wrap.modules_to_save]
