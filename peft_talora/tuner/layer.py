"""The TA-LoRA layer: a frozen linear layer and its update tensor.

Axes: T tasks, K rank of the task factor, O rank of the output factor, R rank of the input factor (`r`), D_out and D_in
the base layer's sizes, N rows of the effective batch.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper, quantization_extra_repr
from torch import nn

from .compatibility import resolve_quantization_backend
from .config import QKV_PARTS, TALoRAConfig
from .fused import can_fuse, fused_linear, without_autocast
from .task_state import TaskState, task_index


class TALoRALayer(BaseTunerLayer):
    r"""A layer with one update tensor over T tasks, in Tucker form (TA-LoRA, https://arxiv.org/abs/2403.10971, §3.2).

    For task t:

        y_t = W x + b + s · U C_t Vᵀ dropout(x),    C_t = Σ_k P[t, k] · G[:, :, k],    ΔW_t = s · U C_t Vᵀ

    | symbol | name          | parameter                      | shape                | shared by the tasks |
    |--------|---------------|--------------------------------|----------------------|---------------------|
    | V      | input factor  | `talora_in[adapter]`           | (D_in, r)            | yes                 |
    | U      | output factor | `talora_out[adapter]`          | (D_out, r_out)       | yes                 |
    | G      | core          | `talora_core[adapter]`         | (r_out, r, r_task)   | yes                 |
    | P[t]   | row of t      | `talora_task[adapter][task]`   | (r_task,)            | no                  |
    | s      | scaling       | `scaling[adapter]`             | alpha / r            |                     |

    The rank of every ΔW_t is at most min(r_out, r). At the start U = 0 or G = 0, so ΔW_t = 0 for all tasks; see
    `TALoRAConfig.init_weights`. The rows of P are parameters of their own, because weight decay moves whatever shares
    a parameter with a row that has a gradient.
    """

    adapter_layer_names = ("talora_in", "talora_out", "talora_core", "talora_task")
    other_param_names = ("r", "r_out", "scaling", "talora_dropout", "qkv_parts", "merged_tasks")

    def __init__(self, base_layer: nn.Module, task_state: TaskState, **kwargs) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.r: dict[str, int] = {}
        self.r_out: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.qkv_parts: dict[str, list[str]] = {}
        self.talora_dropout = nn.ModuleDict()
        self.talora_in = nn.ParameterDict()
        self.talora_out = nn.ParameterDict()
        self.talora_core = nn.ParameterDict()
        self.talora_task = nn.ModuleDict()
        self.task_state = task_state
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.merged_tasks: dict[str, int] = {}
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(
        self, adapter_name: str, r: int, r_out: int, alpha: float, config: TALoRAConfig, inference_mode: bool = False
    ) -> None:
        """Add an adapter, or replace it. `config` is complete: task names and `r_task` are filled in.

        Raises:
            ValueError: If a rank is larger than the layer, or `qkv_parts` does not fit it.
        """
        rows = self._enabled_rows(config.qkv_parts)
        for rank, size, name in ((r, self.in_features, "r"), (r_out, rows, "r_out")):
            if rank > size:
                raise ValueError(
                    f"`{name}`={rank} is larger than the {size} features of the layer: {rank} orthonormal columns do "
                    "not exist there. Use a smaller rank, for this layer alone through `rank_pattern`."
                )
        self.r[adapter_name], self.r_out[adapter_name] = r, r_out
        self.scaling[adapter_name] = alpha / r
        self.qkv_parts[adapter_name] = config.qkv_parts
        self.talora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        self.talora_in[adapter_name] = nn.Parameter(torch.empty(self.in_features, r))
        self.talora_out[adapter_name] = nn.Parameter(torch.empty(rows, r_out))
        self.talora_core[adapter_name] = nn.Parameter(torch.empty(r_out, r, config.r_task))
        self.talora_task[adapter_name] = nn.ParameterDict(
            {task: nn.Parameter(torch.empty(config.r_task)) for task in config.task_names}
        )
        self.reset_talora_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _enabled_rows(self, qkv_parts: list[str]) -> int:
        if len(qkv_parts) == len(QKV_PARTS):
            return self.out_features
        if self.out_features != 3 * self.in_features:
            raise ValueError(
                f"`qkv_parts`={qkv_parts} needs a fused query-key-value layer, with three times as many outputs as "
                f"inputs; this layer has {self.out_features} outputs and {self.in_features} inputs."
            )
        return len(qkv_parts) * self.in_features

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; the state that the layers share forgets it too, also where transformers deletes it."""
        super().delete_adapter(adapter_name)
        self.task_state.forget(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable the layer's adapters, see `BaseTunerLayer.enable_adapters`."""
        super().enable_adapters(enabled)
        if enabled and self is self.task_state.layers[0]:  # transformers' own leaves out the heads and norms
            for module in self.task_state.base.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.enable_adapters(True)
        self.task_state.tell_base()

    @torch.no_grad()
    def reset_talora_parameters(self, adapter_name: str, init_weights: bool | str) -> None:
        """Draw everything anew; see `TALoRAConfig.init_weights`."""
        core_ORK, rows = self.talora_core[adapter_name], self.talora_task[adapter_name]
        if core_ORK.is_meta:
            return
        draw = nn.init.normal_ if init_weights == "gaussian" else nn.init.orthogonal_
        draw(self.talora_in[adapter_name])
        draw(self.talora_out[adapter_name])
        for row_K in rows.values():
            nn.init.normal_(row_K, std=1 / math.sqrt(len(row_K)))
        if init_weights is False:
            nn.init.normal_(core_ORK, std=1 / self.r[adapter_name])
            return
        nn.init.zeros_(core_ORK)
        if init_weights in ("lora", True):
            # All tasks share the first slice, as one LoRA; no row or column of it is zero where the ranks differ.
            nn.init.zeros_(self.talora_out[adapter_name])
            nn.init.orthogonal_(core_ORK[:, :, 0])
            for row_K in rows.values():
                row_K[0] = 1

    def add_row(self, adapter_name: str, task: str, source: str | None) -> None:
        """Give a task a row of its own: a copy of the row of `source`, or zero, whose update is exactly zero."""
        rows = self.talora_task[adapter_name]
        like = next(iter(rows.values()))
        row = torch.zeros_like(like) if source is None else rows[source].detach().clone()
        trains = adapter_name in self.active_adapters and not self.disable_adapters
        _replace_rows(rows, {**rows, task: nn.Parameter(row, requires_grad=trains)})

    def remove_row(self, adapter_name: str, task: str) -> None:
        """Drop a task's row."""
        del self.talora_task[adapter_name][task]

    def rename_row(self, adapter_name: str, old: str, new: str) -> None:
        """Keep a task's row, the same parameter, under another name."""
        rows = self.talora_task[adapter_name]
        _replace_rows(rows, {new if task == old else task: row for task, row in rows.items()})

    def cores(self, adapter_name: str, indices: torch.Tensor) -> torch.Tensor:
        """Contract core and task factor: s · C_t for every task in `indices`.

        This one contraction serves forward, merging and export. Rows are picked before it, so that its result for a
        task is the same to the last bit however many tasks the adapter has.

        Args:
            adapter_name: The adapter.
            indices: (N,) positions of tasks, on the parameters' device.

        Returns:
            (N, r_out, r), in the parameters' dtype even under autocast.
        """
        core_ORK = self.talora_core[adapter_name]
        # By name: the container's own order is not that of the tasks.
        rows = self.talora_task[adapter_name]
        task_TK = torch.stack([rows[name] for name in self.task_state.task_names[adapter_name]])
        with without_autocast(core_ORK.device.type):
            # `linear`, not `matmul`: that one's last bits depend on whether the parameters require gradients.
            cores_NX = F.linear(task_TK.index_select(0, indices), core_ORK.flatten(0, 1))
            return self.scaling[adapter_name] * cores_NX.unflatten(1, core_ORK.shape[:2])

    def output_factor(self, adapter_name: str) -> torch.Tensor:
        """The output factor for all outputs of the layer, (D_out, r_out): zero in the rows of disabled `qkv_parts`."""
        out_DO, parts = self.talora_out[adapter_name], self.qkv_parts[adapter_name]
        if len(parts) == len(QKV_PARTS):
            return out_DO
        enabled = dict(zip(parts, out_DO.split(self.in_features), strict=True))
        zeros = torch.zeros_like(enabled[parts[0]])
        return torch.cat([enabled.get(part, zeros) for part in QKV_PARTS])

    def get_delta_weight(self, adapter_name: str, task: str | int | None = None) -> torch.Tensor:
        """The update ΔW_t of one task, (D_out, D_in), as it is added to the base weight.

        Args:
            adapter_name: The adapter.
            task: Name, or position in the adapter's own list; None means the selected task, or the only one.

        Raises:
            ValueError: For an unknown task, or None where several tasks are there and none is selected.
        """
        in_DR = self.talora_in[adapter_name]
        index = torch.tensor([self._task_index(adapter_name, task)], device=in_DR.device)
        # Some processors multiply half-precision matrices slowly or not at all, so merging there goes through float32.
        half_on_cpu = in_DR.device.type == "cpu" and in_DR.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if half_on_cpu else in_DR.dtype
        core_OR = self.cores(adapter_name, index)[0].to(dtype)
        return (self.output_factor(adapter_name).to(dtype) @ core_OR @ in_DR.T.to(dtype)).to(in_DR.dtype)

    def _task_index(self, adapter_name: str, task: str | int | None = None) -> int:
        if task is None:
            return self.task_state.selected_index(adapter_name)
        return task_index(task, self.task_state.task_names[adapter_name])


def _replace_rows(rows: nn.ParameterDict, tasks: dict[str, nn.Parameter]) -> None:
    """In the order that a new adapter's rows have (sorted by name), so that an optimiser's saved state fits them."""
    rows.clear()
    rows.update(tasks)


class Linear(nn.Module, TALoRALayer):
    """TA-LoRA on a linear layer, bare or quantised by one of PEFT's backends."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, task_state: TaskState, **kwargs) -> None:
        super().__init__()
        update = {name: kwargs.pop(name) for name in ("r", "r_out", "alpha", "config", "inference_mode")}
        TALoRALayer.__init__(self, base_layer, task_state, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **update)
        task_state.layers.append(self)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output, plus the update of each row's task: (N · windows, ..., D_in) → (..., D_out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.talora_core]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        if not args and not kwargs and self.cast_input_dtype_enabled and can_fuse(self.base_layer, x):
            first, *names = names
            cores, dropout = self._cores_of_rows(first, x), self.talora_dropout[first]
            result = fused_linear(x, self.base_layer, self.talora_in[first], cores, self.output_factor(first), dropout)
        else:
            result = self.base_layer(x, *args, **kwargs)
            if self.quantization_backend is not None:
                result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter_name in names:
            result = result + self._update(adapter_name, x).to(result.dtype)
        return result

    def _cores_of_rows(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """The scaled core of every entry of `task_ids`, (N, r_out, r); N divides the leading size of x."""
        ids_N = self.task_state.rows(adapter_name)
        if ids_N is None:
            ids_N = torch.zeros(1, dtype=torch.int64, device=x.device)
        if x.shape[0] % len(ids_N) != 0:
            raise self.task_state.layout_error(self, x.shape, len(ids_N))
        return self.cores(adapter_name, ids_N.to(x.device))

    def _update(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """s · U C_t Vᵀ dropout(x) for every row's own task t: two skinny products, no dense update."""
        # The parameters follow the activations' dtype: PEFT keeps adapters in float32, and float32 arithmetic beside a
        # half-precision base would cost more than the base.
        dtype = x.dtype if self.cast_input_dtype_enabled else self.talora_in[adapter_name].dtype
        z = F.linear(self.talora_dropout[adapter_name](x), self.talora_in[adapter_name].to(dtype).T)
        # Windows are folded into the batch axis with the sample slowest, so this view puts a sample's rows together.
        cores_NOR = self._cores_of_rows(adapter_name, x).to(dtype)
        w = z.reshape(len(cores_NOR), -1, z.shape[-1]) @ cores_NOR.mT
        return F.linear(w.reshape(*z.shape[:-1], w.shape[-1]), self.output_factor(adapter_name).to(dtype))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the selected task's update to the base weight.

        Args:
            safe_merge: Check the merged weight for NaN and infinity before it replaces the old one.
            adapter_names: The adapters to merge; None means the active ones.

        Raises:
            ValueError: If several tasks are there and none is selected, or, with `safe_merge`, for a broken adapter.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.talora_core:
                continue
            index = self._task_index(adapter_name)
            weight = self.get_base_weight()
            merged = weight + self.get_delta_weight(adapter_name, index).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter_name)
            self.merged_tasks[adapter_name] = index

    def unmerge(self) -> None:
        """Subtract from the base weight what `merge` added: the update of that same task."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            index = self.merged_tasks.pop(adapter_name)
            weight = self.get_base_weight()
            self.set_base_weight(weight - self.get_delta_weight(adapter_name, index).to(weight.dtype))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is additive, so `peft.convert_to_lora` can export the selected task."""
        return True

    def __repr__(self) -> str:
        return "talora." + super().__repr__()

    def extra_repr(self) -> str:
        """The quantisation backend, if there is one."""
        return quantization_extra_repr(self)
