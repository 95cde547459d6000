"""Which adapter each image of a batch goes to, and which images go to the plain model.

Axes: N exemplars, B images, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .selectors import DomainSelector, held_out_scores

AUTO, ORACLE, BASE = ROUTES = ("auto", "oracle", "base")
"""Ways to route that are no domain's name."""


@dataclass(frozen=True)
class Routing:
    """Where a batch goes.

    Attributes:
        names: (B,) of domains, or ``"base"``, the plain model.
        scores: (B,) of the selector; None where it was not asked.
    """

    names: list[str]
    scores: Tensor | None = None


class Router:
    """Sends images to domains.

    ================  ================================================================================================
    ``"auto"``        to the domain that the selector chooses; to the plain model if its score is below the threshold,
                      or if there is no domain yet
    ``"oracle"``      to the domain that is said to be each image's own
    a domain's name   all to this one
    ``"base"``        all to the plain model
    ================  ================================================================================================

    Attributes:
        domains: Names in the order of the selector's labels.
        threshold: The lowest score of an image of a known domain; None: all images are taken to be of one.

    Args:
        selector: What chooses. It learns by `fit`, or has learned already.
        domains: That it knows.
        threshold: See above.
    """

    def __init__(self, selector: DomainSelector, domains: Sequence[str] = (), threshold: float | None = None):
        self.selector, self.threshold = selector, threshold
        self.domains = _checked(domains)

    def fit(self, features_ND: Tensor, labels_N: Tensor, domains: Sequence[str]) -> None:
        """Learn from exemplars which domain is which; a threshold is void then, so it is None afterwards.

        Args:
            features_ND: Of the exemplars of all domains.
            labels_N: Positions in `domains`.
            domains: Names, all different: identifiers, none of `ROUTES`.

        Raises:
            ValueError: For names that are not allowed, or as the selector's `fit`.
        """
        domains = _checked(domains)
        self.selector.fit(features_ND, labels_N, len(domains))
        self.domains, self.threshold = domains, None

    def calibrate(self, quantile: float, features_ND: Tensor, labels_N: Tensor, folds: int = 5) -> Tensor:
        """Set the threshold so that about `quantile` of the images of known domains fall below it.

        It is a quantile of the scores that exemplars get from selectors which have not seen them.

        Args:
            quantile: The share of images that are sent to the plain model though an adapter knows them, in (0, 1).
            features_ND: Of the exemplars, as for `fit`.
            labels_N: As for `fit`.
            folds: See `held_out_scores`.

        Returns:
            The scores, (N,).

        Raises:
            ValueError: For a quantile out of range, or as `held_out_scores`.
        """
        if not 0 < quantile < 1:
            raise ValueError(f"`quantile` is {quantile}; allowed: above 0 and below 1.")
        scores_N = held_out_scores(self.selector, features_ND, labels_N, folds)
        self.threshold = scores_N.quantile(quantile, interpolation="lower").item()
        return scores_N

    def route(self, features_BD: Tensor, how: str = AUTO, domains: Sequence[str] | None = None) -> Routing:
        """Say where each image goes.

        Args:
            features_BD: Of the images; read by ``"auto"`` only, else just counted.
            how: See the class.
            domains: For ``"oracle"``: each image's own, or ``"base"`` for one of no known domain.

        Raises:
            ValueError: For another `how`, unknown domains, or `domains` without ``"oracle"`` and the reverse.
        """
        if (domains is not None) != (how == ORACLE):
            raise ValueError(f"`how` is {how!r} and `domains` {domains!r}; 'oracle' needs them, and no other route.")
        if how == AUTO:
            return self._choose(features_BD)
        names = list(domains) if how == ORACLE else [how] * len(features_BD)
        if len(names) != len(features_BD):
            raise ValueError(f"`domains` has {len(names)} names; {len(features_BD)} images need one each.")
        if unknown := sorted({*names} - {*self.domains, BASE}):
            argument, also = ("domains", "") if how == ORACLE else ("how", f"{AUTO!r}, {ORACLE!r}, ")
            raise ValueError(f"`{argument}` has {unknown}; allowed: {also}{BASE!r} and {self.domains}.")
        return Routing(names)

    def _choose(self, features_BD: Tensor) -> Routing:
        if not self.domains:
            return Routing([BASE] * len(features_BD))
        index_B, scores_B = self.selector.predict(features_BD)
        threshold = -torch.inf if self.threshold is None else self.threshold
        known_B = (scores_B >= threshold).tolist()
        names = [self.domains[i] if known else BASE for i, known in zip(index_B.tolist(), known_B, strict=True)]
        return Routing(names, scores_B)


def check_route_name(name: str) -> None:
    """Raise ValueError unless `name` is an identifier and none of `ROUTES`."""
    if not name.isidentifier() or name in ROUTES:
        raise ValueError(f"domain {name!r}: allowed is an identifier that is none of {', '.join(ROUTES)}.")


def _checked(domains: Sequence[str]) -> list[str]:
    for name in domains:
        check_route_name(name)
    if len({*domains}) < len(domains):
        raise ValueError(f"`domains` are {list(domains)}; allowed: each name once.")
    return list(domains)
