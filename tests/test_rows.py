"""Rows of parquet files, kept or streamed: the same samples, and the order is that of seed and epoch."""

import shutil
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Array2D, Array3D, Dataset, Features, Image, Value
from format_cases import write_parquet

from peft_talora.benchmark.protocols import NYUV2_13
from peft_talora.data import FORMATS, BadSample, Column, JointAugmentation, open_stream, open_table, readable
from peft_talora.data.rows import BUFFER, count_rows
from peft_talora.tasks import make_task

TASKS, COLUMNS = NYUV2_13.tasks, FORMATS["nyuv2-13"].columns
DEPTH = [make_task("depth", 1)]
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
    assert count_rows(str(tmp_path / "new"), "train") == [3, 2]
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


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Three files of ninety rows in all, whose depth is their number; images of eight bits, some broken."""
    folder = tmp_path_factory.mktemp("numbered") / "set"
    features = Features(
        {
            "image": Image(),
            "depth": Array2D((2, 2), "float32"),
            "normal": Array3D((3, 2, 2), "uint8"),
            "name": Value("string"),
        }
    )
    rows = []
    for number in range(90):
        encoded = BytesIO()
        PIL.Image.fromarray(np.full((2, 2, 3), number, dtype=np.uint8)).save(encoded, "png")
        rows.append(
            {
                "image": {"bytes": encoded.getvalue()[: 40 if number == 89 else None], "path": None},
                "depth": None if number == 88 else np.full((2, 2), number, dtype=np.float32),
                "normal": np.array([0, 128, 128], dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2),
                "name": f"row {number}",
            }
        )
    table = Dataset.from_list(rows, features=features)
    (folder / "data").mkdir(parents=True)
    for shard in range(3):
        table.shard(3, shard).to_parquet(folder / "data" / f"train-{shard:05d}-of-00003.parquet")
    return str(folder)


def numbers(samples):
    return [int(sample["labels"]["depth"][0, 0]) for sample in samples]


def test_files_and_rows_are_shuffled_and_what_is_held_out_is_not_among_them(numbered):
    """With more rows than are shuffled at a time, over the border of two files."""
    stream = open_stream(numbered, "train", DEPTH, FORMATS["nyuv2-13"].columns, PLAIN, seed=3, skip=5, most=80)
    assert len(stream) == 80 > BUFFER
    begun = set()
    for epoch in range(6):
        stream.set_epoch(epoch)
        found = numbers(stream)
        assert sorted(found) == list(range(5, 85))
        begun |= set(found[:3])
    assert max(begun) > 5 + BUFFER, "any file may be the first"
    whole = open_stream(numbered, "train", DEPTH, FORMATS["nyuv2-13"].columns, PLAIN, most=85)
    assert len(whole) > BUFFER
    assert sorted(numbers(whole)) == list(range(85))


@pytest.mark.parametrize("streamed", [False, True])
def test_values_are_those_that_were_written(numbered, streamed):
    columns = FORMATS["nyuv2-13"].columns
    tasks = [*DEPTH, make_task("normals", 3)]
    kept = open_table(numbered, "train", tasks, columns, streamed=streamed)
    assert len(kept) == 90
    assert len(open_table(numbered, "train", tasks, columns, streamed=streamed, most=4)) == 4
    assert kept[7]["name"] == "row 7"
    assert torch.equal(kept[7]["image"], torch.full((3, 2, 2), 7 / 255))
    assert kept[7]["labels"]["normals"][:, 0, 0].tolist() == pytest.approx([-1, 0, 0], abs=0.01), "of eight bits"
    assert set(kept[88]["labels"]) == {"normals"}, "an array that is not there is no label"
    with pytest.raises(BadSample, match="row 89, column 'image'"):
        kept[89]
    assert len(readable(kept)[1]) == 1


def test_rows_are_fetched_anew_when_their_files_change(tmp_path):
    folder = tmp_path / "set"
    write_parquet(folder, {"val": 2}, shards=1)
    assert len(open_table(str(folder), "val", TASKS, COLUMNS, streamed=True)) == 2
    shutil.rmtree(folder)
    write_parquet(folder, {"val": 3}, shards=1)
    assert len(open_table(str(folder), "val", TASKS, COLUMNS, streamed=True)) == 3


def test_augmentation_is_that_of_seed_epoch_and_place(table):
    stream = open_stream(table, "train", TASKS, COLUMNS, JointAugmentation(TASKS), seed=2)
    first, again = list(stream), list(stream)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    plain = list(open_stream(table, "train", TASKS, COLUMNS, PLAIN, seed=2))
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(first, plain, strict=True))


def test_what_cannot_be_opened_is_named(table, tmp_path):
    with pytest.raises(ValueError, match="has no labels of edges"):
        open_table(table, "train", [make_task("edges", 1)], COLUMNS)
    with pytest.raises(
        ValueError, match=r"\(train\) has no columns nromal; it has image, segmentation, depth, normal"
    ):
        open_table(table, "train", [make_task("normals", 3)], {"normals": Column("nromal")})
    with pytest.raises(ValueError, match="has no columns rgb"):
        open_stream(table, "train", TASKS, COLUMNS, PLAIN, image="rgb")
    with pytest.raises(ValueError, match="with the split 'test'"):
        open_table(table, "test", TASKS, COLUMNS)
    with pytest.raises(ValueError, match=r"nobody/nothing cannot be read as a data set"):
        open_table("nobody/nothing", "train", TASKS, COLUMNS)
    assert np.array_equal(open_table(table, "val", TASKS, COLUMNS)[1]["labels"]["depth"].shape, (6, 8))
