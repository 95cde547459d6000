"""A model that FSDP2 splits over processes: what Accelerate must be told, and its whole parameters, read and replaced.

What takes a model is called in all processes together, and leaves one that is not split as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, StateDictType
from torch.distributed.tensor.experimental import implicit_replication


def set_up_fsdp(accelerator: Accelerator) -> None:
    """Have mixed precision come from autocast, as with one process; does nothing where FSDP is not used.

    FSDP's own would round all that goes into the model, labels and their numbers as well, and the losses.

    Raises:
        ValueError: For FSDP1, and for checkpoints that would be unpickled.
    """
    if accelerator.distributed_type is not DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"`fsdp_version` is {plugin.fsdp_version}; allowed: 2.")
    if plugin.state_dict_type is not StateDictType.FULL_STATE_DICT:
        raise ValueError(
            f"`fsdp_state_dict_type` is {plugin.state_dict_type.name}, whose checkpoints have a pickled part; "
            "allowed: FULL_STATE_DICT."
        )
    plugin.mixed_precision_policy = None


def set_up_deepspeed(accelerator: Accelerator, max_grad_norm: float, resumed_from: str | None) -> None:
    """Have DeepSpeed, which takes the steps itself, clip gradients to a norm; does nothing where it is not used.

    Raises:
        ValueError: For mixed precision, which it takes for all numbers that the model has and gets, and for a
            checkpoint to go on from: it would be unpickled.
    """
    if accelerator.distributed_type is not DistributedType.DEEPSPEED:
        return
    if accelerator.mixed_precision != "no":
        raise ValueError(f"mixed precision is {accelerator.mixed_precision!r}; with DeepSpeed allowed: 'no'.")
    if resumed_from is not None:
        raise ValueError(f"`resume_from_checkpoint` is {resumed_from!r}; checkpoints of DeepSpeed are pickled.")
    accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = max_grad_norm


def split_by(accelerator: Accelerator) -> str | None:
    """What leaves each process a part of the parameters, their gradients or optimiser states; None if nothing does."""
    kind = accelerator.distributed_type
    return kind.value if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) else None


def refuse_split(accelerator: Accelerator, what: str) -> None:
    """Raise ValueError, naming what needs the whole model in every process, where it is split."""
    way = split_by(accelerator)
    if way is not None:
        raise ValueError(f"the model is split over processes by {way}; {what} allows data parallelism alone.")


def is_split(model: nn.Module) -> bool:
    """Whether each process holds a part of the parameters only."""
    return isinstance(model, FSDPModule)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors; of a split model on the CPU of the main process, and empty elsewhere."""
    if not is_split(model):
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@contextmanager
def taking_whole(model: nn.Module) -> Iterator[None]:
    """Inside, whole tensors can be loaded: of each, every process keeps its part."""
    if not is_split(model):
        yield
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass that no backward pass follows leaves the outermost whole
    with implicit_replication():
        yield
