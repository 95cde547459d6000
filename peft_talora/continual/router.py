"""Which domain's adapter an image is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .selectors import DomainSelector, make_selector

AUTO, ORACLE, BASE = "auto", "oracle", "base"
ROUTES = (AUTO, ORACLE, BASE)
FOLDS = 5


@dataclass(frozen=True)
class Routing:
    """Where images go.

    Attributes:
        names: A domain's name for each, or ``"base"``, the plain model.
        scores: (B,), larger is surer; None where the selector was not asked.
    """

    names: list[str]
    scores: Tensor | None = None


def check_domain_name(name: str, taken: Sequence[str]) -> None:
    """Raise ValueError for a domain's name that is no identifier, a word of a route, or taken."""
    if not isinstance(name, str) or not name.isidentifier() or name in ROUTES or name in taken:
        raise ValueError(
            f"Domain name {name!r} is not allowed: an identifier is, none of {', '.join((*ROUTES, *taken))}."
        )


class Router:
    """A selector, the names of the domains that it was fitted to, and a way back to the plain model.

    Args:
        selector: Fitted by [`Router.fit`].

    Attributes:
        domains: Names, in the selector's order; empty before it is fitted.
        quantile: As it was given to `fit`.
        threshold: Score below which an image goes to the plain model; None: no image does.
    """

    def __init__(self, selector: DomainSelector):
        self.selector = selector
        self.forget()

    def forget(self) -> None:
        """Be as before `fit`."""
        self.domains: list[str] = []
        self.quantile: float | None = None
        self.threshold: float | None = None

    def fit(self, features: Mapping[str, Tensor], quantile: float | None = None) -> None:
        """Fit the selector to exemplars, and the threshold to their scores under selectors that did not see them.

        Args:
            features: (N, F) by domain.
            quantile: Share of exemplars that score below the threshold; None: there is no threshold.

        Raises:
            ValueError: For a quantile outside [0, 1), or one with fewer than two exemplars of a domain.
        """
        names = list(features)
        labels_N = torch.cat([torch.full((len(features[name]),), k) for k, name in enumerate(names)])
        features_NF = torch.cat([features[name] for name in names])
        labels_N = labels_N.to(features_NF.device)
        threshold = None
        if quantile is not None:
            if not 0 <= quantile < 1:
                raise ValueError(f"`quantile` is {quantile}; allowed: 0 up to below 1.")
            threshold = held_out_scores(self.selector, features_NF, labels_N, len(names)).quantile(quantile).item()
        self.selector.fit(features_NF, labels_N, len(names))
        self.domains, self.quantile, self.threshold = names, quantile, threshold

    def route(
        self,
        count: int,
        route: str,
        known: Sequence[str] = (),
        domains: Sequence[str] | None = None,
        features: Tensor | None = None,
    ) -> Routing:
        """Say where each of `count` images goes.

        Args:
            count: B.
            route: ``"auto"``, by `features`; ``"oracle"``, by `domains`; ``"base"``; or a name of `known`.
            known: All domains.
            domains: Of each image.
            features: (B, F).

        Raises:
            ValueError: For another route, an unknown domain, or if the selector is not fitted.
        """
        if route == AUTO:
            index_B, scores_B = self.selector.predict(features)
            names = [self.domains[index] for index in index_B.tolist()]
            if self.threshold is not None:
                names = [BASE if low else name for name, low in zip(names, scores_B < self.threshold, strict=True)]
            return Routing(names, scores_B)
        names = list(domains or ()) if route == ORACLE else [route] * count
        if len(names) != count:
            raise ValueError(f"`domains` has {len(names)} names; route 'oracle' needs one for each of {count} images.")
        unknown = sorted(set(names) - {*known, BASE})
        if unknown:
            raise ValueError(f"`route` is {route!r}, to {unknown}; known are {', '.join((*ROUTES, *known))}.")
        return Routing(names)


def held_out_scores(selector: DomainSelector, features_NF: Tensor, labels_N: Tensor, num_domains: int) -> Tensor:
    """Scores (N,) of exemplars, each under a selector fitted without it and a part of the others.

    Raises:
        ValueError: If a domain has fewer than two exemplars.
    """
    counts = torch.bincount(labels_N, minlength=num_domains)
    if counts.min() < 2:
        raise ValueError(f"a threshold needs two exemplars of each domain; there are {counts.tolist()}.")
    position_N = torch.cat([torch.arange(int(count)) for count in counts]).to(labels_N.device)
    scores_N = torch.empty(len(features_NF))
    folds = min(FOLDS, int(counts.min()))
    for fold in range(folds):
        out_N = position_N % folds == fold
        other = make_selector(selector.kind, selector.width, selector.seed)
        other.fit(features_NF[~out_N], labels_N[~out_N], num_domains)
        scores_N[out_N] = other.predict(features_NF[out_N])[1].cpu()
    return scores_N
