"""Raw values of files and of rows, as the labels that a task has (see ``peft_talora.data``).

A value is a NumPy array or what becomes one (a tensor, nested lists), a Pillow image, the encoded bytes of one as
``datasets`` keeps them, or the path of an npy or an image.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
"""Pillow's modes of 8 bits or less: an image of 16 bits would silently lose half of them."""
CLASS_MODES = ("L", "P", "I;16", "I;16B", "I")
DEPTH_MODES = ("I;16", "I;16B", "I", "F")
_SHORTEST_VECTOR = 0.1
_OVERSHOOT = 0.01  # of an interpolated image in [0, 1]


def to_array(value: Any, modes: Sequence[str], source: str) -> np.ndarray:
    """A value as an array; of an image in one of Pillow's ``modes`` its pixels, (H, W) or (C, H, W).

    Nothing is unpickled; ``source`` names the value in errors.

    Raises:
        ValueError: for an image of another mode, or what is no array.
    """
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        value = value["bytes"]
    elif isinstance(value, Mapping) and value.get("path") is not None:
        value = Path(value["path"])
    if isinstance(value, bytes):
        value = BytesIO(value)
    if isinstance(value, Path) and value.suffix.lower() == ".npy":
        return _read_npy(value)
    if isinstance(value, (Path, BytesIO)):
        with Image.open(value) as file:
            return _pixels(file, modes, source)
    if isinstance(value, Image.Image):
        return _pixels(value, modes, source)
    array = np.asarray(value)
    if array.dtype == object:
        raise ValueError(f"{source} is {type(value).__name__} without a shape; allowed: arrays, images, their bytes")
    return array


def _read_npy(file: Path) -> np.ndarray:
    with open(file, "rb") as handle:
        try:
            return np.lib.format.read_array(handle, allow_pickle=False)
        except TokenError as error:  # of the header's text
            raise ValueError(f"{file} has no header of npy: {error}") from error


def _pixels(image: Image.Image, modes: Sequence[str], source: str) -> np.ndarray:
    if image.mode not in modes:
        raise ValueError(f"{source} is an image of mode {image.mode}; allowed: {', '.join(modes)}")
    pixels = np.array(image.convert("RGB") if modes is IMAGE_MODES else image)
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels


def image_of(array: np.ndarray, source: str) -> np.ndarray:
    """An image (3, H, W), float32 in [0, 1], from (3, H, W) or (H, W, 3): uint8, or numbers in [0, 1].

    Raises:
        ValueError: for another shape or range.
    """
    if array.ndim == 3 and array.shape[0] != 3:
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] != 3:
        raise ValueError(f"{source} has the shape {array.shape}; allowed: (3, H, W) or (H, W, 3)")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array, dtype=np.float32) / np.float32(255)
    image = np.ascontiguousarray(array, dtype=np.float32)
    least, most = float(image.min()), float(image.max())
    if not (least >= -_OVERSHOOT and most <= 1 + _OVERSHOOT):
        raise ValueError(f"{source} has values from {least:g} to {most:g}; allowed: uint8, or numbers in [0, 1]")
    return image.clip(0, 1)


def plane_of(array: np.ndarray, source: str) -> np.ndarray:
    """An array (H, W), from itself or with an axis of length 1 in front or at the end."""
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 2:
        raise ValueError(f"{source} has the shape {array.shape}; allowed: (H, W), (1, H, W) or (H, W, 1)")
    return array


def classes_of(array: np.ndarray, source: str) -> np.ndarray:
    """Class ids (H, W), int64. Raises ValueError for other numbers than whole ones."""
    plane = plane_of(array, source)
    if np.issubdtype(plane.dtype, np.floating) and (np.isfinite(plane) & (plane == np.round(plane))).all():
        plane = plane.astype(np.int64)
    if not np.issubdtype(plane.dtype, np.integer):
        raise ValueError(f"{source} holds {plane.dtype}; allowed: integer class ids")
    return plane.astype(np.int64)


def vectors_of(array: np.ndarray, source: str) -> np.ndarray:
    """Unit vectors (3, H, W), float32, from (3, H, W) or (H, W, 3); 0 where they are unknown.

    An array of uint8 is 127.5 · (1 + vector). Vectors shorter than 0.1 are unknown, and all others are renormalised:
    eight bits, and what was resized, leave them shorter.
    """
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[-1]):
        raise ValueError(f"{source} has the shape {array.shape}; allowed: (3, H, W) or (H, W, 3)")
    vectors = array.astype(np.float32)
    if array.shape[0] != 3:
        vectors = np.ascontiguousarray(vectors.transpose(2, 0, 1))
    if array.dtype == np.uint8:
        vectors = vectors / np.float32(127.5) - 1
    length = np.sqrt((vectors**2).sum(axis=0))
    return np.where(length < _SHORTEST_VECTOR, 0, vectors / np.maximum(length, _SHORTEST_VECTOR)).astype(np.float32)
