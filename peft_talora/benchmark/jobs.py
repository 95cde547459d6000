"""Runs of a recipe as processes of their own, several at a time, that go on where they were stopped."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..files import write_aside, write_json
from .records import describe_commit

_ORIGIN_NAME = "benchmark.json"


@dataclass(frozen=True)
class Job:
    """One run of `train.py`, or of a script with its arguments `output_dir` and `resume_from_checkpoint`.

    Attributes:
        name: In messages.
        script: The recipe, in a folder of the clone.
        arguments: Those that decide the outcome; None and lists as in a YAML file.
        others: Those that do not.
        folder: Where it works; deleted by `discard`.
        accepted_error: A failure that is an outcome: how the line of the error begins. None: there is none.
    """

    name: str
    script: Path
    arguments: Mapping[str, Any]
    others: Mapping[str, Any]
    folder: Path
    accepted_error: str | None = None

    @property
    def log(self) -> Path:
        """What the process says, of its last start."""
        return self.folder / "log.txt"

    @property
    def commit(self) -> str | None:
        """The code's commit when the run started; what is committed while it runs is no part of it."""
        return json.loads((self.folder / _ORIGIN_NAME).read_text())["commit"]

    def results(self) -> dict[str, Any]:
        """The content of the run's `results.json`."""
        return json.loads((self.folder / "results.json").read_text())

    def failed_acceptably(self) -> bool:
        """Whether the log ends with the accepted error."""
        error = self.accepted_error
        return error is not None and any(line.startswith(error) for line in self._last_lines())

    def command(self) -> list[str]:
        """What is called: from the last checkpoint on, if there is one of the same arguments and commit.

        What a run with other arguments or of another commit left in the folder is deleted: a run is of one code.
        """
        origin = {"arguments": dict(self.arguments), "commit": describe_commit(self.script.parent.parent)}
        file, wanted = self.folder / _ORIGIN_NAME, json.loads(json.dumps(origin))
        if self.folder.exists() and not (file.exists() and json.loads(file.read_text()) == wanted):
            shutil.rmtree(self.folder)
        with write_aside(self.folder) as aside:
            write_json(aside / _ORIGIN_NAME, wanted)
        arguments = {**self.arguments, **self.others, "output_dir": self.folder}
        if any(self.folder.glob("**/checkpoint-*/progress.json")):
            arguments["resume_from_checkpoint"] = "latest"
        flags = []
        for name, value in arguments.items():
            if value is not None:
                flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return [sys.executable, str(self.script), *flags]

    def start(self) -> subprocess.Popen:
        """Start the process; its output goes to `log`.

        Raises:
            RuntimeError: If a process works in the folder already: of another benchmark, or of one that was killed.
        """
        if self.log.exists():
            with self.log.open("r+") as log:
                self._lock(log)
        command = self.command()
        with self.log.open("w") as log:
            self._lock(log)
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def _lock(self, log: IO[str]) -> None:
        # The process inherits the open file, hence the lock, and holds it as long as it lives.
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"a process works in {self.folder} already: wait for its end, or end it") from error

    def discard(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)

    def _last_lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()[-20:]

    def error(self, code: int) -> RuntimeError:
        """What to raise if the process failed."""
        lines = "\n".join(self._last_lines())
        return RuntimeError(f"{self.name} failed with exit code {code}; the end of {self.log}:\n{lines}")


def run_jobs(jobs: Sequence[Job], workers: int) -> Iterator[Job]:
    """Run jobs, `workers` at a time, and give each one when it has ended.

    If one fails, or the caller stops, those under way are ended; they go on from their checkpoints another time.

    Raises:
        RuntimeError: If one fails; the message has the end of its log.
    """
    if workers < 1:
        raise ValueError(f"`workers` is {workers}; allowed: 1 or more.")
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[job.folder] = job, job.start()
            ended = [folder for folder, (_, process) in running.items() if process.poll() is not None]
            for folder in ended:
                job, process = running.pop(folder)
                if process.returncode and not job.failed_acceptably():
                    raise job.error(process.returncode)
                yield job
            if not ended:
                time.sleep(0.1)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
