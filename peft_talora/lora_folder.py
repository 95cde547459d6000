"""Reading a stock LoRA folder: what is a low-rank update of linear layers is taken, all else is refused."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftType
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file

from .files import check_safetensors, same_files
from .hub import HEAD_NAME, MSAM_CONFIG_NAME, PROCESSOR_NAME, WEIGHTS_NAME, fetch

PREFIX = "base_model.model."
_LORA_WEIGHT = re.compile(rf"{re.escape(PREFIX)}(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
# What a LoRA's configuration may say: all else must be as in a new one, for it would change what the weights mean.
_UNDERSTOOD = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Others subtract from the base weights what they start with.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class LoraFolder:
    """What was read of one LoRA folder.

    Attributes:
        config: Its configuration.
        base: Its base model: a full path, or a Hub id.
        dtype: Of the factors, float32 at least.
        layers: Per layer A (ρ, D_in) and B (D_out, ρ), the scaling in B.
        others: Weights beside these, heads apart, as they are called in the file.
        head: The task's head, by the names of `MSamTaskHead`; empty if there is none.
        rebuild: What `msam_config.json` says, the tasks cut down to this one; None if it is not known.
        image_processor: The text of its configuration; None if there is none.
    """

    config: LoraConfig
    base: str
    dtype: torch.dtype
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    others: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    rebuild: dict[str, Any] | None
    image_processor: str | None

    @property
    def saved(self) -> list[str]:
        """Its `modules_to_save`, heads apart."""
        return [name for name in self.config.modules_to_save or [] if not name.startswith("task_heads.")]

    def on_base(self, base: str) -> LoraFolder:
        """This one on another base, where that is a copy of its own; else itself."""
        folders = [name for name in (self.base, base) if name and Path(name).is_dir()]
        if self.base == base or len(folders) < 2 or not same_files(*folders):
            return self
        rebuild = self.rebuild
        if rebuild is not None and rebuild["base_model_name_or_path"] == self.base:
            rebuild = {**rebuild, "base_model_name_or_path": base}
        return replace(self, base=base, rebuild=rebuild)


def read_lora(task: str, path: str | Path) -> LoraFolder:
    """Read one task's LoRA from a folder or the Hub. Raises ValueError and OSError as `from_loras` says."""
    folder = fetch(path)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise OSError(f"{folder / name} is missing: a LoRA is read from its configuration and safetensors only.")
    check_safetensors(folder / WEIGHTS_NAME)
    config = _checked_config(folder)
    state = load_file(folder / WEIGHTS_NAME)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    others, heads = {}, {}
    for name, tensor in state.items():
        match = _LORA_WEIGHT.fullmatch(name)
        if match and tensor.ndim == 2:
            factors.setdefault(match["layer"], {})[match["side"]] = tensor
        elif ".lora_" in name or not name.startswith(PREFIX):
            raise ValueError(f"{folder}: {name} of shape {tuple(tensor.shape)} is no LoRA matrix of a linear layer.")
        elif name.startswith(f"{PREFIX}task_heads."):
            heads[name.removeprefix(f"{PREFIX}task_heads.")] = tensor
        else:
            others[name] = tensor
    if not factors:
        raise ValueError(f"{folder / WEIGHTS_NAME} holds no LoRA matrices; its weights are {sorted(state)[:3]}.")
    layers = {name: _scaled(config, name, pair) for name, pair in factors.items()}
    dtype = torch.promote_types(next(iter(factors.values()))["A"].dtype, torch.float32)
    head, rebuild = _read_head(task, folder, heads)
    processor = folder / PROCESSOR_NAME
    processor = processor.read_text() if processor.is_file() else None
    base = _base(config.base_model_name_or_path, folder)
    return LoraFolder(config, base, dtype, layers, others, head, rebuild, processor)


def _checked_config(folder: Path) -> LoraConfig:
    values = json.loads((folder / CONFIG_NAME).read_text())
    if values.get("peft_type") != PeftType.LORA:
        raise ValueError(f"{folder} holds an adapter of type {values.get('peft_type')!r}; only 'LORA' is taken.")
    config = LoraConfig.from_pretrained(str(folder))
    plain = LoraConfig()
    for field in fields(LoraConfig):
        value = getattr(config, field.name)
        if field.name not in _UNDERSTOOD and value != getattr(plain, field.name):
            raise ValueError(f"{folder}: a LoRA with {field.name}={value!r} is more than a low-rank update.")
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise ValueError(
            f"{folder}: init_lora_weights={config.init_lora_weights!r} changes the base weights; save the adapter "
            "with `path_initial_model_for_weight_conversion`, as PEFT's documentation says."
        )
    return config


def _scaled(config: LoraConfig, layer: str, pair: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    if pair.keys() != {"A", "B"}:
        raise ValueError(f"Layer {layer} has only one of lora_A and lora_B: {sorted(pair)}.")
    if len(pair["A"]) != pair["B"].shape[1]:
        shapes = {f"lora_{side}": tuple(matrix.shape) for side, matrix in pair.items()}
        raise ValueError(f"Layer {layer} has matrices of different ranks: {shapes}.")
    rank = len(pair["A"])
    alphas = config.alpha_pattern
    alpha = alphas.get(get_pattern_key(alphas.keys(), layer), config.lora_alpha)
    scaling = alpha / (rank**0.5 if config.use_rslora else rank)
    return pair["A"].double(), scaling * pair["B"].double()


def _read_head(task: str, folder: Path, heads: dict[str, torch.Tensor]) -> tuple[dict, dict[str, Any] | None]:
    """The task's head and what rebuilds the model around it, of either way in which a folder can hold them."""
    if (folder / HEAD_NAME).is_file():
        check_safetensors(folder / HEAD_NAME)
        with safe_open(folder / HEAD_NAME, framework="pt") as file:
            head = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            metadata = file.metadata() or {}
        if "msam_config" not in metadata:
            raise ValueError(f"{folder / HEAD_NAME} does not say whose head it is: it was not written by `to_lora`.")
        rebuild = json.loads(metadata["msam_config"])
    else:
        head = {name.removeprefix(f"{task}."): x for name, x in heads.items() if name.startswith(f"{task}.")}
        file = folder / MSAM_CONFIG_NAME
        rebuild = json.loads(file.read_text()) if file.is_file() else None
        known = sorted({name.split(".")[0] for name in heads})
        if known and not head:
            raise ValueError(f"{folder} has heads for {known} and none for {task!r}: name the task as the head.")
    if rebuild is None:
        return head, None
    entries = [entry for entry in rebuild["tasks"] if entry["name"] == task]
    if not entries:
        raise ValueError(f"{folder} holds the head of {rebuild['tasks']}, not of {task!r}: name the task as the head.")
    return head, {
        **rebuild,
        "base_model_name_or_path": _base(rebuild["base_model_name_or_path"], folder),
        "tasks": entries,
    }


def _base(base: str | None, folder: Path) -> str:
    """A base checkpoint as a full path, or its Hub id; relative paths start at the adapter's folder."""
    for path in (folder / (base or ""), Path(base or "")):
        if base and path.is_dir():
            return str(path.resolve())
    return base or ""
