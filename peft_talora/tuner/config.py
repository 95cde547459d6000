"""The configuration of a TA-LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft.config import PeftConfig
from peft.utils import PeftType
from torch import nn

MAIN_TASK = "main"
QKV_PARTS = ("q", "k", "v")
INIT_WEIGHTS = ("lora", "orthogonal", "gaussian", True, False)
UNCOMPRESSED_TASKS = 4
TIED_TASKS = "`r_task=1` makes the updates of all tasks multiples of one matrix."


def check_task_names(task_names: list[str]) -> None:
    """Raise ValueError unless the names are distinct identifiers that can name a module and a parameter.

    A task's name is a key of `nn.ModuleDict` (its head) and of `nn.ParameterDict` (its row), hence no instance of
    either may have an attribute of that name.
    """
    if not task_names:
        raise ValueError("`task_names` is an empty list; name at least one task, or leave it None.")
    for name in task_names:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"Task name {name!r} is not allowed: it names a module, so it must be an identifier.")
        if name in dir(nn.ModuleDict()) or name in dir(nn.ParameterDict()):
            raise ValueError(f"Task name {name!r} is not allowed: it is an attribute of PyTorch's containers.")
    repeated = sorted({name for name in task_names if task_names.count(name) > 1})
    if repeated:
        raise ValueError(f"Duplicate task names {repeated} in `task_names`={task_names}; each task has one name.")


@dataclass
class TALoRAConfig(PeftConfig):
    """Configuration of a [`TALoRAModel`]: one low-rank (Tucker) update tensor per layer over several tasks.

    The method is TA-LoRA, https://arxiv.org/abs/2403.10971. [`TALoRALayer`] states the formula. On a model that keeps
    one head per task in `task_heads` (as `MSamModel` does), `TALoRAConfig()` is complete: tasks, targets and heads are
    taken from the model.

    Args:
        task_names: The tasks, in the order in which an index means them. None takes the model's `task_heads`, or else
            the one task `"main"`, which needs no selecting. An adapter of one task whose name is that of no head is
            shared by all heads; any other serves the heads of its own tasks and no others.
        r: Rank of the input factor, and of the output factor unless `r_out` says otherwise.
        r_out: Rank of the output factor. None means `r`.
        r_task: Rank of the task factor. None means the number of tasks up to four, else 4. With `r_task` equal to the
            number of tasks the task mode is uncompressed (more adds nothing); fewer ties the tasks; 1 makes all
            tasks' updates multiples of one matrix.
        alpha: The update is scaled by `alpha / r`. None means half the rank of each layer, so a scaling of 0.5.
        dropout: Probability of dropping an input of the update during training.
        init_weights: How training starts; the adapted model starts as the base model. `"lora"` (or True) starts as
            one LoRA that all tasks share: input factor with orthonormal columns, output factor zero, an orthogonal
            first slice of the core with the weight 1 in every row; the other slices, of which each task has its own
            mixture, grow from zero. The other two start with a core of zero, hence with no shared part: factors with
            orthonormal columns in `"orthogonal"`; N(0, 1) in `"gaussian"` (MTSAM's), whose first steps are some
            thousand times larger, so give it a warm-up. False draws all of them at random: for tests.
        qkv_parts: Which thirds of a fused query-key-value layer are updated. Anything but all three needs
            `d_out = 3 * d_in`; the output factor then holds the rows of the enabled thirds only.
        train_norms: Also train the two layer norms of every vision block (shared by the tasks), through
            `modules_to_save`.
        target_modules: The linear layers to adapt: names, a regular expression, or `"all-linear"`. None takes the
            queries, keys and values of the vision encoder, in the model families that `families.py` lists.
        exclude_modules: Layers not to adapt: names or a regular expression.
        layers_to_transform: Indices of the blocks to adapt; `target_modules` must then be a list.
        layers_pattern: Name of the block list, used with `layers_to_transform`.
        rank_pattern: Ranks of single layers, by name or regular expression: a number sets `r` and `r_out` of that
            layer, a list `[r, r_out]` each of them.
        alpha_pattern: The same for `alpha`.
        modules_to_save: Modules trained in full and saved with the adapter. None takes the heads that the adapter
            serves; a list is taken as it is, so name the heads in it as well (`"task_heads.depth"`).
        bias: Which biases are trained: `"none"`, `"all"` or `"talora_only"`.

    Raises:
        ValueError: For a value that is not allowed; the message names the argument, the value and what is allowed.
    """

    task_names: list[str] | None = field(
        default=None, metadata={"help": "The tasks, in order. None: the model's task heads, else one task 'main'."}
    )
    r: int = field(default=8, metadata={"help": "Rank of the input factor (and of the output factor)."})
    r_out: int | None = field(default=None, metadata={"help": "Rank of the output factor. None: r."})
    r_task: int | None = field(
        default=None, metadata={"help": "Rank of the task factor. None: the number of tasks, 4 at the most."}
    )
    alpha: float | None = field(default=None, metadata={"help": "The update is scaled by alpha / r. None: r / 2."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the update."})
    init_weights: bool | Literal["lora", "orthogonal", "gaussian"] = field(
        default="lora", metadata={"help": "Start: 'lora', 'orthogonal' or 'gaussian'; False, at random, for tests."}
    )
    qkv_parts: list[str] = field(
        default_factory=lambda: list(QKV_PARTS), metadata={"help": "Thirds of a fused qkv layer to update."}
    )
    train_norms: bool = field(default=False, metadata={"help": "Train the layer norms of the vision blocks too."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linear layers to adapt: names, a regular expression or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers not to adapt."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of blocks to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    rank_pattern: dict[str, int | list[int]] = field(
        default_factory=dict, metadata={"help": "Ranks of single layers."}
    )
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Alphas of single layers."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved. None: the model's task heads."}
    )
    bias: Literal["none", "all", "talora_only"] = field(default="none", metadata={"help": "Biases to train."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.TALORA
        # Sets would come back from JSON in another order, so they become sorted lists at once.
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(getattr(self, name), (set, tuple)):
                setattr(self, name, sorted(getattr(self, name)))
        if self.task_names is not None:
            if not isinstance(self.task_names, (list, tuple)):
                raise ValueError(f"`task_names` must be a list of names, in order; got {self.task_names!r}.")
            self.task_names = list(self.task_names)
            check_task_names(self.task_names)
        self._check_numbers()
        self._check_choices()
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None and isinstance(self.target_modules, str):
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def _check_numbers(self) -> None:
        ranks = {name: getattr(self, name) for name in ("r", "r_out", "r_task")}
        ranks = {name: value for name, value in ranks.items() if value is not None or name == "r"}
        for key, value in self.rank_pattern.items():
            pair = list(value) if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
            ranks.update({f"rank_pattern[{key!r}]{'[1]' * i}": rank for i, rank in enumerate(pair)})
        for name, value in ranks.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` must lie in [0, 1); got {self.dropout!r}.")

    def _check_choices(self) -> None:
        if self.init_weights not in INIT_WEIGHTS:
            raise ValueError(f"`init_weights` must be one of {INIT_WEIGHTS}; got {self.init_weights!r}.")
        parts = list(self.qkv_parts)
        if not parts or [part for part in QKV_PARTS if part in parts] != parts:
            raise ValueError(f"`qkv_parts` must be some of {list(QKV_PARTS)}, in that order; got {parts}.")
        self.qkv_parts = parts
        if self.bias not in ("none", "all", "talora_only"):
            raise ValueError(f"`bias` must be 'none', 'all' or 'talora_only'; got {self.bias!r}.")
