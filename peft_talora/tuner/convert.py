"""Adapters made out of other adapters: between the layers of a model and the algebra of `tucker.py`.

A new adapter, wherever it goes, is described by one `Tucker` per layer; its configuration and its weights follow from
these. All is computed in float64 on the CPU, since the factors are small.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .config import QKV_PARTS, TALoRAConfig
from .layer import TALoRALayer
from .tucker import Ranks, RelativeErrors, Tucker, check_ranks, relative_errors

# What `alpha=None` means at every rank, so that a new adapter needs no alpha at all.
_SCALING = 0.5


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, TALoRALayer]:
    """The layers of one adapter, by their names in `model`."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TALoRALayer)}
    return {name: layer for name, layer in layers.items() if adapter_name in layer.talora_core}


def tucker_of(layer: TALoRALayer, adapter_name: str) -> Tucker:
    """A layer's update over all tasks, its scaling in the core; zero in the rows of disabled `qkv_parts`."""
    rows = layer.talora_task[adapter_name]
    parameters = [
        layer.talora_core[adapter_name],
        layer.output_factor(adapter_name),
        layer.talora_in[adapter_name],
        torch.stack([rows[name] for name in layer.task_state.task_names[adapter_name]]),
    ]
    core, *factors = (parameter.detach().to("cpu", torch.float64) for parameter in parameters)
    return Tucker(layer.scaling[adapter_name] * core, *factors)


def exact_names(names: Sequence[str]) -> str:
    """A `target_modules` that matches these modules and no other; a list would match them as endings, too."""
    return "|".join(re.escape(name) for name in names)


def exact_name(name: str) -> str:
    """A key of `rank_pattern` and `alpha_pattern` for this module and no other, where PEFT matches any ending."""
    return f"^{re.escape(name)}"


def describe(tensors: Mapping[str, Tucker], task_names: Sequence[str], **values) -> TALoRAConfig:
    """The configuration of an adapter with these layers; `values` are what they do not tell."""
    ranks = {name: [tensor.core.shape[1], tensor.core.shape[0]] for name, tensor in tensors.items()}
    most = [max(sizes) for sizes in zip(*ranks.values(), strict=True)]
    return TALoRAConfig(
        task_names=list(task_names),
        r=most[0],
        r_out=most[1],
        r_task=max(tensor.core.shape[2] for tensor in tensors.values()),
        target_modules=exact_names(list(tensors)),
        rank_pattern={exact_name(name): sizes for name, sizes in ranks.items() if sizes != most},
        **values,
    )


def weights_of(tensor: Tucker, config: TALoRAConfig) -> dict[str, torch.Tensor]:
    """A layer's parameters, named as in a state dict, for an adapter of this configuration."""
    core, task_factor = tensor.core, tensor.task_factor
    spare = config.r_task - core.shape[2]
    if spare:  # one r_task serves all layers; where a layer needs less, its task factor may still learn more
        core = nn.functional.pad(core, (0, spare))
        complement = torch.linalg.qr(task_factor, mode="complete").Q[:, task_factor.shape[1] :]
        task_factor = torch.cat([task_factor, complement[:, :spare]], dim=1)
    weights = {"talora_in": tensor.in_factor, "talora_out": tensor.out_factor, "talora_core": core / _SCALING}
    weights |= {f"talora_task.{task}": row for task, row in zip(config.task_names, task_factor, strict=True)}
    return {name: weight.contiguous() for name, weight in weights.items()}


