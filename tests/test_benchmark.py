"""The benchmark: its arithmetic by hand, what it refuses, and the recipe from runs to tables."""

import importlib.util
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peft_talora.benchmark.protocols import CAMVID_2, SYNTHETIC_3
from peft_talora.benchmark.records import (
    Record,
    check_record,
    describe_weights,
    read_comparable,
    read_record,
    write_record,
)
from peft_talora.benchmark.table import draw_table, make_table, relative_gain, to_markdown
from peft_talora.engine import parse_arguments
from peft_talora.methods import METHODS
from peft_talora.methods.adapters import AdapterArguments

RECIPE = Path(__file__).parent.parent / "recipes" / "benchmark.py"
# Two tasks with two figures each; the edges' loss is better where it is lower.
PROTOCOL = replace(CAMVID_2, figures={})
FIGURES = (("segmentation", "miou"), ("segmentation", "pixel_accuracy"), ("edges", "ods_f"), ("edges", "loss"))
SETTINGS = {"num_train_epochs": 10, "per_device_train_batch_size": 2}
BASELINES = {"delta_m": "full-stl", "delta_m_vs_lora_stl": "lora-stl"}


def record(name, seed, values, **changes):
    metrics = {"segmentation": {}, "edges": {}}
    for (task, figure), value in zip(FIGURES, values, strict=True):
        metrics[task][figure] = value
    made = Record(
        protocol=PROTOCOL.name,
        name=name,
        settings=SETTINGS,
        choices={"method": name, "seed": seed, "learning_rate": 1e-3},
        metrics=metrics,
        validation={"metrics": {}, "losses": {"segmentation": 0.5, "edges": 0.25}},
        parameters={"adapter": 1000, "encoder": 200, "heads": 5000, "other": 30, "all": 9000},
        commit="abc",
        hardware="a processor",
        versions={},
    )
    return replace(made, **changes)


STL = [record("full-stl", 0, (0.5, 0.8, 0.4, 0.2)), record("full-stl", 1, (0.4, 0.8, 0.5, 0.4))]
OURS = [record("talora", 0, (0.6, 0.8, 0.5, 0.1)), record("talora", 1, (0.4, 0.6, 0.5, 0.3))]
# Δm by hand. Seed 0: segmentation (20 + 0) / 2 = 10, edges (25 + 50) / 2 = 37.5. Seed 1: (0 − 25) / 2, (0 + 25) / 2.
GAINS = (23.75, 0.0)


def test_delta_m_by_hand_is_of_the_same_seed_s_baseline():
    for ours, stl, gain in zip(OURS, STL, GAINS, strict=True):
        assert relative_gain(PROTOCOL, ours, stl) == pytest.approx(gain, abs=1e-9)
    methods = make_table(PROTOCOL, [*STL, *OURS], BASELINES)["methods"]
    assert methods["talora"]["delta_m"]["mean"] == pytest.approx(11.875)
    half = 12.7062 * (GAINS[0] - GAINS[1]) / 2  # of two values, s / √2 is half their difference
    assert methods["talora"]["delta_m"]["ci95"] == pytest.approx([11.875 - half, 11.875 + half], rel=1e-4)
    assert methods["full-stl"]["delta_m"] == {"mean": 0, "ci95": [0, 0]}
    assert methods["talora"]["delta_m_vs_lora_stl"] is None


def test_figures_parameters_and_costs_by_hand():
    costs = {
        "hardware": "idle",
        "steps": 12,
        "rounds": 3,
        "methods": {"talora": {"step_seconds": 0.25, "peak_mib": 700.0}},
    }
    table = make_table(PROTOCOL, [*STL, *OURS], BASELINES, costs)
    talora = table["methods"]["talora"]
    assert talora["seeds"] == 2
    assert talora["metrics"]["segmentation"]["miou"]["mean"] == pytest.approx(0.5)
    assert talora["metrics"]["segmentation"]["miou"]["ci95"] == pytest.approx([0.5 - 1.27062, 0.5 + 1.27062], rel=1e-4)
    assert (talora["adapter_parameters"], talora["other_parameters"], talora["head_parameters"]) == (1000, 230, 5000)
    assert (talora["step_seconds"], talora["peak_mib"]) == (0.25, 700)
    assert table["methods"]["full-stl"]["step_seconds"] is None
    assert table["hardware"] == "idle"
    assert (table["protocol"], table["commit"], table["notes"]) == ("camvid-2", "abc", [])


