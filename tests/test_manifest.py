"""Manifests: read and checked; masks of pictures, polygons and run lengths, each against one drawn by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from peft_talora.continual.manifest import (
    ManifestImages,
    check_files,
    coco_mask,
    labelme_mask,
    read_manifest,
    read_pixels,
    unpack_runs,
)
from peft_talora.files import digest

H, W = 6, 9


def entry(tmp_path, mask="mask.png", split="train", **more):
    hashes = {"sha256": digest(tmp_path / "image.png"), "mask_sha256": digest(tmp_path / mask)}
    return {"image": "image.png", "split": split, "mask": mask, **hashes, **more}


def manifest_of(*entries):
    return {"version": 1, "domain": "d", "order": 0, "seed": 0, "images": list(entries)}


@pytest.fixture
def folder(tmp_path):
    """An image of noise, and a picture of a mask: rows 1 to 3, columns 2 to 6."""
    pixels = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    mask = np.zeros((H, W), np.uint8)
    mask[1:4, 2:7] = 255
    mask[5, 5] = 127  # an artefact of compression
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def test_a_sample_of_a_picture(folder):
    sample = ManifestImages(manifest_of(entry(folder)), "train", folder)[0]
    assert torch.equal(
        (sample["image"] * 255).round().byte(),
        torch.tensor(np.array(Image.open(folder / "image.png"))).permute(2, 0, 1),
    )
    assert sample["masks"].sum() == 15
    assert sample["masks"][0, 1:4, 2:7].all()
    assert sample["name"] == "image.png"


def test_a_crop(folder):
    whole, part = (
        ManifestImages(manifest_of(entry(folder, **more)), "train", folder)[0] for more in ({}, {"crop": [3, 1, 8, 5]})
    )
    assert torch.equal(part["image"], whole["image"][:, 1:5, 3:8])
    assert torch.equal(part["masks"], whole["masks"][:, 1:5, 3:8])
    assert part["name"] == "image.png@3,1"


def test_labelme_polygons():
    square = {"label": "pitting", "points": [[2, 1], [6, 1], [6, 3], [2, 3]], "shape_type": "polygon"}
    found = labelme_mask({"imageHeight": H, "imageWidth": W, "shapes": [square]})
    assert found.sum() == 15
    assert found[1:4, 2:7].all()
    with pytest.raises(ValueError, match="a labelme shape is a 'circle'; allowed: polygon"):
        labelme_mask({"imageHeight": H, "imageWidth": W, "shapes": [{**square, "shape_type": "circle"}]})


def test_coco_polygons_are_united():
    found = coco_mask([[0, 0, 2, 0, 2, 1, 0, 1], [5, 3, 7, 3, 7, 5, 5, 5]], (H, W))
    assert found.sum() == 6 + 9
    assert found[0:2, 0:3].all()
    assert found[3:6, 5:8].all()


def test_coco_run_lengths_go_column_by_column():
    """Two zeros, three ones, the rest zeros: rows 2 to 4 of the first column."""
    found = coco_mask({"size": [H, W], "counts": [2, 3, H * W - 5]}, (H, W))
    assert np.argwhere(found).tolist() == [[2, 0], [3, 0], [4, 0]]
    with pytest.raises(ValueError, match=r"run lengths of \[6, 9\] add up to 5; the image is \(6, 9\)"):
        coco_mask({"size": [H, W], "counts": [2, 3]}, (H, W))


def pack_runs(runs):
    """COCO's string, written anew from its description."""
    packed = ""
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        while True:
            bits, value = value & 0x1F, value >> 5
            last = value == (-1 if bits & 0x10 else 0)
            packed += chr(48 + (bits if last else bits | 0x20))
            if last:
                break
    return packed


@pytest.mark.parametrize("runs", [[2, 3, 49], [0, 54], [1000, 16, 15, 4000, 31, 2, 7], [5]])
def test_packed_run_lengths(runs):
    assert unpack_runs(pack_runs(runs)) == runs


def test_a_packed_string_by_hand():
    """2 → '2'; 3 → '3'; 49 = 1 · 32 + 17 → 17 with the sixth bit, then 1: 'a1'."""
    assert unpack_runs("23a1") == [2, 3, 49]
    found = coco_mask({"size": [H, W], "counts": "23a1"}, (H, W))
    assert np.argwhere(found).tolist() == [[2, 0], [3, 0], [4, 0]]


def test_a_sample_of_annotations(folder):
    rows = [
        {"id": 7, "image_id": 1, "segmentation": [[0, 0, 2, 0, 2, 1, 0, 1]]},
        {"id": 8, "image_id": 1, "segmentation": {"size": [H, W], "counts": [2, 3, H * W - 5]}},
        {"id": 9, "image_id": 2, "segmentation": []},
    ]
    content = {"images": [{"id": 1, "height": H, "width": W}], "annotations": rows}
    (folder / "instances.json").write_text(json.dumps(content))
    made = entry(folder, "instances.json", annotations=[7, 8])
    assert ManifestImages(manifest_of(made), "train", folder)[0]["masks"].sum() == 6 + 3
    for ids in ([7, 9], [7, 10]):
        images = ManifestImages(manifest_of({**made, "annotations": ids}), "train", folder)
        with pytest.raises(ValueError, match="allowed: annotations of one image"):
            images[0]


def test_what_is_missing_or_changed_is_named(folder):
    manifest = manifest_of(entry(folder), {**entry(folder), "image": "other.png"})
    assert check_files(manifest_of(entry(folder)), folder) == []
    Image.new("L", (W, H)).save(folder / "mask.png")
    problems = check_files(manifest, folder)
    assert problems == [
        f"{folder / 'mask.png'} has changed since the manifest was made",
        f"{folder / 'other.png'} is missing",
    ]


def test_manifests_of_another_form_are_refused(folder):
    file = folder / "d.json"
    good = manifest_of(entry(folder))
    file.write_text(json.dumps(good))
    assert read_manifest(file) == good
    bad_entry = {**good["images"][0], "split": "val"}
    outside = {**good["images"][0], "mask": "../mask.png"}
    for content, message in (
        ({**good, "version": 2}, "is of version 2; allowed: 1"),
        ([], "is of version 'list'"),
        ({**good, "more": 1}, "has domain, images, more,"),
        (manifest_of(bad_entry), "an entry is .*needed are image"),
        (manifest_of(outside), r"mask is '\.\./mask.png'; allowed: files below the root"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_manifest(file)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"d\.json is no JSON"):
        read_manifest(file)


def test_images_that_do_not_fit_are_named(folder):
    Image.new("L", (W, H + 1), 255).save(folder / "mask.png")
    with pytest.raises(ValueError, match=r"mask.png: a mask of \(7, 9\) for an image of \(6, 9\)"):
        ManifestImages(manifest_of(entry(folder)), "train", folder)[0]
    with pytest.raises(ValueError, match="the manifest of 'd' has no images of split 'test'"):
        ManifestImages(manifest_of(entry(folder)), "test", folder)
    (folder / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        read_pixels(folder / "broken.png", "L")
