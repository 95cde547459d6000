from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from peft_talora.data import SYNTHETIC_TASKS, SyntheticScenes
from peft_talora.data.edges import boundaries
from peft_talora.data.scene import CLASSES, FURNITURE, PARTS
from peft_talora.tasks import make_task

SIZE = 64


@pytest.fixture(scope="module")
def scenes():
    return SyntheticScenes(num_images=24, size=SIZE)


@pytest.fixture(scope="module")
def samples(scenes):
    return [scenes[index] for index in range(len(scenes))]


def points_in_camera(depth, focal):
    """Back-project planar depth (H, W) to points (3, H, W) in camera coordinates."""
    H, W = depth.shape
    x = (torch.arange(W) + 0.5 - W / 2) / focal
    y = (torch.arange(H) + 0.5 - H / 2) / focal
    return torch.stack([x[None, :] * depth, y[:, None] * depth, depth])


def normals_from_depth(depth, focal):
    """Normals (3, H − 2, W − 2) from central differences of back-projected points."""
    points = points_in_camera(depth.double(), focal)
    right = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
    down = points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    return F.normalize(torch.linalg.cross(down, right, dim=0), dim=0).float()


def interior(sample):
    """Pixels (H − 2, W − 2) whose 3 × 3 neighbourhood lies on one smooth surface."""
    edges, parts, normals = (sample["labels"][name] for name in ("edges", "parts", "normals"))
    bend = torch.ones(edges.shape, dtype=torch.bool)
    for axis in (-2, -1):
        bend &= (normals * normals.roll(1, axis)).sum(0) > 0.9
        bend &= (normals * normals.roll(-1, axis)).sum(0) > 0.9
    rough = (edges == 1) | ~bend
    for axis in (-2, -1):
        rough |= parts != parts.roll(1, axis)
    return F.max_pool2d(rough[None].float(), 3, stride=1)[0] == 0


def assert_normals_fit_depth(sample, focal, degrees):
    expected = normals_from_depth(sample["labels"]["depth"], focal)
    inside = interior(sample)
    assert inside.float().mean() > 0.3
    cosine = (expected * sample["labels"]["normals"][:, 1:-1, 1:-1]).sum(0)[inside]
    angle = torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))
    assert angle.quantile(0.99) < degrees
    assert angle.median() < 0.5


def test_samples_keep_the_contract(samples):
    tasks = [make_task(name, channels) for name, channels in SYNTHETIC_TASKS.items()]
    for sample in samples:
        assert sample["image"].shape == (3, SIZE, SIZE)
        assert sample["image"].dtype == torch.float32
        assert 0 <= sample["image"].min() <= sample["image"].max() <= 1
        assert set(sample["labels"]) == set(SYNTHETIC_TASKS)
        for task in tasks:
            label = sample["labels"][task.name]
            assert label.dtype == task.label_dtype
            task.check_label(label, (SIZE, SIZE), sample["name"])
            assert task.has_label(label).all()


def test_every_class_and_part_occurs(samples):
    for name, words in (("segmentation", CLASSES), ("parts", PARTS)):
        assert len(set(words)) == SYNTHETIC_TASKS[name]
        seen = torch.cat([sample["labels"][name].flatten() for sample in samples]).unique()
        assert seen.tolist() == list(range(len(words)))


def test_images_are_neither_dark_nor_flat(samples):
    for sample in samples:
        assert 0.25 < sample["image"].mean() < 0.75
        assert sample["image"].std() > 0.05


def test_items_are_a_function_of_seed_split_and_index(samples):
    again = SyntheticScenes(num_images=24, size=SIZE)
    for index in (7, 3, 7):
        assert torch.equal(again[index]["image"], samples[index]["image"])
        for name, label in again[index]["labels"].items():
            assert torch.equal(label, samples[index]["labels"][name])


def test_seeds_splits_and_indices_share_no_scene():
    datasets = [
        SyntheticScenes(s, 3, SIZE, seed) for s, seed in (("train", 0), ("val", 0), ("train", 1), ("train1", 0))
    ]
    images = [dataset[index]["image"] for dataset in datasets for index in range(3)]
    assert all((a - b).abs().mean() > 0.02 for i, a in enumerate(images) for b in images[:i])


def test_normals_have_unit_length_and_face_the_camera(scenes, samples):
    for index, sample in enumerate(samples):
        normals = sample["labels"]["normals"]
        assert (normals.norm(dim=0) - 1).abs().max() < 1e-5
        rays = points_in_camera(torch.ones(SIZE, SIZE), scenes.scene(index).camera.focal)
        assert (normals * rays).sum(0).max() < 1e-4


def test_normals_fit_the_depth(scenes, samples):
    for index, sample in enumerate(samples):
        assert_normals_fit_depth(sample, scenes.scene(index).camera.focal, degrees=10)


