"""Random furnished rooms for the synthetic scenes: what stands where, of which class and material, in which light."""

import math
from colorsys import hsv_to_rgb
from dataclasses import dataclass, field
from random import Random

import numpy as np

from .raycast import ROOM_FACES, Box, Camera, Cylinder, Room, Solid, Sphere
from .textures import (
    Material,
    bands,
    checker,
    marble,
    noise,
    painting,
    panes,
    plain,
    planks,
    stripes,
    tiles,
    wood,
)

CLASSES = ("floor", "wall", "ceiling", "rug", "picture", "window", "table", "box", "sphere", "cylinder")
PARTS = (
    "background",
    "box top",
    "box side",
    "cylinder top",
    "cylinder side",
    "sphere upper half",
    "sphere lower half",
    "table top",
    "table support",
)
FURNITURE = ("table", "box", "sphere", "cylinder")  # the classes that have parts and can be salient
_THINGS = {  # class: shape, part where the surface faces up, part elsewhere
    "box": (Box, "box top", "box side"),
    "sphere": (Sphere, "sphere upper half", "sphere lower half"),
    "cylinder": (Cylinder, "cylinder top", "cylinder side"),
}
_FLOORS = {planks: 0.16, tiles: 0.4, checker: 0.5, plain: 0.3, marble: 0.7}  # pattern: period in metres
_WALLS = {plain: 0.6, stripes: 0.4, marble: 1.5, noise: 0.8}
_COVERS = {plain: 0.3, checker: 0.15, stripes: 0.25, bands: 0.2, wood: 0.2, marble: 0.35, noise: 0.15}


def vector(*values: float) -> np.ndarray:
    """A float32 array."""
    return np.array(values, dtype=np.float32)


@dataclass(frozen=True)
class Surface:
    """What a face of the room or a solid looks like and is called."""

    material: Material
    class_id: int
    object_id: int  # 0: the room's own floor, walls and ceiling
    part_up: int = 0  # part where the surface faces up,
    part_rest: int = 0  # and elsewhere


@dataclass
class Scene:
    """A camera in a furnished room; ``surfaces`` are those of the faces of the room, then of the solids in order."""

    camera: Camera
    room: Room
    light: np.ndarray
    light_colour: np.ndarray
    ambient: np.ndarray
    solids: list[Solid] = field(default_factory=list)
    surfaces: list[Surface] = field(default_factory=list)
    objects: int = 0

    def add(self, kind: str, pieces: list[tuple]) -> None:
        """Add one object of class ``kind`` made of pieces: solid, material and, if not background, its two parts."""
        self.objects += 1
        for solid, material, *parts in pieces:
            self.solids.append(solid)
            self.surfaces.append(Surface(material, CLASSES.index(kind), self.objects, *map(PARTS.index, parts)))


def compose(random: Random, size: int) -> Scene:
    """Draw a scene, seen by a camera of ``size`` × ``size`` pixels."""
    scene = _empty_room(random, size)
    _hang_on_walls(scene, random)
    if random.random() < 0.6:
        _lay_rug(scene, random)
    _furnish(scene, random, count=random.randint(3, 8))
    return scene


def _colour(random, saturation, value, hue=(0.0, 1.0)):
    return vector(*hsv_to_rgb(random.uniform(*hue), random.uniform(*saturation), random.uniform(*value)))


def _material(random, patterns, saturation, value, contrast, gloss):
    pattern, period = random.choice(list(patterns.items()))
    base = _colour(random, saturation, value)
    other = base * random.uniform(*contrast)
    if random.random() < 0.4:
        other = 0.5 * other + 0.5 * _colour(random, saturation, value) * random.uniform(*contrast)
    phase = (random.random(), random.random(), random.random())
    return Material(pattern, (base, other), period * random.uniform(0.7, 1.4), phase, random.uniform(*gloss))


def _cover(random):
    return _material(random, _COVERS, (0.35, 0.9), (0.4, 0.95), (0.2, 0.8), (0.0, 0.6))


def _rotation(yaw, pitch, roll):
    """Camera to world for a camera turned right by ``yaw``, then down by ``pitch``, then rolled, in radians."""
    c, s = math.cos(yaw), math.sin(yaw)
    turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    c, s = math.cos(pitch), math.sin(pitch)
    tilt = np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
    c, s = math.cos(roll), math.sin(roll)
    return (turn @ tilt @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])).astype(np.float32)


