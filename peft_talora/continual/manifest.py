"""Manifests: which images of a data set make up a domain, with their splits and checksums. Nothing is copied.

A manifest is a JSON file:

=============  =======================================================================================================
``version``    1
``domain``     name
``order``      place in the stream, from 0; null for natural images, which only have a split ``test``
``seed``       of the split, where it was drawn
``images``     list of entries
=============  =======================================================================================================

and an entry has

=================  ===================================================================================================
``image``          file, relative to the root of all data
``sha256``         of that file
``split``          ``train`` or ``test``
``mask``           file that says what is meant: a picture, white where meant; a labelme file; or COCO annotations
``mask_sha256``    of that file
``annotations``    for COCO: ids of the annotations that make up the mask
``crop``           where only a part is used: left, top, right, bottom in pixels, the last two exclusive
=================  ===================================================================================================
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from ..files import digest

VERSION = 1
SPLITS = ("train", "test")
_KEYS = {"version", "domain", "order", "seed", "images"}
_ENTRY = {"image", "sha256", "split", "mask", "mask_sha256"}
_WHITE = 128


def read_manifest(file: str | Path) -> dict:
    """A manifest, its form checked; files that it names are not looked at.

    Raises:
        ValueError: If it is no manifest of this version; the message names the file.
    """
    try:
        manifest = json.loads(Path(file).read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        found = manifest.get("version") if isinstance(manifest, dict) else type(manifest).__name__
        raise ValueError(f"{file} is of version {found!r}; allowed: {VERSION}")
    if manifest.keys() != _KEYS:
        raise ValueError(f"{file} has {', '.join(sorted(manifest))}; allowed: {', '.join(sorted(_KEYS))}")
    for entry in manifest["images"]:
        if not entry.keys() >= _ENTRY or entry["split"] not in SPLITS:
            raise ValueError(f"{file}: an entry is {entry!r}; needed are {', '.join(sorted(_ENTRY))}")
        for name in ("image", "mask"):
            if Path(entry[name]).is_absolute() or ".." in Path(entry[name]).parts:
                raise ValueError(f"{file}: {name} is {entry[name]!r}; allowed: files below the root of all data")
    return manifest


def check_files(manifest: dict, data_root: str | Path) -> list[str]:
    """What is wrong with the files that a manifest names, a line each; none if all are there and as they were."""
    expected = {}
    for entry in manifest["images"]:
        expected[entry["image"]] = entry["sha256"]
        expected[entry["mask"]] = entry["mask_sha256"]
    problems = []
    for name, known in expected.items():
        file = Path(data_root) / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif digest(file) != known:
            problems.append(f"{file} has changed since the manifest was made")
    return problems


class ManifestImages(Dataset):
    """The images of a split of a manifest.

    Args:
        manifest: As `read_manifest` returns it.
        split: ``train`` or ``test``.
        data_root: Folder that its files are relative to.

    Raises:
        ValueError: If the split is empty.
    """

    def __init__(self, manifest: dict, split: str, data_root: str | Path):
        self.entries = [entry for entry in manifest["images"] if entry["split"] == split]
        self.data_root = Path(data_root)
        if not self.entries:
            raise ValueError(f"the manifest of {manifest['domain']!r} has no images of split {split!r}")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict:
        entry = self.entries[index]
        image, mask = read_pixels(self.data_root / entry["image"], "RGB"), read_mask(entry, self.data_root)
        if image.shape[:2] != mask.shape:
            raise ValueError(f"{entry['mask']}: a mask of {mask.shape} for an image of {image.shape[:2]}")
        name = entry["image"]
        if "crop" in entry:
            left, top, right, bottom = entry["crop"]
            image, mask = image[top:bottom, left:right], mask[top:bottom, left:right]
            name += f"@{left},{top}"
        return make_sample(image, mask, name)


def make_sample(image_HW3: np.ndarray, mask_HW: np.ndarray, name: str) -> dict:
    """A sample of a stream from 8-bit pixels and a mask."""
    image = torch.from_numpy(np.ascontiguousarray(image_HW3)).permute(2, 0, 1).contiguous().float() / 255
    return {"image": image, "masks": torch.from_numpy(np.ascontiguousarray(mask_HW))[None], "name": name}


def read_pixels(file: str | Path, mode: str | None) -> np.ndarray:
    """Pixels of a picture in one of Pillow's modes, None: as they are.

    Raises:
        ValueError: If it is missing or no picture that Pillow reads; the message names the file.
    """
    try:
        with Image.open(file) as picture:
            return np.array(picture if mode is None else picture.convert(mode))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def read_mask(entry: dict, data_root: str | Path) -> np.ndarray:
    """What an entry means, bool (H, W) at the size of the whole image.

    Raises:
        ValueError: If the file cannot be read or has not what the entry names.
    """
    file = Path(data_root) / entry["mask"]
    if file.suffix != ".json":
        return read_pixels(file, "L") >= _WHITE
    if "annotations" not in entry:
        return labelme_mask(json.loads(file.read_text()))
    images, annotations = coco_index(file)
    found = [annotations.get(key) for key in entry["annotations"]]
    if None in found or len({row["image_id"] for row in found}) != 1:
        raise ValueError(f"{file} has not all of {entry['annotations']}; allowed: annotations of one image")
    image = images[found[0]["image_id"]]
    size = image["height"], image["width"]
    return np.logical_or.reduce([coco_mask(row["segmentation"], size) for row in found])


def fill_polygons(polygons: Sequence[Sequence[tuple[float, float]]], size: tuple[int, int]) -> np.ndarray:
    """The union of polygons of points (x, y), bool (H, W), with their outlines' pixels."""
    canvas = Image.new("L", (size[1], size[0]))
    draw = ImageDraw.Draw(canvas)
    for points in polygons:
        draw.polygon([(float(x), float(y)) for x, y in points], fill=1, outline=1)
    return np.array(canvas, dtype=bool)


