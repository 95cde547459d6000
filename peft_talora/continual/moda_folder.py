"""A MoDA model's folder: written so that a kill leaves none half, read so that an adapter is read when it is used.

==========================  ==========================================================================================
``moda.json``               version, base, query, selector; the domains in order, with the checksums of their files
``moda.safetensors``        tokens of the query, the selector, the features of the exemplars
``domains/<name>/``         that domain's adapter and nothing else: a PEFT folder, or a domain's part of a TA-LoRA
``shared/``                 the factors that all domains of a TA-LoRA share
==========================  ==========================================================================================
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..files import check_safetensors, write_aside, write_json
from .adapters import StockAdapters
from .moda import MoDAModel
from .queries import make_query
from .shared_factors import SharedFactorAdapters

CONFIG_NAME = "moda.json"
WEIGHTS_NAME = "moda.safetensors"
VERSION = 1


def save_moda(model: MoDAModel, folder: str | Path) -> None:
    """Write a MoDA model. Domains that are in that folder already, and have not learnt since, are not written again.

    Args:
        model: Any; a domain that is being learnt is written as it is now.
        folder: Created if need be. Domains in it that the model does not have are deleted, last of all.

    Raises:
        OSError: If a damaged domain would have to be copied.
    """
    folder = Path(folder)
    for name in model.domains:
        _save_domain(model, name, folder / "domains" / name)
    if isinstance(model.adapters, SharedFactorAdapters):
        model.adapters.save_shared(folder / "shared")
    with write_aside(folder) as aside:
        save_file(_tensors(model), aside / WEIGHTS_NAME)
        write_json(aside / CONFIG_NAME, _describe(model, folder))
    for stale in (folder / "domains").glob("*"):
        if stale.name not in model.domains:
            shutil.rmtree(stale)


def load_moda(folder: str | Path, base: PreTrainedModel, resident: int | None = None) -> MoDAModel:
    """Read a MoDA model; a domain's adapter is read when it is first used.

    A domain whose files are missing or damaged is named by a warning, and its images go to the plain model; the others
    work.

    Args:
        folder: As [`save_moda`] wrote it.
        base: The model that it was made of.
        resident: As of `MoDAModel`.

    Raises:
        OSError: If a file that all domains need is missing or damaged; the message names it.
        ValueError: For a folder of another version, or a base of another kind.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_NAME)
    if config["base"]["model_type"] != base.config.model_type:
        raise ValueError(
            f"`base` is a {base.config.model_type!r}; {folder} was made of the {config['base']['model_type']!r} "
            f"{config['base']['name_or_path']!r}."
        )
    query = make_query(config["query"]["kind"], base.config.vision_config, stop=config["query"]["stop"])
    model = MoDAModel(base, query, config["selector"], config["exemplars"], resident)
    if config["own"] is not None:
        model.adapters = SharedFactorAdapters(base, config["own"])
        model.adapters.load_shared(folder / "shared")
    elif config["domains"]:
        model.adapters = StockAdapters(base)
    for domain in config["domains"]:
        place = folder / "domains" / domain["name"]
        model.expect_domain(domain["name"], domain["first_block"], place, _damage(place, domain["files"]))
    check_safetensors(folder / WEIGHTS_NAME)
    _fill(model, load_file(folder / WEIGHTS_NAME), config, folder / WEIGHTS_NAME)
    return model.eval()


def _save_domain(model: MoDAModel, name: str, folder: Path) -> None:
    known = model.folder_of(name)
    if known is not None and known.resolve() == folder.resolve():
        return
    if name in model.damaged:
        raise OSError(model.damaged[name])
    if known is not None:  # it may be on disk alone, and is as it was there
        with write_aside(folder, owned=[file.name for file in folder.glob("*")]) as aside:
            shutil.copytree(known, aside, dirs_exist_ok=True)
    else:
        model.adapters.save(name, folder)
    model.note_saved(name, folder)


def _tensors(model: MoDAModel) -> dict[str, Tensor]:
    tensors = {f"query.{key}": value for key, value in model.query.state_dict().items()}
    tensors |= {f"selector.{key}": value for key, value in model.router.selector.state_dict().items()}
    tensors |= {f"features.{name}": value for name, value in model.features.items()}
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _describe(model: MoDAModel, folder: Path) -> dict[str, Any]:
    shared = isinstance(model.adapters, SharedFactorAdapters)
    return {
        "version": VERSION,
        "base": {"model_type": model.base.config.model_type, "name_or_path": model.base.config._name_or_path},
        "query": {"kind": model.query.kind, "stop": model.query.stop},
        "selector": model.router.selector.kind,
        "fitted": model.router.domains,
        "threshold": model.router.threshold,
        "quantile": model.router.quantile,
        "exemplars": model.exemplars,
        "own": model.adapters.own if shared else None,
        "domains": [
            {
                "name": name,
                "first_block": model.first_block(name),
                "files": _checksums(folder / "domains" / name),
            }
            for name in model.domains
        ],
    }


def _fill(model: MoDAModel, tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> None:
    parts: dict[str, dict[str, Tensor]] = {"query": {}, "selector": {}, "features": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    try:
        model.query.load_state_dict(parts["query"])
        model.router.selector.load_state_dict(parts["selector"])
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit {CONFIG_NAME} beside it: {error}") from error
    model.features = parts["features"]
    model.router.domains, model.router.threshold = config["fitted"], config["threshold"]
    model.router.quantile = config["quantile"]


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise OSError(f"{file} is missing: this is no folder of a MoDA model.")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise OSError(f"{file}: not JSON: {error}") from error
    version = config.get("version") if isinstance(config, dict) else None
    if version != VERSION:
        raise ValueError(f"{file} is of version {version!r}; known is {VERSION}.")
    return config


def _checksums(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*"))}


def _damage(folder: Path, files: Mapping[str, str]) -> str | None:
    """What is wrong with a domain's folder, or None."""
    found = _checksums(folder)
    for name, checksum in files.items():
        if name not in found:
            return f"{folder / name} is missing"
        if found[name] != checksum:
            return f"{folder / name} is not what was written there: its checksum is another one"
    return None
