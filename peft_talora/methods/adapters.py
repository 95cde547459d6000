"""From an mSAM to one with an adapter of a kind: TA-LoRA, PEFT's LoRA, or none but modules that are trained in full.

All of them train the heads as `modules_to_save`; where the layer norms are trained, they are the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from ..msam import MSamModel
from ..tuner import TALoRAConfig
from ..tuner.config import QKV_PARTS
from ..tuner.families import BLOCK_NORMS


@dataclass
class AdapterArguments:
    """What is trained, and how; which of these a method reads is said by its `Method`."""

    method: str = field(
        default="talora",
        metadata={
            "help": "'talora'; 'lora-stl', a LoRA per task; 'lora-hps', one LoRA for all; 'mtlora', one for all and "
            "one per task; 'full-stl' and 'full-hps', the whole encoder; 'heads', the heads alone."
        },
    )
    r: int = field(default=16, metadata={"help": "Rank: of TA-LoRA's factors, or of a LoRA."})
    r_task: int | None = field(
        default=None,
        metadata={
            "help": "talora: rank of the task factor. None: tasks, up to four. mtlora: rank of a task's own LoRA. "
            "None: r."
        },
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Updates are scaled by alpha / r. None: r / 2 for talora, r for LoRA."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the updates."})
    target_modules: str = field(
        default=r".*vision_encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])",
        metadata={"help": "Layers to adapt, a regular expression: all linears of the blocks; the paper has qkv."},
    )
    train_norms: bool = field(default=True, metadata={"help": "Train the layer norms of the encoder's blocks too."})
    init_weights: str = field(
        default="lora", metadata={"help": "talora: 'lora', a LoRA that all tasks share; 'orthogonal' or 'gaussian'."}
    )
    qkv_parts: list[str] = field(
        default_factory=lambda: list(QKV_PARTS),
        metadata={"help": "talora: thirds of the fused layer to update, of q, k and v, with fitting target_modules."},
    )
    orthogonality: float = field(
        default=0.0,
        metadata={"help": "talora: weight of the regulariser that keeps the factors' columns orthonormal."},
    )


def add_talora(model: MSamModel, args: AdapterArguments) -> PeftModel:
    """One TA-LoRA over all tasks. Raises ValueError as `TALoRAConfig` does."""
    config = TALoRAConfig(
        r=args.r,
        r_task=args.r_task,
        alpha=args.alpha,
        dropout=args.dropout,
        target_modules=args.target_modules,
        train_norms=args.train_norms,
        init_weights=args.init_weights,
        qkv_parts=args.qkv_parts,
    )
    return get_peft_model(model, config)


def add_lora(model: MSamModel, args: AdapterArguments) -> PeftModel:
    """One stock LoRA, started as PEFT starts it, of the scaling 1 unless `alpha` says otherwise."""
    return get_peft_model(model, lora_config(args, args.r, trained_modules(model, args.train_norms)))


def add_nothing(model: MSamModel, args: AdapterArguments) -> PeftModel:
    """No layer is adapted, the encoder stays frozen: the heads alone are trained."""
    return get_peft_model(model, _no_layers(_heads(model)))


def unfreeze_encoder(model: MSamModel, args: AdapterArguments) -> PeftModel:
    """The whole encoder is trained, patch embedding, positions and neck included, as one of the modules to save.

    PEFT keeps the original of such a module for `disable_adapter`. It is let go here, else training would hold the
    encoder twice: the model cannot be used with its adapter disabled. One that is loaded again can, and holds both.
    """
    adapted = get_peft_model(model, _no_layers(["vision_encoder", *_heads(model)]))
    model.vision_encoder.original_module = Released()
    return adapted


class Released(nn.Module):
    """Stands where the original of a module trained in full was."""

    def forward(self, *args, **kwargs):
        """Raise RuntimeError."""
        raise RuntimeError(
            "The original of this module, which is trained in full, was not kept: save the model and load it by "
            "`peft_talora.load` to use it with its adapter disabled."
        )


def lora_config(args: AdapterArguments, r: int, modules_to_save: list[str] | None) -> LoraConfig:
    """A LoRA of rank `r`; its scaling is that of a LoRA of rank `args.r`, alpha / r, or 1."""
    scaling = 1 if args.alpha is None else args.alpha / args.r
    return LoraConfig(
        r=r,
        lora_alpha=scaling * r,
        lora_dropout=args.dropout,
        target_modules=args.target_modules,
        modules_to_save=modules_to_save,
    )


def trained_modules(model: MSamModel, train_norms: bool) -> list[str]:
    """The modules that are trained in full beside an adapter: the heads, and the layer norms of the blocks."""
    norms = [name for name, _ in model.named_modules() if train_norms and BLOCK_NORMS.fullmatch(name)]
    return [*_heads(model), *norms]


def _heads(model: MSamModel) -> list[str]:
    return [f"task_heads.{name}" for name in model.task_heads]


def _no_layers(modules_to_save: list[str]) -> LoraConfig:
    return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=modules_to_save)
