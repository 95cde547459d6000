"""Rows of parquet files, kept or streamed: the same samples, and the order is that of seed and epoch."""

import numpy as np
import pytest
import torch
from format_cases import write_parquet

from peft_talora.benchmark.protocols import NYUV2_13
from peft_talora.data import FORMATS, JointAugmentation, open_stream, open_table
from peft_talora.data.rows import count_rows
from peft_talora.tasks import make_task

TASKS, COLUMNS = NYUV2_13.tasks, FORMATS["nyuv2-13"].columns
PLAIN = JointAugmentation(TASKS, (1.0,), 0.0)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows") / "set"
    write_parquet(root, {"train": 9, "val": 3}, shards=3)
    return str(root)


def test_a_stream_has_every_row_once_in_an_order_of_its_epoch(table):
    kept = open_table(table, "train", TASKS, COLUMNS)
    stream = open_stream(table, "train", TASKS, COLUMNS, PLAIN, seed=1)
    assert len(stream) == 9
    first, again = list(stream), list(stream)
    stream.set_epoch(1)
    second = list(stream)

    def order(samples):
        return [next(i for i, k in enumerate(kept) if torch.equal(k["image"], s["image"])) for s in samples]

    assert sorted(order(first)) == sorted(order(second)) == list(range(9))
    assert order(first) == order(again) != order(second)
    for sample, place in zip(first, order(first), strict=True):
        for name, label in kept[place]["labels"].items():
            assert torch.equal(sample["labels"][name], label)


def test_the_files_themselves_say_how_many_rows_there_are(tmp_path):
    """Where nothing of the data set was kept yet."""
    write_parquet(tmp_path / "new", {"train": 5, "val": 3}, shards=2)
    assert count_rows(str(tmp_path / "new"), "train") == 5
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.csv").write_text("image\n1\n")
    with pytest.raises(ValueError, match="text does not say how many rows its split 'train' has"):
        count_rows(str(tmp_path / "text"), "train")


def test_rows_are_held_out_of_a_stream(table):
    held = open_table(table, "train[:4]", TASKS, COLUMNS)
    stream = open_stream(table, "train", TASKS, COLUMNS, PLAIN, skip=4)
    assert (len(held), len(stream), len(list(stream))) == (4, 5, 5)
    images = {sample["image"].numpy().tobytes() for sample in (*held, *stream)}
    assert len(images) == 9


def test_augmentation_is_that_of_seed_epoch_and_place(table):
    stream = open_stream(table, "train", TASKS, COLUMNS, JointAugmentation(TASKS), seed=2)
    first, again = list(stream), list(stream)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    plain = list(open_stream(table, "train", TASKS, COLUMNS, PLAIN, seed=2))
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(first, plain, strict=True))


def test_what_cannot_be_opened_is_named(table, tmp_path):
    with pytest.raises(ValueError, match="has no labels of edges"):
        open_table(table, "train", [make_task("edges", 1)], COLUMNS)
    with pytest.raises(ValueError, match="with the split 'test'"):
        open_table(table, "test", TASKS, COLUMNS)
    with pytest.raises(ValueError, match=r"nobody/nothing cannot be read as a data set"):
        open_table("nobody/nothing", "train", TASKS, COLUMNS)
    assert np.array_equal(open_table(table, "val", TASKS, COLUMNS)[1]["labels"]["depth"].shape, (6, 8))
