"""Time and memory of calls that are compared: in turns within one process, and peaks in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

MIB = 2**20
Range = list[float]  # the tenth and the ninetieth percentile


def keep_memory() -> None:
    """On a CPU, start this process again with an allocator that keeps what it has: mapped anew, pages cost time."""
    if "MALLOC_MMAP_MAX_" not in os.environ:  # the allocator reads it at the start of a process
        os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}
        os.execv(sys.executable, [sys.executable, *sys.argv])


def time_in_turns(
    runs: Mapping[str, Callable], rounds: int, device: torch.device, uncounted: int = 2
) -> dict[str, np.ndarray]:
    """Seconds of each of `rounds` calls of every run, all of them in every round; `uncounted` rounds go before."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(uncounted + rounds):
        for name, run in runs.items():
            taken[name].append(seconds_of(run, device))
    return {name: np.array(values[uncounted:]) for name, values in taken.items()}


def seconds_of(run: Callable, device: torch.device) -> float:
    """Of one call: on a CPU the time of the process, which other processes do not lengthen, summed over threads."""
    if device.type == "cpu":
        begun = time.process_time()
        run()
        return time.process_time() - begun
    torch.accelerator.synchronize()
    begun = time.perf_counter()
    run()
    torch.accelerator.synchronize()
    return time.perf_counter() - begun


def median(values: np.ndarray) -> float:
    """To four digits."""
    return round(float(np.median(values)), 4)


def percentiles(values: np.ndarray) -> Range:
    """The tenth and the ninetieth."""
    return [round(float(value), 4) for value in np.percentile(values, [10, 90])]


def peak_on_accelerator(run: Callable) -> float:
    """Peak memory of the second call above what there was before it, MiB."""
    run()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    run()
    torch.accelerator.synchronize()
    return (torch.accelerator.max_memory_allocated() - before) / MIB


def last_line_of(script: str, flags: Sequence[str]) -> str:
    """What a script prints at last, in a process whose allocator gives back what is freed.

    Every larger tensor has pages of its own there, so that resident memory is what lives.
    """
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env.pop("MALLOC_MMAP_MAX_", None)
    result = subprocess.run([sys.executable, script, *flags], env=env, capture_output=True, text=True, check=True)
    return result.stdout.strip().splitlines()[-1]


def resident_peak(run: Callable) -> float:
    """Peak resident memory of the second call above what there was before it, MiB; of a process that does no more."""
    run()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from now
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def resident() -> float:
    """Resident memory of this process, MiB."""
    return _status("VmRSS") / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])
