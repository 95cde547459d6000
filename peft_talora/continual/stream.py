"""Streams: the domains that a model meets one after the other, generated, in folders, or listed by manifests.

All their datasets hold samples ``{"image": float32 (3, H, W) in [0, 1], "masks": bool (1, H, W), "name": str}``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.utils.data import Dataset, Subset

from .batches import DomainAugmentation, collate_domain, original_logits
from .manifest import ManifestImages, make_sample, read_manifest, read_pixels
from .scenes import DOMAINS, NATURAL, DomainScenes

__all__ = [
    "Domain",
    "DomainAugmentation",
    "InMemory",
    "Stream",
    "collate_domain",
    "folder_stream",
    "generated_stream",
    "manifest_stream",
    "original_logits",
    "split_off",
]


@dataclass(frozen=True)
class Domain:
    """Where images come from: its name and its three datasets."""

    name: str
    train: Dataset
    val: Dataset
    test: Dataset


@dataclass(frozen=True)
class Stream:
    """Domains in the order in which they are learned, and natural images that are never trained on, where there are.

    Raises:
        ValueError: Without domains, or if two have one name.
    """

    domains: tuple[Domain, ...]
    natural: Dataset | None = None

    def __post_init__(self):
        names = self.names
        if not names or len(set(names)) < len(names):
            raise ValueError(f"domains are {names!r}; allowed: one or more, each of a name of its own")

    @property
    def names(self) -> list[str]:
        """Names of the domains, in their order."""
        return [domain.name for domain in self.domains]

    def select(self, names: Sequence[str]) -> "Stream":
        """The stream of some of the domains, in the order given. Raises ValueError for an unknown one."""
        known = {domain.name: domain for domain in self.domains}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"domains {unknown!r} are unknown; allowed: {', '.join(known)}")
        return replace(self, domains=tuple(known[name] for name in names))


def split_off(dataset: Dataset, share: float, seed: int) -> tuple[Subset, Subset]:
    """Training and validation data from what is to train on: `share` of it, drawn by the seed, validates.

    Each keeps the order that the images had, and has one image at least.

    Raises:
        ValueError: For fewer than two images, or a share outside (0, 1).
    """
    if len(dataset) < 2 or not 0 < share < 1:
        raise ValueError(
            f"cannot split {share!r} off {len(dataset)} images; allowed: shares between 0 and 1, of two or more"
        )
    count = min(max(round(share * len(dataset)), 1), len(dataset) - 1)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(dataset, sorted(order[count:])), Subset(dataset, sorted(order[:count]))


class InMemory(Dataset):
    """A dataset whose samples are kept, in 8 bits, from the first time on; its images must be in 255ths."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self._kept: dict[int, dict] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        if index not in self._kept:
            sample = self.dataset[index]
            self._kept[index] = {**sample, "image": (sample["image"] * 255).round().to(torch.uint8)}
        kept = self._kept[index]
        return {**kept, "image": kept["image"].float() / 255}


def generated_stream(
    train: int = 80,
    test: int = 40,
    natural: int = 40,
    size: int = 128,
    seed: int = 0,
    names: Sequence[str] = DOMAINS,
    val_share: float = 0.2,
) -> Stream:
    """The generated domains (see `scenes`), kept in memory once they are drawn.

    Args:
        train: Images of each domain to train and validate on.
        test: Images of each domain to test on.
        natural: Natural images.
        size: Side in pixels.
        seed: Of the scenes and of the split; test images do not depend on it.
        names: The domains, in their order.
        val_share: Share of `train` that validates.
    """
    domains = []
    for name in names:
        to_train = InMemory(DomainScenes(name, "train", train, size, seed))
        to_test = InMemory(DomainScenes(name, "test", test, size))
        domains.append(Domain(name, *split_off(to_train, val_share, seed), to_test))
    return Stream(tuple(domains), InMemory(DomainScenes(NATURAL, "test", natural, size)))


_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


