"""Rows become samples: what is in which column, and how it is translated."""

import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from peft_talora.data import BadSample, Column, ColumnDataset, read_column_map
from peft_talora.tasks import make_task

H, W = 4, 5
SEGMENTATION, DEPTH, NORMALS, SALIENCY = (
    make_task(name, channels)
    for name, channels in {"segmentation": 3, "depth": 1, "normals": 3, "saliency": 1}.items()
)
IMAGE = np.random.default_rng(0).random((H, W, 3), dtype=np.float32)


def label(task, column, value):
    rows = [{"image": IMAGE, "there": value}]
    return ColumnDataset(rows, [task], {task.name: column}, source="table")[0]["labels"][task.name]


def test_images_in_every_form_are_the_same():
    pixels = (IMAGE * 255).round().astype(np.uint8)
    encoded = BytesIO()
    Image.fromarray(pixels).save(encoded, "png")
    forms = [pixels, pixels.transpose(2, 0, 1), Image.fromarray(pixels), {"bytes": encoded.getvalue(), "path": None}]
    forms += [pixels.transpose(2, 0, 1) / np.float32(255), pixels.tolist()]
    dataset = ColumnDataset([{"image": form} for form in forms[:5]], [DEPTH], {"depth": Column("depth")})
    for sample in dataset:
        assert np.array_equal(sample["image"], pixels.transpose(2, 0, 1) / np.float32(255))
    assert [sample["name"] for sample in dataset] == ["0", "1", "2", "3", "4"]
    assert not dataset[0]["labels"]["depth"].any(), "no task has a label: the first one's has no labelled pixel"
    with pytest.raises(BadSample, match=r"row 0, column 'image' has values from \d+ to 2\d\d; allowed: uint8"):
        ColumnDataset([{"image": forms[5]}], [DEPTH], {"depth": Column("depth")})[0]


def test_classes_are_renumbered_and_ignored():
    ids = np.array([[7, 11, 255, -1, 8]] * H)
    column = Column("there", classes={7: 0, 11: 2, 8: 1}, ignored=(8,))
    assert label(SEGMENTATION, column, ids)[0].tolist() == [0, 2, 255, 255, 255]
    assert label(SEGMENTATION, Column("there", ignored=(0, -1)), ids % 3 - 1)[0].tolist() == [255, 1, 255, 1, 1]
    assert label(SEGMENTATION, Column("there"), (ids % 3).astype(np.float32)[None])[0].tolist() == [1, 2, 0, 2, 2]


def test_depth_is_scaled_to_metres():
    millimetres = np.array([[0, 1500, 2, 3, 4]] * H, dtype=np.uint16)
    for value in (millimetres, millimetres[..., None], Image.fromarray(millimetres)):
        assert label(DEPTH, Column("there", scale=0.001), value)[0, :2].tolist() == pytest.approx([0, 1.5])


