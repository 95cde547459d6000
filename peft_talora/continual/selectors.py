"""From features to domains: what is fitted on a few exemplars per domain and says which domain an image is of.

Axes: N exemplars, B images, F features, K domains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class DomainSelector(nn.Module, ABC):
    """Features → domain and score.

    The score is the same for all kinds: minus the root mean square, over features, of what separates an image from the
    mean of the predicted domain's exemplars, where each feature counts in units of its deviation within domains (of
    all exemplars together). It tells images of no known domain, which a choice among the known ones cannot.

    Args:
        width: F.
        seed: Of what is drawn.
    """

    kind: str

    def __init__(self, width: int, seed: int = 0):
        super().__init__()
        self.width, self.seed = width, seed
        for name in ("means_KF", "deviation_F"):
            self.register_buffer(name, torch.empty(0, width) if name == "means_KF" else torch.ones(width))

    def fit(self, features_NF: Tensor, labels_N: Tensor, num_domains: int) -> None:
        """Fit to exemplars.

        Args:
            features_NF: Of all domains.
            labels_N: int64, positions of their domains.
            num_domains: K; each needs an exemplar.

        Raises:
            ValueError: For features of another width, or a domain without exemplars.
        """
        if features_NF.ndim != 2 or features_NF.shape[1] != self.width:
            raise ValueError(f"features: got {tuple(features_NF.shape)}; needed are (exemplars, {self.width}).")
        missing = sorted(set(range(num_domains)) - set(labels_N.tolist()))
        if missing or int(labels_N.max()) >= num_domains:
            raise ValueError(f"labels: of the {num_domains} domains {missing} have no exemplar, or there are more.")
        features_NF = features_NF.float()
        self.means_KF = torch.stack([features_NF[labels_N == k].mean(0) for k in range(num_domains)])
        within_NF = features_NF - self.means_KF[labels_N]
        degrees = max(1, len(features_NF) - num_domains)
        deviation_F = (within_NF.square().sum(0) / degrees).sqrt()
        self.deviation_F = deviation_F.clamp(min=1e-3 * float(features_NF.abs().mean()) + 1e-12)
        self._fit(self._standardised(features_NF), labels_N, num_domains)

    @torch.no_grad()
    def predict(self, features_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Position of the domain (B,) int64, and score (B,) float32, at most 0; larger is surer.

        Raises:
            ValueError: If nothing is fitted.
        """
        if not len(self.means_KF):
            raise ValueError("the selector is not fitted.")
        features_BF = features_BF.float()
        index_B = self._choose(self._standardised(features_BF))
        away_BF = (features_BF - self.means_KF[index_B]) / self.deviation_F
        return index_B, -away_BF.square().mean(1).sqrt()

    def _standardised(self, features: Tensor) -> Tensor:
        return (features - self.means_KF.mean(0)) / self.deviation_F

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        for name, _ in self.named_buffers(recurse=False):  # whose sizes depend on the number of domains
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @abstractmethod
    def _fit(self, features_NF: Tensor, labels_N: Tensor, num_domains: int) -> None: ...

    @abstractmethod
    def _choose(self, features_BF: Tensor) -> Tensor: ...


class NearestMean(DomainSelector):
    """The domain whose exemplars' mean is nearest, in units of the deviation within domains."""

    kind = "ncm"

    def _fit(self, features_NF: Tensor, labels_N: Tensor, num_domains: int) -> None:
        pass

    def _choose(self, features_BF: Tensor) -> Tensor:
        return torch.cdist(features_BF, self._standardised(self.means_KF)).argmin(1)


class Ridge(DomainSelector):
    """Least squares onto one-hot domains with a ridge, in closed form.

    W = (XᵀX + λ N I)⁻¹ Xᵀ Y,    X (N, F + 1) with a column of ones
    """

    kind = "ridge"

    def __init__(self, width: int, seed: int = 0, strength: float = 1.0):
        super().__init__(width, seed)
        self.strength = strength
        self.register_buffer("weight_FK", torch.empty(width + 1, 0))

    def _fit(self, features_NF: Tensor, labels_N: Tensor, num_domains: int) -> None:
        X = _with_ones(features_NF).double()
        Y = torch.nn.functional.one_hot(labels_N, num_domains).double()
        identity = torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
        self.weight_FK = torch.linalg.solve(X.T @ X + self.strength * len(X) * identity, X.T @ Y).float()

    def _choose(self, features_BF: Tensor) -> Tensor:
        return (_with_ones(features_BF) @ self.weight_FK).argmax(1)


def _with_ones(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[:, :1])], dim=1)


SELECTORS = {selector.kind: selector for selector in (Ridge, NearestMean)}


def make_selector(kind: str, width: int, seed: int = 0) -> DomainSelector:
    """A selector by its name. Raises ValueError for another one."""
    if kind not in SELECTORS:
        raise ValueError(f"`selector` is {kind!r}; allowed: {', '.join(SELECTORS)}.")
    return SELECTORS[kind](width, seed)
