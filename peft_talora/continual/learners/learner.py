"""What all ways to learn a stream of domains have in common.

A *batch* maps names to what belongs to its images, among them ``"pixel_values"`` (B, 3, H, W):

=======================  ===================================================================================
tensors                  their first axis is that of the images
strings, numbers, None   hold for the whole batch
all else                 takes no part in learning, as lists of names do
=======================  ===================================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

Batch = Mapping[str, Any]


class Learner(ABC):
    """One way to learn domains one after another with one PEFT model; a training loop is the same for all.

        learner = LEARNERS[kind](model, predict, task_loss, batches)
        for index, domain in enumerate(domains):          # [all domains as one], where `learner.at_once`
            learner.begin(index, domain)
            optimizer = Adam(learner.parameters())
            for batch in ...:
                learner.loss(batch).backward()
                ...
            learner.end(index, domain)

    To resume within a domain, make the same learner of the same base, call `load_state_dict` and only then set the
    values of `parameters()` and the optimizer's state, which the caller keeps; further steps are then the same bit for
    bit. `begin` is not called again.

    Args:
        model: With an adapter of any kind, whose trainable parameters are learnt.
        predict: batch → logits of masks (B, P, h, w), through `model`.
        task_loss: (logits, batch) → scalar, a mean over images.
        batches: domain → its training images in batches, each image once, not augmented, always in one order; what
            holds for a whole batch is the same in all of them.
        seed: Of what a learner draws; PyTorch's global generator is left as it was.
    """

    kind: str
    """Name in `LEARNERS`, and in saved states."""
    at_once: bool = False
    """Whether the stream is one stage, in which the images of all domains are mixed."""

    def __init__(
        self,
        model: PeftModel,
        predict: Callable[[Batch], Tensor],
        task_loss: Callable[[Tensor, Batch], Tensor],
        batches: Callable[[Any], Iterable[Batch]],
        seed: int = 0,
    ):
        self.model, self.predict, self.task_loss, self.batches, self.seed = model, predict, task_loss, batches, seed

    @abstractmethod
    def begin(self, domain_index: int, domain: Any) -> None:
        """Prepare for the first step of a domain; domains are counted from 0, without gaps."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """What the next step minimises, a scalar."""

    @abstractmethod
    def end(self, domain_index: int, domain: Any) -> None:
        """Keep what later domains need, after the last step of a domain."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What `state_dict` holds besides the kind."""

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None:
        """Take over what `_state` gave."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is being trained, by its name in the model."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def parameters(self) -> list[nn.Parameter]:
        """What to optimise now, always in one order; after `begin` these may be others.

        Raises:
            ValueError: If nothing in the model is trainable.
        """
        parameters = list(self.trainable().values())
        if not parameters:
            raise ValueError("model: none of its parameters is trainable; needed is an adapter that is being trained.")
        return parameters

    def task(self, batch: Batch) -> Tensor:
        """Loss of the task itself."""
        return self.task_loss(self.predict(batch), batch)

    def state_dict(self) -> dict[str, Any]:
        """What the learner remembers besides `parameters()`: flat, of tensors and of values that JSON has."""
        return {"kind": self.kind, **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` gave.

        Raises:
            ValueError: If the state is that of another kind of learner, or of other parameters.
        """
        if state["kind"] != self.kind:
            raise ValueError(f"state: is that of {state['kind']!r}; this learner is {self.kind!r}.")
        self._restore({name: value for name, value in state.items() if name != "kind"})


def copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Their present values."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def under(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With `prefix` and a dot before each name, for a flat state."""
    return {f"{prefix}.{name}": value.clone() for name, value in values.items()}


def taken(state: Mapping[str, Any], prefix: str, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The values that `under` put into a state: none, or one for each of `parameters`, on its device.

    Raises:
        ValueError: If there are some, but others.
    """
    start = f"{prefix}."
    values = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    wrong = shapes.items() ^ {(name, tuple(parameter.shape)) for name, parameter in parameters.items()}
    if values and wrong:
        name, shape = min(wrong)
        raise ValueError(f"state: {prefix} and model differ in {name!r} {shape}; needed are the model's parameters.")
    return {name: value.to(parameters[name].device, copy=True) for name, value in values.items()}


def single_images(batch: Batch) -> list[dict[str, Any]]:
    """What takes part in learning, as batches of one image each; tensors are copies."""
    plain = whole_batch_values(batch)
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    return [
        plain | {name: value[row : row + 1].clone() for name, value in tensors.items()}
        for row in range(len(batch["pixel_values"]))
    ]


def whole_batch_values(batch: Batch) -> dict[str, Any]:
    """What holds for the whole batch."""
    return {name: value for name, value in batch.items() if value is None or isinstance(value, (str, int, float))}


@contextmanager
def evaluating(model: nn.Module):
    """The model in evaluation mode, without dropout; at the end each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
