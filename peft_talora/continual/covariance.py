"""The covariance that domains share, from few exemplars, and distances by it.

Axes: B images, K domains, D features. All is float64.
"""

import torch
from torch import Tensor

_NOTHING = 1e-12  # share of the squares of all features below which a scatter is rounding


def share_covariance(counts_K: Tensor, sums_KD: Tensor, squares_DD: Tensor) -> Tensor:
    """What domains have in common about their own means, shrunk: (D, D), positive definite.

    Where the domains have one exemplar each, or only equal ones, it is the scatter of all exemplars about their common
    mean; where there is none either, the identity.

    Args:
        counts_K: Exemplars of each domain; it may have none.
        sums_KD: Sums of their features.
        squares_DD: XᵀX of all their features.
    """
    within = squares_DD - (sums_KD / counts_K.clamp(min=1)[:, None]).T @ sums_KD
    domains, count = float(counts_K.count_nonzero()), float(counts_K.sum())
    for scatter, freedom in ((within, count - domains), (total_scatter(counts_K, sums_KD, squares_DD), count - 1)):
        if freedom > 0 and scatter.trace() > _NOTHING * squares_DD.trace():
            return shrink(scatter / freedom, freedom)
    return torch.eye(len(squares_DD)).to(squares_DD)


def total_scatter(counts_K: Tensor, sums_KD: Tensor, squares_DD: Tensor) -> Tensor:
    """(D, D), of all exemplars about their common mean; arguments as of `share_covariance`."""
    total_D = sums_KD.sum(0)
    return squares_DD - torch.outer(total_D, total_D) / counts_K.sum().clamp(min=1)


def shrink(covariance_DD: Tensor, freedom: float) -> Tensor:
    """(1 − ρ) S + ρ tr(S)/D · I, for there are fewer exemplars than features, with n degrees of freedom and

        ρ = min(1, ((1 − 2/D) tr(S²) + tr(S)²) / ((n + 1 − 2/D) (tr(S²) − tr(S)²/D)))

    the oracle approximating rule (Chen et al., arXiv:0907.4698, equation 23).
    """
    D, trace, squares = len(covariance_DD), covariance_DD.trace(), covariance_DD.square().sum()
    over = (1 - 2 / D) * squares + trace**2
    under = (freedom + 1 - 2 / D) * (squares - trace**2 / D)
    share = (over / under.clamp(min=torch.finfo(under.dtype).tiny)).clamp(max=1)
    return (1 - share) * covariance_DD + share * trace / D * torch.eye(D).to(covariance_DD)


def whitening(covariance_DD: Tensor) -> Tensor:
    """L with L Lᵀ = C⁻¹: ``x @ L`` has as square distances those of x by C."""
    # C = G Gᵀ gives C⁻¹ = G⁻ᵀ G⁻¹.
    return torch.linalg.inv(torch.linalg.cholesky(covariance_DD)).T.contiguous()


def square_distances(x_BD: Tensor, y_KD: Tensor) -> Tensor:
    """(B, K), each by differences: what lies on a mean has distance 0."""
    return (x_BD[:, None] - y_KD).square().sum(-1)
