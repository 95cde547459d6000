"""MoDA as a way to learn a stream: an adapter for each domain, and a router over all that were learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from ..moda import MoDAModel
from .learner import Batch, Learner


class MoDA(Learner):
    """MoDA (arXiv:2412.06418): each domain has an adapter of its own, which no later domain changes.

    Args:
        model: Without domains.
        predict: See `Learner`, as are `task_loss`, `batches` and `seed`; it asks for the domain `model.learning`.
        make_config: Gives the configuration of a domain's adapter.
        quantile: See `MoDAModel.fit_selector`.
    """

    kind = "moda"

    def __init__(
        self,
        model: MoDAModel,
        predict,
        task_loss,
        batches,
        make_config: Callable[[], PeftConfig],
        seed: int = 0,
        quantile: float | None = None,
    ):
        super().__init__(model, predict, task_loss, batches, seed)
        self.make_config, self.quantile = make_config, quantile

    def begin(self, domain_index: int, domain: Any) -> None:
        """Add the domain; its adapter starts from the plain model."""
        self.model.add_domain(domain.name, self.make_config())

    def loss(self, batch: Batch) -> Tensor:
        """That of the task."""
        return self.task(batch)

    def end(self, domain_index: int, domain: Any) -> None:
        """Freeze the adapter, keep the features of some images, fit the selector to those of all domains."""
        self.model.end_learning()
        images = torch.cat([batch["pixel_values"] for batch in self.batches(domain)])
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        self.model.add_exemplars(domain.name, images[chosen[: self.model.exemplars]])
        self.model.fit_selector(self.quantile)

    def _state(self) -> dict[str, Any]:
        model = self.model
        state: dict[str, Any] = {"domains": model.domains, "learning": model.learning}
        for name in model.domains:
            own = model.adapters.own_parameters(name)
            state |= {f"adapter.{name}.{key}": value.detach().clone() for key, value in own.items()}
        if model.adapters is not None:
            shared = model.adapters.shared_parameters()
            state |= {f"shared.{key}": value.detach().clone() for key, value in shared.items()}
        return state | {f"features.{name}": value.clone() for name, value in model.features.items()}

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        model = self.model
        for name in state["domains"]:
            model.add_domain(name, self.make_config())
            if name != state["learning"]:
                model.end_learning()
            # Before the next domain is added: that one makes nothing of factors that have learnt something.
            for key, parameter in model.adapters.shared_parameters().items():
                parameter.copy_(state[f"shared.{key}"])
            for key, parameter in model.adapters.own_parameters(name).items():
                parameter.copy_(state[f"adapter.{name}.{key}"])
        model.features = {
            key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")
        }
        if model.features:
            learnt = [name for name in model.domains if name in model.features]
            model.router.fit({name: model.features[name] for name in learnt}, self.quantile)
