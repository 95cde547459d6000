"""The benchmark: its arithmetic by hand, what it refuses, and the recipe from runs to tables."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peft_talora.benchmark_table import draw_table, make_table, relative_gain, to_markdown
from peft_talora.protocols import CAMVID_2
from peft_talora.records import Record, check_record, read_comparable, read_record, write_record

RECIPE = Path(__file__).parent.parent / "recipes" / "benchmark.py"
# Two tasks with two figures each; the edges' loss is better where it is lower.
PROTOCOL = CAMVID_2
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
        validation_losses={"segmentation": 0.5, "edges": 0.25},
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
    costs = {"hardware": "idle", "methods": {"talora": {"step_seconds": 0.25, "peak_mib": 700.0}}}
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
    assert reason in to_markdown(table, PROTOCOL)


def test_seeds_that_the_baseline_lacks_are_left_out_of_its_gain_and_said_so():
    table = make_table(PROTOCOL, [STL[0], *OURS], BASELINES)
    assert table["methods"]["talora"]["delta_m"] == {"mean": pytest.approx(23.75), "ci95": None}
    assert table["methods"]["talora"]["seeds"] == 2
    assert table["notes"] == ["Δm of talora over full-stl is of 1 seeds, those that both have."]


def test_the_markdown_has_a_row_per_method_and_all_figures():
    text = to_markdown(make_table(PROTOCOL, [*STL, *OURS], BASELINES), PROTOCOL)
    assert "| talora | 0.001 | +11.88 ± 150.89 | 0.500 ± 1.271 | 0.500 ± 0.000 | 1,230 | 5,000 |" in text
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
    assert replace(OURS[0], validation_losses=None).validation_loss == math.inf
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
def call(recipe, tmp_path, monkeypatch, sam_folder):
    """Run the recipe with a few steps on tiny scenes; gives the folder of results."""
    monkeypatch.setattr(recipe.signal, "signal", lambda *_: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    small = ["--num_images", 8, "--num_train_epochs", 1, "--seeds", 1, "--num_threads", 1, "--base", sam_folder]
    small += ["--cost_steps", 4, "--cost_rounds", 1, "--workers", 2]
    places = ["--output_dir", tmp_path / "results", "--work_dir", tmp_path / "work"]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *map(str, [*small, *places, *arguments])])
        recipe.main()
        return tmp_path / "results"

    return run
