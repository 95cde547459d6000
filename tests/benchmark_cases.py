"""Records made up by hand, and a benchmark whose runs are a script of a few lines; shared by the tests."""

import subprocess
from dataclasses import replace

from peft_talora.benchmark.plan import Benchmark
from peft_talora.benchmark.protocols import CAMVID_2, SYNTHETIC_3
from peft_talora.benchmark.records import Record

# Two tasks with two figures each; the edges' loss is better where it is lower.
PROTOCOL = replace(CAMVID_2, figures={})
FIGURES = (("segmentation", "miou"), ("segmentation", "pixel_accuracy"), ("edges", "ods_f"), ("edges", "loss"))
SETTINGS = {"loss_weights": ["segmentation=1", "edges=1"], "num_train_epochs": 10, "per_device_train_batch_size": 2}
BASELINES = {"delta_m": "full-stl", "delta_m_vs_lora_stl": "lora-stl"}


def record(name, seed, values, arguments=None, **changes):
    metrics = {"segmentation": {}, "edges": {}}
    for (task, figure), value in zip(FIGURES, values, strict=True):
        metrics[task][figure] = value
    made = Record(
        protocol=PROTOCOL.name,
        name=name,
        arguments={**SETTINGS, "method": name, "seed": seed, "learning_rate": 1e-3, "updates": "joint"},
        metrics=metrics,
        validation={"metrics": {}, "losses": {"segmentation": 0.5, "edges": 0.25}, "loss": 0.75},
        parameters={"adapter": 1000, "encoder": 200, "heads": 5000, "other": 30, "all": 9000},
        commit="abc",
        hardware="a processor",
        versions={},
    )
    return replace(made, arguments={**made.arguments, **(arguments or {})}, **changes)


STL = [record("full-stl", 0, (0.5, 0.8, 0.4, 0.2)), record("full-stl", 1, (0.4, 0.8, 0.5, 0.4))]
OURS = [record("talora", 0, (0.6, 0.8, 0.5, 0.1)), record("talora", 1, (0.4, 0.6, 0.5, 0.3))]

# Diverges at learning rates above 1. The method `wait` does not end; step times differ from turn to turn.
TRAIN = """
import json, sys, time
from pathlib import Path

method, rate, folder = (sys.argv[sys.argv.index(name) + 1] for name in ("--method", "--learning_rate", "--output_dir"))
if method == "wait":
    time.sleep(60)
if float(rate) > 1:
    raise FloatingPointError("the loss")
results = {
    "after": {"depth": {"rmse": 1.0}},
    "validation": {"metrics": {}, "losses": {"depth": 1 + float(rate)}, "loss": 1 + float(rate)},
    "parameters": {"heads": 3},
    "arguments": {"r": 16, "seed": -1, "output_dir": folder},
    "versions": {"resumed": str("--resume_from_checkpoint" in sys.argv)},
    "step_seconds": (0.5, 0.1, 0.3)[int(folder[-1])],
    "peak_mib": 100,
}
Path(folder, "results.json").write_text(json.dumps(results))
"""


def make_benchmark(folder, **changes):
    """Of synthetic-3 and talora, with eight images; its work, its results and its clone are below a folder."""
    made = Benchmark(
        protocol=SYNTHETIC_3,
        variants={"talora": {"method": "talora"}},
        group=None,
        seeds=range(1),
        changes={"num_images": 8, "num_train_epochs": 1},
        data_root=None,
        base=None,
        workers=2,
        num_threads=1,
        root=folder / "clone",
        output=folder / "results",
        work=folder / "work",
        say=print,
    )
    script = folder / "clone" / "recipes" / "train.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(TRAIN)
    return replace(made, **changes)


def commit(clone):
    """Commit what is in a folder, which becomes a repository."""
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*name, "commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run(["git", "-C", str(clone), *command], check=True)
