import pytest
import torch
from test_synthetic import assert_normals_fit_depth

from peft_talora.data import SYNTHETIC_TASKS, AugmentedDataset, JointAugmentation, SyntheticScenes
from peft_talora.tasks import make_task

TASKS = [make_task(name, channels) for name, channels in SYNTHETIC_TASKS.items()]


@pytest.fixture(scope="module")
def scenes():
    return SyntheticScenes("val", num_images=4, size=64)


@pytest.fixture
def sample(scenes):
    return scenes[1]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def assert_equal_samples(a, b):
    assert torch.equal(a["image"], b["image"])
    assert a["labels"].keys() == b["labels"].keys()
    assert all(torch.equal(label, b["labels"][name]) for name, label in a["labels"].items())


def test_scale_1_without_flip_is_the_identity(sample, generator):
    assert_equal_samples(JointAugmentation(TASKS, scales=[1.0], flip=0)(sample, generator), sample)


def test_two_flips_are_the_identity(sample, generator):
    flip = JointAugmentation(TASKS, scales=[1.0], flip=1)
    once = flip(sample, generator)
    assert torch.equal(once["image"], sample["image"].flip(-1))
    assert_equal_samples(flip(once, generator), sample)


def test_given_sample_stays_as_it_is(scenes, sample, generator):
    for _ in range(8):
        JointAugmentation(TASKS)(sample, generator)
    assert_equal_samples(sample, scenes[1])


def test_flipped_normals_fit_the_flipped_depth(scenes, sample, generator):
    flipped = JointAugmentation(TASKS, scales=[1.0], flip=1)(sample, generator)
    assert_normals_fit_depth(flipped, scenes.scene(1).camera.focal, degrees=10)
    assert not torch.equal(flipped["labels"]["normals"], sample["labels"]["normals"].flip(-1))


@pytest.mark.parametrize("scale", [1.2, 1.5, 3.0])
def test_labels_are_never_interpolated(sample, generator, scale):
    zoomed = JointAugmentation(TASKS, scales=[scale], flip=0)(sample, generator)
    for name, label in zoomed["labels"].items():
        given = sample["labels"][name]
        assert label.shape == given.shape
        assert label.dtype == given.dtype
        given = given / scale if name == "depth" else given
        if name == "normals":
            label, given = (set(map(tuple, x.flatten(1).T.tolist())) for x in (label, given))
            assert label <= given
        else:
            assert torch.isin(label, given).all()


def test_zoom_shows_image_and_labels_of_one_place(generator):
    """An image that is bright just where its label is 1 stays so."""
    label = torch.zeros(30, 48, dtype=torch.int64)
    label[10:20, 15:30] = 1
    sample = {"image": label.float().expand(3, -1, -1), "labels": {"edges": label}, "name": "x"}
    zoom = JointAugmentation(TASKS, scales=[4 / 3], flip=0.5)  # no pixel centre falls on a border
    for _ in range(5):
        zoomed = zoom(sample, generator)
        assert torch.equal((zoomed["image"][0] > 0.5).long(), zoomed["labels"]["edges"])


def test_every_place_of_the_crop_can_occur(generator):
    columns = torch.arange(10).expand(10, 10).contiguous()
    sample = {"image": torch.zeros(3, 10, 10), "labels": {"segmentation": columns}, "name": "x"}
    zoom = JointAugmentation(TASKS, scales=[2.0], flip=0)
    firsts = {int(zoom(sample, generator)["labels"]["segmentation"][0, 0]) for _ in range(200)}
    assert firsts == set(range(6))


def test_inverse_depth_stays_the_inverse_of_depth(sample):
    depth = sample["labels"]["depth"]
    tasks = [make_task("depth", 1), make_task("disparity", 1, "depth")]
    pair = {**sample, "labels": {"depth": depth, "disparity": torch.where(depth > 0, 1 / depth, 0)}}
    augmentation = JointAugmentation(tasks, scales=[1.5], flip=0, inverse={"disparity"})
    labels = augmentation(pair, torch.Generator().manual_seed(1))["labels"]
    known = labels["depth"] > 0
    assert known.any()
    torch.testing.assert_close(labels["disparity"][known], 1 / labels["depth"][known])


def test_unknown_labels_stay_unknown(generator):
    labels = {task.name: task.empty_label((16, 24)) for task in TASKS}
    sample = {"image": torch.zeros(3, 16, 24), "labels": labels, "name": "x"}
    augmented = JointAugmentation(TASKS, scales=[1.5], flip=1)(sample, generator)
    assert all((augmented["labels"][task.name] == task.ignored_label).all() for task in TASKS)


def test_randomness_is_a_function_of_seed_epoch_and_index(scenes):
    first, second = (AugmentedDataset(scenes, JointAugmentation(TASKS), seed=3) for _ in range(2))
    for dataset in (first, second):
        dataset.set_epoch(5)
    second[0], second[3]
    for index in (2, 0):
        assert_equal_samples(first[index], second[index])


def drawn(dataset):
    return [sample["labels"]["depth"] for sample in dataset]


@pytest.mark.parametrize("change", ["epoch", "seed"])
def test_other_epochs_and_seeds_differ(scenes, change):
    scenes = SyntheticScenes(num_images=4, size=32)
    one, other = (AugmentedDataset(scenes, JointAugmentation(TASKS), seed=s) for s in (0, int(change == "seed")))
    other.set_epoch(int(change == "epoch"))
    assert any(not torch.equal(a, b) for a, b in zip(drawn(one), drawn(other), strict=True))


def test_workers_that_outlive_an_epoch_see_the_next():
    dataset = AugmentedDataset(SyntheticScenes(num_images=4, size=32), JointAugmentation(TASKS))
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        for sample, expected in zip(loader, dataset, strict=True):
            assert_equal_samples(sample, expected)


def test_wrong_arguments_are_rejected():
    with pytest.raises(ValueError, match=r"scales is \(0\.5, 1\)"):
        JointAugmentation(TASKS, scales=(0.5, 1))
    with pytest.raises(ValueError, match=r"flip is 2"):
        JointAugmentation(TASKS, flip=2)
