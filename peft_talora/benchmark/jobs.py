"""Runs of a recipe as processes of their own, several at a time, that go on where they were stopped."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine import as_flags
from ..files import write_aside, write_json
from .records import describe_code, describe_commit

_ORIGIN_NAME = "benchmark.json"


@dataclass(frozen=True)
class Job:
    """One run of `train.py`, or of a script with its arguments `output_dir` and `resume_from_checkpoint`.

    Attributes:
        name: In messages.
        script: The recipe, in a folder of the clone.
        arguments: Those that decide the outcome; None and lists as in a YAML file.
        others: Those that do not.
        context: What decides the outcome and is no argument, by name.
        folder: Where it works; deleted by `discard`.
        accepted_error: A failure that is an outcome: how the line of the error begins. None: there is none.
        anew: Whether it begins anew, whatever was left in the folder.
    """

    name: str
    script: Path
    arguments: Mapping[str, Any]
    others: Mapping[str, Any]
    folder: Path
    context: Mapping[str, Any] = field(default_factory=dict)
    accepted_error: str | None = None
    anew: bool = False

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

    @property
    def _root(self) -> Path:
        return self.script.resolve().parent.parent

    @property
    def _lock_file(self) -> Path:
        return self.folder.parent / f".{self.folder.name}.lock"

    def start(self) -> subprocess.Popen:
        """Start the process; its output goes to `log`. Where there is a checkpoint, it goes on from the last one.

        What a run of other arguments or of other code left in the folder is deleted: a run is of one code.

        Raises:
            RuntimeError: If a process works in the folder already: of another benchmark, or of one that was killed.
        """
        self._lock_file.parent.mkdir(parents=True, exist_ok=True)
        with self._lock_file.open("a") as lock:
            # The process inherits the open file, hence the lock, and holds it as long as it lives.
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RuntimeError(f"a process works in {self.folder} already: wait for its end, or end it") from error
            self._claim()
            paths = [str(self._root), *filter(None, [os.environ.get("PYTHONPATH")])]  # the package of this very clone
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            with self.log.open("w") as log:
                return subprocess.Popen(
                    self.command(), stdout=log, stderr=subprocess.STDOUT, env=environment, pass_fds=[lock.fileno()]
                )

    def _claim(self) -> None:
        """Make the folder this run's own: keep it if it is of the same run, else begin a new one."""
        identity = {"arguments": dict(self.arguments), "context": dict(self.context)}
        wanted = json.loads(json.dumps({**identity, "code": describe_code(self._root)}))
        file = self.folder / _ORIGIN_NAME
        found = json.loads(file.read_text()) if file.exists() else {}
        if not self.anew and {name: found.get(name) for name in wanted} == wanted:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        with write_aside(self.folder) as aside:
            write_json(aside / _ORIGIN_NAME, {**wanted, "commit": describe_commit(self._root)})

    def command(self) -> list[str]:
        """What is called."""
        arguments = {**self.arguments, **self.others, "output_dir": str(self.folder)}
        if any(self.folder.glob("**/checkpoint-*/manifest.json")):
            arguments["resume_from_checkpoint"] = "latest"
        return [sys.executable, str(self.script), *as_flags(arguments)]

    def discard(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)
        self._lock_file.unlink(missing_ok=True)

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
