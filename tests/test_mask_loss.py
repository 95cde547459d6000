"""The loss at sampled points: which points, what is read there, and what the loss says."""

import pytest
import torch

from peft_talora.continual import mask_loss
from peft_talora.continual.mask_loss import PointLoss, read_points, sample_points
from peft_talora.losses import dice_loss

B, P = 2, 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def half_planes(side):
    """Masks (B, P, side, side) whose left parts are covered, each to another column."""
    columns = torch.arange(side)
    shares = torch.linspace(0.25, 0.75, B * P).view(B, P, 1, 1)
    return (columns < shares * side).expand(B, P, side, side)


def test_points_are_where_the_model_is_unsure():
    """Of a slope of logits through 0 at x = 0.5: three quarters near it, a quarter anywhere."""
    logits = torch.linspace(-8, 8, 64).expand(4, 1, 64, 64)
    points = sample_points(logits, 400, generator())
    assert points.shape == (4, 400, 2)
    away = (points[..., 0] - 0.5).abs()
    assert (away[:, :300] < 0.16).all(), "a quarter of those drawn is kept: an eighth to each side"
    assert (away[:, 300:] > 0.16).float().mean() > 0.5
    assert points[..., 1].mean().item() == pytest.approx(0.5, abs=0.03)
    assert points.amin() >= 0
    assert points.amax() <= 1


def test_one_point_is_an_even_one():
    assert sample_points(torch.zeros(2, 1, 8, 8), 1, generator()).shape == (2, 1, 2)


def test_values_lie_at_the_middles_of_pixels():
    values = torch.arange(12.0).view(1, 1, 3, 4)
    middles = torch.tensor([[(x + 0.5) / 4, (y + 0.5) / 3] for y in range(3) for x in range(4)])[None]
    torch.testing.assert_close(read_points(values, middles)[0, 0], torch.arange(12.0))
    between = torch.tensor([[[1 / 4, 0.5 / 3], [0.0, 0.0], [1.0, 1.0]]])
    torch.testing.assert_close(read_points(values, between)[0, 0], torch.tensor([0.5, 0.0, 11.0]))


def test_loss_is_cross_entropy_and_dice_at_the_points(monkeypatch):
    logits, masks = torch.randn(B, P, 16, 16, generator=generator(3)), half_planes(32)
    points = torch.rand(B * P, 50, 2, generator=generator(4))
    monkeypatch.setattr(mask_loss, "sample_points", lambda *_: points)
    z = read_points(logits.flatten(0, 1)[:, None], points)[:, 0]
    y = read_points(masks.flatten(0, 1)[:, None].float(), points)[:, 0]
    expected = (z.clamp(min=0) - z * y + torch.log1p((-z.abs()).exp())).mean()
    expected += sum(dice_loss(z[n, None], y[n, None]) for n in range(B * P)) / (B * P)
    torch.testing.assert_close(PointLoss(50)(logits, masks, step=7), expected)


def test_points_depend_on_seed_and_step_alone():
    logits, masks = torch.randn(B, P, 16, 16, generator=generator(3)), half_planes(16)
    state = torch.get_rng_state()
    values = [PointLoss(20, seed)(logits, masks, step) for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1), (1, 0))]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(values[0], values[1])
    assert len({value.item() for value in values}) == 4


def test_logits_and_masks_may_have_other_resolutions():
    """Right logits at a quarter of the resolution have nearly no loss, wrong ones a large one."""
    masks, logits = half_planes(64), 40 * half_planes(16).float() - 20
    loss = PointLoss(500)
    assert loss(logits, masks, 0) < 0.8, "only points on the outline"
    assert loss(-logits, masks, 0) > 8


def test_gradient_is_that_of_the_value():
    logits = torch.randn(1, 2, 5, 5, generator=generator(), dtype=torch.float64).requires_grad_()
    masks = half_planes(10)[:1, :2]
    loss = PointLoss(30)
    assert torch.autograd.gradcheck(lambda x: loss(x, masks, 0), logits)


def test_half_precision_is_computed_in_float32():
    loss = PointLoss(30)(torch.randn(B, P, 8, 8).bfloat16(), half_planes(8), 0)
    assert loss.dtype == torch.float32


def test_empty_and_full_masks_have_a_finite_loss():
    logits = torch.full((1, 2, 8, 8), -200.0).requires_grad_()
    masks = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])[None].bool()
    loss = PointLoss(30)(logits, masks, 0)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"masks: got \(2, 1, 8, 8\); logits \(2, 3, 8, 8\)"):
        PointLoss(3)(torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8).bool(), 0)
    with pytest.raises(ValueError, match="at least one"):
        PointLoss(3)(torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8).bool(), 0)
    with pytest.raises(ValueError, match="points: got 0"):
        PointLoss(0)
