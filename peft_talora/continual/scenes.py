"""Generated domains that mimic CoSAM's, for streams that need no data: what is asked differs, the colours do not.

CoSAM (arXiv 2412.06418) goes from pits on ball screws over rail defects, industrial anomalies and camouflaged animals
to polyps; `DomainScenes` paints one image of one of these domains (see `painters`), with one mask. Light and colour
are the same in law for all of them: each channel of each image has a mean and a deviation drawn from one distribution
that knows no domain, so that only structure tells where an image comes from.

Axes: C colours, H W pixels.
"""

from random import Random

import numpy as np
import torch

from ..promptable import RoomMasks
from .painters import PAINTERS
from .sheet import Sheet

DOMAINS = tuple(painter.__name__ for painter in PAINTERS)
"""Names of the generated domains, in the order of CoSAM's stream."""
NATURAL = "natural"
"""The domain that no stream trains on: one object, part or plane of a room of `SyntheticScenes`."""
LEAST = 1 / 200  # of the image, of a mask
MOST = 0.6
_MEAN, _DEVIATION, _TINT = (0.38, 0.58), (0.12, 0.2), 0.07


class DomainScenes(torch.utils.data.Dataset):
    """``num_images`` pictures of ``size`` × ``size`` pixels of one domain, each with the one mask that is meant.

    An item is ``{"image": float32 (3, H, W) in [0, 1], "masks": bool (1, H, W), "name": str}``, a pure function of
    (seed, domain, split, index) and of the size.

    Args:
        domain: One of ``DOMAINS``, or ``NATURAL``.
        split: Any name; splits share no scene.
        num_images: Length.
        size: Side in pixels.
        seed: Of all scenes.

    Raises:
        ValueError: For another domain, a length below 1 or a side below 32.
    """

    def __init__(self, domain: str, split: str = "train", num_images: int = 100, size: int = 128, seed: int = 0):
        if domain not in (*DOMAINS, NATURAL):
            raise ValueError(f"domain is {domain!r}; allowed: {', '.join((*DOMAINS, NATURAL))}")
        if num_images < 1 or size < 32:
            raise ValueError(f"num_images must be at least 1 and size at least 32, not {num_images} and {size}")
        self.domain, self.split, self.num_images, self.size, self.seed = domain, split, num_images, size, seed
        self._paint = _natural if domain == NATURAL else _painted

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.num_images:
            raise IndexError(f"index {index} is outside the {self.num_images} images of split {self.split!r}")
        random = Random(f"domains {self.seed} {self.domain} {self.split} {index}")
        image, mask = self._paint(random, self.domain, self.size)
        name = f"{self.domain}-{self.split}-{index:06d}"
        return {"image": torch.from_numpy(develop(image, random)), "masks": torch.from_numpy(mask[None]), "name": name}


def _painted(random: Random, domain: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    painter = PAINTERS[DOMAINS.index(domain)]
    while True:  # what is drawn may fall out of the picture
        sheet = Sheet(random, size)
        light, mask = painter(sheet)
        if LEAST <= mask.mean() <= MOST:
            break
    tones = np.stack([sheet.noise(1.0, 4) for _ in range(3)])
    return light / light.std() + 0.2 * tones, mask


def _natural(random: Random, domain: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    while True:
        room = RoomMasks("domains", 1, size, seed=random.getrandbits(32))[0]
        if len(room["masks"]):
            break
    return room["image"].numpy(), random.choice(list(room["masks"].numpy()))


def develop(image_CHW: np.ndarray, random: Random) -> np.ndarray:
    """The picture (3, H, W) of radiances of any scale, in 255ths as in a file of 8 bits.

    Each channel gets a mean and a deviation that are drawn; they hold to about 0.02, as what lies beyond 0 and 1 is
    cut off.
    """
    flat = image_CHW.reshape(3, -1).astype(np.float32)
    flat = flat - flat.mean(1, keepdims=True)
    flat /= flat.std(1, keepdims=True) + 1e-6
    noise = np.random.default_rng(random.getrandbits(64)).standard_normal(flat.shape, dtype=np.float32)
    flat = (flat + 0.1 * noise) / np.float32(1.01**0.5)
    mean, deviation = random.uniform(*_MEAN), random.uniform(*_DEVIATION)
    means = np.array([mean + random.uniform(-_TINT, _TINT) for _ in range(3)], dtype=np.float32)
    deviations = np.array([deviation * random.uniform(0.85, 1.15) for _ in range(3)], dtype=np.float32)
    image = np.clip(means[:, None] + deviations[:, None] * flat, 0, 1).reshape(image_CHW.shape)
    return np.round(image * 255) / np.float32(255)
