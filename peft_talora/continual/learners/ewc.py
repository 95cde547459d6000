"""Elastic weight consolidation: what mattered to earlier domains moves less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .learner import Batch, Learner, copies, evaluating, single_images, taken, under


class EWC(Learner):
    """EWC (arXiv:1612.00796) in its online form (arXiv:1805.06370, section 3), over the trained parameters alone.

        loss + strength / 2 · Σ F (θ − θ*)²,    after each domain  F ← gamma · F + F_new,  θ* ← θ

    where F_new is the mean over the domain's images of the squared gradient of the task's loss, image by image and
    without dropout: the diagonal of the empirical Fisher matrix, up to the scale of the loss. One F and one θ* serve
    all earlier domains.

    Args:
        model: See `Learner`, as are `predict`, `task_loss`, `batches` and `seed`.
        strength: At 0 this is `Sequential`, and F is not computed. The right size depends on that of the gradients.
        gamma: In [0, 1]: how much of F stays with each further domain.

    Raises:
        ValueError: For a `gamma` outside [0, 1].
    """

    kind = "ewc"

    def __init__(
        self, model, predict, task_loss, batches, seed: int = 0, strength: float = 1000.0, gamma: float = 0.95
    ):
        super().__init__(model, predict, task_loss, batches, seed)
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma: got {gamma}; allowed is 0 to 1.")
        self.strength, self.gamma = strength, gamma
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def begin(self, domain_index: int, domain: Any) -> None:
        """There is nothing to prepare."""

    def loss(self, batch: Batch) -> Tensor:
        """That of the task, and the penalty."""
        loss = self.task(batch)
        return loss + self.strength / 2 * self.penalty() if self.fisher and self.strength else loss

    def penalty(self) -> Tensor:
        """Σ F (θ − θ*)²; needs an earlier domain."""
        terms = [
            (self.fisher[name] * (parameter - self.anchor[name]).square()).sum()
            for name, parameter in self.trainable().items()
        ]
        return torch.stack(terms).sum()

    def end(self, domain_index: int, domain: Any) -> None:
        """Measure what matters to the domain.

        Raises:
            ValueError: If the domain has no image.
        """
        if not self.strength:
            return
        new = self._measure(domain)
        self.fisher = {name: self.gamma * self.fisher[name] + new[name] for name in new} if self.fisher else new
        self.anchor = copies(self.trainable())

    def _measure(self, domain: Any) -> dict[str, Tensor]:
        trainable, count = self.trainable(), 0
        total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in trainable.items()}
        with evaluating(self.model):
            for batch in self.batches(domain):
                for image in single_images(batch):
                    gradients = torch.autograd.grad(self.task(image), list(trainable.values()), allow_unused=True)
                    for name, gradient in zip(trainable, gradients, strict=True):
                        if gradient is not None:  # what the loss does not use does not matter to it
                            total[name] += gradient.float().square()
                    count += 1
        if not count:
            raise ValueError("domain: `batches` gave no image of it; needed is at least one.")
        return {name: value / count for name, value in total.items()}

    def _state(self) -> dict[str, Any]:
        return under("fisher", self.fisher) | under("anchor", self.anchor)

    def _restore(self, state: dict[str, Any]) -> None:
        self.fisher, self.anchor = (taken(state, prefix, self.trainable()) for prefix in ("fisher", "anchor"))
