"""PEFT's tests, from the source package of the installed version."""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

import peft
import pytest
from filelock import FileLock

CACHE = Path(__file__).parents[2] / ".cache"
PACKAGE = "peft_upstream_tests"  # PEFT names the folder `tests`, as every project does
FILES = ("testing_common.py", "testing_utils.py", "test_config.py", "test_custom_models.py")
SECONDS = 180


def load(name: str) -> ModuleType:
    """Import one of PEFT's test modules.

    Where it cannot be had (no index, or no `diffusers`, which PEFT's tests import), the calling test module is
    skipped; with the environment variable CI set it fails instead, so that a run there cannot miss it.
    """
    try:
        folder = _unpacked()
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
            pytest.register_assert_rewrite(PACKAGE)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            return importlib.import_module(f"{PACKAGE}.{name}")
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        reason = f"PEFT's own tests cannot be had: {_reason(error)}"
        if os.environ.get("CI"):
            raise RuntimeError(reason) from error
        pytest.skip(reason, allow_module_level=True)


def _unpacked() -> Path:
    """The folder that holds the package of PEFT's tests. Fetches it at the first call."""
    folder = CACHE / f"peft-{peft.__version__}"
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / "lock"):  # several processes collect these tests at the same time
        if not folder.exists():
            _unpack(folder)
    return folder


def _unpack(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as partial:
        whole = Path(partial) / "whole"
        (whole / PACKAGE).mkdir(parents=True)
        with tarfile.open(_download(partial)) as archive:
            for name in FILES:
                member = archive.extractfile(f"peft-{peft.__version__}/tests/{name}")
                (whole / PACKAGE / name).write_bytes(member.read())
        whole.rename(folder)


def _download(folder: str) -> Path:
    """Download the source package of the installed PEFT."""
    command = ["pip", "download", f"peft=={peft.__version__}", "--no-deps", "--no-binary", "peft", "--dest", folder]
    quiet = ["--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "30"]
    subprocess.run([sys.executable, "-m", *command, *quiet], check=True, capture_output=True, timeout=SECONDS)
    (archive,) = Path(folder).glob("peft-*.tar.gz")
    return archive


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"`pip download peft=={peft.__version__}` failed with {error.stderr.decode().strip()}"
    return f"{type(error).__name__}: {error}"
