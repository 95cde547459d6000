"""Compare methods on a named protocol: learning rates, runs over seeds, cost, one table.

    python recipes/benchmark.py                                        # synthetic-3, all methods, three seeds
    python recipes/benchmark.py --workers 2 --num_threads 1            # two runs at a time, a thread each
    python recipes/benchmark.py --protocol camvid-2 --data_root camvid --workers 2
    python recipes/benchmark.py --stages cost table                    # later, on an idle machine
    python recipes/benchmark.py --ablation all                         # variants of talora instead of methods

Every run is `recipes/train.py` in a process of its own. A finished one leaves a small record under
`<output_dir>/runs`, and the tables are made of these: the same command goes on where it was stopped. The learning rate
of a method is chosen by validation loss on synthetic-3, with a seed that no table has, and kept for all protocols.
"""

import json
import math
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_talora import engine
from peft_talora.benchmark.jobs import Job, run_jobs
from peft_talora.benchmark.protocols import PROTOCOLS, SYNTHETIC_3, Protocol, link_first_images
from peft_talora.benchmark.records import (
    Record,
    check_record,
    describe_commit,
    describe_hardware,
    describe_weights,
    read_comparable,
    read_record,
    write_record,
)
from peft_talora.benchmark.table import draw_table, make_table, to_markdown
from peft_talora.files import write_aside, write_json
from peft_talora.small_sam import SMALL_SAM

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("full-stl", "full-hps", "lora-stl", "lora-hps", "mtlora", "talora", "heads")
BASELINES = {"delta_m": "full-stl", "delta_m_vs_lora_stl": "lora-stl"}
STAGES = ("learning_rates", "runs", "cost", "table")
DIVERGED = "FloatingPointError"  # what train.py raises where the validation loss is no finite number
TUNING_SEED = 100  # of the learning rates' choice; no table has a run with it


def ablations(num_tasks: int) -> dict[str, dict[str, Any]]:
    """What is changed of talora's defaults, by the name of the variant; parts of `qkv` compare with `targets-qkv`."""
    qkv = r".*vision_encoder\.layers\.\d+\.attn\.qkv"
    parts = (["q"], ["k"], ["v"], ["q", "k"], ["q", "v"], ["k", "v"])
    return {
        **{f"r_task-{k}": {"r_task": k} for k in range(1, num_tasks + 2) if k != min(num_tasks, 4)},
        **{f"r-{r}": {"r": r} for r in (4, 8, 32)},
        "decoder-token": {"decoder_mode": "token"},
        "norms-frozen": {"train_norms": False},
        "start-gaussian": {"init_weights": "gaussian"},
        **{f"orthogonality-{weight:g}": {"orthogonality": weight} for weight in (0.1, 1.0)},
        "targets-qkv": {"target_modules": qkv},
        **{f"targets-{'+'.join(p)}": {"target_modules": qkv, "qkv_parts": p} for p in parts},
    }


