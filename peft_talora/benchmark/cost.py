"""Step time and peak memory of what is compared, by short runs, one at a time."""

from __future__ import annotations

import json
import math
import statistics

from ..files import write_aside, write_json
from .jobs import run_jobs
from .plan import Benchmark
from .records import describe_commit, describe_hardware


def measure_cost(benchmark: Benchmark, steps: int, rounds: int) -> None:
    """Write `cost_file`: step time and peak memory of all variants, measured in one go, all of them in every round.

    Figures of an earlier go that lack a variant, or are of other settings, are replaced, not added to: the machine may
    have been slower then.

    Args:
        benchmark: What is compared.
        steps: Of a run.
        rounds: Runs of each variant, in turns; medians are written.

    Raises:
        ValueError: If the file has costs of other variants, which would be lost.
    """
    protocol, variants, file = benchmark.protocol, benchmark.variants, benchmark.cost_file
    settings = benchmark.settings(protocol)
    wanted = {
        "settings": settings,
        "variants": variants,
        "steps": steps,
        "rounds": rounds,
        "commit": describe_commit(benchmark.root),
        "hardware": describe_hardware(benchmark.num_threads),
    }
    found = json.loads(file.read_text()) if file.exists() else {"methods": {}}
    if lost := sorted(found["methods"].keys() - variants.keys()):
        raise ValueError(
            f"{file} has {', '.join(lost)} too, and all costs of a table are measured in one go: give these as well, "
            "or move the file away."
        )
    # The commit may be another one: documents alone change it.
    if (
        all(found.get(name) == value for name, value in wanted.items() if name != "commit")
        and variants.keys() <= found["methods"].keys()
    ):
        return
    images = steps * settings["per_device_train_batch_size"]
    short = {**settings, "num_train_epochs": 1}
    others = {"per_device_eval_batch_size": 1}
    if protocol.generated:
        short["num_images"] = images
    else:
        # Where there is no validation split, train.py holds some out of them.
        held_out = 0 if "val" in protocol.folders else math.ceil(images / 9) + 1
        others |= {"max_train_samples": images + held_out, "max_eval_samples": 2}
    measured: dict[str, list[dict]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name, choices in variants.items():
            # Resumed, what an interrupted go left would have its figures taken for this go's.
            job = benchmark.job(f"cost/{name}-{turn}", protocol, {**short, **choices, "seed": 0}, others, anew=True)
            for ended in run_jobs([job], 1):
                measured[name].append({key: ended.results()[key] for key in ("step_seconds", "peak_mib")})
                ended.discard()
            benchmark.say(f"{job.name}: {measured[name][-1]}")
    costs = {
        **wanted,
        "methods": {
            name: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
            for name, turns in measured.items()
        },
    }
    with write_aside(file.parent) as aside:
        write_json(aside / file.name, costs)
