"""The benchmark recipe: what it compares, what it refuses, and the way from runs to tables."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_cases import OURS, record
from PIL import Image

from peft_talora.benchmark.protocols import SYNTHETIC_3
from peft_talora.benchmark.records import LATER_ARGUMENTS, read_record, write_record
from peft_talora.engine import parse_arguments
from peft_talora.methods import METHODS
from peft_talora.methods.adapters import AdapterArguments
from peft_talora.weighting import WEIGHTINGS

RECIPE = Path(__file__).parent.parent / "recipes" / "benchmark.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("benchmark_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the parser of arguments looks their types up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def small(tmp_path, monkeypatch, sam_folder):
    """Flags for a few steps on tiny scenes."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    small = ["--num_images", 8, "--num_train_epochs", 1, "--seeds", 1, "--num_threads", 1, "--base", sam_folder]
    small += ["--cost_steps", 4, "--cost_rounds", 1, "--workers", 2]
    small += ["--output_dir", tmp_path / "results", "--work_dir", tmp_path / "work"]
    return [str(RECIPE), *map(str, small)]


@pytest.fixture
def call(recipe, small, monkeypatch):
    """Run the recipe."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [*small, *map(str, arguments)])
        recipe.main()

    return run


@pytest.fixture
def build(recipe, small):
    """What the recipe compares when it is called so."""

    def make(*arguments):
        args = parse_arguments(recipe.BenchmarkArguments, [*small[1:], *map(str, arguments)])
        return recipe.build(args)

    return make


def test_the_methods_and_variants_are_those_of_the_training_recipe(recipe):
    assert set(recipe.METHODS) == set(METHODS)
    for num_tasks in (2, 3, 6):
        changes = recipe.ablations(num_tasks)
        ranks = {change["r_task"] for change in changes.values() if "r_task" in change}
        assert ranks | {min(num_tasks, 4)} == set(range(1, num_tasks + 2))
        for change in changes.values():
            own = {k: v for k, v in change.items() if k not in ("decoder_mode", "updates")}
            METHODS["talora"].check(AdapterArguments(**own))
    assert set(recipe.weightings()) == set(WEIGHTINGS)


def test_wrong_arguments_are_refused_at_once(build):
    for arguments, message in (
        (["--protocol", "nyuv2"], "`protocol` is 'nyuv2'; allowed: synthetic-3"),
        (["--protocol", "camvid-2"], "needs `data_root`"),
        (["--methods", "lora"], "`methods` has lora; allowed: full-stl"),
        (["--ablation", "r-5"], "`ablation` has r-5; allowed: r_task-1"),
        (["--stages", "train"], "`stages` has train"),
        (["--workers", 0], "`workers` is 0"),
        (["--num_threads", 0], "`num_threads` is 0"),
        (["--seeds", 101], "`seeds` is 101; allowed: up to 100"),
        (["--learning_rates", 0], r"`learning_rates` is \[0.0\]; allowed: positive"),
        (["--ablation", "r-4", "--methods", "heads"], "`methods` and `ablation` are given"),
        (["--ablation", "r-4", "--weightings", "rlw"], "`ablation` and `weightings` are given"),
        (["--weightings", "gradvac"], "`weightings` has gradvac; allowed: equal, fixed"),
    ):
        with pytest.raises(ValueError, match=message):
            build(*arguments)


def test_records_of_unknown_names_make_no_table(recipe, build):
    benchmark = build("--stages", "table")
    write_record(benchmark.record_file("retired", 0), replace(OURS[0], name="retired"))
    with pytest.raises(ValueError, match="has records of retired; allowed: full-stl"):
        recipe.write_tables(benchmark)


def test_ablations_share_talora_s_own_runs_with_the_methods(build):
    methods, variants = build("--methods", "talora"), build("--ablation", "r-4", "norms-frozen")
    assert list(variants.variants) == ["talora", "r-4", "norms-frozen"]
    assert variants.variants["r-4"] == {"method": "talora", "r": 4}
    assert variants.record_file("talora", 0) == methods.record_file("talora", 0)
    assert variants.record_file("r-4", 0).parent.name == "ablations"


def test_weightings_stand_in_one_table_with_methods_of_older_records(recipe, build, tmp_path):
    """Records made before train.py had weightings say nothing of them."""
    benchmark = build("--weightings", "rlw", "--stages", "table")
    assert benchmark.variants["rlw"] == {"method": "talora", "updates": "joint", "weighting": "rlw"}
    metrics = {task: dict.fromkeys(figures, 0.5) for task, figures in SYNTHETIC_3.higher_is_better.items()}
    for name, seeds in (("full-stl", 2), ("heads", 1), ("talora", 2), ("equal", 1), ("rlw", 1)):
        for seed in range(seeds):
            newer = {**LATER_ARGUMENTS, "weighting": name} if name in WEIGHTINGS else {}
            made = record(name, seed, (1, 1, 1, 1), metrics=metrics, arguments=newer)
            folder = benchmark.records / ("weightings" if newer else "")
            write_record(folder / f"{name}-seed{seed}.json", made)
    recipe.write_tables(benchmark)
    table = json.loads((benchmark.output / "weightings-synthetic-3.json").read_text())
    assert list(table["methods"]) == ["full-stl", "talora", "equal", "rlw"], "heads are no reference"
    assert table["methods"]["rlw"]["delta_m_vs_equal"]["mean"] == 0
    assert [table["methods"][name]["seeds"] for name in ("talora", "rlw")] == [2, 1]
    page = (benchmark.output / "weightings-synthetic-3.md").read_text()
    assert "| talora | 2 |" in page
    assert "Δm over equal" in page


def test_from_runs_to_the_table(call, tmp_path, sam):
    """Two methods, one seed, a few steps. Started again with everything, only what is missing is done."""
    results = tmp_path / "results"
    records = [results / "runs" / "synthetic-3" / f"{name}-seed0.json" for name in ("full-stl", "talora")]
    stages = ["--methods", "full-stl", "talora", "--learning_rates", 1e-2, "--stages"]
    call(*stages, "runs", "table")
    assert not any((tmp_path / "work").rglob("results.json")), "folders of finished runs are deleted"
    written = [file.stat().st_mtime_ns for file in records]
    call("--methods", "talora", "--learning_rates", 1e-2)
    assert [file.stat().st_mtime_ns for file in records] == written

    table = json.loads((results / "synthetic-3.json").read_text())
    stl, talora = (read_record(file) for file in records)
    ours, reference = table["methods"]["talora"], table["methods"]["full-stl"]
    gain = 0
    for task, figures in SYNTHETIC_3.higher_is_better.items():
        for figure, higher in figures.items():
            before, after = stl.metrics[task][figure], talora.metrics[task][figure]
            gain += (1 if higher else -1) * 100 / 3 * (after / before - 1) / len(figures)
            assert ours["metrics"][task][figure] == {"mean": after, "ci95": None}
    assert ours["delta_m"] == {"mean": pytest.approx(gain), "ci95": None}
    assert reference["delta_m"] == {"mean": 0, "ci95": None}
    assert ours["delta_m_vs_lora_stl"] is None

    # design: d_in·r + d_out·r + r·r·r_task + T·r_task in each of the four linears of each block.
    linears = [(32, 96), (32, 32), (32, 64), (64, 32)]
    assert ours["adapter_parameters"] == 4 * sum(16 * (d_in + d_out) + 16 * 16 * 3 + 3 * 3 for d_in, d_out in linears)
    assert ours["other_parameters"] == 4 * 2 * 2 * 32, "norms"
    encoder = sum(parameter.numel() for parameter in sam.vision_encoder.parameters())
    assert (reference["adapter_parameters"], reference["other_parameters"]) == (0, 3 * encoder)
    assert ours["head_parameters"] == reference["head_parameters"] > 0
    assert ours["step_seconds"] > 0
    assert ours["peak_mib"] > 0
    assert reference["step_seconds"] is None
    loss = reference["validation_loss"]["mean"]
    shown = f"{loss:.2f}" if loss >= 10 else f"{loss:.3f}"
    assert f"| full-stl | 0.01 | joint | {shown} | 0 |" in (results / "synthetic-3.md").read_text()
    with Image.open(results / "synthetic-3.png") as picture:
        assert picture.size == (780, 470)

    file = results / "runs" / "synthetic-3" / "cost.json"
    costs = json.loads(file.read_text())
    costs["variants"]["talora"]["updates"] = "joint"
    file.write_text(json.dumps(costs))
    with pytest.raises(ValueError, match=r"cost.json is of talora with other updates than the records"):
        call("--stages", "table")
