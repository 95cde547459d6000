"""What more than one recipe needs: arguments, data sets, the order of tasks, the training step.

Axes: B images, T tasks, C channels, H W pixels.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers
import yaml
from accelerate import Accelerator
from packaging.version import Version
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import HfArgumentParser, PreTrainedModel

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
from .msam_config import task_entries
from .tasks import KINDS, Task, default_weight

TaskOrder = Literal["folded", "sequential"]
Updates = Literal["joint", "alternating"]
Activate = Callable[[Sequence[str]], None]
Arguments = TypeVar("Arguments")
Item = TypeVar("Item")


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


def parse_arguments(
    arguments: type[Arguments], argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> Arguments:
    """A recipe's arguments, from flags and from the YAML file that `--config` names; flags win.

    Args:
        arguments: A dataclass.
        argv: Flags; None takes the command line's.
        defaults: What replaces the dataclass's own defaults.

    Raises:
        ValueError: For a key in the file that the recipe does not know.
    """
    parser = HfArgumentParser(arguments)
    parser.add_argument("--config", help="YAML file of arguments; flags win.")
    parser.set_defaults(**(defaults or {}))
    argv = list(sys.argv[1:] if argv is None else argv)
    file = parser.parse_known_args(argv)[0].config
    if file is not None:
        with open(file) as handle:
            values = yaml.safe_load(handle) or {}
        known = {field.name for field in fields(arguments)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{file} has the unknown arguments {unknown}; `--help` lists the known ones.")
        argv = [*as_flags(values), *argv]
    values = vars(parser.parse_args(argv))
    values.pop("config")
    return arguments(**values)


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """The flags that say what arguments by name say; what is None is left out."""
    flags = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def parse_task(text: str, known: Mapping[str, int]) -> dict[str, Any]:
    """Parse a task as flags give it: `name=channels`, `name=kind:channels`, or `name` alone where it is known.

    Args:
        text: The flag's word.
        known: Channels by name.

    Returns:
        An entry of `MSamConfig.tasks`.

    Raises:
        ValueError: For anything else.
    """
    name, _, rest = text.partition("=")
    kind, _, channels = rest.rpartition(":")
    channels = channels or str(known.get(name, ""))
    if not channels.isdigit():
        raise ValueError(f"task {text!r}: write name=channels or name=kind:channels, for example segmentation=13.")
    kind = kind or name
    if kind not in KINDS:
        raise ValueError(
            f"task {text!r}: {kind!r} is none of the kinds {', '.join(KINDS)}; for a name of your own write "
            f"name=kind:channels, for example {name}=segmentation:{channels}."
        )
    return {"name": name, "kind": kind, "channels": int(channels)}


def parse_tasks(args: DataArguments, texts: Sequence[str]) -> list[dict[str, Any]]:
    """All tasks of a run as [`parse_task`] parses one; generated scenes know their channels.

    Raises:
        ValueError: As `parse_task` does, and for a name that occurs twice.
    """
    return task_entries([parse_task(text, {} if args.data_root else SYNTHETIC_TASKS) for text in texts])


def parse_weights(texts: Sequence[str], tasks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The weight of every task's loss: as given, else `default_weight` of its kind.

    Args:
        texts: `name=weight`, each of a task.
        tasks: Entries as [`parse_tasks`] gives them.

    Raises:
        ValueError: For an unknown task, or a weight that is no positive number.
    """
    weights = {task["name"]: default_weight(task["kind"]) for task in tasks}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in weights:
            raise ValueError(f"`loss_weights` has {text!r}; write name=weight, with a name of {', '.join(weights)}.")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise ValueError(f"`loss_weights` has {text!r}; a weight is a positive number.")
    return weights


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
    return MixedTasks(
        {root: _first(_open_one(args, root, formats[root], split, there), most) for root, there in found.items()}
    )


def _first(dataset: Dataset, most: int | None) -> Dataset:
    if most is not None and most < 1:
        raise ValueError(f"`max_train_samples` or `max_eval_samples` is {most}; allowed: 1 or more.")
    return dataset if most is None or most >= len(dataset) else Subset(dataset, range(most))


