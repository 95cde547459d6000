"""Object scenes: repeatable wherever they are drawn, with masks that agree with each other; shapes keep their word."""

import subprocess
import sys
from hashlib import sha256
from random import Random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from peft_talora.data import ObjectScenes
from peft_talora.data.object_scenes import Canvas
from peft_talora.data.shapes import SHAPES, curve, pattern

SIZE = 64
NAMES = [shape.__name__ for shape in SHAPES]


def fingerprint(sample):
    return sha256(sample["image"].numpy().tobytes() + sample["masks"].numpy().tobytes()).hexdigest()


def grid(side, reach):
    """Coordinates at the middles of `side` × `side` cells of [−reach, reach]², float32."""
    line = ((np.arange(side, dtype=np.float32) + 0.5) * 2 / side - 1) * np.float32(reach)
    return np.meshgrid(line, line)


@pytest.fixture(scope="module")
def scenes():
    """Enough to meet every layout, shape and pattern."""
    dataset = ObjectScenes("train", 120, SIZE)
    return [dataset[index] for index in range(len(dataset))]


def test_an_item_is_as_documented(scenes):
    for index, sample in enumerate(scenes):
        image, masks = sample["image"], sample["masks"]
        assert sample.keys() == {"image", "masks", "name"}
        assert sample["name"] == f"train-{index:06d}"
        assert (image.dtype, image.shape) == (torch.float32, (3, SIZE, SIZE))
        assert image.min() >= 0
        assert image.max() <= 1
        assert image.std() > 0.005
        assert (masks.dtype, masks.shape[1:]) == (torch.bool, (SIZE, SIZE))
        assert len(masks) >= 1


@pytest.mark.parametrize("size", [32, 64, 128])
def test_every_mask_is_neither_a_speck_nor_nearly_the_whole_image(size):
    dataset = ObjectScenes("val", 25, size)
    for index in range(len(dataset)):
        pixels = dataset[index]["masks"].sum((1, 2))
        assert (pixels >= 24 * (size / 128) ** 2).all()
        assert (pixels <= 0.9 * size**2).all()


def test_masks_are_apart_or_the_one_within_the_other(scenes):
    """Objects hide each other and parts each other; a part lies within its object."""
    nested = 0
    for masks in (sample["masks"].flatten(1).float() for sample in scenes):
        shared, area = masks @ masks.T, masks.sum(1)
        smaller = torch.minimum(area[:, None], area[None, :])
        assert ((shared == 0) | (shared == smaller)).all()
        nested += int(((shared == smaller) & (shared > 0)).sum()) - len(masks)
    assert nested > 0


def test_objects_and_parts_of_a_canvas():
    canvas = Canvas(Random(3), SIZE)
    grounds = canvas.count
    cover = (np.full(3, 0.5, np.float32), np.full(3, 0.6, np.float32)), lambda u, v: np.zeros_like(u)
    disc = lambda u, v: 1 - np.hypot(u, v)  # noqa: E731
    canvas.add(disc, cover, 0.5, 0.5, (0.4, 0.4), 0.0, decals=3)
    parts = canvas.parts.copy()
    assert set(np.unique(parts)) <= {0, *range(grounds + 2, grounds + 5)}
    assert len(np.unique(parts)) > 1
    assert (canvas.objects[parts > 0] == grounds + 1).all()
    canvas.add(disc, cover, 0.25, 0.5, (0.25, 0.25), 0.0)  # hides the left half and its parts
    front = canvas.objects == canvas.count
    assert not canvas.parts[front].any()
    assert np.array_equal(canvas.parts[~front], parts[~front])
    before = canvas.image.copy(), canvas.objects.copy(), canvas.count
    canvas.add(disc, cover, 3.0, 0.5, (0.2, 0.2), 0.0)
    canvas.add(disc, cover, -0.3, 0.5, (0.2, 0.2), 0.0)
    assert all(np.array_equal(a, b) for a, b in zip(before, (canvas.image, canvas.objects, canvas.count), strict=True))


