"""Our parameters for PEFT's tests, and the way to put them in the place of PEFT's."""

from dataclasses import dataclass, field
from types import ModuleType

import pytest

from peft_talora.tuner import TALoRAConfig

TASKS = ["depth", "normals", "edges"]
VISION = r".*vision_encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])"


@dataclass
class ThreeTaskConfig(TALoRAConfig):
    """Three tasks by default, for tests that give no task names; `conftest.py` selects one."""

    task_names: list[str] | None = field(default_factory=lambda: list(TASKS))


CONFIGS = [TALoRAConfig, ThreeTaskConfig]

# The models of `test_custom_models.py`, by name, with layers `lin0` (10 → 20 features) and `lin1` (20 → 2).
MODELS = [
    ("MLP by expression", "MLP", {"target_modules": "lin0"}),
    ("MLP lin0", "MLP", {"target_modules": ["lin0"], "r": 4, "r_out": 3, "r_task": 2}),
    ("MLP lin1", "MLP", {"target_modules": ["lin1"], "r": 4, "r_out": 2, "r_task": 2}),
    (
        "MLP both",
        "MLP",
        {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin1": 0.5}},
    ),
    ("MLP all-linear", "MLP", {"target_modules": "all-linear", "r": 2, "dropout": 0.1}),
    (
        "MLP excluded",
        "MLP",
        {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"], "init_weights": "gaussian"},
    ),
    ("MLP modules to save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP targets saved", "MLP", {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"], "r": 2}),
    ("MLP three tasks", "MLP", {"target_modules": ["lin0", "lin1"], "task_names": TASKS, "r": 2}),
    (
        "MLP three tasks and saved",
        "MLP",
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "task_names": TASKS},
    ),
    ("MLP norms saved", "MLP_LayerNorm", {"target_modules": ["lin0"], "modules_to_save": ["layernorm1"]}),
    ("Embedding beside", "EmbConv1D", {"target_modules": ["lin0"], "r": 2, "alpha": 200}),
    ("Convolution saved", "Conv2d", {"target_modules": ["lin0"], "modules_to_save": ["conv2d"], "r": 2}),
    ("Attention beside", "MHA", {"target_modules": ["lin0"], "r": 2}),
]
MODEL_CASES = [(name, model, TALoRAConfig, kwargs) for name, model, kwargs in MODELS]

LIN0 = {"target_modules": ["lin0"], "init_weights": False}
LIN1 = {"target_modules": ["lin1"], "init_weights": False, "r": 2}
SEVERAL = {"task_names": TASKS}
TWO_ADAPTERS = [
    ("Same", "talora", TALoRAConfig, LIN0, LIN0),
    ("Different", "talora", TALoRAConfig, LIN0, LIN1),
    ("Different ranks", "talora", TALoRAConfig, LIN0, {**LIN0, "r": 3}),
    ("Three tasks", "talora", TALoRAConfig, {**LIN0, **SEVERAL}, {**LIN0, **SEVERAL}),
    ("One task and three", "talora", TALoRAConfig, LIN0, {**LIN0, **SEVERAL}),
]

# The encoder's windows do not divide its grid. `mask_decoder` is a composite module with keyword-only arguments.
SAM = {"r": 4, "r_task": 2, "init_weights": False}
SAM_CASES = {
    "default targets": {"init_weights": False},
    "targets by list": {**SAM, "target_modules": ["attn.qkv", "attn.proj"]},
    "three tasks": {**SAM, "target_modules": VISION, "task_names": TASKS},
    "neck saved": {**SAM, "target_modules": VISION, "modules_to_save": ["vision_encoder.neck"]},
    "three tasks and norms": {**SAM, "target_modules": VISION, "task_names": TASKS, "train_norms": True},
}
DECODER_SAVED = {"decoder saved": {**SAM, "target_modules": VISION, "modules_to_save": ["mask_decoder"]}}


class LoraNames(TALoRAConfig):
    """Our configuration by LoRA's argument names, for tests that take LoRA as an example of any method."""

    def __init__(self, init_lora_weights="orthogonal", lora_alpha=None, r=2, **kwargs):
        super().__init__(init_weights=init_lora_weights, alpha=lora_alpha, r=r, **kwargs)


def expose(module: ModuleType, parameters: dict[str, list]) -> dict[str, type]:
    """The test classes of one of PEFT's modules, with our values in tests parametrised by these names."""
    classes = {name: value for name, value in vars(module).items() if name.startswith("Test")}
    classes.pop("TestingCommitHashError", None)  # no test, in spite of its name
    for tests in classes.values():
        for test in vars(tests).values():
            marks = vars(test).get("pytestmark", []) if callable(test) else []
            for position, mark in enumerate(marks):
                if mark.name == "parametrize" and mark.args[0] in parameters:
                    values = parameters[mark.args[0]]
                    marks[position] = pytest.mark.parametrize(mark.args[0], values, ids=_identify).mark
    return classes


def _identify(value) -> str | None:
    """A readable part of a test's name."""
    if isinstance(value, type):
        return value.__name__
    return value if isinstance(value, str) else None
