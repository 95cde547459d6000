"""The eight generated domains, each as a function that paints the light of one image and says what is meant in it.

A painter takes a `Sheet` and returns ``(light_HW, mask_HW)``: float32 of any mean and scale, and bool. Within one box
the domains ask for different things:

===============  ==================================================================================================
`pits`           dark pits and cracks on brushed metal; not the bright glints between them
`rails`          the whole damage of a rail's head, with its bright lip and the islands that are still whole
`heavy_rails`    of such a damage only the dark holes; neither its lip nor the rust between them
`textures`       where a regular texture is turned and squeezed; not the stains, which are only darker or brighter
`pills`          bright flecks and scratches on a pill; not its dark imprint
`bottles`        the broken part of a bottle's rim, seen from above; neither the intact rim nor the inside
`camouflage`     the whole animal, patterned almost like the ground; not the leaves, which are easier to see
`polyps`         the whole bump of the same tissue, with its highlights; not its shadow
===============  ==================================================================================================

Axes: H W pixels. Coordinates x (right) and y (down) run from −1 to 1.
"""

import math

import numpy as np

from ..data.shapes import bars, blob
from .sheet import Sheet, dents, patch

Painted = tuple[np.ndarray, np.ndarray]


def pits(sheet: Sheet) -> Painted:
    """Dark pits and cracks on the brushed metal of a screw, among glints."""
    random, turn = sheet.random, sheet.random.gauss(0.6, 0.2)
    along, across = sheet.frame(0, 0, (1, 1), turn)
    grooves = np.sin(random.uniform(5, 8) * (across + random.uniform(0.05, 0.2) * along**2) + random.uniform(0, 6))
    light = 0.45 * sheet.noise(0.25, 1.2, along=14, turn=turn) + 0.7 * np.tanh(5 * grooves) + 0.4 * grooves
    x, y = sheet.place(0.45)
    reach, sizes = random.uniform(0.15, 0.35), (0.06, 0.13)
    dark = dents(sheet, x, y, reach, random.randint(3, 8), sizes)
    meant = dark > 0
    for _ in range(random.randint(0, 2)):
        meant |= sheet.line(x + random.gauss(0, 0.1), y, reach * 1.5, random.uniform(0.035, 0.055), sheet.turn())
    glints = dents(sheet, x, y, 1.3 * reach, random.randint(3, 8), sizes) > 0
    light[glints] += 2.0
    light[(dark > -0.35) & ~meant] += 0.8  # the lip of a pit
    light[meant] = -2.0 + 0.3 * light[meant]
    return light, meant


def _ballast(sheet: Sheet) -> np.ndarray:
    """Stones beside a rail: light (H, W)."""
    return 0.7 * np.abs(sheet.noise(0.15, 2.5)) + 0.3 * sheet.noise(0.1, 1)


def rails(sheet: Sheet) -> Painted:
    """A narrow rail between stones; the whole of what is damaged on its head."""
    random, tilt, half = sheet.random, sheet.random.gauss(0, 0.06), sheet.random.uniform(0.45, 0.65)
    middle = random.uniform(-0.2, 0.2)
    away = np.abs(sheet.x - middle - tilt * sheet.y)
    light = np.where(away < half, 1.2 + 0.35 * sheet.noise(0.3, 1.2, along=20, turn=math.pi / 2 - tilt), 0)
    light -= 0.9 * (away > half * 0.8) * (away < half)
    light = np.where(away < half, light, _ballast(sheet) - 0.8)
    y = random.uniform(-0.5, 0.5)
    size, turn = random.uniform(0.4, 0.6), random.uniform(0.4, 1.2) * random.choice((-1, 1))
    height = patch(sheet, middle + tilt * y, y, (size, size * 0.6), turn, 0.1)
    meant = (height > 0) & (away < half * 0.98)
    inside = sheet.noise(0.2, 2)
    light[meant] = np.where(inside > 0.2, light, -1.0 + 0.4 * inside)[meant]
    light[meant & (height < 0.18)] += 1.0
    return light, meant


