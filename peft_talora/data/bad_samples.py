"""Files that cannot be what they should be: named, and left out where that is wanted."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset, Subset

# What Pillow and NumPy raise for files that are truncated, mutated, of another kind, or say that they are huge.
_UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


class BadSample(ValueError):
    """A file of a sample that cannot be read, or holds what is not allowed; the message names the file."""


@contextmanager
def reading(file: Path | str) -> Iterator[None]:
    """Inside, whatever is wrong with a file is a `BadSample` that names it."""
    try:
        yield
    except BadSample:
        raise
    except _UNREADABLE as error:
        text = str(error) or type(error).__name__
        raise BadSample(text if str(file) in text else f"{file}: {text}") from error


def readable(dataset: Dataset) -> tuple[Dataset, list[str]]:
    """The samples of a data set that can be read, in their order, and what is wrong with the others.

    Everything is read once; so which samples there are is known before training, the same in all processes.

    Raises:
        BadSample: if none can be read; its message is that of the first.
    """
    good, problems = [], []
    for index in range(len(dataset)):
        try:
            dataset[index]
        except BadSample as error:
            problems.append(str(error))
        else:
            good.append(index)
    if not good:
        raise BadSample(f"none of the {len(dataset)} samples can be read; the first: {problems[0]}")
    return (Subset(dataset, good) if problems else dataset), problems
