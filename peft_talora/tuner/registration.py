"""How a method of our own becomes one of PEFT's.

PEFT keeps its methods in a closed enumeration and offers no way in from outside, so a real member is added to it here:
the one place that reaches into another library's internals. A PEFT that has the name itself is used as it is.
"""

from __future__ import annotations

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


def add_peft_type(name: str) -> PeftType:
    """The member of `PeftType` whose name and value are `name`; added if it is not there."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    if PeftType(name) is not PeftType[name] or member not in list(PeftType):
        raise RuntimeError(f"This Python's enum does not take the new member PeftType.{name}.")
    return member


def register(name: str, config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """Make a method known to PEFT, by its name in lower case. Does nothing if it is known."""
    if add_peft_type(name.upper()) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config_class, model_cls=model_class)
