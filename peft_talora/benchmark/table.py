"""The table of a benchmark: records of runs in, JSON, Markdown and a picture out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from ..metrics import delta_m
from ..plotting import draw_scatter
from .intervals import mean_interval
from .protocols import Protocol
from .records import Record, by_name

Table = dict[str, Any]
Spread = Mapping[str, Any] | None  # {"mean", "ci95"}; None where there is no number
_NO_NUMBER = "-"
_UNITS = {"absolute_error": "m", "rmse": "m", "mean_angle": "°", "median_angle": "°"}


def make_table(
    protocol: Protocol,
    records: Sequence[Record],
    baselines: Mapping[str, str],
    costs: Mapping[str, Any] | None = None,
) -> Table:
    """Mean and 95 % interval over seeds of every figure, and Δm, of every method.

    Δm is taken for each seed, against the baseline's run of the same seed, and then averaged: what a seed does to both
    does not widen the interval. It is None where a baseline has no runs, or a figure is 0 in the baseline or not a
    number; `notes` then says which.

    Args:
        protocol: What was run.
        records: Of comparable runs (see `read_comparable`), in the order of the table.
        baselines: Key of the table → the name of the runs that Δm is taken against.
        costs: `hardware`, `commit`, `steps` and `rounds`, and `methods`: name → `step_seconds` and `peak_mib`. None:
            not measured.

    Returns:
        What is written as JSON: `protocol`, `commit`, `hardware`, `baselines`, `cost`, `notes`, `settings` and
        `methods`.
    """
    runs, notes, methods = by_name(records), [], {}
    for name, seeds in runs.items():
        record = next(iter(seeds.values()))
        entry: dict[str, Any] = {"seeds": len(seeds)}
        entry |= {choice: record.arguments[choice] for choice in ("learning_rate", "updates")}
        entry["validation_loss"] = _spread([run.validation_loss for run in seeds.values()])
        for key, baseline in baselines.items():
            entry[key] = _spread_gain(protocol, seeds, runs.get(baseline, {}), notes)
        entry["metrics"] = {
            task: {figure: _spread([run.metrics[task][figure] for run in seeds.values()]) for figure in figures}
            for task, figures in protocol.higher_is_better.items()
        }
        entry["adapter_parameters"] = record.parameters["adapter"]
        entry["head_parameters"] = record.parameters["heads"]
        entry["other_parameters"] = sum(record.parameters[kind] for kind in ("encoder", "other"))
        cost = (costs or {}).get("methods", {}).get(name, {})
        entry |= {key: cost.get(key) for key in ("step_seconds", "peak_mib")}
        methods[name] = entry
    return {
        "protocol": protocol.name,
        "commit": ", ".join(sorted({record.commit or "unknown" for record in records})),
        "hardware": ", ".join(sorted({record.hardware for record in records})),
        "baselines": dict(baselines),
        "cost": costs and {key: costs[key] for key in ("steps", "rounds", "commit", "hardware")},
        "notes": sorted(set(notes)),
        "settings": records[0].settings if records else {},
        "methods": methods,
    }


def relative_gain(protocol: Protocol, record: Record, baseline: Record) -> float:
    """Δm of one run over another, in percent, by the protocol's figures.

    Raises:
        ValueError: If a figure is not a number, or 0 in the baseline; the message says which.
    """
    results = {task: {f: record.metrics[task][f] for f in d} for task, d in protocol.higher_is_better.items()}
    for run in (record, baseline):
        for task, figures in results.items():
            for figure in figures:
                if run.metrics[task][figure] is None:
                    raise ValueError(f"{figure!r} of {task!r} is not a number in {run.name!r}, seed {run.seed}")
    return delta_m(results, baseline.metrics, protocol.higher_is_better)


def _spread_gain(
    protocol: Protocol, runs: Mapping[int, Record], baseline: Mapping[int, Record], notes: list[str]
) -> Spread:
    """Δm over the seeds that both have; adds to `notes` what there is to say of it."""
    common = [seed for seed in runs if seed in baseline]
    if not common:
        return None
    if len(common) < len(runs):
        name, other = runs[common[0]].name, baseline[common[0]].name
        notes.append(f"Δm of {name} over {other} is of {len(common)} seeds, those that both have.")
    try:
        return _spread([relative_gain(protocol, runs[seed], baseline[seed]) for seed in common])
    except ValueError as error:
        notes.append(f"No Δm: {error}.")
        return None


def _spread(values: Sequence[float | None]) -> Spread:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    mean, interval = mean_interval(known)
    return {"mean": mean, "ci95": interval and list(interval)}


def to_markdown(table: Table, protocol: Protocol, title: str) -> str:
    """The table to be read: the main figures first, then every figure of every task."""
    methods, directions = table["methods"], protocol.higher_is_better
    primary = {task: next(iter(figures)) for task, figures in directions.items()}
    columns: dict[str, Callable[[Mapping], str]] = {}
    if len({method["seeds"] for method in methods.values()}) > 1:
        columns["seeds"] = lambda m: str(m["seeds"])
    columns |= {"learning rate": lambda m: f"{m['learning_rate']:g}", "updates": lambda m: m["updates"]}
    columns["validation loss ↓"] = lambda m: _with_interval(m["validation_loss"])
    columns |= {
        f"Δm over {name} (%)": lambda m, key=key: _with_interval(m[key], 2, sign="+")
        for key, name in table["baselines"].items()
        if name in methods
    }
    columns |= {
        _head(task, figure, directions[task][figure]): lambda m, t=task, f=figure: _with_interval(m["metrics"][t][f])
        for task, figure in primary.items()
    }
    columns |= {
        "adapter": lambda m: f"{m['adapter_parameters']:,}",
        "encoder": lambda m: f"{m['other_parameters']:,}",
        "heads": lambda m: f"{m['head_parameters']:,}",
    }
    if any(m["step_seconds"] is not None for m in methods.values()):
        columns |= {
            "step (ms)": lambda m: _NO_NUMBER if m["step_seconds"] is None else f"{1000 * m['step_seconds']:.0f}",
            "peak (MiB)": lambda m: _NO_NUMBER if m["peak_mib"] is None else f"{m['peak_mib']:.0f}",
        }
    parts = [f"# {title}", _introduction(table, protocol), _rows(methods, columns)]
    parts += [f"- {note}" for note in table["notes"]]
    for task, figures in directions.items():
        details = {
            _head("", figure, up): lambda m, t=task, f=figure: _with_interval(m["metrics"][t][f])
            for figure, up in figures.items()
        }
        parts += [f"## {task}", _rows(methods, details)]
    return "\n\n".join(parts) + "\n"


def _introduction(table: Table, protocol: Protocol) -> str:
    settings, cost = table["settings"], table["cost"]
    measured = ""
    if cost:
        measured = (
            f" *step* (a batch with all its updates) and *peak*: each method's median over {cost['rounds']} runs of "
            f"{cost['steps']} steps of train.py, one at a time ({cost['hardware']}; commit {cost['commit']}); on a "
            "CPU, peak is the whole process's."
        )
    seeds = sorted({method["seeds"] for method in table["methods"].values()})
    return (
        f"{protocol.source[0].upper()}{protocol.source[1:]}. Epochs: {settings['num_train_epochs']}; images a step: "
        f"{settings['per_device_train_batch_size']}; weights of the losses: {', '.join(settings['loss_weights'])}; "
        f"seeds: {', '.join(map(str, seeds))}. Commit {table['commit']}; {table['hardware']}.\n\n"
        "Test images; each run's checkpoint is the one with the lowest weighted sum of losses on the validation "
        "images. Single-task learning (`-stl`) has a run for each task, hence a checkpoint for each. *updates*: one "
        "optimiser step of all losses for each batch (joint), or one per task (alternating); where tasks share "
        "nothing that is trained, both are the same. *validation loss*: that weighted sum, by which all "
        "is chosen. Figures are means over seeds ± half the width of their 95 % "
        "interval (Student's t). Δm is the mean relative gain over the figures of a task, averaged over the tasks; it "
        "is taken seed by seed against the baseline's run of the same seed. Trained parameters: *adapter* of the "
        "low-rank updates, *encoder* of layer norms or of the whole "
        f"encoder, *heads*; with `-stl`, of the runs of all tasks.{measured}"
    )


def _rows(methods: Mapping[str, Mapping], columns: Mapping[str, Callable[[Mapping], str]]) -> str:
    lines = ["| method | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [
        f"| {name} | " + " | ".join(write(method) for write in columns.values()) + " |"
        for name, method in methods.items()
    ]
    return "\n".join(lines)


def _head(task: str, figure: str, higher_is_better: bool) -> str:
    unit = f" ({_UNITS[figure]})" if figure in _UNITS else ""
    return f"{task} {figure}".strip().replace("_", " ") + unit + (" ↑" if higher_is_better else " ↓")


def _with_interval(spread: Spread, digits: int | None = None, sign: str = "") -> str:
    if spread is None:
        return _NO_NUMBER
    digits = (2 if abs(spread["mean"]) >= 10 else 3) if digits is None else digits
    if spread["mean"] == 0 and spread["ci95"] in (None, [0, 0]):
        return "0"
    text = f"{spread['mean']:{sign}.{digits}f}"
    if not spread["ci95"]:
        return text
    return f"{text} ± {spread['ci95'][1] - spread['mean']:.{digits}f}"


def draw_table(table: Table) -> Image.Image | None:
    """Δm over the first baseline that has runs, against trained parameters outside the heads; None without one."""
    for key, baseline in table["baselines"].items():
        points = {
            name: (method["adapter_parameters"] + method["other_parameters"], method[key]["mean"], method[key]["ci95"])
            for name, method in table["methods"].items()
            if method[key]
        }
        if points:
            title = f"{table['protocol']}: mean gain over {baseline} in percent"
            if any(interval for _, _, interval in points.values()):
                title += ", with 95 % intervals over seeds"
            return draw_scatter(points, title, "trained parameters outside the heads")
    return None