def _formats(args: DataArguments) -> dict[str, str]:
    """The format of each place that images come from."""
    roots, formats = [args.data_root, *args.mix], args.data_format
    for kind in formats:
        if kind != "folder" and kind not in FORMATS and Path(kind).suffix not in (".yaml", ".yml"):
            raise ValueError(f"`data_format` has {kind!r}; allowed: 'folder', {', '.join(FORMATS)}, or a YAML file.")
    if len(formats) not in (1, len(roots)):
        raise ValueError(f"`data_format` is {formats}; allowed: one, or one for each of {', '.join(roots)}.")
    return dict(zip(roots, formats * len(roots) if len(formats) == 1 else formats, strict=True))


def _columns(kind: str) -> tuple[Mapping[str, Column], str]:
    """Where rows of a format have labels and images."""
    return (FORMATS[kind].columns, "image") if kind in FORMATS else read_column_map(kind)


def _tasks_there(args: DataArguments, root: str, kind: str, split: str, tasks: Sequence[Task]) -> list[Task]:
    """The tasks that a place has labels of, or of whose kind it can derive some."""
    if kind != "folder":
        columns = _columns(kind)[0]
        if not any(task.name in columns for task in tasks):
            raise ValueError(f"{root} ({kind}) has labels of {', '.join(columns)} alone")
        return [task for task in tasks if task.name in columns]
    folder = Path(root, split)
    derivable = args.derive_edges and any(
        (folder / name).is_dir() for name in ["segmentation", *(t.name for t in tasks if t.kind == "segmentation")]
    )
    there = [t for t in tasks if (folder / t.name).is_dir() or (derivable and t.kind == "edges")]
    if not there:
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
    augmentation = JointAugmentation(tasks, scales, flip)
    if args.streaming:
        return _open_streamed(args, seed, tasks, augmentation, read)
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
    args: SplitArguments, seed: int, tasks: Sequence[Task], augmentation: JointAugmentation, read: Callable
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
    if kind in FORMATS and FORMATS[kind].is_of_files(root, args.train_split):
        raise ValueError(f"`streaming` is asked for, but {root} is a folder of {kind} files, no data set of rows.")
    _formats(args)
    columns, image = _columns(kind)
    stream = partial(open_stream, root, args.train_split, tasks, columns, augmentation, seed, image=image)
    test_set = read(args.test_split, most=args.max_eval_samples)
    if args.val_split is not None:
        return stream(most=args.max_train_samples), read(args.val_split, most=args.max_eval_samples), test_set
    held_out = max(1, round(args.val_fraction * len(stream(most=args.max_train_samples))))
    most = args.max_train_samples and args.max_train_samples - held_out
    return stream(skip=held_out, most=most), read(f"{args.train_split}[:{held_out}]"), test_set


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