class FolderMasks(Dataset):
    """Images of ``root/split/image`` with what is meant in them; files belong together by their stem.

    Without `classes` the masks are pictures in ``root/split/mask``, white (128 and brighter) where meant; with them,
    all pixels of these classes in ``root/split/segmentation``, 8-bit pictures of class ids. Images in which nothing is
    meant are left out.

    Raises:
        ValueError: If a folder is missing, an image has no mask, or none is left.
    """

    def __init__(self, root: str | Path, split: str, classes: Sequence[int] | None = None):
        self.classes = classes
        folder = Path(root) / split
        images, masks = _by_stem(folder / "image"), _by_stem(folder / ("mask" if classes is None else "segmentation"))
        missing = sorted(set(images) - set(masks))
        if missing:
            raise ValueError(f"{images[missing[0]]} has no mask; needed is one for every image")
        self.files = [(images[stem], masks[stem]) for stem in sorted(images) if self._read_mask(masks[stem]).any()]
        if not self.files:
            raise ValueError(f"nothing is meant in any of the {len(images)} images of {folder} (classes: {classes})")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        image, mask = self.files[index]
        return make_sample(read_pixels(image, "RGB"), self._read_mask(mask), image.stem)

    def _read_mask(self, file: Path) -> np.ndarray:
        if self.classes is None:
            return read_pixels(file, "L") >= 128
        return np.isin(read_pixels(file, None), self.classes)


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing; expected: <root>/<split>/image, and mask or segmentation beside it")
    return {file.stem: file for file in sorted(folder.iterdir()) if file.suffix.lower() in _SUFFIXES}


@dataclass(frozen=True)
class FolderEntry:
    """One domain of a stream of folders, as its YAML file lists it.

    Attributes:
        name: Of the domain.
        root: Folder, relative to the YAML file.
        classes: Class ids that are meant, of ``segmentation``; None: what is white in ``mask``.
        train: Split to train on.
        val: Split to validate on, or a share of `train`.
        test: Split to test on, or a share of `train`.
        natural: Whether this is the set of natural images: only its split `test` is used.
    """

    name: str
    root: str
    classes: Sequence[int] | None = None
    train: str = "train"
    val: str | float = 0.1
    test: str | float = "test"
    natural: bool = False

    def open(self, beside: Path, seed: int) -> Domain:
        """Its datasets; shares are drawn by the seed, first the test images."""
        root = beside / self.root
        parts, rest = {}, FolderMasks(root, self.train, self.classes)
        for part in ("test", "val"):
            chosen = getattr(self, part)
            if isinstance(chosen, str):
                parts[part] = FolderMasks(root, chosen, self.classes)
            else:
                rest, parts[part] = split_off(rest, chosen, seed)
        return Domain(self.name, rest, parts["val"], parts["test"])


def folder_stream(file: str | Path, seed: int = 0) -> Stream:
    """The stream of a YAML file: a list of mappings with the attributes of `FolderEntry`.

    Raises:
        ValueError: If an entry is of another form; or as `FolderMasks`, `split_off` and `Stream` do.
    """
    file = Path(file)
    rows = yaml.safe_load(file.read_text())
    allowed = [field.name for field in fields(FolderEntry)]
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, dict) or not {"name", "root"} <= row.keys() <= set(allowed):
            raise ValueError(f"{file}: an entry is {row!r}; allowed: name and root, and of {', '.join(allowed[2:])}")
    entries = [FolderEntry(**row) for row in rows]
    domains = tuple(entry.open(file.parent, seed) for entry in entries if not entry.natural)
    natural = [FolderMasks(file.parent / e.root, str(e.test), e.classes) for e in entries if e.natural]
    if len(natural) > 1:
        raise ValueError(f"{file} has {len(natural)} natural entries; allowed: one")
    return Stream(domains, natural[0] if natural else None)


def manifest_stream(folder: str | Path, data_root: str | Path, seed: int = 0, val_share: float = 0.1) -> Stream:
    """The stream of all manifests (see `manifest`) in a folder, in their order.

    Args:
        folder: With ``*.json``.
        data_root: Folder that their files are relative to.
        seed: Of what is split off to validate; the manifests decide what is tested on.
        val_share: Share of the training images that validates.

    Raises:
        ValueError: If there is no manifest, two have one place, or a file is no manifest.
    """
    manifests = [read_manifest(file) for file in sorted(Path(folder).glob("*.json"))]
    ordered = sorted((m for m in manifests if m["order"] is not None), key=lambda manifest: manifest["order"])
    if not ordered or len({manifest["order"] for manifest in ordered}) < len(ordered):
        places = {manifest["domain"]: manifest["order"] for manifest in ordered}
        raise ValueError(f"{folder} has manifests at {places}; allowed: one or more, each at a place of its own")
    domains = [
        Domain(
            m["domain"],
            *split_off(ManifestImages(m, "train", data_root), val_share, seed),
            ManifestImages(m, "test", data_root),
        )
        for m in ordered
    ]
    natural = [m for m in manifests if m["order"] is None]
    return Stream(tuple(domains), ManifestImages(natural[0], "test", data_root) if natural else None)
