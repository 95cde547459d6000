"""Flat scenes of shaded, textured objects that hide each other, with a mask of every object and part.

They pre-train the small SAM (`recipes/pretrain_sam.py`). Nothing of them is shared with the rooms of
``SyntheticScenes``: the shapes are plane and painted, not solids in a ray-cast room; patterns, colours, light and
layouts are their own. Every item is a pure function of (seed, split, index).

Axes: H W pixels, K masks, N objects and parts.
"""

import math
from colorsys import hsv_to_rgb
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch

from .shapes import SHAPES, Field, curve, pattern

LEAST = 1 / 256  # of the image, of a mask: one patch of the small SAM
MOST = 0.9


class ObjectScenes(torch.utils.data.Dataset):
    """``num_images`` pictures of ``size`` × ``size`` pixels with the masks of what they show.

    An item is ``{"image": float32 (3, H, W) in [0, 1], "masks": bool (K, H, W), "name": str}`` with K of at least 1:
    what can be seen of each object (its parts included), of each part, and of ground and sky.

    Args:
        split: Any name; splits share no scene.
        num_images: Length.
        size: Side in pixels.
        seed: Of all scenes.

    Raises:
        ValueError: For a length below 1 or a side below 32.
    """

    def __init__(self, split: str = "train", num_images: int = 1000, size: int = 128, seed: int = 0):
        if num_images < 1 or size < 32:
            raise ValueError(f"num_images must be at least 1 and size at least 32, not {num_images} and {size}")
        self.split, self.num_images, self.size, self.seed = split, num_images, size, seed

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.num_images:
            raise IndexError(f"index {index} is outside the {self.num_images} images of split {self.split!r}")
        random, masks = Random(f"objects {self.seed} {self.split} {index}"), []
        while not len(masks):  # a scene may hide all that is large enough
            canvas = Canvas(random, self.size)
            _LAYOUTS[random.choice(list(_LAYOUTS))](canvas, random)
            masks = canvas.masks()
        image = torch.from_numpy(_develop(canvas.image, random))
        return {"image": image, "masks": torch.from_numpy(masks), "name": f"{self.split}-{index:06d}"}


