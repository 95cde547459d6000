"""The adapters of all domains in one frozen model: one is added, trained, plugged in or taken out at a time.

PEFT switches `requires_grad` whenever it switches adapters. Here it is switched by two methods alone: `train`, after
which exactly one domain's parameters have gradients, and `freeze`, which all others end with.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .peft_folder import WEIGHTS_NAME, fill, read_peft_folder, save_peft_folder

_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
# Modules of PEFT's wrappers: an adapter of such a name would be mistaken for them.
_PEFT_NAMES = ("base_layer", "base_model", "model", "modules_to_save", "original_module", "token_adapter")
# Other starts of a LoRA take what they start with out of the base's own weights.
_STARTS_BESIDE_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")


class DomainAdapters(ABC):
    """One adapter per domain inside one model, none of which can change another or the model itself.

    Args:
        base: The model. Its parameters are frozen; modules of it are wrapped while an adapter is there.

    Attributes:
        base: The model; called itself or by its parts, it runs with the domain that is active.
        peft_model: PEFT's model around it; None as long as no adapter was added.
        active: The domain that is plugged in; None: the plain model.

    Raises:
        ValueError: If the model has adapters already.
    """

    def __init__(self, base: PreTrainedModel):
        if any(isinstance(module, _WRAPPERS) for module in base.modules()):
            raise ValueError("`base` has adapters already; a model without any is needed, see `PeftModel.unload`.")
        self.base = base.requires_grad_(False)
        self.peft_model: PeftModel | None = None
        self.active: str | None = None
        # PEFT's own switches look for these among all modules, of which every domain brings more.
        self._wrapped: list[BaseTunerLayer | AuxiliaryTrainingWrapper] = []

    @abstractmethod
    def add(self, name: str, config: PeftConfig) -> None:
        """Add an adapter for a new domain, frozen and not active.

        Raises:
            ValueError: For a name or a configuration that is not allowed. Nothing has changed then.
        """

    @abstractmethod
    def own_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """What belongs to a domain alone, by name in the base, the domain's name left out."""

    @abstractmethod
    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """What all domains share beside the model itself, by name in the base."""

    @abstractmethod
    def save(self, name: str, folder: str | Path) -> None:
        """Write what belongs to a domain alone."""

    @abstractmethod
    def load(self, name: str, folder: str | Path) -> None:
        """Add a domain as it was saved, frozen and not active; it may have had another name.

        Raises:
            OSError: If a file is missing or damaged; the message names it.
            ValueError: If the files do not fit each other or the model. Nothing has changed then.
        """

    @abstractmethod
    def resident(self) -> list[str]:
        """The domains whose adapters are in memory, in the order in which they came."""

    @abstractmethod
    def _trained(self, name: str) -> dict[str, nn.Parameter]:
        """What `train` trains; called while `name` is active and as trainable as PEFT makes it."""

    @abstractmethod
    def _drop(self, name: str) -> None:
        """Take a domain that is not active out of the model."""

    def train(self, name: str) -> dict[str, nn.Parameter]:
        """Plug a domain in for training: gradients go to what it returns and nothing else.

        Raises:
            ValueError: For a domain that is not resident.
        """
        self._check_resident(name)
        self._switch(name, inference_mode=False)
        parameters = self._trained(name)
        self.freeze()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return parameters

    def freeze(self) -> None:
        """No parameter has gradients from here on, whatever is active."""
        self.base.requires_grad_(False)

    def activate(self, name: str | None) -> None:
        """Plug a domain in for inference, or none: the plain model.

        Raises:
            ValueError: For a domain that is not resident.
        """
        if name is not None:
            self._check_resident(name)
        self._switch(name, inference_mode=True)

    def unload(self, name: str) -> None:
        """Take a domain out of memory. If it was active, the model is plain afterwards, else as it was; all is frozen.

        Raises:
            ValueError: For a domain that is not resident.
        """
        self._check_resident(name)
        active = None if self.active == name else self.active
        self._drop(name)
        self._settle(active)

    def _switch(self, name: str | None, inference_mode: bool) -> None:
        """Plug an adapter in, in all layers at once, or none. Every one of them freezes what it does not plug in."""
        for module in self._wrapped:
            if module.disable_adapters is not (name is None):
                module.enable_adapters(name is not None)
            if name is not None:
                own = isinstance(module, BaseTunerLayer) or any(name in entries for _, entries in _entries(module))
                module.set_adapter(name if own else [], inference_mode=inference_mode)
        if name is not None:
            self.peft_model.active_adapter = self.peft_model.base_model.active_adapter = name
        self.active = name

    def _settle(self, active: str | None) -> None:
        """After adapters came or went: find the layers, plug in what was active, freeze all."""
        self._wrapped = [module for module in self.base.modules() if isinstance(module, _WRAPPERS)]
        self.activate(active)
        self.freeze()

    def _check_resident(self, name: str) -> None:
        if name not in self.resident():
            raise ValueError(f"Domain {name!r} is not resident; the domains in memory are {self.resident()}.")

    def _inject(self, name: str, config: PeftConfig) -> None:
        """Put an adapter of that name into the model; the domain that was active stays so, in inference."""
        wrapped = {id(module) for module in self.base.modules() if isinstance(module, _WRAPPERS)}
        try:
            if self.peft_model is None:
                self.peft_model = get_peft_model(self.base, config, adapter_name=name)
            else:
                self.peft_model.add_adapter(name, config)
        except Exception:
            self._take_back(name, wrapped)
            self._settle(self.active)
            raise
        # New modules come in training mode, whose dropout would make every output of an evaluated model another one.
        self.base.train(self.base.training)
        self._settle(self.active)
        if not adapter_parameters(self.base, name):  # not all versions of PEFT say so
            self._take_out(name)
            self._settle(self.active)
            raise ValueError(
                f"`target_modules`={config.target_modules} and `modules_to_save`={config.modules_to_save}: not found "
                f"in {type(self.base).__name__}, the adapter would have no parameters."
            )

    def _take_back(self, name: str, wrapped: set[int]) -> None:
        """Undo an injection that failed half-way: new wrappers give way to what they wrap, the others lose it."""
        for path, module in reversed(list(self.base.named_modules())):  # what lies inside a wrapper first
            if isinstance(module, _WRAPPERS) and id(module) not in wrapped:
                inner = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
                _put(self.base, path, inner)
            elif isinstance(module, BaseTunerLayer):
                module.delete_adapter(name)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(name, module.active_adapters)

    def _take_out(self, name: str) -> None:
        """The opposite of `_inject`. With the last adapter all wrappers go: PEFT fails on wrappers without any."""
        others = [other for other in self.peft_model.peft_config if other != name]
        if others:
            self.peft_model.set_adapter(others[0])  # PEFT warns when it has to choose one itself
        self.peft_model.delete_adapter(name)
        if not others:
            # PEFT would leave the domain's copies of modules trained in full in the model, or fail without any.
            for path, module in list(self.base.named_modules()):
                if isinstance(module, AuxiliaryTrainingWrapper):
                    _put(self.base, path, module.original_module)
            self.peft_model.unload()
            self.peft_model = None


