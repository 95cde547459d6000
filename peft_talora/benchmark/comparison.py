"""Compare ways to learn a stream: the runs that are wanted, their settings by validation images, their table.

Every run is one of `recipes/continual.py`, in a process of its own; a finished one leaves a record. Tables are
made of records.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import small_sam
from ..files import write_aside, write_json
from .intervals import mean_interval
from .jobs import Job, run_jobs
from .records import describe_differing, describe_hardware, describe_weights

TUNING_SEED = 100  # of the choice of settings; no table has a run with it
WIDENINGS = 1  # of what is tried of a setting, by one value each
DIVERGED = "FloatingPointError"  # what continual.py raises where gradients are not finite

STRENGTHS = {"lwf": (0.3, 1.0, 3.0), "ewc": (1e2, 1e3, 1e4), "o-lora": (0.05, 0.5, 5.0)}
"""Tried of each method that has a strength; ER's buffer is what MoDA keeps of images, and not a choice."""

FIGURES = {
    "last": ("matrix", "iou", "last"),
    "avg": ("matrix", "iou", "avg"),
    "ff": ("matrix", "iou", "ff"),
    "ff_diagonal": ("matrix", "iou", "ff_diagonal"),
    "forward_transfer": ("matrix", "iou", "forward_transfer"),
    "natural": ("matrix", "iou", "natural"),
    "no_prompt": ("matrix", "iou", "no_prompt"),
    "oracle_last": ("matrix", "iou", "oracle_last"),
    "boundary_last": ("matrix", "boundary_iou", "last"),
    "routing_accuracy": ("routing", "accuracy"),
    "false_alarms": ("routing", "false_alarms"),
    "natural_to_base": ("routing", "natural_to_base"),
    "parameters_per_domain": ("parameters_per_domain",),
    "bytes_per_domain": ("bytes_per_domain",),
    "passes_per_image": ("encoder_passes",),
    "seconds": ("seconds",),
}
"""Figures of the table, by where they stand in a run's results."""

_COUNTS = ("parameters_per_domain", "bytes_per_domain", "seconds")
_PERCENT = ("routing_accuracy", "false_alarms", "natural_to_base")  # shares in a run's results


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where runs and records are.

    Attributes:
        entries: ``"<method>/<adapter>"`` of each.
        shared: Arguments of continual.py that all runs have, tuning as well.
        tuning_domains: Those of the stream on which settings are chosen; None: all.
        seeds: Of the table's runs.
        workers: Runs at a time.
        num_threads: CPU threads of each.
        root: Folder of the clone, with `recipes/continual.py`.
        output: Folder of tables, and of records under ``runs/<name>``.
        work: Folder of runs under way.
        say: Called with each line that there is to show.
        name: Of the table.
    """

    entries: Sequence[str]
    shared: Mapping[str, Any]
    tuning_domains: Sequence[str] | None
    seeds: range
    workers: int
    num_threads: int
    root: Path
    output: Path
    work: Path
    say: Callable[[str], None]
    name: str = "cosam-generated"

    @property
    def records(self) -> Path:
        """Folder of the records of the table's runs."""
        return self.output / "runs" / self.name

    @property
    def choices_file(self) -> Path:
        """The settings that were chosen."""
        return self.output / f"{self.name}-settings.json"

    def arguments(self, entry: str, seed: int, **own: Any) -> dict[str, Any]:
        """All that decides the course of a run."""
        method, adapter = entry.split("/")
        return {**self.shared, "method": method, "adapter": adapter, "seed": seed, **own}


@dataclass(frozen=True)
class Wanted:
    """A run that is wanted: its record's file, and what decides its course."""

    entry: str
    file: Path
    arguments: dict[str, Any]


# --- runs ---


