"""Pictures, drawn with Pillow: of predictions, one row per image with label and prediction of each task; of curves."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .tasks import Task

# Anchors of a perceptually even scale from near (light) to far (dark), interpolated linearly.
_DEPTH_COLOURS = np.array(
    [[252, 253, 191], [254, 176, 120], [241, 96, 93], [183, 55, 121], [114, 31, 129], [44, 17, 95], [0, 0, 4]]
)
_UNLABELLED = np.array([128, 128, 128], dtype=np.uint8)


def class_colours(count: int) -> np.ndarray:
    """Colours that are told apart easily, (count, 3) uint8; the first is dark, as backgrounds are class 0.

    Hues are a golden section apart, so that neighbouring classes differ; lightness alternates.
    """
    colours = [
        colorsys.hls_to_rgb((0.58 + 0.618034 * index) % 1, (0.36, 0.52, 0.68)[index % 3], 0.62)
        for index in range(count)
    ]
    return np.round(255 * np.array(colours)).astype(np.uint8)


def paint(task: Task, values: torch.Tensor, labelled: torch.Tensor, depth_range: tuple[float, float]) -> np.ndarray:
    """One task's label or prediction as a picture.

    Args:
        task: What the values mean.
        values: As `Task.decode` gives them for one image: (H, W), or (3, H, W) for vectors.
        labelled: (H, W) bool; other pixels become grey.
        depth_range: Nearest and farthest metres of the scale.

    Returns:
        (H, W, 3) uint8.
    """
    array = values.float().numpy()
    if task.label_channels == 3:
        picture = (127.5 * (1 + array.transpose(1, 2, 0) * [1, -1, -1])).clip(0, 255)
    elif task.label_dtype.is_floating_point:
        near, far = depth_range
        place = ((array - near) / max(far - near, 1e-6)).clip(0, 1) * (len(_DEPTH_COLOURS) - 1)
        picture = np.stack(
            [np.interp(place, range(len(_DEPTH_COLOURS)), channel) for channel in _DEPTH_COLOURS.T], axis=-1
        )
    elif task.kind in ("edges", "saliency"):
        picture = np.repeat(255 * array.clip(0, 1)[..., None], 3, axis=-1)
    else:
        picture = class_colours(task.out_channels)[array.astype(int).clip(0, task.out_channels - 1)]
    return np.where(labelled.numpy()[..., None], picture, _UNLABELLED).astype(np.uint8)


def draw_predictions(
    tasks: Sequence[Task],
    samples: Sequence[Mapping],
    logits: Sequence[Mapping[str, torch.Tensor]],
    height: int = 160,
) -> Image.Image:
    """Draw a table of pictures: a row per image, columns for the input and for label and prediction of each task.

    Args:
        tasks: The tasks, in the order of the columns.
        samples: Samples as `peft_talora.data` describes them; a missing label is drawn grey.
        logits: Per image, each task's logits (C, H, W) at the image's size, as `MSamModel.post_process` gives them.
        height: Of a row, in pixels.

    Returns:
        The picture, to be saved.
    """
    heads = ["input"] + [f"{task.name}\n{what}" for task in tasks for what in ("label", "prediction")]
    rows = [_row(tasks, sample, logit) for sample, logit in zip(samples, logits, strict=True)]
    rows = [[_scaled(picture, height) for picture in row] for row in rows]
    widths = [max(row[column].width for row in rows) for column in range(len(heads))]
    gap, top = 6, 44
    # Label and prediction of a task stand close together, tasks apart.
    lefts, left = [], gap
    for column, width in enumerate(widths):
        lefts.append(left)
        left += width + (gap if column % 2 else 3 * gap)
    page = Image.new("RGB", (left - 2 * gap, top + len(rows) * (height + gap)), "white")
    font = ImageFont.load_default(size=14)
    draw = ImageDraw.Draw(page)
    for left, width, head in zip(lefts, widths, heads, strict=True):
        draw.multiline_text(
            (left + width / 2, top - 6), head, fill="black", font=font, anchor="md", align="center", spacing=2
        )
    for number, row in enumerate(rows):
        for left, picture in zip(lefts, row, strict=True):
            page.paste(picture, (left, top + number * (height + gap)))
    return page


def _row(tasks: Sequence[Task], sample: Mapping, logits: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
    size = tuple(sample["image"].shape[-2:])
    row = [(255 * sample["image"].permute(1, 2, 0)).round().clamp(0, 255).numpy().astype(np.uint8)]
    for task in tasks:
        label = sample["labels"].get(task.name, task.empty_label(size))
        labelled = task.has_label(label)
        prediction = task.decode(logits[task.name][None])[0]
        known = label[labelled] if task.label_dtype.is_floating_point and not task.label_channels else prediction
        depth_range = (float(known.min()), float(known.max())) if known.numel() else (0.0, 1.0)
        row.append(paint(task, label, labelled, depth_range))
        row.append(paint(task, prediction, torch.ones(size, dtype=torch.bool), depth_range))
    return row


def _scaled(picture: np.ndarray, height: int) -> Image.Image:
    image = Image.fromarray(picture)
    return image.resize((round(image.width * height / image.height), height), Image.Resampling.NEAREST)


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], title: str, x_label: str, lowest: float = 1e-4
) -> Image.Image:
    """Draw shares of one, in percent, as curves over a logarithmic axis.

    Args:
        curves: By label, points (x, y) with x from 0 ascending and y in [0, 1].
        title: Above the picture: what y is.
        x_label: What x is.
        lowest: Where the y axis ends, a power of ten; a point below it is drawn there as a circle.

    Returns:
        The picture, to be saved.
    """
    page = Image.new("RGB", (2 * 640, 2 * 360), "white")  # scaled down at the end, so that lines are smooth
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=26)
    left, right, top, bottom = 150, 1080, 80, 620
    most = max(x for points in curves.values() for x, _ in points)
    decades = round(-math.log10(lowest))

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / most, top + (bottom - top) * -math.log10(max(y, lowest)) / decades

    draw.text((left, 30), title, "black", font)
    shares = [1.0] + [digit * 10.0**-decade for decade in range(1, decades + 1) for digit in (5, 2, 1)]
    for share in shares:
        y = place(0, share)[1]
        draw.line([(left, y), (right, y)], "#e4e4e4", 2)
        label = f"{'< ' if share == shares[-1] else ''}{100 * share:g} %"
        draw.text((left - 14, y), label, "black", font, anchor="rm")
    step = 10 ** math.floor(math.log10(most))
    step = step if most / step > 3 else step // 2 or 1
    for x in range(0, int(most) + 1, step):
        draw.text((place(x, 1)[0], bottom + 14), str(x), "black", font, anchor="ma")
    draw.text(((left + right) / 2, bottom + 50), x_label, "black", font, anchor="ma")
    for (label, points), colour in zip(curves.items(), class_colours(len(curves) + 2)[::-1], strict=False):
        spots, colour = [place(*point) for point in points], tuple(colour)
        draw.line(spots, colour, 5, joint="curve")
        for (x, y), (_, share) in zip(spots, points, strict=True):
            circle = (x - 8, y - 8, x + 8, y + 8)
            draw.ellipse(circle, fill=colour if share >= lowest else "white", outline=colour, width=4)
        draw.text((spots[-1][0] + 20, spots[-1][1]), label, colour, font, anchor="lm")
    return page.resize((640, 360), Image.Resampling.LANCZOS)


def draw_scatter(
    points: Mapping[str, tuple[float, float, Sequence[float] | None]], title: str, x_label: str
) -> Image.Image:
    """Draw labelled points with error bars over a logarithmic axis.

    Args:
        points: By label, (x, y, (low, high)) or (x, y, None), with x at least 0; x = 0 has a place of its own, left of
            the axis.
        title: Above the picture: what y is.
        x_label: What x is.

    Returns:
        The picture, to be saved.
    """
    scatter = _Scatter(points)
    scatter.draw.text((scatter.left, 36), title, "black", ImageFont.load_default(size=28))
    scatter.draw_axes(x_label)
    scatter.draw_points()
    return scatter.page.resize((scatter.page.width // 2, scatter.page.height // 2), Image.Resampling.LANCZOS)


class _Scatter:
    """A picture of points at twice its size: what is where."""

    left, right, top, bottom = 130, 1500, 110, 800

    def __init__(self, points: Mapping[str, tuple[float, float, Sequence[float] | None]]):
        self.points = points
        self.page = Image.new("RGB", (1560, 940), "white")
        self.draw, self.font = ImageDraw.Draw(self.page), ImageFont.load_default(size=26)
        positive = [x for x, _, _ in points.values() if x > 0] or [1]
        self.lowest, self.highest = math.log10(min(positive)) - 0.25, math.log10(max(positive)) + 0.25
        self.begin = self.left + (150 if any(x == 0 for x, _, _ in points.values()) else 0)
        spans = [value for _, y, interval in points.values() for value in (y, *(interval or ()), 0.0)]
        margin = 0.08 * (max(spans) - min(spans)) or 1.0
        self.floor, self.ceiling = min(spans) - margin, max(spans) + margin

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        height = self.bottom - (self.bottom - self.top) * (y - self.floor) / (self.ceiling - self.floor)
        if x == 0:
            return (self.left + self.begin) / 2, height
        share = (math.log10(x) - self.lowest) / (self.highest - self.lowest)
        return self.begin + (self.right - self.begin) * share, height

    def draw_axes(self, x_label: str) -> None:
        """Grid, ticks and the label of the x axis."""
        step = 10 ** math.floor(math.log10((self.ceiling - self.floor) / 2))
        step = next(step * m for m in (0.5, 1, 2, 5) if (self.ceiling - self.floor) / (step * m) <= 9)
        for count in range(math.ceil(self.floor / step), math.floor(self.ceiling / step) + 1):
            y = self.place(0, count * step)[1]
            self.draw.line([(self.left, y), (self.right, y)], "#e4e4e4" if count else "#909090", 2 if count else 3)
            self.draw.text((self.left - 14, y), f"{count * step:g}", "black", self.font, anchor="rm")
        digits = (1,) if self.highest - self.lowest > 2.5 else (1, 2, 5)
        decades = range(math.floor(self.lowest), math.ceil(self.highest) + 1)
        for x in (digit * 10.0**decade for decade in decades for digit in digits):
            if self.lowest <= math.log10(x) <= self.highest:
                self._tick(self.place(x, 0)[0], _short(x))
        if self.begin > self.left:
            self._tick(self.place(0, 0)[0], "0")
            for y in range(self.top, self.bottom, 24):
                self.draw.line([(self.begin, y), (self.begin, y + 8)], "#b0b0b0", 2)
        self.draw.text(((self.left + self.right) / 2, self.bottom + 66), x_label, "black", self.font, anchor="ma")

    def _tick(self, x: float, label: str) -> None:
        self.draw.line([(x, self.bottom), (x, self.bottom + 10)], "#909090", 3)
        self.draw.text((x, self.bottom + 18), label, "black", self.font, anchor="ma")

    def draw_points(self) -> list[tuple[float, float, float, float]]:
        """Bars, dots and labels; a label lies where it covers least. Gives the boxes of the labels."""
        zero, border = self.place(0, 0)[1], self.begin if self.begin > self.left else 0
        taken = [(0, zero - 3, self.page.width, zero + 3), (border - 2, self.top, border + 2, self.bottom)]
        colours = (0.85 * class_colours(len(self.points) + 2)[::-1]).astype(int)
        for (x, y, interval), colour in zip(self.points.values(), colours, strict=False):
            (column, row), colour = self.place(x, y), tuple(colour)
            ends = [self.place(x, value)[1] for value in interval or (y, y)]
            if interval and interval[0] < interval[1]:
                self.draw.line([(column, ends[0]), (column, ends[1])], colour, 4)
                for end in ends:
                    self.draw.line([(column - 10, end), (column + 10, end)], colour, 4)
            self.draw.ellipse((column - 11, row - 11, column + 11, row + 11), colour)
            taken += [(column - 5, min(ends), column + 5, max(ends)), (column - 14, row - 14, column + 14, row + 14)]
        bare = len(taken)
        for label, (x, y, _) in self.points.items():
            column, row = self.place(x, y)
            boxes = self._boxes(label, column, row)
            box = min(boxes, key=lambda box: sum(_overlap(box, other) for other in taken))
            if box[1] > row + 40 or box[3] < row - 40:  # far from its point
                self.draw.line([(column, row), (column, box[1] if box[1] > row else box[3])], "#b0b0b0", 2)
            self.draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), label, "#202020", self.font, anchor="mm")
            taken.append(box)
        return taken[bare:]

    def _boxes(self, label: str, column: float, row: float) -> list[tuple[float, float, float, float]]:
        """Where a point's label may lie, the best place first; never outside the picture."""
        width, height, away = self.draw.textlength(label, self.font) + 8, 34, 18
        centres = [(sign * (away + width / 2), 0) for sign in (1, -1)]
        centres += [(x * (away + width / 2), y * (away + height / 2)) for y in (-1, 1) for x in (1, -1, 0)]
        centres += [(x * (away + width / 2), y * (away + 1.5 * height)) for y in (-1, 1) for x in (1, -1, 0)]
        centres += [(0, y * (away + rows * height)) for rows in (2.5, 3.5, 4.5) for y in (-1, 1)]
        boxes = [
            (column + x - width / 2, row + y - height / 2, column + x + width / 2, row + y + height / 2)
            for x, y in centres
        ]
        inside = (0, self.top - height, self.page.width, self.bottom)
        return [box for box in boxes if _overlap(box, inside) == _overlap(box, box)] or boxes[:1]


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Area that two boxes (left, top, right, bottom) share."""
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height)


def _short(count: float) -> str:
    """A count as people say it: 50 k, 2 M."""
    for unit, sign in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:g}{sign}"
    return f"{count:g}"
