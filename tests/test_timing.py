"""Timing: rounds that count, ratios, peaks that are those of the call."""

import sys

import numpy as np
import pytest
import torch

from peft_talora.benchmark.timing import last_line_of, median, percentiles, resident_peak, time_in_turns

CPU = torch.device("cpu")


def test_every_round_has_all_runs_and_the_first_ones_do_not_count():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    taken = time_in_turns(runs, 3, CPU, uncounted=1)
    assert calls == ["a", "b"] * 4
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 3, "b": 3}
    assert (taken["a"] >= 0).all()


def test_more_work_takes_more_time():
    x = torch.randn(200, 200)
    runs = {"one": lambda: x @ x, "twenty": lambda: [x @ x for _ in range(20)]}
    taken = time_in_turns(runs, 5, CPU)
    assert median(taken["twenty"]) > 3 * median(taken["one"])


def test_median_and_percentiles():
    values = np.arange(11.0)
    assert median(values) == 5
    assert percentiles(values) == [1, 9]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_is_what_the_second_call_needs(tmp_path):
    """64 MiB that live inside the call, beside 128 MiB that were there before."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from peft_talora.benchmark.timing import resident_peak\n"
        "kept = torch.ones(2**25)\n"
        "print(resident_peak(lambda: torch.ones(int(sys.argv[1])).sum()))\n"
    )
    assert float(last_line_of(str(script), [str(2**24)])) == pytest.approx(64, abs=4)
    assert resident_peak(lambda: None) < 4
