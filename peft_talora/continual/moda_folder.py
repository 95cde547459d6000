"""A MoDA model's folder: written so that a kill leaves none half, read so that an adapter is read when it is used.

==========================  ==========================================================================================
``moda.json``               version, base, query, selector; the domains in order, their folders and checksums
``moda.safetensors``        tokens of the query, the selector, the features of the exemplars
``domains/<name>/``         that domain's adapter and nothing else: a PEFT folder, or a domain's part of a TA-LoRA
``shared/``                 the factors that all domains of a TA-LoRA share
==========================  ==========================================================================================

Nothing that ``moda.json`` names is ever written over: what has changed gets a new name (``moda-2.safetensors``,
``domains/<name>-2``), and what is not named any more is deleted after ``moda.json`` was replaced, in one step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..files import check_safetensors, digest, write_aside, write_json
from .adapters import StockAdapters
from .moda import MoDAModel
from .queries import make_query
from .shared_factors import SharedFactorAdapters

CONFIG_NAME = "moda.json"
VERSION = 1


def save_moda(model: MoDAModel, folder: str | Path) -> None:
    """Write a MoDA model. Domains that are in that folder already, and have not learnt since, are not written again.

    Args:
        model: Any; a domain that is being learnt is written as it is now.
        folder: Created if need be; a MoDA model that is there is replaced.

    Raises:
        OSError: If a damaged domain would have to be copied.
    """
    folder = Path(folder)
    (folder / "domains").mkdir(parents=True, exist_ok=True)
    places = {name: _save_domain(model, name, folder / "domains") for name in model.domains}
    weights = _fresh(folder, "moda", ".safetensors")
    with write_aside(folder) as aside:
        save_file(_tensors(model), aside / weights.name)
    config = _describe(model, places, weights)
    if isinstance(model.adapters, SharedFactorAdapters):
        config["shared"] = _save_shared(model.adapters, folder)
    with write_aside(folder) as aside:
        write_json(aside / CONFIG_NAME, config)
    for name, place in places.items():
        model.note_saved(name, place)
    kept = {*places.values(), weights, folder / (config["shared"] or {"folder": "shared"})["folder"]}
    for pattern in ("domains/*", "moda*.safetensors", "shared*"):
        for stale in set(folder.glob(pattern)) - kept:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


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
    if config["shared"] is not None:
        model.adapters = SharedFactorAdapters(base, config["shared"]["own"])
        model.adapters.load_shared(folder / config["shared"]["folder"])
    elif config["domains"]:
        model.adapters = StockAdapters(base)
    for domain in config["domains"]:
        place = folder / "domains" / domain["folder"]
        model.expect_domain(domain["name"], domain["first_block"], place, _damage(place, domain["files"]))
    weights = folder / config["weights"]
    check_safetensors(weights)
    _fill(model, load_file(weights), config, weights)
    return model.eval()


def _fresh(folder: Path, stem: str, suffix: str = "") -> Path:
    """The first of ``<stem><suffix>``, ``<stem>-2<suffix>``, ... that is not there."""
    count = 1
    while (path := folder / f"{stem}{f'-{count}' if count > 1 else ''}{suffix}").exists():
        count += 1
    return path


def _save_domain(model: MoDAModel, name: str, parent: Path) -> Path:
    """Where the domain is, in a folder below `parent`; written there unless it is there as it is."""
    known = model.folder_of(name)
    if known is not None and known.parent.resolve() == parent.resolve():
        return parent / known.name
    place = _fresh(parent, name)
    if name in model.damaged:
        raise OSError(model.damaged[name])
    if known is None:
        model.adapters.save(name, place)
    else:  # it may be on disk alone
        with write_aside(place) as aside:
            shutil.copytree(known, aside, dirs_exist_ok=True)
    return place


def _save_shared(adapters: SharedFactorAdapters, folder: Path) -> dict[str, str]:
    fingerprint = adapters.fingerprint()
    file = folder / CONFIG_NAME
    before = (json.loads(file.read_text()).get("shared") if file.exists() else None) or {}
    place = folder / before["folder"] if before.get("fingerprint") == fingerprint else _fresh(folder, "shared")
    if not place.exists():
        adapters.save_shared(place)
    return {"folder": place.name, "own": adapters.own, "fingerprint": fingerprint}


def _tensors(model: MoDAModel) -> dict[str, Tensor]:
    tensors = {f"query.{key}": value for key, value in model.query.state_dict().items()}
    tensors |= {f"selector.{key}": value for key, value in model.router.selector.state_dict().items()}
    tensors |= {f"features.{name}": value for name, value in model.features.items()}
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _describe(model: MoDAModel, places: Mapping[str, Path], weights: Path) -> dict[str, Any]:
    return {
        "version": VERSION,
        "base": {"model_type": model.base.config.model_type, "name_or_path": model.base.config._name_or_path},
        "weights": weights.name,
        "query": {"kind": model.query.kind, "stop": model.query.stop},
        "selector": model.router.selector.kind,
        "fitted": model.router.domains,
        "threshold": model.router.threshold,
        "quantile": model.quantile,
        "exemplars": model.exemplars,
        "shared": None,
        "domains": [
            {
                "name": name,
                "folder": place.name,
                "first_block": model.first_block(name),
                "files": _checksums(place),
            }
            for name, place in places.items()
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
    model.quantile = config["quantile"]


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
    return {file.name: digest(file) for file in sorted(folder.glob("*"))}


def _damage(folder: Path, files: Mapping[str, str]) -> str | None:
    """What is wrong with a domain's folder, or None."""
    found = _checksums(folder)
    for name, checksum in files.items():
        if name not in found:
            return f"{folder / name} is missing"
        if found[name] != checksum:
            return f"{folder / name} is not what was written there: its checksum is another one"
    return None
