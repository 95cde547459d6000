"""TA-LoRA as a PEFT method. Importing this package registers it."""

from .registration import add_peft_type, register

add_peft_type("TALORA")

from .config import TALoRAConfig  # noqa: E402  (the config's type must exist first)
from .convert import compress  # noqa: E402
from .grow import TaskAffinity  # noqa: E402
from .layer import Linear, TALoRALayer  # noqa: E402
from .model import TALoRAModel, set_task, use_task  # noqa: E402
from .orthogonality import orthogonality_loss  # noqa: E402

register("talora", TALoRAConfig, TALoRAModel)

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
