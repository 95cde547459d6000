"""The TA-LoRA tuner: which layers it adapts, with which tasks, and how tasks are chosen."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel

from . import grow
from .compatibility import check_bias, resolve_quantization_backend
from .config import MAIN_TASK, TIED_TASKS, UNCOMPRESSED_TASKS, TALoRAConfig, check_task_names
from .convert import add_weighted
from .families import BLOCK_NORMS, DEFAULT_TARGETS, NOT_BY_SAMPLE
from .layer import Linear, TALoRALayer
from .task_state import TaskEntry, TaskState
from .tucker import RelativeErrors

_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)

# PEFT's task-typed models add these to `modules_to_save` whether the base model has them or not.
_PEFT_HEAD_GUESSES = ("classifier", "score", "qa_outputs")


class TALoRAModel(BaseTuner):
    """Puts TA-LoRA into a model's linear layers (https://arxiv.org/abs/2403.10971). [`TALoRALayer`] has the formula.

    Contract with a base model that has a head per task (plain names, so that neither side imports the other):

    1. The base keeps its heads in an `nn.ModuleDict` named `task_heads`; from it the tuner fills in `task_names` and
       `modules_to_save` where the config leaves them None.
    2. The base calls the sub-model that holds the adapted layers as `vision_encoder(pixel_values, task_ids=ids)` only
       while its own attribute `task_conditional` is True, which is False by default.
    3. The tuner sets `task_conditional`: True while an active, enabled, unmerged adapter has more than one task, or
       the task of one head among several. `tasks=None` reaches the base as the tasks that such an adapter serves.
    4. On merging, the tuner sets the base's `merged_task` to the name of the merged task, and to None on unmerging;
       the base refuses other tasks while it is set.
    5. To grow and shrink, the tuner calls the base's `add_task_head(name, kind, channels, start)`, which puts a head
       that starts from the weights of the head `start` last into `task_heads`, `remove_task_head(name)` and
       `rename_task_head(old, new)`; they check before they change anything, and keep the base's own config in step.
       A head has `start_from(head)`, which takes over the weights of another.

    Args:
        model: The model to adapt.
        config: The adapter's configuration (or a dict of them by adapter name).
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Create the adapter's weights on the meta device, to be loaded.
    """

    prefix: str = "talora_"
    tuner_layer_cls = TALoRALayer
    target_module_mapping = DEFAULT_TARGETS

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Add an adapter; see `BaseTuner.inject_adapter`. Hooks the model so that it takes `task_ids`."""
        self._check_adapter_name(model, adapter_name)
        layers = _layers(model)
        self.task_state = layers[0].task_state if layers else TaskState(model, _head_names(model))
        wrapped = {id(module) for module in model.modules() if isinstance(module, _WRAPPERS)}
        trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
        freeze, before_freeze = self.task_state.trained_before, dict(self.task_state.trained_before)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self._take_back(model, adapter_name, wrapped)
            for parameter, requires_grad in trained.items():
                parameter.requires_grad_(requires_grad)
            raise
        finally:  # what PEFT made trainable meanwhile was not so before
            freeze.update({parameter: trained[parameter] for parameter in freeze if parameter in trained})
            freeze.update(before_freeze)
        self._hook(model)
        self.task_state.sync()

    def _take_back(self, model: nn.Module, adapter_name: str, wrapped: set[int]) -> None:
        """Undo an injection that failed: new wrappers give way to what they wrap, the others lose the adapter."""
        for name, module in list(model.named_modules()):
            if not isinstance(module, _WRAPPERS):
                continue
            if id(module) not in wrapped:
                inner = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, inner)
            elif isinstance(module, TALoRALayer):
                module.delete_adapter(adapter_name)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(adapter_name, module.active_adapters)
        self.task_state.layers = _layers(model)
        self.task_state.forget(adapter_name)

    def _hook(self, model: nn.Module) -> None:
        entries = self.task_state.entries
        hooked = {id(entry.module) for entry in entries}
        encoder = dict(model.named_children()).get("vision_encoder") if self.task_state.head_names else None
        for module in model.modules():
            takes_tasks = module is model or module is encoder  # the encoder: contract name 2, of any class
            takes_tasks = takes_tasks or (isinstance(module, PreTrainedModel) and _layers(module))
            if takes_tasks and id(module) not in hooked:
                entries.append(TaskEntry(module, self.task_state))

    def _check_adapter_name(self, model: nn.Module, adapter_name: str) -> None:
        """Refuse names with which PEFT's state dict keys would mistake other parameters for the adapter's."""
        named = [*model.named_modules(), *model.named_parameters()]
        wrapped = [name for name, m in named if isinstance(m, _WRAPPERS)]
        components = {
            part
            for name, _ in named
            if not any(name.startswith(f"{outer}.") for outer in wrapped)
            for part in name.split(".")
        }
        own_tasks = self.peft_config[adapter_name].task_names or _head_names(model) or [MAIN_TASK]
        all_tasks = {*own_tasks, *(name for config in self.peft_config.values() for name in config.task_names or [])}
        if adapter_name in components or adapter_name in all_tasks:
            raise ValueError(
                f"Adapter name {adapter_name!r} is not allowed: a module or parameter of the model or a task has that "
                "name, and saving would mix up their weights. Choose another `adapter_name`."
            )
        taken = [name for name in own_tasks if name in self.peft_config]
        if taken:
            raise ValueError(f"Task names {taken} are not allowed: adapters have these names.")

    def _prepare_adapter_config(self, peft_config: TALoRAConfig, model_config: dict) -> TALoRAConfig:
        """Fill in what the config leaves to the model: targets, tasks, `r_task`, modules to save."""
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if isinstance(peft_config.target_modules, set):
            peft_config.target_modules = sorted(peft_config.target_modules)
        heads = _head_names(self.model)
        if peft_config.task_names is None:
            peft_config.task_names = heads or [MAIN_TASK]
        check_task_names(peft_config.task_names)
        check_bias(peft_config.bias)
        unknown = [name for name in peft_config.task_names if heads and name not in heads]
        if unknown and len(peft_config.task_names) > 1:
            raise ValueError(f"Unknown tasks {unknown} in `task_names`; the model has heads for {heads}.")
        if peft_config.r_task is None:
            peft_config.r_task = min(len(peft_config.task_names), UNCOMPRESSED_TASKS)
        self._prepare_modules_to_save(peft_config, heads)
        self._warn(peft_config)
        return peft_config

    def _prepare_modules_to_save(self, peft_config: TALoRAConfig, heads: list[str] | None) -> None:
        names = [name for name, _ in self.model.named_modules()]
        if peft_config.modules_to_save is None and heads:
            served = [name for name in heads if name in peft_config.task_names]
            peft_config.modules_to_save = [f"task_heads.{name}" for name in served or heads]
        if peft_config.train_norms:
            norms = [name for name in names if BLOCK_NORMS.fullmatch(name)]
            if not norms:
                raise ValueError(
                    f"`train_norms=True`: {type(self.model).__name__} has no vision blocks with norms of known names, "
                    "such as `vision_encoder.layers.N.layer_norm1`. Name its norms in `modules_to_save`."
                )
            saved = peft_config.modules_to_save or []
            peft_config.modules_to_save = [*saved, *(name for name in norms if name not in saved)]
        for entry in peft_config.modules_to_save or []:
            guessed = peft_config.task_type is not None and entry in _PEFT_HEAD_GUESSES
            if not guessed and not any(name.endswith(entry) for name in names):
                raise ValueError(
                    f"`modules_to_save` names {entry!r}, which {type(self.model).__name__} does not have: its "
                    "weights would be lost. An adapter with task heads belongs on a model with these heads."
                )

    def _warn(self, peft_config: TALoRAConfig) -> None:
        r, r_out, r_task = peft_config.r, peft_config.r_out or peft_config.r, peft_config.r_task
        num_tasks = len(peft_config.task_names)
        if num_tasks > 1 and r_task == 1:
            warnings.warn(TIED_TASKS, stacklevel=2)
        if r > r_out * r_task or r_out > r * r_task:
            warnings.warn(
                f"With r={r}, r_out={r_out} and r_task={r_task} a mode of the core is rank-deficient: neither r nor "
                "r_out should exceed the product of the other two.",
                stacklevel=2,
            )
        if num_tasks > 1 and peft_config.task_type is not None:
            warnings.warn(
                f"With task_type={peft_config.task_type}, PEFT's model drops the keyword `task_ids`: choose the task "
                "by `set_task`, or leave `task_type` out.",
                stacklevel=2,
            )

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        ranks = peft_config.rank_pattern
        usual = [peft_config.r, peft_config.r_out or peft_config.r]
        single = ranks.get(get_pattern_key(ranks.keys(), current_key), usual)
        r, r_out = [single, single] if isinstance(single, int) else single
        alphas = peft_config.alpha_pattern
        alpha = alphas.get(get_pattern_key(alphas.keys(), current_key), peft_config.alpha)
        update = {
            "r": r,
            "r_out": r_out,
            "alpha": r / 2 if alpha is None else alpha,
            "config": peft_config,
            "inference_mode": peft_config.inference_mode,
        }
        self.task_state.task_names[adapter_name] = list(peft_config.task_names)
        try:
            _check_tasks(current_key, peft_config.task_names)
            if isinstance(target, TALoRALayer):
                target.update_layer(adapter_name, **update)
                return
            _check_target(target, parent)
            layer = Linear(target, adapter_name, self.task_state, **update, **get_quantization_kwargs(self))
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from error
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Overridden because the base class copies `weight` and `bias` onto the new module, which a composite module
        # (a task head in `modules_to_save`) does not have (peft issue 3114). `update_layer` sees to the device.
        setattr(parent, child_name, new_module)

    def set_task(self, task: str | int | None, adapter_name: str | None = None) -> None:
        """Choose the task of the following calls, until another is chosen; see the function [`set_task`]."""
        set_task(self.model, task, adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapter(s); see `BaseTuner.set_adapter`."""
        self.task_state.release_freeze()
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self.task_state.sync()

    def enable_adapter_layers(self) -> None:
        """Enable all adapters; see `BaseTuner.enable_adapter_layers`."""
        super().enable_adapter_layers()
        self.task_state.hold_freeze()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the heads that it grew by alone; see `BaseTuner.delete_adapter`."""
        self.task_state.release_freeze()
        super().delete_adapter(adapter_name)
        grow.drop_unserved_heads(self.task_state, self.peft_config)
        self.task_state.sync()

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
        r_out: int | None = None,
        r_task: int | None = None,
        modules_from: str | None = None,
    ) -> RelativeErrors:
        """Add an adapter whose update is the weighted sum of others, task by task. It is not active yet.

        Args:
            adapters: Names of adapters with the same tasks in the same order; ranks, scalings, layers and
                `qkv_parts` may differ.
            weights: One per adapter, finite, of any sign.
            adapter_name: Name of the new adapter.
            combination_type: `"cat"` is exact: factors lie side by side, so ranks add up, though never beyond the
                layer's size or the number of tasks. `"svd"` cuts that to the given ranks by the truncated
                higher-order SVD. LoRA's other types combine factors, which has no meaning for these.
            svd_rank: Rank of the input factor for `"svd"`. None means the largest of the adapters.
            r_out: The same for the output factor. None means `svd_rank`, or else the largest of the adapters.
            r_task: The same for the task factor. None means the largest of the adapters.
            modules_from: The adapter whose modules trained in full (heads, norms) the new one gets a copy of. None
                takes them where they are, which needs adapters that trained the same module to have equal copies.

        Returns:
            The relative error per layer and overall.

        Raises:
            ValueError: For adapters that are unknown, have different tasks or trained biases, a name that is taken,
                an unknown combination type, ranks below 1 or beside `"cat"`, or modules that differ.
        """
        ranks = (svd_rank, r_out, r_task)
        return add_weighted(self, adapters, weights, adapter_name, combination_type, ranks, modules_from)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        # `PeftModel` calls the model within this context. Hooks do not run after an interrupt: what they would have
        # taken back is taken back here.
        depth = len(self.task_state.calls)
        try:
            yield
        finally:
            del self.task_state.calls[depth:]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the selected task, into all layers or, on an error, none; see `BaseTuner.merge_adapter`."""
        self._check_task_selected(adapter_names)
        with self._all_or_none():
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        self.task_state.sync()

    @contextmanager
    def _all_or_none(self):
        """On an error put layers back where they were, merged with what they were merged with."""
        places = [(parent, name, child) for parent in self.model.modules() for name, child in parent.named_children()]
        merged = [(layer, list(layer.merged_adapters)) for layer in self.task_state.layers]
        try:
            yield
        except Exception:
            for parent, name, child in places:
                if parent.get_submodule(name) is not child:
                    setattr(parent, name, child)
            for layer, names in merged:
                if layer.merged_adapters != names:
                    layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise

    def unmerge_adapter(self) -> None:
        """Unmerge what was merged; see `BaseTuner.unmerge_adapter`."""
        super().unmerge_adapter()
        self.task_state.sync()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_task_selected(adapter_names)
        with self._all_or_none():
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self.task_state.trained_only.clear()
        self.task_state.trained_before.clear()
        self.task_state.sync()
        for entry in self.task_state.entries:
            entry.remove()
        if self.task_state.head_names is not None:
            model.task_conditional = False
        return model

    def add_task(
        self,
        name: str,
        *,
        kind: Any = None,
        channels: int | None = None,
        init: str = "zero",
        freeze_others: bool = False,
        adapter_name: str | None = None,
    ) -> None:
        """Give a trained adapter one more task, the last in order: a row in every layer and, with heads, a head.

        The new row mixes the slices of the core that are there: its update lies in their span, and `r_task` stays.
        A zero row is an update of exactly zero. The head's original, as of all heads, is a copy of the first head's
        original, every channel as its first: SAM's decoder, unless the base was saved with trained heads. An adapter
        that all heads share gets a head and no row, since it has one update for all.

        New parameters train if the adapter is active; what was frozen stays frozen. Give them to the optimiser, which
        does not know them, and compile or wrap for several processes afterwards. With `freeze_others`, outputs of the
        other tasks, asked for by name without gradients, stay as they are to the last bit, after training too. From
        one task to two, where the layer begins to choose rows, they stay to rounding; so they do where gradients are
        recorded, since PyTorch then takes other kernels.

        Args:
            name: Of the new task. Where the model has a head of that name (through another adapter), it is used.
            kind: Of the head, a word or an object that the base knows. None is the name. Only for a base with heads.
            channels: Of the head's output. Only for a base with heads.
            init: `"zero"`, or `"copy:<task>"`: row and head start as that task's; of another number of channels, every
                channel starts as that task's first.
            freeze_others: Train nothing but this task, until [`train_only`] says otherwise.
            adapter_name: The adapter; None means the active one.

        Raises:
            ValueError: For a name, kind, number of channels or `init` that is not allowed, and while merged. Nothing
                has changed then.
        """
        head = {"kind": kind, "channels": channels}
        grow.add_task(self.task_state, self.peft_config, name, head, init, freeze_others, adapter_name)

    def remove_task(self, name: str, adapter_name: str | None = None) -> None:
        """Remove a task of the adapter (None: the active one): its rows, and its head with the last adapter it has.

        Later tasks move up one position. A selection of the task is taken back. An adapter that is left with one task
        serves that task alone, whatever heads the model has for other adapters.

        Raises:
            ValueError: For an unknown task, the only task, and while merged.
        """
        grow.remove_task(self.task_state, self.peft_config, name, adapter_name)
        if [] in self.task_state.trained_only.values():  # the one task that trained is gone
            self.train_only(None, adapter_name)

    def rename_task(self, old: str, new: str, adapter_name: str | None = None) -> None:
        """Rename a task of the adapter (None: the active one), and its head, then in all adapters that have it.

        Raises:
            ValueError: For an unknown task, a name that is not allowed or taken, and while merged.
        """
        grow.rename_task(self.task_state, self.peft_config, old, new, adapter_name)

    def train_only(self, tasks: str | list[str | int] | None, adapter_name: str | None = None) -> None:
        """Train only what belongs to some tasks alone, their rows and heads, while the adapter is active.

        This holds whatever PEFT makes trainable later (`set_adapter`, `disable_adapter`, another adapter), until the
        next call; None ends it: what it froze trains again, and what was frozen before stays so. It is not saved with
        the adapter.

        Raises:
            ValueError: For an unknown task, and while merged.
        """
        grow.choose_trained(self.task_state, tasks, adapter_name)

    def task_affinity(self, adapter_name: str | None = None) -> grow.TaskAffinity:
        """Cosines between the tasks' rows and between their updates, per layer and overall; see [`TaskAffinity`]."""
        return grow.task_affinity(self.task_state, adapter_name)

    def _check_task_selected(self, adapter_names: list[str] | None) -> None:
        """Before the first layer is merged, so that nothing is half merged."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.task_state.task_names:
                self.task_state.check_selected(name)


def set_task(model: nn.Module, task: str | int | None, adapter_name: str | None = None) -> None:
    """Choose the task of a model's TA-LoRA adapters, as `TALoRAModel.set_task` does.

    Works on a `PeftModel` and on a model that took its adapter through `inject_adapter_in_model` or `add_adapter`.

    Args:
        model: The adapted model.
        task: Name, or position among the heads (of a model without, in the adapter's own list); None takes the
            choice back.
        adapter_name: The adapter to choose for; None means every active one.

    Raises:
        ValueError: If the model has no TA-LoRA adapter, or does not know the task.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no TA-LoRA adapter, so no task can be set.")
    state = layers[0].task_state
    if any(layer.merged for layer in layers):
        warnings.warn("The task cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
    state.select(state.active_adapters() if adapter_name is None else [adapter_name], task)
    state.sync()


@contextmanager
def use_task(model: nn.Module, task: str | int | None, adapter_name: str | None = None):
    """A context in which `task` is chosen; the choice before it is restored at its end. See [`set_task`].

    A choice of an adapter or a task that is gone by then is not restored. A merged model is unmerged, with a warning,
    and stays so.
    """
    layers = _layers(model)
    suspended = layers[0].task_state.suspended if layers else []
    suspended.append(dict(layers[0].task_state.selected) if layers else {})
    try:
        set_task(model, task, adapter_name)
        yield model
    finally:
        before = suspended.pop()
        if layers:
            layers[0].task_state.selected = before


def _layers(model: nn.Module) -> list[TALoRALayer]:
    return [module for module in model.modules() if isinstance(module, TALoRALayer)]


def _head_names(model: nn.Module) -> list[str] | None:
    heads = dict(model.named_children()).get("task_heads")
    return list(heads.keys()) if isinstance(heads, nn.ModuleDict) else None


def _check_tasks(name: str, task_names: list[str]) -> None:
    if len(task_names) > 1 and NOT_BY_SAMPLE.fullmatch(name):
        raise ValueError(
            "the samples are not the slowest axis of this layer's input, so it cannot give each sample its task. "
            f"Leave it out by `exclude_modules`, or give the adapter one task; it has {task_names}."
        )


def _check_target(target: nn.Module, parent: nn.Module) -> None:
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError("`nn.MultiheadAttention` uses the weight of this layer directly, so an update has no effect.")
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, torch.nn.Linear):
        return
    backend = resolve_quantization_backend(base)
    if backend is None or backend.layer_type != "linear":
        raise ValueError(
            f"Target module {target} is not supported. Currently, only `torch.nn.Linear` (optionally quantized) is "
            "supported."
        )
