"""Streams: generated, of folders and of manifests; split by the seed, kept in memory, in order."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from peft_talora.continual.scenes import DOMAINS, DomainScenes
from peft_talora.continual.stream import (
    Domain,
    DomainAugmentation,
    InMemory,
    Stream,
    collate_domain,
    folder_stream,
    generated_stream,
    manifest_stream,
    split_off,
)
from peft_talora.data import AugmentedDataset
from peft_talora.files import digest


def names_of(dataset):
    return [dataset[index]["name"] for index in range(len(dataset))]


def write_pair(folder, stem, labels, part="mask", size=(8, 10)):
    for name in ("image", part):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(stem)).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image" / f"{stem}.png")
    Image.fromarray(np.asarray(labels, dtype=np.uint8)).save(folder / part / f"{stem}.png")


def labels_of(value, size=(8, 10)):
    labels = np.zeros(size)
    labels[2:5, 3:7] = value
    return labels


def test_the_generated_stream_is_in_cosam_s_order():
    stream = generated_stream(train=5, test=2, natural=1, size=32)
    assert stream.names == list(DOMAINS)
    for domain in stream.domains:
        assert (len(domain.train), len(domain.val), len(domain.test)) == (4, 1, 2)
    assert names_of(stream.natural) == ["natural-test-000000"]
    assert sorted(names_of(stream.domains[1].train) + names_of(stream.domains[1].val)) == [
        f"rails-train-{k:06d}" for k in range(5)
    ]


def test_another_seed_has_other_images_to_train_on_and_the_same_to_test_on():
    a, b = (generated_stream(4, 2, 1, size=32, seed=seed, names=["pills"]).domains[0] for seed in (0, 1))
    assert torch.equal(a.test[1]["image"], b.test[1]["image"])
    assert not torch.equal(a.train[0]["image"], b.train[0]["image"])


def test_a_split_is_drawn_by_the_seed_alone():
    numbers = list(range(10))
    splits = [split_off(numbers, 0.3, seed) for seed in (0, 0, 1)]
    chosen = [[list(part) for part in split] for split in splits]
    assert chosen[0] == chosen[1] != chosen[2]
    for train, val in chosen:
        assert (len(train), len(val)) == (7, 3)
        assert sorted(train + val) == numbers
        assert train == sorted(train)
    assert [len(part) for part in split_off([1, 2], 0.01, 0)] == [1, 1]
    assert [len(part) for part in split_off([1, 2], 0.99, 0)] == [1, 1]
    with pytest.raises(ValueError, match=r"cannot split 1\.0 off 10 images"):
        split_off(numbers, 1.0, 0)
    with pytest.raises(ValueError, match=r"cannot split 0\.5 off 1 images"):
        split_off([1], 0.5, 0)


def test_what_is_kept_in_memory_is_what_was_drawn():
    drawn = DomainScenes("bottles", "train", 2, 32)
    kept = InMemory(drawn)
    for _ in range(2):
        sample = kept[1]
        assert torch.equal(sample["image"], drawn[1]["image"])
        assert torch.equal(sample["masks"], drawn[1]["masks"])
        assert sample["name"] == drawn[1]["name"]
        sample["image"].zero_()  # what is handed out is nobody else's
    assert len(kept) == 2


def test_some_domains_in_another_order():
    stream = generated_stream(train=2, test=1, natural=1, size=32)
    chosen = stream.select(["polyps", "pits"])
    assert chosen.names == ["polyps", "pits"]
    assert chosen.domains[1] is stream.domains[0]
    assert chosen.natural is stream.natural
    with pytest.raises(ValueError, match=r"\['ferns'\] are unknown; allowed: pits, rails"):
        stream.select(["pits", "ferns"])
    with pytest.raises(ValueError, match="allowed: one or more"):
        stream.select([])


def test_names_are_distinct():
    domain = Domain("a", [], [], [])
    with pytest.raises(ValueError, match=r"domains are \['a', 'a'\]"):
        Stream((domain, domain))
    with pytest.raises(ValueError, match=r"domains are \[\]"):
        Stream(())


def test_augmented_batches_repeat_from_seed_epoch_and_index():
    domain = generated_stream(5, 1, 1, size=32, names=["rails"]).domains[0]
    sets = [AugmentedDataset(domain.train, DomainAugmentation(), seed) for seed in (0, 0, 1)]
    batches = [collate_domain([dataset[k] for k in range(4)], 64) for dataset in sets]
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    assert not torch.equal(batches[0]["pixel_values"], batches[2]["pixel_values"])
    sets[0].set_epoch(1)
    assert not torch.equal(batches[0]["pixel_values"][0], collate_domain([sets[0][0]], 64)["pixel_values"][0])


@pytest.fixture
def folders(tmp_path):
    """`a` with masks, one of them black, and `b` with classes, to train on only; `n` is natural."""
    for stem, value in (("1", 255), ("22", 255), ("333", 0), ("4444", 200)):
        write_pair(tmp_path / "a" / "train", stem, labels_of(value))
    write_pair(tmp_path / "a" / "test", "5", labels_of(255))
    for stem, value in (("1", 3), ("22", 4), ("333", 5), ("4444", 3), ("55555", 4)):
        write_pair(tmp_path / "b" / "train", stem, labels_of(value), "segmentation")
    write_pair(tmp_path / "n" / "test", "6", labels_of(255))
    rows = [
        {"name": "a", "root": "a", "val": 0.4},
        {"name": "b", "root": str(tmp_path / "b"), "classes": [3, 4], "test": 0.25, "val": 0.3},
        {"name": "everything", "root": "n", "natural": True},
    ]
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(rows))
    return tmp_path


def test_a_stream_of_folders(folders):
    stream = folder_stream(folders / "stream.yaml")
    assert stream.names == ["a", "b"]
    a, b = stream.domains
    assert sorted(names_of(a.train) + names_of(a.val)) == ["1", "22", "4444"]  # without the black one
    assert (len(a.val), names_of(a.test)) == (1, ["5"])
    assert sorted(names_of(b.train) + names_of(b.val) + names_of(b.test)) == ["1", "22", "4444", "55555"]
    assert (len(b.test), len(b.val)) == (1, 1)
    assert names_of(stream.natural) == ["6"]
    for sample in (a.train[0], b.test[0], stream.natural[0]):
        assert torch.equal(sample["masks"][0], torch.from_numpy(labels_of(1) > 0))
        assert sample["image"].shape == (3, 8, 10)


def test_another_seed_splits_folders_otherwise(folders):
    splits = {tuple(names_of(folder_stream(folders / "stream.yaml", seed).domains[1].train)) for seed in range(6)}
    assert len(splits) > 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"name": "a"}], "an entry is .*allowed: name and root"),
        ([{"name": "a", "root": "a", "split": "x"}], "an entry is .*of classes, train, val, test, natural"),
        ({"name": "a"}, "an entry is"),
        ([{"name": "a", "root": "none"}], "none/train/image is missing; expected: <root>/<split>/image"),
        ([{"name": "a", "root": "b"}], "b/train/mask is missing"),
        ([{"name": "a", "root": "b", "classes": [9], "test": 0.2}], r"nothing is meant .*\(classes: \[9\]\)"),
        ([{"name": "a", "root": "n", "natural": True}, {"name": "b", "root": "n", "natural": True}], "2 natural"),
    ],
)
def test_wrong_streams_of_folders_are_named(folders, rows, message):
    (folders / "wrong.yaml").write_text(yaml.safe_dump(rows))
    with pytest.raises(ValueError, match=message):
        folder_stream(folders / "wrong.yaml")


def test_an_image_without_a_mask_is_named(folders):
    (folders / "a" / "train" / "mask" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png has no mask"):
        folder_stream(folders / "stream.yaml")


def manifest_of(root, domain, order, splits):
    images = []
    for index, split in enumerate(splits):
        stem = f"{domain}{'x' * index}"
        write_pair(root / domain, stem, labels_of(255))
        files = [f"{domain}/{part}/{stem}.png" for part in ("image", "mask")]
        images.append({"image": files[0], "mask": files[1], "split": split})
        images[-1] |= {"sha256": digest(root / files[0]), "mask_sha256": digest(root / files[1])}
    return {"version": 1, "domain": domain, "order": order, "seed": 0, "images": images}


def test_a_stream_of_manifests_is_in_their_order(tmp_path):
    folder = tmp_path / "manifests"
    folder.mkdir()
    for domain, order, splits in (
        ("a", 1, ["train", "train", "train", "test"]),
        ("b", 0, ["train", "train", "test"]),
        ("c", None, ["test"]),
    ):
        (folder / f"{domain}.json").write_text(json.dumps(manifest_of(tmp_path, domain, order, splits)))
    stream = manifest_stream(folder, tmp_path)
    assert stream.names == ["b", "a"]
    assert [len(part) for d in stream.domains for part in (d.train, d.val, d.test)] == [1, 1, 1, 2, 1, 1]
    assert names_of(stream.natural) == ["c/image/c.png"]
    assert stream.domains[0].train[0]["masks"].sum() == 12
    (folder / "d.json").write_text(json.dumps(manifest_of(tmp_path, "d", 1, ["train", "train", "test"])))
    with pytest.raises(ValueError, match=r"manifests at \{'b': 0, 'a': 1, 'd': 1\}"):
        manifest_stream(folder, tmp_path)


def test_a_folder_without_manifests_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one or more, each at a place of its own"):
        manifest_stream(tmp_path, tmp_path)
