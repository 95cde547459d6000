"""Models, inputs and assertions that the tests of the tuner share."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import IMAGE_SIZE, make_sam
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from peft_talora.tuner import TALoRAConfig, TALoRALayer

TASKS = ["depth", "normals", "edges"]
BATCH = 2  # differs from the number of tasks, so that a swapped axis fails


class MLP(nn.Module):
    """A plain module, of no library: (..., 6) → (..., 5)."""

    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(6, 9)
        self.lin1 = nn.Linear(9, 5)

    def forward(self, x):
        return self.lin1(torch.tanh(self.lin0(x)))


def make_mlp() -> MLP:
    torch.manual_seed(0)
    return MLP().eval()


def make_text() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def make_vision_encoder() -> nn.Module:
    return make_sam().vision_encoder


@dataclass(frozen=True)
class Case:
    """A base model: how to build it, what to adapt in it (None: its defaults), one sample's shape, the input's name.

    `prompts` makes a model's further inputs for a batch of that size, `output` is what of its output is compared.
    """

    name: str
    build: Callable[[], nn.Module]
    targets: list[str] | None
    sample: tuple[int, ...]
    keyword: str = "x"
    prompts: Callable[[int], dict] = lambda batch: {}
    output: str = "last_hidden_state"

    def inputs(self, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(batch, *self.sample, generator=torch.Generator().manual_seed(3), dtype=dtype)

    def call(self, model: nn.Module, x: torch.Tensor, **kwargs) -> torch.Tensor:
        output = model(**{self.keyword: x}, **self.prompts(len(x)), **kwargs)
        return output if isinstance(output, torch.Tensor) else output[self.output]


MLP_2D = Case("mlp-2d", make_mlp, ["lin0", "lin1"], (6,))
MLP_3D = Case("mlp-3d", make_mlp, ["lin0", "lin1"], (4, 6))
TEXT = Case("text", make_text, ["query", "value", "dense"], (7, 16), "inputs_embeds")
VISION = Case(
    "vision", make_vision_encoder, ["qkv", "proj", "lin1", "lin2"], (3, IMAGE_SIZE, IMAGE_SIZE), "pixel_values"
)
CASES = [MLP_2D, MLP_3D, TEXT, VISION]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def config_for(case: Case, **values) -> TALoRAConfig:
    """Three tasks, different ranks, and a core that is not zero, so that each task has its own visible update."""
    settings = {
        "task_names": TASKS,
        "target_modules": case.targets,
        "r": 4,
        "r_out": 3,
        "r_task": 2,
        "alpha": 8.0,
        "init_weights": False,
    }
    return TALoRAConfig(**{**settings, **values})


def adapt(case: Case, adapter_name: str = "default", dtype: torch.dtype = torch.float32, **values) -> PeftModel:
    base = case.build().to(dtype)
    torch.manual_seed(7)
    return get_peft_model(base, config_for(case, **values), adapter_name=adapter_name)


def saying(*words: str) -> str:
    """A pattern for `pytest.raises`: the message contains all of these, in any order."""
    return "(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words)


def adapted_layers(model: nn.Module) -> list[TALoRALayer]:
    return [module for module in model.modules() if isinstance(module, TALoRALayer)]


def trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def folded(x: torch.Tensor, num_tasks: int = len(TASKS)) -> tuple[torch.Tensor, torch.Tensor]:
    """Every sample once for every task, task-major, and the tasks' indices."""
    return x.repeat(num_tasks, *(1,) * (x.ndim - 1)), torch.arange(num_tasks).repeat_interleave(len(x))


def gradients(model: nn.Module, x: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> dict:
    """Gradients of `loss(x)` for every trained parameter and for the input."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    loss(x).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in found.values())
    assert "input" not in found
    return {**found, "input": x.grad}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    """Equal up to a share of the largest magnitude; for calls of unequal shapes."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs().max()
    assert difference <= relative * expected.double().abs().max(), difference


def assert_same_gradients(actual: dict, expected: dict, relative: float = 1e-9) -> None:
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 1e-7, f"{name}: no gradient, so nothing is compared"
        assert_close(actual[name], grad, relative)


def assert_visibly_different(*outputs: torch.Tensor) -> None:
    """Every pair differs by an amount of order 0.1 or more, so that equality elsewhere means something."""
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 0.05


def outputs_of_all(case: Case, model: nn.Module) -> torch.Tensor:
    """(T, B, ...), one call per task."""
    with torch.no_grad():
        return torch.stack([case.call(model, case.inputs(), task_ids=[task] * BATCH) for task in TASKS]).contiguous()
