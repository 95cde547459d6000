"""TA-LoRA as a PEFT method. Importing this package registers it.

PEFT keeps its methods in a closed enumeration and offers no way in from outside, so a real member is added to it here:
the one place that reaches into another library's internals. A PEFT that has the name itself is used as it is.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method


def _add_peft_type(name: str) -> None:
    """Add a member to `PeftType`, whose value equals its name. Does nothing if it is there."""
    if name in PeftType.__members__:
        return
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


_add_peft_type("TALORA")

from .config import TALoRAConfig  # noqa: E402  (the config's type must exist first)
from .convert import compress  # noqa: E402
from .grow import TaskAffinity  # noqa: E402
from .layer import Linear, TALoRALayer  # noqa: E402
from .model import TALoRAModel, set_task, use_task  # noqa: E402
from .orthogonality import orthogonality_loss  # noqa: E402

if PeftType.TALORA not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="talora", config_cls=TALoRAConfig, model_cls=TALoRAModel)

__all__ = [
    "Linear",
    "TALoRAConfig",
    "TALoRALayer",
    "TALoRAModel",
    "TaskAffinity",
    "compress",
    "orthogonality_loss",
    "set_task",
    "use_task",
]
