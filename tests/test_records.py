"""Records: they round-trip, and those that differ in more than they may are refused."""

import math
from dataclasses import replace

import pytest
from benchmark_cases import OURS, SETTINGS, record

from peft_talora.benchmark.records import check_record, read_comparable, read_record, write_record


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
