"""Learning rate and updates of a method: chosen by validation loss on synthetic-3, kept for all protocols."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..files import write_aside, write_json
from ..methods import find_method
from .plan import DIVERGED, Benchmark, Wanted, run_missing
from .protocols import SYNTHETIC_3
from .records import Record, read_record

WIDENINGS = 2  # of a method's learning rates, each by one
TUNING_SEED = 100  # of the learning rates' choice; no table has a run with it


def choose(benchmark: Benchmark, learning_rates: Sequence[float], tuning: bool) -> dict[str, dict[str, Any]]:
    """Method → its `learning_rate` and `updates`: those of the lowest validation loss on synthetic-3.

    Args:
        benchmark: Whose methods need them.
        learning_rates: To choose from; a single one is taken, with the method's own updates.
        tuning: Whether runs that are missing for the choice are run; otherwise all is chosen already.
    """
    file = benchmark.rates_file
    methods = {choices["method"] for choices in benchmark.variants.values()}
    if len(learning_rates) == 1:
        return {m: {"learning_rate": learning_rates[0], "updates": find_method(m).updates[0]} for m in methods}
    chosen, settings = {"methods": {}}, benchmark.settings(SYNTHETIC_3)
    if file.exists():
        chosen = json.loads(file.read_text())
        # For another protocol, what was chosen on synthetic-3 is taken as it is, but only for the same base.
        names = settings if benchmark.protocol is SYNTHETIC_3 else ["base", "base_weights"]
        if differing := [name for name in names if chosen["settings"].get(name) != settings[name]]:
            raise ValueError(
                f"{file} is of runs with other {', '.join(differing)}: give the same, or another `output_dir`."
            )
    wanted = methods if benchmark.protocol is SYNTHETIC_3 else methods - chosen["methods"].keys()
    if tuning and wanted:
        chosen = tune(benchmark, sorted(wanted), learning_rates, chosen["methods"])
        with write_aside(file.parent) as aside:
            write_json(aside / file.name, chosen)
    if missing := sorted(methods - chosen["methods"].keys()):
        raise ValueError(f"{file} has no learning rate of {', '.join(missing)}: run the stage `learning_rates` first.")
    return {m: {name: chosen["methods"][m][name] for name in ("learning_rate", "updates")} for m in methods}


def tune(
    benchmark: Benchmark, methods: Sequence[str], learning_rates: Sequence[float], known: Mapping[str, Any]
) -> dict[str, Any]:
    """Train each method in each of its ways with each learning rate; what is written as learning-rates.json.

    Where the best rate of one way is the lowest or the highest one tried, the next one outwards is tried as well, up
    to `WIDENINGS` times. Rates of earlier searches count too.

    Args:
        benchmark: Says where runs and records are.
        methods: To be tuned; each with all the updates that its `Method` has.
        learning_rates: To begin with.
        known: What earlier searches found, by method.
    """
    settings, table = benchmark.settings(SYNTHETIC_3), dict(known)
    ways = [(method, updates) for method in methods for updates in find_method(method).updates]
    tried = {way: known.get(way[0], {}).get("validation_loss", {}).get(way[1], {}) for way in ways}
    grids = {way: sorted({*learning_rates, *map(float, tried[way])}) for way in ways}
    losses = _losses(benchmark, settings, grids)
    while beyond := {
        way: rate
        for way, found in losses.items()
        if (rate := _beyond(found)) is not None and _widenings(found, learning_rates) < WIDENINGS
    }:
        grids |= {way: sorted({*grids[way], rate}) for way, rate in beyond.items()}
        losses = _losses(benchmark, settings, grids)
    for method in methods:
        found = {updates: losses[method, updates] for updates in find_method(method).updates}
        updates = min(found, key=lambda updates: min(found[updates].values()))
        rate = min(found[updates], key=found[updates].get)
        if math.isinf(found[updates][rate]):
            raise RuntimeError(
                f"{method} diverged with every learning rate of {list(found[updates])}: give lower ones."
            )
        at_border = _beyond(found[updates]) is not None
        table[method] = {
            "learning_rate": rate,
            "updates": updates,
            "at_border": at_border,
            "validation_loss": found,
        }
        benchmark.say(f"{method}: learning rate {rate:g}, {updates} updates; validation losses {found}")
        if at_border:
            benchmark.say(
                f"WARNING: {rate:g} is at the border of the learning rates tried for {method}: give more of them."
            )
    return {"protocol": SYNTHETIC_3.name, "seed": TUNING_SEED, "settings": settings, "methods": table}


def _losses(
    benchmark: Benchmark, settings: dict[str, Any], grids: Mapping[tuple[str, str], Sequence[float]]
) -> dict[tuple[str, str], dict[float, float]]:
    """(Method, updates) → learning rate → validation loss, of runs that are made where there is no record."""
    wanted = {}
    for method, updates, rate in ((*way, rate) for way, rates in grids.items() for rate in rates):
        choices = {"method": method, "seed": TUNING_SEED, "learning_rate": rate, "updates": updates}
        name = f"{method}-{updates}-{rate:g}-seed{TUNING_SEED}"
        job = benchmark.job(f"learning-rates/{name}", SYNTHETIC_3, {**settings, **choices}, accepted_error=DIVERGED)
        file = benchmark.output / "runs" / "learning-rates" / f"{name}.json"
        wanted[(method, updates), rate] = Wanted(method, file, {**settings, **choices}, job)
    run_missing(benchmark, SYNTHETIC_3, list(wanted.values()), may_diverge=True)
    return {
        way: {rate: read_record(wanted[way, rate].file).validation_loss for rate in rates}
        for way, rates in grids.items()
    }


def _widenings(tried: Iterable[float], learning_rates: Sequence[float]) -> int:
    """How many rates were tried outside of those to begin with, by this search and by earlier ones."""
    return sum(not min(learning_rates) <= rate <= max(learning_rates) for rate in tried)


def _beyond(losses: Mapping[float, float]) -> float | None:
    """The rate outwards of the best one, in steps of 1 and 3, where that is at a border; None elsewhere."""
    best = min(losses, key=losses.get)
    if math.isinf(losses[best]) or min(losses) < best < max(losses):
        return None
    return float(f"{best * 10 / 3 if best == max(losses) else best / 3:.0e}")


def rate_notes(benchmark: Benchmark, records: Sequence[Record]) -> list[str]:
    """What a reader must know of the records' learning rates."""
    file, notes = benchmark.rates_file, []
    if benchmark.group:
        notes.append("All variants have the learning rate that was chosen for talora itself.")
    if not file.exists():
        return notes
    used = {record.arguments["method"]: record.arguments for record in records}
    chosen = json.loads(file.read_text())["methods"]
    names = ("learning_rate", "updates")
    chosen = {m: found for m, found in chosen.items() if m in used and all(used[m][n] == found[n] for n in names)}
    if chosen:
        notes.append(
            f"Learning rates and updates are those of the lowest validation loss on {SYNTHETIC_3.name}, the same for "
            "all tasks of a method."
        )
    for method, found in chosen.items():
        if found["at_border"]:
            rate, tried = found["learning_rate"], found["validation_loss"][found["updates"]]
            tried = ", ".join(f"{float(rate):g}" for rate in tried)
            notes.append(f"The learning rate of {method}, {rate:g}, is at the border of those tried: {tried}.")
    return notes
