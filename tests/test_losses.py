import math

import pytest
import torch

from peft_talora.losses import (
    IGNORE_INDEX,
    balanced_bce,
    check_shapes,
    class_ids,
    cosine_loss,
    cross_entropy,
    dice_loss,
    focal_loss,
    foreground_probability,
    masked_l1,
    unit_vectors,
)

B, H, W = 3, 4, 5


def make_batch(loss, dtype=torch.float64):
    """Logits and labels; the left column of pixels is unlabelled."""
    random = torch.Generator().manual_seed(0)
    channels = {cross_entropy: 7, masked_l1: 1, cosine_loss: 3, balanced_bce: 1}[loss]
    logits = torch.randn(B, channels, H, W, generator=random, dtype=torch.float64).to(dtype)
    if loss is masked_l1:
        labels = 10 + torch.rand(B, H, W, generator=random)
        labels[..., 0] = torch.tensor([0, -1, math.nan, math.inf])
    elif loss is cosine_loss:
        labels = unit_vectors(torch.randn(B, 3, H, W, generator=random))
        labels[..., 0] = torch.tensor([0, 0, math.nan, math.inf])
    else:
        labels = torch.randint(0, 7 if loss is cross_entropy else 2, (B, H, W), generator=random)
        labels[..., 0] = IGNORE_INDEX
    return logits, labels


LOSSES = pytest.mark.parametrize("loss", [cross_entropy, masked_l1, cosine_loss, balanced_bce])


@LOSSES
def test_gradient_is_that_of_the_value(loss):
    logits, labels = make_batch(loss)
    assert loss(logits, labels).shape == ()
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_())


@LOSSES
def test_unlabelled_pixels_change_nothing(loss):
    logits, labels = make_batch(loss)
    torch.testing.assert_close(loss(logits, labels), loss(logits[..., 1:], labels[..., 1:]))


@LOSSES
def test_without_labels_is_a_zero_that_can_be_differentiated(loss):
    logits, labels = make_batch(loss)
    logits, labels = logits[..., :1].clone().requires_grad_(), labels[..., :1]
    value = loss(logits, labels)
    value.backward()
    assert value.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@LOSSES
def test_is_a_mean_over_pixels_not_over_images(loss):
    """A batch of one image and the same image again gives the loss of the one."""
    logits, labels = make_batch(loss)
    torch.testing.assert_close(loss(logits.repeat(2, 1, 1, 1), torch.cat([labels, labels])), loss(logits, labels))


@LOSSES
def test_half_precision_is_computed_in_float32(loss):
    logits, labels = make_batch(loss, torch.bfloat16)
    value = loss(logits, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(logits.float(), labels), rtol=0, atol=0)


@LOSSES
def test_float64_stays_float64(loss):
    assert loss(*make_batch(loss)).dtype == torch.float64


def test_cross_entropy_by_hand():
    # Pixel 1: logits (0, ln 3), label 1: p = 3/4. Pixel 2: logits (0, 0), label 0: p = 1/2. Pixel 3: ignored.
    # Mean: (ln 4/3 + ln 2) / 2 = ln(8/3) / 2.
    logits = torch.tensor([[0.0, 0, 9], [math.log(3), 0, 0]]).view(1, 2, 1, 3)
    labels = torch.tensor([[[1, 0, IGNORE_INDEX]]])
    assert cross_entropy(logits, labels).item() == pytest.approx(math.log(8 / 3) / 2)


def test_masked_l1_by_hand():
    # Errors |1 − 3| = 2 and |4 − 3.5| = 0.5; the third pixel is unknown. Mean 1.25 m.
    logits = torch.tensor([1.0, 4, 7]).view(1, 1, 1, 3)
    assert masked_l1(logits, torch.tensor([[[3, 3.5, 0]]])).item() == 1.25


def test_cosine_loss_by_hand():
    # (2, 0, 0) against x: 0; (0, 0, −5) against z: 2; (3, 4, 0) against x: 1 − 3/5 = 0.4. Mean 0.8.
    logits = torch.tensor([[2.0, 0, 3], [0, 0, 4], [0, -5, 0]]).view(1, 3, 1, 3)
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]]).view(1, 3, 1, 3)
    assert cosine_loss(logits, labels).item() == pytest.approx(0.8)


def test_cosine_loss_is_finite_at_zero():
    logits = torch.zeros(1, 3, 1, 1, requires_grad=True)
    value = cosine_loss(logits, torch.tensor([0.0, 0, 1]).view(1, 3, 1, 1))
    value.backward()
    assert value.item() == 1
    assert logits.grad.isfinite().all()


def test_balanced_bce_by_hand():
    # One positive with p = 3/4, three negatives with p = 1/2, one ignored pixel.
    # Share of negatives 3/4, of positives 1/4: (3/4 · ln 4/3 + 3 · 1/4 · ln 2) / (3/4 + 3 · 1/4) = ln(8/3) / 2.
    logits = torch.tensor([math.log(3), 0, 0, 0, 50]).view(1, 1, 1, 5)
    labels = torch.tensor([[[1, 0, 0, 0, IGNORE_INDEX]]])
    assert balanced_bce(logits, labels).item() == pytest.approx(math.log(8 / 3) / 2)


@pytest.mark.parametrize("label", [0, 1])
def test_balanced_bce_of_one_class_alone_is_the_plain_mean(label):
    labels = torch.full((1, 1, 2), label)
    assert balanced_bce(torch.zeros(1, 1, 1, 2), labels).item() == pytest.approx(math.log(2))
    wrong = torch.full((1, 1, 1, 2), 200.0 * (1 - 2 * label))
    assert balanced_bce(wrong, labels).item() == 200


