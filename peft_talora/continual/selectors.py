"""Which domain an image is of, by its features, from a few exemplars of each; and whether it is of any.

Axes: N exemplars, B images, K domains, D features. Inside, all is float64.
"""

from abc import ABC, abstractmethod
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .covariance import share_covariance, square_distances, total_scatter, whitening


class DomainSelector(nn.Module, ABC):
    """Chooses the domain of an image and says how sure it is that the image is of a known domain at all.

    The score is the same for all kinds: with m the mean of the chosen domain's exemplars and C the covariance that all
    domains share,

        score(x) = −(x − m)ᵀ C⁻¹ (x − m) / D

    minus the square of the Mahalanobis distance (Lee et al., arXiv:1807.03888), for each feature: 0 at best, and far
    lower for images of no known domain than for others. Its size depends on how much C is shrunk, so a threshold has
    to come from scores of the same features (see `held_out_scores`). C is the scatter of exemplars about their own
    domain's mean, shrunk: see `covariance.py`.

    Attributes:
        kind: The name by which `make_selector` makes it.
        width: D.
        counts: (K,), exemplars of each domain.
        sums: (K, D), of their features.
        squares: (D, D), XᵀX of all their features.

    Its buffers are float64 and small; it may stay on the CPU: features come to it.
    """

    kind: str

    def __init__(self, width: int):
        super().__init__()
        if width < 1:
            raise ValueError(f"`width` is {width}; allowed: 1 or more.")
        self.width = width
        self.register_buffer("counts", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(0, width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, width, dtype=torch.float64))
        # Follow from the others, so they are not saved.
        self.register_buffer("means", torch.zeros(0, width, dtype=torch.float64), persistent=False)
        self.register_buffer("whitening", torch.eye(width, dtype=torch.float64), persistent=False)
        self.register_load_state_dict_pre_hook(_take_number_of_domains)
        self.register_load_state_dict_post_hook(_solve_again)

    def fit(self, features_ND: Tensor, labels_N: Tensor, num_domains: int) -> None:
        """Learn from exemplars, and forget what was learned before.

        Args:
            features_ND: Of a `DomainQuery`.
            labels_N: Integers from 0 to `num_domains` − 1.
            num_domains: K. A domain without exemplars is never chosen.

        Raises:
            ValueError: For features or labels of other shapes, labels out of range, or features that are not finite.
        """
        features_ND, labels_N = self._checked(features_ND, labels_N, num_domains)
        self.counts, self.sums = self.counts.new_zeros(0), self.sums.new_zeros(0, self.width)
        self.squares = torch.zeros_like(self.squares)
        self._accumulate(features_ND, labels_N, num_domains)
        self._learn(features_ND, labels_N)
        self._solve()

    @torch.no_grad()
    def predict(self, features_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Choose a domain for each image.

        Returns:
            Index of the domain, int64 (B,), and score, float32 (B,), larger where surer; on the selector's device.

        Raises:
            ValueError: For features of another width.
            RuntimeError: Before there are any exemplars.
        """
        if features_BD.ndim != 2 or features_BD.shape[1] != self.width:
            raise ValueError(f"features are {tuple(features_BD.shape)}; allowed: (B, {self.width}).")
        if not self.counts.any():
            raise RuntimeError("the selector has no exemplars yet: call `fit` first.")
        features_BD = features_BD.to(self.sums)
        index_B = self._rate(features_BD).masked_fill(self.counts == 0, -torch.inf).argmax(1)
        score_B = -self._distances(features_BD).gather(1, index_B[:, None])[:, 0]
        return index_B, score_B.float()

    @abstractmethod
    def _learn(self, features_ND: Tensor, labels_N: Tensor) -> None:
        """What the accumulated sums do not say."""

    @abstractmethod
    def _solve(self) -> None:
        """Bring what follows from the saved buffers up to date; `_share_covariance` is a part of it."""

    @abstractmethod
    def _rate(self, features_BD: Tensor) -> Tensor:
        """(B, K): the domain with the largest value is chosen."""

    def _checked(self, features_ND: Tensor, labels_N: Tensor, num_domains: int) -> tuple[Tensor, Tensor]:
        if features_ND.ndim != 2 or features_ND.shape[1] != self.width or labels_N.shape != features_ND.shape[:1]:
            raise ValueError(
                f"features are {tuple(features_ND.shape)} and labels {tuple(labels_N.shape)}; "
                f"allowed: (N, {self.width}) and (N,)."
            )
        if len(labels_N) and not 0 <= labels_N.min() <= labels_N.max() < num_domains:
            raise ValueError(
                f"labels are {labels_N.min()} to {labels_N.max()}; allowed of {num_domains} domains: "
                f"0 to {num_domains - 1}."
            )
        if not features_ND.isfinite().all():
            row = int((~features_ND.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"features of exemplar {row} are not finite.")
        return features_ND.detach().to(self.sums), labels_N.to(self.sums.device, torch.int64)

    def _accumulate(self, features_ND: Tensor, labels_N: Tensor, num_domains: int) -> None:
        new = max(0, num_domains - len(self.counts))
        is_of_NK = F.one_hot(labels_N, max(num_domains, len(self.counts))).to(self.sums)
        self.counts = F.pad(self.counts, (0, new)) + is_of_NK.sum(0)
        self.sums = F.pad(self.sums, (0, 0, 0, new)) + is_of_NK.T @ features_ND
        self.squares = self.squares + features_ND.T @ features_ND

    def _share_covariance(self) -> None:
        self.means = self.sums / self.counts.clamp(min=1)[:, None]
        self.whitening = whitening(share_covariance(self.counts, self.sums, self.squares))

    def _distances(self, features_BD: Tensor) -> Tensor:
        """(B, K): squared Mahalanobis distances to the means, over D."""
        return square_distances(features_BD @ self.whitening, self.means @ self.whitening) / self.width


class _ClosedForm(DomainSelector):
    """A selector that follows from counts, sums and squares alone: what comes when makes no difference."""

    def add(self, features_ND: Tensor, labels_N: Tensor, num_domains: int) -> None:
        """Learn from more exemplars, of old domains or new ones, without those seen before.

        In whatever parts and order exemplars come, the result is that of one `fit` with all, up to rounding.

        Args:
            features_ND: As for `fit`.
            labels_N: As for `fit`.
            num_domains: K from now on; it never falls.

        Raises:
            ValueError: As `fit`.
        """
        self._accumulate(*self._checked(features_ND, labels_N, num_domains), num_domains)
        self._solve()

    def _learn(self, features_ND: Tensor, labels_N: Tensor) -> None:
        pass


class RidgeSelector(_ClosedForm):
    """Linear regression on the domain, one-hot, with weight decay: ``(x − x̄) W + ȳ`` is largest for the domain chosen.

        W = (X̃ᵀX̃ + λ tr(X̃ᵀX̃)/D · I)⁻¹ X̃ᵀỸ,    X̃ = X − x̄,  Ỹ = Y − ȳ

    Args:
        width: D.
        decay: λ, in mean squares of a centred feature.
    """

    kind = "ridge"

    def __init__(self, width: int, decay: float = 0.01):
        super().__init__(width)
        if decay <= 0:
            raise ValueError(f"`decay` is {decay}; allowed: above 0.")
        self.decay = decay
        self.register_buffer("weight", torch.zeros(width, 0, dtype=torch.float64), persistent=False)

    def _solve(self) -> None:
        self._share_covariance()
        count = self.counts.sum().clamp(min=1)
        scatter = total_scatter(self.counts, self.sums, self.squares)
        cross_DK = self.sums.T - torch.outer(self.sums.sum(0), self.counts) / count
        decay = self.decay * scatter.trace() / self.width
        if decay > 0:
            self.weight = torch.linalg.solve(scatter + decay * torch.eye(self.width).to(scatter), cross_DK)
        else:  # one exemplar, or all alike: no feature says anything
            self.weight = torch.zeros_like(cross_DK)

    def _rate(self, features_BD: Tensor) -> Tensor:
        count = self.counts.sum()
        return (features_BD - self.sums.sum(0) / count) @ self.weight + self.counts / count


class GaussianSelector(_ClosedForm):
    """The domain whose mean is nearest by the covariance that all share: linear discriminant analysis.

    The distance it chooses by is that of the score, so the surest domain is the one chosen.
    """

    kind = "lda"

    def _solve(self) -> None:
        self._share_covariance()

    def _rate(self, features_BD: Tensor) -> Tensor:
        return -self._distances(features_BD)


class NearestMean(_ClosedForm):
    """The domain whose mean is nearest, all features weighing the same."""

    kind = "ncm"

    def _solve(self) -> None:
        self._share_covariance()

    def _rate(self, features_BD: Tensor) -> Tensor:
        return -square_distances(features_BD, self.means)


class LinearSelector(DomainSelector):
    """A linear layer trained by cross-entropy, as in the method's released code: it has to be trained anew for more.

    Args:
        width: D.
        epochs: Rounds over the exemplars.
        batch_size: Exemplars of a step.
        learning_rate: Of Adam.
        seed: Of the layer's start and the order of exemplars; PyTorch's global generator is left as it was.
    """

    kind = "linear_ce"

    def __init__(self, width: int, epochs: int = 10, batch_size: int = 4, learning_rate: float = 1e-3, seed: int = 0):
        super().__init__(width)
        for name, value in (("epochs", epochs), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}; allowed: 1 or more.")
        self.epochs, self.batch_size, self.learning_rate, self.seed = epochs, batch_size, learning_rate, seed
        self.register_buffer("weight", torch.zeros(0, width, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(0, dtype=torch.float64))

    def _learn(self, features_ND: Tensor, labels_N: Tensor) -> None:
        order, K = torch.Generator().manual_seed(self.seed), len(self.counts)
        with torch.enable_grad():
            weight, bias = (
                (torch.rand(*shape, dtype=torch.float64, generator=order) * 2 - 1).div(self.width**0.5).to(self.sums)
                for shape in ((K, self.width), (K,))  # nn.Linear's own start
            )
            optimizer = torch.optim.Adam([weight.requires_grad_(), bias.requires_grad_()], lr=self.learning_rate)
            for _ in range(self.epochs):
                for rows in torch.randperm(len(labels_N), generator=order).split(self.batch_size):
                    rows = rows.to(labels_N.device)
                    loss = F.cross_entropy(F.linear(features_ND[rows], weight, bias), labels_N[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        self.weight, self.bias = weight.detach(), bias.detach()

    def _solve(self) -> None:
        self._share_covariance()

    def _rate(self, features_BD: Tensor) -> Tensor:
        return F.linear(features_BD, self.weight, self.bias)


SELECTORS = {selector.kind: selector for selector in (RidgeSelector, GaussianSelector, NearestMean, LinearSelector)}
"""Classes by kind."""


def make_selector(kind: str, width: int, **options) -> DomainSelector:
    """A selector by name.

    =============  =================================================================================
    ``ridge``      `RidgeSelector`: regression on the domain, closed form, incremental, order-free
    ``lda``        `GaussianSelector`: nearest mean by the shared covariance; incremental, order-free
    ``ncm``        `NearestMean`: nearest mean; incremental, order-free
    ``linear_ce``  `LinearSelector`: a trained linear layer, as in the released code
    =============  =================================================================================

    Args:
        kind: One of the table.
        width: D, the width of the query.
        **options: Of the class.

    Raises:
        ValueError: For an unknown kind.
    """
    if kind not in SELECTORS:
        raise ValueError(f"`kind` is {kind!r}; allowed: {', '.join(map(repr, SELECTORS))}.")
    return SELECTORS[kind](width, **options)


def held_out_scores(selector: DomainSelector, features_ND: Tensor, labels_N: Tensor, folds: int = 5) -> Tensor:
    """The score of each exemplar under a selector that was fitted without it: float32 (N,), on the CPU.

    Exemplars of each domain go into the folds by turns. Scores of exemplars under a selector that has learned from
    them would be too high for a threshold.

    Args:
        selector: Of the kind and options that are meant; copies of it are fitted, itself stays as it is.
        features_ND: Of all exemplars.
        labels_N: Their domains, 0 to K − 1.
        folds: Parts that are left out in turn; if a domain has fewer exemplars, some parts leave out none of it.

    Raises:
        ValueError: For fewer than 2 folds, or a domain that has fewer than 2 exemplars.
    """
    if folds < 2:
        raise ValueError(f"`folds` is {folds}; allowed: 2 or more.")
    num_domains = int(labels_N.max()) + 1 if len(labels_N) else 0
    counts = labels_N.bincount(minlength=num_domains).tolist()
    if not counts or min(counts) < 2:
        raise ValueError(f"the domains have {counts} exemplars; to leave some out each needs 2 or more.")
    place_N = torch.zeros_like(labels_N)
    for domain in range(num_domains):
        place_N[labels_N == domain] = torch.arange(counts[domain], device=labels_N.device)
    scores_N = torch.zeros(len(labels_N))
    for fold in range(min(folds, max(counts))):
        out_N = place_N % folds == fold
        fitted = deepcopy(selector)
        fitted.fit(features_ND[~out_N], labels_N[~out_N], num_domains)
        scores_N[out_N.cpu()] = fitted.predict(features_ND[out_N])[1].cpu()
    return scores_N


def _take_number_of_domains(selector: DomainSelector, state: dict, prefix: str, *_) -> None:
    """Give the buffers as many domains as those have that are loaded; other sizes must agree."""
    for name, buffer in selector.named_buffers(recurse=False):
        if name != "squares" and prefix + name in state:
            setattr(selector, name, buffer.new_zeros(len(state[prefix + name]), *buffer.shape[1:]))


def _solve_again(selector: DomainSelector, _) -> None:
    selector._solve()