def compress(
    model: PeftModel,
    r: int,
    r_out: int | None = None,
    r_task: int | None = None,
    adapter_name: str | None = None,
    new_adapter_name: str = "compressed",
) -> RelativeErrors:
    """Add a smaller copy of a trained adapter to the model, by the truncated higher-order SVD of every layer.

    Exact where the ranks are those that the adapter makes use of. The trained modules (heads, norms) are copied; the
    new adapter is not active yet.

    Args:
        model: A `PeftModel` with a TA-LoRA adapter.
        r: Rank of the input factor, at the most.
        r_out: Rank of the output factor, at the most. None means `r`.
        r_task: Rank of the task factor, at the most. None leaves it as it is.
        adapter_name: The adapter to compress; None means the active one.
        new_adapter_name: Name of the smaller adapter.

    Returns:
        The relative error per layer and overall.

    Raises:
        ValueError: For a rank below 1, an unknown adapter, one with trained biases (which PEFT allows one adapter of a
            model only), or a name that is taken.
    """
    check_ranks(r=r, r_out=r_out, r_task=r_task)
    name = single_adapter(model) if adapter_name is None else adapter_name
    return model.base_model.add_weighted_adapter([name], [1.0], new_adapter_name, "svd", r, r_out, r_task)


def single_adapter(model: PeftModel) -> str:
    """The active adapter. Raises ValueError if there are several."""
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"The active adapters are {model.active_adapters}, of which one is meant here: activate it by "
            "`set_adapter`, or name it where there is an argument `adapter_name`."
        )
    return model.active_adapters[0]


def add_weighted(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    ranks: tuple[int | None, int | None, int | None],
    modules_from: str | None,
) -> RelativeErrors:
    """What `TALoRAModel.add_weighted_adapter` says; `ranks` are those of input, output and task factor."""
    _check(tuner, adapters, weights, adapter_name, combination_type, modules_from)
    _check_limits(combination_type, *ranks)
    configs = [tuner.peft_config[name] for name in adapters]
    saved = _modules_to_save(tuner.model, adapters, modules_from)
    parts = [part for part in QKV_PARTS if any(part in config.qkv_parts for config in configs)]
    layers = {name: adapted_layers(tuner.model, name) for name in adapters}
    exact = {}
    for name in dict.fromkeys(name for adapted in layers.values() for name in adapted):
        own = {adapter: adapted[name] for adapter, adapted in layers.items() if name in adapted}
        tensors = [_enabled(tucker_of(layer, adapter), parts) for adapter, layer in own.items()]
        exact[name] = Tucker.weighted_sum(tensors, [weights[adapters.index(adapter)] for adapter in own])
    if combination_type == "cat":
        tensors = {name: tensor.fitted() for name, tensor in exact.items()}
    else:
        limits = _limits(configs, layers, *ranks)
        tensors = {name: tensor.truncated(limits) for name, tensor in exact.items()}
    first = configs[0]
    config = describe(
        tensors,
        first.task_names,
        qkv_parts=parts,
        modules_to_save=list(saved),
        dropout=first.dropout,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
    )
    _inject(tuner, adapter_name, config)
    for name, layer in adapted_layers(tuner.model, adapter_name).items():
        _fill(layer, adapter_name, weights_of(tensors[name], config))
        layer.talora_dropout[adapter_name].train(tuner.model.training)  # new modules start in training mode
    for wrapper, source in saved.values():
        copied = wrapper.modules_to_save[adapter_name].train(tuner.model.training)
        copied.load_state_dict(wrapper.modules_to_save[source].state_dict())
    return relative_errors(exact, tensors)


