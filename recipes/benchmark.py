"""Compare methods on a named protocol: learning rates, runs over seeds, cost, one table.

    python recipes/benchmark.py                                        # synthetic-3, all methods, three seeds
    python recipes/benchmark.py --workers 2 --num_threads 1            # two runs at a time, a thread each
    python recipes/benchmark.py --protocol camvid-2 --data_root camvid --workers 2
    python recipes/benchmark.py --stages cost table                    # later, on an idle machine
    python recipes/benchmark.py --ablation all                         # variants of talora instead of methods
    python recipes/benchmark.py --weightings all                       # ways to weigh its losses instead
    python recipes/benchmark.py --output_dir docs/results --stages table    # the project's own table, of its records

Every run is `recipes/train.py` in a process of its own. A finished one leaves a small record under
`<output_dir>/runs`, and the tables are made of these: the same command goes on where it was stopped. A run under way
goes on from its checkpoint as long as the code's commit is the same, and starts anew after another one. The learning
rate of a method, and whether each task has optimiser steps of its own, are chosen by validation loss on synthetic-3,
with a seed that no table has, and are the same for all protocols; where the best rate is at the border of those tried,
the next one outwards is tried too.
"""

import json
import math
import os
import signal
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peft_talora import engine, sources
from peft_talora.benchmark.cost import measure_cost
from peft_talora.benchmark.plan import Benchmark, run_seeds
from peft_talora.benchmark.protocols import PROTOCOLS, Protocol
from peft_talora.benchmark.rates import TUNING_SEED, choose, rate_notes
from peft_talora.benchmark.records import read_comparable
from peft_talora.benchmark.table import draw_table, make_table, to_markdown
from peft_talora.files import write_aside, write_json
from peft_talora.weighting import WEIGHTINGS

METHODS = ("full-stl", "full-hps", "lora-stl", "lora-hps", "mtlora", "talora", "heads")
BASELINES = {"delta_m": "full-stl", "delta_m_vs_lora_stl": "lora-stl"}
STAGES = ("learning_rates", "runs", "cost", "table")
CHANGES = ("num_images", "num_train_epochs", "per_device_train_batch_size", "image_size")  # of the protocol's own


def ablations(num_tasks: int) -> dict[str, dict[str, Any]]:
    """What is changed of talora's defaults, by the name of the variant."""
    qkv = r".*vision_encoder\.layers\.\d+\.attn\.qkv"
    parts = (["q"], ["k"], ["v"], ["q", "k"], ["q", "v"], ["k", "v"])
    return {
        **{f"r_task-{k}": {"r_task": k} for k in range(1, num_tasks + 2) if k != min(num_tasks, 4)},
        **{f"r-{r}": {"r": r} for r in (4, 8, 32)},
        **{f"alpha-{alpha:g}": {"alpha": alpha} for alpha in (16.0, 32.0)},
        "updates-joint": {"updates": "joint"},
        "decoder-token": {"decoder_mode": "token"},
        "norms-frozen": {"train_norms": False},
        **{f"start-{start}": {"init_weights": start} for start in ("orthogonal", "gaussian")},
        **{f"orthogonality-{w:g}": {"orthogonality": w, "init_weights": "orthogonal"} for w in (0.1, 1.0)},
        "targets-qkv": {"target_modules": qkv},
        **{f"targets-{'+'.join(p)}": {"target_modules": qkv, "qkv_parts": p} for p in parts},
    }


def weightings() -> dict[str, dict[str, Any]]:
    """What each weighting of the losses changes of talora's defaults, by its name."""
    return {name: {"updates": "joint", "weighting": name} for name in WEIGHTINGS}


