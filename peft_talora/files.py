"""Files: written aside and moved when whole, checked before they are read."""

from __future__ import annotations

import filecmp
import json
import math
import os
import shutil
import tempfile
from collections.abc import Collection
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


@contextmanager
def write_aside(folder: str | Path, owned: Collection[str] = ()):
    """A temporary folder whose files move into `folder` at the end, each in one step: nothing half-written stays.

    If the body raises, `folder` keeps what it had. The files in `owned` belong together: those that are not written
    anew are deleted, for what an earlier write left would be taken for a part of this one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    written = set()
    try:
        yield aside
        sync(aside)
        for file in sorted(path for path in aside.rglob("*") if path.is_file()):
            target = folder / file.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
            written.add(target)
        sync_one(folder)
        for name in owned:
            if folder / name not in written:
                (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(file: str | Path, content: Any) -> None:
    """Write JSON, indented, with the keys in their own order; numbers that JSON does not have become null."""
    Path(file).write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """The same, with null for numbers that JSON does not have."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def digest(file: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with Path(file).open("rb") as handle:
        found = sha256()
        while block := handle.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def sync(folder: Path) -> None:
    """Force the content of all files below a folder onto the disk, and which files there are."""
    for path in (*folder.rglob("*"), folder):
        sync_one(path)


def sync_one(path: Path) -> None:
    """Force the content of a file onto the disk, or which names a folder holds: a rename may be lost until then."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def same_files(folder: str | Path, other: str | Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    names = [{path.relative_to(f) for path in Path(f).rglob("*") if path.is_file()} for f in (folder, other)]
    return names[0] == names[1] and all(filecmp.cmp(Path(folder, n), Path(other, n), shallow=False) for n in names[0])


def check_safetensors(file: str | Path) -> None:
    """Raise OSError, naming the file, if it is missing, truncated or no safetensors file."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise OSError(f"{file}: truncated or corrupt safetensors file: {error}") from error
