"""Measure what MoDA's router reads: how well it tells domains apart, what it costs, and many domains on disk.

    python recipes/benchmark_routing.py                                    # the generated domains
    python recipes/benchmark_routing.py --more_domains real.yaml           # with domains in folders beside them
    python recipes/benchmark_routing.py --stages passes --num_threads 2    # ViT-B at 1024 pixels, an idle machine

- `queries`: accuracy of every query with every selector on images of known domains, by a few exemplars of each, drawn
  several times; how many of them, and of natural images, go to the plain model.
- `passes`: encoder passes, time and memory of one image by MoDA, as ratios to the plain SAM, all in turns in one
  process; memory is the peak over one call, in a process of its own.
- `many`: time and memory of a routed image by the number of domains on disk.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import SamConfig, SamModel

from peft_talora import SMALL_SAM, MoDAModel, engine, load_moda, save_moda
from peft_talora.benchmark.timing import (
    keep_memory,
    last_line_of,
    median,
    peak_on_accelerator,
    percentiles,
    resident,
    resident_peak,
    seconds_of,
    time_in_turns,
)
from peft_talora.continual.batches import collate_domain
from peft_talora.continual.kinds import BLOCK_LINEARS, domain_config
from peft_talora.continual.queries import make_query
from peft_talora.continual.router import BASE, Router
from peft_talora.continual.selectors import make_selector
from peft_talora.continual.stream import folder_stream, generated_stream
from peft_talora.files import write_aside, write_json

STAGES = ("queries", "passes", "many")
COLOURS = "colour histogram"
BINS = 8  # of each channel
UPPER = r".*vision_encoder\.layers\.({})\.(attn\.(qkv|proj)|mlp\.lin[12])"


@dataclass
class RoutingArguments:
    """What to measure, and how long."""

    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": f"Of {', '.join(STAGES)}."})
    output: str = field(default="runs/routing.json", metadata={"help": "Figures; a table goes beside it, as .md."})
    num_threads: int = field(default=1, metadata={"help": "CPU threads."})
    base: str = field(default=SMALL_SAM, metadata={"help": "queries, many: SAM checkpoint."})

    queries: list[str] = field(
        default_factory=lambda: [
            *("gft_readonly", "gft_global", "mean_block(2)", "mean_block(3)", "mean_block(5)", "mean_neck"),
            *("std_block(3)", "std_block(5)"),
        ],
        metadata={"help": "queries: what is compared."},
    )
    selectors: list[str] = field(
        default_factory=lambda: ["ridge", "lda", "ncm", "linear_ce"], metadata={"help": "queries: what is compared."}
    )
    more_domains: str | None = field(
        default=None, metadata={"help": "queries: YAML file of a stream of folders, to be told apart as well."}
    )
    num_images: int = field(default=50, metadata={"help": "queries: of a domain; exemplars are drawn of four fifths."})
    num_test_images: int = field(default=40, metadata={"help": "queries: of a domain."})
    exemplars: int = field(default=10, metadata={"help": "queries, many: of a domain."})
    draws: int = field(default=5, metadata={"help": "queries: of exemplars and of tokens."})
    quantile: float = field(default=0.02, metadata={"help": "queries: of known images to the plain model."})

    image_size: int = field(default=1024, metadata={"help": "passes: pixels."})
    num_layers: int = field(default=12, metadata={"help": "passes: blocks of the ViT-B."})
    rounds: int = field(default=3, metadata={"help": "passes: turns that are measured."})
    peak_of: str | None = field(default=None, metadata={"help": "passes: print one variant's peak, and stop."})

    domains: list[int] = field(default_factory=lambda: [5, 10, 20, 30], metadata={"help": "many: numbers of domains."})
    route_in: str | None = field(default=None, metadata={"help": "many: measure one folder, and stop."})
    resident: int | None = field(default=2, metadata={"help": "many: adapters in memory at most."})


def main() -> None:
    """Measure what was asked for; figures measured before stay in the file."""
    args = engine.parse_arguments(RoutingArguments)
    check(args)
    torch.set_num_threads(args.num_threads)
    if args.peak_of:
        print(resident_peak(Passes(args).build(args.peak_of)))
        return
    if args.route_in:
        print(json.dumps(route_in_turns(args)))
        return
    if "passes" in args.stages:
        keep_memory()
    output = Path(args.output)
    figures = json.loads(output.read_text()) if output.exists() else {}
    for stage in args.stages:
        measured = {"queries": compare_queries, "passes": compare_passes, "many": compare_numbers}[stage](args)
        name = "queries-more" if stage == "queries" and args.more_domains else stage
        figures[name] = measured
        with write_aside(output.parent) as aside:
            write_json(aside / output.name, figures)
            (aside / output.name).with_suffix(".md").write_text(to_markdown(figures))
    print(to_markdown(figures))


def check(args: RoutingArguments) -> None:
    """Refuse what would fail late."""
    if unknown := [stage for stage in args.stages if stage not in STAGES]:
        raise ValueError(f"`stages` has {', '.join(unknown)}; allowed: {', '.join(STAGES)}.")
    for name in ("num_threads", "num_images", "num_test_images", "exemplars", "draws", "rounds", "num_layers"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}; allowed: 1 or more.")
    if args.exemplars < 2 or not args.domains or min(args.domains) < 1:
        raise ValueError(
            f"`exemplars` is {args.exemplars} and `domains` {args.domains}; allowed: 2 or more exemplars, and one or "
            "more numbers above 0."
        )


# --- queries ---


@dataclass
class Pool:
    """Images (N, 3, H, W) in [0, 1] of a domain, as a collator resizes them, and normalised for the encoder."""

    raw: Tensor
    pixel_values: Tensor


def pool_of(dataset, size: int) -> Pool:
    """All images of a data set."""
    samples = [dataset[index] for index in range(len(dataset))]
    whole = [torch.nn.functional.interpolate(s["image"][None], (size, size), mode="bilinear") for s in samples]
    return Pool(torch.cat(whole), collate_domain(samples, size)["pixel_values"])


def compare_queries(args: RoutingArguments) -> dict:
    """Accuracy, false alarms and natural images found, in percent, over draws of exemplars; by query and selector."""
    encoder = SamModel.from_pretrained(args.base).eval().vision_encoder
    size = encoder.config.image_size
    stream = generated_stream(args.num_images, args.num_test_images, args.num_test_images, size)
    domains = list(stream.domains)
    if args.more_domains:
        domains += folder_stream(args.more_domains).domains
    names = [domain.name for domain in domains]
    train, test = [[pool_of(getattr(d, part), size) for d in domains] for part in ("train", "test")]
    natural = pool_of(stream.natural, size)
    rows = {}
    for kind in (*args.queries, COLOURS):
        selectors = ["ncm", "ridge"] if kind == COLOURS else args.selectors
        found: dict[str, list] = {selector: [] for selector in selectors}
        for draw in range(args.draws):
            if draw == 0 or kind.startswith("gft"):  # what has no tokens reads the same each time
                describe = histogram_of if kind == COLOURS else described_by(encoder, kind, draw)
                pools = [[describe(pool) for pool in group] for group in (train, test, [natural])]
            for selector in selectors:
                found[selector].append(route_all(args, names, selector, draw, *pools))
            print(f"{kind}: draw {draw + 1} of {args.draws}", flush=True)
        rows[kind] = {selector: summary(draws) for selector, draws in found.items()}
    shared = ("num_images", "num_test_images", "exemplars", "draws", "quantile")
    settings = {"base": Path(args.base).name, **{name: getattr(args, name) for name in shared}}
    return {"domains": names, "settings": settings, "rows": rows}


def described_by(encoder: torch.nn.Module, kind: str, seed: int) -> Callable[[Pool], Tensor]:
    """Features (N, D) of images by a query."""
    query = make_query(kind, encoder.config, seed)

    @torch.no_grad()
    def describe(pool: Pool) -> Tensor:
        return torch.cat([query(encoder, part) for part in pool.pixel_values.split(8)])

    return describe


def histogram_of(pool: Pool) -> Tensor:
    """How many of an image's pixels have each of 8³ colours, as shares (N, 512): no structure, colour alone."""
    places = (pool.raw.flatten(2) * BINS).long().clamp(0, BINS - 1)
    index = (places[:, 0] * BINS + places[:, 1]) * BINS + places[:, 2]
    return torch.stack([torch.bincount(row, minlength=BINS**3) / row.numel() for row in index])


