"""What the oldest supported PEFT cannot read is an error that says so."""

import copy

import peft
import pytest
from packaging.version import Version
from torch import nn
from tuner_cases import saying

from peft_talora.tuner import TALoRAConfig

pytestmark = pytest.mark.skipif(Version(peft.__version__) >= Version("0.21"), reason="PEFT 0.21 and newer can")


@pytest.mark.parametrize("bias", ["all", "talora_only"])
def test_trained_biases_are_refused(bias):
    with pytest.raises(ValueError, match=saying(f"`bias`='{bias}'", "PEFT 0.21", "PEFT 0.20")):
        peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), TALoRAConfig(target_modules=["0"], r=2, bias=bias))


def test_the_peft_that_is_needed_is_named():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(8, 6))
    # A plain layer is none the worse for the library that is there.
    peft.get_peft_model(copy.deepcopy(model), TALoRAConfig(target_modules=["0"], r=2))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ImportError, match=saying("PEFT 0.20", "torchao 0.18 needs PEFT 0.21")):
        peft.get_peft_model(model, TALoRAConfig(target_modules=["0"], r=2))