@pytest.mark.parametrize("shape", [(B, 1, H, W), (B, W, H), (1, H, W)])
def test_labels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"need \(3, 4, 5\)"):
        masked_l1(torch.zeros(B, 1, H, W), torch.ones(shape))


def test_channels_are_checked():
    with pytest.raises(ValueError, match="have 2 channels; allowed: 1"):
        balanced_bce(torch.zeros(B, 2, H, W), torch.zeros(B, H, W))
    check_shapes(torch.zeros(B, 2, H, W), torch.zeros(B, H, W), channels=(1, 2))


@pytest.mark.parametrize(
    ("loss", "value", "allowed"),
    [
        (balanced_bce, 2, "0 to 1"),
        (balanced_bce, -1, "0 to 1"),
        (balanced_bce, 254, "0 to 1"),
        (balanced_bce, 0.5, "0 to 1"),
        (cross_entropy, 7, "0 to 6"),
        (cross_entropy, -100, "0 to 6"),
    ],
)
def test_labels_that_are_no_class_are_shown(loss, value, allowed):
    logits, labels = make_batch(loss)
    labels = labels.to(torch.tensor(value).dtype)
    labels[1, 2, 3] = value
    with pytest.raises(ValueError, match=f"labels hold {value}; allowed: {allowed}, and 255 where unknown"):
        loss(logits, labels)


@pytest.mark.parametrize("loss", [balanced_bce, cross_entropy])
def test_values_of_labels_on_a_device_are_not_read(loss):
    """Labels of the meta device have no values, so that reading one would fail."""
    logits, labels = make_batch(loss)
    assert loss(logits.to("meta"), labels.to("meta")).shape == ()


@pytest.mark.parametrize("loss", [balanced_bce, cross_entropy])
def test_is_one_graph_when_compiled(loss):
    logits, labels = make_batch(loss)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))


def test_two_channels_and_their_difference_tell_the_same_probability():
    two = torch.randn(B, 2, H, W, generator=torch.Generator().manual_seed(0))
    expected = two.softmax(1)[:, 1]
    torch.testing.assert_close(foreground_probability(two), expected)
    torch.testing.assert_close(foreground_probability(two[:, 1:] - two[:, :1]), expected)


def test_class_ids_are_the_argmax():
    logits = torch.randn(B, 7, H, W, generator=torch.Generator().manual_seed(0))
    assert torch.equal(class_ids(logits), logits.argmax(1))


def make_masks(N=3):
    """Logits of masks and the shares of pixels that they cover, among them 0 and 1."""
    random = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, N, H, W, generator=random, dtype=torch.float64)
    return logits, (targets + 0.5).clamp(0, 1)


def test_focal_loss_by_hand():
    """p = 3/4: −α (1 − p)² log p where the mask is, −(1 − α) p² log(1 − p) elsewhere; a mean of each mask."""
    logits = torch.full((2, 1, 2), math.log(3))
    targets = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
    inside, outside = -0.25 * math.log(3 / 4) / 16, -0.75 * math.log(1 / 4) * 9 / 16
    torch.testing.assert_close(focal_loss(logits, targets), torch.tensor([(inside + outside) / 2, inside]))
    torch.testing.assert_close(
        focal_loss(logits, targets, alpha=0.75), torch.tensor([(3 * inside + outside / 3) / 2, 3 * inside])
    )
    torch.testing.assert_close(focal_loss(logits, targets, gamma=1)[1], torch.tensor(4 * inside))


def test_focal_loss_without_focus_is_half_of_cross_entropy():
    logits, targets = make_masks()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean((1, 2))
    torch.testing.assert_close(focal_loss(logits, targets, alpha=0.5, gamma=0), expected / 2)


def test_dice_loss_by_hand():
    logits = torch.tensor([0.0, math.log(3), 0.0, math.log(3)]).view(1, 2, 2)  # probabilities 1/2 and 3/4
    targets = torch.tensor([1.0, 1.0, 0.0, 0.5]).view(1, 2, 2)
    overlap, sums = 1 / 2 + 3 / 4 + 3 / 8, 2.5 + 2.5
    torch.testing.assert_close(dice_loss(logits, targets), torch.tensor([1 - (2 * overlap + 1) / (sums + 1)]))


@pytest.mark.parametrize("loss", [focal_loss, dice_loss])
def test_mask_losses_end_at_0_and_stay_finite(loss):
    targets = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    right = 200 * (2 * targets - 1)
    torch.testing.assert_close(loss(right, targets), torch.zeros(2))
    wrong = loss((-right).requires_grad_(), targets)
    assert wrong.isfinite().all()
    assert (wrong > 0.5).all()
    if loss is dice_loss:
        assert (wrong <= 1).all()


@pytest.mark.parametrize("loss", [focal_loss, dice_loss])
def test_gradient_of_mask_losses_is_that_of_their_values(loss):
    logits, targets = make_masks()
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), logits.requires_grad_())


@pytest.mark.parametrize("loss", [focal_loss, dice_loss])
def test_each_mask_has_its_own_loss_in_float32_or_wider(loss):
    logits, targets = make_masks()
    together = loss(logits, targets)
    assert together.dtype == torch.float64
    torch.testing.assert_close(
        together, torch.cat([loss(a[None], b[None]) for a, b in zip(logits, targets, strict=True)])
    )
    deep = loss(logits[:, None].expand(-1, 2, -1, -1), targets[:, None].expand(-1, 2, -1, -1))  # leading axes stay
    torch.testing.assert_close(deep, together[:, None].expand(-1, 2))
    half = loss(logits.bfloat16(), targets.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), together, atol=1e-2, rtol=1e-2)