def test_a_protocol_s_figures_alone_enter():
    narrow = replace(PROTOCOL, figures={"segmentation": ("miou",), "edges": ("ods_f",)})
    assert relative_gain(narrow, OURS[0], STL[0]) == pytest.approx((20 + 25) / 2)
    table = make_table(narrow, [*STL, *OURS], BASELINES)
    assert list(table["methods"]["talora"]["metrics"]["edges"]) == ["ods_f"]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (record("full-stl", 0, (0.5, 0.8, 0.0, 0.2)), "baseline of 'edges' has 'ods_f' = 0"),
        (
            record("full-stl", 0, (0.5, None, 0.4, 0.2)),
            "'pixel_accuracy' of 'segmentation' is not a number in 'full-stl'",
        ),
    ],
    ids=["zero", "no number"],
)
def test_without_a_usable_baseline_there_is_no_gain_and_a_note(wrong, reason):
    table = make_table(PROTOCOL, [wrong, *OURS[:1]], BASELINES)
    assert table["methods"]["talora"]["delta_m"] is None
    assert any(reason in note for note in table["notes"])
    assert reason in to_markdown(table, PROTOCOL, "camvid-2")


def test_seeds_that_the_baseline_lacks_are_left_out_of_its_gain_and_said_so():
    table = make_table(PROTOCOL, [STL[0], *OURS], BASELINES)
    assert table["methods"]["talora"]["delta_m"] == {"mean": pytest.approx(23.75), "ci95": None}
    assert table["methods"]["talora"]["seeds"] == 2
    assert table["notes"] == ["Δm of talora over full-stl is of 1 seeds, those that both have."]


def test_the_markdown_has_a_row_per_method_and_all_figures():
    text = to_markdown(make_table(PROTOCOL, [*STL, *OURS], BASELINES), PROTOCOL, "camvid-2")
    assert "| talora | 0.001 | +11.88 ± 150.89 | 0.500 ± 1.271 | 0.500 ± 0.000 | 1,000 | 230 | 5,000 |" in text
    assert "segmentation miou ↑" in text
    assert "step (ms)" not in text, "not measured"
    assert text.count("| full-stl |") == 3
    for line in text.splitlines():
        if line.startswith("| talora"):
            assert line.count("|") == text[: text.index(line)].splitlines()[-2].count("|")


def test_the_picture_needs_a_baseline():
    assert draw_table(make_table(PROTOCOL, OURS, BASELINES)) is None
    page = np.asarray(draw_table(make_table(PROTOCOL, [*STL, *OURS], BASELINES)))
    assert page.shape[2] == 3


def test_a_record_round_trips_and_nan_becomes_none(tmp_path):
    file = tmp_path / "talora-seed0.json"
    write_record(file, record("talora", 0, (0.5, math.nan, 0.4, 0.2)))
    assert read_record(file) == record("talora", 0, (0.5, None, 0.4, 0.2))
    assert read_record(file).validation_loss == 0.75
    assert replace(OURS[0], validation=None).validation_loss == math.inf
    file.write_text("{}")
    with pytest.raises(ValueError, match="no record"):
        read_record(file)


def test_a_record_of_other_settings_is_refused(tmp_path):
    file = tmp_path / "talora-seed0.json"
    write_record(file, OURS[0])
    check_record(file, SETTINGS, OURS[0].choices)
    with pytest.raises(ValueError, match=r"num_train_epochs=10 \(not 3\)"):
        check_record(file, {**SETTINGS, "num_train_epochs": 3}, OURS[0].choices)
    with pytest.raises(ValueError, match=r"learning_rate=0.001 \(not 0.003\).*delete it"):
        check_record(file, SETTINGS, {**OURS[0].choices, "learning_rate": 3e-3})


def test_other_weights_of_a_base_of_the_same_name_are_another_setting(build, tmp_path, sam_folder):
    base = shutil.copytree(sam_folder, tmp_path / "base")
    benchmark = build("--base", base)
    settings = benchmark.settings(SYNTHETIC_3)
    assert settings == build("--base", base).settings(SYNTHETIC_3)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert describe_weights(str(base)) != settings["base_weights"]
    write_record(tmp_path / "talora-seed0.json", replace(OURS[0], settings=settings))
    with pytest.raises(ValueError, match=r"is of a run with base_weights="):
        check_record(tmp_path / "talora-seed0.json", benchmark.settings(SYNTHETIC_3), OURS[0].choices)
    assert describe_weights("facebook/sam-vit-base") is None
    assert "--base_weights" not in benchmark.job("a", SYNTHETIC_3, settings).command()


def test_records_that_are_not_comparable_do_not_share_a_table(tmp_path):
    files = [tmp_path / f"talora-seed{seed}.json" for seed in (0, 1)]
    for file, one in zip(files, OURS, strict=True):
        write_record(file, one)
    assert read_comparable(files) == OURS
    write_record(files[1], replace(OURS[1], settings={**SETTINGS, "num_train_epochs": 3}))
    with pytest.raises(ValueError, match="not comparable"):
        read_comparable(files)
    write_record(files[1], replace(OURS[1], choices={**OURS[1].choices, "learning_rate": 3e-3}))
    with pytest.raises(ValueError, match=r"another seed of 'talora'"):
        read_comparable(files)


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
            METHODS["talora"].check(AdapterArguments(**{k: v for k, v in change.items() if k != "decoder_mode"}))


