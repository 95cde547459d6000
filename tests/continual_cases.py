"""What the tests of continual adaptation share: models to adapt, kinds of adapters, a step of training."""

from collections.abc import Callable

import torch
from conftest import IMAGE_SIZE, make_sam
from torch import nn
from transformers import PreTrainedModel

from peft_talora import MSamModel
from peft_talora.continual.adapters import DomainAdapters, StockAdapters
from peft_talora.continual.hq import make_sam_hq
from peft_talora.continual.kinds import domain_config
from peft_talora.continual.shared_factors import SharedFactorAdapters

BOXES = torch.tensor([[[8.0, 8.0, 40.0, 50.0]], [[20.0, 4.0, 60.0, 30.0]]])
KINDS: dict[str, Callable[[PreTrainedModel], DomainAdapters]] = {
    "lora": StockAdapters,
    "adapter": StockAdapters,
    "decoder": StockAdapters,
    "hq": StockAdapters,
    "column": SharedFactorAdapters,
    "row": lambda base: SharedFactorAdapters(base, "row"),
}
STOCK = ["lora", "adapter", "decoder", "hq"]


def make_base(kind: str) -> PreTrainedModel:
    return make_sam_hq(make_sam()) if kind == "hq" else make_sam()


def config_of(kind: str, base: PreTrainedModel, r: int = 4):
    return domain_config("talora" if kind in ("column", "row") else kind, base, r=r)


def adapters_of(kind: str, names: list[str]) -> DomainAdapters:
    """A model with domains of a kind, none of them trained; new adapters are drawn by a seed."""
    base = make_base(kind)
    adapters = KINDS[kind](base)
    torch.manual_seed(3)
    for name in names:
        adapters.add(name, config_of(kind, base))
    return adapters


def masks(base: PreTrainedModel, images: torch.Tensor) -> torch.Tensor:
    return base(images, input_boxes=BOXES, multimask_output=False).pred_masks


@torch.no_grad()
def predict(adapters: DomainAdapters, name: str | None, images: torch.Tensor) -> torch.Tensor:
    """What a domain, or the plain model, says of images: mask logits (2, 1, 1, 32, 32)."""
    adapters.activate(name)
    return masks(adapters.base, images)


def step(adapters: DomainAdapters, name: str, steps: int = 2) -> None:
    """Train a domain on noise. The optimiser has *all* parameters: it decays those that have gradients."""
    adapters.train(name)
    optimizer = torch.optim.AdamW(adapters.base.parameters(), lr=0.01, weight_decay=0.1)
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(len(name)))
    for _ in range(steps):
        optimizer.zero_grad()
        (masks(adapters.base, images) - 1).square().mean().backward()
        optimizer.step()


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters(remove_duplicate=False)}


def changed(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    """Names of the parameters that are not what they were, to the last bit."""
    after = dict(module.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def make_msam(folder: str) -> MSamModel:
    return MSamModel.from_pretrained(folder, tasks={"depth": 1, "edges": 1})
