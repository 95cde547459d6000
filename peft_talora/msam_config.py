"""mSAM's configuration: SAM's, and which tasks are predicted how."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, SamConfig

from .task_head import DECODER_MODES
from .tasks import Task, check_task_name

CHECKPOINT_TYPES = ("sam", "sam_hq", "msam")


def _task_entry(task: Any, name: str | None = None) -> dict[str, Any]:
    """One task as the config keeps it, checked; `name` is the key where tasks come as a dict."""
    if isinstance(task, Task):
        if name not in (None, task.name):
            raise ValueError(f"tasks: the key {name!r} holds a Task named {task.name!r}; the two must be equal.")
        task = {"name": task.name, "kind": task.kind, "channels": task.out_channels}
    elif not isinstance(task, Mapping):
        if name is None:
            raise ValueError(
                f"tasks: a list holds Task objects or dicts with 'name' and 'channels', got {task!r}; "
                "the short form is a dict of channels by name, for example {'depth': 1}."
            )
        task = {"name": name, "channels": task}
    if not {"name", "channels"} <= task.keys() <= {"name", "kind", "channels"}:
        raise ValueError(f"tasks: {dict(task)!r} must have the keys 'name' and 'channels' and may have 'kind'.")
    name, channels = task["name"], task["channels"]
    check_task_name(name)
    if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
        raise ValueError(f"tasks: {name!r} has channels={channels!r}; allowed are whole numbers from 1.")
    kind = name if task.get("kind") is None else task["kind"]
    return {"name": name, "kind": kind, "channels": channels}


def task_entries(tasks: Mapping[str, Any] | Sequence[Any] | None) -> list[dict[str, Any]]:
    """Bring any way of giving tasks into the config's: a list of checked dicts of "name", "kind" and "channels"."""
    if isinstance(tasks, Mapping):
        entries = [_task_entry(task, name) for name, task in tasks.items()]
    else:
        entries = [_task_entry(task) for task in tasks or ()]
    names = [entry["name"] for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks: every name may occur once, got {names}.")
    return entries


class MSamConfig(SamConfig):
    """SAM's configuration and what mSAM adds to it.

    Args:
        tasks: in this order, as dicts of "name" (see `check_task_name`), "kind" (what `make_task` calls it; the name
            where it is left out) and "channels"; `Task` objects and the short {name: channels} are taken as well.
        decoder_mode: "channel", the paper's, one decoder pass per channel; or "token", one pass per task, cheaper.
        merged_task: the only task whose predictions are right, once one task's update is merged into the weights.

    Raises:
        ValueError: for a task name, channel number, decoder mode or merged task that is not allowed.
    """

    model_type = "msam"

    def __init__(self, tasks=None, decoder_mode: str = "channel", merged_task: str | None = None, **kwargs):
        self.tasks = task_entries(tasks)
        if decoder_mode not in DECODER_MODES:
            raise ValueError(f"decoder_mode: got {decoder_mode!r}; allowed are {', '.join(map(repr, DECODER_MODES))}.")
        self.decoder_mode = decoder_mode
        self.merged_task = merged_task
        super().__init__(**kwargs)


def checkpoint_type(name, kwargs: dict[str, Any]) -> str:
    """The architecture of a checkpoint, read from its config.json or from `kwargs["config"]`.

    Raises:
        ValueError: for one that is not among `CHECKPOINT_TYPES`.
    """
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        values, _ = PreTrainedConfig.get_config_dict(config or name, **kwargs)
        model_type = values.get("model_type")
    else:
        model_type = config.model_type
    if model_type not in CHECKPOINT_TYPES:
        allowed = ", ".join(map(repr, CHECKPOINT_TYPES))
        raise ValueError(f"{name} holds a model of type {model_type!r}; allowed are {allowed}.")
    return model_type
