"""Learning without any care for earlier domains: what the others are compared with."""

from __future__ import annotations

from abc import ABC
from typing import Any

from torch import Tensor

from .learner import Batch, Learner


class _Plain(Learner, ABC):
    """Minimises the loss of the task and remembers nothing."""

    def begin(self, domain_index: int, domain: Any) -> None:
        """There is nothing to prepare."""

    def loss(self, batch: Batch) -> Tensor:
        """That of the task."""
        return self.task(batch)

    def end(self, domain_index: int, domain: Any) -> None:
        """There is nothing to keep."""

    def _state(self) -> dict[str, Any]:
        return {}

    def _restore(self, state: dict[str, Any]) -> None:
        pass


class Sequential(_Plain):
    """One adapter, tuned on each domain from where the one before left it."""

    kind = "sequential"


class Joint(_Plain):
    """One adapter, tuned on the images of all domains at once: no way to learn a stream, but its measure."""

    kind = "joint"
    at_once = True
