"""Mixtures: samples of several data sets, drawn in the shares asked for, the same after a resume."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from format_cases import scene, write_cityscapes_7, write_nyud, write_parquet
from PIL import Image
from torch.utils.data import DataLoader

from peft_talora import make_task, sources
from peft_talora.data import BadSample, MixedSampler, MixedTasks, shares_by_size
from peft_talora.data.mixed import apportion

SEGMENTATION, DEPTH, EDGES = (make_task(n, c) for n, c in {"segmentation": 4, "depth": 1, "edges": 1}.items())
PARTS = make_task("parts", 7)


class Numbers(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"name": str(index)}


def test_a_mixture_has_the_samples_of_all_parts_by_names_of_their_own():
    mixture = MixedTasks({"a": Numbers(2), "b": Numbers(3)})
    assert [mixture[index]["name"] for index in range(5)] == ["a/0", "a/1", "b/0", "b/1", "b/2"]
    assert len(mixture) == 5
    for index in (5, -1):
        with pytest.raises(IndexError, match="outside the 5 samples"):
            mixture[index]
    with pytest.raises(ValueError, match=r"'b': 0"):
        MixedTasks({"a": Numbers(2), "b": Numbers(0)})


def test_every_part_gives_its_share_of_what_is_split_off():
    kept, held = MixedTasks({"a": Numbers(10), "b": Numbers(40)}).split_off(lambda size: size // 5, seed=0)
    assert (kept.sizes, held.sizes) == ([8, 32], [2, 8])
    names = [part[index]["name"] for part in (kept, held) for index in range(len(part))]
    assert len(set(names)) == 50


@pytest.mark.parametrize(
    ("shares", "total", "counts"),
    [([1, 1], 5, [3, 2]), ([0.5, 0.3, 0.2], 10, [5, 3, 2]), ([1, 2], 100, [33, 67]), ([7], 3, [3])],
)
def test_whole_numbers_are_within_one_of_the_shares(shares, total, counts):
    assert apportion(shares, total) == counts


def test_shares_by_size_and_temperature():
    assert shares_by_size([100, 300]) == pytest.approx([0.25, 0.75])
    assert shares_by_size([100, 900], temperature=2) == pytest.approx([0.25, 0.75])
    assert shares_by_size([1, 10**6], temperature=1e9) == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match="temperature is 0"):
        shares_by_size([1, 2], 0)


@pytest.mark.parametrize("shares", [[1, 1], [9, 1], [0.2, 0.8]])
def test_drawn_shares_are_those_asked_for(shares):
    sampler = MixedSampler([10, 30], shares)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert len(indices) == len(sampler) == 40
        assert sum(index < 10 for index in indices) == 40 * shares[0] / sum(shares)
        assert sorted(indices) != indices


def test_no_sample_is_seen_twice_before_all_of_its_part_were_seen_once():
    sampler, seen = MixedSampler([7, 5], [1, 1], seed=3), Counter()
    for epoch in range(9):
        sampler.set_epoch(epoch)
        seen.update(sampler)
        for part in (range(7), range(7, 12)):
            counts = [seen[index] for index in part]
            assert max(counts) - min(counts) <= 1, (epoch, counts)


def test_an_epoch_is_a_function_of_seed_and_epoch():
    first, second, other = (MixedSampler([7, 5], [2, 1], seed=seed) for seed in (0, 0, 1))
    second.set_epoch(4)
    list(second)
    for sampler in (first, second, other):
        sampler.set_epoch(2)
    state = torch.get_rng_state()
    assert list(first) == list(second) != list(other)
    assert torch.equal(torch.get_rng_state(), state)
    third = MixedSampler([7, 5], [2, 1], seed=0)
    assert list(third) != list(first)


@pytest.mark.parametrize("shares", [[1], [1, 0], [1, float("nan")]])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="2 data sets need as many positive numbers"):
        MixedSampler([7, 5], shares)


@pytest.fixture
def folders(tmp_path):
    """One folder with segmentation alone, one with depth alone."""
    drawn = np.random.default_rng(0)
    labels = {
        "segmentation": lambda: drawn.integers(0, 4, (8, 10), dtype=np.uint8),
        "depth": lambda: drawn.integers(500, 5000, (8, 10), dtype=np.uint16),
    }
    for name, count in (("segmentation", 4), ("depth", 12)):
        for kind in ("image", name):
            (tmp_path / name / "train" / kind).mkdir(parents=True)
        for index in range(count):
            image = drawn.integers(0, 256, (8, 10, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / name / "train" / "image" / f"{index}.png")
            Image.fromarray(labels[name]()).save(tmp_path / name / "train" / name / f"{index}.png")
    return str(tmp_path / "segmentation"), str(tmp_path / "depth")


def test_disjoint_folders_are_one_data_set(folders):
    args = sources.DataArguments(data_root=folders[0], mix=[folders[1]])
    dataset = sources.open_split(args, "train", [SEGMENTATION, DEPTH], 64)
    assert len(dataset) == 16
    assert dataset[0]["labels"].keys() == {"segmentation"}
    assert dataset[4]["labels"].keys() == {"depth"}
    with pytest.raises(ValueError, match=r"none of .* has labels of edges in the split 'train'"):
        sources.open_split(args, "train", [SEGMENTATION, EDGES, DEPTH], 64)
    args.derive_edges = True
    derived = sources.open_split(args, "train", [SEGMENTATION, EDGES, DEPTH], 64)
    assert derived[0]["labels"].keys() == {"segmentation", "edges"}
    with pytest.raises(ValueError, match="has none of the folders segmentation"):
        sources.open_split(args, "train", [SEGMENTATION], 64)
    with pytest.raises(ValueError, match="needs `data_root`"):
        sources.open_split(sources.DataArguments(mix=[folders[1]]), "train", [SEGMENTATION], 64)


@pytest.mark.parametrize(
    ("words", "counts"),
    [(["proportional"], [4, 12]), (["temperature=2"], [6, 10]), (["1", "1"], [8, 8]), (["3", "1"], [12, 4])],
)
def test_batches_have_the_shares_that_the_recipe_is_told(words, counts, folders):
    args = sources.DataArguments(data_root=folders[0], mix=[folders[1]], mix_by=words)
    dataset = sources.open_split(args, "train", [SEGMENTATION, DEPTH], 64)
    sampler = sources.mixed_sampler(args, 0, dataset)
    names = [sample["name"] for batch in DataLoader(dataset, 4, sampler=sampler, collate_fn=list) for sample in batch]
    assert [sum(name.startswith(folder + "/") for name in names) for folder in folders] == counts


@pytest.mark.parametrize("words", [["even"], ["temperature=cold"], ["temperature=0"], ["1"], ["1", "-1"]])
def test_other_ways_to_mix_are_refused(words, folders):
    args = sources.DataArguments(data_root=folders[0], mix=[folders[1]], mix_by=words)
    dataset = sources.open_split(args, "train", [SEGMENTATION, DEPTH], 64)
    with pytest.raises(ValueError, match=r"`mix_by` is .*; allowed: 'proportional', 'temperature=T', or 2 weights"):
        sources.mixed_sampler(args, 0, dataset)


def test_places_of_different_formats_are_one_data_set(folders, tmp_path):
    write_nyud(tmp_path / "nyud")
    write_parquet(tmp_path / "rows", {"train": 3, "val": 2})
    columns = tmp_path / "map.yaml"
    columns.write_text("tasks: {depth: {column: depth, scale: 2}}")
    places = {"data_root": folders[0], "mix": [str(tmp_path / "nyud"), str(tmp_path / "rows")]}
    args = sources.DataArguments(**places, data_format=["folder", "nyud-40", str(columns)])
    dataset = sources.open_split(args, "train", [SEGMENTATION, DEPTH], 64, most=2)
    assert dataset.sizes == [2, 1, 2]
    with pytest.raises(BadSample, match=r"0003\.png: label of task 'segmentation' holds 39"):
        dataset[2]
    assert np.array_equal(dataset[4]["labels"]["depth"], 2 * scene(1)["depth"])
    others = sources.DataArguments(data_root=args.mix[0], mix=args.mix[1:], data_format=args.data_format[1:])
    with pytest.raises(ValueError, match=r"nyud \(nyud-40\) has labels of segmentation, depth, normals, edges alone"):
        sources.open_split(others, "train", [PARTS], 64)
    for formats, words in (
        (["folders"], "`data_format` has 'folders'; allowed: 'folder', nyuv2-13"),
        (["folder", "nyud-40"], "allowed: one, or one for each of"),
    ):
        with pytest.raises(ValueError, match=words):
            sources.open_split(sources.DataArguments(**places, data_format=formats), "train", [DEPTH], 64)


def test_a_task_alone_is_trained_on_the_images_of_all_places(folders):
    """As a method with a run for each task does, whose places need not have labels of it."""
    args = sources.DataArguments(data_root=folders[0], mix=[folders[1]], allow_unlabelled=True)
    dataset = sources.open_split(args, "train", [DEPTH], 64)
    assert len(dataset) == 16
    assert not DEPTH.has_label(dataset[0]["labels"]["depth"]).any()
    assert DEPTH.has_label(dataset[4]["labels"]["depth"]).any()


def test_places_are_named_once(folders):
    args = sources.DataArguments(data_root=folders[0], mix=[folders[1], folders[0]])
    with pytest.raises(ValueError, match=f"name {folders[0]} twice"):
        sources.open_split(args, "train", [DEPTH], 64)


def test_a_share_too_small_for_a_sample_is_refused():
    with pytest.raises(ValueError, match=r"an epoch of 200 samples has \[200, 0\] of the data sets"):
        MixedSampler([100, 100], [1000, 1])


def test_inverse_depth_is_known_to_augmentation(tmp_path):
    write_cityscapes_7(tmp_path)
    tasks = [make_task("inverse_depth", 1, "depth")]
    args = sources.SplitArguments(data_root=str(tmp_path), data_format=["cityscapes-7"], test_split="train")
    train_set, *_ = sources.open_splits(args, 0, tasks, 64)
    assert train_set.augmentation.inverse == {"inverse_depth"}


def test_a_stream_has_no_workers(tmp_path):
    write_parquet(tmp_path / "set", {"train": 3, "test": 2})
    args = sources.SplitArguments(data_root=str(tmp_path / "set"), data_format=["nyuv2-13"], streaming=True)
    with pytest.raises(ValueError, match="`max_train_samples` or `max_eval_samples` is 0"):
        sources.open_splits(replace(args, max_train_samples=0), 0, [DEPTH], 64)
    with pytest.raises(ValueError, match="`dataloader_num_workers` is 1; with `streaming` allowed: 0"):
        sources.open_splits(replace(args, dataloader_num_workers=1), 0, [DEPTH], 64)


@pytest.mark.parametrize(
    "changes",
    [{}, {"data_format": ["nyuv2-13"], "mix": ["more"]}, {"data_format": ["nyuv2-13"], "on_bad_sample": "skip"}],
)
def test_only_one_data_set_of_rows_is_streamed(changes, folders):
    args = sources.SplitArguments(data_root=folders[0], streaming=True, **changes)
    with pytest.raises(ValueError, match="`streaming` is asked for with"):
        sources.open_splits(args, 0, [DEPTH], 64)


def test_files_are_not_streamed(tmp_path):
    write_nyud(tmp_path)
    args = sources.SplitArguments(data_root=str(tmp_path), streaming=True, data_format=["nyud-40"])
    with pytest.raises(ValueError, match="is a folder of nyud-40 files"):
        sources.open_splits(args, 0, [DEPTH], 64)
