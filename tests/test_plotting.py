"""Pictures of predictions: what is where, and in which colours."""

import numpy as np
import pytest
import torch

from peft_talora import draw_predictions, make_task
from peft_talora.plotting import _Scatter, class_colours, draw_curves, draw_scatter, paint

TASKS = [make_task("segmentation", 4), make_task("depth", 1), make_task("normals", 3), make_task("edges", 1)]


def sample_and_logits(height, width, missing=()):
    generator = torch.Generator().manual_seed(height)
    labels = {
        "segmentation": torch.randint(0, 4, (height, width), generator=generator),
        "depth": torch.rand(height, width, generator=generator) + 0.5,
        "normals": torch.tensor([0.0, 0.0, -1.0])[:, None, None].expand(3, height, width),
        "edges": torch.randint(0, 2, (height, width), generator=generator),
    }
    sample = {
        "image": torch.rand(3, height, width, generator=generator),
        "labels": {name: label for name, label in labels.items() if name not in missing},
        "name": "a",
    }
    logits = {task.name: torch.randn(task.out_channels, height, width, generator=generator) for task in TASKS}
    return sample, logits


def test_a_row_per_image_and_columns_for_input_labels_and_predictions():
    samples, logits = zip(sample_and_logits(20, 30), sample_and_logits(40, 30, missing=["depth"]), strict=True)
    page = draw_predictions(TASKS, samples, logits, height=40)
    assert page.height == 44 + 2 * (40 + 6)
    assert page.width >= 9 * 60
    pixels = np.asarray(page)
    rows = pixels[44 + 40 + 6 : 44 + 80 + 6]
    assert (rows == 128).all(-1).any(), "a missing label is drawn grey"


def test_class_colours_are_distinct():
    colours = class_colours(40).astype(int)
    distances = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(40, dtype=int)
    assert distances.min() > 10


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_unlabelled_pixels_are_grey(task):
    label = task.empty_label((5, 7))
    picture = paint(task, label.clamp(max=1), torch.zeros(5, 7, dtype=torch.bool), (0.0, 1.0))
    assert picture.shape == (5, 7, 3)
    assert (picture == 128).all()


def test_a_wall_seen_head_on_is_blue_as_normal_maps_are():
    normals = torch.tensor([0.0, 0.0, -1.0])[:, None, None].expand(3, 2, 2)
    picture = paint(TASKS[2], normals, torch.ones(2, 2, dtype=torch.bool), (0.0, 1.0))
    assert picture[0, 0].tolist() == [127, 127, 255]


def test_curves_run_from_the_upper_left_to_where_the_axis_ends():
    falling = [(1, 0.5), (4, 0.01), (8, 0.0)]
    page = np.asarray(draw_curves({"falling": falling, "flat": [(1, 0.5), (8, 0.5)]}, "Error", "rank")).astype(int)
    assert page.shape == (360, 640, 3)
    first, second = class_colours(4)[::-1][:2].astype(int)
    places = [np.argwhere(np.abs(page[:, :540] - colour).sum(-1) < 40) for colour in (first, second)]
    assert np.ptp(places[1][:, 0]) < 12, "a flat curve is flat"
    assert places[0][:, 0].max() - places[1][:, 0].max() > 200, "the other ends at the bottom"
    assert places[0][places[0][:, 0].argmax(), 1] > 520, "on the right"


POINTS = {
    "heads": (0, -14.0, (-15.2, -12.8)),
    "ours": (160_000, 0.9, (-0.4, 2.2)),
    "shared": (170_000, 0.7, None),
    "full": (2_700_000, 0.0, (0.0, 0.0)),
}


def test_points_lie_by_the_logarithm_and_nothing_trained_lies_left_of_the_axis():
    scatter = _Scatter(POINTS)
    columns = [scatter.place(x, y)[0] for x, y, _ in POINTS.values()]
    assert columns == sorted(columns)
    assert scatter.left < columns[0] < scatter.begin < columns[1]
    steps = [scatter.place(x, 0)[0] for x in (1e5, 1e6, 1e7)]
    assert steps[1] - steps[0] == pytest.approx(steps[2] - steps[1])
    rows = [scatter.place(1, value)[1] for value in (-15.2, 0.0, 2.2)]
    assert scatter.bottom > rows[0] > rows[1] > rows[2] > scatter.top


def test_labels_cover_neither_points_nor_each_other():
    scatter = _Scatter(POINTS)
    boxes = scatter.draw_points()
    for index, one in enumerate(boxes):
        for other in boxes[index + 1 :]:
            assert not (one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3])
        for x, y, _ in POINTS.values():
            column, row = scatter.place(x, y)
            assert not (one[0] < column < one[2] and one[1] < row < one[3])


@pytest.mark.parametrize(
    "points",
    [POINTS, {"one": (0, 0.0, None)}, {"a": (5, 1.0, None), "b": (5, 1.0, None)}],
    ids=["few", "one", "equal"],
)
def test_a_scatter_is_drawn_whatever_the_range(points):
    page = np.asarray(draw_scatter(points, "gain", "parameters"))
    assert page.shape == (470, 780, 3)
    assert (page < 250).any()
