"""From samples to a batch: images as SAM takes them, labels at their own size."""

from collections.abc import Sequence

import torch
from transformers import BaseImageProcessor, SamImageProcessorPil

from ..tasks import Task


def make_image_processor(image_size: int, normalize: bool = True) -> SamImageProcessorPil:
    """Make SAM's image processor for encoders of ``image_size`` pixels; it takes ordinary 8-bit images.

    It resizes the long side to ``image_size``, scales to [0, 1], subtracts SAM's mean and divides by its standard
    deviation unless ``normalize`` is False, and pads with zeros at the right and bottom.
    """
    if image_size < 1:
        raise ValueError(f"image_size is {image_size!r}; allowed: pixels, 1 or more")
    return SamImageProcessorPil(
        size={"longest_edge": image_size},
        pad_size={"height": image_size, "width": image_size},
        do_normalize=normalize,
    )


class Collator:
    """Make a batch from samples (see ``peft_talora.data``).

    ==================  =============================================================================================
    ``pixel_values``    (B, 3, S, S) float32, from the image processor
    ``original_sizes``  (B, 2) int64, (height, width) of each image
    ``labels``          task name → (B, H, W) or (B, 3, H, W) for every task, H and W the largest of the batch; padded
                        at the right and bottom, and filled where a sample has none, with the task's ignored label
    ==================  =============================================================================================

    Args:
        tasks: the tasks of the batch.
        image_processor: as from ``make_image_processor``. It is given images rounded to 8 bits, as Pillow resizes
            no others in colour.
    """

    def __init__(self, tasks: Sequence[Task], image_processor: BaseImageProcessor):
        self.tasks, self.image_processor = tuple(tasks), image_processor

    def __call__(self, samples: Sequence[dict]) -> dict:
        """Batch ``samples``; ValueError if one has no labels at all."""
        for sample in samples:
            if not sample["labels"]:
                raise ValueError(f"sample {sample['name']!r} has no labels; allowed: a label of at least one task")
        images = [(sample["image"] * 255).round().to(torch.uint8).numpy() for sample in samples]
        processed = self.image_processor(images, input_data_format="channels_first", return_tensors="pt")
        return {
            "pixel_values": processed["pixel_values"],
            "original_sizes": torch.tensor([image.shape[1:] for image in images]),
            "labels": {task.name: self._stack(task, samples) for task in self.tasks},
        }

    @staticmethod
    def _stack(task, samples):
        sizes = [tuple(sample["image"].shape[1:]) for sample in samples]
        largest = max(height for height, _ in sizes), max(width for _, width in sizes)
        batch = []
        for sample, (height, width) in zip(samples, sizes, strict=True):
            label = task.empty_label(largest)
            if task.name in sample["labels"]:
                label[..., :height, :width] = sample["labels"][task.name]
            batch.append(label)
        return torch.stack(batch)
