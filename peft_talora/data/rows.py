"""Rows of ``datasets``: of the Hub, or of parquet files; all at hand, or one after another."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from random import Random
from typing import Any

import fsspec
import numpy as np
import torch
from datasets import (
    Dataset,
    DatasetBuilder,
    Features,
    Image,
    IterableDataset,
    NamedSplit,
    load_dataset,
    load_dataset_builder,
)
from pyarrow.parquet import ParquetFile

from ..tasks import Task
from .columns import NAME, Column, ColumnDataset, check_tasks
from .transforms import JointAugmentation

BUFFER = 64  # rows among which a stream is shuffled; one of NYUv2 has 4 MB


@dataclass(frozen=True)
class Rows(Sequence):
    """The rows of a table of ``datasets``, its arrays of the types that they were written with.

    NumPy's form of ``datasets`` makes int64 of all integers, which hides eight bits, and NaN of an array that is not
    there.
    """

    table: Dataset

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return as_written(self.table[index], self.table.features)


@dataclass(frozen=True)
class Part:
    """Rows of one file of a stream: those from ``first`` on, ``count`` of them."""

    rows: IterableDataset
    first: int
    count: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in islice(self.rows, self.first, self.first + self.count):
            yield as_written(row, self.rows.features)


class ColumnStream(torch.utils.data.IterableDataset):
    """Samples of rows that come one after another, augmented, in another order every epoch.

    The order is a function of seed and epoch: the files come in any order, and their rows among `BUFFER` at a time.
    The memory that it takes does not depend on how many rows there are. Several processes each read all rows; worker
    processes of a loader, between which ``datasets`` would deal the files, are not for it.

    Args:
        parts: of the files.
        dataset: what makes samples of rows.
        augmentation: of the samples.
        seed: of order and augmentation.
    """

    def __init__(self, parts: Sequence[Part], dataset: ColumnDataset, augmentation: JointAugmentation, seed: int = 0):
        self.parts, self.dataset, self.augmentation, self.seed = tuple(parts), dataset, augmentation, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and randomness the next pass has; 0 at first."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(part.count for part in self.parts)

    def __iter__(self) -> Iterator[dict]:
        random = Random(f"{self.seed} {self.epoch}")
        files = random.sample(self.parts, len(self.parts))
        for place, row in enumerate(_shuffled(chain.from_iterable(files), random)):
            seed = Random(f"{self.seed} {self.epoch} {place}").getrandbits(63)
            yield self.augmentation(self.dataset.sample(row, place), torch.Generator().manual_seed(seed))


def _shuffled(rows: Iterable[dict], random: Random) -> Iterator[dict]:
    kept: list[dict] = []
    for row in rows:
        if len(kept) < BUFFER:
            kept.append(row)
            continue
        place = random.randrange(BUFFER)
        kept[place], row = row, kept[place]
        yield row
    random.shuffle(kept)
    yield from kept


def as_written(row: Mapping[str, Any], features: Features | None) -> dict[str, Any]:
    """A row in NumPy's form, with its arrays as they were written; see `Rows`."""
    return {name: _as_written(value, (features or {}).get(name)) for name, value in row.items()}


