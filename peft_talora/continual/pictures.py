"""Pictures of a stream, drawn with Pillow: its matrix of scores, the confusion of its domains, the course of scores.

Axes: T stages of learning, K domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..plotting import class_colours

_SCALE = np.array([[247, 251, 255], [198, 219, 239], [107, 174, 214], [33, 113, 181], [8, 48, 107]])
"""Anchors of a scale from low (light) to high (dark), interpolated linearly."""
_LARGER = 2  # pictures are drawn at this size and scaled down at the end, so that lines are smooth
_FONT, _SMALL = 13 * _LARGER, 11 * _LARGER


def draw_matrix(R: Sequence[Sequence[float]] | Tensor, names: Sequence[str], title: str) -> Image.Image:
    """Draw the matrix of a stream: a row per stage, a column per domain; darker is better.

    What a domain scored before it was trained is pale and hatched, what it scored right after has a frame.

    Args:
        R: Scores (T, K), in percent, as in `scores`; NaN where there is none.
        names: Of the domains.
        title: Above the picture: whose scores these are.

    Returns:
        The picture, to be saved.

    Raises:
        ValueError: If `names` are not K, or there are more stages than domains.
    """
    values = torch.as_tensor(R, dtype=torch.float64).numpy()
    if values.ndim != 2 or values.shape[1] != len(names) or not 0 < len(values) <= len(names):
        raise ValueError(f"R: got shape {values.shape}; {len(names)} names need (1 to {len(names)}, {len(names)}).")
    known = values[np.isfinite(values)]
    low = 10 * math.floor(known.min() / 10) if known.size else 0
    high = max(10 * math.ceil(known.max() / 10), low + 10) if known.size else 100
    table = _Table([f"after {name}" for name in names[: len(values)]], names, right=90, below=28)
    table.draw.text((table.gap, table.gap), title, "black", table.font)
    for row, column in np.ndindex(values.shape):
        score = values[row, column]
        if np.isfinite(score):
            share = (score - low) / (high - low)
            table.fill(row, column, share, f"{score:.1f}", pale=column > row, framed=column == row)
    table.add_scale(low, high)
    table.add_note("hatched: before the domain was trained; framed: right after")
    return table.finish()


def draw_confusion(
    counts: Sequence[Sequence[int]] | Tensor,
    names: Sequence[str],
    title: str,
    chosen: Sequence[str] | None = None,
) -> Image.Image:
    """Draw how many images of each domain went to which one: a row per domain, a column per choice.

    A cell is as dark as its share of the row. At the right stands the share that went to the domain itself.

    Args:
        counts: Images (domains, choices).
        names: Of the domains that images are of.
        title: Above the picture.
        chosen: What images can go to; None: `names`. What is in both is framed where it meets.

    Returns:
        The picture, to be saved.

    Raises:
        ValueError: If the shape of `counts` is not (`names`, `chosen`), or a count is negative.
    """
    chosen = names if chosen is None else chosen
    values = torch.as_tensor(counts).numpy()
    if values.shape != (len(names), len(chosen)) or (values < 0).any():
        raise ValueError(
            f"counts: got shape {values.shape}, least {values.min() if values.size else None}; needed are counts of "
            f"shape ({len(names)}, {len(chosen)}), none negative."
        )
    table = _Table(names, chosen, right=80, below=28)
    table.draw.text((table.gap, table.gap), title, "black", table.font)
    for row, name in enumerate(names):
        total = values[row].sum()
        for column, choice in enumerate(chosen):
            count = values[row, column]
            table.fill(row, column, count / max(total, 1), str(count) if count else "·", framed=choice == name)
        if name in chosen and total:
            table.add_right(row, f"{100 * values[row, list(chosen).index(name)] / total:.1f} %")
    table.add_note("rows: domain of the images; columns: where they were routed")
    return table.finish()


class _Table:
    """A picture of a table at `_LARGER` times its size: cells, the names of rows and columns, and what is beside."""

    gap, cell_height = 8 * _LARGER, 30 * _LARGER

    def __init__(self, rows: Sequence[str], columns: Sequence[str], right: int, below: int):
        self.font, self.small = ImageFont.load_default(size=_FONT), ImageFont.load_default(size=_SMALL)
        self.rows, self.columns = len(rows), len(columns)
        self.cell_width = max(52 * _LARGER, *(round(self.font.getlength(name)) + 2 * self.gap for name in columns))
        self.left = round(max(self.font.getlength(name) for name in rows)) + 3 * self.gap
        self.top = 62 * _LARGER
        size = (
            self.left + self.columns * self.cell_width + right * _LARGER,
            self.top + self.rows * self.cell_height + below * _LARGER,
        )
        self.page = Image.new("RGB", size, "white")
        self.draw = ImageDraw.Draw(self.page)
        for row, name in enumerate(rows):
            y = self.top + (row + 0.5) * self.cell_height
            self.draw.text((self.left - self.gap, y), name, "black", self.font, anchor="rm")
        for column, name in enumerate(columns):
            x = self.left + (column + 0.5) * self.cell_width
            self.draw.text((x, self.top - self.gap), name, "black", self.font, anchor="md")

    @property
    def end(self) -> tuple[int, int]:
        """The lower right corner of the cells."""
        return self.left + self.columns * self.cell_width, self.top + self.rows * self.cell_height

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """A cell, with a line of white to the next ones."""
        x, y = self.left + column * self.cell_width, self.top + row * self.cell_height
        return x + 1, y + 1, x + self.cell_width - 2, y + self.cell_height - 2

    def fill(self, row: int, column: int, share: float, text: str, pale: bool = False, framed: bool = False) -> None:
        """Colour a cell by a share of the scale and write into it."""
        box, colour = self.box(row, column), _colour(share)
        if pale:
            colour = (colour + 2 * 255.0) / 3
        self.draw.rectangle(box, tuple(colour.astype(int)))
        if pale:
            self._hatch(box, 0.88 * colour)
        dark = colour @ [0.299, 0.587, 0.114] < 140
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        ink = "white" if dark else "#707070" if pale else "black"
        halo = {"stroke_width": 2 * _LARGER, "stroke_fill": tuple(colour.astype(int))} if pale else {}
        self.draw.text(middle, text, ink, self.font, anchor="mm", **halo)
        if framed:
            self.draw.rectangle(box, outline="#e08214", width=2 * _LARGER)

    def _hatch(self, box: tuple[int, int, int, int], colour: np.ndarray) -> None:
        width, height = box[2] - box[0] + 1, box[3] - box[1] + 1
        lines = Image.new("L", (width, height), 0)
        pen = ImageDraw.Draw(lines)
        for start in range(-height, width, 7 * _LARGER):
            pen.line([(start, height), (start + height, 0)], 255, _LARGER)
        self.page.paste(tuple(colour.astype(int)), box[:2], lines)

    def add_scale(self, low: float, high: float) -> None:
        """The colours of the scale, right of the table, with its ends and middle."""
        x, bottom = self.end
        left, right = x + 2 * self.gap, x + 4 * self.gap
        for y in range(self.top, bottom):
            colour = _colour((bottom - 1 - y) / max(bottom - 1 - self.top, 1))
            self.draw.line([(left, y), (right, y)], tuple(colour.astype(int)))
        for value, anchor in ((low, "ld"), ((low + high) / 2, "lm"), (high, "la")):
            y = bottom - (bottom - self.top) * (value - low) / (high - low)
            self.draw.text((right + self.gap, y), f"{value:g}", "black", self.small, anchor=anchor)

    def add_right(self, row: int, text: str) -> None:
        """Write right of a row."""
        y = self.top + (row + 0.5) * self.cell_height
        self.draw.text((self.page.width - self.gap, y), text, "black", self.font, anchor="rm")

    def add_note(self, text: str) -> None:
        """Write below the table."""
        place = (self.left + 2, self.end[1] + self.gap)
        self.draw.text(place, text, "#505050", self.small)

    def finish(self) -> Image.Image:
        """The picture at its own size."""
        return _scaled_down(self.page)


def draw_course(curves: Mapping[str, Sequence[float]], stages: Sequence[str], title: str) -> Image.Image:
    """Draw scores after each stage of learning as curves over a linear axis.

    Args:
        curves: By label, a score in percent for each stage; NaN where there is none yet.
        stages: Names of the stages.
        title: Above the picture: what the scores are.

    Returns:
        The picture, to be saved.

    Raises:
        ValueError: If a curve has another number of scores than there are stages.
    """
    for label, scores in curves.items():
        if len(scores) != len(stages):
            raise ValueError(f"curves: {label!r} has {len(scores)} scores; there are {len(stages)} stages.")
    axes = _Axes(curves, stages)
    axes.draw.text((8 * _LARGER, 8 * _LARGER), title, "black", axes.font)
    colours = (0.8 * class_colours(len(curves) + 1)[1:]).astype(int)
    ends = []
    for (label, scores), colour in zip(curves.items(), colours, strict=True):
        spots = axes.add_curve(scores, tuple(colour))
        if spots:
            ends.append((spots[-1], label, tuple(colour)))
    axes.add_labels(ends)
    return _scaled_down(axes.page)


class _Axes:
    """A picture of curves at `_LARGER` times its size: what is where."""

    left, top, height = 50 * _LARGER, 46 * _LARGER, 300 * _LARGER

    def __init__(self, curves: Mapping[str, Sequence[float]], stages: Sequence[str]):
        self.font, self.small = ImageFont.load_default(size=_FONT), ImageFont.load_default(size=_SMALL)
        self.step = max(84 * _LARGER, *(round(self.small.getlength(stage)) + 10 * _LARGER for stage in stages))
        self.right = self.left + len(stages) * self.step
        width = self.right + round(max(self.font.getlength(label) for label in curves)) + 16 * _LARGER
        self.page = Image.new("RGB", (width, self.top + self.height + 40 * _LARGER), "white")
        self.draw = ImageDraw.Draw(self.page)
        finite = [score for scores in curves.values() for score in scores if math.isfinite(score)]
        self.low, self.high, tick = _range(finite)
        for count in range(round((self.high - self.low) / tick) + 1):
            y = self.place(0, self.low + count * tick)[1]
            self.draw.line([(self.left, y), (self.right, y)], "#e4e4e4", _LARGER)
            self.draw.text((self.left - 6 * _LARGER, y), f"{self.low + count * tick:g}", "black", self.small, "rm")
        for stage, name in enumerate(stages):
            place = (self.place(stage, self.low)[0], self.top + self.height + 8 * _LARGER)
            self.draw.text(place, name, "black", self.small, "ma")

    def place(self, stage: int, score: float) -> tuple[float, float]:
        """Pixels of a point."""
        share = (self.high - score) / (self.high - self.low)
        return self.left + (stage + 0.5) * self.step, self.top + self.height * share

    def add_curve(self, scores: Sequence[float], colour: tuple[int, ...]) -> list[tuple[float, float]]:
        """Draw the scores of all stages, with a gap where there is none, and return where they are."""
        spots = [self.place(stage, score) if math.isfinite(score) else None for stage, score in enumerate(scores)]
        for line in pairwise(spots):
            if None not in line:
                self.draw.line(line, colour, 2 * _LARGER)
        known = [spot for spot in spots if spot is not None]
        for x, y in known:
            self.draw.ellipse((x - 3 * _LARGER, y - 3 * _LARGER, x + 3 * _LARGER, y + 3 * _LARGER), colour)
        return known

    def add_labels(self, ends: Sequence[tuple[tuple[float, float], str, tuple[int, ...]]]) -> None:
        """Write the label of each curve right of its last point, none over another."""
        rows = _apart([y for (_, y), _, _ in ends], 17 * _LARGER)
        for (spot, label, colour), row in zip(ends, rows, strict=True):
            self.draw.line([spot, (self.right - 6 * _LARGER, row)], colour, 1)
            self.draw.text((self.right, row), label, colour, self.font, "lm")


def _range(scores: Sequence[float]) -> tuple[float, float, float]:
    """Ends of an axis that holds the scores, and the distance of its ticks."""
    low, high = (min(scores), max(scores)) if scores else (0.0, 100.0)
    tick = next((tick for tick in (1, 2, 5, 10) if high - low <= 6 * tick), 20)
    low, high = tick * math.floor(low / tick), tick * math.ceil(high / tick)
    return low, max(high, low + tick), tick


def _apart(rows: Sequence[float], least: float) -> list[float]:
    """Places near the given ones, in their order, no two of them closer than `least`."""
    order = sorted(range(len(rows)), key=lambda index: rows[index])
    # Groups of places that touch stand around the mean of where they belong.
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _span(rows, groups[-1], least)[0] - _span(rows, groups[-2], least)[1] < least:
            last = groups.pop()
            groups[-1] += last
    placed = list(rows)
    for group in groups:
        first = _span(rows, group, least)[0]
        for count, index in enumerate(group):
            placed[index] = first + count * least
    return placed


def _span(rows: Sequence[float], group: Sequence[int], least: float) -> tuple[float, float]:
    middle, half = sum(rows[index] for index in group) / len(group), (len(group) - 1) * least / 2
    return middle - half, middle + half


def _colour(share: float) -> np.ndarray:
    """Colour (3,) of a share of the scale, from 0 to 255."""
    place = min(max(share, 0), 1) * (len(_SCALE) - 1)
    return np.array([np.interp(place, range(len(_SCALE)), channel) for channel in _SCALE.T])


def _scaled_down(page: Image.Image) -> Image.Image:
    return page.resize((page.width // _LARGER, page.height // _LARGER), Image.Resampling.LANCZOS)
