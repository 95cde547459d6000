"""mSAM: the Segment Anything Model as a multi-task dense predictor (arXiv 2403.10971).

One image encoder, no prompt encoder, and per task a head of its own (`task_head.py`). Nothing here knows of adapters:
a tuner meets this model by four names, `task_heads`, `vision_encoder(pixel_values, task_ids=...)`, `task_conditional`
and `merged_task`, and adds, removes and renames tasks by `add_task_head`, `remove_task_head` and `rename_task_head`.

Axes: B images, T tasks, N channels of a task, D decoder width, S the encoder's input size, H W pixels of a label,
h w the encoder's grid. Sizes are (height, width) in pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, SamModel
from transformers.models.sam.modeling_sam import SamPositionalEmbedding, SamPreTrainedModel, SamVisionEncoder
from transformers.utils import ModelOutput

from .files import check_safetensors
from .msam_config import MSamConfig, checkpoint_type, task_entries
from .resize import resize_logits, resize_positions, size_list
from .sam_hq import load_sam_hq
from .task_head import MSamTaskHead
from .tasks import Task, make_task

__all__ = ["MSamConfig", "MSamModel", "MSamOutput", "MSamTaskHead"]


# What transformers notes on a model and its config when it quantises, for savers and tuners to ask.
_QUANTISER = (
    "hf_quantizer",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "quantization_config",
    "quantization_method",
    "_is_quantized",
)


@dataclass
class MSamOutput(ModelOutput):
    """What `MSamModel.forward` returns; dicts are in the order of the tasks asked for.

    Attributes:
        loss: the sum of `losses`, a scalar; weights between the tasks are the caller's business.
        losses: per task its own loss, a scalar, taken at label size.
        logits: per task (B, N, S/4, S/4), SAM's low-resolution masks; see `MSamModel.post_process`.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    logits: dict[str, torch.Tensor] | None = None


