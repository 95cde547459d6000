"""Measure how fast samples of NYUv2's form are read and what memory that takes: streamed, kept, and from npy files.

    python recipes/benchmark_reading.py                                  # two minutes on two cores
    python recipes/benchmark_reading.py --output docs/results/reading.json

Generated rooms of 288 × 384 pixels are written as parquet files with the columns of the Hub's data set, and as MTAN's
npy files. Each way of reading them has a process of its own, with one thread, that goes through all of them a few
times; resident memory is that at the end of each pass.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Array2D, Array3D, Dataset, Features

from peft_talora import JointAugmentation, SyntheticScenes, engine
from peft_talora.benchmark.records import describe_hardware
from peft_talora.benchmark.timing import last_line_of, resident
from peft_talora.data import FORMATS, open_stream, open_table
from peft_talora.files import write_aside, write_json

HEIGHT, WIDTH = 288, 384
WAYS = ("streamed", "kept", "npy files")
FORMAT = FORMATS["nyuv2-13"]


@dataclass
class ReadingArguments:
    """How much is read."""

    rows: int = field(default=64, metadata={"help": "Samples."})
    epochs: int = field(default=3, metadata={"help": "Passes over them."})
    shards: int = field(default=4, metadata={"help": "Parquet files."})
    output: str = field(default="runs/reading.json", metadata={"help": "File for the figures."})
    work_dir: str = field(default="runs/reading", metadata={"help": "Folder for what is read; kept for another go."})
    measure: str | None = field(default=None, metadata={"help": "Measure one way alone, and print it as JSON."})


def main() -> None:
    """Write what is read, measure each way."""
    args = engine.parse_arguments(ReadingArguments)
    if args.measure is not None:
        print(json.dumps(measure(args)))
        return
    generate(args)
    flags = [f"--{name}={getattr(args, name)}" for name in ("rows", "epochs", "work_dir")]
    ways = {way: json.loads(last_line_of(__file__, [*flags, f"--measure={way}"])) for way in WAYS}
    figures = {"rows": args.rows, "size": [HEIGHT, WIDTH], "hardware": describe_hardware(1), "ways": ways}
    output = Path(args.output)
    with write_aside(output.parent) as aside:
        write_json(aside / output.name, figures)
    for way, found in ways.items():
        speeds = ", ".join(f"{speed:.1f}" for speed in found["rows_per_second"])
        memory = ", ".join(f"{mib:.0f}" for mib in found["resident_mib"])
        print(f"{way:<10} {speeds} rows/s by epoch; resident {memory} MiB, before the first {found['before_mib']:.0f}")


def generate(args: ReadingArguments) -> None:
    """Write the rooms, as parquet and as npy, unless they are there."""
    root = Path(args.work_dir) / f"rows-{args.rows}"
    if len(list(root.glob("parquet/data/*.parquet"))) == args.shards:
        return
    with write_aside(root) as aside, tempfile.TemporaryDirectory() as cache:
        files, parquet = aside / "files" / "train", aside / "parquet" / "data"
        for folder in (parquet, *(files / name for name in ("image", "label", "depth", "normal"))):
            folder.mkdir(parents=True)
        scenes = SyntheticScenes("train", args.rows, WIDTH, tasks=["segmentation", "depth", "normals"])
        made = {"scenes": scenes, "files": files}
        table = Dataset.from_generator(rows_of, features=FEATURES, gen_kwargs=made, cache_dir=cache)
        for shard in range(args.shards):
            name = f"train-{shard:05d}-of-{args.shards:05d}.parquet"
            table.shard(args.shards, shard, contiguous=True).to_parquet(parquet / name)


FEATURES = Features(
    {
        "image": Array3D((3, HEIGHT, WIDTH), "float32"),
        "segmentation": Array2D((HEIGHT, WIDTH), "int64"),
        "depth": Array3D((1, HEIGHT, WIDTH), "float32"),
        "normal": Array3D((3, HEIGHT, WIDTH), "float32"),
    }
)


def rows_of(scenes: SyntheticScenes, files: Path):
    """The rows of the table; the same is written as npy files."""
    for number in range(len(scenes)):
        sample = scenes[number]
        labels = {name: label[..., :HEIGHT, :].numpy() for name, label in sample["labels"].items()}
        image = sample["image"][:, :HEIGHT].numpy()
        np.save(files / "image" / f"{number}.npy", image.transpose(1, 2, 0))
        np.save(files / "label" / f"{number}.npy", labels["segmentation"])
        np.save(files / "depth" / f"{number}.npy", labels["depth"][..., None])
        np.save(files / "normal" / f"{number}.npy", labels["normals"].transpose(1, 2, 0))
        depth, normals = labels["depth"][None], labels["normals"]
        yield {"image": image, "segmentation": labels["segmentation"], "depth": depth, "normal": normals}


def measure(args: ReadingArguments) -> dict:
    """Rows a second and resident memory of each pass, of this process."""
    torch.set_num_threads(1)
    root = Path(args.work_dir) / f"rows-{args.rows}"
    parquet, plain = str(root / "parquet"), JointAugmentation(FORMAT.tasks, (1.0,), 0.0)
    if args.measure == "streamed":
        samples = open_stream(parquet, "train", FORMAT.tasks, FORMAT.columns, plain)
    elif args.measure == "kept":
        samples = open_table(parquet, "train", FORMAT.tasks, FORMAT.columns)
    elif args.measure == "npy files":
        samples = FORMAT.open(root / "files", "train", FORMAT.tasks)
    else:
        raise ValueError(f"`measure` is {args.measure!r}; allowed: {', '.join(WAYS)}.")
    before, speeds, memory = resident(), [], []
    for epoch in range(args.epochs):
        if args.measure == "streamed":
            samples.set_epoch(epoch)
        begun = time.perf_counter()
        count = sum(1 for _ in samples)
        speeds.append(round(count / (time.perf_counter() - begun), 2))
        memory.append(round(resident(), 1))
    if count != args.rows:
        sys.exit(f"{count} rows were read, {args.rows} are there")
    return {"rows_per_second": speeds, "resident_mib": memory, "before_mib": round(before, 1)}


if __name__ == "__main__":
    main()
