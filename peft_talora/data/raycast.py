"""Rays against a room full of convex solids: first hits, normals, soft shadows and occlusion, in vectorised NumPy.

World and camera coordinates are in metres: x right, y down, z forward. The floor is y = 0, so heights are negative.
Rays have length 1 along the camera's z axis: the ray parameter of a hit *is* its planar depth. All arrays are
float32; H W pixels, N pixels or points in any order, and a leading 3 for x, y, z.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ROOM_FACES = ("left", "right", "ceiling", "floor", "back", "front")  # surfaces 0 … 5; solids follow
_INWARD = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=np.float32)
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float32).T
_AXES = np.arange(3)[:, None]
_NEAR = 0.1  # metres; what reaches closer to the camera plane is not bounded on the screen


def dot(a, b):
    """Scalar products along the leading axis of 3; cheaper here than ``einsum``."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def box_blur(image):
    """Mean over 3 × 3 pixels of (..., H, W), edges repeated."""
    for axis in (-1, -2):
        source = np.moveaxis(image, axis, 0)
        total = source.copy(order="K")  # in memory order, whatever the axis
        total[1:] += source[:-1]
        total[:-1] += source[1:]
        total[[0, -1]] += source[[0, -1]]
        total *= 1 / 3
        image = np.moveaxis(total, 0, axis)
    return image


@dataclass(frozen=True)
class Camera:
    """A pinhole camera of ``size`` × ``size`` pixels; ``focal`` in pixels, ``rotation`` from camera to world."""

    position: np.ndarray  # (3,)
    rotation: np.ndarray  # (3, 3)
    focal: float
    size: int

    def rays(self) -> np.ndarray:
        """World directions (3, H, W) through the pixel centres, of length 1 along the optical axis."""
        offsets = (np.arange(self.size, dtype=np.float32) + 0.5 - self.size / 2) / self.focal
        right, down, forward = self.rotation.T[:, :, None, None]
        return right * offsets[None, None, :] + (down * offsets[None, :, None] + forward)

    def windows(self, points: np.ndarray, margin: int = 1) -> Iterator[tuple[int, tuple[slice, slice]]]:
        """Bound N hulls of K ``points`` each, (3, N, K), on the screen.

        Yields the index of each hull that can be in view, and the rows and columns it can cover, with ``margin``
        pixels more on all sides.
        """
        x, y, z = (self.rotation.T @ (points.reshape(3, -1) - self.position[:, None])).reshape(points.shape)
        behind = z.min(axis=1) < _NEAR
        scale = self.focal / np.maximum(z, _NEAR)
        bounds = []
        for offsets in (y * scale, x * scale):
            low = np.where(behind, 0, offsets.min(axis=1) + (self.size / 2 - margin))
            high = np.where(behind, self.size, offsets.max(axis=1) + (self.size / 2 + margin + 1))
            bounds += [np.minimum(np.maximum(limit, 0), self.size).astype(int).tolist() for limit in (low, high)]
        for index, (top, bottom, left, right) in enumerate(zip(*bounds, strict=True)):
            if top < bottom and left < right:
                yield index, (slice(top, bottom), slice(left, right))


