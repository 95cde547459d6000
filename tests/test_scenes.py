"""Generated domains: repeatable wherever they are drawn; colours say nothing of the domain, structure does."""

import math
from hashlib import sha256
from random import Random

import numpy as np
import pytest
import torch

from peft_talora.continual.painters import PAINTERS
from peft_talora.continual.scenes import DOMAINS, LEAST, MOST, NATURAL, DomainScenes, develop
from peft_talora.continual.sheet import Sheet
from peft_talora.promptable import measure

SIZE, TRAIN, TEST = 64, 16, 12


def fingerprint(sample):
    return sha256(sample["image"].numpy().tobytes() + sample["masks"].numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def scenes():
    """domain → samples; the first are to learn from, the last to test on."""
    found = {}
    for domain in DOMAINS:
        dataset = DomainScenes(domain, "train", TRAIN + TEST, SIZE)
        found[domain] = [dataset[index] for index in range(len(dataset))]
    return found


def nearest_mean_accuracy(scenes, describe):
    """Of a router that compares an image's description with the mean of each domain's."""
    described = {domain: np.stack([describe(s["image"].numpy()) for s in found]) for domain, found in scenes.items()}
    means = np.stack([rows[:TRAIN].mean(0) for rows in described.values()])
    right = [
        np.linalg.norm(row - means, axis=1).argmin() == k
        for k, rows in enumerate(described.values())
        for row in rows[TRAIN:]
    ]
    return np.mean(right)


def joint_histogram(image):
    """Shares of 8 × 8 × 8 colours."""
    r, g, b = (np.minimum(image * 8, 7)).astype(int)
    return np.bincount((64 * r + 8 * g + b).ravel(), minlength=512) / r.size


def channel_histograms(image):
    return np.concatenate([np.histogram(channel, 16, (0, 1))[0] / channel.size for channel in image])


def spectrum(image):
    """Energy by direction and frequency, in logarithms: blind to colour, light and place."""
    grey = image.mean(0)
    power = np.abs(np.fft.fft2((grey - grey.mean()) / grey.std())) ** 2
    a, b = np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE))
    ring = np.digitize(np.hypot(a, b), [0.03, 0.06, 0.12, 0.25])
    sector = ((np.arctan2(b, a) / math.pi * 8).round() % 8).astype(int)
    return np.log(np.bincount((ring * 8 + sector).ravel(), power.ravel(), minlength=40)[8:] + 1)


@pytest.mark.parametrize("domain", [*DOMAINS, NATURAL])
def test_an_item_is_as_documented(domain):
    dataset = DomainScenes(domain, "val", 3, SIZE)
    for index in range(3):
        sample = dataset[index]
        image, masks = sample["image"], sample["masks"]
        assert sample.keys() == {"image", "masks", "name"}
        assert sample["name"] == f"{domain}-val-{index:06d}"
        assert (image.dtype, image.shape) == (torch.float32, (3, SIZE, SIZE))
        assert torch.equal((image * 255).round().to(torch.uint8).float() / 255, image)
        assert (masks.dtype, masks.shape) == (torch.bool, (1, SIZE, SIZE))
        assert masks.any()


def test_there_is_a_painter_for_every_domain_in_cosam_s_order():
    assert DOMAINS == ("pits", "rails", "heavy_rails", "textures", "pills", "bottles", "camouflage", "polyps")
    assert len(PAINTERS) == 8
    assert NATURAL not in DOMAINS


def test_masks_are_neither_specks_nor_nearly_the_whole_image(scenes):
    shares = torch.cat([sample["masks"].float().mean((1, 2)) for found in scenes.values() for sample in found])
    assert shares.min() >= LEAST
    assert shares.max() <= MOST