@dataclass
class Canvas:
    """The picture so far; coordinates are shares of its side, x right and y down.

    Attributes:
        image: float32 (3, H, W), linear radiance.
        objects: int16 (H, W): which object is seen.
        parts: int16 (H, W): which part is seen, 0 where none.
    """

    random: Random
    size: int
    light: tuple[float, float] = field(init=False)
    image: np.ndarray = field(init=False)
    objects: np.ndarray = field(init=False)
    parts: np.ndarray = field(init=False)
    count: int = 0

    def __post_init__(self):
        angle = self.random.uniform(0, 2 * math.pi)
        self.light = math.cos(angle), math.sin(angle)
        self.objects = np.zeros((self.size, self.size), dtype=np.int16)
        self.parts = np.zeros_like(self.objects)
        self.image = np.empty((3, self.size, self.size), dtype=np.float32)
        places = (np.arange(self.size, dtype=np.float32) + 0.5) / self.size
        x, y = np.meshgrid(places, places)
        self.image[:] = self._paint(_cover(self.random), 2 * x, 2 * y)
        if self.random.random() < 0.4:  # two grounds behind all objects, such as sky and land
            tilt, height = self.random.uniform(-0.3, 0.3), self.random.uniform(0.25, 0.75)
            below = y > height + tilt * (x - 0.5) + 0.03 * np.sin(self.random.uniform(3, 20) * x)
            self.image[:, below] = self._paint(_cover(self.random), 2 * x, 2 * y / (y + 0.3))[:, below]
            self.count += 2
            self.objects[:] = np.where(below, 2, 1)

    @staticmethod
    def _paint(cover, u, v):
        (first, second), mixture = cover
        return first[:, None, None] + (second - first)[:, None, None] * mixture(u, v)

    def add(self, shape: Field, cover, x: float, y: float, half: tuple[float, float], turn: float, decals: int = 0):
        """Put a shape at (x, y), of half extents ``half``, turned by ``turn`` radians, in front of all others."""
        frame = self._frame(x, y, half, turn)
        if frame is None:
            return
        window, u, v = frame
        height = shape(u, v)
        inside = height > 0
        if not inside.any():
            return
        self._cast_shadow(window, inside)
        colour = self._paint(cover, u * half[0] / 0.3, v * half[1] / 0.3)
        self.count += 1
        self.objects[window][inside] = self.count
        self.parts[window][inside] = 0
        for _ in range(decals):
            self._add_decal(window, colour, u, v, inside)
        colour *= self._shade(height, inside)
        np.copyto(self.image[(slice(None), *window)], colour, where=inside)

    def _frame(self, x, y, half, turn):
        """The window that can hold a shape, and its own coordinates there; None if it is out of sight."""
        reach = math.hypot(*half)
        bounds = [
            (max(0, int((c - reach) * self.size)), min(self.size, int((c + reach) * self.size) + 1)) for c in (y, x)
        ]
        if any(low >= high for low, high in bounds):
            return None
        window = tuple(slice(*bound) for bound in bounds)
        rows, columns = ((np.arange(*bound, dtype=np.float32) + 0.5) / self.size for bound in bounds)
        dy, dx = rows[:, None] - y, columns[None, :] - x
        c, s = math.cos(turn), math.sin(turn)
        return window, (c * dx + s * dy) / half[0], (c * dy - s * dx) / half[1]

    def _cast_shadow(self, window, inside):
        if self.random.random() < 0.4:
            return
        reach = self.random.uniform(0.01, 0.05) * self.size
        shift = [round(reach * part) for part in self.light]
        strength = self.random.uniform(0.2, 0.6)
        rows, columns = np.nonzero(inside)
        rows = np.clip(rows + window[0].start + shift[1], 0, self.size - 1)
        columns = np.clip(columns + window[1].start + shift[0], 0, self.size - 1)
        shade = np.zeros((self.size, self.size), dtype=bool)
        shade[rows, columns] = True
        self.image[:, shade] *= 1 - strength

    def _add_decal(self, window, colour, u, v, inside):
        random = self.random
        half = (random.uniform(0.15, 0.5), random.uniform(0.15, 0.5))
        a, b, shape = random.uniform(-0.5, 0.5), random.uniform(-0.5, 0.5), random.choice(SHAPES)(random)
        u, v = (u - a) / half[0], (v - b) / half[1]
        here = (shape(u, v) > 0) & inside
        np.copyto(colour, self._paint(_cover(random), u, v), where=here)
        self.count += 1
        self.parts[window][here] = self.count

    def _shade(self, height, inside):
        """Light on a flat, domed or bevelled surface (H, W)."""
        steep = self.random.choice((0.0, 0.4, 0.4, 1.5))
        if not steep or min(height.shape) < 2:
            return self.random.uniform(0.8, 1.1)
        dome = np.sqrt(np.clip(height * steep, 0, 0.98))
        down, right = np.gradient(dome)
        facing = -(right * self.light[0] + down * self.light[1]) * math.sqrt(inside.sum()) / 2
        return np.clip(0.85 - 0.45 * facing, 0.25, 1.6)

    def masks(self) -> np.ndarray:
        """What can be seen of each object and part, bool (K, H, W); neither specks nor nearly the whole image."""
        found = [self.objects == k for k in range(1, self.count + 1)] + [
            self.parts == k for k in range(1, self.count + 1)
        ]
        least, most = LEAST * self.size**2, MOST * self.size**2
        kept = [mask for mask in found if least <= mask.sum() <= most]
        return np.stack(kept) if kept else np.empty((0, *self.objects.shape), dtype=bool)


def _colour(random):
    return np.array(hsv_to_rgb(random.random(), random.random() ** 1.5, random.uniform(0.08, 1.0)), dtype=np.float32)


def _cover(random):
    """Two linear colours and the pattern that mixes them."""
    first = _colour(random)
    second = _colour(random) if random.random() < 0.5 else first * random.uniform(0.4, 1.6)
    return (first, second), pattern(random)


