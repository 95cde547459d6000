"""Figures of a set of test images, worked out by hand."""

import pytest
import torch

from peft_talora.continual.measuring import Answer, measure


class Images(torch.utils.data.Dataset):
    """Three images of 32 × 32 pixels, each with the mask of its left quarter."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if not 0 <= index < 3:
            raise IndexError(index)
        mask = torch.zeros(1, 32, 32, dtype=torch.bool)
        mask[..., :8] = True
        return {"image": torch.full((3, 32, 32), 0.5), "masks": mask, "name": str(index)}


def answer_of(widths, seen, domains=None):
    """Masks of the left `widths` columns of 32, one for each image asked for, in turn."""

    def answer(asked):
        seen.append(asked)
        count, begin = len(asked["pixel_values"]), sum(len(other["pixel_values"]) for other in seen[:-1])
        logits = torch.full((count, 1, 64, 64), -5.0)
        for row, width in enumerate(widths[begin : begin + count]):
            logits[row, ..., : 2 * width] = 5
        chosen = None if domains is None else domains[begin : begin + count]
        return Answer(logits, chosen, torch.arange(begin, begin + count))

    return answer


def test_figures_are_means_over_images_at_their_own_size():
    seen = []
    measured = measure(answer_of([8, 16, 0], seen), Images(), image_size=64, batch_size=2)
    assert measured.scores["iou"] == pytest.approx(100 * (1 + 0.5 + 0) / 3)
    assert 0 < measured.scores["boundary_iou"] < 100
    assert measured.chosen == {}
    assert measured.encoder_passes == 1
    assert [len(asked["pixel_values"]) for asked in seen] == [2, 1]
    assert all(asked["pixel_values"].shape[2:] == (64, 64) for asked in seen)
    assert seen[0]["input_boxes"][0, 0].tolist() == [0.5, 0.5, 14.5, 62.5]  # pixels 0 to 7, 0 to 31, twice as large


def test_a_box_is_asked_for_unless_there_is_to_be_no_prompt():
    seen = []
    measure(answer_of([8, 8, 8], seen), Images(), image_size=32)
    assert seen[0]["input_boxes"].shape == (3, 1, 4)
    seen = []
    measure(answer_of([8, 8, 8], seen), Images(), image_size=32, prompt="none")
    assert "input_boxes" not in seen[0]


def test_where_images_went_is_counted():
    measured = measure(answer_of([8, 8, 8], [], ["rails", "base", "rails"]), Images(), image_size=32, batch_size=2)
    assert measured.chosen == {"rails": 2, "base": 1}
