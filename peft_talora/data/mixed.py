"""Several data sets as one, each with labels of its own tasks, and how often each is drawn from.

Axes: K data sets.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random

import torch
from torch.utils.data import Dataset, Sampler, Subset


class MixedTasks(Dataset):
    """The samples of several data sets, one data set after the other; a sample's name is ``<data set>/<its name>``.

    Args:
        parts: by name, sequences of samples (see ``peft_talora.data``); each may have labels of other tasks.

    Raises:
        ValueError: without parts, or if one is empty.
    """

    def __init__(self, parts: Mapping[str, Dataset]):
        if not parts or not all(len(part) for part in parts.values()):
            sizes = {name: len(part) for name, part in parts.items()}
            raise ValueError(f"parts have {sizes} samples; allowed: one part or more, none of them empty")
        self.parts = dict(parts)
        self.sizes = [len(part) for part in parts.values()]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} samples")
        for name, part in self.parts.items():
            if index < len(part):
                sample = part[index]
                return {**sample, "name": f"{name}/{sample['name']}"}
            index -= len(part)
        raise AssertionError("unreachable: the index is inside")

    def split_off(self, count_of: Callable[[int], int], seed: int) -> tuple["MixedTasks", "MixedTasks"]:
        """Two mixtures: without and with some samples of every part, drawn by the seed.

        Args:
            count_of: size of a part → how many of it go to the second.
            seed: of what is drawn.
        """
        kept, held = {}, {}
        for name, part in self.parts.items():
            order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed)).tolist()
            count = count_of(len(part))
            kept[name], held[name] = Subset(part, sorted(order[count:])), Subset(part, sorted(order[:count]))
        return MixedTasks(kept), MixedTasks(held)


class MixedSampler(Sampler[int]):
    """An epoch of indices of a `MixedTasks`, with shares of its parts as asked, exact to a sample.

    The order of an epoch, and which samples of each part are in it, are a function of seed and epoch alone. Over the
    epochs each part's samples come in rounds: none is seen twice before all were seen once.

    Args:
        sizes: of the parts.
        shares: of the parts; they are scaled to sum to 1.
        seed: see above.
        num_samples: of an epoch. None: as many as there are.

    Raises:
        ValueError: for another number of shares than parts, one that is no positive number, or one by which an epoch
            has no sample of its part.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], seed: int = 0, num_samples: int | None = None):
        if len(shares) != len(sizes) or not all(0 < share < float("inf") for share in shares):
            raise ValueError(f"shares are {list(shares)}; {len(sizes)} data sets need as many positive numbers")
        self.sizes, self.seed, self.epoch = list(sizes), seed, 0
        self._turn: tuple[int, int] | None = None
        self._round: list[int] = []
        self.counts = apportion(shares, sum(sizes) if num_samples is None else num_samples)
        if 0 in self.counts:
            raise ValueError(
                f"shares are {list(shares)}, by which an epoch of {sum(self.counts)} samples has {self.counts} of the "
                "data sets; each must have one or more"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; 0 at first."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[int]:
        indices, first = [], 0
        for k, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            begin = self.epoch * count
            indices += [first + self._nth(k, size, place) for place in range(begin, begin + count)]
            first += size
        order = torch.randperm(len(indices), generator=self._generator("order", self.epoch)).tolist()
        return iter([indices[place] for place in order])

    def _nth(self, k: int, size: int, place: int) -> int:
        """The sample at a place of the endless sequence of a part's rounds."""
        turn, within = divmod(place, size)
        if self._turn != (k, turn):
            self._turn = k, turn
            self._round = torch.randperm(size, generator=self._generator(f"part {k}", turn)).tolist()
        return self._round[within]

    def _generator(self, what: str, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(Random(f"mixed {self.seed} {what} {number}").getrandbits(63))


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, each within one of its share of it (largest remainders)."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: counts[k] - exact[k])
    for k in by_remainder[: total - sum(counts)]:
        counts[k] += 1
    return counts


def shares_by_size(sizes: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Shares in proportion to size^(1 / temperature): at 1 as the sizes are, the larger the more alike (K,).

    Raises:
        ValueError: for a temperature that is not positive.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; allowed: a positive number")
    weights = [size ** (1 / temperature) for size in sizes]
    return [weight / sum(weights) for weight in weights]
