"""The recipe that measures reading: every way reads the same rows."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

RECIPE = Path(__file__).parent.parent / "recipes" / "benchmark_reading.py"


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(RECIPE)])
    threads = torch.get_num_threads()
    yield runpy.run_path(str(RECIPE))
    torch.set_num_threads(threads)


def test_every_way_reads_all_rows(recipe, tmp_path):
    args = recipe["ReadingArguments"](rows=3, epochs=2, shards=2, work_dir=str(tmp_path))
    recipe["generate"](args)
    files = sorted((tmp_path / "rows-3").rglob("*.parquet"))
    assert len(files) == 2
    recipe["generate"](args)
    assert sorted((tmp_path / "rows-3").rglob("*.parquet")) == files
    for way in recipe["WAYS"]:
        args.measure = way
        found = json.loads(json.dumps(recipe["measure"](args)))
        assert len(found["rows_per_second"]) == len(found["resident_mib"]) == 2
        assert min(found["rows_per_second"]) > 0
    args.measure = "by hand"
    with pytest.raises(ValueError, match="`measure` is 'by hand'; allowed: streamed, kept, npy files"):
        recipe["measure"](args)


def test_rows_and_files_are_the_same_samples(recipe, tmp_path):
    args = recipe["ReadingArguments"](rows=2, shards=1, work_dir=str(tmp_path))
    recipe["generate"](args)
    root, published = tmp_path / "rows-2", recipe["FORMAT"]
    of_rows, of_files = (published.open(root / name, "train", published.tasks) for name in ("parquet", "files"))
    for row, file in zip(of_rows, of_files, strict=True):
        assert np.array_equal(row["image"], file["image"])
        for name, label in row["labels"].items():
            assert np.array_equal(label, file["labels"][name]), name
