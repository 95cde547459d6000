"""Means of few runs and their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and 95 % interval of the mean: mean ± t(0.975, n − 1) · s / √n, with s the sample's deviation.

    Args:
        values: Of n independent runs, one or more.

    Returns:
        The mean, and (low, high), or None where n is 1.
    """
    if not values:
        raise ValueError("values are empty; allowed: one or more")
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return mean, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(0.975, n - 1) * deviation / math.sqrt(n)
    return mean, (mean - half, mean + half)


def t_quantile(probability: float, freedom: int) -> float:
    """The value that Student's t with `freedom` degrees of freedom stays below with a probability of 0.5 to 1.

    With t = √ν · tan θ, P(|T| < t) is a finite sum of powers of cos θ (Abramowitz and Stegun, 26.7.3 and 26.7.4); θ is
    found by bisection.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"probability {probability}, freedom {freedom}; allowed: 0.5 to below 1, and 1 or more")
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if _within(middle, freedom) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _within(theta: float, freedom: int) -> float:
    """P(|T| < √ν · tan θ)."""
    odd = freedom % 2
    term, total = math.cos(theta) if odd else 1.0, 0.0
    for k in range(2 if odd else 1, freedom, 2):
        total += term
        term *= math.cos(theta) ** 2 * k / (k + 1)
    return (theta + math.sin(theta) * total) * 2 / math.pi if odd else math.sin(theta) * total