def route_all(args: RoutingArguments, names: list[str], selector: str, draw: int, train, test, natural) -> dict:
    """Shares of one draw of exemplars."""
    drawn = torch.Generator().manual_seed(draw)
    chosen = [features[torch.randperm(len(features), generator=drawn)[: args.exemplars]] for features in train]
    features_ND = torch.cat(chosen)
    labels_N = torch.cat([torch.full((len(features),), k) for k, features in enumerate(chosen)])
    torch.manual_seed(draw)
    router = Router(make_selector(selector, features_ND.shape[1]))
    router.fit(features_ND, labels_N, names)
    routed = [router.route(features).names for features in test]
    right = sum(went == name for name, ways in zip(names, routed, strict=True) for went in ways)
    total = sum(map(len, routed))
    router.calibrate(args.quantile, features_ND, labels_N)
    alarms = sum(went == BASE for features in test for went in router.route(features).names)
    strange = router.route(natural[0]).names
    return {
        "accuracy": 100 * right / total,
        "false_alarms": 100 * alarms / total,
        "natural_to_base": 100 * strange.count(BASE) / len(strange),
    }


def summary(draws: list[dict]) -> dict:
    """Mean, least and largest of each figure."""
    found = {name: [draw[name] for draw in draws] for name in draws[0]}
    return {name: {"mean": sum(v) / len(v), "range": [min(v), max(v)]} for name, v in found.items()}


