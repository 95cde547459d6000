"""Augmentation of an image together with its labels, repeatable from (seed, epoch, index)."""

from collections.abc import Collection, Sequence
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tasks import Task


class JointAugmentation:
    """Random scale-crop and horizontal flip of a sample (see ``peft_talora.data``); its size stays.

    The image is scaled up by one of ``scales``, drawn evenly, and cropped back at a random place: bilinear for the
    image, nearest for labels, which keep their values. Depth is divided by the scale: what is larger looks nearer;
    inverse depth and disparity are multiplied by it.
    (Strictly a zoom changes the intrinsics and neither depth nor normals; a network that is not told the intrinsics
    cannot know, so depth follows the usual convention, and normals, whose frame has not turned, stay.) A flip
    negates the x of normals.

    Args:
        tasks: of the samples.
        scales: zoom factors, 1 or more.
        flip: probability of a flip.
        inverse: names of those tasks of kind depth whose labels are inverse depth or disparity.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        scales: Sequence[float] = (1.0, 1.2, 1.5),
        flip: float = 0.5,
        inverse: Collection[str] = (),
    ):
        if not scales or min(scales) < 1:
            raise ValueError(f"scales is {scales!r}; allowed: one or more numbers of at least 1")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is {flip!r}; allowed: a probability from 0 to 1")
        self.tasks = {task.name: task for task in tasks}
        self.scales, self.flip, self.inverse = tuple(scales), flip, frozenset(inverse)

    def __call__(self, sample: dict, generator: torch.Generator) -> dict:
        """Return an augmented sample, drawn from ``generator``; the given one stays as it is."""
        scale = self.scales[int(torch.randint(len(self.scales), (), generator=generator))]
        place = torch.rand(2, generator=generator).tolist()
        mirrored = float(torch.rand((), generator=generator)) < self.flip
        if scale > 1:
            sample = self._zoom(sample, scale, place)
        return self._mirror(sample) if mirrored else sample

    def _zoom(self, sample, scale, place):
        image = sample["image"]
        size = image.shape[1:]
        scaled = [round(scale * length) for length in size]
        starts = [int(share * (large - length + 1)) for share, large, length in zip(place, scaled, size, strict=True)]
        (top, left), (H, W) = starts, size
        image = F.interpolate(image[None], scaled, mode="bilinear", align_corners=False)[0]
        rows, columns = (
            ((torch.arange(length) + start + 0.5) * (length / large)).long()
            for length, start, large in zip(size, starts, scaled, strict=True)
        )
        labels = {}
        for name, label in sample["labels"].items():
            label = label[..., rows[:, None], columns]
            if self.tasks[name].kind == "depth":
                label = label * scale if name in self.inverse else label / scale
            labels[name] = label
        return {**sample, "image": image[:, top : top + H, left : left + W].contiguous(), "labels": labels}

    def _mirror(self, sample):
        labels = {name: self._mirror_label(self.tasks[name], label) for name, label in sample["labels"].items()}
        return {**sample, "image": sample["image"].flip(-1), "labels": labels}

    @staticmethod
    def _mirror_label(task: Task, label: Tensor) -> Tensor:
        label = label.flip(-1)
        if task.kind == "normals":
            label[0].neg_()
        return label


class AugmentedDataset(torch.utils.data.Dataset):
    """A dataset of samples with an augmentation whose randomness is a pure function of (seed, epoch, index).

    So a run resumed in epoch n sees the pixels that an uninterrupted run sees in epoch n, whatever the number of
    workers.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, augmentation: JointAugmentation, seed: int = 0):
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed
        # In shared memory, so that worker processes that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose randomness the next items have; 0 at first."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        seed = Random(f"{self.seed} {int(self._epoch)} {index}").getrandbits(63)
        return self.augmentation(self.dataset[index], torch.Generator().manual_seed(seed))
