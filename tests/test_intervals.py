"""Intervals against printed tables and figures worked out by hand."""

import pytest

from peft_talora.benchmark.intervals import mean_interval, t_quantile

# Student's t, 97.5 %, from printed tables.
PRINTED = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045, 120: 1.980}


@pytest.mark.parametrize(("freedom", "value"), PRINTED.items())
def test_quantiles_are_those_of_printed_tables(freedom, value):
    assert t_quantile(0.975, freedom) == pytest.approx(value, abs=5e-4)
    assert t_quantile(0.5, freedom) == pytest.approx(0, abs=1e-9)


def test_an_interval_by_hand():
    mean, (low, high) = mean_interval([1.0, 2.0, 6.0])  # s² = (4 + 1 + 9) / 2 = 7, s / √3 = 1.5275
    assert mean == 3
    assert high - mean == pytest.approx(4.3027 * 1.5275, rel=1e-4)
    assert mean - low == pytest.approx(high - mean)


def test_one_run_has_no_interval_and_equal_runs_have_none_to_speak_of():
    assert mean_interval([4.0]) == (4.0, None)
    assert mean_interval([4.0, 4.0]) == (4.0, (4.0, 4.0))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="empty"):
        mean_interval([])
    with pytest.raises(ValueError, match=r"allowed: 0\.5 to below 1"):
        t_quantile(1.0, 3)
