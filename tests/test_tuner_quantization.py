"""What the oldest supported PEFT cannot read is an error that says so."""

import peft
import pytest
from packaging.version import Version
from torch import nn
from tuner_cases import saying

from peft_talora.tuner import TALoRAConfig


@pytest.mark.skipif(Version(peft.__version__) >= Version("0.21"), reason="PEFT 0.21 and newer read such a layer")
def test_the_peft_that_is_needed_is_named():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(8, 6))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ImportError, match=saying("PEFT 0.20", "torchao 0.18 needs PEFT 0.21")):
        peft.get_peft_model(model, TALoRAConfig(target_modules=["0"], r=2))
