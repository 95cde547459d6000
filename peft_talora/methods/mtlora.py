"""The baseline `mtlora`: one LoRA shared by the tasks plus one per task, after MTLoRA (arXiv 2403.20320).

For task t a layer computes W x + s · (B A + B_t A_t) x, with the shared A (r × D_in) and B (D_out × r) and the task's
own A_t (r_t × D_in) and B_t (D_out × r_t); s is alpha / r. That is (r + T r_t) (D_in + D_out) numbers. Norms are
shared, each task has its head. MTLoRA itself has task-agnostic and task-specific LoRAs in different layers of a
Swin encoder with outputs of several scales; here every adapted layer has both, since SAM's encoder has one scale.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import SamImageProcessorPil

from ..files import write_aside, write_json
from ..hub import ADAPTER_FILES, MSAM_CONFIG_NAME, WEIGHTS_NAME, rebuild_config
from ..msam import MSamModel
from .adapters import AdapterArguments, lora_config, trained_modules

SHARED = "shared"


def own(task: str) -> str:
    """The name of a task's own LoRA; no task can be called so that it were another's, or the shared one's."""
    return f"own_{task}"


def own_parts(task: str) -> tuple[str, str]:
    """What in the names of parameters says that they are of a task alone: of its head, and of its LoRA."""
    return task, own(task)


def add_loras(model: MSamModel, args: AdapterArguments) -> PeftModel:
    """The shared LoRA, of rank `args.r`, which holds heads and norms, and one of rank `args.r_task` per task."""
    config = lora_config(args, args.r, trained_modules(model, args.train_norms))
    adapted = get_peft_model(model, config, adapter_name=SHARED)
    for task in model.task_names:
        adapted.add_adapter(own(task), lora_config(args, args.r_task or args.r, None))
    activate(adapted, model.task_names[:1])
    return adapted


def activate(model: PeftModel, tasks: Sequence[str]) -> None:
    """Let the shared LoRA and that of the one task in `tasks` take part; all of them stay trained.

    Raises:
        ValueError: For several tasks: an encoder pass serves one.
    """
    if len(tasks) != 1:
        raise ValueError(f"An encoder pass with a LoRA per task serves one task; got {list(tasks)}.")
    model.base_model.set_adapter([SHARED, own(tasks[0])])
    for layer in model.modules():
        if isinstance(layer, LoraLayer):  # PEFT freezes the adapters that are not active
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)


def save_task(
    model: PeftModel, tasks: Sequence[str], folder: Path, image_processor: SamImageProcessorPil | None, card: str
) -> None:
    """Write one task as a stock LoRA folder with its head, as one trained for it alone would be; `load` reads it.

    [B B_t] · [A; A_t], with the scalings in the former, is the sum of both updates: a LoRA of rank r + r_t. The run's
    own base, `base` beside `folder`, is copied into it, so that the folder can move alone.

    Args:
        model: As [`add_loras`] made it.
        tasks: The one task.
        folder: Where to; an adapter that is there is replaced.
        image_processor: Saved beside.
        card: Text of the model card.
    """
    (task,) = tasks
    base, configs = model.get_base_model(), [model.peft_config[name] for name in (SHARED, own(task))]
    shared, single = (
        get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        for name in (SHARED, own(task))
    )
    scalings = [config.lora_alpha / config.r for config in configs]
    state = {}
    for name, tensor in shared.items():
        if name.endswith(".lora_A.weight"):
            tensor = torch.cat([tensor, single[name]])
        elif name.endswith(".lora_B.weight"):
            tensor = torch.cat([scalings[0] * tensor, scalings[1] * single[name]], dim=1)
        elif ".task_heads." in name and f".task_heads.{task}." not in name:
            continue
        state[name] = tensor.detach().cpu().contiguous()
    modules = configs[0].modules_to_save
    rank, rebuild = sum(config.r for config in configs), rebuild_config(base, folder, {task})
    beside = (folder.resolve().parent / "base").resolve()
    holds_base = rebuild["base_model_name_or_path"] == str(beside)
    if holds_base:
        rebuild["base_model_name_or_path"] = "base"
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=configs[0].target_modules,
        modules_to_save=[m for m in modules if not m.startswith("task_heads.") or m == f"task_heads.{task}"],
        base_model_name_or_path=rebuild["base_model_name_or_path"],
        inference_mode=True,
    )
    with write_aside(folder, owned=ADAPTER_FILES) as aside:
        if holds_base:
            shutil.copytree(beside, aside / "base", copy_function=shutil.copyfile)
        config.save_pretrained(aside)
        save_file(state, aside / WEIGHTS_NAME, metadata={"format": "pt"})
        write_json(aside / MSAM_CONFIG_NAME, rebuild)
        if image_processor is not None:
            image_processor.save_pretrained(aside)
        (aside / "README.md").write_text(card)
