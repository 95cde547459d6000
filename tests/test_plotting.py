"""Pictures of predictions: what is where, and in which colours."""

import numpy as np
import pytest
import torch

from peft_talora import draw_predictions, make_task
from peft_talora.plotting import class_colours, draw_curves, paint

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
