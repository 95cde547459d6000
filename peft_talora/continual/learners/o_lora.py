"""O-LoRA: a LoRA for each domain, orthogonal to the earlier ones, which stay."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from .learner import Batch, Learner


class OLoRA(Learner):
    """O-LoRA (arXiv:2310.14152, equations 6 to 8): the update of domain t is learnt beside those of all earlier ones.

        W + Σ_{i ≤ t} s B_i A_i,    loss + strength · Σ_layers Σ_{i < t} ‖A_i A_tᵀ‖²

    B_i, A_i are frozen for i < t. The squared Frobenius norm is 0 where the new rows are orthogonal to all earlier
    ones. The adapter that the model comes with is that of the first domain, further ones are named ``domain_1``,
    ``domain_2``, ... and have its configuration; all of them stay active.

    ====  ===================  =======================================================
    A_i   ``lora_A.<name>``    (r, inputs), drawn anew, by `seed` and domain for i > 0
    B_i   ``lora_B.<name>``    (outputs, r), zeros
    ====  ===================  =======================================================

    Args:
        model: With one LoRA of linear or convolutional layers, active and without `modules_to_save`.
        predict: See `Learner`, as are `task_loss` and `batches`.
        seed: Of the further adapters.
        strength: Of the penalty.

    Raises:
        ValueError: If the model's adapter is another one, or it has several.
    """

    kind = "o-lora"

    def __init__(self, model: PeftModel, predict, task_loss, batches, seed: int = 0, strength: float = 0.5):
        super().__init__(model, predict, task_loss, batches, seed)
        self.strength = strength
        self.names: list[str] = []
        self._first = _only_lora(model)
        if not self._rows(self._first):
            raise ValueError("model: its LoRA has no A; needed are layers that are linear or convolutions.")

    def begin(self, domain_index: int, domain: Any) -> None:
        """Add the LoRA of the domain.

        Raises:
            ValueError: If it is not the next domain.
        """
        if domain_index != len(self.names):
            raise ValueError(f"domain_index: got {domain_index}; the next domain is {len(self.names)}.")
        self._add(self._first if domain_index == 0 else f"domain_{domain_index}")
        self._activate(learning=True)

    def loss(self, batch: Batch) -> Tensor:
        """That of the task, and the penalty."""
        loss = self.task(batch)
        return loss + self.strength * self.penalty() if len(self.names) > 1 and self.strength else loss

    def penalty(self) -> Tensor:
        """Σ ‖A_i A_tᵀ‖² over layers and earlier domains; needs one."""
        own = self._rows(self.names[-1])
        terms = [
            (rows @ own[layer].T).square().sum()
            for name in self.names[:-1]
            for layer, rows in self._rows(name).items()
        ]
        return torch.stack(terms).sum()

    def end(self, domain_index: int, domain: Any) -> None:
        """Freeze the LoRA of the domain; it stays active."""
        self._activate(learning=False)

    def _add(self, name: str) -> None:
        self.names.append(name)
        if name in self.model.peft_config:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Random(f"{name} {self.seed}").getrandbits(63))
            self.model.add_adapter(name, copy.deepcopy(self.model.peft_config[self._first]))

    def _activate(self, learning: bool) -> None:
        self.model.base_model.set_adapter(self.names)
        for name in self.names:
            for parameter in self._own(name).values():
                parameter.requires_grad_(learning and name == self.names[-1])

    def _own(self, name: str) -> dict[str, nn.Parameter]:
        """Parameters of a domain's LoRA, by their names in the model."""
        return {key: parameter for key, parameter in self.model.named_parameters() if f".{name}." in key}

    def _rows(self, name: str) -> dict[str, Tensor]:
        """A (r, inputs) of a domain, by layer."""
        end = f".lora_A.{name}.weight"
        return {key.removesuffix(end): A.flatten(1) for key, A in self._own(name).items() if key.endswith(end)}

    def _frozen(self) -> dict[str, nn.Parameter]:
        return {key: p for name in self.names for key, p in self._own(name).items() if not p.requires_grad}

    def _state(self) -> dict[str, Any]:
        frozen = {f"frozen.{key}": parameter.detach().clone() for key, parameter in self._frozen().items()}
        return {"names": list(self.names), "learning": bool(self.names and self.trainable()), **frozen}

    @torch.no_grad()
    def _restore(self, state: Mapping[str, Any]) -> None:
        if self.names:
            raise ValueError("state: this learner has begun already; needed is a new one, of a model with one LoRA.")
        for name in state["names"]:
            self._add(name)
        if not self.names:
            return
        self._activate(state["learning"])
        frozen = self._frozen()
        values = {key.removeprefix("frozen."): value for key, value in state.items() if key.startswith("frozen.")}
        if values.keys() != frozen.keys():
            name = min(values.keys() ^ frozen.keys())
            raise ValueError(f"state: it and the model differ in {name!r}; needed are the model's parameters.")
        for key, parameter in frozen.items():
            parameter.copy_(values[key])


def _only_lora(model: PeftModel) -> str:
    """Name of the one adapter."""
    if len(model.peft_config) != 1:
        raise ValueError(
            f"model: has the adapters {', '.join(model.peft_config)}; allowed is one, of the first domain."
        )
    name, config = next(iter(model.peft_config.items()))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"model: its adapter is {config.peft_type.value}; allowed is LORA.")
    if config.modules_to_save:  # PEFT has one copy of these active, not a sum over domains
        raise ValueError(f"modules_to_save: got {config.modules_to_save}; allowed is none.")
    return name
