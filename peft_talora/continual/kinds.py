"""The kinds of adapters that a domain can have, by name."""

from __future__ import annotations

from peft import LoraConfig, PeftConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import PreTrainedModel, SamHQModel

from ..msam import MSamModel
from ..tuner import TALoRAConfig
from .adapters import DomainAdapters, StockAdapters
from .bottleneck import BottleneckConfig
from .hq import BRANCH
from .shared_factors import SharedFactorAdapters

KINDS = ("lora", "talora", "adapter", "decoder", "hq")
BLOCK_LINEARS = r".*vision_encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])"
"""All linear layers of the encoder's blocks, as a regular expression."""


def domain_config(kind: str, model: PreTrainedModel, r: int = 16) -> PeftConfig:
    """The configuration of a domain's adapter.

    Args:
        kind: `"lora"` and `"talora"` adapt all linear layers of the encoder's blocks; `"adapter"` sets a bottleneck
            beside the last layer of every block's MLP; `"decoder"` trains the mask decoder (of an mSAM all heads) in
            full; `"hq"` trains SAM-HQ's branch.
        model: What it is for.
        r: Rank of a LoRA or of TA-LoRA's factors; width of the bottleneck; not used by the last two.

    Raises:
        ValueError: For an unknown kind, or `"hq"` for a model that is no SAM-HQ.
    """
    if kind == "lora":
        return LoraConfig(r=r, lora_alpha=r, target_modules=BLOCK_LINEARS)
    if kind == "talora":
        return TALoRAConfig(r=r, target_modules=BLOCK_LINEARS, modules_to_save=[])
    if kind == "adapter":
        return BottleneckConfig(r=r)
    if kind == "decoder":
        heads = [f"task_heads.{name}" for name in model.task_heads] if isinstance(model, MSamModel) else []
        return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=heads or ["mask_decoder"])
    if kind != "hq":
        raise ValueError(f"`kind` must be one of {list(KINDS)}; got {kind!r}.")
    if not isinstance(model, SamHQModel):
        raise ValueError(f"`kind`='hq' needs a SamHQModel, which has the branch; got a {type(model).__name__}.")
    branch = [f"mask_decoder.{name}" for name in BRANCH]
    return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=branch)


def make_adapters(base: PreTrainedModel, config: PeftConfig) -> DomainAdapters:
    """What keeps all domains' adapters if one has this configuration: TA-LoRA's share factors, others nothing."""
    return SharedFactorAdapters(base) if isinstance(config, TALoRAConfig) else StockAdapters(base)
