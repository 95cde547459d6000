"""What a promptable model is asked in training and in evaluation."""

import pytest
import torch

from peft_talora.continual.prompting import POINTS, PROMPTS, TrainingPrompts, ask


def make_batch(count: int = 3) -> dict:
    masks = torch.zeros(count, 1, 20, 24, dtype=torch.bool)
    for row in range(count):
        masks[row, 0, 2 + row : 9, 5 : 8 + 2 * row] = True
    return {
        "pixel_values": torch.zeros(count, 3, 20, 24),
        "masks": masks,
        "boxes": torch.arange(4.0 * count).view(count, 1, 4),
        "names": [str(row) for row in range(count)],
    }


def test_points_lie_inside_and_are_a_function_of_seed_and_step():
    batch, prompts = make_batch(), TrainingPrompts(["points"], seed=3)
    state = torch.get_rng_state()
    asked = prompts(batch, 7)
    assert torch.equal(torch.get_rng_state(), state)
    points = asked["points"].long()
    assert points.shape == (3, 1, POINTS, 2)
    for row in range(3):
        x, y = points[row, 0].unbind(1)
        assert batch["masks"][row, 0, y, x].all()
        assert len({*zip(x.tolist(), y.tolist(), strict=True)}) > 1
    assert torch.equal(prompts(batch, 7)["points"], asked["points"])
    assert not torch.equal(prompts(batch, 8)["points"], asked["points"])
    assert not torch.equal(TrainingPrompts(["points"], seed=4)(batch, 7)["points"], asked["points"])
    assert "points" not in batch


def test_each_kind_of_prompt_is_as_frequent_as_the_others():
    prompts, batch = TrainingPrompts(PROMPTS), make_batch(1)
    kinds = [prompts(batch, step)["prompt"] for step in range(300)]
    assert all(70 <= kinds.count(kind) <= 130 for kind in PROMPTS)


def test_a_call_has_what_its_prompt_needs_and_no_more():
    batch = TrainingPrompts(["points"])(make_batch(), 0)
    given = {"pixel_values", "multimask_output"}
    assert ask(batch, "none").keys() == given
    box = ask(batch, "box")
    assert box.keys() == given | {"input_boxes"}
    assert box["input_boxes"] is batch["boxes"]
    points = ask(batch, "points")
    assert points.keys() == given | {"input_points", "input_labels"}
    assert points["input_labels"].shape == points["input_points"].shape[:3]
    assert points["input_labels"].eq(1).all()


@pytest.mark.parametrize("kinds", [[], ["box", "song"]])
def test_unknown_prompts_are_refused(kinds):
    with pytest.raises(ValueError, match="allowed: one or more of box, points, none"):
        TrainingPrompts(kinds)
