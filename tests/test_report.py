"""Figures of a run over a stream, worked out by hand, and the files that hold them."""

import copy
import json

import pytest

from peft_talora.continual.report import make_results, published_table, table, write_report

SETTINGS = {
    "method": "moda",
    "adapter": "lora",
    "stream": "generated",
    "parameters_per_domain": 12,
    "bytes_per_domain": 48.0,
    "seconds": 3.0,
}


def figures(iou, **chosen):
    return {"iou": iou, "boundary_iou": iou / 2, "chosen": chosen, "encoder_passes": 1.5}


HISTORY = [
    {"stage": "before", "domains": {"a": figures(40.0), "b": figures(20.0)}, "natural": figures(70.0)},
    {"stage": "a", "domains": {"a": figures(80.0, a=4), "b": figures(30.0, a=4)}, "natural": figures(69.0, base=2)},
    {
        "stage": "b",
        "domains": {"a": figures(74.0, a=3, base=1), "b": figures(60.0, a=1, b=3)},
        "natural": figures(66.0, a=1, base=1),
    },
]
FURTHER = {
    "oracle": {"a": figures(80.0), "b": figures(64.0)},
    "no_prompt": {"a": figures(10.0), "b": figures(30.0)},
}


def test_figures_follow_from_the_matrix():
    results = make_results(HISTORY, FURTHER, SETTINGS)
    own = results["matrix"]["iou"]
    assert own["R"] == [[80, 30], [74, 60]]
    assert own["last"] == 67
    assert own["avg"] == (80 + 67) / 2
    assert own["ff"] == own["ff_diagonal"] == own["ff_ever"] == 6
    assert own["forward_transfer"] == 10
    assert own["natural"] == 66
    assert own["natural_zero_shot"] == 70
    assert own["oracle_last"] == 72
    assert own["oracle_gap"] == 5
    assert own["no_prompt"] == 20
    assert results["matrix"]["boundary_iou"]["last"] == 33.5
    assert results["encoder_passes"] == 1.5
    routing = results["routing"]
    assert routing["counts"] == [[3, 0, 1], [1, 3, 0]]
    assert routing["accuracy"] == 6 / 8
    assert routing["false_alarms"] == 1 / 8
    assert routing["natural_to_base"] == 1 / 2


def test_one_stage_of_all_domains_has_nothing_to_forget():
    results = make_results([HISTORY[0], HISTORY[2]], {**FURTHER, "oracle": {}}, {**SETTINGS, "method": "joint"})
    own = results["matrix"]["iou"]
    assert own["last"] == 67
    assert all(own[name] is None for name in ("avg", "ff", "ff_ever", "ff_diagonal", "forward_transfer"))
    assert "routing" not in results


def test_a_stream_may_have_no_natural_images():
    history = copy.deepcopy(HISTORY)
    for stage in history:
        stage["natural"] = None
    results = make_results(history, FURTHER, SETTINGS)
    assert "natural" not in results["matrix"]["iou"]
    assert results["routing"]["natural_to_base"] is None
    assert "natural ones" not in table(results)


def test_the_table_says_what_was_measured():
    text = table(make_results(HISTORY, FURTHER, SETTINGS))
    assert "| moda, lora: IoU | 67.00 | 73.50 | 6.00 | 6.00 | 10.00 | 66.00 | 20.00 | 72.00 |" in text
    assert "| without training: IoU | 30.00 |" in text
    assert "75.0 % of the test images went to their own domain, 12.5 % to the plain model" in text
    assert "50.0 % of the natural ones" in text


@pytest.mark.parametrize(("stream", "difference"), [("generated", "generated and small"), ("cosam", "the splits")])
def test_published_figures_come_with_what_differs(stream, difference):
    text = published_table(stream)
    assert "| HQ-SAM, MoDA | 75.20 | 74.90 | 0.28 |" in text
    assert difference in text


def test_a_report_holds_nothing_of_an_earlier_one(tmp_path):
    write_report(tmp_path, make_results(HISTORY, FURTHER, SETTINGS))
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json",
        "results.md",
        "matrix.png",
        "course.png",
        "confusion.png",
    }
    results = make_results(HISTORY, {**FURTHER, "oracle": {}}, {**SETTINGS, "method": "sequential"})
    write_report(tmp_path, results)
    assert not (tmp_path / "confusion.png").exists()
    assert json.loads((tmp_path / "results.json").read_text()) == results