def _check(tuner, adapters, weights, adapter_name, combination_type, modules_from) -> None:
    if combination_type not in ("cat", "svd"):
        raise ValueError(f"`combination_type` must be 'cat' or 'svd'; got {combination_type!r}.")
    if not adapters or len(set(adapters)) < len(adapters) or len(weights) != len(adapters):
        raise ValueError(f"Give different adapters and a weight for each; got {adapters} and {weights}.")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"`weights` must be finite numbers; got {weights}.")
    unknown = [name for name in adapters if name not in tuner.peft_config]
    if unknown:
        raise ValueError(f"Unknown adapters {unknown}; the TA-LoRA adapters are {list(tuner.peft_config)}.")
    if modules_from not in (None, *adapters):
        raise ValueError(f"`modules_from` must be None or one of {adapters}; got {modules_from!r}.")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"`adapter_name`={adapter_name!r} is taken; the adapters are {list(tuner.peft_config)}.")
    biases = {name: tuner.peft_config[name].bias for name in adapters}
    if set(biases.values()) != {"none"}:
        raise ValueError(
            f"`bias` of the adapters is {biases}; allowed: 'none'. Biases are trained in the base model itself, and "
            "PEFT lets one adapter only have them, so no other adapter can be made that has the same update."
        )
    tasks = {name: tuner.peft_config[name].task_names for name in adapters}
    if any(names != tasks[adapters[0]] for names in tasks.values()):
        raise ValueError(f"Only adapters of the same tasks in the same order can be added up; got {tasks}.")


def _check_limits(combination_type: str, r: int | None, r_out: int | None, r_task: int | None) -> None:
    given = {"svd_rank": r, "r_out": r_out, "r_task": r_task}
    check_ranks(**given)
    given = {name: rank for name, rank in given.items() if rank is not None}
    if combination_type == "cat" and given:
        raise ValueError(f"`combination_type='cat'` keeps all ranks, but {given} was given; 'svd' cuts to ranks.")


def _limits(configs, layers, r: int | None, r_out: int | None, r_task: int | None) -> Ranks:
    """The ranks at which "svd" cuts, of output, input and task factor."""
    every = [(layer.r[name], layer.r_out[name]) for name, adapted in layers.items() for layer in adapted.values()]
    largest = [max(sizes) for sizes in zip(*every, strict=True)]
    return r_out or r or largest[1], r or largest[0], r_task or max(config.r_task for config in configs)


def _modules_to_save(
    model: nn.Module, adapters: Sequence[str], modules_from: str | None
) -> dict[str, tuple[ModulesToSaveWrapper, str]]:
    """The modules that the new adapter gets, by name: the wrapper, and the adapter whose copy it is."""
    found = {}
    for name, wrapper in model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        sources = [adapter for adapter in adapters if adapter in wrapper.modules_to_save]
        sources = [adapter for adapter in sources if modules_from in (None, adapter)]
        states = [wrapper.modules_to_save[adapter].state_dict() for adapter in sources]
        if any(not torch.equal(state[key], states[0][key]) for state in states[1:] for key in state):
            raise ValueError(
                f"The adapters {sources} trained the module {name!r} to different weights, which have no sum: say by "
                "`modules_from` whose modules the new adapter gets."
            )
        if sources:
            found[name] = wrapper, sources[0]
    return found


def _enabled(tensor: Tucker, parts: Sequence[str]) -> Tucker:
    """The rows of the enabled thirds of a fused layer only."""
    if len(parts) == len(QKV_PARTS):
        return tensor
    thirds = zip(QKV_PARTS, tensor.out_factor.chunk(len(QKV_PARTS)), strict=True)
    return replace(tensor, out_factor=torch.cat([third for part, third in thirds if part in parts]))


def _inject(tuner: BaseTuner, adapter_name: str, config: TALoRAConfig) -> None:
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except Exception:
        del tuner.peft_config[adapter_name]
        raise


def _fill(layer: TALoRALayer, adapter_name: str, weights: Mapping[str, torch.Tensor]) -> None:
    rows = layer.talora_task[adapter_name]
    parameters = {name: getattr(layer, name)[adapter_name] for name in ("talora_in", "talora_out", "talora_core")}
    parameters |= {f"talora_task.{task}": rows[task] for task in layer.task_state.task_names[adapter_name]}
    # In the precision of the other adapters: PEFT keeps adapters in float32 on a half-precision base.
    dtype = next(core.dtype for name, core in layer.talora_core.items() if name != adapter_name)
    for name, parameter in parameters.items():
        parameter.data = weights[name].to(parameter.device, dtype)
