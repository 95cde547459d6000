"""PEFT's tests of custom models (small nets of linear layers, norms, convolutions), over our configuration."""

import peft
from packaging.version import Version

from .cases import CONFIGS, LIN0, MODEL_CASES, TWO_ADAPTERS, LoraNames, expose
from .source import load

upstream = load("test_custom_models")
upstream.LoraConfig = LoraNames
globals().update(
    expose(
        upstream,
        {
            "test_name, model_id, config_cls, config_kwargs": MODEL_CASES,
            "test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2": TWO_ADAPTERS,
            "config_cls": CONFIGS,
            "config0": [config(**LIN0) for config in CONFIGS],
        },
    )
)


class TestRequiresGrad(upstream.TestRequiresGrad):
    """Where a test expects LoRA's two parameters, ours are expected."""

    def check_requires_grad(self, model, *expected):
        super().check_requires_grad(model, *(ours for name in expected for ours in _in_place_of(name)))


def _in_place_of(name: str) -> list[str]:
    layer, _, adapter = name.removesuffix(".weight").partition(".lora_A.")
    if adapter:
        return [
            f"{layer}.talora_{part}"
            for part in (f"in.{adapter}", f"out.{adapter}", f"core.{adapter}", f"task.{adapter}.main")
        ]
    return [] if ".lora_B." in name else [name]


AT_LEAST = 600
OTHERS = "is of another method's own parameters or options"
TOKENS = "trains single tokens of an embedding, which LoRA and its kin alone do"
LINEAR_ONLY = "adapts an embedding, a convolution or `nn.MultiheadAttention`; TA-LoRA adapts linear layers"
WEIGHTED = "`add_weighted_adapter` by LoRA's combination types"
HUB = "reads a checkpoint from the Hub"
LEFT_OUT = {
    "TestMixedAdapterBatches::*": "the keyword `adapter_names`, an adapter per sample, is LoRA's; ours is `task_ids`",
    "TestDynamicDispatch::*": "registering layer classes of one's own is LoRA's",
    "TestMultiRankAdapter::*": "reads `lora_A`; tests/test_tuner_model.py tests `rank_pattern`",
    "TestLayerRepr::*": "reads LoRA's names; tests/test_tuner_layer.py tests ours",
    "TestDefaultTargetModules::test_default_target_modules_list*": "patches LoRA's and DeLoRA's tables of targets",
    "TestDefaultTargetModules::test_default_target_modules_str*": "patches LoRA's and DeLoRA's tables of targets",
    "TestDefaultTargetModules::test_default_target_modules_osf": OTHERS,
    "TestRequiresGrad::test_requires_grad_[!lm]*targets": OTHERS,
    "TestRequiresGrad::test_requires_grad_l[!o]*targets": OTHERS,
    "TestRequiresGrad::test_requires_grad_lo[!r]*targets": OTHERS,
    "TestRequiresGrad::test_requires_grad_miss*targets": OTHERS,
    "TestRequiresGrad::test_requires_grad_*conv*": LINEAR_ONLY,
    "*train*ble_token*": TOKENS,
    "*::test_only_params_are_updated*three tasks*": "wants all moved; the rows of tasks that are not selected stay",
    "*::test_disable_adapter_with_bias_warns*": "PEFT skips it for every method, by a condition that always holds",
    "*::test_active_adapter*save*": "PEFT skips it: modules to save of two adapters cannot both be active",
    "*::test_multiple_adapters_automatic_modules_to_save": HUB,
    "*::test_multiple_adapters_no_needless_copy_modules_to_save": HUB,
    "*::test_multiple_adapters_*merging_adapters*": WEIGHTED,
    "*::test_add_weighted_adapter_*": WEIGHTED,
    "*::test_save_pretrained_targeting_lora_to_embedding_layer*": LINEAR_ONLY,
    "*::test_load_resized_embedding*": LINEAR_ONLY,
    "*::test_unload_adapter_multihead_attention": LINEAR_ONLY,
    "*::test_mha_gradients_set_correctly*": LINEAR_ONLY,
    "*::test_merge_with_lora_bias_*": OTHERS,
    "*_dora_*": OTHERS,
    "*::test_glora_*": OTHERS,
    "*::test_gralora_*": OTHERS,
    "*::test_monteclora_*": OTHERS,
    "*::test_pvera_*": OTHERS,
}
if Version(peft.__version__) >= Version("0.21"):
    LEFT_OUT |= {
        "*::test_add_adapter_rejects_duplicate_name*True*": "PEFT's list of methods for mixed models is closed",
        "*::test_ia3_*": OTHERS,
        "*::test_lora_safe_merge_*": OTHERS,
        "*::test_loading_adapter_preserves_custom_requires_grad": "freezes `lora_A` by hand",
    }
else:
    LEFT_OUT |= {
        "*::test_loading_model_requires_grad_set_correctly_switch_*": "PEFT 0.20 expects it to fail for every method",
        "*::test_loading_model_requires_grad_load_adapter_then_*": "PEFT 0.20 expects it to fail for every method",
        "*overlapping_modules_to_save_raises*ThreeTask*": "its second adapter has no layer, by a slip of its name",
    }
