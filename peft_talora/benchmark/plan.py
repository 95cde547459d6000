"""What a benchmark compares, the runs that it asks for, and running those that have no record yet."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import FREE_ARGUMENTS
from ..small_sam import SMALL_SAM
from .jobs import Job, run_jobs
from .protocols import SYNTHETIC_3, Protocol
from .records import Record, check_record, describe_hardware, describe_images, describe_weights, write_record

CONTEXT = ("base_weights", "images", "mixed_precision")  # of a run's settings, those that are no flags of train.py
DIVERGED = "FloatingPointError"  # what train.py raises where the validation loss is no finite number


@dataclass(frozen=True)
class Benchmark:
    """What is compared, on which images, from which base, and where runs and records are.

    Attributes:
        protocol: Whose table is made.
        variants: By name, what a run of it asks of train.py beside the protocol; `learning_rate` and `updates` once
            they are chosen.
        group: Of variants of talora, `"ablations"` or `"weightings"`, the folder of their records; None of methods.
        seeds: Of the runs of each.
        changes: Arguments of train.py in place of the protocol's own.
        data_root: Folder with the protocol's images and labels; None where they are generated.
        base: SAM checkpoint; None is train.py's own.
        workers: Runs at a time.
        num_threads: CPU threads of each.
        root: Folder of the clone, with `recipes/train.py`.
        output: Folder of tables, and of records under `runs`.
        work: Folder of runs under way.
        say: Called with each line that there is to show.
    """

    protocol: Protocol
    variants: dict[str, dict[str, Any]]
    group: str | None
    seeds: range
    changes: Mapping[str, Any]
    data_root: str | None
    base: str | None
    workers: int
    num_threads: int
    root: Path
    output: Path
    work: Path
    say: Callable[[str], None]

    @property
    def records(self) -> Path:
        """Folder of the protocol's records, and of its variants' in a folder of each group."""
        return self.output / "runs" / self.protocol.name

    @property
    def rates_file(self) -> Path:
        """The learning rates that were chosen."""
        return self.output / "learning-rates.json"

    @property
    def cost_file(self) -> Path:
        """Time and memory."""
        return self.records / (self.group or "") / "cost.json"

    def record_file(self, name: str, seed: int) -> Path:
        """Talora itself, which its variants are compared with, is the same run in all tables."""
        return self.records / ("" if name == "talora" else self.group or "") / f"{name}-seed{seed}.json"

    def settings(self, protocol: Protocol) -> dict[str, Any]:
        """What all runs on a protocol share; `changes` and `data_root` go for the benchmark's own protocol alone."""
        shared = protocol.train_arguments()
        if protocol is self.protocol:
            shared |= self.changes
        images = None
        if protocol is self.protocol and self.data_root is not None:
            images = describe_images(self.data_root, protocol.folders.values(), protocol.data_format)
        return {
            **shared,
            "base": self.base,
            "base_weights": describe_weights(self.base or SMALL_SAM),
            "images": images,
            "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        }

    def job(self, folder: str, protocol: Protocol, arguments: dict, others: Mapping | None = None, **fields) -> Job:
        """A run of train.py; `others` are arguments that decide nothing."""
        common = {"num_threads": self.num_threads, "measure_before": False, "save_total_limit": 1}
        if protocol is self.protocol:
            common["data_root"] = self.data_root
        return Job(
            name=f"{protocol.name}/{folder}",
            script=self.root / "recipes" / "train.py",
            arguments={name: value for name, value in arguments.items() if name not in CONTEXT},
            others={**common, **(others or {})},
            folder=self.work / protocol.name / folder,
            context={name: value for name, value in arguments.items() if name in CONTEXT},
            **fields,
        )


@dataclass(frozen=True)
class Wanted:
    """A run that is wanted: its record's file, and the job that makes it."""

    name: str
    file: Path
    arguments: dict[str, Any]
    job: Job


def run_seeds(benchmark: Benchmark) -> None:
    """Train every variant with every seed."""
    settings, wanted = benchmark.settings(benchmark.protocol), []
    for seed, name in ((seed, name) for seed in benchmark.seeds for name in benchmark.variants):
        arguments = {**settings, **benchmark.variants[name], "seed": seed}
        job = benchmark.job(f"{name}-seed{seed}", benchmark.protocol, arguments, accepted_error=DIVERGED)
        wanted.append(Wanted(name, benchmark.record_file(name, seed), arguments, job))
    run_missing(benchmark, benchmark.protocol, wanted, may_diverge=False)


def run_missing(benchmark: Benchmark, protocol: Protocol, wanted: Sequence[Wanted], may_diverge: bool) -> None:
    """Run what has no record yet; write a record as soon as a run has ended.

    Raises:
        ValueError: If there is a record of other arguments.
        RuntimeError: If a run fails, or diverges where it may not.
    """
    for run in wanted:
        if run.file.exists():
            check_record(run.file, run.arguments)
    runs = {run.job.folder: run for run in wanted if not run.file.exists()}
    benchmark.say(f"{protocol.name}: {len(wanted) - len(runs)} of {len(wanted)} runs are done")
    # Closed at once where this raises: the runs under way end with it.
    with closing(run_jobs([run.job for run in runs.values()], benchmark.workers)) as jobs:
        for count, job in enumerate(jobs, 1):
            run = runs[job.folder]
            diverged = job.failed_acceptably()
            if diverged and not may_diverge:
                raise _divergence(run)
            results = {"after": {}, "parameters": {}, "arguments": {}} if diverged else job.results()
            decided = {name: value for name, value in results["arguments"].items() if name not in FREE_ARGUMENTS}
            record = Record(
                protocol=protocol.name,
                name=run.name,
                arguments={**decided, **run.arguments},
                metrics=results["after"],
                validation=None if diverged else results["validation"],
                parameters=results["parameters"],
                commit=job.commit,
                hardware=describe_hardware(benchmark.num_threads),
                versions=results.get("versions", {}),
            )
            write_record(run.file, record)
            job.discard()
            benchmark.say(f"{job.name}: {'diverged' if diverged else 'done'}, {len(runs) - count} to go")


def _divergence(run: Wanted) -> RuntimeError:
    method, seed, rate = (run.arguments[name] for name in ("method", "seed", "learning_rate"))
    what = method if run.name == method else f"{run.name}, a variant of {method},"
    return RuntimeError(
        f"{what} diverged with seed {seed} and learning rate {rate:g}: widen the learning rates of {method} downwards "
        f"on {SYNTHETIC_3.name} (`methods`, `learning_rates`), or give a single lower one. The log is {run.job.log}."
    )