def labelme_mask(content: dict) -> np.ndarray:
    """All that is outlined in a labelme file, bool (H, W).

    Raises:
        ValueError: For a shape that is no polygon.
    """
    for shape in content["shapes"]:
        if shape.get("shape_type", "polygon") != "polygon":
            raise ValueError(f"a labelme shape is a {shape['shape_type']!r}; allowed: polygon")
    size = content["imageHeight"], content["imageWidth"]
    return fill_polygons([shape["points"] for shape in content["shapes"]], size)


@lru_cache(maxsize=2)
def coco_index(file: Path) -> tuple[dict, dict]:
    """Images and annotations of a COCO file by their ids."""
    content = json.loads(Path(file).read_text())
    return tuple({row["id"]: row for row in content[kind]} for kind in ("images", "annotations"))


def coco_mask(segmentation: list | dict, size: tuple[int, int]) -> np.ndarray:
    """A COCO segmentation, bool (H, W): polygons [x, y, x, y, …], or run lengths, as a list or packed in a string.

    Run lengths count zeros first, column by column. Packed, each is a number of five bits per character (from code 48
    on, the sixth says that more follow, the lowest come first, the last one's fifth is the sign); from the third on,
    numbers are differences to the one before the last.

    Raises:
        ValueError: If run lengths do not add up to the image.
    """
    if isinstance(segmentation, list):
        return fill_polygons([list(zip(row[::2], row[1::2], strict=True)) for row in segmentation], size)
    counts = segmentation["counts"]
    runs = unpack_runs(counts) if isinstance(counts, str) else counts
    if tuple(segmentation["size"]) != tuple(size) or sum(runs) != size[0] * size[1]:
        raise ValueError(f"run lengths of {segmentation['size']} add up to {sum(runs)}; the image is {tuple(size)}")
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(pixels.reshape(size[1], size[0]).T)


def unpack_runs(packed: str) -> list[int]:
    """Run lengths from COCO's string (see `coco_mask`)."""
    runs, value, shift = [], 0, 0
    for character in packed:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return runs
