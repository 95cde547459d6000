"""Learning without forgetting: the model as it was teaches the one that learns."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .learner import Batch, Learner, copies, evaluating, taken, under

TEMPERATURE = 2.0


class LwF(Learner):
    """LwF (arXiv:1606.09282): on the images of a new domain, keep to what was predicted before it.

        loss + strength · T² · mean over pixels of CE(σ(z / T), σ(z* / T))

    with the logits z of the model, z* those with the parameters before the domain, without dropout, the binary
    cross-entropy CE less the entropy of its target (so that it is 0 where both agree), and the temperature T = 2 of
    the paper. T² makes the gradient's size independent of T. Images of earlier domains are not needed; in the first
    domain there is nothing to keep.

    Args:
        model: See `Learner`, as are `predict`, `task_loss`, `batches` and `seed`.
        strength: At 0 this is `Sequential`.
    """

    kind = "lwf"

    def __init__(self, model, predict, task_loss, batches, seed: int = 0, strength: float = 1.0):
        super().__init__(model, predict, task_loss, batches, seed)
        self.strength = strength
        self.teacher: dict[str, Tensor] = {}

    def begin(self, domain_index: int, domain: Any) -> None:
        """Copy the parameters, which earlier domains have made, as those of the teacher."""
        self.teacher = copies(self.trainable()) if domain_index > 0 else {}

    def loss(self, batch: Batch) -> Tensor:
        """That of the task, and how far predictions are from the teacher's."""
        if not self.teacher or not self.strength:
            return self.task(batch)
        # Before the pass whose graph needs the learner's own values in place.
        with torch.no_grad(), evaluating(self.model), swapped(self.trainable(), self.teacher):
            targets_BPhw = torch.sigmoid(self.predict(batch).float() / TEMPERATURE)
        logits_BPhw = self.predict(batch)
        soft = logits_BPhw.float() / TEMPERATURE
        entropy = F.binary_cross_entropy(targets_BPhw, targets_BPhw)
        distance = F.binary_cross_entropy_with_logits(soft, targets_BPhw) - entropy
        return self.task_loss(logits_BPhw, batch) + self.strength * TEMPERATURE**2 * distance

    def end(self, domain_index: int, domain: Any) -> None:
        """The next domain makes a teacher of its own."""
        self.teacher = {}

    def _state(self) -> dict[str, Any]:
        return under("teacher", self.teacher)

    def _restore(self, state: dict[str, Any]) -> None:
        self.teacher = taken(state, "teacher", self.trainable())


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]):
    """The parameters with other values; their own ones are back at the end, also after an exception."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
