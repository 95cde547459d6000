"""Kill training runs, at random steps and in the middle of saving, resume them, and compare the weights bit by bit.

    python recipes/benchmark_resume.py                                   # 20 of each, a quarter of an hour on one core
    python recipes/benchmark_resume.py --output docs/results/resume.json --kills 20 --kills_in_save 20

Each run is `recipes/train.py` on a few generated scenes, in a process forked from this one, so that nothing has to be
imported anew; it is killed by SIGKILL. Between the kill and the resumption every checkpoint that is there is checked
by its checksums.
"""

import os
import runpy
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file

from peft_talora import checkpoint, engine
from peft_talora.benchmark.records import describe_hardware
from peft_talora.files import write_aside, write_json
from peft_talora.hub import WEIGHTS_NAME

TRAIN = Path(__file__).parent / "train.py"
FLAGS = "--num_images 24 --image_size 64 --num_train_epochs 4 --save_steps 2 --dropout 0.1 --num_threads 1"
STEPS = 20  # that these make
SAVING = ".saving-checkpoint-*"


@dataclass
class ResumeArguments:
    """How often runs are killed."""

    kills: int = field(default=20, metadata={"help": "Runs that are killed after a random step."})
    kills_in_save: int = field(default=20, metadata={"help": "Runs that are killed while a checkpoint is written."})
    weighting: str = field(default="fixed", metadata={"help": "As in train.py."})
    seed: int = field(default=0, metadata={"help": "Of when they are killed."})
    output: str = field(default="runs/resume.json", metadata={"help": "File for the counts."})
    work_dir: str = field(default="runs/resume", metadata={"help": "Folder of the runs; it is emptied."})


def main() -> None:
    """One run to its end, then those that are killed."""
    args = engine.parse_arguments(ResumeArguments)
    work = Path(args.work_dir)
    shutil.rmtree(work, ignore_errors=True)
    flags = [*FLAGS.split(), "--weighting", args.weighting]
    begun = time.perf_counter()
    if wait(start(flags, work / "whole")) != 0:
        sys.exit(f"the run in {work / 'whole'} failed: {work / 'whole.log'}")
    print(f"a run takes {time.perf_counter() - begun:.0f} s", flush=True)
    figures = {
        "weighting": args.weighting,
        "steps": STEPS,
        "hardware": describe_hardware(1),
        "at_steps": kill_and_compare(kill_after_a_step, args.kills, flags, work, Random(args.seed)),
        "in_save": kill_and_compare(kill_in_save, args.kills_in_save, flags, work, Random(args.seed)),
    }
    output = Path(args.output)
    with write_aside(output.parent) as aside:
        write_json(aside / output.name, figures)
    if any(found["identical"] < found["killed"] for found in (figures["at_steps"], figures["in_save"])):
        sys.exit("not all runs ended with the same weights")


def kill_and_compare(kill_it, wanted: int, flags: list[str], work: Path, random: Random) -> dict[str, int]:
    """Start runs until as many as are wanted were killed in time; go on with each, and compare its weights.

    Returns:
        `runs` that were started, those that were `killed`, `checkpoints` found after that, how many of these were
        `corrupt`, and how many of the killed runs ended with `identical` weights.
    """
    counts = dict.fromkeys(("runs", "killed", "checkpoints", "corrupt", "identical"), 0)
    expected = load_file(work / "whole" / WEIGHTS_NAME)
    while counts["killed"] < wanted:
        folder = work / f"{kill_it.__name__}-{counts['runs']}"
        counts["runs"] += 1
        if kill_it(start(flags, folder), folder, random):  # else the run, or the save, was over before
            counts["killed"] += 1
            found = checkpoint.list_checkpoints(folder)
            counts["checkpoints"] += len(found)
            counts["corrupt"] += sum(not is_whole(path) for path in found)
            resume = ["--resume_from_checkpoint", "latest"] if found else []
            if wait(start([*flags, *resume], folder)) == 0:
                counts["identical"] += is_same(load_file(folder / WEIGHTS_NAME), expected)
            print(f"{folder.name}: {len(found)} checkpoints after the kill; {counts}", flush=True)
        shutil.rmtree(folder)
    return counts


def start(flags: list[str], folder: Path) -> int:
    """Fork a process that trains; what it prints goes to `<folder>.log`. Returns its id."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with open(f"{folder}.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.argv = [str(TRAIN), *flags, "--output_dir", str(folder)]
            os.environ["ACCELERATE_USE_CPU"] = "true"
            runpy.run_path(str(TRAIN), run_name="__main__")
            code = 0
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """Exit code of a process at its end."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_after_a_step(process: int, folder: Path, random: Random) -> bool:
    """Kill a process within a second of a random checkpoint. Returns whether it was still running."""
    target = folder / f"checkpoint-{2 * random.randrange(1, STEPS // 2)}"
    wait_for(target, process)
    time.sleep(random.uniform(0, 1))
    return kill(process)


def kill_in_save(process: int, folder: Path, random: Random) -> bool:
    """Kill a process a moment after it began a random save. Returns whether that left the save unfinished."""
    target = folder / SAVING.replace("*", str(2 * random.randrange(1, STEPS // 2)))
    wait_for(target, process)
    time.sleep(random.uniform(0, 0.1))
    if not kill(process):
        return False
    removal_begun = len([*folder.glob("checkpoint-*")]) > len(checkpoint.list_checkpoints(folder))
    return removal_begun or any(folder.glob(SAVING))


def wait_for(target: Path, process: int) -> None:
    """Until a folder is there, or the process has ended, which is left to be waited for."""
    while not target.exists() and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.0005)


def kill(process: int) -> bool:
    """Send SIGKILL, and say whether that is what ended the process."""
    os.kill(process, signal.SIGKILL)
    return wait(process) == -signal.SIGKILL


def is_whole(path: Path) -> bool:
    """Whether all files of a checkpoint are what was written."""
    try:
        checkpoint.read_progress(path)
    except OSError:
        return False
    return True


def is_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal, bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())


if __name__ == "__main__":
    main()
