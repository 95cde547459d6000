"""Synthetic indoor scenes, rendered on the fly, with exact labels for six tasks.

Every item is a pure function of (seed, split, index). What the labels mean:

=============  =====================================================================================================
segmentation   index into ``CLASSES``
depth          metres along the optical axis (planar depth), not along the ray
normals        unit vectors in camera coordinates, x right, y down, z forward, pointing towards the camera's side
edges          1 on both sides of a boundary between two objects or classes, 0 elsewhere
saliency       1 on the most prominent piece of furniture, and on the second if it is nearly so; prominence is the
               visible area, weighted by a Gaussian around the middle of the image
parts          index into ``PARTS``; 0, the background, is all that is not furniture
=============  =====================================================================================================
"""

from collections.abc import Sequence
from random import Random

import numpy as np
import torch
from datasets import Array2D, Array3D, Dataset, Features, Image, Value

from .edges import boundaries
from .raycast import ROOM_FACES, ambient_openness, box_blur, cast, dot, light_visibility, room_normals
from .scene import CLASSES, FURNITURE, PARTS, Scene, compose

__all__ = ["CLASSES", "PARTS", "TASKS", "SyntheticScenes", "render"]

TASKS = {"segmentation": len(CLASSES), "depth": 1, "normals": 3, "edges": 1, "saliency": 1, "parts": len(PARTS)}
_LAMP = 0.25  # half side of the lamp in metres
_EXPOSURE = 0.3  # mean radiance of an image
_NOISE = 0.015  # half width of the sensor noise
_NEARLY = 0.6  # a second object this prominent, relative to the first, is salient too


class SyntheticScenes(torch.utils.data.Dataset):
    """``num_images`` rooms of ``size`` × ``size`` pixels as samples (see ``peft_talora.data``).

    Splits are any names and never share a scene. ``tasks`` are names out of ``TASKS``; None means all six.
    """

    def __init__(
        self,
        split: str = "train",
        num_images: int = 1000,
        size: int = 128,
        seed: int = 0,
        tasks: Sequence[str] | None = None,
    ):
        self.tasks = tuple(TASKS if tasks is None else tasks)
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"unknown task {task!r} in tasks; synthetic scenes have {', '.join(TASKS)}")
        if num_images < 1 or size < 16:
            raise ValueError(f"num_images must be at least 1 and size at least 16, not {num_images} and {size}")
        self.split, self.num_images, self.size, self.seed = split, num_images, size, seed

    def __len__(self) -> int:
        return self.num_images

    def scene(self, index: int) -> Scene:
        """The scene behind item ``index``: its camera, room, light and solids."""
        return compose(self._random(index), self.size)

    def __getitem__(self, index: int) -> dict:
        image, labels = self._arrays(index)
        image = torch.from_numpy(image.astype(np.float32) / 255)
        return {"image": image, "labels": {k: _tensor(v) for k, v in labels.items()}, "name": self._name(index)}

    def to_datasets(self) -> Dataset:
        """The same content as a ``datasets.Dataset`` with columns name, image and one per task."""
        shape = (self.size, self.size)
        features = {"name": Value("string"), "image": Image()}
        columns = {name: [] for name in (*features, *self.tasks)}
        for task in self.tasks:
            features[task] = {"depth": Array2D(shape, "float32"), "normals": Array3D((3, *shape), "float32")}.get(
                task, Array2D(shape, "uint8")
            )
        for index in range(len(self)):
            image, labels = self._arrays(index)
            row = {"name": self._name(index), "image": image.transpose(1, 2, 0), **labels}
            for name, value in row.items():
                columns[name].append(value)
        return Dataset.from_dict(columns, features=Features(features))

    def _name(self, index):
        return f"{self.split}-{index:06d}"

    def _random(self, index):
        if not 0 <= index < self.num_images:
            raise IndexError(f"index {index} is outside the {self.num_images} images of split {self.split!r}")
        return Random(f"{self.seed} {self.split} {index}")

    def _arrays(self, index):
        random = self._random(index)
        image, labels = render(compose(random, self.size), np.random.default_rng(random.getrandbits(64)))
        return image, {task: labels[task] for task in self.tasks}


def _tensor(label):
    return torch.from_numpy(label if label.dtype == np.float32 else label.astype(np.int64))


