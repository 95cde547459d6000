"""Domains as parts of one TA-LoRA: the factors are learnt on the first domain, each later one adds a few numbers.

Axes: D_in and D_out a layer's sizes, R and O the ranks of its input and output factor, K the slices of a shared core.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..files import check_safetensors, write_aside, write_json
from ..msam import MSamModel
from ..tuner import TALoRAConfig, TALoRALayer
from ..tuner.config import MAIN_TASK, UNCOMPRESSED_TASKS
from .adapters import DomainAdapters, adapter_parameters, check_domain_name, check_isolation
from .peft_folder import WEIGHTS_NAME, check_same_tensors, fill, read_peft_folder, save_peft_folder

SHARED = "shared_factors"
ROW_NAME = "row.safetensors"
ROW_CONFIG_NAME = "row.json"
SHARED_CONFIG_NAME = "shared_factors.json"
VERSION = 1

_SHARED_PARTS = {"column": ("talora_in", "talora_out"), "row": ("talora_in", "talora_out", "talora_core")}
# What a domain may have of its own besides its part of TA-LoRA; all else of the configuration is the factors'.
_OWN_FIELDS = {"modules_to_save", "train_norms", "dropout", "inference_mode", "base_model_name_or_path"}
_OWN_FIELDS |= {"auto_mapping", "init_weights", "peft_version"}


class SharedFactorAdapters(DomainAdapters):
    r"""TA-LoRA over domains, ΔW_d = s · U C_d Vᵀ, see `TALoRALayer`.

    | `own`      | C_d                        | shared                     | of domain d alone               |
    |------------|----------------------------|----------------------------|---------------------------------|
    | `"column"` | P[d, d] · G[:, :, d]       | V (D_in, R), U (D_out, O)  | a slice of G (O, R), a number   |
    | `"row"`    | Σ_k P[d, k] · G[:, :, k]   | V, U and G (O, R, K)       | a row of P (K,)                 |

    With a column, every domain adds one to the task factor P and the core's slice that belongs to it, so that it can
    learn any map between the shared factors. With a row it can only mix the slices that are there.

    In the model the shared parameters are an adapter named `shared_factors`, whose own update is zero, and the adapter
    of a domain holds the very same parameters. They train with the first domain that does, and never again once
    another one has trained. Modules trained in full (`modules_to_save`, norms) are the domain's own.

    Args:
        base: The model.
        own: `"column"` or `"row"`.

    Attributes:
        trained_with: The domain with which the factors train; None before the first.
        frozen: Whether that is over for good.

    Raises:
        ValueError: For an unknown `own`, or a model that has adapters already.
    """

    def __init__(self, base: PreTrainedModel, own: str = "column"):
        if own not in _SHARED_PARTS:
            raise ValueError(f"`own` must be one of {list(_SHARED_PARTS)}; got {own!r}.")
        super().__init__(base)
        self.own = own
        self.trained_with: str | None = None
        self.frozen = False

    def add(self, name: str, config: PeftConfig) -> None:
        """Add a domain, see `DomainAdapters.add`; it starts as the plain model, unless `init_weights` is False.

        Args:
            name: Of the domain.
            config: A `TALoRAConfig` of one task at the most. Layers, ranks and scaling are those of the first domain.
                `r_task` is the number K of slices for `own="row"` (None: 4), and without meaning for `"column"`.
                No heads are trained but those in `modules_to_save`.
        """
        self._check(name, config)
        new = SHARED not in self._adapters()
        if new:
            self._add_shared(config)
        try:
            self._inject(name, self._domain_config(config))
        except Exception:
            if new:
                self._remove_shared()
            raise
        self._tie(name)
        self._start(name)

    def own_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """See `DomainAdapters.own_parameters`."""
        self._check_resident(name)
        shared = {id(parameter) for parameter in self.shared_parameters().values()}
        return {key: p for key, p in adapter_parameters(self.base, name).items() if id(p) not in shared}

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """What all domains share, by name in the base; empty before the first domain."""
        parameters = adapter_parameters(self.base, SHARED)
        return {key: p for key, p in parameters.items() if key.rpartition(".")[2] in _SHARED_PARTS[self.own]}

    def resident(self) -> list[str]:
        """See `DomainAdapters.resident`."""
        return [name for name in self._adapters() if name != SHARED]

    def save(self, name: str, folder: str | Path) -> None:
        """Write `row.safetensors`, what belongs to the domain alone, and `row.json`; the rest is `save_shared`'s."""
        own = {key: p.detach().cpu().contiguous() for key, p in self.own_parameters(name).items()}
        config = self.peft_model.peft_config[name]
        content = {
            "version": VERSION,
            "own": self.own,
            "modules_to_save": config.modules_to_save,
            "dropout": config.dropout,
            "shared_factors": self.fingerprint(),
        }
        with write_aside(folder) as aside:
            save_file(own, aside / ROW_NAME, metadata={"format": "pt"})
            write_json(aside / ROW_CONFIG_NAME, content)

    def load(self, name: str, folder: str | Path) -> None:
        """Read a domain, see `DomainAdapters.load`. The factors that it was trained with must be there already."""
        folder = Path(folder)
        content = _read_json(folder / ROW_CONFIG_NAME, ("own", "modules_to_save", "dropout", "shared_factors"))
        check_safetensors(folder / ROW_NAME)
        if SHARED not in self._adapters():
            raise ValueError(
                f"{folder} holds a domain's own part; read the shared factors before it, by `load_shared`."
            )
        if (content["own"], content["shared_factors"]) != (self.own, self.fingerprint()):
            raise ValueError(
                f"{folder} belongs to other factors than those of the model: own={content['own']!r} with the factors "
                f"{content['shared_factors'][:12]}; the model has {self.own!r} with {self.fingerprint()[:12]}."
            )
        config = copy.deepcopy(self.peft_model.peft_config[SHARED])
        config.modules_to_save, config.dropout = content["modules_to_save"], content["dropout"]
        self.add(name, config)
        try:
            state, own = load_file(folder / ROW_NAME), self.own_parameters(name)
            check_same_tensors(state, own, folder / ROW_NAME)
        except ValueError:
            self.unload(name)
            raise
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(state[key])
        # Once another domain depends on the factors they stay, also if they were saved before that one was trained.
        self.frozen = self.frozen or self.trained_with not in (None, name)

    def save_shared(self, folder: str | Path) -> None:
        """Write the shared factors: a PEFT folder of a TA-LoRA whose update is zero, and `shared_factors.json`.

        Raises:
            ValueError: If there are none yet.
        """
        if SHARED not in self._adapters():
            raise ValueError("There are no shared factors yet; they come with the first domain.")
        content = {"version": VERSION, "own": self.own, "trained_with": self.trained_with, "frozen": self.frozen}
        save_peft_folder(self.peft_model, SHARED, Path(folder), beside={SHARED_CONFIG_NAME: content})

    def load_shared(self, folder: str | Path) -> None:
        """Read shared factors, before the first domain is added or loaded.

        Raises:
            OSError: If a file is missing or damaged; the message names it.
            ValueError: If there are some already, or the folder holds none that fit. Nothing has changed then.
        """
        folder = Path(folder)
        if SHARED in self._adapters():
            raise ValueError("The model has shared factors already, which its domains depend on.")
        content = _read_json(folder / SHARED_CONFIG_NAME, ("own", "trained_with", "frozen"))
        config, state = read_peft_folder(folder)
        if content["own"] != self.own or not isinstance(config, TALoRAConfig):
            raise ValueError(
                f"{folder} holds {config.peft_type} with own={content['own']!r}; needed is TALORA with {self.own!r}."
            )
        self._inject(SHARED, config)
        try:
            fill(self.peft_model, SHARED, state, folder / WEIGHTS_NAME)
        except ValueError:
            self._remove_shared()
            raise
        self.trained_with, self.frozen = content["trained_with"], content["frozen"]

    def fingerprint(self) -> str:
        """SHA-256 of the shared factors, so that a domain is not put upon others than its own."""
        digest = hashlib.sha256()
        for key, parameter in sorted(self.shared_parameters().items()):
            digest.update(key.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _trained(self, name: str) -> dict[str, nn.Parameter]:
        if not self.frozen and self.trained_with != name and (self.trained_with is None or self._untouched()):
            self._open(name)
        self.frozen = self.frozen or self.trained_with != name
        return self.own_parameters(name) | ({} if self.frozen else self.shared_parameters())

    def _untouched(self) -> bool:
        """Whether a part of the factors is zero in all layers, as it was drawn: no domain could learn by it."""
        parts = [[getattr(layer, part)[SHARED] for layer in self._layers()] for part in _SHARED_PARTS[self.own]]
        return any(not any(parameter.any() for parameter in part) for part in parts)

    @torch.no_grad()
    def _open(self, name: str) -> None:
        """Let the factors train with this domain. It stays the plain model: the output factor is zero, or the core.

        As added it has zeros of its own, and where both are zero neither gets a gradient. What it gets instead was
        drawn with the factors, so that training draws nothing.
        """
        if self.trained_with in self.resident():
            self._start(self.trained_with)
        self.trained_with = name
        if self.peft_model.peft_config[name].init_weights is False:
            return
        for layer in self._layers():
            if self.own == "column":
                layer.talora_core[name].copy_(layer.talora_core[SHARED])
            for row_K in layer.talora_task[name].values():
                nn.init.constant_(row_K, len(row_K) ** -0.5)

    def _drop(self, name: str) -> None:
        self._take_out(name)

    def _adapters(self) -> list[str]:
        return [] if self.peft_model is None else list(self.peft_model.peft_config)

    def _check(self, name: str, config: PeftConfig) -> None:
        if not isinstance(config, TALoRAConfig):
            raise ValueError(f"A TALoRAConfig is needed; got a {type(config).__name__}.")
        if name == SHARED:
            raise ValueError(f"Domain name {name!r} is not allowed: the shared factors have it.")
        check_domain_name(name, self.base, config)
        check_isolation(config)
        tasks = config.task_names or [MAIN_TASK]
        heads = list(self.base.task_heads) if isinstance(self.base, MSamModel) else []
        if len(tasks) > 1 or tasks[0] in heads:
            raise ValueError(
                f"`task_names` is {tasks}; a domain has one update for all tasks: give one name, not in {heads}."
            )
        if SHARED not in self._adapters():
            return
        wanted, shared = self._shared_config(config).to_dict(), self.peft_model.peft_config[SHARED].to_dict()
        filled_in = {"target_modules"} if wanted["target_modules"] is None else set()
        differing = [key for key in shared.keys() - _OWN_FIELDS - filled_in if wanted[key] != shared[key]]
        if differing:
            values = ", ".join(f"`{key}`={wanted[key]!r} ({shared[key]!r})" for key in sorted(differing))
            raise ValueError(f"These differ from the shared factors' values, in brackets: {values}.")

    def _shared_config(self, config: TALoRAConfig) -> TALoRAConfig:
        config = self._domain_config(config)
        config.modules_to_save, config.train_norms, config.dropout = [], False, 0.0
        return config

    def _domain_config(self, config: TALoRAConfig) -> TALoRAConfig:
        config = copy.deepcopy(config)
        config.task_names = config.task_names or [MAIN_TASK]
        config.r_task = 1 if self.own == "column" else config.r_task or UNCOMPRESSED_TASKS
        config.modules_to_save = config.modules_to_save or []  # None would mean the heads of an mSAM
        return config

    def _add_shared(self, config: TALoRAConfig) -> None:
        self._inject(SHARED, self._shared_config(config))
        with torch.no_grad():
            for layer in self._layers():
                core_ORK = layer.talora_core[SHARED]
                for row_K in layer.talora_task[SHARED].values():
                    nn.init.zeros_(row_K)
                if config.init_weights in ("lora", True):
                    # Slices of zero would all learn the same of the first domain, and later ones had little to mix.
                    for k in range(1, core_ORK.shape[2]):
                        nn.init.orthogonal_(core_ORK[:, :, k])

    def _remove_shared(self) -> None:
        self._take_out(SHARED)
        self._settle(None)

    def _tie(self, name: str) -> None:
        for layer in self._layers():
            for part in _SHARED_PARTS[self.own]:
                parameters = getattr(layer, part)
                parameters[name] = parameters[SHARED]

    @torch.no_grad()
    def _start(self, name: str) -> None:
        """Make a domain the plain model by what it has of its own, whatever the factors are or become."""
        if self.peft_model.peft_config[name].init_weights is False:
            return
        for layer in self._layers():
            for row_K in layer.talora_task[name].values():
                nn.init.zeros_(row_K) if self.own == "row" else nn.init.ones_(row_K)
            if self.own == "column":
                nn.init.zeros_(layer.talora_core[name])

    def _layers(self) -> list[TALoRALayer]:
        return [module for module in self.base.modules() if isinstance(module, TALoRALayer)]


def _read_json(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise OSError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f"{file} is not of version {VERSION}, the only one that is known.")
    missing = [key for key in keys if key not in content]
    if missing:
        raise OSError(f"{file} lacks {missing}.")
    return content