def run_missing(comparison: Comparison, wanted: Sequence[Wanted]) -> list[dict[str, Any]]:
    """Run what has no record yet, and give the records of all, in the order of `wanted`.

    A record has `name`, `arguments`, `context`, `results` (None where the run diverged), `commit` and `hardware`.

    Raises:
        ValueError: If there is a record of other arguments.
        RuntimeError: If a run fails.
    """
    context = {"base_weights": describe_weights(comparison.shared.get("base") or small_sam.SMALL_SAM)}
    for run in wanted:
        if run.file.exists():
            _check_record(run.file, {"arguments": run.arguments, "context": context})
    missing = {comparison.work / run.file.parent.name / run.file.stem: run for run in wanted if not run.file.exists()}
    comparison.say(f"{comparison.name}: {len(wanted) - len(missing)} of {len(wanted)} runs are done")
    jobs = [
        Job(
            name=f"{run.file.parent.name}/{run.file.stem}",
            script=comparison.root / "recipes" / "continual.py",
            arguments=run.arguments,
            others={"num_threads": comparison.num_threads},
            context=context,
            folder=folder,
            accepted_error=DIVERGED,
        )
        for folder, run in missing.items()
    ]
    with closing(run_jobs(jobs, comparison.workers)) as ended:
        for count, job in enumerate(ended, 1):
            run = missing[job.folder]
            diverged = job.failed_acceptably()
            record = {
                "name": run.entry,
                "arguments": run.arguments,
                "context": context,
                "results": None if diverged else _without(job.results(), "arguments"),
                "commit": job.commit,
                "hardware": describe_hardware(comparison.num_threads),
            }
            with write_aside(run.file.parent) as aside:
                write_json(aside / run.file.name, record)
            job.discard()
            comparison.say(f"{job.name}: {'diverged' if diverged else 'done'}, {len(missing) - count} to go")
    return [json.loads(run.file.read_text()) for run in wanted]