@dataclass
class BenchmarkArguments:
    """What to compare, and where results go."""

    protocol: str = field(default="synthetic-3", metadata={"help": f"One of {', '.join(PROTOCOLS)}."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods to compare."})
    ablation: list[str] = field(
        default_factory=list, metadata={"help": "Variants of talora to compare instead, or 'all'."}
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
    output_dir: str = field(default="docs/results", metadata={"help": "Folder of records and tables."})
    work_dir: str = field(default="runs/benchmark", metadata={"help": "Folder of runs under way."})


@dataclass
class Benchmark:
    """What is compared: by name, what a run of it asks of train.py beside the protocol."""

    args: BenchmarkArguments
    protocol: Protocol
    variants: dict[str, dict[str, Any]]  # with `learning_rate`, once it is chosen
    seeds: range

    @property
    def output(self) -> Path:
        """Folder of tables, and of records under `runs`."""
        return Path(self.args.output_dir)

    @property
    def threads(self) -> int:
        """CPU threads of each run."""
        return self.args.num_threads or max(1, (os.cpu_count() or 1) // self.args.workers)

    @property
    def records(self) -> Path:
        """Folder of the protocol's records, and of its ablations' under `ablations`."""
        return self.output / "runs" / self.protocol.name

    @property
    def cost_file(self) -> Path:
        """Time and memory."""
        return (self.records / "ablations" if self.args.ablation else self.records) / "cost.json"

    def record_file(self, name: str, seed: int) -> Path:
        """Talora itself, which ablations are compared with, is the same run in both tables."""
        folder = self.records / "ablations" if self.args.ablation and name != "talora" else self.records
        return folder / f"{name}-seed{seed}.json"

    def settings(self, protocol: Protocol) -> dict[str, Any]:
        """What all runs on a protocol share; what the command changes of it goes for its own protocol alone."""
        shared = protocol.train_arguments()
        if protocol is self.protocol:
            names = ("num_images", "num_train_epochs", "per_device_train_batch_size", "image_size")
            shared |= {name: getattr(self.args, name) for name in names if getattr(self.args, name) is not None}
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        weights = describe_weights(self.args.base or SMALL_SAM)
        return {**shared, "base": self.args.base, "base_weights": weights, "mixed_precision": precision}

    def job(self, folder: str, protocol: Protocol, arguments: dict, others: Mapping | None = None, **fields) -> Job:
        """A run of train.py; `others` are arguments that decide nothing."""
        common = {"num_threads": self.threads, "measure_before": False, "save_total_limit": 1}
        if protocol is self.protocol:
            common["data_root"] = self.args.data_root
        return Job(
            name=f"{protocol.name}/{folder}",
            script=ROOT / "recipes" / "train.py",
            # The precision comes with the environment, the weights with the base.
            arguments={k: v for k, v in arguments.items() if k not in ("mixed_precision", "base_weights")},
            others={**common, **(others or {})},
            folder=Path(self.args.work_dir) / protocol.name / folder,
            **fields,
        )


@dataclass(frozen=True)
class Wanted:
    """A run that is wanted: its record's file, and the job that makes it."""

    name: str
    file: Path
    choices: dict[str, Any]
    job: Job


def main() -> None:
    """All stages."""
    args = engine.parse_arguments(BenchmarkArguments)
    benchmark = build(args)
    if args.stages != ["table"]:
        rates = choose_learning_rates(benchmark)
        for choices in benchmark.variants.values():
            choices["learning_rate"] = rates[choices["method"]]
    if "runs" in args.stages:
        run_seeds(benchmark)
    if "cost" in args.stages:
        measure_cost(benchmark)
    if "table" in args.stages:
        write_tables(benchmark)


def build(args: BenchmarkArguments) -> Benchmark:
    """What is compared. Refuses what would fail late."""
    if args.protocol not in PROTOCOLS:
        raise ValueError(f"`protocol` is {args.protocol!r}; allowed: {', '.join(PROTOCOLS)}.")
    protocol = PROTOCOLS[args.protocol]
    if args.stages != ["table"]:
        protocol.check_data_root(args.data_root)
    known = ablations(len(protocol.tasks))
    allowed = {"stages": STAGES, "methods": METHODS, "ablation": (*known, "all")}
    for name, words in allowed.items():
        if unknown := [word for word in getattr(args, name) if word not in words]:
            raise ValueError(f"`{name}` has {', '.join(unknown)}; allowed: {', '.join(words)}.")
    for name in ("workers", "seeds", "cost_steps", "cost_rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}; allowed: 1 or more.")
    variants = {name: {"method": name} for name in METHODS if name in args.methods}
    if args.ablation:
        chosen = known if "all" in args.ablation else args.ablation
        variants = {"talora": {}, **{name: known[name] for name in chosen}}
        variants = {name: {"method": "talora", **changes} for name, changes in variants.items()}
    benchmark = Benchmark(args, protocol, variants, range(args.seeds or (1 if args.ablation else 3)))
    if args.data_root is not None:
        check_images(benchmark)
    return benchmark


def check_images(benchmark: Benchmark) -> None:
    """Refuse a folder whose images are not the protocol's."""
    protocol = benchmark.protocol
    args = engine.DataArguments(
        data_root=benchmark.args.data_root, ignored_class=protocol.ignored_class, derive_edges=protocol.derive_edges
    )
    for split, folder in protocol.folders.items():
        protocol.check_split(split, engine.open_split(args, folder, protocol.tasks, 0))


def choose_learning_rates(benchmark: Benchmark) -> dict[str, float]:
    """Method → learning rate: that of the lowest validation loss, summed over the tasks, on synthetic-3."""
    args, file = benchmark.args, benchmark.output / "learning-rates.json"
    methods = {choices["method"] for choices in benchmark.variants.values()}
    if len(args.learning_rates) == 1:
        return dict.fromkeys(methods, args.learning_rates[0])
    chosen, settings = {"methods": {}}, benchmark.settings(SYNTHETIC_3)
    if file.exists():
        chosen = json.loads(file.read_text())
        # For another protocol, what was chosen on synthetic-3 is taken as it is, but only for the same base.
        names = settings if benchmark.protocol is SYNTHETIC_3 else ["base", "base_weights"]
        if differing := [name for name in names if chosen["settings"].get(name) != settings[name]]:
            raise ValueError(f"{file} is of runs with other {', '.join(differing)}: delete it, or give the same.")
    wanted = methods if benchmark.protocol is SYNTHETIC_3 else methods - chosen["methods"].keys()
    if "learning_rates" in args.stages and wanted:
        chosen = tune(benchmark, sorted(wanted), chosen["methods"])
        with write_aside(file.parent) as aside:
            write_json(aside / file.name, chosen)
    if missing := sorted(methods - chosen["methods"].keys()):
        raise ValueError(f"{file} has no learning rate of {', '.join(missing)}: run the stage `learning_rates` first.")
    return {method: chosen["methods"][method]["learning_rate"] for method in methods}


def tune(benchmark: Benchmark, methods: list[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Train each method with each learning rate; what is written as learning-rates.json, with the `known` methods."""
    settings, wanted = benchmark.settings(SYNTHETIC_3), {}
    # Rates of earlier searches count too, so that one method's can be widened alone.
    tried = {method: known.get(method, {}).get("validation_loss", {}) for method in methods}
    grids = {method: sorted({*benchmark.args.learning_rates, *map(float, tried[method])}) for method in methods}
    for method, rate in ((name, rate) for name, rates in grids.items() for rate in rates):
        choices = {"method": method, "seed": TUNING_SEED, "learning_rate": rate}
        name = f"{method}-{rate:g}-seed{TUNING_SEED}"
        job = benchmark.job(f"learning-rates/{name}", SYNTHETIC_3, {**settings, **choices}, accepted_error=DIVERGED)
        file = benchmark.output / "runs" / "learning-rates" / f"{name}.json"
        wanted[method, rate] = Wanted(method, file, choices, job)
    run_missing(benchmark, SYNTHETIC_3, settings, list(wanted.values()))
    table = dict(known)
    for method, rates in grids.items():
        losses = {rate: read_record(wanted[method, rate].file).validation_loss for rate in rates}
        best = min(losses, key=losses.get)
        if math.isinf(losses[best]):
            raise RuntimeError(f"{method} diverged with every learning rate of {rates}: give lower ones.")
        at_border = best in (rates[0], rates[-1])
        table[method] = {"learning_rate": best, "at_border": at_border, "validation_loss": losses}
        print(f"{method}: learning rate {best:g}, validation losses {losses}")
        if at_border:
            print(f"WARNING: {best:g} is at the border of the learning rates tried for {method}: give more of them.")
    return {"protocol": SYNTHETIC_3.name, "seed": TUNING_SEED, "settings": settings, "methods": table}


def run_seeds(benchmark: Benchmark) -> None:
    """Train every variant with every seed."""
    settings, wanted = benchmark.settings(benchmark.protocol), []
    for seed, name in ((seed, name) for seed in benchmark.seeds for name in benchmark.variants):
        choices = {**benchmark.variants[name], "seed": seed}
        job = benchmark.job(f"{name}-seed{seed}", benchmark.protocol, {**settings, **choices})
        wanted.append(Wanted(name, benchmark.record_file(name, seed), choices, job))
    run_missing(benchmark, benchmark.protocol, settings, wanted)


def run_missing(benchmark: Benchmark, protocol: Protocol, settings: dict, wanted: list[Wanted]) -> None:
    """Run what has no record yet; write a record as soon as a run has ended."""
    for run in wanted:
        if run.file.exists():
            check_record(run.file, settings, run.choices)
    runs = {run.job.folder: run for run in wanted if not run.file.exists()}
    print(f"{protocol.name}: {len(wanted) - len(runs)} of {len(wanted)} runs are done")
    commits = {}  # as each run starts: what is committed while it runs is no part of it

    def note_commit(job: Job) -> None:
        commits[job.folder] = describe_commit(ROOT)

    jobs = [run.job for run in runs.values()]
    for count, job in enumerate(run_jobs(jobs, benchmark.args.workers, note_commit), 1):
        run = runs[job.folder]
        diverged = job.failed_acceptably()
        results = {"after": {}, "parameters": {}} if diverged else job.results()
        record = Record(
            protocol=protocol.name,
            name=run.name,
            settings=settings,
            choices=run.choices,
            metrics=results["after"],
            validation=None if diverged else results["validation"],
            parameters=results["parameters"],
            commit=commits[job.folder],
            hardware=describe_hardware(benchmark.threads),
            versions=results.get("versions", {}),
        )
        write_record(run.file, record)
        job.discard()
        print(f"{job.name}: {'diverged' if diverged else 'done'}, {len(runs) - count} to go", flush=True)


def measure_cost(benchmark: Benchmark) -> None:
    """Step time and peak memory of all variants in one go: a short run at a time, all of them in every round.

    Figures of an earlier go that lack a variant are replaced, not added to: the machine may have been slower then.
    """
    args, protocol, variants, file = benchmark.args, benchmark.protocol, benchmark.variants, benchmark.cost_file
    settings = benchmark.settings(protocol)
    found = json.loads(file.read_text()) if file.exists() else {"methods": {}}
    if found.get("settings") == settings and variants.keys() <= found["methods"].keys():
        return
    images = args.cost_steps * settings["per_device_train_batch_size"]
    short = {**settings, "num_train_epochs": 1}
    others = {"per_device_eval_batch_size": 1}
    if protocol.generated:
        short["num_images"] = images
    else:
        others["data_root"] = link_first_images(args.data_root, Path(args.work_dir) / "first-images", protocol, images)
    # What an interrupted go left would be resumed at its end, and its figures taken for this go's.
    shutil.rmtree(Path(args.work_dir) / protocol.name / "cost", ignore_errors=True)
    measured: dict[str, list[dict]] = {name: [] for name in variants}
    for turn in range(args.cost_rounds):
        for name, choices in variants.items():
            job = benchmark.job(f"cost/{name}-{turn}", protocol, {**short, **choices, "seed": 0}, others)
            for ended in run_jobs([job], 1):
                measured[name].append({key: ended.results()[key] for key in ("step_seconds", "peak_mib")})
                ended.discard()
            print(f"{job.name}: {measured[name][-1]}", flush=True)
    costs = {
        "settings": settings,
        "steps": args.cost_steps,
        "rounds": args.cost_rounds,
        "commit": describe_commit(ROOT),
        "hardware": describe_hardware(benchmark.threads),
        "methods": {
            name: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
            for name, turns in measured.items()
        },
    }
    with write_aside(file.parent) as aside:
        write_json(aside / file.name, costs)


def rate_notes(benchmark: Benchmark, records: list[Record]) -> list[str]:
    """What a reader must know of the records' learning rates."""
    file, notes = benchmark.output / "learning-rates.json", []
    if benchmark.args.ablation:
        notes.append("All variants have the learning rate that was chosen for talora itself.")
    if not file.exists():
        return notes
    used = {record.choices["method"]: record.choices["learning_rate"] for record in records}
    chosen = json.loads(file.read_text())["methods"]
    chosen = {m: found for m, found in chosen.items() if used.get(m) == found["learning_rate"]}
    if chosen:
        notes.append(
            f"Learning rates are those of the lowest validation loss on {SYNTHETIC_3.name}, one for all tasks of a "
            "method."
        )
    for method, found in chosen.items():
        if found["at_border"]:
            tried = ", ".join(f"{float(rate):g}" for rate in found["validation_loss"])
            notes.append(f"The learning rate of {method}, {used[method]:g}, is at the border of those tried: {tried}.")
    return notes


def write_tables(benchmark: Benchmark) -> None:
    """JSON, Markdown and picture of all records there are of the protocol."""
    protocol, ablation = benchmark.protocol, bool(benchmark.args.ablation)
    order = ["talora", *ablations(len(protocol.tasks))] if ablation else METHODS
    files = sorted(benchmark.records.glob("talora-seed*.json" if ablation else "*-seed*.json"))
    files += sorted((benchmark.records / "ablations").glob("*-seed*.json")) if ablation else []
    records = read_comparable(files)
    if unknown := sorted({record.name for record in records} - set(order)):
        raise ValueError(f"{benchmark.records} has records of {', '.join(unknown)}; allowed: {', '.join(order)}.")
    records = sorted(records, key=lambda record: (order.index(record.name), record.seed))
    costs = json.loads(benchmark.cost_file.read_text()) if benchmark.cost_file.exists() else None
    if not records:
        raise ValueError(f"{benchmark.records} has no records: run the stage `runs` first.")
    if costs is not None and costs["settings"] != records[0].settings:
        raise ValueError(f"{benchmark.cost_file} is of other settings than the records: run the stage `cost` again.")
    table = make_table(protocol, records, {"delta_m_vs_talora": "talora"} if ablation else BASELINES, costs)
    table["notes"] += rate_notes(benchmark, records)
    name = f"ablations-{protocol.name}" if ablation else protocol.name
    title = f"{protocol.name}, talora and variants of it" if ablation else protocol.name
    with write_aside(benchmark.output) as aside:
        write_json(aside / f"{name}.json", table)
        (aside / f"{name}.md").write_text(to_markdown(table, protocol, title))
        picture = draw_table(table)
        if picture is not None:
            picture.save(aside / f"{name}.png")
    print(f"{name}: .json and .md are in {benchmark.output}" + ("" if picture is None else ", and the picture"))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that runs under way are ended too
    main()