def heavy_rails(sheet: Sheet) -> Painted:
    """A broad rail with marks of grinding across; of the damage only its dark holes."""
    random, tilt = sheet.random, sheet.random.gauss(0, 0.06)
    light = 0.45 * sheet.noise(0.25, 1.0, along=10, turn=tilt)
    light += 0.35 * np.cos(random.uniform(25, 40) * (sheet.y - tilt * sheet.x) + 0.5 * sheet.noise(1, 2))
    middle, band = random.uniform(-0.4, 0.4), random.uniform(0.25, 0.5)
    light += 1.0 * np.exp(-(((sheet.x - middle + tilt * sheet.y) / band) ** 2) * 2)
    x, y = sheet.place(0.4)
    size = random.uniform(0.4, 0.65)
    height = patch(sheet, x, y, (size, size * random.uniform(0.6, 0.9)), sheet.turn(), 0.1)
    inside, cores = height > 0, sheet.noise(0.3, 3)
    light[inside] = 0.1 + 0.35 * sheet.noise(0.1, 1)[inside]
    light[inside & (height < 0.15)] += 1.4
    meant = (height > 0.15) & (cores < np.quantile(cores[inside], 0.4))
    light[meant] = -1.7 + 0.2 * light[meant]
    return light, meant


def _carpet(u, v):
    return np.sin(38 * u) * np.sin(38 * v) + 0.35 * np.sin(19 * (u + v))


def _wires(u, v):
    return 1.6 * np.maximum(np.cos(14 * u), np.cos(14 * v)) ** 5


def _wood(u, v):
    return np.sin(30 * v + 2.5 * np.sin(2.2 * u) + 1.5 * np.sin(5 * u + 7 * v)) + 0.4 * np.sin(70 * v)


def _leather(u, v):
    return 1.3 * np.abs(np.sin(17 * u + 2 * np.sin(9 * v)) + np.sin(14 * v + 2 * np.sin(11 * u)))


def _weave(u, v):
    return np.where(np.sin(12 * u) * np.sin(12 * v) > 0, np.sin(48 * u), np.sin(48 * v))


TEXTURES = (_carpet, _wires, _wood, _leather, _weave)


def textures(sheet: Sheet) -> Painted:
    """A texture all over the image, turned and squeezed in one region; stains elsewhere and across."""
    random, texture = sheet.random, sheet.random.choice(TEXTURES)
    turn, scale = sheet.turn(), random.uniform(0.8, 1.2)
    u, v = sheet.frame(*sheet.place(1), (scale, scale), turn)
    light = texture(u, v) + 0.25 * sheet.noise(0.2, 1)
    squeeze, more = random.choice((0.55, 1.8)), random.uniform(0.6, 1.0)
    u, v = sheet.frame(*sheet.place(1), (scale * squeeze, scale * squeeze), turn + more)
    x, y = sheet.place(0.4)
    size = random.uniform(0.4, 0.65)
    height = patch(sheet, x, y, (size, size * random.uniform(0.4, 0.7)), sheet.turn(), 0.06)
    meant = height > 0
    light[meant] = (texture(u, v) + 0.25 * sheet.noise(0.2, 1))[meant]
    light[meant & (height < 0.1)] -= 0.9  # where it is sewn in
    for sign in (-1, 1):
        stain = patch(sheet, x + random.gauss(0, 0.4), y + random.gauss(0, 0.4), (0.35, 0.25), sheet.turn(), 0.06)
        light += sign * 0.9 * (stain > 0)
    return light, meant


