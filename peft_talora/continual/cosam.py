"""CoSAM's stream from the data sets' own folders: which images, which masks, which split.

The benchmark (arXiv 2412.06418) was published as one archive without a list of its images; here manifests (see
`manifest`) are made from the data sets as their authors publish them. Where these have no split, a fifth of the images
is drawn to test on, by a seed. Images of one thing stay together: squares cut from one rail, photographs of one place
on a ball screw at several times.

===================  =================================================================================================
`bsdata`             BSData: all images with a labelme file
`rsdds_1, rsdds_2`   RSDDs: long pictures of rails, cut into squares; those with damage
`mvtec_textures`     MVTec AD: the defective images of carpet, grid, leather, tile and wood
`mvtec_pill`         those of the pill
`mvtec_bottle`       those of the bottle
`camo`               CAMO, with its own split
`polyp`              Kvasir-SEG: the images of its subset of sessile polyps to test on, the others to train on
`natural`            COCO: one object each of some images of val2017, to test on
===================  =================================================================================================
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from ..files import digest
from .manifest import VERSION, coco_index, read_mask

TEST_SHARE = 0.2
LEAST = 1 / 1000  # of a square cut from a rail, of its damage
NATURAL_IMAGES, NATURAL_LEAST = 200, 1 / 100  # and of an image, of its object


@dataclass(frozen=True)
class Found:
    """An image of a domain.

    Attributes:
        entry: What the manifest says of it; files are still paths, hashes and perhaps the split are missing.
        group: Images of one group are of one thing and get one split.
    """

    entry: dict
    group: str = ""


@dataclass(frozen=True)
class Source:
    """Where the images of a domain come from.

    Attributes:
        title: Name of the data set.
        address: Where it is published.
        layout: Its folders below the root of all data, for messages.
        find: Lists the images; takes the root and a `Random`.
        published: Images to train and to test on in CoSAM, the first ones estimated from its figures.
    """

    title: str
    address: str
    layout: tuple[str, ...]
    find: Callable[[Path, Random], Iterable[Found]]
    published: tuple[int, int] = field(default=(0, 0))


def make_manifest(domain: str, data_root: str | Path, order: int | None, seed: int = 0) -> dict:
    """The manifest of a domain, of the files that are below `data_root`.

    Args:
        domain: One of `SOURCES`.
        data_root: Folder that holds the folders of all data sets.
        order: Place in the stream; None for natural images.
        seed: Of the split, and of what is drawn from COCO.

    Raises:
        FileNotFoundError: If folders are missing; the message says which and where they are published.
        ValueError: For another domain, or if the folders are not as published; the message names a file.
    """
    if domain not in SOURCES:
        raise ValueError(f"domain is {domain!r}; allowed: {', '.join(SOURCES)}")
    data_root, source = Path(data_root), SOURCES[domain]
    missing = [folder for folder in source.layout if not (data_root / folder).exists()]
    if missing:
        raise FileNotFoundError(
            f"{domain}: {source.title} is missing: no {', '.join(missing)} in {data_root}. It is published at "
            f"{source.address}; expected: {', '.join(source.layout)}"
        )
    found = sorted(source.find(data_root, Random(f"{domain} {seed}")), key=lambda f: str(f.entry))
    if not found:
        raise ValueError(f"{domain}: {source.title} in {data_root} has no image in which something is marked")
    if any("split" not in item.entry for item in found):
        found = _split(found, Random(f"split {domain} {seed}"))
    hashes = {}
    images = [_finish(item.entry, data_root, hashes) for item in found]
    return {"version": VERSION, "domain": domain, "order": order, "seed": seed, "images": images}


def _split(found: list[Found], random: Random) -> list[Found]:
    """Whole groups, in random order, are to test on until these are a fifth of the images."""
    groups = sorted({item.group for item in found})
    random.shuffle(groups)
    test, count = set(), 0
    while count < TEST_SHARE * len(found):
        test.add(groups.pop())
        count = sum(item.group in test for item in found)
    return [Found({**item.entry, "split": "test" if item.group in test else "train"}, item.group) for item in found]


def _finish(entry: dict, data_root: Path, hashes: dict[Path, str]) -> dict:
    for name in ("image", "mask"):
        if entry[name] not in hashes:
            hashes[entry[name]] = digest(entry[name])
    return {
        **entry,
        "image": entry["image"].relative_to(data_root).as_posix(),
        "sha256": hashes[entry["image"]],
        "mask": entry["mask"].relative_to(data_root).as_posix(),
        "mask_sha256": hashes[entry["mask"]],
    }


def _files(folder: Path, *suffixes: str) -> dict[str, Path]:
    return {file.stem: file for file in sorted(folder.iterdir()) if file.suffix.lower() in suffixes}


def _partner(stem: str, files: dict[str, Path], of: Path) -> Path:
    if stem not in files:
        raise ValueError(f"{of} has no partner named {stem!r}; needed is one for every image")
    return files[stem]


def _marked(entries: Iterable[Found]) -> Iterable[Found]:
    """Those with a pixel of a mask that has the size of its image."""
    for found in entries:
        mask = read_mask(found.entry, Path())
        with Image.open(found.entry["image"]) as picture:
            size = picture.height, picture.width
        if mask.shape != size:
            raise ValueError(f"{found.entry['mask']} is a mask of {mask.shape} for an image of {size}")
        if mask.any():
            yield found


def _bsdata(root: Path, random: Random) -> Iterable[Found]:
    """Names are <number>_<time>_<place>_<angle>_crop_<1 or 2>; the same place comes at several times."""
    images = _files(root / "BSData/data", ".jpg", ".jpeg", ".png")
    for stem, label in _files(root / "BSData/label", ".json").items():
        image, parts = _partner(stem, images, label), stem.split("_")
        group = "_".join([parts[0], *parts[2:4]]) if len(parts) == 6 else stem
        yield from _marked([Found({"image": image, "mask": label}, group)])


def _rsdds(kind: str) -> Callable[[Path, Random], Iterable[Found]]:
    def find(root: Path, random: Random) -> Iterable[Found]:
        folder = root / _RSDDS.format(kind)
        masks = _files(folder / "GroundTruth", ".jpg", ".png", ".bmp")
        for stem, image in _files(folder / "Rail surface images", ".jpg", ".png", ".bmp").items():
            entry = {"image": image, "mask": _partner(stem, masks, image)}
            for found in _marked([Found(entry, stem)]):
                mask = read_mask(entry, Path())
                for crop in squares(mask):
                    yield Found({**found.entry, "crop": crop}, stem)

    return find


def squares(mask_HW: np.ndarray) -> list[list[int]]:
    """Squares [left, top, right, bottom] that cover a long picture side by side and have something of the mask.

    The last one ends with the picture, and so overlaps the one before if the length is no multiple of the width.
    """
    height, width = mask_HW.shape
    side = min(height, width)
    found = []
    for start in [*range(0, max(height, width) - side, side), max(height, width) - side]:
        left, top = (start, 0) if width > height else (0, start)
        if mask_HW[top : top + side, left : left + side].mean() >= LEAST:
            found.append([left, top, left + side, top + side])
    return found


def _mvtec(*categories: str) -> Callable[[Path, Random], Iterable[Found]]:
    def find(root: Path, random: Random) -> Iterable[Found]:
        for category in categories:
            folder = root / _MVTEC / category
            for defect in sorted(path for path in (folder / "test").iterdir() if path.is_dir()):
                if defect.name == "good":
                    continue
                masks = _files(folder / "ground_truth" / defect.name, ".png")
                for stem, image in _files(defect, ".png").items():
                    mask = _partner(f"{stem}_mask", masks, image)
                    yield from _marked([Found({"image": image, "mask": mask}, f"{category} {defect.name} {stem}")])

    return find


def _camo(root: Path, random: Random) -> Iterable[Found]:
    masks = _files(root / _CAMO / "GT", ".png", ".jpg")
    for split in ("train", "test"):
        for stem, image in _files(root / _CAMO / "Images" / split.title(), ".jpg", ".png").items():
            entry = {"image": image, "mask": _partner(stem, masks, image), "split": split}
            yield from _marked([Found(entry)])


def _polyp(root: Path, random: Random) -> Iterable[Found]:
    """The sessile ones are a part of all, by their names."""
    images, masks = (_files(root / _KVASIR / part, ".jpg", ".png") for part in ("images", "masks"))
    sessile = _files(root / _SESSILE / "images", ".jpg", ".png")
    for stem, image in sessile.items():
        _partner(stem, images, image)
    for stem, image in images.items():
        split = "test" if stem in sessile else "train"
        yield from _marked([Found({"image": image, "mask": _partner(stem, masks, image), "split": split})])


def _natural(root: Path, random: Random) -> Iterable[Found]:
    """One annotation of an image, of those of fair size that outline one object."""
    file = root / _COCO_FILE
    images, annotations = coco_index(file)
    fit = {}
    for row in annotations.values():
        size = images[row["image_id"]]
        if not row.get("iscrowd") and row["area"] >= NATURAL_LEAST * size["height"] * size["width"]:
            fit.setdefault(row["image_id"], []).append(row["id"])
    for key in random.sample(sorted(fit), min(NATURAL_IMAGES, len(fit))):
        image = root / "coco/val2017" / images[key]["file_name"]
        if not image.is_file():
            raise ValueError(f"{image} is missing; {file} names it")
        chosen = [random.choice(sorted(fit[key]))]
        yield from _marked([Found({"image": image, "mask": file, "annotations": chosen, "split": "test"})])


_RSDDS = "RSDDs dataset/Type-{} RSDDs dataset"
_RAILS = "https://ieee-dataport.org/documents/rsdds"
_MVTEC = "mvtec_anomaly_detection"
_DEFECTS = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
_CAMO = "CAMO-V.1.0-CVIU2019"
_KVASIR, _SESSILE = "Kvasir-SEG", "sessile-main-Kvasir-SEG"
_COCO_FILE = "coco/annotations/instances_val2017.json"
_TEXTURES = ("carpet", "grid", "leather", "tile", "wood")


def _rail_source(kind: str, published: tuple[int, int]) -> Source:
    folders = tuple(f"{_RSDDS.format(kind)}/{part}" for part in ("Rail surface images", "GroundTruth"))
    return Source(f"RSDDs, type {kind}", _RAILS, folders, _rsdds(kind), published)


def _defect_source(title: str, published: tuple[int, int], *categories: str) -> Source:
    folders = tuple(f"{_MVTEC}/{category}/{part}" for category in categories for part in ("test", "ground_truth"))
    return Source(f"MVTec AD, {title}", _DEFECTS, folders, _mvtec(*categories), published)


SOURCES = {
    "bsdata": Source("BSData", "https://github.com/2Obe/BSData", ("BSData/data", "BSData/label"), _bsdata, (315, 79)),
    "rsdds_1": _rail_source("I", (110, 30)),
    "rsdds_2": _rail_source("II", (145, 40)),
    "mvtec_textures": _defect_source("textures", (301, 77), *_TEXTURES),
    "mvtec_pill": _defect_source("pill", (143, 40), "pill"),
    "mvtec_bottle": _defect_source("bottle", (112, 30), "bottle"),
    "camo": Source(
        "CAMO",
        "https://sites.google.com/view/ltnghia/research/camo",
        (f"{_CAMO}/Images/Train", f"{_CAMO}/Images/Test", f"{_CAMO}/GT"),
        _camo,
        (1000, 250),
    ),
    "polyp": Source(
        "Kvasir-SEG",
        "https://datasets.simula.no/kvasir-seg/",
        (f"{_KVASIR}/images", f"{_KVASIR}/masks", f"{_SESSILE}/images"),
        _polyp,
        (804, 196),
    ),
    "natural": Source(
        "COCO val2017", "https://cocodataset.org", ("coco/val2017", _COCO_FILE), _natural, (0, NATURAL_IMAGES)
    ),
}
"""By domain, in the order of CoSAM's stream; the natural images come last and have no place in it."""
