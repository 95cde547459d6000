"""A MoDA model on the tiny SAM, with domains whose images differ in brightness, for several tests."""

import torch
from conftest import IMAGE_SIZE, make_sam
from peft import LoraConfig

from peft_talora.continual.hq import make_sam_hq
from peft_talora.continual.kinds import domain_config
from peft_talora.continual.moda import MoDAModel

NAMES = ("dark", "bright", "striped")
BOXES = torch.tensor([[[8.0, 8.0, 40.0, 50.0]]])


def make_images(name: str, count: int, seed: int = 0) -> torch.Tensor:
    """(count, 3, 64, 64) of one domain."""
    images = 0.3 * torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    if name == "striped":
        images[..., ::8, :] += 4
    return images + {"dark": -2.0, "bright": 2.0, "striped": 0.0}[name]


def ask(images: torch.Tensor) -> dict:
    return {
        "pixel_values": images,
        "input_boxes": BOXES.expand(len(images), -1, -1),
        "multimask_output": False,
    }


def shake(model: MoDAModel, name: str, scale: float = 0.3) -> None:
    """Stand for training: move all parameters that it would move, those of the domain."""
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.learn(name).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    model.end_learning()


def make_moda(kind: str = "lora", names=NAMES, fitted: bool = True, config=None, **settings) -> MoDAModel:
    """A model with domains of one kind of adapter, each of which changes the masks."""
    sam = make_sam()
    base = make_sam_hq(sam).eval() if kind == "hq" else sam
    model = MoDAModel(base, **settings).eval()
    for seed, name in enumerate(names):
        model.add_domain(name, config or domain_config(kind, base, r=4))
        shake(model, name)
        model.add_exemplars(name, make_images(name, 6, 100 + seed))
    if fitted:
        model.fit_selector()
    return model.eval()


def upper_lora() -> LoraConfig:
    """A LoRA in the last two of the four blocks."""
    return LoraConfig(r=4, lora_alpha=4, target_modules=["qkv", "lin1"], layers_to_transform=[2, 3])