# --- passes ---

VARIANTS = {
    "plain": (None, None),
    "the last block, decoder": ("std_block({last})", "decoder"),
    "gft_readonly, decoder": ("gft_readonly", "decoder"),
    "gft_global, decoder": ("gft_global", "decoder"),
    "a block in the middle, LoRA above it": ("mean_block({middle})", "upper"),
    "a block in the middle, LoRA": ("mean_block({middle})", "lora"),
    "the last block, LoRA": ("std_block({last})", "lora"),
    "gft_readonly, LoRA": ("gft_readonly", "lora"),
    "gft_global, LoRA": ("gft_global", "lora"),
}
"""By name, the query and what a domain adapts. `gft_global` and an adapted pass after it is what was released."""


@dataclass
class Passes:
    """One image by a ViT-B of random weights, in the variants of `VARIANTS`."""

    args: RoutingArguments

    def __post_init__(self):
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    def build(self, name: str) -> Callable[[], int | float]:
        """A call that segments one image by a box and returns the encoder passes that MoDA counts, or 1."""
        query, adapted = VARIANTS[name]
        layers, size = self.args.num_layers, self.args.image_size
        config = SamConfig(
            vision_config={
                "num_hidden_layers": layers,
                "global_attn_indexes": list(range(2, layers, 3)),
                "image_size": size,
            },
            prompt_encoder_config={"image_size": size, "image_embedding_size": size // 16},
        )
        torch.manual_seed(0)
        base = SamModel(config).eval().to(self.device)
        images = torch.randn(1, 3, size, size).to(self.device)
        asked = {"input_boxes": torch.tensor([[[0.2, 0.2, 0.7, 0.8]]]).to(self.device) * size}
        if query is None:
            return torch.no_grad()(lambda: (base(images, **asked), 1)[1])
        kind = query.format(middle=layers // 2, last=layers - 1)
        model = MoDAModel(base, make_query(kind, base.config.vision_config))
        upper = UPPER.format("|".join(map(str, range(layers // 2 + 1, layers))))
        configs = {
            "decoder": lambda: domain_config("decoder", base),
            "lora": lambda: LoraConfig(r=16, target_modules=BLOCK_LINEARS),
            "upper": lambda: LoraConfig(r=16, target_modules=upper),
        }
        model.add_domain("known", configs[adapted]())
        model.end_learning()
        model.features["known"] = torch.randn(10, model.query.width)
        model.fit_selector()

        @torch.no_grad()
        def run() -> float:
            output = model(images, **asked)
            assert output.domains == ["known"]
            return output.encoder_passes.item()

        return run


def compare_passes(args: RoutingArguments) -> dict:
    """Encoder passes, time and peak memory by variant; time and memory as ratios to plain SAM."""
    passes = Passes(args)
    runs = {name: passes.build(name) for name in VARIANTS}
    runs["plain again"] = runs["plain"]
    counted = {name: run() for name, run in runs.items()}
    taken = time_in_turns(runs, args.rounds, passes.device, uncounted=0)
    rows = {}
    for name, seconds in taken.items():
        ratios = seconds / taken["plain"]
        rows[name] = {"passes": counted[name], "seconds": median(seconds)}
        rows[name] |= {"time": median(ratios), "time_range": percentiles(ratios)}
    peaks = {name: _peak(passes, name, run) for name, run in runs.items() if name in VARIANTS}
    for name, peak in peaks.items():
        rows[name] |= {"peak_mib": round(peak, 1), "memory": round(peak / peaks["plain"], 3)}
        rows[name]["global_query"] = VARIANTS[name][0] == "gft_global"
    shared = ("image_size", "num_layers", "rounds", "num_threads")
    return {"device": str(passes.device), "settings": {name: getattr(args, name) for name in shared}, "rows": rows}


def _peak(passes: Passes, name: str, run: Callable) -> float:
    if passes.device.type != "cpu":
        return peak_on_accelerator(run)
    shape = {key: getattr(passes.args, key) for key in ("image_size", "num_layers", "num_threads")}
    flags = [word for key, value in shape.items() for word in (f"--{key}", str(value))]
    return float(last_line_of(__file__, ["--peak_of", name, *flags]))


# --- many domains ---


def grating(number: int, count: int, size: int, first: int = 0) -> Tensor:
    """Images (count, 3, size, size) of a domain that is told by the direction and width of its stripes."""
    drawn = torch.Generator().manual_seed(1000 * number + first)
    places = torch.linspace(0, 1, size)
    angle, waves = torch.tensor(torch.pi * (number % 6) / 6), 4.0 * 1.5 ** (number // 6)
    along = places[:, None] * angle.sin() + places * angle.cos()
    phases = torch.rand(count, 3, 1, 1, generator=drawn) * 2 * torch.pi
    stripes = torch.sin(2 * torch.pi * waves * along + phases)
    return stripes + 0.5 * torch.randn(count, 3, size, size, generator=drawn)


def compare_numbers(args: RoutingArguments) -> dict:
    """Time and memory of a routed image by how many domains there are on disk, each number in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = SamModel.from_pretrained(args.base)
        size = base.config.vision_config.image_size
        # By a mean a stripe's direction is told best; what the domains are does not matter here.
        vision = base.config.vision_config
        query = make_query(f"mean_block({vision.num_hidden_layers // 2})", vision)
        model, stored = MoDAModel(base, query, exemplars=args.exemplars), []
        torch.manual_seed(0)
        for number in range(max(args.domains)):
            config = domain_config("lora", base)
            config.init_lora_weights = False  # an update, as training leaves one
            own = sum(p.numel() for p in model.add_domain(f"d{number}", config).values())
            model.add_exemplars(f"d{number}", grating(number, args.exemplars, size))
            model.end_learning()
            if number + 1 not in args.domains:
                continue
            model.fit_selector()
            target = Path(folder) / str(number + 1)
            save_moda(model, target)
            stored = [sum(f.stat().st_size for f in model.folder_of(n).glob("*")) for n in model.domains]
            for bound in (args.resident, None):
                flags = {"route_in": target, "base": args.base, "num_threads": args.num_threads}
                flags |= {"resident": bound} if bound else {"resident": len(model.domains)}
                words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
                found = json.loads(last_line_of(__file__, words))
                rows.append({"domains": number + 1, "resident": bound, **found})
                print(rows[-1], flush=True)
    return {
        "bytes_of_a_domain": [min(stored), max(stored)],
        "parameters_of_a_domain": own,
        "settings": {"exemplars": args.exemplars, "num_threads": args.num_threads, "base": Path(args.base).name},
        "rows": rows,
    }


def route_in_turns(args: RoutingArguments) -> dict:
    """Images of all domains in turn, each a call of its own, by the model in a folder; one round does not count."""
    base = SamModel.from_pretrained(args.base)
    size = base.config.vision_config.image_size
    before = resident()
    model = load_moda(args.route_in, base, resident=args.resident)
    loaded = resident() - before
    asked = {"input_boxes": torch.tensor([[[0.2, 0.2, 0.7, 0.8]]]) * size}
    seconds, right = [], 0
    for turn in range(3):
        for number, name in enumerate(model.domains):
            image = grating(number, 1, size, first=1 + turn)
            went: list[str] = []

            @torch.no_grad()
            def run(image=image, went=went):
                went += model(image, **asked).domains

            taken = seconds_of(run, torch.device("cpu"))
            if turn:
                seconds.append(taken)
                right += went == [name]
    return {
        "milliseconds": round(1000 * float(torch.tensor(seconds).median()), 2),
        "milliseconds_range": [round(1000 * value, 2) for value in percentiles(torch.tensor(seconds).numpy())],
        "mib_after_loading": round(loaded, 1),
        "mib_after_routing": round(resident() - before, 1),
        "in_memory": len(model.adapters.resident()),
        "accuracy": round(100 * right / len(seconds), 1),
    }


# --- table ---


def to_markdown(figures: dict) -> str:
    """All that was measured."""
    parts = ["# What the router reads"]
    parts += [_queries_table(figures[name]) for name in ("queries", "queries-more") if name in figures]
    if "passes" in figures:
        parts.append(_passes_table(figures["passes"]))
    if "many" in figures:
        parts.append(_many_table(figures["many"]))
    return "\n\n".join(parts) + "\n"


def _queries_table(found: dict) -> str:
    settings = found["settings"]
    lines = [
        f"## {len(found['domains'])} domains: {', '.join(found['domains'])}",
        "",
        f"{settings['exemplars']} exemplars of each; means over {settings['draws']} draws of exemplars and of tokens, "
        "with the least and the largest. Natural images are of no domain; these, and false alarms, went to the plain "
        f"model by the threshold for {100 * settings['quantile']:g} % of known images. In percent.",
        "",
        "| query | selector | accuracy | false alarms | natural to plain |",
        "|---|---|---:|---:|---:|",
    ]
    for query, selectors in found["rows"].items():
        for selector, row in selectors.items():
            cells = [
                f"{row[name]['mean']:.1f} [{row[name]['range'][0]:.1f}, {row[name]['range'][1]:.1f}]"
                for name in ("accuracy", "false_alarms", "natural_to_base")
            ]
            lines.append(f"| {query} | {selector} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _passes_table(found: dict) -> str:
    settings = found["settings"]
    lines = [
        f"## One image of {settings['image_size']} pixels, ViT-B of random weights ({settings['num_layers']} blocks)",
        "",
        f"{found['device']}, threads: {settings['num_threads']}; {settings['rounds']} turns; time as the median of "
        "ratios within a turn, with the 10th and 90th percentile; memory: peak over one call.",
        "",
        "| query, what a domain adapts | passes | time | peak memory |",
        "|---|---:|---:|---:|",
    ]
    for name, row in found["rows"].items():
        passes = f"{row['passes']:.2f}" + (", one of them all global" if row.get("global_query") else "")
        memory = f"{row['memory']:.2f} ({row['peak_mib']:.0f} MiB)" if "memory" in row else ""
        spread = f"{row['time_range'][0]:.2f}-{row['time_range'][1]:.2f}"
        lines.append(f"| {name} | {passes} | {row['time']:.2f} ({spread}; {row['seconds']:.1f} s) | {memory} |")
    return "\n".join(lines)


def _many_table(found: dict) -> str:
    least, most = found["bytes_of_a_domain"]
    lines = [
        "## Many domains on disk",
        "",
        f"LoRA adapters of {found['parameters_of_a_domain']:,} parameters, {least:,} to {most:,} bytes each; every "
        "image is of another domain than the one before it, the worst case. Memory above that of the plain model.",
        "",
        "| domains | in memory at most | ms an image | MiB after loading | MiB after routing | accuracy (%) |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        spread = "-".join(f"{value:.1f}" for value in row["milliseconds_range"])
        lines.append(
            f"| {row['domains']} | {row['resident'] or 'all'} | {row['milliseconds']:.1f} ({spread}) | "
            f"{row['mib_after_loading']} | {row['mib_after_routing']} | {row['accuracy']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
