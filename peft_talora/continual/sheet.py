"""Paper for generated images, and what several of them show: noise, lines, dents and ragged patches.

Axes: H W pixels. Coordinates x (right) and y (down) run from −1 to 1.
"""

import math
from random import Random

import numpy as np

from ..data.shapes import blob, crescent


class Sheet:
    """Paper of one image: its coordinates, float32 (H, W), and what is random about it.

    Args:
        random: Decides all that is drawn on it.
        size: Side in pixels.
    """

    def __init__(self, random: Random, size: int):
        self.random, self.size = random, size
        self.generator = np.random.default_rng(random.getrandbits(64))
        line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
        self.x, self.y = np.meshgrid(line, line)
        self._frequencies = np.meshgrid(np.fft.rfftfreq(size, 2 / size), np.fft.fftfreq(size, 2 / size))

    def noise(self, coarsest: float, slope: float = 2.0, along: float = 1.0, turn: float = 0.0) -> np.ndarray:
        """Noise of mean 0 and deviation 1, (H, W).

        Args:
            coarsest: Size of its largest clouds; 2 is the image's side.
            slope: Amplitudes fall with frequency to this power: 1 is rough, 3 smooth.
            along: How many times longer than wide its clouds are.
            turn: Direction in which they are long, in radians from x.
        """
        a, b = self._frequencies
        c, s = math.cos(turn), math.sin(turn)
        radius = np.hypot((c * a + s * b) * along, c * b - s * a) * coarsest
        white = self.generator.standard_normal((self.size, self.size), dtype=np.float32)
        field = np.fft.irfft2(np.fft.rfft2(white) / (1 + radius**2) ** (slope / 2), s=white.shape)
        field -= field.mean()
        return (field / field.std()).astype(np.float32)

    def frame(self, x: float, y: float, half: tuple[float, float], turn: float) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates u, v (H, W) of a thing at (x, y), of half extents `half`, turned by `turn` radians."""
        c, s = math.cos(turn), math.sin(turn)
        dx, dy = self.x - x, self.y - y
        return (c * dx + s * dy) / half[0], (c * dy - s * dx) / half[1]

    def turn(self) -> float:
        """Any direction, in radians."""
        return self.random.uniform(0, 2 * math.pi)

    def place(self, reach: float) -> tuple[float, float]:
        """A place no farther than `reach` from the middle, in x and in y."""
        return self.random.uniform(-reach, reach), self.random.uniform(-reach, reach)

    def line(self, x: float, y: float, length: float, width: float, turn: float) -> np.ndarray:
        """A meandering line, bool (H, W), tapered at its ends."""
        u, v = self.frame(x, y, (length, length), turn)
        a, b, p, q = (self.random.uniform(0, high) for high in (0.25, 0.1, 6, 6))
        away = np.abs(v - a * np.sin(2.5 * u + p) - b * np.sin(7 * u + q)) * length
        return (away < width * (1 - 0.6 * u * u)) & (np.abs(u) < 1)


def dents(sheet: Sheet, x: float, y: float, reach: float, number: int, sizes: tuple[float, float]) -> np.ndarray:
    """Small rough blobs around (x, y), as the height of the highest (H, W): above 0 inside."""
    random, height = sheet.random, np.full_like(sheet.x, -9)
    for _ in range(number):
        size, stretch = random.uniform(*sizes), random.uniform(0.7, 1.4)
        place = x + random.gauss(0, reach), y + random.gauss(0, reach)
        u, v = sheet.frame(*place, (size * stretch, size / stretch), sheet.turn())
        np.maximum(height, blob(random)(u, v), out=height)
    return height


def patch(sheet: Sheet, x: float, y: float, half: tuple[float, float], turn: float, rough: float) -> np.ndarray:
    """The height (H, W) of one ragged blob or crescent: above 0 inside, about 1 in its middle."""
    outline = sheet.random.choice((blob, blob, crescent))(sheet.random)
    return outline(*sheet.frame(x, y, half, turn)) + rough * sheet.noise(0.25, 1.5)
