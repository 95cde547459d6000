"""Where images and labels come from: arguments that say so, the samples of a split, batches of training images."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from .data import (
    FORMATS,
    SYNTHETIC_TASKS,
    AugmentedDataset,
    Collator,
    Column,
    ColumnStream,
    FolderDataset,
    JointAugmentation,
    MixedSampler,
    MixedTasks,
    SyntheticScenes,
    open_stream,
    open_table,
    read_column_map,
    readable,
    shares_by_size,
)
from .losses import IGNORE_INDEX
from .tasks import Task


@dataclass
class DataArguments:
    """Where a recipe's images and labels come from."""

    data_root: str | None = field(
        default=None, metadata={"help": "Folder with <split>/image and <split>/<task>. None: generated scenes."}
    )
    mix: list[str] = field(
        default_factory=list,
        metadata={"help": "More such folders; each may lack tasks that another one has, and that one's images too."},
    )
    mix_by: list[str] = field(
        default_factory=lambda: ["proportional"],
        metadata={
            "help": "How often each folder is trained on: 'proportional' to its images, 'temperature=T' for their "
            "number to the power of 1/T, or a weight for `data_root` and each of `mix`."
        },
    )
    data_format: list[str] = field(
        default_factory=lambda: ["folder"],
        metadata={
            "help": f"What `data_root` is: a 'folder' as above, one of {', '.join(FORMATS)} as it is published, or a "
            "YAML file of columns, and `data_root` a folder or a data set of the Hub. With `mix`, one for each or one "
            "for all."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training rows of a data set of the Hub, or of parquet files, without keeping them."
        },
    )
    ignored_class: int = field(
        default=IGNORE_INDEX, metadata={"help": "Class in the files of segmentation and parts that means 'no label'."}
    )
    derive_edges: bool = field(default=False, metadata={"help": "Take edges from the borders of segmentation."})
    allow_unlabelled: bool = field(
        default=False, metadata={"help": "Take images of the folder that have a label of none of the tasks, too."}
    )
    on_bad_sample: str = field(
        default="raise",
        metadata={"help": "'raise' the error, or 'skip' samples that cannot be read: they are named and left out."},
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first images of a split alone. None: on all."}
    )
    num_images: int = field(
        default=360, metadata={"help": "Generated scenes in the split `train`; others have an eighth."}
    )
    data_seed: int = field(default=0, metadata={"help": "Of generated scenes."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Images per evaluation pass and process."})
    num_threads: int | None = field(
        default=None, metadata={"help": "CPU threads per process; the order of sums depends on it. None: all cores."}
    )


@dataclass
class SplitArguments(DataArguments):
    """Which images are trained on and how, which choose the checkpoint, which give the reported figures."""

    train_split: str = field(default="train", metadata={"help": "Split that is trained on."})
    val_split: str | None = field(
        default=None, metadata={"help": "Split that chooses the checkpoint. None: a part of the training images."}
    )
    val_fraction: float = field(default=0.1, metadata={"help": "That part, as a share."})
    test_split: str = field(default="test", metadata={"help": "Split of the reported figures; it chooses nothing."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first images of the split alone. None: on all."}
    )
    augment: bool = field(default=True, metadata={"help": "Random scale-crop (1, 1.2, 1.5) and horizontal flip."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Images per batch and process."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that prepare batches; 0: none."})


def open_split(
    args: DataArguments, split: str, tasks: Sequence[Task], image_size: int, most: int | None = None
) -> Dataset:
    """The samples of one split: of a folder, or generated.

    Args:
        args: Where from.
        split: Name of a folder, or of a set of generated scenes; splits share no scene.
        tasks: Whose labels to read.
        image_size: Of generated scenes, in pixels.
        most: So many of its first samples, of each folder of a mixture. None: all.

    Raises:
        ValueError: If generated scenes have more classes than a task, for another `on_bad_sample`, or if no folder has
            labels of a task.
    """
    if args.on_bad_sample not in ("raise", "skip"):
        raise ValueError(f"`on_bad_sample` is {args.on_bad_sample!r}; allowed: 'raise', 'skip'.")
    if args.data_root is None:
        if args.mix:
            raise ValueError(f"`mix` is {args.mix}; it needs `data_root` as the first folder.")
        for task in tasks:
            if task.out_channels < SYNTHETIC_TASKS.get(task.name, 0):
                raise ValueError(
                    f"task {task.name!r} has {task.out_channels} channels; generated scenes need "
                    f"{SYNTHETIC_TASKS[task.name]}."
                )
        num_images = args.num_images if split == "train" else max(1, args.num_images // 8)
        scenes = SyntheticScenes(split, num_images, image_size, args.data_seed, [task.name for task in tasks])
        return _first(scenes, most)
    formats = _formats(args)
    if not args.mix:
        return _first(_open_one(args, args.data_root, formats[args.data_root], split, tasks), most)
    found = {root: _tasks_there(args, root, kind, split, tasks) for root, kind in formats.items()}
    if missing := [task.name for task in tasks if not any(task in there for there in found.values())]:
        raise ValueError(f"none of {', '.join(formats)} has labels of {', '.join(missing)} in the split {split!r}")
    opened = {root: _first(_open_one(args, root, formats[root], split, there), most) for root, there in found.items()}
    return MixedTasks({root: part if found[root] else _Unlabelled(part, tasks[0]) for root, part in opened.items()})


class _Unlabelled(Dataset):
    """Images of a place that has labels of other tasks alone, with a label of one that has no labelled pixel."""

    def __init__(self, images: Dataset, task: Task):
        self.images, self.task = images, task

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        sample = self.images[index]
        return {**sample, "labels": {self.task.name: self.task.empty_label(tuple(sample["image"].shape[1:]))}}


def _first(dataset: Dataset, most: int | None) -> Dataset:
    _check_most(most)
    return dataset if most is None or most >= len(dataset) else Subset(dataset, range(most))


def _check_most(most: int | None) -> None:
    if most is not None and most < 1:
        raise ValueError(f"`max_train_samples` or `max_eval_samples` is {most}; allowed: 1 or more.")


def _formats(args: DataArguments) -> dict[str, str]:
    """The format of each place that images come from."""
    roots, formats = [args.data_root, *args.mix], args.data_format
    if twice := {root for root in roots if roots.count(root) > 1}:
        raise ValueError(f"`data_root` and `mix` name {', '.join(sorted(twice))} twice; allowed: different places.")
    for kind in formats:
        if kind != "folder" and kind not in FORMATS and Path(kind).suffix not in (".yaml", ".yml"):
            raise ValueError(f"`data_format` has {kind!r}; allowed: 'folder', {', '.join(FORMATS)}, or a YAML file.")
    if len(formats) not in (1, len(roots)):
        raise ValueError(f"`data_format` is {formats}; allowed: one, or one for each of {', '.join(roots)}.")
    return dict(zip(roots, formats * len(roots) if len(formats) == 1 else formats, strict=True))


def _columns(kind: str) -> tuple[Mapping[str, Column], str]:
    """Where rows of a format have labels and images."""
    return (FORMATS[kind].columns, "image") if kind in FORMATS else read_column_map(kind)


def _inverse(args: DataArguments) -> set[str]:
    """The tasks whose labels are inverse depth."""
    kinds = set(_formats(args).values()) - {"folder"} if args.data_root is not None else set()
    return {task for kind in kinds for task, column in _columns(kind)[0].items() if column.inverse}


def _tasks_there(args: DataArguments, root: str, kind: str, split: str, tasks: Sequence[Task]) -> list[Task]:
    """The tasks that a place has labels of, or of whose kind it can derive some.

    Raises:
        ValueError: If there is none, unless images without labels are allowed.
    """
    if kind != "folder":
        columns = _columns(kind)[0]
        if not args.allow_unlabelled and not any(task.name in columns for task in tasks):
            raise ValueError(f"{root} ({kind}) has labels of {', '.join(columns)} alone")
        return [task for task in tasks if task.name in columns]
    folder = Path(root, split)
    derivable = args.derive_edges and any(
        (folder / name).is_dir() for name in ["segmentation", *(t.name for t in tasks if t.kind == "segmentation")]
    )
    there = [t for t in tasks if (folder / t.name).is_dir() or (derivable and t.kind == "edges")]
    if not there and not args.allow_unlabelled:
        raise ValueError(f"{folder} has none of the folders {', '.join(task.name for task in tasks)}")
    return there


def _open_one(args: DataArguments, root: str, kind: str, split: str, tasks: Sequence[Task]) -> Dataset:
    if kind == "folder":
        dataset = _open_folder(args, root, split, tasks)
    elif kind in FORMATS:
        dataset = FORMATS[kind].open(root, split, tasks)
    else:
        columns, image = read_column_map(kind)
        dataset = open_table(root, split, tasks, columns, image)
    if args.on_bad_sample == "raise":
        return dataset
    found, problems = readable(dataset)
    if problems:
        listed = "\n".join(problems)
        warnings.warn(f"{len(problems)} of {len(dataset)} samples of {split!r} are skipped:\n{listed}", stacklevel=2)
    return found


def _open_folder(args: DataArguments, root: str, split: str, tasks: Sequence[Task]) -> FolderDataset:
    folders = {task.name for task in tasks if task.kind in ("segmentation", "parts")}
    edges = [task for task in tasks if task.kind == "edges"]
    if args.derive_edges and not folders and any(not Path(root, split, t.name).is_dir() for t in edges):
        folders = {"segmentation"}
    ignored = {} if args.ignored_class == IGNORE_INDEX else dict.fromkeys(folders, args.ignored_class)
    return FolderDataset(root, split, tasks, args.derive_edges, ignored, allow_unlabelled=args.allow_unlabelled)


def open_splits(
    args: SplitArguments, seed: int, tasks: Sequence[Task], image_size: int
) -> tuple[AugmentedDataset | ColumnStream, Dataset, Dataset]:
    """Training, validation and test images. Without a validation split, training images are held out for it.

    Which images, in which order and how augmented depends on their number and the seed, not on the tasks.
    """
    read = partial(open_split, args, tasks=tasks, image_size=image_size)
    scales, flip = ((1.0, 1.2, 1.5), 0.5) if args.augment else ((1.0,), 0.0)
    augmentation = JointAugmentation(tasks, scales, flip, _inverse(args))
    if args.streaming:
        return _open_streamed(args, seed, tasks, augmentation)
    train_set = read(args.train_split, most=args.max_train_samples)
    test_set = read(args.test_split, most=args.max_eval_samples)
    if args.val_split is not None:
        val_set = read(args.val_split, most=args.max_eval_samples)
    elif isinstance(train_set, MixedTasks):
        train_set, val_set = train_set.split_off(lambda size: max(1, round(args.val_fraction * size)), seed)
    else:
        order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = max(1, round(args.val_fraction * len(train_set)))
        train_set, val_set = Subset(train_set, sorted(order[held_out:])), Subset(train_set, sorted(order[:held_out]))
    return AugmentedDataset(train_set, augmentation, seed), val_set, test_set


def _open_streamed(
    args: SplitArguments, seed: int, tasks: Sequence[Task], augmentation: JointAugmentation
) -> tuple[ColumnStream, Dataset, Dataset]:
    """Training rows are streamed; those of evaluation are kept, for each process has its own of them.

    Without a validation split, the first of the training rows are held out for it.
    """
    (kind,), root = args.data_format if len(args.data_format) == 1 else ("",), args.data_root
    if root is None or args.mix or args.on_bad_sample != "raise" or kind in ("folder", ""):
        raise ValueError(
            f"`streaming` is asked for with `data_root` {root!r}, `data_format` {args.data_format}, `mix` {args.mix} "
            f"and `on_bad_sample` {args.on_bad_sample!r}; it needs one data set of rows, none of whose samples is bad."
        )
    _check_most(args.max_train_samples)
    _check_most(args.max_eval_samples)
    if args.dataloader_num_workers:
        raise ValueError(f"`dataloader_num_workers` is {args.dataloader_num_workers}; with `streaming` allowed: 0.")
    _formats(args)
    if kind in FORMATS and FORMATS[kind].is_of_files(root, args.train_split):
        raise ValueError(f"`streaming` is asked for, but {root} is a folder of {kind} files, no data set of rows.")
    columns, image = _columns(kind)
    stream = partial(open_stream, root, args.train_split, tasks, columns, augmentation, seed, image=image)
    kept = partial(open_table, root, tasks=tasks, columns=columns, image=image, streamed=True)
    test_set = kept(args.test_split, most=args.max_eval_samples)
    if args.val_split is not None:
        return stream(most=args.max_train_samples), kept(args.val_split, most=args.max_eval_samples), test_set
    held_out = max(1, round(args.val_fraction * len(stream(most=args.max_train_samples))))
    most = args.max_train_samples and args.max_train_samples - held_out
    return stream(skip=held_out, most=most), kept(args.train_split, most=held_out), test_set


def mixed_sampler(args: DataArguments, seed: int, dataset: Dataset) -> MixedSampler | None:
    """What draws from a mixture as `args.mix_by` says; None for other data sets.

    Raises:
        ValueError: If `mix_by` is of another form.
    """
    if not isinstance(dataset, MixedTasks):
        return None
    words, sizes = args.mix_by, dataset.sizes
    name, _, number = words[0].partition("=") if len(words) == 1 else ("", "", "")
    try:
        if words == ["proportional"]:
            shares = shares_by_size(sizes)
        elif name == "temperature":
            shares = shares_by_size(sizes, float(number))
        else:
            shares = [float(word) for word in words]
        return MixedSampler(sizes, shares, seed)
    except ValueError as error:
        raise ValueError(
            f"`mix_by` is {words}; allowed: 'proportional', 'temperature=T', or {len(sizes)} weights: {error}"
        ) from error


def _ignore_sigterm(worker: int) -> None:
    """Sent to a whole group of processes, it is the main one's to act on; it ends its workers itself."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(
    args: SplitArguments,
    seed: int,
    dataset: Dataset,
    collator: Collator,
    at_a_time: int,
    sampler: MixedSampler | None = None,
) -> DataLoader:
    """Batches of training images, in another order every epoch; the seed decides it, or the sampler.

    Raises:
        ValueError: If there are not `at_a_time` batches, as many as a step has in all processes.
    """
    loader = DataLoader(
        dataset,
        batch_size=args.per_device_train_batch_size,
        shuffle=sampler is None and not isinstance(dataset, ColumnStream),
        sampler=sampler,
        drop_last=True,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=_ignore_sigterm,
        # Opening an epoch draws a number. From the global generator, a resumed run's dropout would be one draw ahead.
        generator=torch.Generator().manual_seed(seed),
    )
    if len(loader) < at_a_time:
        raise ValueError(
            f"{len(dataset)} training images do not fill a step of {at_a_time * args.per_device_train_batch_size}, "
            f"`per_device_train_batch_size`={args.per_device_train_batch_size} in each of {at_a_time} batches: lower "
            "it, or give more images."
        )
    return loader
