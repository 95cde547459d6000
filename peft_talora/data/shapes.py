"""Plane shapes and patterns for the object scenes, as functions of coordinates in an object's own frame.

A shape takes u and v, float32 arrays of equal size, and returns a height: above 0 inside, at most about 1, 0 on the
outline. The outline lies within the unit square [−1, 1]². A pattern takes u and v as well and returns the share in
[0, 1] of a second colour. Both are drawn from a `random.Random`, which alone decides what they are.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from random import Random

import numpy as np

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]
_SIDE = 256  # of the periodic noise image; a power of two, so that indices wrap with a mask


def _radial(radius: Callable[[np.ndarray], np.ndarray], largest: float) -> Field:
    """A star-shaped outline at distance ``radius(angle) / largest`` from the middle."""

    def shape(u, v):
        return 1 - np.hypot(u, v) * largest / radius(np.arctan2(v, u))

    return shape


def blob(random: Random) -> Field:
    """A smooth round thing with a few bumps."""
    waves = [(k, random.uniform(0, 0.5) / k, random.uniform(0, 2 * math.pi)) for k in range(2, random.randint(4, 7))]
    return _radial(lambda t: 1 + sum(a * np.cos(k * t + phase) for k, a, phase in waves), 1 + sum(w[1] for w in waves))


def superellipse(random: Random) -> Field:
    """From a rhombus (power 1) over an ellipse (2) to nearly a rectangle (8)."""
    power = random.choice((1.0, 2.0, 2.0, 3.0, 8.0))
    return lambda u, v: 1 - (np.abs(u) ** power + np.abs(v) ** power) ** (1 / power)


def polygon(random: Random) -> Field:
    """A regular polygon of three to seven corners."""
    corners = random.randint(3, 7)
    return _radial(
        lambda t: 1 / np.cos((t % (2 * math.pi / corners)) - math.pi / corners), 1 / math.cos(math.pi / corners)
    )


def star(random: Random) -> Field:
    """A star of four to nine points, or a gear of as many teeth."""
    points, depth, hard = random.randint(4, 9), random.uniform(0.25, 0.55), random.choice((1.0, 1.0, 8.0))
    return _radial(lambda t: 1 - depth / 2 + depth / 2 * np.clip(hard * np.cos(points * t), -1, 1), 1.0)


def ring(random: Random) -> Field:
    """A disc or a square with a hole."""
    width, power = random.uniform(0.15, 0.4), random.choice((2.0, 2.0, 8.0))
    return lambda u, v: 1 - np.abs((np.abs(u) ** power + np.abs(v) ** power) ** (1 / power) - 1 + width) / width


def crescent(random: Random) -> Field:
    """A disc that another disc bites."""
    away, size = random.uniform(0.4, 0.9), random.uniform(0.6, 0.9)
    return lambda u, v: np.minimum(1 - np.hypot(u, v), np.hypot(u - away, v) / size - 1)


def curve(random: Random) -> Field:
    """A band along a wave: a crack, a worm or a rail, by its width."""
    width, height = random.choice((random.uniform(0.04, 0.1), random.uniform(0.1, 0.3))), random.uniform(0, 0.65)
    pace, phase = random.uniform(1, 5), random.uniform(0, 6)
    return lambda u, v: np.minimum(1 - np.abs(v - height * np.sin(pace * u + phase)) / width, (1 - np.abs(u)) / width)


def bars(random: Random) -> Field:
    """Crossing and adjoining bars: plus signs, letters, frames and chairs."""
    boxes = []
    for _ in range(random.randint(2, 4)):
        long, short = random.uniform(0.5, 1.0), random.uniform(0.12, 0.3)
        half = (long, short) if random.random() < 0.5 else (short, long)
        boxes.append([(random.uniform(h - 1, 1 - h), h) for h in half])

    def shape(u, v):
        return np.maximum.reduce([1 - np.maximum(np.abs(u - a) / h, np.abs(v - b) / k) for (a, h), (b, k) in boxes])

    return shape


def plant(random: Random) -> Field:
    """A crown on a stem."""
    crown, thick, reach = blob(random), random.uniform(0.05, 0.15), random.uniform(0.45, 0.65)

    def shape(u, v):
        stem = np.minimum(1 - np.abs(u) / thick, np.minimum(v + 0.3, 1 - v) / thick)
        return np.maximum(crown(u / reach, (v + 1 - reach) / reach), stem)

    return shape


SHAPES = (blob, superellipse, polygon, star, ring, crescent, curve, bars, plant)


@lru_cache(maxsize=1)
def _noise_image() -> np.ndarray:
    """A fixed periodic image of fractal noise, flattened, mean 0.5, in [0, 1]."""
    spectrum = np.fft.rfft2(np.random.default_rng(1).standard_normal((_SIDE, _SIDE)))
    radius = np.hypot(np.fft.fftfreq(_SIDE)[:, None], np.fft.rfftfreq(_SIDE)[None, :])
    radius[0, 0] = np.inf
    image = np.fft.irfft2(spectrum / radius**1.5, s=(_SIDE, _SIDE))
    return np.clip(0.5 + image / (5 * image.std()), 0, 1).astype(np.float32).ravel()


def _noise(u, v):
    i, j = (u * 64).astype(np.int32) & (_SIDE - 1), (v * 64).astype(np.int32) & (_SIDE - 1)
    return _noise_image().take(i * _SIDE + j)


def _wave(x):
    """A triangle between 0 and 1 of period 1, with flattened tops."""
    return np.clip(3 * np.abs(2 * (x - np.floor(x)) - 1) - 1, 0, 1)


def pattern(random: Random) -> Field:
    """One of seven patterns, of a random size, place and contrast."""
    size, a, b = math.exp(random.uniform(math.log(0.15), math.log(1.0))), random.uniform(0, 9), random.uniform(0, 9)
    share = random.uniform(0.3, 1.0)
    kinds = {
        "even": lambda u, v: 0.15 * _noise(u + a, v + b),
        "clouds": lambda u, v: np.clip(3 * _noise(u / size + a, v / size + b) - 1, 0, 1),
        "grain": lambda u, v: _noise(8 * u + a, v / size + b),
        "stripes": lambda u, v: _wave(u / size + a),
        "dots": lambda u, v: _wave(u / size + a) * _wave(v / size + b),
        "checks": lambda u, v: ((np.floor(u / size + a) + np.floor(v / size + b)) % 2).astype(np.float32),
        "rings": lambda u, v: _wave((np.hypot(u, v) + 0.3 * _noise(u + a, v + b)) / size),
    }
    kind = kinds[random.choice(("even", "even", *kinds))]
    return lambda u, v: share * kind(u, v)
