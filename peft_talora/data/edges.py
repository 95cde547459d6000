"""Boundaries between labelled regions."""

import numpy as np

from ..losses import IGNORE_INDEX


def boundaries(regions: np.ndarray, ignored: int | None = None) -> np.ndarray:
    """Edge map of an integer array of regions (H, W): 1 on both sides of a boundary, 0 elsewhere, 255 unknown.

    Lines are two pixels wide. Pixels of region ``ignored`` are unknown, and so are those that touch no other region
    but that one.
    """
    edge = np.zeros(regions.shape, dtype=bool)
    unknown = np.zeros(regions.shape, dtype=bool) if ignored is None else regions == ignored
    blind = unknown.copy()
    for a, b in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        differs = regions[a] != regions[b]
        if ignored is not None:
            touches = unknown[a] | unknown[b]
            for side in (a, b):
                blind[side] |= differs & touches
            differs &= ~touches
        edge[a] |= differs
        edge[b] |= differs
    labels = edge.astype(np.uint8)
    labels[blind & ~edge] = IGNORE_INDEX
    return labels