def test_items_are_a_function_of_seed_domain_split_and_index(scenes):
    again = DomainScenes("rails", "train", 100, SIZE)
    assert all(fingerprint(again[index]) == fingerprint(scenes["rails"][index]) for index in (7, 3, 7))
    others = [DomainScenes("rails", "train", 9, SIZE, seed=1)[3], DomainScenes("rails", "test", 9, SIZE)[3], again[4]]
    assert len({fingerprint(sample) for sample in (*others, scenes["rails"][3])}) == 4


def test_global_random_states_neither_matter_nor_change(scenes):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    torch.manual_seed(5)
    assert fingerprint(DomainScenes("polyps", "train", 1, SIZE)[0]) == fingerprint(scenes["polyps"][0])
    torch.random.set_rng_state(before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_colours_are_the_same_in_law_for_all_domains(scenes):
    """Means and deviations of channels lie in one range, and their averages over a domain are close."""
    means, deviations = [], []
    for found in scenes.values():
        images = torch.stack([sample["image"] for sample in found])
        means.append(images.mean((2, 3)))
        deviations.append(images.std((2, 3)))
    means, deviations = torch.stack(means), torch.stack(deviations)
    assert means.min() > 0.29
    assert means.max() < 0.67
    assert deviations.min() > 0.08
    assert deviations.max() < 0.24
    assert means.mean((1, 2)).std() < 0.03
    assert deviations.mean((1, 2)).std() < 0.01


def test_a_developed_picture_has_the_mean_and_deviation_that_are_drawn():
    """Whatever the scale of the radiances: the law does not know them."""
    light = np.random.default_rng(0).standard_normal((3, 64, 64)).astype(np.float32)
    pictures = [develop(scale * light + shift, Random(3)) for scale, shift in ((1, 0), (50, -7))]
    assert np.abs(pictures[0] - pictures[1]).max() < 0.01
    assert np.ptp(pictures[0].mean((1, 2))) < 0.15


def test_colour_histograms_do_not_tell_the_domains(scenes):
    """Chance is 12.5 %."""
    assert nearest_mean_accuracy(scenes, joint_histogram) < 0.4
    assert nearest_mean_accuracy(scenes, channel_histograms) < 0.5


def test_structure_tells_the_domains(scenes):
    assert nearest_mean_accuracy(scenes, spectrum) > 0.75


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_filled_box_is_no_solution(scenes, domain):
    assert measure({}, scenes[domain])["box filled"]["box"] < 0.7


def test_domains_contradict_each_other(scenes):
    """In the box, pits are what is darkest, flecks on pills what is brightest; animals are as light as the rest."""

    def contrast(sample):
        mask, grey = sample["masks"][0], sample["image"].mean(0)
        rows, columns = mask.any(1).nonzero()[[0, -1]].flatten(), mask.any(0).nonzero()[[0, -1]].flatten()
        box = torch.zeros_like(mask)
        box[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1] = True
        return (grey[mask].mean() - grey[box & ~mask].mean()) / grey.std()

    contrasts = {domain: torch.stack([contrast(sample) for sample in found]) for domain, found in scenes.items()}
    assert contrasts["pits"].max() < 0 < contrasts["pills"].min()
    assert contrasts["heavy_rails"].max() < 0
    assert contrasts["camouflage"].mean().abs() < 0.5


def test_noise_is_normed_and_runs_along_its_turn():
    noise = Sheet(Random(0), 64).noise(0.25, 1.5, along=8, turn=0.0)
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 1e-4
    assert noise.std() == pytest.approx(1, abs=1e-4)
    down, right = np.gradient(noise)
    assert np.abs(right).mean() < 0.5 * np.abs(down).mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("roads",), "domain is 'roads'; allowed: pits, .*, natural"),
        (("pits", "train", 0), "num_images must be at least 1"),
        (("pits", "train", 1, 16), "size at least 32, not 1 and 16"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DomainScenes(*arguments)


def test_an_index_outside_is_refused():
    with pytest.raises(IndexError, match="index 2 is outside the 2 images of split 'train'"):
        DomainScenes("pits", "train", 2, SIZE)[2]
