"""One adapter of a model as a PEFT folder: written whatever its name, read with every doubt said by an error."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file, save_file

from ..files import check_safetensors, write_aside, write_json
from ..hub import WEIGHTS_NAME, locate


def save_peft_folder(model: PeftModel, name: str, folder: Path, beside: Mapping[str, Any] | None = None) -> None:
    """Write one adapter; files of other kinds that are there stay.

    Args:
        model: What has the adapter.
        name: Of the adapter.
        folder: Where to; created if need be. A base checkpoint inside it is named by its relative path.
        beside: What is written beside as JSON, by the files' names.
    """
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    base = model.get_base_model()
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    config.base_model_name_or_path = locate(base.config._name_or_path, folder) or None
    origin = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    with write_aside(folder, owned=(CONFIG_NAME, WEIGHTS_NAME)) as aside:
        config.save_pretrained(aside, auto_mapping_dict=origin if config.task_type is None else None)
        save_file(state, aside / WEIGHTS_NAME, metadata={"format": "pt"})
        for file, content in (beside or {}).items():
            write_json(aside / file, content)


def read_peft_folder(folder: Path) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of a PEFT folder. Raises OSError, naming the file, if one is missing or damaged."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise OSError(f"{file} is missing.")
    check_safetensors(folder / WEIGHTS_NAME)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise OSError(f"{file}: no configuration of an adapter: {error!r}") from error
    return config, load_file(folder / WEIGHTS_NAME)


def fill(model: PeftModel, name: str, state: dict[str, torch.Tensor], file: Path) -> None:
    """Put saved weights into an adapter. Raises ValueError, before any is changed, unless they are exactly its own."""
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    check_same_tensors(state, own, file)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


def check_same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], file: Path) -> None:
    """Raise ValueError, naming the file, unless the names and shapes of two sets of tensors are the same."""
    missing, left_over = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or left_over:
        raise ValueError(
            f"{file} does not fit the model: missing are {len(missing)} weights, such as {missing[:2]}; left over "
            f"are {len(left_over)}, such as {left_over[:2]}."
        )
    for key, tensor in wanted.items():
        if found[key].shape != tensor.shape:
            shapes = tuple(found[key].shape), tuple(tensor.shape)
            raise ValueError(f"{file} does not fit the model: {key} has the shape {shapes[0]}; needed is {shapes[1]}.")