def pills(sheet: Sheet) -> Painted:
    """A domed pill with a dark imprint; the bright flecks and scratches on it."""
    random, turn = sheet.random, sheet.turn()
    x, y = sheet.place(0.12)
    long, power = random.uniform(0.7, 0.85), random.choice((2.0, 2.0, 3.0))
    u, v = sheet.frame(x, y, (long, long * random.uniform(0.55, 0.9)), turn)
    height = 1 - (np.abs(u) ** power + np.abs(v) ** power) ** (1 / power)
    pill = height > 0
    light = np.full_like(height, -1.3) + 0.15 * sheet.noise(1, 2)
    shadow = np.hypot(u - 0.1, v - 0.12) < 1.02
    light[shadow] -= 0.6
    dome = np.sqrt(np.clip(1.6 * height, 0, 1))
    light = np.where(pill, 0.9 * dome + 0.25 * (sheet.noise(0.05, 2) > 1.3) - 0.2 + 0.08 * sheet.noise(0.05, 1), light)
    a, b = random.gauss(0, 0.2), random.gauss(0, 0.12)
    letters = (bars(random)(u / 0.45, v / 0.45) > 0) & pill
    light[letters] -= 1.4
    px, py = x + a, y + b
    dark = (dents(sheet, px, py, 0.2, random.randint(2, 5), (0.05, 0.09)) > 0) & pill
    light[dark] -= 1.2
    meant = dents(sheet, px, py, 0.2, random.randint(3, 7), (0.06, 0.12)) > 0
    for _ in range(random.randint(0, 2)):
        meant |= sheet.line(px, py, random.uniform(0.2, 0.4), random.uniform(0.035, 0.055), sheet.turn())
    meant &= height > 0.05
    light[meant] = 2.2 + 0.2 * light[meant]
    return light, meant


def bottles(sheet: Sheet) -> Painted:
    """The mouth of a bottle from above; the broken part of its bright rim."""
    random = sheet.random
    x, y = sheet.place(0.1)
    u, v = sheet.frame(x, y, (1, 1), 0)
    radius, angle = np.hypot(u, v) + 0.006 * sheet.noise(0.5, 2), np.arctan2(v, u)
    rim, width = random.uniform(0.58, 0.72), random.uniform(0.16, 0.24)
    light = -0.9 + 0.4 * np.cos(random.uniform(5, 9) * radius + random.uniform(0, 6)) + 0.15 * sheet.noise(0.3, 2)
    light -= 0.5 * (radius > rim + width)
    light += 0.5 * (radius < rim * random.uniform(0.4, 0.7))
    ring = np.abs(radius - rim) < width / 2
    light[ring] = (1.1 + 0.5 * np.cos(2 * angle + random.uniform(0, 6)) + 0.12 * sheet.noise(0.3, 2))[ring]
    wall = np.abs(radius - rim - 0.8 * width) < 0.03
    light[wall] += 0.8
    start, span = random.uniform(-math.pi, math.pi), random.uniform(0.45, 1.2)
    apart = np.abs((angle - start + math.pi) % (2 * math.pi) - math.pi)
    broken = ring & (apart + 0.12 * sheet.noise(0.15, 1.5) < span)
    shards = np.tanh(3 * sheet.noise(0.2, 2.5))
    light[broken] = 0.5 + 0.7 * shards[broken]
    for _ in range(random.randint(1, 3)):  # dirt inside
        far = random.uniform(0.2, 0.6) * rim
        turn = start + random.gauss(0, 0.7)
        dirt = dents(sheet, x + far * math.cos(turn), y + far * math.sin(turn), 0.04, 2, (0.07, 0.14)) > 0
        light[dirt & (radius < rim - width / 2)] += random.choice((-0.8, 1.4))
    return light, broken