@dataclass(frozen=True)
class Room:
    """The inside of an axis-aligned box from ``low`` to ``high``, (3,) each."""

    low: np.ndarray
    high: np.ndarray

    def exits(self, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ray parameter and face (index into ``ROOM_FACES``), (H, W) each, where rays from inside leave the room.

        ``origin`` is (3, 1, 1).
        """
        positive = rays > 0
        low, high = self.low[:, None, None] - origin, self.high[:, None, None] - origin
        x, y, z = np.where(positive, high, low) / rays
        depth = np.minimum(np.minimum(x, y), z)
        face = np.where(y == depth, 2 + positive[1], np.where(x == depth, positive[0], 4 + positive[2]))
        return depth, face.astype(np.int16)


@dataclass(frozen=True)
class Solid(ABC):
    """A convex solid: ``center`` (3,), ``half`` extents (3,), turned by ``yaw`` radians about the vertical."""

    center: np.ndarray
    half: np.ndarray
    yaw: float = 0.0
    casts_shadow: bool = True

    @cached_property
    def _turn(self) -> np.ndarray:
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=np.float32)

    @cached_property
    def corners(self) -> np.ndarray:
        """The eight corners (3, 8) of the bounding box, in the world."""
        return self._turn @ (_CORNERS * self.half[:, None]) + self.center[:, None]

    def to_local(self, vectors: np.ndarray) -> np.ndarray:
        """Turn directions (3, ...) of the world into the solid's own frame."""
        return (self._turn.T @ vectors.reshape(3, -1)).reshape(vectors.shape)

    def to_world(self, vectors: np.ndarray) -> np.ndarray:
        """Turn directions (3, ...) of the solid's own frame into the world."""
        return (self._turn @ vectors.reshape(3, -1)).reshape(vectors.shape)

    def crossing(self, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ray parameters of entry and exit for rays (3, H, W) of the world; entry < exit holds only for hits.

        ``origin`` is one point (3, 1, 1) or one per ray (3, H, W).
        """
        return self._crossing(self.to_local(origin - self.center[:, None, None]), self.to_local(rays))

    @abstractmethod
    def _crossing(self, origin, rays):
        """``crossing`` in the solid's own frame."""

    @abstractmethod
    def normals(self, points: np.ndarray) -> np.ndarray:
        """Outward unit normals (3, N) at surface points (3, N), both in the solid's own frame."""


class Box(Solid):
    """A cuboid."""

    def _crossing(self, origin, rays):
        inverse = 1 / rays
        middle = -origin * inverse
        reach = np.abs(self.half[:, None, None] * inverse)
        return (middle - reach).max(axis=0), (middle + reach).min(axis=0)

    def normals(self, points):
        """That of the nearest face."""
        scaled = points / self.half[:, None]
        return np.where(np.abs(scaled).argmax(axis=0) == _AXES, np.sign(scaled), 0)


def _roots(a, b, c):
    """Both solutions of a t² + 2 b t + c = 0; not-a-number where there is none."""
    root = np.sqrt(b * b - a * c)
    inverse = 1 / a
    return (-b - root) * inverse, (root - b) * inverse


class Sphere(Solid):
    """A ball of radius ``half[0]``."""

    def _crossing(self, origin, rays):
        return _roots(dot(rays, rays), dot(origin, rays), dot(origin, origin) - self.half[0] ** 2)

    def normals(self, points):
        """Away from the centre."""
        return points / np.sqrt(dot(points, points))


class Cylinder(Solid):
    """An upright cylinder of radius ``half[0]``."""

    def _crossing(self, origin, rays):
        (ox, oy, oz), (x, y, z) = origin, rays
        entry, leave = _roots(x * x + z * z, ox * x + oz * z, ox * ox + oz * oz - self.half[0] ** 2)
        inverse = 1 / y
        middle, reach = -oy * inverse, np.abs(self.half[1] * inverse)
        return np.maximum(entry, middle - reach), np.minimum(leave, middle + reach)

    def normals(self, points):
        """Up or down on the caps, away from the axis elsewhere."""
        x, y, z = points
        around = np.hypot(x, z)
        cap = np.abs(y) / self.half[1] > around / self.half[0]
        side = np.where(cap, 0, 1 / around)
        return np.stack([x * side, np.where(cap, np.sign(y), 0), z * side])


def cast(camera: Camera, room: Room, solids: list[Solid], rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Planar depth and first surface, (H, W) each: 0 … 5 faces of the room, then the solids in order."""
    origin = camera.position[:, None, None]
    depth, surface = room.exits(origin, rays)
    for index, window in camera.windows(_corners(solids)):
        entry, leave = solids[index].crossing(origin, rays[(slice(None), *window)])
        hit = (entry < leave) & (entry < depth[window]) & (entry > _NEAR)
        np.copyto(depth[window], entry, where=hit)
        np.copyto(surface[window], index + len(ROOM_FACES), where=hit)
    return depth, surface


def _corners(solids):
    return np.stack([solid.corners for solid in solids], axis=1)


def room_normals(face: int) -> np.ndarray:
    """The inward unit normal (3, 1) of a face of the room."""
    return _INWARD[face][:, None]


def light_visibility(camera, solids, points, surface, light, radius):
    """Share (H, W) in [0, 1] of a level square lamp of half side ``radius`` around ``light`` (3,) that points see.

    Neighbouring pixels look at nine different places of the lamp, and a 3 × 3 mean puts the nine together.
    """
    steps = (np.arange(camera.size) % 3 - 1).astype(np.float32) * radius
    toward = light[:, None, None] - points
    toward[0] += steps[None, :]
    toward[2] += steps[:, None]
    lit = np.ones(surface.shape, dtype=np.float32)
    corners = _corners(solids)
    from_light = corners - light[:, None, None]
    on_floor = light[:, None, None] - from_light * (light[1] / np.maximum(from_light[1], _NEAR))
    for index, window in camera.windows(np.concatenate([corners, on_floor], axis=2), margin=3):
        if not solids[index].casts_shadow:
            continue
        inside = (slice(None), *window)
        entry, leave = solids[index].crossing(points[inside], toward[inside])
        # A convex solid shades itself only where it faces away from the light.
        blocked = (entry < leave) & (leave > 1e-3) & (entry < 1) & (surface[window] != index + len(ROOM_FACES))
        np.copyto(lit[window], 0, where=blocked)
    return box_blur(lit)


def ambient_openness(camera, room, solids, points, normals):
    """Share (H, W) of ambient light left by the corners of the room and by solids nearby, each taken as a ball."""
    openness = np.ones(points.shape[1:], dtype=np.float32)
    for axis in range(3):
        gap = np.minimum(points[axis] - room.low[axis], room.high[axis] - points[axis])
        openness *= 1 - 0.1 * (1 - np.abs(normals[axis])) / (0.2 + gap)
    centers = np.stack([solid.center for solid in solids], axis=1)[:, :, None]
    for index, window in camera.windows(centers + 2.2 * (_corners(solids) - centers)):
        if not solids[index].casts_shadow:
            continue
        inside = (slice(None), *window)
        toward = centers[:, index, :, None] - points[inside]
        squared = dot(toward, toward)
        radius_squared = float(np.prod(solids[index].half)) ** (2 / 3)
        facing = np.maximum(dot(normals[inside], toward), 0)
        openness[window] *= 1 - np.minimum(radius_squared * facing / (squared * np.sqrt(squared)), 0.75)
    return openness