@pytest.mark.parametrize("turn", [0.0, 0.7])
def test_a_shape_stands_where_it_is_put(turn):
    canvas = Canvas(Random(3), 128)
    cover = (np.full(3, 0.5, np.float32), np.full(3, 0.6, np.float32)), lambda u, v: np.zeros_like(u)
    canvas.add(lambda u, v: 1 - np.hypot(u, v), cover, 0.6, 0.3, (0.2, 0.1), turn)
    rows, columns = np.nonzero(canvas.objects == canvas.count)
    assert np.allclose([rows.mean() + 0.5, columns.mean() + 0.5], [0.3 * 128, 0.6 * 128], atol=0.3)
    assert len(rows) == pytest.approx(np.pi * 0.2 * 0.1 * 128**2, rel=0.02)
    spread = np.cov(columns, rows)  # of an ellipse: half axes² / 4 along its axes
    c, s = np.cos(turn), np.sin(turn)
    along = np.array([[c, s], [-s, c]])
    assert np.allclose(along @ spread @ along.T, np.diag([(0.2 * 128) ** 2 / 4, (0.1 * 128) ** 2 / 4]), atol=3)


def test_items_are_a_function_of_seed_split_and_index(scenes):
    again = ObjectScenes("train", 1000, SIZE)
    assert all(fingerprint(again[index]) == fingerprint(scenes[index]) for index in (7, 3, 7))
    others = [ObjectScenes("train", 9, SIZE, seed=1)[3], ObjectScenes("test", 9, SIZE)[3], again[4]]
    assert len({fingerprint(sample) for sample in (*others, scenes[3])}) == 4


def test_no_two_items_of_two_splits_are_equal(scenes):
    test = ObjectScenes("test", 30, SIZE)
    found = {fingerprint(sample) for sample in scenes} | {fingerprint(test[index]) for index in range(30)}
    assert len(found) == len(scenes) + 30


def test_global_random_states_neither_matter_nor_change():
    import random

    dataset = ObjectScenes("train", 4, SIZE)
    first = fingerprint(dataset[2])
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert fingerprint(dataset[2]) == first
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_workers_draw_the_same(scenes):
    loader = DataLoader(ObjectScenes("train", 6, SIZE), batch_size=None, num_workers=2)
    assert [fingerprint(sample) for sample in loader] == [fingerprint(sample) for sample in scenes[:6]]


def test_another_process_draws_the_same(scenes):
    """With another hash of strings, which must not matter."""
    code = f"""
import sys
from hashlib import sha256
from peft_talora.data import ObjectScenes
s = ObjectScenes("train", 120, {SIZE})[119]
sys.stdout.write(sha256(s["image"].numpy().tobytes() + s["masks"].numpy().tobytes()).hexdigest())
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == fingerprint(scenes[119])


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_is_refused(index):
    with pytest.raises(IndexError, match=f"index {index} is outside the 4 images of split 'train'"):
        ObjectScenes("train", 4, SIZE)[index]


@pytest.mark.parametrize(("num_images", "size"), [(0, 64), (3, 31)])
def test_sizes_are_checked(num_images, size):
    with pytest.raises(ValueError, match=f"not {num_images} and {size}"):
        ObjectScenes("train", num_images, size)


@pytest.mark.parametrize("make", SHAPES, ids=NAMES)
def test_a_shape_lies_within_the_unit_square(make):
    u, v = grid(96, 2.0)
    outside = np.maximum(np.abs(u), np.abs(v)) > 1
    for seed in range(150):
        height = make(Random(seed))(u, v)
        assert height.shape == u.shape
        assert np.isfinite(height).all()
        inside = height > 0
        assert not (inside & outside).any(), seed
        assert inside.mean() > 0.005, seed
        assert height.max() < 1.001, seed


@pytest.mark.parametrize("make", SHAPES, ids=NAMES)
def test_a_shape_has_height_0_at_its_outline(make):
    """Between neighbours on either side of it heights are small: no cliffs."""
    u, v = grid(1024, 1.1)
    for seed in range(3):
        height = make(Random(seed))(u, v)
        inside = height > 0
        steps = [np.abs(np.diff(height, axis=axis))[np.diff(inside, axis=axis)].max() for axis in (0, 1)]
        assert max(steps) < 0.15, seed


@pytest.mark.parametrize("make", [*SHAPES, pattern], ids=[*NAMES, "pattern"])
def test_the_generator_alone_decides(make):
    u, v = grid(40, 1.0)
    first, second, other = (make(Random(seed))(u, v) for seed in (4, 4, 9))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_patterns_are_shares():
    u, v = grid(48, 3.0)
    for seed in range(200):
        share = pattern(Random(seed))(u, v)
        assert share.shape == u.shape
        assert 0 <= share.min() <= share.max() <= 1, seed


def test_a_curve_is_one_band():
    u, v = grid(200, 1.0)
    for seed in range(20):
        inside = curve(Random(seed))(u, v) > 0
        assert (np.abs(np.diff(inside.astype(int), axis=0)).sum(0) <= 2).all()
