"""The orthogonality regulariser of TA-LoRA's factors."""

from __future__ import annotations

import torch
from torch import nn

from .fused import without_autocast
from .layer import TALoRALayer


def orthogonality_loss(model: nn.Module, adapter_name: str | None = None, squared: bool = True) -> torch.Tensor:
    """How far the factors of an adapter are from orthonormal columns, a scalar to add to the loss.

    The mean over layers, and over the three terms of a layer, of ‖UᵀU − I‖², ‖VᵀV − I‖² and, averaged over k,
    ‖G_kᵀG_k − I‖² (Frobenius; G_k G_kᵀ where r_out < r, as no more columns can be orthonormal). With U and V
    orthonormal, the size of an update is that of its core. Whatever starts at zero (the output factor, or the core:
    with `init_weights="orthogonal"` the loss starts at a third of the smaller rank) has no gradient of it there, and
    is asked to grow once the data have moved it.
    Source: the set-up of MTSAM (ICLR 2025), where the weight is 0.1 to 1 and the norms are not squared.

    Args:
        model: A model with a TA-LoRA adapter, inside a `PeftModel` or not.
        adapter_name: The adapter; None means every active one, averaged.
        squared: Square the norms. The plain norm has no gradient at its minimum, where orthogonal factors start.

    Raises:
        ValueError: If no layer has the adapter.
    """
    layers = [module for module in model.modules() if isinstance(module, TALoRALayer)]
    losses = []
    for layer in layers:
        names = layer.active_adapters if adapter_name is None else [adapter_name]
        losses += [_of_layer(layer, name, squared) for name in names if name in layer.talora_core]
    if not losses:
        wanted = "an active adapter" if adapter_name is None else f"the adapter {adapter_name!r}"
        known = list(dict.fromkeys(name for layer in layers for name in layer.talora_core))
        raise ValueError(f"No layer has {wanted} of TA-LoRA; the TA-LoRA adapters are {known}.")
    return torch.stack(losses).mean()


def _of_layer(layer: TALoRALayer, adapter_name: str, squared: bool) -> torch.Tensor:
    core_KOR = layer.talora_core[adapter_name].movedim(2, 0)
    if core_KOR.shape[1] < core_KOR.shape[2]:
        core_KOR = core_KOR.mT
    factors = layer.talora_out[adapter_name], layer.talora_in[adapter_name]
    terms = [_distance(factor[None], squared) for factor in factors]
    return torch.stack([*terms, _distance(core_KOR, squared)]).mean()


def _distance(matrices: torch.Tensor, squared: bool) -> torch.Tensor:
    """Mean over the matrices A of ‖AᵀA − I‖, in the parameters' precision even under autocast."""
    with without_autocast(matrices.device.type):
        gram = matrices.mT @ matrices
        difference = gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    norms = difference.flatten(1).square().sum(1) if squared else difference.flatten(1).norm(dim=1)
    return norms.mean()
