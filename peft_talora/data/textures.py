"""Solid textures for the synthetic scenes: a pattern of points mixes two colours.

A pattern takes points (3, N), already scaled so that its own period is about 1, and returns the share (N,) in [0, 1]
of the second colour.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Pattern = Callable[[np.ndarray], np.ndarray]
_SIDE = 64  # of the periodic noise volume; a power of two, so that indices wrap with a mask


@lru_cache(maxsize=1)
def _noise_volume() -> np.ndarray:
    """A fixed periodic volume of fractal noise, flattened, mean 0.5, in [0, 1]."""
    spectrum = np.fft.rfftn(np.random.default_rng(0).standard_normal((_SIDE, _SIDE, _SIDE)))
    x, y, z = np.meshgrid(*[np.fft.fftfreq(_SIDE)] * 2, np.fft.rfftfreq(_SIDE), indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    radius[0, 0, 0] = np.inf
    volume = np.fft.irfftn(spectrum / radius**2.2, s=(_SIDE, _SIDE, _SIDE), axes=(0, 1, 2))
    return np.clip(0.5 + volume / (5 * volume.std()), 0, 1).astype(np.float32).ravel()


def noise(points):
    """Clouds of several sizes, the largest about a period wide."""
    i, j, k = (points * 32).astype(np.int32) & (_SIDE - 1)
    return _noise_volume().take((i * _SIDE + j) * _SIDE + k)


def _fraction(x):
    return x - np.floor(x)


def plain(points):
    """One colour, slightly uneven."""
    return 0.3 * noise(points)


def checker(points):
    """Cubes of alternating colour."""
    x, y, z = np.floor(points).astype(np.int32)
    return ((x + y + z) & 1).astype(np.float32)


def stripes(points):
    """Upright stripes on walls of either direction."""
    return np.clip(4 * np.abs(2 * _fraction(points[0] + points[2]) - 1) - 1.5, 0, 1)


def bands(points):
    """Level bands."""
    return np.clip(4 * np.abs(2 * _fraction(points[1]) - 1) - 1.5, 0, 1)


def wood(points):
    """Year rings around an upright trunk."""
    rings = np.hypot(points[0], points[2]) + 1.5 * noise(points * 0.3)
    return _fraction(2 * rings)


def planks(points):
    """Boards along x, each of its own tone, with gaps."""
    x, y, z = points
    row = np.floor(z)
    tone = _fraction(np.sin(row * 12.9898) * 437.58)
    board = np.floor(x * 0.15 + tone * 7)
    tone = _fraction(tone + board * 0.618)
    grain = noise(np.stack([x * 0.15, y, z]))
    gap = z - row < 0.08
    return np.where(gap, 0, 0.2 + 0.4 * tone + 0.4 * grain)


def tiles(points):
    """Square tiles on a level floor, with joints."""
    x, _, z = points
    column, row = np.floor(x), np.floor(z)
    tone = _fraction(np.sin(column * 12.9898 + row * 78.233) * 437.58)
    joint = np.minimum(x - column, z - row) < 0.06
    return np.where(joint, 0, 0.6 + 0.4 * tone)


def marble(points):
    """Bright veins."""
    veins = np.abs(_fraction(points[0] + points[1] + 4 * noise(points * 0.5)) - 0.5)
    return 1 - np.clip(5 * veins, 0, 1)


def painting(half: np.ndarray, scale: float) -> Pattern:
    """Clouds of paint inside a frame of the first colour, on a panel of half extents ``half``."""

    def pattern(points):
        x, y, _ = np.abs(points)
        framed = np.maximum(x - half[0], y - half[1]) > -0.05
        paint = np.clip(4 * noise(points * scale) - 1.5, 0, 1)
        return np.where(framed, 0, 0.25 + 0.75 * paint)

    return pattern


def panes(half: np.ndarray) -> Pattern:
    """Four panes with the sky behind, between bars of the second colour, on a panel of half extents ``half``."""

    def pattern(points):
        x, y, _ = np.abs(points)
        bars = np.maximum(x - half[0], y - half[1]) > -0.06
        bars |= np.minimum(x, y) < 0.025
        return np.where(bars, 1, 0.3 + 0.3 * points[1] / half[1])

    return pattern


@dataclass(frozen=True)
class Material:
    """A pattern of two colours (3,) of ``period`` metres, with a ``gloss`` and a ``glow`` of its own, each 0 … 1."""

    pattern: Pattern
    colours: tuple[np.ndarray, np.ndarray]
    period: float = 1.0
    phase: tuple[float, float, float] = (0.0, 0.0, 0.0)  # periods
    gloss: float = 0.0
    glow: float = 0.0

    def albedo(self, points: np.ndarray) -> np.ndarray:
        """Colours (3, N) at points (3, N) in metres."""
        phase = np.array(self.phase, dtype=np.float32)[:, None]
        share = self.pattern(points / self.period + phase)
        first, second = self.colours
        return first[:, None] + (second - first)[:, None] * share
