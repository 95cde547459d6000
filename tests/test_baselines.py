"""What a segmentation must beat, worked out by hand."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import torch

recipe = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "recipes" / "baselines.py")))


def test_the_majority_is_taken_per_position_and_ignored_pixels_do_not_count():
    labels = [torch.tensor([[0, 1, 255]]), torch.tensor([[0, 2, 255]]), torch.tensor([[1, 2, 2]])]
    majority = recipe.majority_per_position(labels, 3)
    assert majority.tolist() == [[0, 2, 2]]
    # Of 7 labelled pixels 5 are right. IoU: class 0 2/3, class 1 0/2, class 2 3/4.
    figures = recipe.figures_of(majority, labels, 3)
    assert figures["pixel_accuracy"] == 5 / 7
    assert abs(figures["miou"] - (2 / 3 + 0 + 3 / 4) / 3) < 1e-6
