"""How the task reaches the adapted layers: one index per row of the effective batch.

The tasks of a call are an argument, `task_ids`, of the model (or of any `PreTrainedModel` inside it that holds
adapted layers). A hook at that entry checks them and puts them into the `TaskState` that all adapted layers of the
model share; another hook takes them out again. A choice that lasts (`set_task`) lives in the same object.

Activation checkpointing runs a block's forward again during backward, when the call and its hooks are long over. So
the checkpoint functions of the blocks are wrapped: what they run, now or later, sees the state as it was in the call.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

TaskIds = torch.Tensor | Sequence[int | str]


def task_index(task: str | int, task_names: list[str]) -> int:
    """The position of a task given by name or by position. Raises ValueError that names the known tasks."""
    if isinstance(task, str):
        if task not in task_names:
            raise ValueError(f"Unknown task {task!r}; the tasks are {task_names}.")
        return task_names.index(task)
    if isinstance(task, bool):
        raise ValueError(f"Task {task!r} is neither a name nor a position; the tasks are {task_names}.")
    index = operator.index(task)
    if not 0 <= index < len(task_names):
        raise ValueError(f"Task index {index} is out of range; the {len(task_names)} tasks are {task_names}.")
    return index


class TaskState:
    """Which task every row of the batch belongs to, for all adapters of one model.

    Attributes:
        base: The model that was adapted.
        layers: Its adapted layers.
        head_names: Names of the model's heads, in order, or None for a model without `task_heads`. A task given by
            its position is one of this list if there is one, else of the adapter's own.
        grown_heads: Those of them that growing added, for some adapter.
        task_names: The list of tasks of every adapter.
        selected: The lasting choice of every adapter that has one, as a LongTensor of shape (1,). A tensor, not an
            int, so that choosing another task recompiles nothing under `torch.compile`.
        suspended: The choices that running `use_task` contexts restore at their ends, outermost first.
        trained_only: Per adapter the only tasks that train, where `train_only` chose some.
        calls: A stack with one entry per hooked module that is running: (hook, indices by adapter or None).
    """

    def __init__(self, base: nn.Module, head_names: list[str] | None):
        self.base = base
        self.layers: list[nn.Module] = []
        self.head_names = head_names
        self.grown_heads: set[str] = set()
        self.task_names: dict[str, list[str]] = {}
        self.selected: dict[str, torch.Tensor] = {}
        self.suspended: list[dict[str, torch.Tensor]] = []
        self.trained_only: dict[str, list[str]] = {}
        self.calls: list[tuple[object, dict[str, torch.Tensor] | None]] = []
        self.merge_is_ours = False
        self.entries: list[TaskEntry] = []

    def rows(self, adapter_name: str) -> torch.Tensor | None:
        """Indices into the adapter's tasks: (rows,), where `rows` divides the layer's leading size.

        None for an adapter of one task. Raises ValueError if the adapter has several tasks and none is selected.
        """
        if len(self.task_names[adapter_name]) == 1:
            return None
        in_flight = self.calls[-1][1] if self.calls else None
        if in_flight is not None:
            return in_flight[adapter_name]
        if not self.calls and _in_backward():
            raise RuntimeError(
                f"A layer of adapter {adapter_name!r} is recomputed in backward by a checkpoint function of the "
                "model's own, which cannot know the task of the forward. Use `activation_checkpointing_enable`, or "
                "checkpoint the call of the whole model."
            )
        self.check_selected(adapter_name)
        return self.selected[adapter_name]

    def check_selected(self, adapter_name: str) -> None:
        """Raise ValueError if the adapter has several tasks and there is no lasting choice."""
        if len(self.task_names[adapter_name]) > 1 and adapter_name not in self.selected:
            raise ValueError(
                f"Adapter {adapter_name!r} has the tasks {self.task_names[adapter_name]} and none is selected: call "
                "`set_task`, or pass `task_ids` (one per sample) to forward. Merging needs `set_task`."
            )

    def layout_error(self, layer: nn.Module, shape: torch.Size, samples: int) -> ValueError:
        """What to raise where the leading size of a layer's input is no multiple of the number of samples."""
        name = next(name for name, module in self.base.named_modules() if module is layer)
        return ValueError(
            f"{name}: the input, of shape {tuple(shape)}, has a leading size of {shape[0]}, no multiple of the "
            f"{samples} entries of `task_ids`: samples must be its slowest axis. Leave this layer out by "
            "`exclude_modules`, or choose one task for all samples by `set_task`."
        )

    def is_shared(self, adapter_name: str) -> bool:
        """Whether the adapter has one update for all heads: one task, whose name is none of theirs."""
        own = self.task_names[adapter_name]
        return bool(self.head_names) and len(own) == 1 and own[0] not in self.head_names

    def served(self, adapter_name: str) -> list[str]:
        """The tasks that an adapter serves: its own, or those of all heads if they share it."""
        return self.head_names if self.is_shared(adapter_name) else self.task_names[adapter_name]

    def task_name(self, task: str | int, known: list[str]) -> str:
        """One of the known tasks, by name or by position: among the heads where there are heads, else among them."""
        if not isinstance(task, str):
            positions = self.head_names or known
            task = positions[task_index(task, positions)]
        return known[task_index(task, known)]

    def select(self, adapter_names: Sequence[str], task: str | int | None) -> None:
        """Make a lasting choice for every adapter named, or for none if one does not know it; None takes it back."""
        for name in adapter_names:
            if name not in self.task_names:
                raise ValueError(f"Unknown adapter {name!r}; the TA-LoRA adapters are {list(self.task_names)}.")
        names = [] if task is None else adapter_names
        own = {name: self.task_names[name] for name in names}
        indices = {name: tasks.index(self.task_name(task, tasks)) for name, tasks in own.items()}
        for layer in self.layers:
            if layer.merged:
                layer.unmerge()
        for name in adapter_names:
            self.selected.pop(name, None)
        device = self.layers[0].weight.device
        self.selected.update({name: torch.tensor([index], device=device) for name, index in indices.items()})

    def selected_index(self, adapter_name: str) -> int:
        """The position of the adapter's one task that can be meant: its only one, or the lasting choice."""
        self.check_selected(adapter_name)
        return int(self.selected[adapter_name]) if len(self.task_names[adapter_name]) > 1 else 0

    def adapters_in_use(self) -> list[str]:
        """Adapters that take part in a forward now: active, enabled, unmerged."""
        names: dict[str, None] = {}
        for layer in self.layers:
            if not layer.disable_adapters and not layer.merged:
                names.update(dict.fromkeys(name for name in layer.active_adapters if name in layer.talora_core))
        return list(names)

    def depends_on_task(self, adapter_name: str) -> bool:
        """Whether it matters for an adapter which task is asked for: it has several, or serves some heads only."""
        own = self.task_names[adapter_name]
        return len(own) > 1 or self.served(adapter_name) != (self.head_names or own)

    def merged_task(self) -> str | None:
        """The task that is merged into the base weights, None if none is or one update serves all heads."""
        for layer in self.layers:
            for adapter_name, index in layer.merged_tasks.items():
                if self.depends_on_task(adapter_name):
                    return self.task_names[adapter_name][index]
        return None

    def resolve(self, task_ids: TaskIds, batch_size: int | None, check_values: bool) -> dict[str, torch.Tensor]:
        """Turn the `task_ids` of a call into indices into the tasks of each adapter in use.

        Checks them all, but for the values of a tensor where `check_values` is False: reading those waits for the
        device, so it is done once, where a call first gets its ids.
        """
        if isinstance(task_ids, (str, int)) or (isinstance(task_ids, torch.Tensor) and task_ids.ndim != 1):
            raise ValueError(f"`task_ids` must hold one task per sample, in one dimension; got {task_ids!r}.")
        if isinstance(task_ids, torch.Tensor) and task_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"`task_ids` must be a tensor of type int64 or int32; got {task_ids.dtype}.")
        if len(task_ids) == 0:
            raise ValueError("`task_ids` is empty; give one per sample.")
        if batch_size is not None and len(task_ids) != batch_size:
            raise ValueError(
                f"`task_ids` has {len(task_ids)} entries for a batch of {batch_size}: give one per sample."
            )
        values: Sequence[int | str] = ()
        if not isinstance(task_ids, torch.Tensor):
            values = task_ids
        elif check_values and not torch.compiler.is_compiling():  # reading them would break a compiled graph
            values = task_ids.unique().tolist()
        return {adapter_name: self._indices(adapter_name, task_ids, values) for adapter_name in self.adapters_in_use()}

    def _indices(self, adapter_name: str, task_ids: TaskIds, values: Sequence[int | str]) -> torch.Tensor:
        own = self.task_names[adapter_name]
        known = self.head_names or own
        given = [task_index(task, known) for task in values]
        if not isinstance(task_ids, torch.Tensor):
            task_ids = given
        if not self.is_shared(adapter_name):
            for index in dict.fromkeys(given):
                task_index(known[index], own)
        ids = torch.as_tensor(task_ids, device=self.layers[0].weight.device)
        if known == own or len(own) == 1:
            return ids
        table = torch.tensor([own.index(name) if name in own else -1 for name in known], device=ids.device)
        return table[ids]

    def forget(self, adapter_name: str) -> None:
        """Forget an adapter that was deleted."""
        self.task_names.pop(adapter_name, None)
        for choice in (self.selected, *self.suspended):
            choice.pop(adapter_name, None)
        self.trained_only.pop(adapter_name, None)

    def sync(self) -> None:
        """Unmerge what is disabled, and tell the base model what it must know."""
        for layer in self.layers:
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
        self.hold_freeze()
        self.tell_base()

    def tell_base(self) -> None:
        """Tell a base model with task heads what it must know: contract names 3 and 4 of `TALoRAModel`."""
        if self.head_names is None:
            return
        self.base.task_conditional = any(self.depends_on_task(name) for name in self.adapters_in_use())
        merged = self.merged_task()
        if merged is not None or self.merge_is_ours:
            self.base.merged_task = merged
            self.merge_is_ours = merged is not None

    def active_adapters(self) -> list[str]:
        """Adapters that are active, be they disabled or merged."""
        return list(
            dict.fromkeys(name for layer in self.layers for name in layer.active_adapters if name in layer.talora_core)
        )

    def hold_freeze(self) -> None:
        """Freeze all but the tasks in `trained_only`: PEFT makes everything of an adapter trainable at many places."""
        if not self.trained_only or torch.compiler.is_compiling():
            return
        held = [name for name in self.active_adapters() if name in self.trained_only]
        kept = {id(parameter) for name in held for parameter in self._own_parameters(name, self.trained_only[name])}
        for parameter in self.base.parameters() if held else ():
            if parameter.requires_grad and id(parameter) not in kept:
                parameter.requires_grad_(False)

    def _own_parameters(self, adapter_name: str, tasks: Sequence[str]) -> Iterator[nn.Parameter]:
        """What belongs to some tasks alone: their rows, and the adapter's copies of their heads."""
        for layer in self.layers:
            if adapter_name in layer.talora_task:
                yield from (row for task, row in layer.talora_task[adapter_name].items() if task in tasks)
        for task in tasks:
            head = self.base.task_heads[task] if self.head_names is not None and task in self.head_names else None
            if isinstance(head, ModulesToSaveWrapper) and adapter_name in head.modules_to_save:
                yield from head.modules_to_save[adapter_name].parameters()

    @contextmanager
    def restored(self, selected: dict[str, torch.Tensor], call: dict[str, torch.Tensor] | None):
        """The state of an earlier moment, for as long as the context lasts."""
        now = self.selected, self.calls
        self.selected, self.calls = selected, [(self, call)]
        try:
            yield
        finally:
            self.selected, self.calls = now


