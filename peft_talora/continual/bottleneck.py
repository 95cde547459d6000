"""A bottleneck adapter as a PEFT method. Importing this module registers it.

Axes: D_in and D_out the base layer's sizes, R the width of the bottleneck.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import nn

from ..tuner.registration import add_peft_type, register

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}
NOT_MERGEABLE = (
    "A bottleneck adapter cannot be merged: its activation makes it another function than a change of the weight. "
    "Use the model with the adapter in place, or `unload` it."
)

# A regular expression for all of a module's name, so that the mask decoder's layers of the same names are left alone.
_LAST_OF_MLP = r"(vision_encoder\.)?layers\.\d+\.mlp\.lin2"
_SAM_TYPES = ("sam", "sam_vision_model", "sam_hq", "sam_hq_vision_model", "msam")

add_peft_type("BOTTLENECK")


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of a [`BottleneckModel`]: two small matrices with a non-linearity between, beside a linear layer.

    [`BottleneckLayer`] states the formula.

    Args:
        r: Width of the bottleneck.
        scaling: What the adapter's output is multiplied by.
        activation: `"gelu"` or `"relu"`.
        dropout: Probability of dropping an input of the adapter during training.
        init_weights: True starts as the base model; False starts at random, for tests.
        target_modules: The linear layers to adapt: names, a regular expression, or `"all-linear"`. None takes the
            last linear layer of the MLP in every block of the vision encoder of SAM, SAM-HQ and mSAM.
        exclude_modules: Layers not to adapt: names or a regular expression.
        layers_to_transform: Indices of the blocks to adapt; `target_modules` must then be a list.
        layers_pattern: Name of the block list, used with `layers_to_transform`.
        modules_to_save: Modules trained in full and saved with the adapter.

    Raises:
        ValueError: For a value that is not allowed; the message names the argument, the value and what is allowed.
    """

    r: int = field(default=16, metadata={"help": "Width of the bottleneck."})
    scaling: float = field(default=1.0, metadata={"help": "What the adapter's output is multiplied by."})
    activation: Literal["gelu", "relu"] = field(default="gelu", metadata={"help": "'gelu' or 'relu'."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the adapter."})
    init_weights: bool = field(default=True, metadata={"help": "False starts at random, for tests."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linear layers to adapt: names, a regular expression or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers not to adapt."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of blocks to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full and saved."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.BOTTLENECK
        # Sets would come back from JSON in another order, so they become sorted lists at once.
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(getattr(self, name), (set, tuple)):
                setattr(self, name, sorted(getattr(self, name)))
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"`r` must be an integer of at least 1; got {self.r!r}.")
        if not math.isfinite(self.scaling):
            raise ValueError(f"`scaling` must be a finite number; got {self.scaling!r}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {list(ACTIVATIONS)}; got {self.activation!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be at least 0 and less than 1; got {self.dropout!r}.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"`layers_to_transform`={self.layers_to_transform} needs a list of `target_modules`; "
                f"got {self.target_modules!r}."
            )


class BottleneckLayer(BaseTunerLayer):
    r"""A linear layer f with a narrow non-linear branch beside it, which reads the layer's own input:

        y = f(x) + s · U act(D dropout(x))

    | symbol | name            | parameter                  | shape      | at the start             |
    |--------|-----------------|----------------------------|------------|--------------------------|
    | D      | down-projection | `bottleneck_down[adapter]` | (R, D_in)  | as `nn.Linear`'s weight  |
    | U      | up-projection   | `bottleneck_up[adapter]`   | (D_out, R) | zero, so that y = f(x)   |
    | s      | scaling         | `scaling[adapter]`         |            |                          |
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("r", "scaling", "activation", "bottleneck_dropout")

    def __init__(self, base_layer: nn.Module, **kwargs) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.activation: dict[str, str] = {}
        self.bottleneck_dropout = nn.ModuleDict()
        self.bottleneck_down = nn.ParameterDict()
        self.bottleneck_up = nn.ParameterDict()
        self.quantization_backend = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs
        self.in_features, self.out_features = self.get_base_layer().in_features, self.get_base_layer().out_features

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter, or replace it."""
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.scaling
        self.activation[adapter_name] = config.activation
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        self.bottleneck_down[adapter_name] = nn.Parameter(torch.empty(config.r, self.in_features))
        self.bottleneck_up[adapter_name] = nn.Parameter(torch.empty(self.out_features, config.r))
        self.reset_bottleneck_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_bottleneck_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """Draw everything anew; see `BottleneckConfig.init_weights`."""
        down_RD, up_DR = self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name]
        nn.init.kaiming_uniform_(down_RD, a=math.sqrt(5))
        nn.init.zeros_(up_DR) if init_weights else nn.init.kaiming_uniform_(up_DR, a=math.sqrt(5))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError: there is nothing that a weight could hold."""
        raise ValueError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Warn, as PEFT's layers do when nothing is merged."""
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()


class Linear(nn.Module, BottleneckLayer):
    """A bottleneck adapter beside an `nn.Linear`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, **kwargs) -> None:
        super().__init__()
        BottleneckLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output, plus those of the active adapters: (..., D_in) → (..., D_out)."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for adapter_name in self.active_adapters:
            if adapter_name in self.bottleneck_down:
                result = result + self._branch(adapter_name, x).to(result.dtype)
        return result

    def _branch(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        down_RD, up_DR = self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name]
        # The parameters follow the activations' dtype: PEFT keeps adapters in float32, and float32 arithmetic beside a
        # half-precision base would cost more than the base.
        dtype = x.dtype if self.cast_input_dtype_enabled else down_RD.dtype
        inner = F.linear(self.bottleneck_dropout[adapter_name](x), down_RD.to(dtype))
        inner = ACTIVATIONS[self.activation[adapter_name]](inner)
        return self.scaling[adapter_name] * F.linear(inner, up_DR.to(dtype))


class BottleneckModel(BaseTuner):
    """Puts bottleneck adapters beside a model's linear layers. [`BottleneckLayer`] has the formula.

    Args:
        model: The model to adapt.
        config: The adapter's configuration (or a dict of them by adapter name).
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Create the adapter's weights on the meta device, to be loaded.
    """

    prefix: str = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping = dict.fromkeys(_SAM_TYPES, _LAST_OF_MLP)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, nn.Linear):
            raise ValueError(f"{current_key}: {type(target).__name__} is not supported; allowed is `torch.nn.Linear`.")
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(f"{current_key}: `nn.MultiheadAttention` uses the weight of this layer directly.")
        self._replace_module(parent, target_name, Linear(target, adapter_name, peft_config), target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Overridden because the base class copies `weight` and `bias` onto the new module, which a composite module
        # in `modules_to_save` does not have (peft issue 3114). `update_layer` sees to the device.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        """Before the first module is touched, so that nothing is half unloaded."""
        raise ValueError(NOT_MERGEABLE)


register("bottleneck", BottleneckConfig, BottleneckModel)