def _check_record(file: Path, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    found = json.loads(file.read_text())
    for part, values in json.loads(json.dumps(wanted)).items():
        if differing := describe_differing(found[part], values):
            raise ValueError(
                f"{file} is of a run with {differing}: give the same arguments, or another `output_dir`, or move it "
                "away."
            )


def _without(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


def run_seeds(comparison: Comparison) -> list[dict[str, Any]]:
    """The runs of the table, with the settings that were chosen; returns their records.

    Raises:
        ValueError: If no settings were chosen for an entry.
    """
    found = json.loads(comparison.choices_file.read_text()) if comparison.choices_file.exists() else {"chosen": {}}
    if missing := [entry for entry in comparison.entries if entry not in found["chosen"]]:
        raise ValueError(f"{comparison.choices_file} has no settings of {', '.join(missing)}: run the stage `tuning`.")
    wanted = []
    for seed, entry in ((seed, entry) for seed in comparison.seeds for entry in comparison.entries):
        own = found["chosen"][entry]["settings"]
        file = comparison.records / f"{entry.replace('/', '-')}-seed{seed}.json"
        wanted.append(Wanted(entry, file, comparison.arguments(entry, seed, **own)))
    return run_missing(comparison, wanted)


# --- settings ---


def tune(comparison: Comparison, learning_rates: Sequence[float]) -> None:
    """Choose each entry's learning rate, then its strength if it has one, by IoU on validation images.

    What counts is the mean over the domains after the last stage, of one run with a seed and images that no table has.
    Where the best value is the lowest or highest tried, the next one outwards is tried too, up to `WIDENINGS` times.
    Settings of other entries stay in the file.
    """
    searches = {entry: {"learning_rate": sorted(learning_rates)} for entry in comparison.entries}
    chosen = {entry: {"settings": {}, "validation_iou": {}, "at_border": []} for entry in comparison.entries}
    _search(comparison, chosen, searches, "learning_rate", 10 / 3)
    searches = {
        entry: {"strength": STRENGTHS[entry.split("/")[0]]}
        for entry in comparison.entries
        if entry.split("/")[0] in STRENGTHS
    }
    _search(comparison, chosen, searches, "strength", 10)
    file = comparison.choices_file
    former = json.loads(file.read_text())["chosen"] if file.exists() else {}
    for entry, found in chosen.items():
        comparison.say(f"{entry}: {found['settings']}; validation IoU {found['validation_iou']}")
    with write_aside(file.parent) as aside:
        write_json(
            aside / file.name,
            {"seed": TUNING_SEED, "domains": comparison.tuning_domains, "chosen": {**former, **chosen}},
        )


def _search(
    comparison: Comparison, chosen: dict[str, dict], grids: Mapping[str, Mapping], name: str, factor: float
) -> None:
    """Add the best value of a setting, of those tried, to what is `chosen` of each entry that has a grid."""
    tried = {entry: list(grid[name]) for entry, grid in grids.items()}
    for _ in range(WIDENINGS + 1):
        scores = _scores(comparison, chosen, tried, name)
        wider = {entry: beyond for entry in tried if (beyond := _beyond(scores[entry], factor)) is not None}
        widened = {entry: len(tried[entry]) - len(grids[entry][name]) for entry in wider}
        tried |= {e: sorted([*tried[e], value]) for e, value in wider.items() if widened[e] < WIDENINGS}
    for entry, own in scores.items():
        best = max(own, key=own.get)
        if own[best] == -math.inf:
            raise RuntimeError(f"{entry} diverged with every {name} of {list(own)}: give lower ones.")
        chosen[entry]["settings"][name] = best
        chosen[entry]["validation_iou"][name] = own
        if _beyond(own, factor) is not None:
            chosen[entry]["at_border"].append(name)


def _scores(
    comparison: Comparison, chosen: Mapping[str, dict], tried: Mapping[str, Sequence[float]], name: str
) -> dict[str, dict[float, float]]:
    """Entry → value → IoU on validation images; what diverged is worse than all else."""
    wanted = {}
    for entry, value in ((entry, value) for entry, values in tried.items() for value in values):
        own = {**chosen[entry]["settings"], name: value, "measure_on": "val", "domains": comparison.tuning_domains}
        words = "-".join(f"{key}{own[key]:g}" for key in ("learning_rate", "strength") if key in own)
        file = comparison.records / "tuning" / f"{entry.replace('/', '-')}-{words}.json"
        wanted[entry, value] = Wanted(entry, file, comparison.arguments(entry, TUNING_SEED, **own))
    records = dict(zip(wanted, run_missing(comparison, list(wanted.values())), strict=True))
    return {
        entry: {value: _validation_iou(records[entry, value]) for value in values} for entry, values in tried.items()
    }


def _validation_iou(record: Mapping[str, Any]) -> float:
    return -math.inf if record["results"] is None else record["results"]["matrix"]["iou"]["last"]


def _beyond(scores: Mapping[float, float], factor: float) -> float | None:
    """The value outwards of the best one, where that is at a border; None elsewhere."""
    best = max(scores, key=scores.get)
    if scores[best] == -math.inf or min(scores) < best < max(scores):
        return None
    return float(f"{best * factor if best == max(scores) else best / factor:.0e}")


# --- table ---


def make_table(records: Sequence[Mapping[str, Any]], reference: str = "moda/lora") -> dict[str, Any]:
    """Means over seeds of every figure, in percent where it is a share, with 95 % intervals; what is written as JSON.

    Beside them, `differences`: Last of `reference` less that of each other entry, seed by seed, in points.

    Raises:
        ValueError: Without records, if one is of a run that diverged, or if they are of different settings.
    """
    if not records:
        raise ValueError("there are no records: run the stage `runs` first.")
    for record in records:
        if record["results"] is None:
            seed = record["arguments"]["seed"]
            raise ValueError(f"{record['name']} diverged with seed {seed}: tune it with lower learning rates.")
    own = ("method", "adapter", "seed", "learning_rate", "strength")
    shared = [({k: v for k, v in r["arguments"].items() if k not in own}, r["context"]) for r in records]
    for record, parts in zip(records, shared, strict=True):
        for part, first_part in zip(parts, shared[0], strict=True):
            if differing := describe_differing(part, first_part):
                raise ValueError(f"{record['name']} is of a run with {differing}, as {records[0]['name']} has.")
    runs: dict[str, dict[int, Mapping]] = {}
    for record in records:
        runs.setdefault(record["name"], {})[record["arguments"]["seed"]] = record
    first = records[0]["results"]
    zero_shot = {metric: sum(own["zero_shot"]) / len(own["zero_shot"]) for metric, own in first["matrix"].items()}
    return {
        "commit": ", ".join(sorted({record["commit"] or "unknown" for record in records})),
        "hardware": ", ".join(sorted({record["hardware"] for record in records})),
        "domains": first["domains"],
        "settings": {**shared[0][0], **shared[0][1]},
        "without_training": {**zero_shot, "natural": first["matrix"]["iou"].get("natural_zero_shot")},
        "methods": {name: _row(seeds) for name, seeds in runs.items()},
        "differences": {
            name: _paired(runs[reference], seeds)
            for name, seeds in runs.items()
            if reference in runs and name != reference
        },
    }


def _row(seeds: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    arguments = next(iter(seeds.values()))["arguments"]
    row: dict[str, Any] = {"seeds": len(seeds)}
    row |= {name: arguments[name] for name in ("learning_rate", "strength") if name in arguments}
    intervals = {}
    for figure, path in FIGURES.items():
        values = [_at(record["results"], path) for record in seeds.values()]
        if any(value is None for value in values):
            row[figure] = None
            continue
        scale = 100 if figure in _PERCENT else 1
        row[figure], interval = mean_interval([scale * value for value in values])
        intervals[figure] = interval and list(interval)
    courses = [_course(record["results"]["matrix"]["iou"]["R"]) for record in seeds.values()]
    row["course"] = [sum(column) / len(column) for column in zip(*courses, strict=True)]
    return {**row, "ci95": intervals}


def _course(R: Sequence[Sequence[float]]) -> list[float]:
    """After each stage, the mean score on the domains that were learnt by then; of one stage, on all."""
    if len(R) < len(R[0]):
        return [sum(R[-1]) / len(R[-1])]
    return [sum(row[: t + 1]) / (t + 1) for t, row in enumerate(R)]


def _at(results: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = results
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _paired(ours: Mapping[int, Mapping], theirs: Mapping[int, Mapping]) -> dict[str, Any]:
    """Last of one less that of the other, over the seeds that both have."""
    last = FIGURES["last"]
    common = [seed for seed in ours if seed in theirs]
    mean, interval = mean_interval([_at(ours[s]["results"], last) - _at(theirs[s]["results"], last) for s in common])
    return {"seeds": len(common), "mean": mean, "ci95": interval and list(interval)}


def to_markdown(table: Mapping[str, Any], title: str) -> str:
    """The table to be read."""
    columns = {
        "Last": "last",
        "Avg": "avg",
        "FF": "ff",
        "FF, diagonal": "ff_diagonal",
        "natural": "natural",
        "oracle Last": "oracle_last",
        "routing (%)": "routing_accuracy",
        "boundary Last": "boundary_last",
        "no prompt": "no_prompt",
        "bytes a domain": "bytes_per_domain",
        "passes": "passes_per_image",
        "seconds": "seconds",
    }
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    plain = table["without_training"]
    zero = {"last": plain["iou"], "natural": plain["natural"], "boundary_last": plain["boundary_iou"]}
    lines.append(f"| without training | {' | '.join(_number(zero.get(figure)) for figure in columns.values())} |")
    for name, row in table["methods"].items():
        lines.append(f"| {name} | {' | '.join(_cell(row, figure) for figure in columns.values())} |")
    settings = table["settings"]
    chosen = "; ".join(f"{name} {_settings(row)}" for name, row in table["methods"].items())
    seeds = sorted({row["seeds"] for row in table["methods"].values()})
    text = (
        f"Stream: {', '.join(table['domains'])}; {settings['num_images']} images a domain, a fifth of them to "
        f"validate, {settings['num_train_epochs']} epochs; {settings['num_test_images']} test images. IoU of masks in "
        "percent, prompted by the box unless said; means over seeds ± half the width of their 95 % interval "
        "(Student's t), "
        f"seeds: {', '.join(map(str, seeds))}. Commit {table['commit']}; {table['hardware']}.\n\n"
        f"Settings, chosen on validation images with a seed of its own: {chosen}."
    )
    parts = [f"# {title}", text, "\n".join(lines)]
    if table["differences"]:
        rows = [
            f"| {name} | {_signed(found['mean'])}{_interval(found['ci95'])} |"
            for name, found in table["differences"].items()
        ]
        parts.append("\n".join(["| Last of moda/lora less that of | points, seed by seed |", "|---|---:|", *rows]))
    return "\n\n".join(parts) + "\n"


def _settings(row: Mapping[str, Any]) -> str:
    return " and ".join(f"{row[name]:g}" for name in ("learning_rate", "strength") if name in row)


def _cell(row: Mapping[str, Any], figure: str) -> str:
    text, interval = _number(row[figure], figure), row["ci95"].get(figure)
    if not interval or figure in _COUNTS or interval[1] == row[figure]:
        return text
    return f"{text} ± {_number(interval[1] - row[figure], figure)}"


def _number(value: float | None, figure: str = "last") -> str:
    if value is None:
        return ""
    if figure in _COUNTS:
        return f"{value:,.0f}"
    return f"{value:.2f}" if figure in ("ff", "ff_diagonal", "passes_per_image") else f"{value:.1f}"


def _signed(value: float) -> str:
    return f"{value:+.1f}"


def _interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:+.1f}, {interval[1]:+.1f}]"