def _empty_room(random, size):
    height = random.uniform(2.4, 3.2)
    low = vector(-random.uniform(1.6, 3.2), -height, -random.uniform(1.0, 2.0))
    high = vector(random.uniform(1.6, 3.2), 0, random.uniform(3.6, 6.5))
    rotation = _rotation(random.uniform(-0.5, 0.5), random.uniform(0.1, 0.45), random.uniform(-0.04, 0.04))
    focal = size / 2 / math.tan(math.radians(random.uniform(52, 76)) / 2)
    camera = Camera(vector(0, -random.uniform(1.2, 1.9), 0), rotation, focal, size)
    light = vector(
        random.uniform(0.7 * low[0], 0.7 * high[0]), 0.25 - height, random.uniform(0.3, 0.8 * float(high[2]))
    )
    warmth = random.uniform(-0.12, 0.15)
    scene = Scene(
        camera,
        Room(low, high),
        light,
        light_colour=vector(1 + warmth, 1, 1 - warmth) * random.uniform(0.7, 1.0),
        ambient=vector(1 - warmth / 2, 1, 1 + warmth / 2) * random.uniform(0.25, 0.5),
    )
    wall = _material(random, _WALLS, (0.05, 0.4), (0.6, 0.95), (0.75, 0.97), (0.0, 0.05))
    floor = _material(random, _FLOORS, (0.1, 0.6), (0.3, 0.75), (0.4, 0.85), (0.0, 0.35))
    ceiling = Material(plain, (vector(0.9, 0.9, 0.88), vector(0.8, 0.8, 0.8)))
    for face in ROOM_FACES:
        kind = face if face in CLASSES else "wall"
        material = {"floor": floor, "ceiling": ceiling, "wall": wall}[kind]
        scene.surfaces.append(Surface(material, CLASSES.index(kind), object_id=0))
    return scene


def _hang_on_walls(scene, random):
    """At most two panels, windows or pictures, on the front wall and one on each side wall."""
    low, high = scene.room.low, scene.room.high
    places = [  # x, z, yaw
        (random.uniform(0.2, 0.7) * low[0], high[2], 0.0),
        (random.uniform(0.2, 0.7) * high[0], high[2], 0.0),
        (low[0], random.uniform(1.5, 0.8 * float(high[2])), math.pi / 2),
        (high[0], random.uniform(1.5, 0.8 * float(high[2])), math.pi / 2),
    ]
    for x, z, yaw in places:
        if random.random() < 0.35:
            continue
        reach = min(-0.25 * float(low[0]), 0.25 * float(high[0]), 0.6)
        if random.random() < 0.35:
            kind, half = "window", vector(reach * 1.1, random.uniform(0.4, 0.6), 0.03)
            hue = random.choice([(0.52, 0.62), (0.52, 0.62), (0.05, 0.12)])  # day, day, dusk
            colours = _colour(random, (0.3, 0.7), (0.7, 0.9), hue), vector(0.95, 0.95, 0.95)
            material = Material(panes(half), colours, glow=random.uniform(0.3, 0.8))
        else:
            kind, half = "picture", vector(reach * random.uniform(0.6, 1.1), random.uniform(0.22, 0.45), 0.03)
            colours = _colour(random, (0.2, 0.9), (0.05, 0.3)), _colour(random, (0.3, 0.9), (0.8, 1.0))
            material = Material(painting(half, random.uniform(0.8, 2.5)), colours, gloss=random.uniform(0.0, 0.3))
        center = vector(x, -random.uniform(1.35, 1.65), z)
        scene.add(kind, [(Box(center, half, yaw, casts_shadow=False), material)])


def _lay_rug(scene, random):
    half = vector(random.uniform(0.6, 1.2), 0.01, random.uniform(0.5, 0.9))
    center = vector(*_ahead(scene, random.uniform(-0.2, 0.2), random.uniform(2.0, 3.2), 1.0), 0)[[0, 2, 1]]
    material = _material(random, _COVERS, (0.3, 0.8), (0.4, 0.8), (0.4, 0.9), (0.0, 0.0))
    scene.add("rug", [(Box(center, half, random.uniform(-0.6, 0.6), casts_shadow=False), material)])