def test_normals_are_turned_and_renormalised():
    vectors = np.zeros((3, H, W), dtype=np.float32)
    vectors[0, :, 0], vectors[1, :, 1], vectors[2, :, 2] = 0.9, 1.1, 0.05
    found = label(NORMALS, Column("there", signs=(1, -1, -1)), vectors)
    assert found[:, 0, :3].T.tolist() == [[1, 0, 0], [0, -1, 0], [0, 0, 0]], "what is shorter than 0.1 is unknown"
    eight_bits = np.round((vectors.transpose(1, 2, 0) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    assert label(NORMALS, Column("there"), eight_bits)[0, 0, 0] == pytest.approx(1, abs=1e-4)


def test_masks_by_a_threshold():
    grey = np.array([[0, 127, 128, 255, 1]] * H)
    assert label(SALIENCY, Column("there", threshold=127.5), grey)[0].tolist() == [0, 0, 1, 1, 0]
    assert label(SALIENCY, Column("there", threshold=127.5, ignored=(255,)), grey)[0].tolist() == [0, 0, 1, 255, 0]
    with pytest.raises(BadSample, match="holds nan; allowed: finite"):
        label(SALIENCY, Column("there", threshold=0.5), np.full((H, W), np.nan))


@pytest.mark.parametrize(
    ("task", "value", "words"),
    [
        (SEGMENTATION, np.full((H, W), 3), r"holds 3; allowed"),
        (SEGMENTATION, np.full((H, W), 0.5), "holds float64; allowed: integer"),
        (SEGMENTATION, np.zeros((H, W + 1), dtype=int), r"is \(4, 6\); allowed: \(4, 5\)"),
        (SEGMENTATION, np.zeros((2, H, W), dtype=int), r"has the shape \(2, 4, 5\)"),
        (DEPTH, np.full((H, W), np.inf), "holds inf; allowed: finite"),
        (DEPTH, Image.new("RGB", (W, H)), "of mode RGB"),
        (DEPTH, {"bytes": b"no image", "path": None}, "cannot identify"),
        (DEPTH, {"other": 1}, "dict without a shape"),
        (NORMALS, np.zeros((2, H, W)), r"shape \(2, 4, 5\)"),
    ],
)
def test_what_is_not_allowed_is_named_with_row_and_column(task, value, words):
    with pytest.raises(BadSample, match="table, row 0, column 'there'") as caught:
        label(task, Column("there"), value)
    assert re.search(words, str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"scale": 0}, "scale of the column 'a': 0; allowed: a positive number"),
        ({"scale": "mm"}, "scale of the column 'a': 'mm'"),
        ({"signs": (1, 2, 1)}, r"signs of the column 'a': \(1, 2, 1\); allowed: three of 1 and -1"),
        ({"ignored": 0}, "ignored of the column 'a': 0; allowed: a list of ids"),
        ({"ignored": ("0",)}, r"ignored and classes of the column 'a': \('0',\), None; allowed: ids that are whole"),
        ({"classes": {"1": 0}}, "allowed: ids that are whole numbers"),
        ({"classes": (1,)}, "classes of the column 'a'.*a mapping from id to id"),
        ({"threshold": "half"}, "threshold of the column 'a': 'half'"),
        ({"threshold": 0.5, "classes": {1: 0}}, "threshold and classes of the column 'a': 0.5, .*one of them"),
        ({"inverse": 1}, "inverse of the column 'a': 1; allowed: true or false"),
    ],
)
def test_bad_columns_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Column("a", **wrong)


@pytest.mark.parametrize(
    ("task", "column", "words"),
    [
        (DEPTH, Column("a", ignored=(0,)), r"'depth': ignored of the column 'a' is \(0,\), but .* by inverse, scale"),
        (NORMALS, Column("a", scale=2.0), "labels of normals are translated by signs alone"),
        (SEGMENTATION, Column("a", threshold=0.5), "labels of segmentation are translated by classes, ignored alone"),
    ],
)
def test_what_a_kind_of_label_does_not_heed_is_refused(task, column, words):
    with pytest.raises(ValueError, match=words):
        ColumnDataset([], [task], {task.name: column})


def test_tasks_and_images_without_a_column_are_named():
    with pytest.raises(ValueError, match="table has no labels of depth; it has those of normals"):
        ColumnDataset([], [DEPTH], {"normals": Column("a")}, source="table")
    with pytest.raises(BadSample, match="column 'rgb' is missing; the row has image"):
        ColumnDataset([{"image": IMAGE}], [DEPTH], {"depth": Column("depth")}, image="rgb")[0]


def test_a_map_of_columns_from_a_file(tmp_path):
    file = tmp_path / "map.yaml"
    file.write_text(
        "image: rgb\ntasks:\n  depth: {column: depth_map, scale: 0.001}\n"
        "  segmentation: {column: mask, ignored: [0], classes: {1: 0, 7: 1}}\n"
    )
    columns, image = read_column_map(file)
    assert image == "rgb"
    assert columns == {
        "depth": Column("depth_map", scale=0.001),
        "segmentation": Column("mask", ignored=(0,), classes={1: 0, 7: 1}),
    }
    for text, words in (
        ("tasks: [depth]", "is no map of columns"),
        ("tasks: {}\nmore: 1", "is no map of columns"),
        ("tasks: {depth: {scale: 1}}", "task 'depth' is .*allowed: classes, column, ignored"),
        ("tasks: {depth: {column: a, unit: mm}}", "task 'depth'"),
        ("tasks: {depth: {column: a, scale: mm}}", "map.yaml: task 'depth': scale of the column 'a': 'mm'"),
        ("tasks: {depth: {column: a, signs: 1}}", "map.yaml: task 'depth'"),
        ("tasks: [", "is no YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_column_map(file)