def set_threads(args: DataArguments, accelerator: Accelerator) -> None:
    """Give every process its share of the machine's cores, or what `args.num_threads` says, and note it there.

    `accelerate launch` starts processes with one thread, which leaves the other cores idle where there is no GPU.
    """
    if args.num_threads is None:
        args.num_threads = max(1, (os.cpu_count() or 1) // accelerator.num_processes)
    torch.set_num_threads(args.num_threads)


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the model's blocks in backward, by the name that the installed transformers has for it."""
    if Version(transformers.__version__) >= Version("5.23"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def resolve_task_order(order: str, device: torch.device, task_conditional: bool = True) -> TaskOrder:
    """`auto` is task by task on a CPU, where it costs the same time and 1/T of the memory, and folded elsewhere.

    Where the encoder's output does not depend on the task (`task_conditional` of the mSAM is False), it is folded: one
    pass serves all heads.

    Raises:
        ValueError: For another word than `folded`, `sequential` or `auto`.
    """
    if order == "auto":
        return "sequential" if task_conditional and device.type == "cpu" else "folded"
    if order not in ("folded", "sequential"):
        raise ValueError(f"`task_order` must be 'folded', 'sequential' or 'auto'; got {order!r}.")
    return order


def task_groups(task_names: Sequence[str], order: TaskOrder) -> list[list[str]]:
    """The tasks of each pass through the encoder: all at once, or one after another."""
    return [list(task_names)] if order == "folded" else [[name] for name in task_names]


def update_groups(task_names: Iterable[str], updates: Updates, step: int) -> list[list[str]]:
    """The tasks of each optimiser step that a batch gives.

    AdamW's steps have one size: where the gradients of the tasks are orthogonal and equally large, a step of the sum
    of all losses takes each task 1/sqrt(T) as far as a step of its own. With a step per task, every task takes as many
    as if it were trained alone. Another task begins each time, so that none is always the last.

    Args:
        task_names: All tasks.
        updates: `joint`, one step of the weighted sum of all losses, or `alternating`, one per task.
        step: Batches that were trained on before.
    """
    names = list(task_names)
    if updates == "joint":
        return [names]
    first = step % len(names)
    return [[name] for name in (*names[first:], *names[:first])]


def whole_chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items each; what is left over is left out."""
    iterator = iter(items)
    while len(chunk := list(islice(iterator, size))) == size:
        yield chunk


def keep_active(*_: Any) -> None:
    """Nothing needs to be switched before an encoder pass: the model itself knows its tasks."""


def count_labels(
    accelerator: Accelerator, tasks: Sequence[Task], batches: Sequence[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """The labelled pixels (K,) of a step by task, as `Task.count`: of all its batches and of all processes."""
    device = accelerator.device
    own = {
        task.name: sum(task.count(batch["labels"][task.name].to(device)) for batch in batches).to(torch.float64)
        for task in tasks
    }
    if accelerator.num_processes == 1:
        return own
    # In one tensor: a process waits for the others once.
    whole = accelerator.reduce(torch.cat(list(own.values())), "sum")
    return dict(zip(own, whole.split([len(counts) for counts in own.values()]), strict=True))


def counts_of_part(accelerator: Accelerator, counts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The counts by which each batch's losses become parts of the step's; None where the step is one batch.

    Gradients are averaged over the processes, and Accelerate divides every loss by the number of accumulated batches:
    the counts are smaller by both, so that what comes out is the sum of the parts.
    """
    parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
    return None if parts == 1 else {name: value / parts for name, value in counts.items()}


def losses_of(
    model: nn.Module,
    batch: Mapping[str, Any],
    group: Sequence[str],
    activate: Activate = keep_active,
    pixel_counts: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The losses of the tasks of one pass through the encoder; the arguments are those of [`backward`]."""
    activate(group)
    output = model(
        pixel_values=batch["pixel_values"],
        tasks=group,
        labels={name: batch["labels"][name] for name in group},
        pixel_counts=pixel_counts,
        original_sizes=batch["original_sizes"],
    )
    return output.losses


def fork_random(device: torch.device) -> AbstractContextManager:
    """Inside, random numbers are drawn as ever; after it, as if none had been. Those of MPS alone are drawn on."""
    if device.type in ("cpu", "mps"):
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def backward(
    accelerator: Accelerator,
    model: nn.Module,
    batch: Mapping[str, Any],
    order: TaskOrder,
    weights: Mapping[str, float],
    regularizer: Callable[[], torch.Tensor] | None = None,
    activate: Activate = keep_active,
    pixel_counts: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Forward and backward of all tasks of a batch: the gradients of the weighted sum of their losses.

    Task by task, each task's backward comes before the next one's forward, so that one task's activations are held at
    a time. Both orders give the same gradients.

    Args:
        accelerator: What `model` was prepared by.
        model: An mSAM, adapted or not.
        batch: As a `Collator` makes it, on the model's device.
        order: `folded` or `sequential`.
        weights: Of the losses, by task.
        regularizer: Gives a scalar that is added to the losses once, whatever the order.
        activate: Called with the tasks of each pass before it.
        pixel_counts: As `counts_of_part` gives them.

    Returns:
        Each task's loss, detached, without its weight.
    """
    losses = {}
    groups = task_groups(list(batch["labels"]), order)
    for group in groups:
        found = losses_of(model, batch, group, activate, pixel_counts)
        # With the last loss, in its one backward: several processes average the gradients of each backward once.
        last = regularizer is not None and group is groups[-1]
        loss = sum(weights[name] * loss for name, loss in found.items())
        accelerator.backward(loss + regularizer() if last else loss)
        losses |= {name: loss.detach() for name, loss in found.items()}
    return losses
