"""From TA-LoRA to stock LoRA folders and back.

`to_lora` writes one task of an adapter as a folder that needs PEFT alone; `from_loras` makes one TA-LoRA folder of T
LoRA folders. Both work layer by layer on the small factors, see `tuner/tucker.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file

from .files import write_aside, write_json
from .hub import ADAPTER_FILES, HEAD_NAME, MSAM_CONFIG_NAME, PROCESSOR_NAME, WEIGHTS_NAME, locate, rebuild_config
from .lora_folder import PREFIX, LoraFolder, read_lora
from .msam import MSamModel
from .tuner.config import check_task_names
from .tuner.convert import adapted_layers, describe, exact_name, exact_names, single_adapter, tucker_of, weights_of
from .tuner.task_state import task_index
from .tuner.tucker import RelativeErrors, Tucker, check_ranks, relative_errors


def to_lora(model: PeftModel, task: str | int, folder: str | Path, adapter_name: str | None = None) -> None:
    """Write one task of a TA-LoRA adapter as a stock LoRA folder, exactly; it loads without this package.

    ΔW_t = s · U C_t Vᵀ becomes B A of rank min(r_out, r) with the scaling 1. Of an mSAM the folder is for the encoder
    of a stock `SamModel` or `SamVisionModel` (of a `SamHQModel` if that is the base), and the task's head is written
    beside it as `head.safetensors`. Modules trained in full and biases go along, as PEFT saves them. Half-precision
    factors are written in float32, for the products would be rounded. (PEFT's own `convert_to_lora` exports the
    selected task too, by an SVD of the dense update, but it loses modules made of several, such as heads.)

    Args:
        model: A `PeftModel` with a TA-LoRA adapter, merged or not.
        task: Name or position in the adapter's `task_names`; with an adapter of one task, which all heads share, name
            or position of a head.
        folder: Where to; created if need be. An adapter that is there is replaced; other files stay.
        adapter_name: The adapter; None means the active one.

    Raises:
        ValueError: For an unknown task or adapter, another method, or an adapter that has layers in the heads.
    """
    adapter_name = single_adapter(model) if adapter_name is None else adapter_name
    config = model.peft_config.get(adapter_name)
    if config is None or config.peft_type != PeftType.TALORA:
        known = {name: config.peft_type.value for name, config in model.peft_config.items()}
        raise ValueError(f"{adapter_name!r} is no TA-LoRA adapter of the model; its adapters are {known}.")
    base, folder = model.get_base_model(), Path(folder)
    heads = list(base.task_heads) if isinstance(base, MSamModel) else []
    names = config.task_names
    if heads and len(names) == 1 and names[0] not in heads:  # all heads share the adapter
        index, head = 0, heads[task_index(task, heads)]
    else:
        index = task_index(task, names)
        head = names[index]
    layers = adapted_layers(base, adapter_name)
    in_heads = [name for name in layers if name.startswith("task_heads.")]
    if in_heads:
        raise ValueError(f"The adapter has layers in the heads, which a stock SAM does not have: {in_heads}.")
    state = {}
    for name, layer in layers.items():
        dtype = torch.promote_types(layer.talora_in[adapter_name].dtype, torch.float32)
        for side, factor in zip("AB", tucker_of(layer, adapter_name).lora(index), strict=True):
            state[f"{PREFIX}{name}.lora_{side}.weight"] = factor.to(dtype).contiguous()
    ranks = {name: len(state[f"{PREFIX}{name}.lora_A.weight"]) for name in layers}
    others = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    for name, tensor in others.items():
        if ".talora_" not in name and not name.startswith(f"{PREFIX}task_heads."):
            state[name] = tensor.detach().cpu().contiguous()
    path = base.config._name_or_path if heads else config.base_model_name_or_path or ""
    with write_aside(folder, owned=ADAPTER_FILES) as aside:
        _lora_config(base, adapter_name, config, ranks, locate(path, folder)).save_pretrained(aside)
        save_file(state, aside / WEIGHTS_NAME, metadata={"format": "pt"})
        if head in heads:
            _save_head(base, adapter_name, head, rebuild_config(base, folder), aside / HEAD_NAME)


def _lora_config(base, adapter_name: str, config, ranks: dict[str, int], path: str) -> LoraConfig:
    most = max(ranks.values())
    others = {exact_name(name): rank for name, rank in ranks.items() if rank != most}
    wrappers = {name: module for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    saved = [name for name, wrapper in wrappers.items() if adapter_name in wrapper.modules_to_save]
    return LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=exact_names(list(ranks)),
        modules_to_save=[name for name in saved if not name.startswith("task_heads.")] or None,
        bias=config.bias.replace("talora", "lora"),
        task_type=config.task_type,
        base_model_name_or_path=path,
        inference_mode=True,
    )


def _save_head(base: MSamModel, adapter_name: str, task: str, rebuild: dict[str, Any], file: Path) -> None:
    head = base.task_heads[task]
    if isinstance(head, ModulesToSaveWrapper):
        trained = adapter_name in head.modules_to_save
        head = head.modules_to_save[adapter_name] if trained else head.original_module
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    rebuild = {**rebuild, "tasks": [entry for entry in rebuild["tasks"] if entry["name"] == task]}
    save_file(state, file, metadata={"format": "pt", "msam_config": json.dumps(rebuild)})


def from_loras(
    loras: Mapping[str, str | Path],
    folder: str | Path,
    r: int | None = None,
    r_out: int | None = None,
    r_task: int | None = None,
    modules_from: str | None = None,
) -> RelativeErrors:
    """Make one TA-LoRA adapter folder of T trained LoRAs, by the truncated higher-order SVD of their stacked updates.

    Computed on the small factors by QR, never on the dense updates. With all ranks None the result is exact: the ranks
    of a layer then add up over the tasks (up to the layer's size). The heads come along where each LoRA has its task's
    in `modules_to_save` or in `head.safetensors`, as do the image processor and an `msam_config.json` for
    `peft_talora.load` where all folders tell what goes into it. Heads of other tasks stay behind.

    Args:
        loras: Folder or Hub id of a LoRA per task, in the order of the tasks; all of the same layers of one base
            model. Ranks and scalings may differ. Only safetensors files are read.
        folder: Where to; created if need be. An adapter that is there is replaced; other files stay.
        r: Rank of the input factor, in layers that have more. None cuts nothing off.
        r_out: The same for the output factor. None means `r`.
        r_task: The same for the task factor.
        modules_from: The task whose norms, other modules trained in full and biases all tasks get, since a TA-LoRA
            adapter shares these. None needs them to be equal.

    Returns:
        The relative error of the update per layer and overall.

    Raises:
        ValueError: For a rank below 1, LoRAs of different layers, bases or image processors, one that is more than two
            matrices per linear layer (DoRA, embeddings, convolutions, ...), a missing head, or norms that differ.
        OSError: If a file is missing or damaged.
    """
    check_ranks(r=r, r_out=r_out, r_task=r_task)
    if modules_from not in (None, *loras):
        raise ValueError(f"`modules_from` must be None or one of the tasks {list(loras)}; got {modules_from!r}.")
    parts = read_loras(loras)
    first, folder = next(iter(parts.values())), Path(folder)
    exact = stacked(parts)
    tensors = {name: tensor.truncated((r_out or r, r, r_task)) for name, tensor in exact.items()}
    shared = parts[modules_from] if modules_from else _only_one(parts)
    heads = _heads(parts)
    config = describe(
        tensors,
        list(parts),
        modules_to_save=[*(f"task_heads.{task}" for task in heads), *shared.saved],
        bias=shared.config.bias.replace("lora", "talora"),
        task_type=shared.config.task_type,
        base_model_name_or_path=locate(first.base, folder),
        inference_mode=True,
    )
    state = {f"{PREFIX}task_heads.{task}.{name}": x for task, head in heads.items() for name, x in head.items()}
    state |= shared.others
    for layer, tensor in tensors.items():
        weights = weights_of(tensor, config)
        state |= {f"{PREFIX}{layer}.{name}": w.to(first.dtype) for name, w in weights.items()}
    rebuild = _rebuild_config(parts, folder) if heads else None
    processor = _image_processor(parts)
    with write_aside(folder, owned=ADAPTER_FILES) as aside:
        config.save_pretrained(aside)
        save_file(state, aside / WEIGHTS_NAME, metadata={"format": "pt"})
        if rebuild is not None:
            write_json(aside / MSAM_CONFIG_NAME, rebuild)
        if processor is not None:
            (aside / PROCESSOR_NAME).write_text(processor)
    return relative_errors(exact, tensors)


def read_loras(loras: Mapping[str, str | Path]) -> dict[str, LoraFolder]:
    """Read a LoRA per task, all of the same layers of one base model. Raises as [`from_loras`] does.

    Copies of one base, as folders of single tasks hold them, are one base: the first.
    """
    check_task_names(list(loras))
    parts = {task: read_lora(task, path) for task, path in loras.items()}
    base = next(iter(parts.values())).base
    parts = {task: part.on_base(base) for task, part in parts.items()}
    _check_alike(parts)
    return parts


def stacked(parts: Mapping[str, LoraFolder]) -> dict[str, Tucker]:
    """The updates of all tasks as one tensor per layer, exactly."""
    first = next(iter(parts.values()))
    return {name: Tucker.of_loras([part.layers[name] for part in parts.values()]) for name in first.layers}


def _check_alike(parts: Mapping[str, LoraFolder]) -> None:
    first_task, first = next(iter(parts.items()))
    for task, part in parts.items():
        if part.layers.keys() != first.layers.keys():
            differing = sorted(part.layers.keys() ^ first.layers.keys())
            raise ValueError(f"The LoRAs of {first_task!r} and {task!r} differ in their layers: {differing}.")
        for layer, pair in part.layers.items():
            shapes = [(len(b), a.shape[1]) for a, b in (first.layers[layer], pair)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"The LoRAs of {first_task!r} and {task!r} are for layers {layer} of different shapes "
                    f"(D_out, D_in): {shapes[0]} and {shapes[1]}."
                )
        if part.base != first.base:
            raise ValueError(f"The LoRAs have different base models: {first.base!r} and, for {task!r}, {part.base!r}.")


def _only_one(parts: Mapping[str, LoraFolder]) -> LoraFolder:
    """The first, once it is sure that all have the same modules trained in full and the same biases."""
    first_task, first = next(iter(parts.items()))
    for task, part in parts.items():
        keys = part.others.keys() ^ first.others.keys()
        keys |= {
            key for key in part.others.keys() & first.others.keys() if not part.others[key].equal(first.others[key])
        }
        if keys or part.config.bias != first.config.bias:
            names = sorted(key.removeprefix(PREFIX) for key in keys)
            raise ValueError(
                f"The LoRAs of {first_task!r} and {task!r} trained weights that all tasks would share, and differ in "
                f"them: {names}. Say by `modules_from` whose are taken; the other tasks' outputs then change."
            )
    return first


def _heads(parts: Mapping[str, LoraFolder]) -> dict[str, dict[str, torch.Tensor]]:
    without = [task for task, part in parts.items() if not part.head]
    if len(without) == len(parts):
        return {}
    if without:
        raise ValueError(f"The LoRAs of {without} hold no head, the others do; tasks are {list(parts)}.")
    return {task: part.head for task, part in parts.items()}


def _rebuild_config(parts: Mapping[str, LoraFolder], folder: Path) -> dict[str, Any] | None:
    """The common `msam_config.json`, None where a LoRA's is not known."""
    known = {task: part.rebuild for task, part in parts.items()}
    first = next(iter(known.values()))
    if None in known.values():
        return None
    for key in first.keys() - {"tasks"}:
        values = {task: rebuild[key] for task, rebuild in known.items()}
        if any(value != first[key] for value in values.values()):
            raise ValueError(f"The LoRAs' models differ in {key}: {values}.")
    tasks = [entry for rebuild in known.values() for entry in rebuild["tasks"]]
    return {**first, "base_model_name_or_path": locate(first["base_model_name_or_path"], folder), "tasks": tasks}


def _image_processor(parts: Mapping[str, LoraFolder]) -> str | None:
    """The text of the common image processor's configuration, None where a LoRA has none."""
    texts = {task: part.image_processor for task, part in parts.items()}
    if None in texts.values():
        return None
    first = next(iter(texts))
    different = [task for task, text in texts.items() if text != texts[first]]
    if different:
        raise ValueError(f"The image processors of {different} differ from that of {first!r}.")
    return texts[first]
