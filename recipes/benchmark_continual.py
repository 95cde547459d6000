"""Compare ways to learn the generated stream of eight domains: settings, runs over seeds, one table.

    python recipes/benchmark_continual.py                                  # everything, three seeds
    python recipes/benchmark_continual.py --workers 2 --num_threads 1      # two runs at a time, a thread each
    python recipes/benchmark_continual.py --entries moda/lora joint/lora --seeds 1
    python recipes/benchmark_continual.py --output_dir docs/results --stages table    # the project's own table

Every run is `recipes/continual.py` in a process of its own. A finished one leaves a record under `<output_dir>/runs`,
and the table is made of these: the same command goes on where it was stopped. Learning rates and the strengths of
penalties are chosen on validation images, with a seed that no table has, on some of the domains.
"""

import json
import math
import os
import signal
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from peft_talora import engine
from peft_talora.benchmark.comparison import TUNING_SEED, Comparison, make_table, run_seeds, to_markdown, tune
from peft_talora.continual.contestants import METHODS, check_choice
from peft_talora.continual.kinds import KINDS
from peft_talora.continual.pictures import draw_course
from peft_talora.files import write_aside, write_json

ENTRIES = (*(f"moda/{kind}" for kind in KINDS), *(f"{method}/lora" for method in METHODS if method != "moda"))
STAGES = ("tuning", "runs", "table")


@dataclass
class ComparisonArguments:
    """What to compare, and where results go."""

    entries: list[str] = field(default_factory=lambda: list(ENTRIES), metadata={"help": "<method>/<adapter> of each."})
    seeds: int = field(default=3, metadata={"help": "Runs of each."})
    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": f"Of {', '.join(STAGES)}."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3, 1e-2], metadata={"help": "To choose from."}
    )
    base: str | None = field(default=None, metadata={"help": "SAM checkpoint, as in continual.py."})
    num_images: int = field(default=80, metadata={"help": "Of a domain; a fifth validates."})
    num_test_images: int = field(default=24, metadata={"help": "Of a domain."})
    num_train_epochs: int = field(default=3, metadata={"help": "Of a domain."})
    tuning_domains: list[str] = field(
        default_factory=lambda: ["pits", "textures", "bottles", "polyps"],
        metadata={"help": "Those on which settings are chosen."},
    )
    workers: int = field(default=1, metadata={"help": "Runs at a time."})
    num_threads: int | None = field(
        default=None, metadata={"help": "CPU threads of each run. None: its share of the cores."}
    )
    output_dir: str = field(default="runs/results", metadata={"help": "Folder of records and tables."})
    work_dir: str = field(default="runs/benchmark-continual", metadata={"help": "Folder of runs under way."})


def main() -> None:
    """All stages."""
    args = engine.parse_arguments(ComparisonArguments)
    check(args)
    comparison = build(args)
    if "tuning" in args.stages:
        tune(comparison, args.learning_rates)
    if "runs" in args.stages:
        run_seeds(comparison)
    if "table" in args.stages:
        write_tables(comparison)


def check(args: ComparisonArguments) -> None:
    """Refuse what would fail late."""
    if unknown := [stage for stage in args.stages if stage not in STAGES]:
        raise ValueError(f"`stages` has {', '.join(unknown)}; allowed: {', '.join(STAGES)}.")
    for entry in args.entries:
        method, _, adapter = entry.partition("/")
        if adapter not in KINDS:
            raise ValueError(f"`entries` has {entry!r}; allowed: <method>/<adapter>, such as {', '.join(ENTRIES)}.")
        check_choice(method, adapter)
    for name in ("seeds", "workers", "num_threads", "num_images", "num_test_images", "num_train_epochs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}; allowed: 1 or more.")
    if args.seeds > TUNING_SEED:
        raise ValueError(f"`seeds` is {args.seeds}; allowed: up to {TUNING_SEED}, the seed of the settings' choice.")
    if not args.learning_rates or any(not 0 < rate < math.inf for rate in args.learning_rates):
        raise ValueError(f"`learning_rates` is {args.learning_rates}; allowed: positive numbers.")


def build(args: ComparisonArguments) -> Comparison:
    """What is compared."""
    shared = {name: getattr(args, name) for name in ("num_images", "num_test_images", "num_train_epochs")}
    return Comparison(
        entries=args.entries,
        shared=shared | ({} if args.base is None else {"base": args.base}),
        tuning_domains=args.tuning_domains,
        seeds=range(args.seeds),
        workers=args.workers,
        num_threads=args.num_threads or max(1, (os.cpu_count() or 1) // args.workers),
        root=Path(__file__).resolve().parent.parent,
        output=Path(args.output_dir),
        work=Path(args.work_dir),
        say=partial(print, flush=True),
    )


def write_tables(comparison: Comparison) -> None:
    """JSON, Markdown and picture of all records there are."""
    records = [json.loads(file.read_text()) for file in sorted(comparison.records.glob("*-seed*.json"))]
    names = [*ENTRIES, *sorted({record["name"] for record in records} - set(ENTRIES))]
    records.sort(key=lambda record: (names.index(record["name"]), record["arguments"]["seed"]))
    table = make_table(records)
    curves = {name: row["course"] for name, row in table["methods"].items() if len(row["course"]) > 1}
    with write_aside(comparison.output) as aside:
        write_json(aside / f"{comparison.name}.json", table)
        (aside / f"{comparison.name}.md").write_text(to_markdown(table, "The generated stream of eight domains"))
        if curves:
            title = "IoU (%) on the domains learnt so far, after each domain"
            draw_course(curves, table["domains"], title).save(aside / f"{comparison.name}.png")
    print(f"{comparison.name}: .json, .md and the picture are in {comparison.output}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that runs under way are ended too
    main()
