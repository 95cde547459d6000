"""Tensors in Tucker form and what can be computed on their small factors alone: the dense tensor is never built.

Axes: T tasks, K rank of the task factor, O of the output factor, R of the input factor, D_out and D_in the layer's
sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

Ranks = tuple[int | None, int | None, int | None]


def check_ranks(**ranks: int | None) -> None:
    """Raise ValueError, naming it, for a rank that is neither None nor an integer of at least 1."""
    for name, rank in ranks.items():
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise ValueError(f"`{name}` must be None or an integer of at least 1; got {rank!r}.")


@dataclass(frozen=True)
class RelativeErrors:
    """How far an approximation is from what it approximates, ‖X − X̂‖ / ‖X‖ in the Frobenius norm over all tasks.

    Attributes:
        overall: Over all layers together; 0 is exact, 1 is as far as zero is.
        layers: Of every single layer, by its name in the base model.
    """

    overall: float
    layers: dict[str, float]


@dataclass(frozen=True)
class Tucker:
    """One matrix X_t = U C_t Vᵀ per task, (D_out, D_in), where C_t = Σ_k P[t, k] · G[:, :, k].

    | symbol | field         | shape      |
    |--------|---------------|------------|
    | G      | `core`        | (O, R, K)  |
    | U      | `out_factor`  | (D_out, O) |
    | V      | `in_factor`   | (D_in, R)  |
    | P      | `task_factor` | (T, K)     |
    """

    core: torch.Tensor
    out_factor: torch.Tensor
    in_factor: torch.Tensor
    task_factor: torch.Tensor

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, input and task factor: in the order of the core's axes."""
        return self.out_factor, self.in_factor, self.task_factor

    @classmethod
    def of_loras(cls, loras: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Tucker:
        """T independent LoRAs as one tensor, exactly: X_t = B_t A_t, the core block-diagonal, the task factor 1.

        Args:
            loras: Per task A (ρ_t, D_in) and B (D_out, ρ_t), the scaling folded into either.
        """
        ranks = [len(a) for a, _ in loras]
        blocks = torch.eye(sum(ranks), dtype=loras[0][0].dtype).split(ranks, dim=1)
        core = torch.stack([block @ block.T for block in blocks], dim=2)
        out_factor = torch.cat([b for _, b in loras], dim=1)
        in_factor = torch.cat([a for a, _ in loras]).T
        return cls(core, out_factor, in_factor, torch.eye(len(loras), dtype=core.dtype))

    @classmethod
    def weighted_sum(cls, terms: Sequence[Tucker], weights: Sequence[float]) -> Tucker:
        """Σ_i w_i X_i, exactly: factors side by side, the cores block-diagonal."""
        sizes = [[term.core.shape[axis] for term in terms] for axis in range(3)]
        core = terms[0].core.new_zeros([sum(size) for size in sizes])
        starts = [0, 0, 0]
        for term, weight in zip(terms, weights, strict=True):
            ends = [start + size for start, size in zip(starts, term.core.shape, strict=True)]
            core[tuple(map(slice, starts, ends))] = weight * term.core
            starts = ends
        factors = zip(*(term.factors for term in terms), strict=True)
        return cls(core, *(torch.cat(factor, dim=1) for factor in factors))

    def lora(self, task: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One task's matrix as a LoRA, exactly: A (ρ, D_in) and B (D_out, ρ) with X_t = B A and ρ = min(O, R)."""
        core_OR = self.core @ self.task_factor[task]
        if core_OR.shape[1] <= core_OR.shape[0]:
            return self.in_factor.T, self.out_factor @ core_OR
        return core_OR @ self.in_factor.T, self.out_factor

    def orthonormal(self) -> Tucker:
        """The same tensor, with orthonormal columns in every factor (by QR); no rank exceeds its mode's size."""
        return self._orthonormal([True, True, True])

    def fitted(self) -> Tucker:
        """The same tensor, with a factor orthonormal where it had more columns than rows, and left alone elsewhere."""
        return self._orthonormal([factor.shape[1] > factor.shape[0] for factor in self.factors])

    def _orthonormal(self, modes: Sequence[bool]) -> Tucker:
        core, factors = self.core, list(self.factors)
        for mode, wanted in enumerate(modes):
            if wanted:
                factors[mode], triangle = torch.linalg.qr(factors[mode])
                core = _times(core, triangle, mode)
        return Tucker(core, *factors)

    def truncated(self, ranks: Ranks) -> Tucker:
        """The truncated higher-order SVD: orthonormal factors of the given ranks at the most.

        Args:
            ranks: Of output, input and task factor; None cuts nothing off. A rank beyond what the tensor has in that
                mode becomes the one it has, and where that is so for all three the result is exact.
        """
        whole = self.orthonormal()
        core, factors = whole.core, []
        for mode, (factor, rank) in enumerate(zip(whole.factors, ranks, strict=True)):
            unfolded = whole.core.movedim(mode, 0).flatten(1)
            leading = torch.linalg.svd(unfolded, full_matrices=False).U[:, :rank]
            core = _times(core, leading.T, mode)
            factors.append(factor @ leading)
        return Tucker(core, *factors)

    def norm(self) -> float:
        """The Frobenius norm over all tasks."""
        return self.orthonormal().core.norm().item()


def _times(core: torch.Tensor, matrix: torch.Tensor, mode: int) -> torch.Tensor:
    """The product of a core with a matrix (rows, size of the mode) in one of its modes."""
    return torch.tensordot(matrix, core, dims=([1], [mode])).movedim(0, mode)


def relative_errors(exact: Mapping[str, Tucker], approximate: Mapping[str, Tucker]) -> RelativeErrors:
    """Compare layer by layer. A layer that is zero in both has the error 0."""
    norms = {name: tensor.norm() for name, tensor in exact.items()}
    distances = {
        name: Tucker.weighted_sum([tensor, approximate[name]], [1.0, -1.0]).norm() for name, tensor in exact.items()
    }
    layers = {name: _ratio(distances[name], norms[name]) for name in exact}
    total = [sum(value**2 for value in values.values()) ** 0.5 for values in (distances, norms)]
    return RelativeErrors(_ratio(*total), layers)


def _ratio(distance: float, norm: float) -> float:
    return distance / norm if norm > 0 else distance
