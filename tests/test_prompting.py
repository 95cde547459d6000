"""What a promptable model is asked in training and in evaluation."""

import pytest
import torch
from transformers import SamModel

from peft_talora.continual.prompting import POINTS, PROMPTS, SURE, TrainingPrompts, ask, rough_masks


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
    prompts, batch = TrainingPrompts(PROMPTS, mask_size=16), make_batch(1)
    kinds = [prompts(batch, step)["prompt"] for step in range(400)]
    assert all(70 <= kinds.count(kind) <= 130 for kind in PROMPTS)


def test_rough_masks_differ_from_the_true_ones_near_the_outline_alone():
    masks = torch.zeros(4, 1, 64, 64, dtype=torch.bool)
    masks[:, :, 16:48, 20:44] = True
    found = rough_masks(masks, 32, torch.Generator().manual_seed(0))
    assert found.shape == (4, 1, 32, 32)
    assert found.abs().eq(SURE).all()
    wrong = (found > 0) != masks[:, :, ::2, ::2]
    assert not wrong[:, :, 11:21, 13:19].any()  # two cells off the outline, inside
    far = torch.ones(32, 32, dtype=torch.bool)
    far[6:26, 8:24] = False
    assert not (wrong & far).any()
    assert wrong.flatten(1).any(1).all()
    assert 0.02 < wrong.float().mean() / masks.float().mean() < 0.5
    assert len({tuple(row.flatten().tolist()) for row in wrong}) == 4


def test_a_mask_prompt_is_a_function_of_seed_and_step_and_the_model_takes_it(sam_folder):
    sam = SamModel.from_pretrained(sam_folder)
    size = 4 * sam.config.prompt_encoder_config.image_embedding_size
    side = sam.config.vision_config.image_size
    batch = {"pixel_values": torch.randn(2, 3, side, side), "masks": torch.zeros(2, 1, side, side, dtype=torch.bool)}
    batch["masks"][:, :, 10:30, 12:40] = True
    prompts = TrainingPrompts(["mask"], mask_size=size)
    asked = prompts(batch, 5)
    assert torch.equal(prompts(batch, 5)["mask_prompts"], asked["mask_prompts"])
    assert not torch.equal(prompts(batch, 6)["mask_prompts"], asked["mask_prompts"])
    with torch.no_grad():
        said = sam(**ask(asked, "mask")).pred_masks
        assert said.shape == (2, 1, 1, size, size)
        assert not torch.equal(said, sam(**ask(asked, "none")).pred_masks)
    with pytest.raises(ValueError, match="got 2 of an image"):
        rough_masks(batch["masks"].repeat(1, 2, 1, 1), size, torch.Generator())
    with pytest.raises(ValueError, match="mask_size is None"):
        TrainingPrompts(["mask"])


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
    with pytest.raises(ValueError, match="allowed: one or more of box, points, mask, none"):
        TrainingPrompts(kinds)
