"""What the oldest supported PEFT cannot do, said by errors."""

from __future__ import annotations

from typing import Any

import peft
from packaging.version import Version
from peft import utils
from torch import nn


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> Any | None:
    """PEFT's backend for a quantised layer, None for a plain one; see `peft.utils.resolve_quantization_backend`.

    Raises:
        ImportError: If PEFT looks for a name that the quantisation library does not have. PEFT 0.20 does so with
            torchao 0.18, which dropped a class.
    """
    try:
        return utils.resolve_quantization_backend(base_layer, **kwargs)
    except ImportError as error:
        if all(type(parameter) is nn.Parameter for parameter in base_layer.parameters(recurse=False)):
            return None  # that library is there, but has no part in this layer
        raise ImportError(
            f"PEFT {peft.__version__} does not know the installed version of the library that quantised this layer "
            f"({error}). torchao 0.18 needs PEFT 0.21 or newer."
        ) from error


def check_bias(bias: str) -> None:
    """Raise ValueError for trained biases before PEFT 0.21, which saves those of its own methods only."""
    if bias != "none" and Version(peft.__version__) < Version("0.21"):
        raise ValueError(f"`bias`={bias!r} needs PEFT 0.21 or newer: PEFT {peft.__version__} does not save biases.")
