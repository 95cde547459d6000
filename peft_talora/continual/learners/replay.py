"""Experience replay: some images of earlier domains are kept and learnt again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .learner import Batch, Learner, single_images, whole_batch_values


class ExperienceReplay(Learner):
    """ER with a reservoir (arXiv:1902.10486): each step learns the batch and as many images of earlier domains.

        (B · loss of the batch + n · loss of the replayed) / (B + n),    n = min(B, images in the buffer)

    After a domain its images pass a reservoir: at any time each image seen is in the buffer with the same chance.
    What is kept of an image is what its batch has of it, tensors on the CPU.

    Args:
        model: See `Learner`, as are `predict`, `task_loss` and `batches`.
        seed: Of the reservoir and of what is replayed.
        size: Images in the buffer at most; at 0 this is `Sequential`.

    Raises:
        ValueError: For a negative `size`.
    """

    kind = "er"

    def __init__(self, model, predict, task_loss, batches, seed: int = 0, size: int = 64):
        super().__init__(model, predict, task_loss, batches, seed)
        if size < 0:
            raise ValueError(f"size: got {size}; needed is at least 0.")
        self.size, self.seen = size, 0
        self.buffer: list[dict[str, Any]] = []
        self.generator = torch.Generator().manual_seed(seed)

    def begin(self, domain_index: int, domain: Any) -> None:
        """There is nothing to prepare."""

    def loss(self, batch: Batch) -> Tensor:
        """Of the batch and of what is replayed, a mean over their images."""
        loss = self.task(batch)
        if not self.buffer:
            return loss
        count = len(batch["pixel_values"])
        replayed = self._draw(min(count, len(self.buffer)), batch["pixel_values"].device)
        again = len(replayed["pixel_values"])
        return (count * loss + again * self.task(replayed)) / (count + again)

    def _draw(self, count: int, device: torch.device) -> dict[str, Any]:
        chosen = torch.randperm(len(self.buffer), generator=self.generator)[:count].tolist()
        images = [self.buffer[index] for index in chosen]
        tensors = [name for name, value in images[0].items() if torch.is_tensor(value)]
        return whole_batch_values(images[0]) | {
            name: torch.cat([image[name] for image in images]).to(device) for name in tensors
        }

    def end(self, domain_index: int, domain: Any) -> None:
        """Let the images of the domain pass the reservoir.

        Raises:
            ValueError: If a value of a whole batch is not that of former ones, so that images cannot be mixed.
        """
        if not self.size:
            return
        for batch in self.batches(domain):
            for image in single_images(batch):
                self._offer({name: value.cpu() if torch.is_tensor(value) else value for name, value in image.items()})

    def _offer(self, image: dict[str, Any]) -> None:
        plain, former = whole_batch_values(image), whole_batch_values(self.buffer[0] if self.buffer else image)
        if plain != former:
            raise ValueError(
                f"domain: `batches` gave {plain} with an image, before {former}; needed are equal values."
            )
        self.seen += 1
        if len(self.buffer) < self.size:
            self.buffer.append(image)
            return
        place = int(torch.randint(self.seen, (), generator=self.generator))
        if place < self.size:
            self.buffer[place] = image

    def _state(self) -> dict[str, Any]:
        kept = {
            f"buffer.{index}.{name}": value.clone() if torch.is_tensor(value) else value
            for index, image in enumerate(self.buffer)
            for name, value in image.items()
        }
        return {"seen": self.seen, "generator": self.generator.get_state(), **kept}

    def _restore(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
        self.generator.set_state(state["generator"].cpu())
        images: dict[int, dict[str, Any]] = {}
        for key, value in state.items():
            if key.startswith("buffer."):
                _, index, name = key.split(".", 2)
                kept = value.to("cpu", copy=True) if torch.is_tensor(value) else value
                images.setdefault(int(index), {})[name] = kept
        if len(images) > self.size:
            raise ValueError(f"state: has {len(images)} images; the buffer's size is {self.size}.")
        self.buffer = [images[index] for index in sorted(images)]
