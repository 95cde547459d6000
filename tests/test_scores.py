"""Scores of masks, and of a stream: against numbers worked out by hand and those of a published run."""

import pytest
import torch

from peft_talora.continual.scores import (
    MaskScores,
    average,
    boundary_iou,
    forgetting,
    forward_transfer,
    last,
)

# IoU in percent of a released sequential run over CoSAM's eight domains, after each of them.
PUBLISHED = [
    [75.8, 76.6, 67.8, 49.0, 40.7, 33.1, 29.0, 16.6],
    [74.3, 75.4, 67.2, 46.7, 37.8, 26.3, 10.6, 5.7],
    [73.6, 76.5, 66.7, 51.9, 35.6, 17.8, 4.6, 4.5],
    [66.8, 66.8, 58.5, 71.8, 80.0, 75.3, 65.6, 67.2],
    [70.3, 67.5, 59.5, 69.2, 84.5, 74.5, 65.6, 76.7],
    [67.8, 72.6, 59.1, 67.7, 81.7, 80.6, 64.8, 74.1],
    [71.7, 76.5, 64.1, 67.0, 82.3, 72.8, 71.0, 72.7],
    [68.6, 77.8, 64.4, 64.6, 82.1, 69.2, 67.5, 78.7],
]


def test_the_published_run_has_its_published_figures():
    assert last(PUBLISHED) == pytest.approx(71.61, abs=0.005)
    assert average(PUBLISHED) == pytest.approx(71.81, abs=0.005)
    assert forgetting(PUBLISHED) == pytest.approx(4.67, abs=0.005)
    assert forgetting(PUBLISHED, "ever") == pytest.approx(4.86, abs=0.005)
    assert forgetting(PUBLISHED, "when_learnt") == pytest.approx(4.51, abs=0.005)


def test_figures_of_a_stream_by_hand():
    R = torch.tensor([[60.0, 10.0, 0.0], [70.0, 50.0, 20.0], [40.0, 55.0, 80.0]])
    assert last(R) == pytest.approx(175 / 3)
    assert average(R) == pytest.approx((60 + 60 + 175 / 3) / 3)
    assert forgetting(R) == pytest.approx((30 - 5) / 2)
    assert forgetting(R, "ever") == pytest.approx(30 / 2)
    assert forgetting(R, "when_learnt") == pytest.approx((20 - 5) / 2)
    assert forward_transfer(R, [99.0, 12.0, 15.0]) == pytest.approx((-2 + 5) / 2)


def test_a_stream_that_is_not_at_its_end():
    R = [[60.0, 10.0, 0.0], [50.0, 50.0, 20.0]]
    assert last(R) == pytest.approx(40)
    assert average(R) == pytest.approx(55)
    assert forgetting(R) == pytest.approx(10)
    assert forward_transfer(R, [0.0, 0.0, 0.0]) == pytest.approx(15)


def test_one_domain_and_one_stage_forget_nothing():
    for R in ([[70.0]], [[70.0, 80.0]]):
        assert [forgetting(R, best) for best in ("before_last", "ever", "when_learnt")] == [0, 0, 0]
    assert forward_transfer([[70.0]], [50.0]) == 0
    assert last([[70.0, 80.0]]) == 75


@pytest.mark.parametrize(
    ("R", "words"),
    [
        ([1.0, 2.0], r"R: got shape \(2,\)"),
        ([[1.0], [2.0]], r"R: got shape \(2, 1\)"),
        ([[1.0, float("nan")]], "R: got nan"),
    ],
)
def test_what_is_no_matrix_is_refused(R, words):
    for score in (last, average, forgetting):
        with pytest.raises(ValueError, match=words):
            score(R)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="best: got 'diagonal'; allowed are 'before_last'"):
        forgetting(PUBLISHED, "diagonal")
    with pytest.raises(ValueError, match=r"zero_shot: got shape \(2,\); R has 8 domains"):
        forward_transfer(PUBLISHED, [1.0, 2.0])


def square(top, left, side, size=(40, 30)):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_boundary_iou_by_hand():
    """40 × 30 pixels have a diagonal of 50: a band of one pixel."""
    one, moved = square(10, 5, 10), square(10, 6, 10)
    # Each outline has 36 pixels; rows 10 and 19 share 9 each, and no column of one is a column of the other but where
    # these rows cross it.
    assert boundary_iou(one[None], moved[None]).item() == pytest.approx(18 / (36 + 36 - 18))
    full = torch.ones(1, 40, 30, dtype=torch.bool)
    assert boundary_iou(full, full & ~square(1, 1, 28)[None]).item() < 1, "the border of the image is an outline"
    hollow = full.clone()
    hollow[:, 1:-1, 1:-1] = False
    assert boundary_iou(full, hollow).item() == 1


def test_the_band_is_two_percent_of_the_diagonal():
    full = torch.ones(1, 300, 400, dtype=torch.bool)  # diagonal 500: 10 pixels
    for width, equal in ((9, False), (10, True), (11, False)):
        ring = full.clone()
        ring[:, width:-width, width:-width] = False
        assert (boundary_iou(full, ring).item() == 1) == equal


def test_boundary_iou_equals_that_of_eroded_masks():
    """Against an erosion of one pixel at a time, on ragged masks."""
    masks = torch.rand(6, 60, 80, generator=torch.Generator().manual_seed(0)) < 0.9  # diagonal 100: 2 pixels

    def outline(mask):
        inner = torch.nn.functional.pad(mask, (1, 1, 1, 1))
        for _ in range(2):
            H, W = inner.shape
            padded = torch.nn.functional.pad(inner, (1, 1, 1, 1), value=True)
            inner = torch.stack([padded[y : y + H, x : x + W] for y in range(3) for x in range(3)]).all(0)
        return mask & ~inner[1:-1, 1:-1]

    outlines = torch.stack([outline(mask) for mask in masks])
    common = (outlines[:3] & outlines[3:]).sum((1, 2)) / (outlines[:3] | outlines[3:]).sum((1, 2))
    torch.testing.assert_close(boundary_iou(masks[:3], masks[3:]), common)


def test_empty_masks_are_never_nan():
    empty, some = torch.zeros(1, 40, 30, dtype=torch.bool), square(3, 3, 5)[None]
    scores = MaskScores()
    for mask, target in ((empty, empty), (empty, some), (some, empty), (some, some)):
        scores.update(mask, target)
    assert scores.iou == [100, 0, 0, 100]
    assert scores.boundary_iou == [100, 0, 0, 100]


def test_scores_are_means_over_images_and_not_over_masks():
    scores = MaskScores()
    one = square(10, 5, 10)
    scores.update(torch.stack([one, ~one]), torch.stack([one, one]))  # 100 and 0
    scores.update(one[None], one[None])
    assert scores.iou == [50, 100]
    assert scores.compute() == {"iou": 75, "boundary_iou": pytest.approx((scores.boundary_iou[0] + 100) / 2)}


def test_scores_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no image was added"):
        MaskScores().compute()
    with pytest.raises(ValueError, match=r"got \(1, 4, 4\) and targets \(4, 4\)"):
        MaskScores().update(torch.ones(1, 4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool))
