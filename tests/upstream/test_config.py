"""PEFT's tests of configurations, over ours."""

import peft
from packaging.version import Version
from peft import PeftType

from peft_talora.tuner import TALoRAConfig

from .cases import TASKS, LoraNames, expose
from .source import load

upstream = load("test_config")
upstream.LoraConfig = LoraNames
upstream.PeftType = [PeftType.TALORA]  # of all methods, the test that walks through them takes ours

SEVERAL = {"task_names": TASKS, "target_modules": {"b", "a"}, "exclude_modules": ["c"], "r_out": 3, "r_task": 2}
globals().update(
    expose(
        upstream,
        {
            "config_class, mandatory_kwargs": [(TALoRAConfig, {}), (TALoRAConfig, SEVERAL)],
            "config_class": [TALoRAConfig],
        },
    )
)

AT_LEAST = 40
HUB = "reads a checkpoint on the Hub"
OTHERS = "is of another method's configuration"
LEFT_OUT = {
    "*::test_from_pretrained[[]*": HUB,
    "*::test_from_pretrained_cache_dir*": HUB,
    "*::test_save_pretrained_with_runtime_config*": HUB,
    "*::test_save_pretrained_with_target_modules*": "wants sets, whose order JSON does not keep; ours become lists",
    "*::test_prompt_encoder_*": OTHERS,
    "*::test_ia3_*": OTHERS,
    "*::test_adalora_*": OTHERS,
}
if Version(peft.__version__) >= Version("0.21"):
    LEFT_OUT["TestLoraNestedConfigRoundTrip::*"] = OTHERS
