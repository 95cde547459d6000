"""PEFT's common tester over a small SAM with windows and padding, and over its vision encoder alone."""

import inspect

import pytest
import torch
from transformers import SamModel, SamVisionModel

from peft_talora.tuner import TALoRAConfig

from .cases import DECODER_SAVED, SAM_CASES
from .source import load

upstream = load("testing_common")
METHODS = [name.removeprefix("_test_") for name in dir(upstream.PeftCommonTester) if name.startswith("_test_")]
ARGUMENTS = {"test_name": "", "dtype": torch.bfloat16}  # what some methods take beside the case


class SamTester(upstream.PeftCommonTester):
    """PEFT's class holds its tests as methods that a class per model calls; here one test calls each of them."""

    def prepare_inputs_for_testing(self) -> dict:
        return {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()}

    def run(self, method: str, folder: str, config_kwargs: dict) -> None:
        test = getattr(self, f"_test_{method}")
        case = {"model_id": folder, "config_cls": TALoRAConfig, "config_kwargs": dict(config_kwargs)}
        test(**{name: {**ARGUMENTS, **case}[name] for name in REQUIRED[method]})


REQUIRED = {
    method: [
        name
        for name, parameter in inspect.signature(getattr(SamTester, f"_test_{method}")).parameters.items()
        if name != "self" and parameter.default is parameter.empty
    ]
    for method in METHODS
}


@pytest.fixture(scope="module")
def double_folder(sam_folder, tmp_path_factory) -> str:
    """The small SAM in float64: PEFT's tolerances, made for smaller models, are at float32's rounding here."""
    folder = tmp_path_factory.mktemp("double")
    SamModel.from_pretrained(sam_folder, dtype=torch.float64).save_pretrained(folder)
    return str(folder)


class TestSamModel(SamTester):
    transformers_class = SamModel

    @pytest.mark.parametrize("case", [*SAM_CASES, *DECODER_SAVED])
    @pytest.mark.parametrize("method", METHODS)
    def test_method(self, method, case, double_folder):
        self.run(method, double_folder, {**SAM_CASES, **DECODER_SAVED}[case])


class TestSamVisionModel(SamTester):
    transformers_class = SamVisionModel

    @pytest.mark.parametrize("case", SAM_CASES)
    @pytest.mark.parametrize("method", METHODS)
    def test_method(self, method, case, double_folder):
        self.run(method, double_folder, SAM_CASES[case])


AT_LEAST = 200
TEXT = "is for models that read tokens"
NO_GENERATE = "calls `generate`"
SKIPPED = "PEFT skips it: only LoRA and IA³ take part"
LEFT_OUT = {
    "*[[]generate*": NO_GENERATE,
    "*[[]disable_adapter-*": f"{NO_GENERATE}; test_custom_models.py disables adapters",
    "*[[]passing_input_embeds_works-*": TEXT,
    "*[[]prepare_for_training-*": TEXT,
    "*[[]training_prompt_learning_tasks-*": TEXT,
    "*[[]mixed_adapter_batches-*": SKIPPED,
    "*[[]weighted_combination_of_adapters*": SKIPPED,
    "*[[]training_layer_indexing-three tasks*": "`layers_to_transform` needs a list of targets",
    "*[[]training_layer_indexing-* saved*": "`layers_to_transform` needs a list of targets",
    # What one of the two models does not allow is run over the other.
    "TestSamModel::*[[]lora_conversion-*": "reads hidden states, which SamModel's output does not have",
    "TestSamModel::*[[]safe_merge-*": "saves the state dict by `safetensors`, which refuses SamModel's tied positions",
    "TestSamModel::*[[]training_gradient_checkpointing-*": "takes SAM's `prompt_encoder` for PEFT's",
    "TestSamModel::*[[]training-decoder saved*": "sums the first output, of which the masks' heads are no part",
    "TestSamVisionModel::*[[]lora_conversion-neck saved*": "PEFT's conversion garbles names inside a composite module",
    "TestSamVisionModel::*[[]training_gradient_checkpointing-neck saved*": "wants no gradient in modules to save",
    "TestSamVisionModel::*[[]training_gradient_checkpointing-*norms*": "wants no gradient in modules to save",
}
