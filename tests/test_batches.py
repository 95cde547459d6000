"""Batches of domains: images as SAM takes them, boxes and masks in place, an augmentation that keeps the object."""

import pytest
import torch

from peft_talora.continual.batches import (
    DomainAugmentation,
    collate_domain,
    input_size,
    original_logits,
    resize_mask,
)
from peft_talora.data import make_image_processor
from peft_talora.prompts import mask_boxes


def make_sample(size, box, name="a", seed=0):
    """Noise with a rectangle (top, left, bottom, right; exclusive) as the mask."""
    pixels = torch.randint(256, (3, *size), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[0, box[0] : box[2], box[1] : box[3]] = True
    return {"image": pixels.float() / 255, "masks": mask, "name": name}


WIDE = make_sample((40, 80), (10, 20, 30, 60), "wide")
SQUARE = make_sample((64, 64), (5, 6, 20, 30), "square")


@pytest.mark.parametrize("resize", ["stretch", "longest_side"])
def test_images_of_the_input_s_size_are_those_of_sam_s_processor(resize):
    batch = collate_domain([SQUARE], 64, resize)
    pixels = (SQUARE["image"] * 255).round().to(torch.uint8).numpy()
    expected = make_image_processor(64)([pixels], input_data_format="channels_first", return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
    assert torch.equal(batch["masks"], SQUARE["masks"][None])
    assert torch.equal(batch["boxes"][:, 0], mask_boxes(SQUARE["masks"]))


def test_the_longest_side_is_resized_about_as_by_sam_s_processor():
    image = torch.linspace(0, 1, 80).expand(3, 40, 80)
    sample = {**WIDE, "image": (image * 255).round() / 255}
    batch = collate_domain([sample], 64, "longest_side")
    pixels = (sample["image"] * 255).round().to(torch.uint8).numpy()
    expected = make_image_processor(64)([pixels], input_data_format="channels_first", return_tensors="pt")
    assert (batch["pixel_values"] - expected["pixel_values"]).abs().max() < 0.03
    assert not batch["pixel_values"][:, :, 32:].any()
    assert not batch["masks"][:, :, 32:].any()


def test_boxes_and_masks_by_hand():
    """40 × 80 to 64 × 64 stretched: x by 0.8, y by 1.6; with the longest side: both by 0.8."""
    stretched, kept = (collate_domain([WIDE, SQUARE], 64, resize) for resize in ("stretch", "longest_side"))
    assert stretched["boxes"][0, 0].tolist() == pytest.approx([15.9, 16.3, 47.1, 46.7], abs=1e-4)
    assert kept["boxes"][0, 0].tolist() == pytest.approx([15.9, 7.9, 47.1, 23.1], abs=1e-4)
    assert mask_boxes(stretched["masks"][0]).tolist() == [[16, 16, 47, 47]]
    assert mask_boxes(kept["masks"][0]).tolist() == [[16, 8, 47, 23]]
    for batch in (stretched, kept):
        assert batch["names"] == ["wide", "square"]
        assert [tuple(mask.shape) for mask in batch["original_masks"]] == [(1, 40, 80), (1, 64, 64)]
        assert (batch["boxes"].shape, batch["masks"].shape) == ((2, 1, 4), (2, 1, 64, 64))


@pytest.mark.parametrize("resize", ["stretch", "longest_side"])
def test_logits_go_the_way_back(resize):
    """The mask at the input's size, as logits, gives the original mask again."""
    samples = [make_sample((48, 96), (8, 16, 32, 64)), make_sample((96, 96), (9, 30, 60, 90))]
    batch = collate_domain(samples, 96, resize)
    restored = original_logits(batch["masks"].float() - 0.5, [(48, 96), (96, 96)], 96, resize)
    for logits, mask in zip(restored, batch["original_masks"], strict=True):
        assert logits.dtype == torch.float32
        assert torch.equal(logits > 0, mask)


def test_what_is_fine_does_not_vanish():
    line = torch.zeros(1, 128, 128, dtype=torch.bool)
    line[0, 5] = True
    small = resize_mask(line, (16, 16))
    assert small[0].nonzero()[:, 0].unique().tolist() == [0]
    assert small[0, 0].all()
    assert resize_mask(line, (128, 128)) is line
    assert not resize_mask(torch.zeros_like(line), (16, 16)).any()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="resize is 'crop'; allowed: stretch, longest_side"):
        input_size((4, 4), 64, "crop")
    with pytest.raises(ValueError, match="sample 'none' has an empty mask"):
        collate_domain([make_sample((8, 8), (0, 0, 0, 0), "none")], 64)
    with pytest.raises(ValueError, match="sample 'none' has an empty mask"):
        DomainAugmentation()(make_sample((8, 8), (0, 0, 0, 0), "none"), torch.Generator())
    with pytest.raises(ValueError, match=r"scales is \(2, 1\)"):
        DomainAugmentation(scales=(2, 1))
    with pytest.raises(ValueError, match=r"flips is \(2, 0\)"):
        DomainAugmentation(flips=(2, 0))
    with pytest.raises(ValueError, match="least is 3"):
        DomainAugmentation(least=3)


def augment(sample, seed, **options):
    return DomainAugmentation(**options)(sample, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("box", [(0, 0, 3, 3), (20, 3, 22, 62), (1, 1, 63, 63), (60, 60, 64, 64)])
def test_the_object_is_never_lost(box):
    sample = make_sample((64, 64), box)
    before = sample["image"].clone()
    for seed in range(60):
        found = augment(sample, seed)
        assert found["masks"].any()
        assert (found["image"].shape, found["masks"].shape) == ((3, 64, 64), (1, 64, 64))
        assert (found["image"].min() >= 0, found["image"].max() <= 1) == (True, True)
    assert torch.equal(sample["image"], before)


def test_a_crop_holds_the_whole_object_where_it_fits():
    sample = make_sample((64, 64), (40, 40, 60, 60))
    for seed in range(30):
        assert augment(sample, seed, scales=(2.0, 2.0))["masks"].sum() == 40 * 40


def test_a_thin_object_larger_than_the_crop_keeps_a_pixel():
    sample = make_sample((64, 64), (0, 0, 0, 0))
    sample["masks"] |= torch.eye(64, dtype=torch.bool)[None]
    assert all(augment(sample, seed, scales=(2.0, 2.0))["masks"].any() for seed in range(30))


def test_what_is_small_is_not_made_smaller_than_the_least():
    sample = make_sample((64, 64), (20, 20, 36, 36))
    for seed in range(30):
        assert augment(sample, seed, scales=(0.01, 0.02), least=1 / 64)["masks"].sum() >= 0.9 * 64
    speck = make_sample((64, 64), (20, 20, 22, 22))
    assert augment(speck, 0, scales=(0.01, 0.02), least=1 / 64, flips=(0, 0))["masks"].equal(speck["masks"])


def test_mask_and_image_stay_together():
    """Where the image is white, there is the mask."""
    sample = make_sample((64, 64), (10, 12, 40, 30))
    sample["image"] = sample["masks"].float().expand(3, -1, -1)
    for seed in range(20):
        found = augment(sample, seed, scales=(0.5, 2.0))
        apart = (found["image"][0] > 0.5) != found["masks"][0]
        assert apart.float().mean() < 0.02


def test_flips_alone_mirror_exactly():
    sample = make_sample((16, 16), (1, 2, 5, 9))
    found = augment(sample, 0, scales=(1.0, 1.0), flips=(1, 1))
    assert torch.equal(found["image"], sample["image"].flip(1, 2))
    assert torch.equal(found["masks"], sample["masks"].flip(1, 2))


def test_the_generator_alone_decides():
    assert torch.equal(augment(WIDE, 4)["image"], augment(WIDE, 4)["image"])
    assert not torch.equal(augment(WIDE, 4)["image"], augment(WIDE, 5)["image"])
