"""Records of finished benchmark runs: one small file each, from which all tables are made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..data import FORMATS
from ..files import write_aside, write_json
from ..methods.adapters import AdapterArguments

OWN_ARGUMENTS = frozenset(
    {"seed", "learning_rate", "updates", "weighting", "decoder_mode"} | {f.name for f in fields(AdapterArguments)}
)
"""What a method or variant may choose; all else is the same in all runs of a table."""

LATER_ARGUMENTS = {
    "mix": [],
    "mix_by": ["proportional"],
    "on_bad_sample": "raise",
    "weighting": "fixed",
    "data_format": ["folder"],
    "streaming": False,
    "max_train_samples": None,
    "max_eval_samples": None,
    "per_device_eval_batch_size": 8,
}
"""What older records do not say: arguments that train.py did not have yet, or did not count among those that decide a
run's course, with the value that does what it did."""


@dataclass(frozen=True)
class Record:
    """One finished training run.

    Attributes:
        protocol: The benchmark it belongs to.
        name: Of the method or variant.
        arguments: All that decided its course: train.py's arguments, digests of base weights and images, precision.
        metrics: Task → figure → value on the test images of the checkpoint that validation chose; None: not a number.
        validation: Its `metrics` and `losses` on the validation images, by task, and the `loss` of all tasks by which
            the checkpoint was chosen; None: training diverged.
        parameters: Trained parameters: `adapter` (low-rank updates), `encoder` (trained as a whole), `heads`, `other`.
        commit: Of this project's code.
        hardware: In words.
        versions: Of the libraries.
    """

    protocol: str
    name: str
    arguments: dict[str, Any]
    metrics: dict[str, dict[str, float | None]]
    validation: dict[str, dict[str, Any]] | None
    parameters: dict[str, int]
    commit: str | None
    hardware: str
    versions: dict[str, str]

    @property
    def seed(self) -> int:
        """Of the training run."""
        return self.arguments["seed"]

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that all runs of a table share."""
        return {name: value for name, value in self.all_arguments.items() if name not in OWN_ARGUMENTS}

    @property
    def all_arguments(self) -> dict[str, Any]:
        """The arguments, with what train.py did before it had later ones."""
        return {**LATER_ARGUMENTS, **self.arguments}

    @property
    def validation_loss(self) -> float:
        """The weighted sum over the tasks; infinite where training diverged."""
        return float("inf") if self.validation is None else self.validation["loss"]


def write_record(file: Path, record: Record) -> None:
    """Write a record, whole or not at all."""
    with write_aside(file.parent) as aside:
        write_json(aside / file.name, asdict(record))


def read_record(file: Path) -> Record:
    """The record in a file.

    Raises:
        ValueError: If it holds none.
    """
    try:
        return Record(**json.loads(file.read_text()))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no record of a run: {error}") from error


def check_record(file: Path, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, if a file records a run of other arguments than are wanted."""
    found = read_record(file).all_arguments
    if differing := describe_differing({name: found.get(name) for name in wanted}, wanted):
        raise ValueError(
            f"{file} is of a run with {differing}: give the same arguments, or another `output_dir`, or move it away."
        )


def read_comparable(files: Sequence[Path]) -> list[Record]:
    """The records in files.

    Raises:
        ValueError: If two of them may not stand in one table: they differ in what is not a method's own to choose, or
            runs of one name in anything but the seed.
    """
    records = [read_record(file) for file in files]
    first: dict[str, Record] = {}
    for file, record in zip(files, records, strict=True):
        if differing := describe_differing(record.settings, records[0].settings):
            raise ValueError(f"{file} and {files[0]} are not comparable: {differing}.")
        same = first.setdefault(record.name, record)
        if differing := describe_differing({**record.all_arguments, "seed": same.seed}, same.all_arguments):
            raise ValueError(f"{file} is of a run with {differing}, as another seed of {record.name!r} has.")
    return records


def by_name(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """Name → seed → record."""
    table: dict[str, dict[int, Record]] = {}
    for record in records:
        table.setdefault(record.name, {})[record.seed] = record
    return table


def describe_differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """`name=value (not value)` of what differs, or nothing."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return ", ".join(f"{name}={found.get(name)!r} (not {wanted.get(name)!r})" for name in names)


def describe_commit(root: Path) -> str | None:
    """The commit that a clone's package and recipes are of, with `+changes` if they differ; None outside a clone."""
    git = ["git", "-C", str(root)]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True)
    status = [*git, "status", "--porcelain", "--", "peft_talora", "recipes"]
    changes = subprocess.run(status, check=True, capture_output=True, text=True).stdout
    return commit.stdout.strip() + ("+changes" if changes else "")


def describe_code(root: Path) -> str:
    """The first digits of the SHA-256 of a clone's package and recipes: what a run under way may go on with."""
    digest = hashlib.sha256()
    for file in sorted(path for folder in ("peft_talora", "recipes") for path in (root / folder).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def describe_images(data_root: str, folders: Iterable[str], data_format: str = "folder") -> str:
    """The first digits of the SHA-256 of names and sizes of all files of a data set's splits.

    Of a data set of the Hub, which has no files here, it is that of its name.
    """
    digest = hashlib.sha256()
    for folder in sorted(folders):
        files = sorted(path for path in Path(data_root, folder).glob("*/*") if path.is_file())
        if data_format != "folder":
            files = FORMATS[data_format].files(data_root, folder)
        for file in files:
            digest.update(f"{file.relative_to(data_root)}\0{file.stat().st_size}\0".encode())
    if not Path(data_root).exists():
        digest.update(data_root.encode())
    return digest.hexdigest()[:12]


def describe_weights(checkpoint: str) -> str | None:
    """The first digits of the SHA-256 of a checkpoint's safetensors; None if it is not a folder with such files."""
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12] if files else None


def describe_hardware(num_threads: int) -> str:
    """What runs are trained on: the accelerator, if there is one, else the processor and the threads of a run."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and not os.environ.get("ACCELERATE_USE_CPU"):
        return torch.get_device_module(accelerator).get_device_name()
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", file.read_text()) if file.exists() else None
    name = found.group(1) if found else platform.processor() or platform.machine()
    return f"{name}, threads a run: {num_threads}"