def _ahead(scene, sideways, distance, radius):
    """The floor place (x, z) ``distance`` metres ahead and ``sideways`` × distance right, moved ``radius`` indoors."""
    right, forward = scene.camera.rotation[:, 0], scene.camera.rotation[:, 2]
    heading = math.hypot(forward[0], forward[2])
    x = distance * (sideways * right[0] + forward[0] / heading)
    z = distance * (sideways * right[2] + forward[2] / heading)
    low, high = scene.room.low, scene.room.high
    x = min(max(x, float(low[0]) + radius), float(high[0]) - radius)
    return x, min(max(z, float(low[2]) + radius), float(high[2]) - radius)


def _place(scene, random, taken, radius):
    """A free place (x, z) for a circle of ``radius`` in view, and the radius, shrunk until there is one."""
    spread = 0.4 * scene.camera.size / scene.camera.focal
    while True:
        x, z = _ahead(scene, random.uniform(-spread, spread), random.uniform(1.3, 3.8), radius)
        if all(math.hypot(x - a, z - b) > radius + r + 0.02 for a, b, r in taken):
            taken.append((x, z, radius))
            return x, z, radius
        radius *= 0.95


def _furnish(scene, random, count):
    on_floor, on_table, table_height = [(0.0, 0.0, 0.8)], [], 0.0  # nothing stands on the camera
    if random.random() < 0.6:
        count -= 1
        spots, table_height = _add_table(scene, random, on_floor)
    for _ in range(count):
        if table_height and len(on_table) < 4 and random.random() < 0.4:
            x, z, room = spots[len(on_table)]
            on_table.append((x, z))
            _add_thing(scene, random, x, z, room * random.uniform(0.6, 1.0), table_height)
        else:
            x, z, radius = _place(scene, random, on_floor, random.uniform(0.22, 0.6))
            _add_thing(scene, random, x, z, radius, 0.0)


def _add_thing(scene, random, x, z, radius, above_floor):
    """A box, sphere or cylinder that fits a circle of ``radius`` around (x, z)."""
    kind = random.choice(list(_THINGS))
    shape, up, rest = _THINGS[kind]
    tall = random.uniform(0.5, 1.6)
    if kind == "box":
        angle = random.uniform(0.5, 1.07)
        half = vector(radius * math.cos(angle), radius * 0.8 * tall, radius * math.sin(angle))
    elif kind == "sphere":
        half = vector(radius, radius, radius)
    else:
        half = vector(0.8 * radius, radius * tall, 0.8 * radius)
    solid = shape(vector(x, -above_floor - half[1], z), half, random.uniform(0, math.pi))
    scene.add(kind, [(solid, _cover(random), up, rest)])


def _add_table(scene, random, taken):
    """A table on four legs or one foot; returns four places (x, z, radius) on it and its height."""
    x, z, radius = _place(scene, random, taken, random.uniform(0.7, 0.95))
    half, height = vector(0.83 * radius, 0.03, 0.55 * radius), random.uniform(0.55, 0.78)
    yaw = random.uniform(-0.7, 0.7)
    slab = Box(vector(x, half[1] - height, z), half, yaw)
    material = _material(
        random, {wood: 0.25, planks: 0.15, plain: 0.4}, (0.3, 0.7), (0.35, 0.8), (0.6, 0.9), (0.0, 0.4)
    )
    leg_half = height / 2 - half[1]
    if random.random() < 0.3:
        supports = [Cylinder(vector(x, -leg_half, z), vector(0.08, leg_half, 0.08), yaw)]
        spread = 0.0
    else:
        spread = 0.85
        supports = [Box(place, vector(0.035, leg_half, 0.035), yaw) for place in _corners(slab, spread, -leg_half)]
    top, support = "table top", "table support"
    scene.add("table", [(slab, material, top, top), *((leg, material, support, support) for leg in supports)])
    spots = [(float(a), float(b), 0.42 * float(half[2])) for a, _, b in _corners(slab, 0.5, 0.0)]
    random.shuffle(spots)
    return spots, height


def _corners(slab, share, y):
    """Four places at ``share`` of the way from the middle of ``slab`` to its corners, at world height ``y``."""
    signs = np.array([[-1, -1, 1, 1], [0, 0, 0, 0], [-1, 1, -1, 1]], dtype=np.float32)
    places = slab.to_world(signs * slab.half[:, None] * share) + slab.center[:, None]
    return [vector(x, y, z) for x, _, z in places.T]
