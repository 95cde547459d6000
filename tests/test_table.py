"""The benchmark's table: its arithmetic by hand, its notes, its Markdown."""

from dataclasses import replace

import numpy as np
import pytest
from benchmark_cases import BASELINES, OURS, PROTOCOL, STL, record

from peft_talora.benchmark.table import draw_table, make_table, relative_gain, to_markdown

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
        "commit": "def",
        "steps": 12,
        "rounds": 3,
        "methods": {"talora": {"step_seconds": 0.25, "peak_mib": 700.0}},
    }
    table = make_table(PROTOCOL, [*STL, *OURS], BASELINES, costs)
    talora = table["methods"]["talora"]
    assert talora["seeds"] == 2
    assert talora["validation_loss"] == {"mean": 0.75, "ci95": [0.75, 0.75]}
    assert talora["metrics"]["segmentation"]["miou"]["mean"] == pytest.approx(0.5)
    assert talora["metrics"]["segmentation"]["miou"]["ci95"] == pytest.approx([0.5 - 1.27062, 0.5 + 1.27062], rel=1e-4)
    assert (talora["adapter_parameters"], talora["other_parameters"], talora["head_parameters"]) == (1000, 230, 5000)
    assert (talora["step_seconds"], talora["peak_mib"]) == (0.25, 700)
    assert table["methods"]["full-stl"]["step_seconds"] is None
    assert table["hardware"] == "a processor"
    assert table["cost"] == {"steps": 12, "rounds": 3, "commit": "def", "hardware": "idle"}
    text = to_markdown(table, PROTOCOL, "camvid-2")
    assert "median over 3 runs of 12 steps of train.py, one at a time (idle; commit def)" in text
    assert "Commit abc; a processor." in text
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
    row = "| talora | 0.001 | joint | 0.750 ± 0.000 | +11.88 ± 150.89 | 0.500 ± 1.271 | 0.500 ± 0.000 | 1,000 | 230 | "
    assert row + "5,000 |" in text
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