@dataclass
class BenchmarkArguments:
    """What to compare, and where results go."""

    protocol: str = field(default="synthetic-3", metadata={"help": f"One of {', '.join(PROTOCOLS)}."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods to compare."})
    ablation: list[str] = field(
        default_factory=list, metadata={"help": "Variants of talora to compare instead, or 'all'."}
    )
    weightings: list[str] = field(
        default_factory=list, metadata={"help": "Weightings of talora's losses to compare instead, or 'all'."}
    )
    seeds: int | None = field(default=None, metadata={"help": "Runs of each. None: three, one of a variant."})
    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": f"Of {', '.join(STAGES)}."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3],
        metadata={"help": "To choose from; a single one is taken."},
    )
    data_root: str | None = field(default=None, metadata={"help": "Folder with the protocol's images and labels."})
    base: str | None = field(default=None, metadata={"help": "SAM checkpoint, as in train.py."})
    num_images: int | None = field(default=None, metadata={"help": "Generated scenes. None: the protocol's."})
    num_train_epochs: int | None = field(default=None, metadata={"help": "None: the protocol's."})
    per_device_train_batch_size: int | None = field(default=None, metadata={"help": "None: the protocol's."})
    image_size: int | None = field(default=None, metadata={"help": "Encoder's input. None: the protocol's."})
    workers: int = field(default=1, metadata={"help": "Runs at a time."})
    num_threads: int | None = field(
        default=None, metadata={"help": "CPU threads of each run. None: its share of the cores."}
    )
    cost_steps: int = field(default=12, metadata={"help": "Steps of the runs that measure time and memory."})
    cost_rounds: int = field(default=3, metadata={"help": "Such runs of each method, in turns; medians are reported."})
    output_dir: str = field(default="runs/results", metadata={"help": "Folder of records and tables."})
    work_dir: str = field(default="runs/benchmark", metadata={"help": "Folder of runs under way."})


def main() -> None:
    """All stages."""
    args = engine.parse_arguments(BenchmarkArguments)
    benchmark = build(args)
    if args.stages != ["table"]:
        chosen = choose(benchmark, args.learning_rates, tuning="learning_rates" in args.stages)
        for choices in benchmark.variants.values():
            choices |= {**chosen[choices["method"]], **choices}
    if "runs" in args.stages:
        run_seeds(benchmark)
    if "cost" in args.stages:
        measure_cost(benchmark, args.cost_steps, args.cost_rounds)
    if "table" in args.stages:
        write_tables(benchmark)


def check(args: BenchmarkArguments) -> None:
    """Refuse what would fail late."""
    if args.protocol not in PROTOCOLS:
        raise ValueError(f"`protocol` is {args.protocol!r}; allowed: {', '.join(PROTOCOLS)}.")
    protocol = PROTOCOLS[args.protocol]
    if args.stages != ["table"]:
        protocol.check_data_root(args.data_root)
    allowed = {
        "stages": STAGES,
        "methods": METHODS,
        "ablation": (*ablations(len(protocol.tasks)), "all"),
        "weightings": (*WEIGHTINGS, "all"),
    }
    for name, words in allowed.items():
        if unknown := [word for word in getattr(args, name) if word not in words]:
            raise ValueError(f"`{name}` has {', '.join(unknown)}; allowed: {', '.join(words)}.")
    for name in ("workers", "seeds", "num_threads", "cost_steps", "cost_rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}; allowed: 1 or more.")
    if args.seeds is not None and args.seeds > TUNING_SEED:
        raise ValueError(
            f"`seeds` is {args.seeds}; allowed: up to {TUNING_SEED}, the seed of the learning rates' choice."
        )
    if any(not 0 < rate < math.inf for rate in args.learning_rates):
        raise ValueError(f"`learning_rates` is {args.learning_rates}; allowed: positive numbers.")
    given = {"methods": args.methods != list(METHODS), "ablation": args.ablation, "weightings": args.weightings}
    if len(several := [f"`{name}`" for name, words in given.items() if words]) > 1:
        raise ValueError(f"{' and '.join(several)} are given: variants of talora are compared with talora alone.")


def build(args: BenchmarkArguments) -> Benchmark:
    """What is compared. Raises ValueError for what would fail late."""
    check(args)
    protocol = PROTOCOLS[args.protocol]
    variants = {name: {"method": name} for name in METHODS if name in args.methods}
    group, known, wanted = None, {}, []
    if args.ablation:
        group, known, wanted = "ablations", ablations(len(protocol.tasks)), args.ablation
    elif args.weightings:
        group, known, wanted = "weightings", weightings(), args.weightings
    if group:
        chosen = {name: known[name] for name in (known if "all" in wanted else wanted)}
        variants = {name: {"method": "talora", **changes} for name, changes in {"talora": {}, **chosen}.items()}
    changes = {name: getattr(args, name) for name in CHANGES if getattr(args, name) is not None}
    benchmark = Benchmark(
        protocol=protocol,
        variants=variants,
        group=group,
        seeds=range(args.seeds or (1 if group else 3)),
        changes=changes,
        data_root=args.data_root,
        base=args.base,
        workers=args.workers,
        num_threads=args.num_threads or max(1, (os.cpu_count() or 1) // args.workers),
        root=Path(__file__).resolve().parent.parent,
        output=Path(args.output_dir),
        work=Path(args.work_dir),
        say=partial(print, flush=True),
    )
    if args.data_root is not None:
        check_images(benchmark)
    return benchmark


def check_images(benchmark: Benchmark) -> None:
    """Refuse a folder whose images are not the protocol's."""
    protocol = benchmark.protocol
    args = sources.DataArguments(
        data_root=benchmark.data_root,
        data_format=[protocol.data_format],
        ignored_class=protocol.ignored_class,
        derive_edges=protocol.derive_edges,
    )
    for split, folder in protocol.folders.items():
        protocol.check_split(split, sources.open_split(args, folder, protocol.tasks, 0))


@dataclass(frozen=True)
class Page:
    """What stands in a table: methods, then variants; Δm over which baselines; and what there is to say of it.

    It is drawn as Δm against trained parameters, unless most rows have as many.
    """

    methods: tuple[str, ...]
    variants: tuple[str, ...] = ()
    baselines: dict[str, str] = field(default_factory=lambda: dict(BASELINES))
    title: str = ""
    drawn: bool = True
    notes: tuple[str, ...] = ()


def find_page(protocol: Protocol, group: str | None) -> Page:
    """The table of methods, or of a group of variants."""
    if group == "ablations":
        return Page(
            methods=("talora",),
            variants=tuple(ablations(len(protocol.tasks))),
            baselines={"delta_m_vs_talora": "talora"},
            title=", talora and variants of it",
            notes=("Compare orthogonality-* with start-orthogonal, and parts of qkv with targets-qkv.",),
        )
    if group == "weightings":
        return Page(
            methods=("full-stl", "lora-stl", "talora"),
            variants=WEIGHTINGS,
            baselines={**BASELINES, "delta_m_vs_equal": "equal"},
            title=", ways to weigh the losses of talora",
            drawn=False,
            notes=(
                "Weightings have joint updates; fixed are the weights named above. The row talora has those too, with "
                "an update per task instead.",
                "All checkpoints are chosen by the same sum of validation losses, that with the fixed weights.",
            ),
        )
    return Page(methods=METHODS)


def write_tables(benchmark: Benchmark) -> None:
    """JSON, Markdown and picture of all records there are of the protocol."""
    protocol, group = benchmark.protocol, benchmark.group
    page = find_page(protocol, group)
    order = (*page.methods, *page.variants)
    files = sorted(benchmark.records.glob("*-seed*.json"))
    if group:
        files = [file for file in files if file.name.rpartition("-seed")[0] in page.methods]
        files += sorted((benchmark.records / group).glob("*-seed*.json"))
    records = read_comparable(files)
    if unknown := sorted({record.name for record in records} - set(order)):
        raise ValueError(f"{benchmark.records} has records of {', '.join(unknown)}; allowed: {', '.join(order)}.")
    records = sorted(records, key=lambda record: (order.index(record.name), record.seed))
    costs = json.loads(benchmark.cost_file.read_text()) if benchmark.cost_file.exists() else None
    if not records:
        raise ValueError(f"{benchmark.records} has no records: run the stage `runs` first.")
    for record in records if costs else ():
        measured = {**costs["settings"], **costs["variants"].get(record.name, {})}
        if differing := [name for name, value in measured.items() if record.arguments.get(name) != value]:
            raise ValueError(
                f"{benchmark.cost_file} is of {record.name} with other {', '.join(differing)} than the records: run "
                "the stage `cost` again."
            )
    table = make_table(protocol, records, page.baselines, costs)
    table["notes"] += [*rate_notes(benchmark, records), *page.notes]
    name = f"{group}-{protocol.name}" if group else protocol.name
    with write_aside(benchmark.output) as aside:
        write_json(aside / f"{name}.json", table)
        (aside / f"{name}.md").write_text(to_markdown(table, protocol, protocol.name + page.title))
        picture = draw_table(table) if page.drawn else None
        if picture is not None:
            picture.save(aside / f"{name}.png")
    print(f"{name}: .json and .md are in {benchmark.output}" + ("" if picture is None else ", and the picture"))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that runs under way are ended too
    main()