def write_tuning(build, losses, *arguments):
    """Records of what a search of learning rates has found for talora: rate → loss."""
    benchmark = build("--methods", "talora", *arguments)
    for rate, loss in losses.items():
        choices = {"method": "talora", "seed": 100, "learning_rate": rate}
        validation = None if loss is None else {"metrics": {}, "losses": {"depth": loss / 2, "normals": loss / 2}}
        made = record("talora", 100, (1, 1, 1, 1), choices=choices, validation=validation)
        file = benchmark.output / "runs" / "learning-rates" / f"talora-{rate:g}-seed100.json"
        write_record(file, replace(made, settings=benchmark.settings(SYNTHETIC_3)))
    return benchmark


def test_the_learning_rate_is_that_of_the_lowest_validation_loss(recipe, build, capsys):
    benchmark = write_tuning(build, {3e-4: 2.0, 1e-3: 1.5, 3e-3: None})
    assert recipe.choose_learning_rates(benchmark) == {"talora": 1e-3}
    assert "WARNING" not in capsys.readouterr().out
    found = json.loads((benchmark.output / "learning-rates.json").read_text())
    assert found["methods"]["talora"]["validation_loss"] == {"0.0003": 2.0, "0.001": 1.5, "0.003": None}
    benchmark = write_tuning(build, {3e-3: 1.0})
    assert recipe.choose_learning_rates(benchmark) == {"talora": 3e-3}
    assert "WARNING: 0.003 is at the border" in capsys.readouterr().out


def test_learning_rates_of_earlier_searches_count_and_a_border_is_noted(recipe, build):
    benchmark = write_tuning(build, {3e-4: 1.0, 1e-3: 1.5, 3e-3: 2.0})
    recipe.choose_learning_rates(benchmark)
    used = {"method": "talora", "seed": 0, "learning_rate": 3e-4}
    records = [record("talora", 0, (1, 1, 1, 1), choices=used)]
    where = "Learning rates are those of the lowest validation loss on synthetic-3, one for all tasks of a method."
    assert recipe.rate_notes(benchmark, records) == [
        where,
        "The learning rate of talora, 0.0003, is at the border of those tried: 0.0003, 0.001, 0.003.",
    ]
    wider = write_tuning(build, {1e-4: 0.5, 3e-5: 0.7}, "--learning_rates", 3e-5, 1e-4)
    assert recipe.choose_learning_rates(wider) == {"talora": 1e-4}
    assert recipe.choose_learning_rates(benchmark) == {"talora": 1e-4}, "the earlier grid does not lose it"
    assert recipe.rate_notes(benchmark, records) == [], "the records have another rate"
    records = [replace(records[0], choices={**used, "learning_rate": 1e-4})]
    assert recipe.rate_notes(benchmark, records) == [where]


def test_learning_rates_are_kept_for_other_protocols_and_not_for_other_bases(recipe, build):
    recipe.choose_learning_rates(write_tuning(build, {3e-4: 2.0, 1e-3: 1.5, 3e-3: 3.0}))
    other = ["--protocol", "synthetic-6", "--num_images", 16, "--methods", "talora"]
    assert recipe.choose_learning_rates(build(*other)) == {"talora": 1e-3}
    with pytest.raises(ValueError, match="no learning rate of heads: run the stage"):
        recipe.choose_learning_rates(build(*other, "heads", "--stages", "runs"))
    with pytest.raises(ValueError, match="with other base, base_weights"):
        recipe.choose_learning_rates(build("--base", "another", *other))
    with pytest.raises(ValueError, match="with other num_images"):
        recipe.choose_learning_rates(build("--methods", "talora", "--num_images", 16))


def test_wrong_arguments_are_refused_at_once(build):
    for arguments, message in (
        (["--protocol", "nyuv2"], "`protocol` is 'nyuv2'; allowed: synthetic-3"),
        (["--protocol", "camvid-2"], "needs `data_root`"),
        (["--methods", "lora"], "`methods` has lora; allowed: full-stl"),
        (["--ablation", "r-5"], "`ablation` has r-5; allowed: r_task-1"),
        (["--stages", "train"], "`stages` has train"),
        (["--workers", 0], "`workers` is 0"),
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
    assert "| full-stl | 0.01 | 0 |" in (results / "synthetic-3.md").read_text()
    with Image.open(results / "synthetic-3.png") as picture:
        assert picture.size == (780, 470)