def _as_written(value: Any, feature: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    while hasattr(feature, "feature"):  # of lists
        feature = feature.feature
    dtype = getattr(feature, "dtype", None)
    if np.issubdtype(value.dtype, np.floating) and value.size and np.isnan(value).all():
        return None
    return value.astype(dtype) if np.issubdtype(value.dtype, np.integer) and dtype is not None else value


def open_rows(source: str, split: str, columns: Collection[str], streaming: bool = False) -> Dataset | IterableDataset:
    """The rows of a split of a data set of the Hub, by its name, or of a folder of parquet files (or what else
    ``datasets`` reads from folders), in NumPy's form. Images are left encoded.

    Args:
        source: ``user/name``, or a folder. A folder's files of a split begin with its name, as
            ``data/train-00000-of-00008.parquet``.
        split: such as train; ``train[:10%]`` is a part of it where it is not streamed.
        columns: what is read; names of rows too, where there are any.
        streaming: read the rows one after another without keeping them.

    Raises:
        ValueError: there is no such data set, or it has no such split or column.
    """
    try:
        rows = load_dataset(source, split=split, streaming=streaming)
    except Exception as error:  # whatever the Hub, the file system or a parser says
        raise ValueError(f"{source} cannot be read as a data set with the split {split!r}: {error}") from error
    there = rows.column_names
    if there is not None:
        if missing := sorted(set(columns) - set(there)):
            raise ValueError(f"{source} ({split}) has no columns {', '.join(missing)}; it has {', '.join(there)}")
        rows = rows.select_columns([name for name in there if name in {NAME, *columns}])
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows.with_format("numpy")


def open_table(
    source: str,
    split: str,
    tasks: Sequence[Task],
    columns: Mapping[str, Column],
    image: str = "image",
    streamed: bool = False,
    most: int | None = None,
) -> ColumnDataset:
    """The samples of the rows that `open_rows` gives, all at hand.

    Args:
        source: as there.
        split: as there; with ``streamed``, its name alone.
        tasks: whose labels to read.
        columns: task → where they are.
        image: column of the images.
        streamed: fetch these rows alone, by streaming; else ``datasets`` fetches all splits. Either way it keeps what
            it has fetched in its cache.
        most: so many of the first rows. None: all.

    Raises:
        ValueError: as `open_rows`, and for a task without column.
    """
    check_tasks(tasks, columns, source)
    wanted = _wanted(tasks, columns, image)
    if streamed:
        rows = _fetch(source, split, wanted, most)
    else:
        rows = open_rows(source, split, wanted)
        rows = rows if most is None else rows.select(range(min(most, len(rows))))
    return ColumnDataset(Rows(rows), tasks, columns, image, f"{source} ({split})")


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
    dataset = ColumnDataset([], tasks, columns, image, f"{source} ({split})")
    rows = open_rows(source, split, _wanted(tasks, columns, image), streaming=True)
    counts = count_rows(source, split)
    if rows.num_shards == len(counts):
        files = [rows.shard(num_shards=len(counts), index=index) for index in range(len(counts))]
    else:
        files, counts = [rows], [sum(counts)]
    parts, begin = [], 0
    end = sum(counts) if most is None else min(sum(counts), skip + most)
    for file, count in zip(files, counts, strict=True):
        first, last = max(skip, begin), min(end, begin + count)
        if first < last:
            parts.append(Part(file, first - begin, last - first))
        begin += count
    return ColumnStream(parts, dataset, augmentation, seed)


def count_rows(source: str, split: str) -> list[int]:
    """How many rows the files of a split have: as parquet files say at their ends; else in all, as its data set says.

    Raises:
        ValueError: neither is there.
    """
    builder = load_dataset_builder(source)
    files = _files(builder, split)
    if files and all(str(file).endswith(".parquet") for file in files):
        return [_count(file) for file in files]
    known = (builder.info.splits or {}).get(split)
    if known is not None and known.num_examples:
        return [known.num_examples]
    raise ValueError(f"{source} does not say how many rows its split {split!r} has, so it cannot be streamed")


def _count(file: str) -> int:
    with fsspec.open(file, "rb") as handle:
        return ParquetFile(handle).metadata.num_rows


def _files(builder: DatasetBuilder, split: str) -> Sequence[str]:
    return (builder.config.data_files or {}).get(split, [])


def _wanted(tasks: Sequence[Task], columns: Mapping[str, Column], image: str) -> set[str]:
    return {image, *(columns[task.name].column for task in tasks)}


def _fetch(source: str, split: str, wanted: Collection[str], most: int | None) -> Dataset:
    features = open_rows(source, split, wanted, streaming=True).features
    files = _files(load_dataset_builder(source), split)
    told = {
        "source": source,
        "split_name": split,
        "wanted": tuple(sorted(wanted)),
        "most": most,
        "version": str(getattr(files, "origin_metadata", None)),  # so that the cache notices other files
    }
    rows = Dataset.from_generator(_stream, features=features, gen_kwargs=told, split=NamedSplit(split))
    return rows.with_format("numpy")


def _stream(source: str, split_name: str, wanted: tuple[str, ...], most: int | None, version: str) -> Iterator[dict]:
    rows = open_rows(source, split_name, wanted, streaming=True)
    yield from (as_written(row, rows.features) for row in islice(rows, most))