def test_depth_is_planar(scenes, samples):
    """On the floor, the height of back-projected points is the camera's own, whatever their distance from the axis."""
    for index, sample in enumerate(samples):
        camera = scenes.scene(index).camera
        points = points_in_camera(sample["labels"]["depth"], camera.focal)
        world = torch.tensordot(torch.from_numpy(camera.rotation), points, dims=1)
        floor = sample["labels"]["segmentation"] == CLASSES.index("floor")
        assert floor.any()
        assert (world[1][floor] + camera.position[1]).abs().max() < 1e-4


def test_edges_separate_classes(samples):
    for sample in samples:
        edges = sample["labels"]["edges"]
        between_classes = torch.from_numpy(boundaries(sample["labels"]["segmentation"].numpy())).bool()
        assert (edges[between_classes] == 1).all()
        assert 0.01 < edges.float().mean() < 0.4


def test_salient_pixels_are_furniture_and_parts_are_furniture(samples):
    ids = torch.tensor([CLASSES.index(name) for name in FURNITURE])
    for sample in samples:
        furniture = torch.isin(sample["labels"]["segmentation"], ids)
        assert torch.equal(sample["labels"]["parts"] > 0, furniture)
        assert furniture[sample["labels"]["saliency"] == 1].all()
    assert np.mean([bool(sample["labels"]["saliency"].any()) for sample in samples]) > 0.9


def test_one_or_two_objects_are_salient(samples):
    share = torch.tensor([sample["labels"]["saliency"].float().mean() for sample in samples])
    assert 0.01 < share.mean() < 0.4
    for sample in samples:
        classes = sample["labels"]["segmentation"][sample["labels"]["saliency"] == 1].unique()
        assert len(classes) <= 2


def test_parts_that_face_up_do(scenes, samples):
    up = torch.tensor([i for i, part in enumerate(PARTS) if part.endswith((" top", "upper half"))])
    sideways = torch.tensor([i for i, part in enumerate(PARTS) if part.endswith((" side", "lower half"))])
    for index, sample in enumerate(samples):
        down = torch.from_numpy(scenes.scene(index).camera.rotation[1])  # the world's vertical, in the camera
        vertical = torch.tensordot(down, sample["labels"]["normals"], dims=1)
        top = torch.isin(sample["labels"]["parts"], up) & (sample["labels"]["parts"] != PARTS.index("table top"))
        assert (vertical[top] < 1e-5).all()
        assert (vertical[torch.isin(sample["labels"]["parts"], sideways)] > -1e-5).all()


def test_scenes_hold_three_to_eight_things(scenes):
    furniture = {CLASSES.index(name) for name in FURNITURE}
    for index in range(len(scenes)):
        things = {s.object_id for s in scenes.scene(index).surfaces if s.class_id in furniture}
        assert 3 <= len(things) <= 8


def test_larger_images_show_the_same_scene():
    small, large = (SyntheticScenes(num_images=1, size=size)[0]["labels"]["depth"] for size in (32, 96))
    assert (small / large[1::3, 1::3] - 1).abs().max() < 1e-4


def test_tasks_can_be_chosen():
    assert set(SyntheticScenes(num_images=1, size=SIZE, tasks=["edges", "depth"])[0]["labels"]) == {"edges", "depth"}


def test_dataset_table_has_equal_content():
    scenes = SyntheticScenes("val", num_images=2, size=32)
    for row, sample in zip(scenes.to_datasets().with_format("numpy"), scenes, strict=True):
        assert row["name"] == sample["name"]
        assert np.array_equal(row["image"].transpose(2, 0, 1).astype(np.float32) / 255, sample["image"].numpy())
        for name, label in sample["labels"].items():
            assert np.array_equal(row[name], label.numpy())


def test_wrong_arguments_are_rejected():
    with pytest.raises(ValueError, match=r"'flow'.*segmentation"):
        SyntheticScenes(tasks=["flow"])
    with pytest.raises(ValueError, match="size"):
        SyntheticScenes(size=0)
    with pytest.raises(IndexError, match="24"):
        SyntheticScenes(num_images=24)[24]


def test_boundaries_by_hand():
    regions = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [9, 0, 0, 0], [9, 9, 0, 0]])
    expected = [[0, 1, 1, 0], [255, 1, 1, 1], [255, 255, 1, 1], [255, 255, 255, 0]]
    assert boundaries(regions, ignored=9).tolist() == expected
    assert boundaries(regions)[2].tolist() == [1, 1, 1, 1]


def test_boundaries_are_two_pixels_wide():
    edges = boundaries(np.repeat(np.arange(3), 8)[None].repeat(5, 0))
    assert edges[0].tolist() == [int(any(x in pair for pair in ((7, 8), (15, 16)))) for x in range(24)]
    assert all(np.array_equal(a, b) for a, b in pairwise(edges))