def _animal(sheet: Sheet) -> np.ndarray:
    """A body with head, legs and tail: height (H, W), above 0 inside."""
    random, size, turn = sheet.random, sheet.random.uniform(0.4, 0.6), sheet.random.gauss(0, 0.5)
    x, y = sheet.place(0.35)
    u, v = sheet.frame(x, y, (size * random.choice((-1, 1)), size), turn)
    slim = random.uniform(0.3, 0.5)
    height = blob(random)(u / 0.85, v / slim)
    head = np.hypot(u - random.uniform(0.75, 0.9), (v + random.uniform(0.1, 0.35)) * 1.1)
    height = np.maximum(height, 1 - head / random.uniform(0.22, 0.32))
    for place in (-0.5, -0.25, 0.3, 0.5):
        lean, foot = random.gauss(0, 0.15), slim + random.uniform(0.2, 0.4)
        leg = np.minimum(1 - np.abs(u - place - lean * v) / 0.085, np.minimum(v, foot - v) * 8)
        height = np.maximum(height, leg)
    tail = 1 - np.abs(v + 0.15 + random.gauss(0, 0.3) * (u + 0.6)) / 0.08
    return np.maximum(height, np.minimum(tail, np.minimum(-0.5 - u, u + 1.25) * 8))


def camouflage(sheet: Sheet) -> Painted:
    """An animal whose fur has the pattern of the ground, in another direction."""
    random, turn = sheet.random, sheet.random.gauss(math.pi / 2, 0.3)
    coarsest, along = random.uniform(0.2, 0.4), random.uniform(2, 3.5)
    slope, uneven = random.uniform(2.5, 3.5), 0.5 * sheet.noise(2, 3)
    light = np.tanh(4 * sheet.noise(coarsest, slope, along, turn)) + uneven
    more = random.uniform(0.35, 0.65) * math.pi
    fur = np.tanh(4 * sheet.noise(coarsest * random.uniform(0.4, 0.7), slope, along, turn + more)) + uneven
    height = _animal(sheet) + 0.05 * sheet.noise(0.1, 1.5)
    meant = height > 0
    light[meant] = (fur + 0.5 * (height < 0.25) * random.choice((-1, 1)))[meant]
    for _ in range(random.randint(3, 6)):
        size = random.uniform(0.12, 0.22)
        u, v = sheet.frame(*sheet.place(1), (size, size * 0.4), sheet.turn())
        leaf = (np.abs(u) ** 1.4 + np.abs(v) ** 1.4 < 1) & ~meant
        light[leaf] = random.choice((-1.6, 1.6)) + 0.3 * light[leaf]
    return light, meant


def polyps(sheet: Sheet) -> Painted:
    """A bump in the folds of a bowel, in the dark frame of an endoscope, with wet highlights everywhere."""
    random = sheet.random
    depth = sheet.noise(0.9, 3.5)
    tissue = 0.35 * depth - 0.9 * np.exp(-((depth / 0.2) ** 2)) + 0.12 * sheet.noise(0.2, 2)
    light = tissue - 0.3 * (np.abs(sheet.noise(0.4, 3)) < 0.07)  # vessels
    x, y = sheet.place(0.35)
    long, turn = random.uniform(0.35, 0.55), sheet.turn()
    lobes = blob(random), blob(random)
    a, b = random.uniform(0.3, 0.6), random.uniform(-0.2, 0.2)

    def outline(away: float) -> np.ndarray:
        u, v = sheet.frame(x * (1 + away), y * (1 + away), (long, long * 0.7), turn)
        return np.maximum(lobes[0]((u + a) / 0.6, v / 0.8), lobes[1]((u - 0.3) / 0.7, (v - b) / 0.7))

    height = outline(0)
    meant = height > 0
    light[outline(0.3) > 0] -= 0.6  # its shadow, away from the lamp in the middle
    dome = np.sqrt(np.clip(1.2 * height, 0, 1))
    light[meant] = (0.1 + 0.55 * dome + 0.6 * tissue)[meant]
    wet = dents(sheet, x, y, 0.35, random.randint(4, 9), (0.03, 0.09)) > 0
    light[wet] += 1.6
    light -= 0.5 * np.hypot(sheet.x, sheet.y)
    frame = (sheet.x**4 + sheet.y**4) ** 0.25 > random.uniform(0.97, 1.05)
    light[frame] = -2.0
    return light, meant & ~frame


PAINTERS = (pits, rails, heavy_rails, textures, pills, bottles, camouflage, polyps)