class _Replay:
    """A function that always runs under the task state of the moment in which it was wrapped."""

    def __init__(self, function: Callable, state: TaskState):
        self.function = function
        self.state = state
        self.selected = dict(state.selected)
        self.call = state.calls[-1][1] if state.calls else None

    def __call__(self, *args, **kwargs):
        with self.state.restored(self.selected, self.call):
            return self.function(*args, **kwargs)


class TaskCheckpoint:
    """A block's checkpoint function, whose recomputation sees the tasks of its own forward."""

    def __init__(self, checkpoint: Callable, state: TaskState):
        self.checkpoint = checkpoint
        self.state = state

    def __call__(self, function, *args, **kwargs):
        """Checkpoint `function`, as the wrapped checkpoint function does."""
        if not torch.compiler.is_compiling():  # a compiled graph recomputes from the ids it holds as inputs
            function = _Replay(function, self.state)
        return self.checkpoint(function, *args, **kwargs)


class TaskEntry:
    """The pair of hooks on a module that takes `task_ids`: the model itself, or a `PreTrainedModel` inside it.

    `task_ids` is taken out of the arguments unless the module's own forward names it (mSAM's does, to choose heads).
    """

    def __init__(self, module: nn.Module, state: TaskState):
        self.module = module
        self.state = state
        self.is_base = module is state.base
        self.parameters = list(inspect.signature(module.forward).parameters)
        self.blocks = [block for block in module.modules() if hasattr(block, "gradient_checkpointing")]
        self.handles = [
            module.register_forward_pre_hook(self.enter, with_kwargs=True),
            module.register_forward_hook(self.leave, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks and the wrapped checkpoint functions off again."""
        for handle in self.handles:
            handle.remove()
        for block in self.blocks:
            if isinstance(vars(block).get("_gradient_checkpointing_func"), TaskCheckpoint):
                block._gradient_checkpointing_func = block._gradient_checkpointing_func.checkpoint

    def enter(self, module: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook: check `task_ids` and hand them to the layers."""
        state = self.state
        if self.is_base or any(entry is self for entry, _ in state.calls):
            state.calls.clear()  # nothing runs inside itself: what is there was left behind by an interrupt
        inherited = state.calls[-1][1] if state.calls else None
        state.calls.append((self, inherited))
        if self.is_base:
            state.sync()
        self._wrap_checkpoints()
        if kwargs.get("task_ids") is not None:
            if state.merged_task() is not None:
                raise ValueError(
                    f"`task_ids` was given while the task {state.merged_task()!r} is merged into the weights; "
                    "call `unmerge_adapter` first, or leave `task_ids` out."
                )
            ids = state.resolve(kwargs["task_ids"], _batch_size(module, args, kwargs), check_values=inherited is None)
            state.calls[-1] = (self, ids)
        elif self.is_base:
            kwargs = self._with_tasks(args, kwargs)
        if "task_ids" not in self.parameters:
            kwargs = {name: value for name, value in kwargs.items() if name != "task_ids"}
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output):
        """Forward hook, called after an exception too: restore what was before."""
        if self.state.calls and self.state.calls[-1][0] is self:
            self.state.calls.pop()

    def _wrap_checkpoints(self) -> None:
        for block in self.blocks:
            function = vars(block).get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, TaskCheckpoint):
                block._gradient_checkpointing_func = TaskCheckpoint(function, self.state)

    def _with_tasks(self, args: tuple, kwargs: dict) -> dict:
        """For a base with heads whose forward takes `tasks`: None means what is chosen, or else what is served."""
        state = self.state
        if "tasks" not in self.parameters or kwargs.get("tasks") is not None or not state.head_names:
            return kwargs
        if len(args) > self.parameters.index("tasks"):
            return kwargs
        adapters = [name for name in state.adapters_in_use() if state.depends_on_task(name)]
        chosen = {state.task_names[name][state.selected_index(name)] for name in adapters if name in state.selected}
        chosen |= {state.merged_task()} - {None}
        served = set(state.head_names).intersection(*(state.served(name) for name in adapters))
        tasks = [name for name in state.head_names if name in (chosen or served)]
        return kwargs if tasks in ([], state.head_names) else {**kwargs, "tasks": tasks}


def _batch_size(module: nn.Module, args: tuple, kwargs: dict) -> int | None:
    """The leading size of the model's main input, or else of the first tensor given; None if there is none.

    A model of transformers that is given none at all, not in a list or dict either, takes one sample at a time: a
    frame out of a video session.
    """
    of_transformers = isinstance(module, PreTrainedModel)
    main = kwargs.get(module.main_input_name) if of_transformers else None
    values = (main, *args, *(value for name, value in kwargs.items() if name != "task_ids"))
    for value in values:
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            return value.shape[0]
    containers = any(isinstance(value, (list, tuple, Mapping)) for value in values)
    return 1 if of_transformers and not containers else None


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
