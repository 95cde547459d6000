"""Measure what TA-LoRA costs, beside a frozen encoder, PEFT's LoRA and a dense update, doing equal work.

    python recipes/benchmark_speed.py                                              # a CPU, about twelve minutes
    python recipes/benchmark_speed.py --dtype bfloat16 --image_size 1024 --layer_image_size 1024 --num_layers 12 \
        --output docs/results/speed-gpu.json --only P1 P2 P3 P4 P7 P9 sweep        # an accelerator, if there is one

Compared variants give equal outputs and input gradients first. Then they run in turns, in one process; every figure
is the median over the turns of a ratio taken within a turn, with the tenth and ninetieth percentile as its range.
Memory is the peak over one call above what was there before, in a process of its own on a CPU. There, time is the
process's, and the allocator keeps what it has: pages that are mapped anew cost more than any adapter.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.sam.modeling_sam import SamVisionEncoder

from peft_talora import TALoRAConfig
from peft_talora.benchmark.timing import (
    keep_memory,
    last_line_of,
    median,
    peak_on_accelerator,
    percentiles,
    resident_peak,
    seconds_of,
    time_in_turns,
)
from peft_talora.files import write_aside, write_json
from peft_talora.tuner import TALoRALayer

NUM_TASKS = 4
LINEARS = ["qkv", "proj", "lin1", "lin2"]
WIDTHS = {"base": (768, 12), "large": (1024, 16)}


@dataclass
class SpeedArguments:
    """What to measure, and how long."""

    output: str = field(default="docs/results/speed-cpu.json", metadata={"help": "Where the figures go."})
    only: list[str] = field(
        default_factory=lambda: ["P1", "P2", "P3", "P4", "P7", "P9"],
        metadata={"help": "Figures to measure; the others of an existing file stay. 'sweep' is one of them."},
    )
    size: str = field(default="base", metadata={"help": "Width of the encoder: 'base' (ViT-B) or 'large' (ViT-L)."})
    num_layers: int = field(default=4, metadata={"help": "Blocks of the encoder; every third one is global."})
    image_size: int = field(default=224, metadata={"help": "Input of the encoder in pixels."})
    inference_image_size: int = field(default=1024, metadata={"help": "The same for inference; 1024 is SAM's own."})
    layer_image_size: int = field(default=448, metadata={"help": "Pixels whose patches a single layer sees."})
    dtype: str = field(default="float32", metadata={"help": "Of encoder and activations. P1 and P4 take both."})
    r: int = field(default=16, metadata={"help": "Rank of all adapters."})
    rounds: int = field(default=9, metadata={"help": "Turns that are measured, after two that are not."})
    num_threads: int = field(default=1, metadata={"help": "CPU threads."})
    peak_of: str | None = field(default=None, metadata={"help": "Print the peak memory of one variant, and stop."})


@dataclass
class Bench:
    """The variants that can be measured, by name: `layer/<kind>/<linear>/<dtype>`, `step/<kind>`, `infer/<kind>`."""

    args: SpeedArguments

    def __post_init__(self):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        self.device = accelerator or torch.device("cpu")
        torch.set_num_threads(self.args.num_threads)
        self.width, self.heads = WIDTHS[self.args.size]

    def build(self, name: str) -> Callable[[], list[torch.Tensor]]:
        """A call that does a variant's work once and returns its output and the gradient of its input."""
        level, kind, *rest = name.split("/")
        torch.manual_seed(0)
        build = {"layer": self._layer, "step": self._step, "infer": self._infer}[level]
        with self.device:
            return build(kind, *rest)

    def _linear(self, linear: str) -> nn.Linear:
        d_in, d_out = {"qkv": (1, 3), "proj": (1, 1), "lin1": (1, 4), "lin2": (4, 1)}[linear]
        return nn.Linear(d_in * self.width, d_out * self.width)

    def _layer(self, kind: str, linear: str, dtype: str) -> Callable:
        holder = nn.ModuleDict({linear: self._linear(linear)}).to(getattr(torch, dtype)).requires_grad_(False)
        tokens = (self.args.layer_image_size // 16) ** 2
        layer, d_in, d_out = holder[linear], holder[linear].in_features, holder[linear].out_features
        x = torch.randn(NUM_TASKS, tokens, d_in, dtype=layer.weight.dtype, requires_grad=True)
        grad = torch.randn(NUM_TASKS, tokens, d_out, dtype=layer.weight.dtype)
        call = self._adapt(_Forward(holder, linear), kind, NUM_TASKS)

        def run():
            y = call(x)
            y.backward(grad)
            found, x.grad = x.grad, None
            return [y.detach(), found]

        return run

    def encoder(self, image_size: int) -> nn.Module:
        """A vision encoder of SAM's shape, with random weights; its output is scaled to be about standard normal."""
        config = transformers.SamVisionConfig(
            hidden_size=self.width,
            num_attention_heads=self.heads,
            num_hidden_layers=self.args.num_layers,
            global_attn_indexes=list(range(2, self.args.num_layers, 3)),
            image_size=image_size,
            initializer_range=0.02,
        )
        encoder = SamVisionEncoder(config).requires_grad_(False)
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        return encoder.to(getattr(torch, self.args.dtype)).eval()

    def _images(self, size: int) -> torch.Tensor:
        return torch.randn(1, 3, size, size, dtype=getattr(torch, self.args.dtype))

    def _step(self, kind: str, tasks: str = str(NUM_TASKS)) -> Callable:
        """Forward and backward of one image for every task."""
        num_tasks, size = int(tasks), self.args.image_size
        encoder = self.encoder(size)
        x = self._images(size).repeat(num_tasks, 1, 1, 1).requires_grad_()
        grad = torch.randn(num_tasks, encoder.config.output_channels, size // 16, size // 16).to(x.dtype)
        call = self._adapt(encoder, kind, num_tasks)

        def run():
            rows = range(num_tasks) if kind.endswith("-sequential") else [slice(None)]
            outputs = []
            for row in rows:
                part = slice(row, row + 1) if isinstance(row, int) else row
                y = call(x[part], row) if isinstance(row, int) else call(x[part])
                y.backward(grad[part])
                outputs.append(y.detach())
            found, x.grad = x.grad, None
            return [torch.cat(outputs), found]

        return run

    def _infer(self, kind: str) -> Callable:
        size = self.args.inference_image_size
        encoder, x = self.encoder(size), self._images(size)
        if kind == "frozen":
            return _no_grad(lambda: [encoder(x)[0]])
        model = _talora(encoder, self.args.r, NUM_TASKS)
        model.set_task("t0")
        if kind == "unmerged":
            return _no_grad(lambda: [model(x)[0]])
        model.merge_adapter()
        if kind == "merged":
            return _no_grad(lambda: [model(x)[0]])

        def switch():
            model.unmerge_adapter()
            model.set_task("t1")
            model.merge_adapter()
            return []

        return _no_grad(switch)

    def _adapt(self, base: nn.Module, kind: str, num_tasks: int) -> Callable:
        """The base with an update of a kind, as a function of its input (and of one task where tasks go in turns)."""
        if kind == "frozen":
            return lambda x: _tensor(base(x))
        shared = kind in ("lora", "talora-shared")  # one update for all tasks, so that one LoRA does equal work
        talora = _talora(base, self.args.r, num_tasks, shared)
        if kind == "dense":
            for parent, name, layer in _adapted(talora):
                setattr(parent, name, _DenseUpdate(layer))
            return lambda x: _tensor(talora.base_model.model(x))
        if kind.startswith("lora"):
            lora = _loras(talora, 1 if shared else num_tasks, self.args.r)
            calls = {"lora-sequential": _one_lora, "lora-mixed": _mixed_loras}
            return calls[kind](lora) if kind in calls else lambda x: _tensor(lora(x))
        ids = torch.arange(num_tasks)
        if kind == "talora-sequential":
            return lambda x, task=0: _tensor(talora(x, task_ids=ids[task : task + 1].expand(len(x))))
        return lambda x: _tensor(talora(x, task_ids=ids))

    def peak(self, name: str) -> float:
        """Peak memory of one call above what there was before it, MiB."""
        if self.device.type != "cpu":
            return peak_on_accelerator(self.build(name))
        flags = [part for key in _SHAPE for part in (f"--{key}", str(getattr(self.args, key)))]
        return float(last_line_of(__file__, ["--peak_of", name, *flags]))

    def compare(self, names: list[str], tolerance: float | None) -> dict[str, tuple[float, list[float]]]:
        """Time of every variant as a ratio to the first one's, with its range; equal results asserted first.

        Variants whose work differs from the first one's, such as a frozen layer, are not compared with it.
        """
        runs = {name: self.build(name) for name in names}
        if tolerance is not None:
            results = {name: run() for name, run in runs.items() if "frozen" not in name}
            expected = next(iter(results.values()))
            for name, result in results.items():
                for value, wanted in zip(result, expected, strict=True):
                    error = (value - wanted).abs().max() / wanted.abs().max()
                    if not error <= tolerance:
                        raise RuntimeError(f"{name} differs from {next(iter(results))} by {error:.1e} of the largest")
        runs["again"] = runs[names[0]]
        taken = time_in_turns(runs, self.args.rounds, self.device)
        ratios = {name: values / taken[names[0]] for name, values in taken.items()}
        found = {name: (median(values), percentiles(values)) for name, values in ratios.items()}
        for name, (value, bounds) in found.items():
            print(f"  {name:<34}{value:6.3f}  {bounds[0]:.3f}-{bounds[1]:.3f}  {np.median(taken[name]):8.3f} s")
        return found


_SHAPE = ("size", "num_layers", "image_size", "inference_image_size", "layer_image_size", "dtype", "r", "num_threads")
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


class _Forward(nn.Module):
    """A module around one linear layer."""

    def __init__(self, holder: nn.ModuleDict, linear: str):
        super().__init__()
        self.holder, self.linear = holder, linear

    def forward(self, x):
        return self.holder[self.linear](x)


class _DenseUpdate(nn.Module):
    """What TA-LoRA costs if W + ΔW_t is built in every forward: one dense matrix per task, under autograd."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.tasks = torch.arange(NUM_TASKS)

    def forward(self, x):
        layer, base = self.layer, self.layer.base_layer
        cores_TOR = layer.cores("default", self.tasks)
        updates = torch.einsum("do,tor,ir->tdi", layer.output_factor("default"), cores_TOR, layer.talora_in["default"])
        groups = x.unflatten(0, (NUM_TASKS, -1))
        outputs = [
            F.linear(group, base.weight + update.to(base.weight.dtype), base.bias)
            for group, update in zip(groups, updates, strict=True)
        ]
        return torch.cat(outputs)


def _talora(base: nn.Module, r: int, num_tasks: int, shared: bool = False) -> peft.PeftModel:
    """TA-LoRA in all linears of the base, with a random core, so that every task has its own update."""
    names = [f"t{task}" for task in range(num_tasks)]
    config = TALoRAConfig(
        task_names=names,
        r=r,
        alpha=r / 4,
        target_modules=_targets(base),
        init_weights=False,
        r_task=max(2, num_tasks),
    )
    model = peft.get_peft_model(base, config)
    if shared:
        for _, _, layer in _adapted(model):
            for row in layer.talora_task["default"].values():
                row.data = layer.talora_task["default"]["t0"].data.clone()
    return model


def _targets(base: nn.Module) -> list[str]:
    present = {name.split(".")[-1] for name, _ in base.named_modules()}
    return [name for name in LINEARS if name in present]


def _adapted(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, TALoRALayer)
    ]


@torch.no_grad()
def _loras(talora: peft.PeftModel, count: int, r: int) -> peft.PeftModel:
    """PEFT LoRAs on the same base that are equal to the tasks' updates: A = Vᵀ, B = s · U C_t."""
    factors = {}
    for name, layer in talora.base_model.model.named_modules():
        if any(layer is child for _, _, child in _adapted(talora)):
            cores = layer.cores("default", torch.arange(count))
            factors[name] = layer.talora_in["default"].T.clone(), layer.output_factor("default") @ cores
    base = talora.unload()
    for task in range(count):
        config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=_targets(base))
        if task == 0:
            # Adapters in the base's dtype, LoRA's best case: in float32 beside a half-precision base they cost more.
            lora = peft.get_peft_model(base, config, adapter_name="t0", autocast_adapter_dtype=False)
        else:
            lora.add_adapter(f"t{task}", config, autocast_adapter_dtype=False)
    for name, (a, b_T) in factors.items():
        layer = lora.base_model.model.get_submodule(name)
        for task in range(count):
            layer.lora_A[f"t{task}"].weight.copy_(a)
            layer.lora_B[f"t{task}"].weight.copy_(b_T[task])
    return lora


def _one_lora(lora: peft.PeftModel) -> Callable:
    def call(x, task=0):
        lora.set_adapter(f"t{task}")
        return _tensor(lora(x))

    return call


def _mixed_loras(lora: peft.PeftModel) -> Callable:
    """PEFT's mixed batch, which names an adapter per row. SAM's windows are rows too, so it cannot do without help."""
    names = list(lora.peft_config)

    def expand(module, args, kwargs):
        windows = len(args[0]) // len(names)
        return args, {**kwargs, "adapter_names": [name for name in names for _ in range(windows)]}

    for layer in lora.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.register_forward_pre_hook(expand, with_kwargs=True)
    lora.base_model.set_adapter(names)
    return lambda x: _tensor(lora.base_model.model(x))


def _tensor(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _no_grad(run: Callable) -> Callable:
    return torch.no_grad()(run)


def _figure(found: tuple[float, list[float]], goal: str, setup: str, **also) -> dict:
    return {"value": found[0], "range": found[1], "goal": goal, "setup": setup, **also}


def layer_against_base(bench: Bench) -> dict:
    """P1: one adapted layer over the frozen one, and beside it PEFT's LoRA."""
    figures = {}
    for dtype in ("float32", "bfloat16"):
        for linear in LINEARS:
            names = [f"layer/{kind}/{linear}/{dtype}" for kind in ("frozen", "talora-shared", "lora")]
            print(f"P1 {linear} {dtype}")
            ratios = bench.compare(names, TOLERANCE[dtype])
            peaks = [bench.peak(name) for name in names]
            figures[f"{linear}/{dtype}"] = {
                "talora": ratios[names[1]],
                "lora": ratios[names[2]],
                "noise": ratios["again"],
                "peak_mib": dict(zip(("frozen", "talora", "lora"), (round(peak, 1) for peak in peaks), strict=True)),
            }
    main = figures["qkv/float32"]
    goal = "<= 1.10 in float32, <= 1.15 in bfloat16; peak <= 1.1 of the frozen layer's; <= LoRA's in every shape"
    return _figure(main["talora"], goal, _setup(bench, "qkv, forward + backward, float32"), shapes=figures)


def step_against_lora(bench: Bench) -> dict:
    """P2: a step with a shared update, so that a LoRA of equal rank does the same work."""
    print("P2")
    names = ["step/lora", "step/talora-shared", "step/frozen"]
    ratios = bench.compare(names, TOLERANCE[bench.args.dtype])
    setup = _setup(bench, f"encoder, forward + backward, {NUM_TASKS} rows, all linears; ratio to PEFT LoRA")
    others = {"frozen": ratios[names[2]], "noise": ratios["again"]}
    return _figure(ratios[names[1]], "<= 1.00 (noise 3 %)", setup, **others)


def tasks_against_loras(bench: Bench) -> dict:
    """P3: all tasks of an image against T LoRAs in turns, and against PEFT's mixed batch."""
    print("P3")
    names = [f"step/{kind}" for kind in ("lora-sequential", "talora-sequential", "talora", "lora-mixed")]
    ratios = bench.compare(names, TOLERANCE[bench.args.dtype])
    print("P3, mixed batch")
    mixed = bench.compare([names[3], names[2]], TOLERANCE[bench.args.dtype])
    peaks = {name.removeprefix("step/"): round(bench.peak(name), 1) for name in names}
    return _figure(
        ratios[names[1]],
        "<= 1.00 (noise 3 %); folded against the mixed batch <= 0.75; peak <= one LoRA pass",
        _setup(bench, f"encoder, forward + backward of {NUM_TASKS} tasks in turns; ratio to as many LoRA passes"),
        folded=ratios[names[2]],
        folded_against_mixed_batch=mixed[names[2]],
        noise=ratios["again"],
        peak_mib=peaks,
    )


def layer_against_dense(bench: Bench) -> dict:
    """P4: the layer against one that builds W + ΔW_t."""
    figures = {}
    for dtype in ("float32", "bfloat16"):
        print(f"P4 {dtype}")
        names = [f"layer/{kind}/qkv/{dtype}" for kind in ("dense", "talora", "frozen")]
        ratios = bench.compare(names, TOLERANCE[dtype])
        peaks = [bench.peak(name) for name in names]
        figures[dtype] = {
            "talora": ratios[names[1]],
            "noise": ratios["again"],
            "peak_mib": dict(zip(("dense", "talora", "frozen"), (round(peak, 1) for peak in peaks), strict=True)),
            "extra_peak_ratio": round((peaks[1] - peaks[2]) / (peaks[0] - peaks[2]), 3),
        }
    print("P4, step")
    step = bench.compare(["step/dense", "step/talora"], TOLERANCE[bench.args.dtype])
    return _figure(
        figures["float32"]["talora"],
        "<= 0.70 of its time, <= 0.5 of its peak above the frozen layer's",
        _setup(bench, f"qkv, {NUM_TASKS} tasks, forward + backward; ratio to the dense update, float32"),
        layers=figures,
        step=step["step/talora"],
    )


def merged_inference(bench: Bench) -> dict:
    """P7: inference with a merged task, and what it costs to merge another."""
    print("P7")
    names = ["infer/frozen", "infer/merged", "infer/unmerged", "infer/switch"]
    ratios = bench.compare(names, None)
    return _figure(
        ratios[names[1]],
        "<= 1.01 (noise 3 %); switching the merged task <= 0.05 of a pass",
        _setup(bench, "encoder, one image; ratio to the base model"),
        switch=ratios[names[3]],
        unmerged=ratios[names[2]],
        noise=ratios["again"],
    )


def adapter_size(bench: Bench) -> dict:
    """P9: numbers in the adapter against T LoRAs, counted."""
    with torch.device("meta"):
        base = _Forward(nn.ModuleDict({"qkv": bench._linear("qkv")}), "qkv")
        ours = sum(p.numel() for p in _talora(base, bench.args.r, NUM_TASKS).parameters() if p.requires_grad)
        base = _Forward(nn.ModuleDict({"qkv": bench._linear("qkv")}), "qkv")
        lora = peft.get_peft_model(base, peft.LoraConfig(r=bench.args.r, target_modules=["qkv"]))
        loras = NUM_TASKS * lora.get_nb_trainable_parameters()[0]
    ratio = round(ours / loras, 4)
    setup = f"qkv of {bench.width}, r {bench.args.r}, {NUM_TASKS} tasks: {ours} against {loras} numbers a layer"
    return _figure((ratio, [ratio, ratio]), f"<= {1.15 / NUM_TASKS}", setup)


def sweep(bench: Bench) -> dict:
    """Steps for one to five tasks: images per second (an image is done when all its tasks are) and peak memory."""
    rows = []
    for tasks in range(1, 6):
        kinds = ("talora", "talora-sequential", "lora-sequential")
        for kind in kinds:
            run = bench.build(f"step/{kind}/{tasks}")
            seconds = [seconds_of(run, bench.device) for _ in range(bench.args.rounds + 2)][2:]
            rows.append(
                {
                    "tasks": tasks,
                    "variant": kind,
                    "images_per_second": round(1 / float(np.median(seconds)), 3),
                    "range": percentiles(1 / np.array(seconds)),
                    "peak_mib": round(bench.peak(f"step/{kind}/{tasks}"), 1),
                }
            )
            print(f"  {rows[-1]}")
    return {"setup": _setup(bench, "encoder, forward + backward of all tasks of one image"), "rows": rows}


FIGURES = {
    "P1": layer_against_base,
    "P2": step_against_lora,
    "P3": tasks_against_loras,
    "P4": layer_against_dense,
    "P7": merged_inference,
    "P9": adapter_size,
    "sweep": sweep,
}


def _setup(bench: Bench, what: str) -> str:
    shape = ", ".join(f"{key} {value}" for key, value in asdict(bench.args).items() if key in _SHAPE)
    return f"{what}; {shape}; {bench.device}, torch {torch.__version__}, peft {peft.__version__}"


def main() -> None:
    """Measure what was asked for; figures measured before stay in the file."""
    (args,) = transformers.HfArgumentParser(SpeedArguments).parse_args_into_dataclasses()
    unknown = [name for name in args.only if name not in FIGURES]
    if unknown or args.size not in WIDTHS:
        raise ValueError(f"only={args.only}: allowed are {list(FIGURES)}; size={args.size}: {list(WIDTHS)}.")
    if args.peak_of:
        print(resident_peak(Bench(args).build(args.peak_of)))  # in a process of its own, see Bench.peak
        return
    keep_memory()
    bench = Bench(args)
    output = Path(args.output)
    figures = json.loads(output.read_text()) if output.exists() else {}
    for name in args.only:
        figures[name] = FIGURES[name](bench)
        with write_aside(output.parent) as aside:
            write_json(aside / output.name, figures)
    for name, figure in figures.items():
        if "value" in figure:
            print(f"{name}: {figure['value']} ({figure['range'][0]}-{figure['range'][1]}), goal {figure['goal']}")


if __name__ == "__main__":
    main()