def render(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The uint8 image (3, H, W) of a scene, with noise drawn from ``rng``, and its labels as arrays by task name.

    Beside the six tasks, ``objects`` tells the objects of the room apart: 0 is the room itself.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # rays parallel to a face, or past a ball
        rays = scene.camera.rays()
        depth, surface = cast(scene.camera, scene.room, scene.solids, rays)
        points = rays * depth + scene.camera.position[:, None, None]
        albedo, normals, parts = _surfaces(scene, points, surface)
        radiance = _shade(scene, rays, points, surface, albedo, normals)
    objects = _lookup([s.object_id for s in scene.surfaces], surface)
    segmentation = _lookup([s.class_id for s in scene.surfaces], surface)
    labels = {
        "segmentation": segmentation,
        "depth": depth,
        "normals": (scene.camera.rotation.T @ normals.reshape(3, -1)).reshape(normals.shape),
        "edges": boundaries(objects.astype(np.int32) * len(CLASSES) + segmentation),
        "saliency": _saliency(scene, objects),
        "parts": parts,
        "objects": objects,
    }
    return _develop(radiance, rng), labels


def _lookup(values, surface, dtype=np.uint8):
    return np.array(values, dtype=dtype).take(surface)


def _surfaces(scene, points, surface):
    """Albedo and world normals (3, H, W) and parts (H, W), surface by surface.

    Pixels are sorted by surface, so that each surface is one slice.
    """
    order = np.argsort(surface, axis=None, kind="stable")
    ends = np.bincount(surface.ravel(), minlength=len(scene.surfaces)).cumsum()
    points = points.reshape(3, -1).take(order, axis=1)
    albedo, normals = np.empty_like(points), np.empty_like(points)
    parts = np.empty(order.shape, dtype=np.uint8)
    start = 0
    for index, end in enumerate(ends):
        if start == end:
            continue
        here, described = np.s_[start:end], scene.surfaces[index]
        start = end
        place = points[:, here]
        if index < len(ROOM_FACES):
            normals[:, here] = room_normals(index)
        else:
            solid = scene.solids[index - len(ROOM_FACES)]
            place = solid.to_local(place - solid.center[:, None])
            normals[:, here] = solid.to_world(solid.normals(place))
        albedo[:, here] = described.material.albedo(place)
        parts[here] = np.where(normals[1, here] < 0, described.part_up, described.part_rest)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    shape = surface.shape
    albedo, normals = (array.take(back, axis=1).reshape(3, *shape) for array in (albedo, normals))
    return albedo, normals, parts.take(back).reshape(shape)


def _shade(scene, rays, points, surface, albedo, normals):
    """Linear radiance (3, H, W): ambient light, Lambert and Blinn-Phong under one square lamp, and what glows."""
    gloss = _lookup([s.material.gloss for s in scene.surfaces], surface, np.float32)
    glow = _lookup([s.material.glow for s in scene.surfaces], surface, np.float32)
    toward = scene.light[:, None, None] - points
    squared = dot(toward, toward)
    toward /= np.sqrt(squared)
    visible = light_visibility(scene.camera, scene.solids, points, surface, scene.light, _LAMP)
    arriving = visible / (0.5 + 0.25 * squared)
    diffuse = np.maximum(dot(normals, toward), 0) * arriving
    halfway = toward - rays / np.sqrt(dot(rays, rays))
    shine = np.maximum(dot(normals, halfway), 0)
    shine = (shine * shine / dot(halfway, halfway)) ** 2
    shine = (shine * shine) ** 2 * 4  # the 16th power of the cosine
    shine *= gloss * arriving
    ambient = ambient_openness(scene.camera, scene.room, scene.solids, points, normals) + 3 * glow
    light = scene.light_colour[:, None, None]
    return albedo * (scene.ambient[:, None, None] * ambient + light * diffuse) + light * shine


def _develop(radiance, rng):
    """Lens blur, automatic exposure, gamma and sensor noise; uint8."""
    radiance += box_blur(radiance)
    radiance *= _EXPOSURE / radiance.mean()
    image = np.sqrt(radiance, out=radiance)
    image += 2 * _NOISE * rng.random(image.shape, dtype=np.float32)
    image *= 255
    image += 0.5 - 255 * _NOISE
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def _saliency(scene, objects):
    """1 on the most prominent object of ``FURNITURE``, and on the second if it is ``_NEARLY`` as prominent."""
    size = scene.camera.size
    bell = np.exp(-(((np.arange(size) + 0.5) / size - 0.5) ** 2) / (2 * 0.25**2))
    scores = np.bincount(objects.ravel(), weights=np.outer(bell, bell).ravel(), minlength=scene.objects + 1)
    furniture = {CLASSES.index(name) for name in FURNITURE}
    candidates = {s.object_id for s in scene.surfaces if s.class_id in furniture}
    first, second = sorted(candidates, key=lambda k: -scores[k])[:2]
    salient = np.zeros(len(scores), dtype=np.uint8)
    salient[first] = scores[first] > 0
    salient[second] = scores[second] > _NEARLY * scores[first]
    return salient[objects]