class StockAdapters(DomainAdapters):
    """An adapter of PEFT's per domain, of any one method; each is saved as a PEFT folder that loads alone.

    Modules trained in full are copies, one per domain, of those of the base (`modules_to_save`).
    """

    def add(self, name: str, config: PeftConfig) -> None:
        """Add an adapter, see `DomainAdapters.add`. What would change the base itself is refused."""
        check_domain_name(name, self.base, config)
        check_isolation(config)
        self._inject(name, copy.deepcopy(config))  # PEFT fills it in

    def own_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """See `DomainAdapters.own_parameters`."""
        self._check_resident(name)
        return adapter_parameters(self.base, name)

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Nothing."""
        return {}

    def resident(self) -> list[str]:
        """See `DomainAdapters.resident`."""
        return [] if self.peft_model is None else list(self.peft_model.peft_config)

    def save(self, name: str, folder: str | Path) -> None:
        """Write a PEFT folder, `adapter_config.json` and `adapter_model.safetensors`, for the model without others."""
        self._check_resident(name)
        save_peft_folder(self.peft_model, name, Path(folder))

    def load(self, name: str, folder: str | Path) -> None:
        """Read a PEFT folder, see `DomainAdapters.load`."""
        config, state = read_peft_folder(Path(folder))
        self.add(name, config)
        try:
            fill(self.peft_model, name, state, Path(folder) / WEIGHTS_NAME)
        except ValueError:
            self.unload(name)
            raise

    def _trained(self, name: str) -> dict[str, nn.Parameter]:
        # Of some methods PEFT keeps a part frozen.
        return {key: value for key, value in self.own_parameters(name).items() if value.requires_grad}

    def _drop(self, name: str) -> None:
        self._take_out(name)


def check_domain_name(name: str, base: nn.Module, config: PeftConfig) -> None:
    """Raise ValueError for a name that PEFT could mistake for another part of a parameter's path, or that is taken.

    In the keys of its state dicts PEFT finds an adapter by its name as one component: what else has that name would
    be saved as the adapter's, or not at all.
    """
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    named = [*base.named_modules(), *base.named_parameters()]
    components = {part for path, _ in named for part in path.split(".")}
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"Domain name {name!r} is not allowed: it names modules, so it must be an identifier.")
    if name in components or name in _PEFT_NAMES or name in dir(nn.ModuleDict()) or name in dir(nn.ParameterDict()):
        raise ValueError(
            f"Domain name {name!r} is not allowed: a domain, a module or parameter of the model or an attribute of "
            "PyTorch's containers has that name, and saving would mix up their weights."
        )
    if name in prefix or name.startswith(prefix):
        raise ValueError(f"Domain name {name!r} is not allowed: PEFT's names of parameters here start by {prefix!r}.")


def check_isolation(config: PeftConfig) -> None:
    """Raise ValueError for an adapter that would change weights which all domains share."""
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(f"`peft_type` {config.peft_type.value} is not allowed: it is for language models.")
    values = config.to_dict()
    bias = values.get("bias", "none")
    if bias != "none":
        raise ValueError(f"`bias`={bias!r} is not allowed: it trains the base's own biases, which all domains share.")
    start = values.get("init_lora_weights", True)
    if start not in _STARTS_BESIDE_THE_BASE:
        raise ValueError(f"`init_lora_weights`={start!r} is not allowed: it changes weights which all domains share.")


def adapter_parameters(base: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """All parameters of an adapter, by name in the base, the adapter's name left out."""
    found = {}
    wrapped = {path: module for path, module in base.named_modules() if isinstance(module, _WRAPPERS)}
    for path, module in wrapped.items():
        values = {part: entries[name] for part, entries in _entries(module) if name in entries}
        for part, value in values.items():
            if isinstance(value, nn.Parameter):
                found[f"{path}.{part}"] = value
            elif isinstance(value, nn.Module):
                found |= {f"{path}.{part}.{key}": parameter for key, parameter in value.named_parameters()}
    return found


def _entries(module: BaseTunerLayer | AuxiliaryTrainingWrapper) -> Iterator[tuple[str, nn.Module]]:
    """What holds one entry per adapter in a layer of PEFT's, by name."""
    for part in module.adapter_layer_names:
        yield part, attrgetter(part)(module)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
