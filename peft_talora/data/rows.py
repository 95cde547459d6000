"""Rows of ``datasets``: of the Hub, or of parquet files; all at hand, or one after another."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from random import Random

import fsspec
import torch
from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder
from pyarrow.parquet import ParquetFile

from ..tasks import Task
from .columns import Column, ColumnDataset, check_tasks
from .transforms import JointAugmentation

BUFFER = 64  # rows among which a stream is shuffled; one of NYUv2 has 3.4 MB


class ColumnStream(torch.utils.data.IterableDataset):
    """Samples of rows that come one after another, augmented, in another order every epoch.

    The order is a function of seed and epoch: among `BUFFER` rows at a time, and of the files that there are. The
    memory that it takes does not depend on how many rows there are. Several processes each read all rows.

    Args:
        rows: a stream of ``datasets``.
        dataset: what makes samples of rows.
        augmentation: of the samples.
        num_rows: in all.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        rows: IterableDataset,
        dataset: ColumnDataset,
        augmentation: JointAugmentation,
        num_rows: int,
        seed: int = 0,
    ):
        self.rows = rows.shuffle(seed=seed, buffer_size=BUFFER)
        self.dataset, self.augmentation, self.num_rows, self.seed = dataset, augmentation, num_rows, seed
        # In shared memory, so that worker processes that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and randomness the next pass has; 0 at first."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[dict]:
        epoch, worker = int(self._epoch), torch.utils.data.get_worker_info()
        self.rows.set_epoch(epoch)
        for place, row in enumerate(islice(self.rows, self.num_rows)):
            seed = Random(f"{self.seed} {epoch} {worker and worker.id} {place}").getrandbits(63)
            yield self.augmentation(self.dataset.sample(row, place), torch.Generator().manual_seed(seed))


def open_rows(source: str, split: str, streaming: bool = False) -> Dataset | IterableDataset:
    """The rows of a split of a data set of the Hub, by its name, or of a folder of parquet files (or what else
    ``datasets`` reads from folders).

    Args:
        source: ``user/name``, or a folder. A folder's files of a split begin with its name, as
            ``data/train-00000-of-00008.parquet``.
        split: such as train; ``train[:10%]`` is a part of it where it is not streamed.
        streaming: read the rows one after another without keeping them.

    Raises:
        ValueError: there is no such data set, or it has no such split.
    """
    try:
        rows = load_dataset(source, split=split, streaming=streaming)
    except Exception as error:  # whatever the Hub, the file system or a parser says
        raise ValueError(f"{source} cannot be read as a data set with the split {split!r}: {error}") from error
    return rows.with_format("numpy")


def open_table(
    source: str, split: str, tasks: Sequence[Task], columns: Mapping[str, Column], image: str = "image"
) -> ColumnDataset:
    """The samples of the rows that `open_rows` gives. Raises ValueError as it does, and for a task without column."""
    check_tasks(tasks, columns, source)
    return ColumnDataset(open_rows(source, split), tasks, columns, image, f"{source} ({split})")


def open_stream(
    source: str,
    split: str,
    tasks: Sequence[Task],
    columns: Mapping[str, Column],
    augmentation: JointAugmentation,
    seed: int = 0,
    skip: int = 0,
    most: int | None = None,
    image: str = "image",
) -> ColumnStream:
    """The samples of rows that come one after another: without the first ``skip`` ones, the next ``most``, or all.

    Raises:
        ValueError: as `open_rows`; for a task without column; or if the number of rows is not known.
    """
    rows = open_rows(source, split, streaming=True)
    dataset = ColumnDataset([], tasks, columns, image, f"{source} ({split})")
    count = count_rows(source, split) - skip
    rows = rows.skip(skip)
    if most is not None and most < count:
        rows, count = rows.take(most), most
    return ColumnStream(rows, dataset, augmentation, count, seed)


def count_rows(source: str, split: str) -> int:
    """How many rows a split has: as its data set says, or as its parquet files do at their ends.

    Raises:
        ValueError: neither is there.
    """
    builder = load_dataset_builder(source)
    known = (builder.info.splits or {}).get(split)
    if known is not None and known.num_examples:
        return known.num_examples
    files = (builder.config.data_files or {}).get(split, [])
    if not files or not all(str(file).endswith(".parquet") for file in files):
        raise ValueError(f"{source} does not say how many rows its split {split!r} has, so it cannot be streamed")
    count = 0
    for file in files:
        with fsspec.open(file, "rb") as handle:
            count += ParquetFile(handle).metadata.num_rows
    return count