class MSamModel(SamPreTrainedModel):
    """SAM's image encoder with one dense-prediction head per task.

    Attributes:
        task_heads: `nn.ModuleDict` of one `MSamTaskHead` per task.
        task_conditional: whether the encoder's output depends on the task. If True the encoder is called as
            `vision_encoder(pixel_values, task_ids=ids)`; if False, one plain pass serves all heads.
        task_objects: `Task` objects by name; those of known kinds are made on first use.
    """

    config: MSamConfig
    _no_split_modules = ["SamVisionLayer", "MSamTaskHead"]

    def __init__(self, config: MSamConfig):
        super().__init__(config)
        if not config.tasks:
            raise ValueError("MSamModel needs at least one task; give tasks, for example {'depth': 1}.")
        config.mask_decoder_config._attn_implementation = config._attn_implementation  # as SamModel does
        self.shared_image_embedding = SamPositionalEmbedding(config.vision_config).requires_grad_(False)
        self.vision_encoder = SamVisionEncoder(config.vision_config)
        self.task_heads = nn.ModuleDict(
            {
                entry["name"]: MSamTaskHead(config.mask_decoder_config, entry["channels"], config.decoder_mode)
                for entry in config.tasks
            }
        )
        self.task_conditional = False
        self.task_objects: dict[str, Task] = {}
        self.merged_task = config.merged_task
        self.post_init()

    @property
    def task_names(self) -> list[str]:
        """The tasks in the order of the config; task ids are positions in this list."""
        return [entry["name"] for entry in self.config.tasks]

    @property
    def merged_task(self) -> str | None:
        """The task whose update is merged into the weights, None if none is; saved with the config."""
        return self.config.merged_task

    @merged_task.setter
    def merged_task(self, name: str | None) -> None:
        if name is not None and name not in self.task_names:
            raise ValueError(f"merged_task: unknown task {name!r}; known are {self.task_names}.")
        self.config.merged_task = name

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's patch embedding."""
        return self.vision_encoder.get_input_embeddings()

    def task(self, name: str) -> Task:
        """The task's loss and metric: from `task_objects`, else made from its kind.

        Raises:
            ValueError: if the kind is unknown and `task_objects` has no object for it.
        """
        if name not in self.task_objects:
            entry = self.config.tasks[self._task_index(name)]
            try:
                self.task_objects[name] = make_task(name, entry["channels"], entry["kind"])
            except ValueError as error:
                raise ValueError(f"{error}: set model.task_objects[{name!r}] to a Task of your own.") from error
        return self.task_objects[name]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, tasks=None, decoder_mode=None, image_size=None, **kwargs
    ):
        """Load a saved mSAM, or start one from a stock SAM or SAM-HQ checkpoint.

        From SAM, every head starts as SAM's mask decoder and no-mask embedding; the prompt encoder, the IoU head and
        the hyper-networks of masks that no head predicts are dropped, as is SAM-HQ's second branch (`sam_hq.py`).
        Weights are read from safetensors.

        Args:
            pretrained_model_name_or_path: folder or Hub id of a "sam", "sam_hq" or "msam" checkpoint.
            *args: passed on to transformers.
            tasks: needed for a SAM checkpoint: {name: channels}, {name: Task}, or a list of Task objects or of dicts
                with "name", "kind" and "channels". For a saved mSAM: its own tasks, or None.
            decoder_mode: "channel" (default) or "token", see `MSamTaskHead`; for a saved mSAM its own, or None.
            image_size: the encoder's input size in pixels, where it shall differ from the checkpoint's; position
                tables are interpolated.
            **kwargs: passed on to transformers: `dtype`, `device_map`, `revision`, `attn_implementation` and so on.

        Raises:
            ValueError: for another architecture, missing or contradicting `tasks`, an `image_size` that does not fit.
            OSError: if the checkpoint is missing, truncated or not safetensors.

        A `quantization_config` may quantise the encoder, never the heads, which are trained in full: it must leave out
        `mask_decoder` of a SAM checkpoint and `task_heads` of a saved mSAM.
        """
        name = pretrained_model_name_or_path
        kwargs.setdefault("use_safetensors", True)
        model_type = checkpoint_type(name, kwargs)
        if model_type != "msam" and not tasks:
            raise ValueError(f"{name} is a stock SAM: say what to predict by tasks=, for example {{'depth': 1}}.")
        entries = None if tasks is None else task_entries(tasks)
        try:
            loaders = {"sam": SamModel.from_pretrained, "sam_hq": load_sam_hq, "msam": super().from_pretrained}
            loaded = loaders[model_type](name, *args, **kwargs)
        except SafetensorError as error:
            for file in Path(name).glob("*.safetensors"):  # none if the checkpoint came from the Hub
                check_safetensors(file)
            raise OSError(f"{name}: truncated or corrupt safetensors file: {error}") from error
        model, *info = loaded if isinstance(loaded, tuple) else (loaded,)  # output_loading_info=True gives a tuple
        if model_type != "msam":
            model = cls._from_sam(model, entries, decoder_mode or "channel")
        _check_not_quantised(model.task_heads, "task_heads")
        for argument, value, saved in (
            ("tasks", entries, model.config.tasks),
            ("decoder_mode", decoder_mode, model.config.decoder_mode),
        ):
            if value not in (None, saved):
                raise ValueError(f"{argument}: {name} was saved with {saved}, got {value}; leave {argument} out.")
        objects = tasks.values() if isinstance(tasks, Mapping) else tasks or ()
        model.task_objects |= {task.name: task for task in objects if isinstance(task, Task)}
        model.shared_image_embedding.requires_grad_(False)  # transformers makes every loaded weight trainable
        if image_size is not None:
            resize_positions(model.vision_encoder, image_size)
            prompt_config = model.config.prompt_encoder_config
            model.config.vision_config.image_size = prompt_config.image_size = image_size
            prompt_config.image_embedding_size = image_size // prompt_config.patch_size
        return (model, *info) if info else model

    @classmethod
    def _from_sam(cls, sam: SamModel, tasks: list[dict[str, Any]], decoder_mode: str) -> "MSamModel":
        _check_not_quantised(sam.mask_decoder, "mask_decoder")
        config = MSamConfig(
            tasks=tasks,
            decoder_mode=decoder_mode,
            vision_config=sam.config.vision_config,
            prompt_encoder_config=sam.config.prompt_encoder_config,
            mask_decoder_config=sam.config.mask_decoder_config,
            initializer_range=sam.config.initializer_range,
            dtype=sam.config.dtype,
        )
        config._attn_implementation = sam.config._attn_implementation
        config._name_or_path = sam.config._name_or_path
        with torch.device("meta"):
            model = cls(config)
        for owner, noted in ((model, vars(sam)), (config, vars(sam.config))):
            vars(owner).update({name: noted[name] for name in _QUANTISER if name in noted})
        model.shared_image_embedding = sam.shared_image_embedding
        model.vision_encoder = sam.vision_encoder
        for head in model.task_heads.values():
            head.start_from_sam(sam.mask_decoder, sam.prompt_encoder.no_mask_embed)
        return model.eval()

    def add_task_head(self, name: str, kind: str | Task | None, channels: int | None, start: MSamTaskHead) -> None:
        """Predict one more task, the last in order, by a new head whose weights start from those of another head.

        Args:
            name: of the task.
            kind: one of `KINDS`, a `Task` of your own of that name, or None if the kind is the name.
            channels: of the logits; None with a `Task`, which knows it.
            start: where the weights come from, see `MSamTaskHead.start_from`; it need not be a head of this model.

        Raises:
            ValueError: for a name, kind or channel number that is not allowed, or while a task's update is merged.
        """
        self._check_nothing_merged()
        given = kind if isinstance(kind, Task) else {"name": name, "kind": kind, "channels": channels}
        entries = task_entries([*self.config.tasks, given])
        if isinstance(kind, Task):
            if (kind.name, kind.out_channels) != (name, channels or kind.out_channels):
                raise ValueError(
                    f"kind: got the Task {kind.name!r} of {kind.out_channels} channels for {name!r} with "
                    f"channels={channels}; name and channels must be the Task's own."
                )
            self.task_objects[name] = kind
        else:
            make_task(**entries[-1])  # refuses a kind that is not known, and channels that do not fit it
        self.task_heads[name] = self._new_head(entries[-1], start)
        self.config.tasks = entries

    def _new_head(self, entry: dict[str, Any], start: MSamTaskHead) -> MSamTaskHead:
        with torch.device("meta"):
            head = MSamTaskHead(self.config.mask_decoder_config, entry["channels"], self.config.decoder_mode)
        head.start_from(start)
        return head.train(start.training)

    def set_task_heads(self, tasks) -> list[str]:
        """Predict these tasks, in this order: heads of the same tasks are kept, new ones start from the first head.

        Args:
            tasks: as in `from_pretrained`.

        Returns:
            The names of the new heads.

        Raises:
            ValueError: for tasks that are not allowed, or while a task's update is merged.
        """
        self._check_nothing_merged()
        entries, start = task_entries(tasks), next(iter(self.task_heads.values()))
        new = [entry for entry in entries if entry not in self.config.tasks]
        heads = {
            entry["name"]: self._new_head(entry, start) if entry in new else self.task_heads[entry["name"]]
            for entry in entries
        }
        self.task_heads.clear()
        self.task_heads.update(heads)
        kept = {entry["name"] for entry in entries if entry not in new}
        self.task_objects = {name: task for name, task in self.task_objects.items() if name in kept}
        self.config.tasks = entries
        return [entry["name"] for entry in new]

    def remove_task_head(self, name: str) -> None:
        """Predict a task no more; later tasks move up. ValueError if it is unknown or the only one, or when merged."""
        self._check_nothing_merged()
        index = self._task_index(name)
        if len(self.task_names) == 1:
            raise ValueError(f"{name!r} is the only task; a model needs at least one.")
        del self.task_heads[name]
        self.task_objects.pop(name, None)
        self.config.tasks = [entry for i, entry in enumerate(self.config.tasks) if i != index]

    def rename_task_head(self, old: str, new: str) -> None:
        """Rename a task; its kind and position stay. ValueError for names that are not allowed, or when merged."""
        self._check_nothing_merged()
        index = self._task_index(old)
        entries = [{**entry, "name": new} if i == index else entry for i, entry in enumerate(self.config.tasks)]
        self.config.tasks = task_entries(entries)
        heads = {new if name == old else name: head for name, head in self.task_heads.items()}
        self.task_heads.clear()
        self.task_heads.update(heads)
        if old in self.task_objects:
            self.task_objects[new] = replace(self.task_objects.pop(old), name=new)

    def _check_nothing_merged(self) -> None:
        if self.merged_task is not None:
            raise ValueError(
                f"Tasks cannot change while the update of {self.merged_task!r} is merged into the weights."
            )

    def _task_index(self, task: str | int) -> int:
        names = self.task_names
        if isinstance(task, str) and task in names:
            return names.index(task)
        if isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(names):
            return task
        raise ValueError(f"Unknown task {task!r}; known are {names} or their positions from 0.")

    def _route(self, batch: int, tasks, task_ids) -> tuple[list[int], list[int] | None]:
        """The wanted tasks, and the task of each sample where every sample has one (both as positions)."""
        if task_ids is None:
            wanted = self.task_names if tasks is None else [tasks] if isinstance(tasks, str | int) else tasks
            ids, wanted = None, [self._task_index(task) for task in wanted]
        elif tasks is not None:
            raise ValueError(f"Give tasks or task_ids, not both: got tasks={tasks!r} and task_ids={task_ids!r}.")
        else:
            task_ids = task_ids.tolist() if isinstance(task_ids, torch.Tensor) else task_ids
            ids = [self._task_index(task) for task in task_ids]
            wanted = sorted(set(ids))
            if len(ids) != batch:
                raise ValueError(f"task_ids: {len(ids)} ids for a batch of {batch}; one per sample is needed.")
        names = [self.task_names[index] for index in wanted]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tasks: each wanted task once, got {names}; known are {self.task_names}.")
        if self.merged_task is not None and names != [self.merged_task]:
            raise ValueError(
                f"Only task {self.merged_task!r} can be predicted: its update is merged into the weights; got {names}."
            )
        return wanted, ids

    def _embed_images(
        self, pixel_values: torch.Tensor, wanted: list[int], ids: list[int] | None
    ) -> dict[int, torch.Tensor]:
        """Image embeddings (rows, D, h, w) per wanted task, by one encoder call: the task axis folds only here.

        With an id per sample a task gets its samples' rows. Otherwise every task gets all B: of one shared pass, or,
        where the encoder depends on the task, of one pass over T·B task-major rows.
        """
        if ids is None and not self.task_conditional:
            return dict.fromkeys(wanted, self.vision_encoder(pixel_values)[0])
        row_ids = ids
        if ids is None:
            row_ids = [index for index in wanted for _ in pixel_values]
            pixel_values = pixel_values[None].expand(len(wanted), *pixel_values.shape).flatten(0, 1)
        condition = {}
        if self.task_conditional:
            condition["task_ids"] = torch.tensor(row_ids)  # on the CPU, where checking the ids waits for no device
        embeddings = self.vision_encoder(pixel_values, **condition)[0]
        if ids is None:
            return dict(zip(wanted, embeddings.chunk(len(wanted)), strict=True))
        return {index: embeddings[_rows(ids, index)] for index in wanted}

    def _image_positional_embeddings(self, height: int, width: int) -> torch.Tensor:
        """Position of every cell of the grid, (1, D, h, w): SAM's random Fourier features of the cells' centres."""
        table = self.shared_image_embedding.positional_embedding
        y = (torch.arange(height, device=table.device) + 0.5) / height
        x = (torch.arange(width, device=table.device) + 0.5) / width
        centres_hw2 = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        return self.shared_image_embedding(centres_hw2).permute(2, 0, 1)[None]

    def forward(
        self,
        pixel_values: torch.Tensor,
        tasks: str | int | Sequence[str | int] | None = None,
        task_ids: torch.Tensor | Sequence[str | int] | None = None,
        labels: dict[str, torch.Tensor] | None = None,
        pixel_counts: dict[str, torch.Tensor] | None = None,
        original_sizes: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MSamOutput | tuple:
        """Predict all tasks, some of them, or one per sample.

        Args:
            pixel_values: (B, 3, S, S), images whose long side is scaled to S, padded below and on the right.
            tasks: names or positions of the tasks to predict for every image; None is all.
            task_ids: (B,) positions in `task_names`, or names: the one task of each sample. `logits[task]` then has
                the rows of that task in batch order, and a task without a row is absent.
            labels: per task (B, H, W) or (B, C, H, W) for the whole batch; tasks without labels have no loss.
            pixel_counts: per task the labelled pixels (K,) of a larger batch of which this is a part, as `Task.count`
                gives them: what the losses of the parts are then adds up to those of the whole. None: this is it.
            original_sizes: (B, 2) size of each image inside its label, which is padded below and on the right by
                ignored values; None where every image fills the label.
            reshaped_input_sizes: unused, as they follow from `original_sizes`; taken so that all that SAM's image
                processor returns can be passed on.
            return_dict: False for a tuple; None follows the config.

        Raises:
            ValueError: for images of another size, an unknown task, tasks and task_ids together, a task other than
                the merged one, labels without a wanted task or of an unknown kind.
        """
        size = self.config.vision_config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[-2:] != (size, size):
            raise ValueError(
                f"pixel_values: got shape {tuple(pixel_values.shape)}, this model takes (batch, 3, {size}, {size}); "
                "for another size load it by from_pretrained(..., image_size=...)."
            )
        wanted, ids = self._route(len(pixel_values), tasks, task_ids)
        embeddings = self._embed_images(pixel_values, wanted, ids)
        positions = self._image_positional_embeddings(*embeddings[wanted[0]].shape[-2:])
        names = self.task_names
        logits = {names[index]: self.task_heads[names[index]](embeddings[index], positions) for index in wanted}
        losses = loss = None
        if labels is not None:
            losses = self._losses(logits, labels, pixel_counts, original_sizes, ids, len(pixel_values))
            loss = sum(losses.values())
        output = MSamOutput(loss=loss, losses=losses, logits=logits)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _losses(self, logits, labels, counts, original_sizes, ids: list[int] | None, batch: int):
        for name in labels:
            self._task_index(name)
        labelled = [name for name in logits if name in labels]
        if not labelled:
            raise ValueError(f"labels: got {list(labels)}, none of the wanted tasks {list(logits)}.")
        losses = {}
        for name in labelled:
            label = labels[name]
            if len(label) != batch:
                raise ValueError(f"labels: {name!r} has {len(label)} labels for a batch of {batch} images.")
            canvas = tuple(label.shape[-2:])
            sizes = size_list(canvas if original_sizes is None else original_sizes, batch)
            if ids is not None:
                rows = _rows(ids, self._task_index(name))
                label, sizes = label[rows], [sizes[row] for row in rows]
            resized, task = self._resize_logits(name, logits[name], sizes, canvas), self.task(name)
            losses[name] = (
                task.loss(resized, label) if counts is None else task.loss_of_part(resized, label, counts[name])
            )
        return losses

    def post_process(self, logits: "dict[str, torch.Tensor] | MSamOutput", sizes) -> dict[str, torch.Tensor]:
        """Bring logits to the images' own sizes: resize to the padded input, crop the padding, resize; bilinear.

        Args:
            logits: per task (B, N, h, w), as `forward` returns them, or its whole output; of rows of one task,
                `sizes` are of those rows.
            sizes: (height, width) of all images, or one per image as (B, 2).

        Returns:
            Per task (B, N, H, W) in float32, H and W the largest height and width in `sizes`; smaller images lie in
            the upper left corner, zeros around them. Normals have unit length.
        """
        if isinstance(logits, MSamOutput):
            logits = logits.logits
        return {name: self._resize_logits(name, low, size_list(sizes, len(low))) for name, low in logits.items()}

    def _resize_logits(self, name: str, logits: torch.Tensor, sizes, canvas=None) -> torch.Tensor:
        resized = resize_logits(logits, sizes, self.config.vision_config.image_size, canvas)
        kind = self.config.tasks[self._task_index(name)]["kind"]
        return F.normalize(resized, dim=1) if kind == "normals" else resized


def _check_not_quantised(heads: nn.Module, name: str) -> None:
    if any(type(parameter) is not nn.Parameter for parameter in heads.parameters()):
        raise ValueError(
            f"The heads are trained in full, so they cannot be quantised: leave {name!r} out by the quantization "
            f"config's list of modules not to convert ({name!r} in `modules_to_not_convert` or, for bitsandbytes, "
            "`llm_int8_skip_modules`)."
        )


def _rows(items: Sequence, item) -> list[int]:
    return [row for row, other in enumerate(items) if other == item]


AutoConfig.register("msam", MSamConfig, exist_ok=True)
AutoModel.register(MSamConfig, MSamModel, exist_ok=True)