def _extents(random, size):
    stretch = math.exp(random.uniform(-0.7, 0.7))
    return size * math.sqrt(stretch), size / math.sqrt(stretch)


def _log_uniform(random, low, high):
    return math.exp(random.uniform(math.log(low), math.log(high)))


def _pile(canvas, random):
    """Objects of all sizes anywhere, the small ones mostly in front."""
    sizes = sorted((_log_uniform(random, 0.04, 0.4) for _ in range(random.randint(4, 14))), reverse=True)
    for size in sizes:
        place = random.uniform(0, 1), random.uniform(0, 1)
        shape, turn = random.choice(SHAPES)(random), random.uniform(0, 2 * math.pi)
        canvas.add(shape, _cover(random), *place, _extents(random, size), turn, random.choice((0, 0, 1, 2)))


def _land(canvas, random):
    """Upright objects that are larger the lower they stand."""
    horizon, near = random.uniform(0.2, 0.5), random.uniform(0.15, 0.4)
    for depth in sorted(random.random() for _ in range(random.randint(4, 12))):
        size = near * (0.12 + 0.88 * depth)
        foot = horizon + (1.05 - horizon) * depth
        half = _extents(random, size)
        shape = random.choice(SHAPES)(random)
        canvas.add(
            shape, _cover(random), random.random(), foot - half[1], half, random.gauss(0, 0.1), random.choice((0, 1))
        )


def _array(canvas, random):
    """Many copies of one object or two, side by side."""
    kinds = [(random.choice(SHAPES)(random), _cover(random)) for _ in range(random.randint(1, 2))]
    number = random.randint(2, 6)
    half = _extents(random, random.uniform(0.25, 0.6) / number)
    for row in range(number):
        for column in range(number):
            shape, cover = random.choice(kinds)
            x, y = ((k + 0.5 + random.gauss(0, 0.12)) / number for k in (column, row))
            if random.random() < 0.8:
                canvas.add(shape, cover, x, y, half, random.uniform(0, 2 * math.pi))


def _close_up(canvas, random):
    """One large thing with parts, and cracks or specks before it."""
    place = random.uniform(0.35, 0.65), random.uniform(0.35, 0.65)
    half, turn = _extents(random, random.uniform(0.25, 0.5)), random.uniform(0, 2 * math.pi)
    canvas.add(random.choice(SHAPES)(random), _cover(random), *place, half, turn, random.randint(1, 4))
    for _ in range(random.randint(1, 5)):
        shape = curve(random) if random.random() < 0.5 else random.choice(SHAPES)(random)
        half = _extents(random, _log_uniform(random, 0.04, 0.2))
        canvas.add(shape, _cover(random), random.random(), random.random(), half, random.uniform(0, 2 * math.pi))


_LAYOUTS = {"pile": _pile, "land": _land, "array": _array, "close-up": _close_up}


def _develop(radiance, random):
    """Uneven light, blur, exposure, gamma, a little noise and a cast of colour; float32 in [0, 1]."""
    size = radiance.shape[-1]
    noise = np.random.default_rng(random.getrandbits(64))
    slope = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    a, b = (random.uniform(-0.6, 0.6) for _ in range(2))
    radiance = radiance * (1 + a * slope[None, :] + b * slope[:, None])
    share = random.choice((0.0, 0.3, 0.6))
    for axis in (1, 2):
        radiance = (1 - share) * radiance + share / 2 * (np.roll(radiance, 1, axis) + np.roll(radiance, -1, axis))
    radiance *= random.uniform(0.2, 0.45) / max(float(radiance.mean()), 1e-3)
    if random.random() < 0.15:
        radiance[:] = radiance.mean(axis=0)
    radiance *= np.array([random.uniform(0.85, 1.15) for _ in range(3)], dtype=np.float32)[:, None, None]
    image = np.clip(radiance, 0, 1) ** random.uniform(0.45, 0.8)
    image += random.uniform(0.0, 0.03) * noise.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 1, dtype=np.float32)
