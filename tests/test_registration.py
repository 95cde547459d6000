"""Methods of our own among PEFT's."""

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from peft_talora.continual.bottleneck import BottleneckConfig, BottleneckModel
from peft_talora.tuner import TALoRAConfig, TALoRAModel
from peft_talora.tuner.registration import add_peft_type, register

METHODS = [("TALORA", TALoRAConfig, TALoRAModel), ("BOTTLENECK", BottleneckConfig, BottleneckModel)]


@pytest.mark.parametrize(("name", "config", "model"), METHODS)
def test_they_are_real_members(name, config, model):
    member = PeftType(name)
    assert member is PeftType[name] is getattr(PeftType, name)
    assert member in list(PeftType)
    assert list(PeftType).count(member) == 1
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is config
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is model


@pytest.mark.parametrize(("name", "config", "model"), METHODS)
def test_twice_is_once(name, config, model):
    number = len(PeftType)
    assert add_peft_type(name) is PeftType[name]
    register(name.lower(), nn.Module, nn.Module)
    assert len(PeftType) == number
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]] is config


def test_a_method_of_peft_s_is_used_as_it_is():
    assert add_peft_type("LORA") is PeftType.LORA
