"""The recipe that checks a published data set: what it counts, names and hashes."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from format_cases import write_nyud, write_parquet, write_pascal

RECIPE = Path(__file__).parent.parent / "recipes" / "prepare.py"


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Call the recipe on the folder `data`; the exit code, and the lines that it printed."""

    def call(name):
        arguments = [str(RECIPE), name, "--data_root", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(RECIPE), run_name="__main__")
        return ended.value.code, capsys.readouterr().out.splitlines()

    return call


def test_all_is_read_counted_and_hashed(prepare, tmp_path):
    write_pascal(tmp_path / "data")
    code, lines = prepare("pascal-context")
    assert code == 1, "there are fewer images than published"
    assert lines[0].split() == [
        "split",
        "images",
        "published",
        "segmentation",
        "parts",
        "saliency",
        "normals",
        "edges",
    ]
    assert lines[1].split() == ["train", "2", "4998", "2", "1", "2", "2", "2"]
    assert lines[2].split() == ["val", "1", "5105", "1", "0", "1", "1", "1"]
    assert "split 'train' has 2 images, as published 4998" in lines[4]
    check = ["sha256sum", "--check", "--quiet", str(tmp_path / "out" / "pascal-context.sha256")]
    assert subprocess.run(check, cwd=tmp_path / "data").returncode == 0
    (tmp_path / "data" / "JPEGImages" / "2008_000008.jpg").write_bytes(b"")
    assert subprocess.run(check, cwd=tmp_path / "data", capture_output=True).returncode == 1


def test_what_is_missing_or_wrong_is_said(prepare, tmp_path):
    code, lines = prepare("nyud-40")
    assert code == 1
    assert "gt_sets is missing" in lines[1]
    assert "NYUD_MT.tgz" in lines[1]
    assert not (tmp_path / "out").exists()
    write_nyud(tmp_path / "data")
    depth = tmp_path / "data" / "depth" / "0003.npy"
    np.save(depth, np.full((6, 8), -1.0))
    code, lines = prepare("nyud-40")
    assert code == 1
    assert any(f"{depth}: label of task 'depth' holds -1.0" in line for line in lines)


def test_parquet(prepare, tmp_path):
    write_parquet(tmp_path / "data", {"train": 3, "val": 2})
    _, lines = prepare("nyuv2-13")
    assert lines[1].split()[:3] == ["train", "3", "795"]
    assert "4 files" in lines[3]
