"""MATLAB files. Reading them needs SciPy: the extra ``[pascal]``."""

from pathlib import Path
from typing import Any

from .bad_samples import reading


def load_mat(file: Path, variable: str) -> Any:
    """A variable of a file.

    Raises:
        BadSample: the file cannot be read, or has no such variable.
        ImportError: SciPy is not installed.
    """
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise ImportError(
            f"{file} is a MATLAB file; reading it needs SciPy: pip install peft_talora[pascal]"
        ) from error
    with reading(file):
        try:
            content = loadmat(file, variable_names=[variable])
        except (MatReadError, NotImplementedError) as error:
            raise ValueError(f"{file} is no MATLAB file that can be read: {error}") from error
        if variable not in content:
            raise ValueError(f"{file} has no {variable}")
        return content[variable]
