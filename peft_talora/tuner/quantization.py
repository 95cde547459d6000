"""PEFT's quantisation backends, with an error that helps where the installed PEFT is too old for a backend."""

from __future__ import annotations

from typing import Any

import peft
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
        raise ImportError(
            f"PEFT {peft.__version__} does not know the installed version of the library that quantised this layer "
            f"({error}). torchao 0.18 needs PEFT 0.21 or newer."
        ) from error
