"""A frozen linear layer and its update in one autograd function: less to save, less to compute than their sum.

Axes: N entries of `task_ids`, L rows of the effective batch (L a multiple of N, entries slowest), D_in and D_out the
layer's sizes, R and O the ranks of the input and of the output factor.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


class _FusedLinear(torch.autograd.Function):
    """y = W x + b + U C_n Vᵀ d, where d is x or what dropout left of it.

    Beside the parameters only d and z = Vᵀ d are kept for backward: never the base layer's output, nor a copy of the
    weight in another precision. Sums go into the output of the large products in place.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, in_DR, cores_NOR, out_DO):
        dtype = x.dtype
        x_LD = x.reshape(-1, x.shape[-1])
        d_LD = x_LD if dropped is None else dropped.reshape(x_LD.shape)
        weight_T = weight.to(dtype).T
        # What is returned must be no view, or callers could not change it in place, as `ReLU(inplace=True)` does.
        y = x.new_empty(*x.shape[:-1], weight_T.shape[1])
        y_LD = y.view(-1, y.shape[-1])
        if bias is None:
            torch.mm(x_LD, weight_T, out=y_LD)
        else:
            torch.addmm(bias.to(dtype), x_LD, weight_T, out=y_LD)
        z_LR = d_LD @ in_DR.to(dtype)
        y_LD.addmm_(_per_entry(z_LR, cores_NOR.to(dtype).mT), out_DO.to(dtype).T)
        ctx.has_dropped = dropped is not None
        ctx.save_for_backward(x if dropped is None else dropped, z_LR, weight, bias, in_DR, cores_NOR, out_DO)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        with without_autocast(grad_y.device.type):  # it may be on here and off in forward
            return _FusedLinear._backward(ctx, grad_y)

    @staticmethod
    def _backward(ctx, grad_y):
        d, z_LR, weight, bias, in_DR, cores_NOR, out_DO = ctx.saved_tensors
        needs = dict(zip(("x", "dropped", "weight", "bias", "in", "cores", "out"), ctx.needs_input_grad, strict=True))
        dtype = d.dtype
        d_LD, g_LD = d.reshape(-1, d.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
        in_, cores, out = in_DR.to(dtype), cores_NOR.to(dtype), out_DO.to(dtype)
        if torch.is_grad_enabled():  # a second derivative is asked for, and z has no graph of its own
            z_LR = d_LD @ in_
        grads = dict.fromkeys(needs)
        h_LO = g_LD @ out
        k_LR = _per_entry(h_LO, cores)
        if needs["out"]:
            grads["out"] = (g_LD.T @ _per_entry(z_LR, cores.mT)).to(out_DO.dtype)
        if needs["cores"]:
            h_NMO, z_NMR = (t.reshape(len(cores), -1, t.shape[-1]) for t in (h_LO, z_LR))
            grads["cores"] = (h_NMO.mT @ z_NMR).to(cores_NOR.dtype)
        if needs["in"]:
            grads["in"] = (d_LD.T @ k_LR).to(in_DR.dtype)
        if needs["x"]:
            grad_x = g_LD @ weight.to(dtype)
            grads["x"] = (grad_x if ctx.has_dropped else grad_x.addmm_(k_LR, in_.T)).view(d.shape)
        if needs["dropped"]:
            grads["dropped"] = (k_LR @ in_.T).view(d.shape)
        if needs["bias"]:
            grads["bias"] = g_LD.sum(0).to(bias.dtype)
        return tuple(grads.values())


def _per_entry(rows_LA: torch.Tensor, matrices_NAB: torch.Tensor) -> torch.Tensor:
    """Every row times the matrix of its own entry: (L, A), (N, A, B) → (L, B)."""
    grouped_NMA = rows_LA.reshape(len(matrices_NAB), -1, rows_LA.shape[-1])
    return (grouped_NMA @ matrices_NAB).reshape(len(rows_LA), matrices_NAB.shape[-1])


def fused_linear(
    x: torch.Tensor,
    base_layer: nn.Linear,
    in_DR: torch.Tensor,
    cores_NOR: torch.Tensor,
    out_DO: torch.Tensor,
    dropout: nn.Module,
) -> torch.Tensor:
    """The adapted layer's output, equal to `base_layer(x)` plus the update to rounding; see [`can_fuse`].

    Args:
        x: (L, ..., D_in), entries slowest.
        base_layer: The frozen layer.
        in_DR: Input factor, (D_in, R).
        cores_NOR: Scaled core of every entry's task, (N, O, R).
        out_DO: Output factor, (D_out, O).
        dropout: Applied to the input of the update.

    Returns:
        (L, ..., D_out), in x's dtype, or under autocast in autocast's.
    """
    x = x.to(_compute_dtype(x))
    dropped = None if isinstance(dropout, nn.Identity) or not dropout.training else dropout(x)
    return _FusedLinear.apply(x, dropped, base_layer.weight, base_layer.bias, in_DR, cores_NOR, out_DO)


def can_fuse(base_layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether calling `base_layer` does nothing but the product with a frozen, plain weight.

    Not so for quantised or sharded weights, subclasses, layers with hooks or with a forward of their own (offloading
    puts one there), and weights that are trained. Compilers, which fuse by themselves, tracers and the transforms of
    `torch.func` get the plain formula, too.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if type(base_layer) is not nn.Linear or "forward" in vars(base_layer):
        return False
    weight = base_layer.weight
    if weight.requires_grad or type(weight) not in (nn.Parameter, torch.Tensor) or type(x) is not torch.Tensor:
        return False
    if x.dtype != weight.dtype and (not _autocasts(x) or torch.float64 in (x.dtype, weight.dtype)):
        return False  # the layer itself raises here
    hooks = (
        base_layer._forward_pre_hooks,
        base_layer._forward_hooks,
        base_layer._backward_pre_hooks,
        base_layer._backward_hooks,
    )
    return not any(hooks) and not nn.modules.module._has_any_global_hook()


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context without autocast, on devices that have none (such as "meta") too."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _autocasts(x: torch.Tensor) -> bool:
    device_type = x.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which `nn.Linear` computes: x's own, or autocast's, which leaves float64 alone."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) and x.dtype != torch.float64 else x.dtype
