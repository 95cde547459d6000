"""An adapter's folder: writing it, the model card, pushing it to the Hub, loading it again.

A folder holds what PEFT writes (`adapter_config.json`, `adapter_model.safetensors`), `msam_config.json` (what rebuilds
the heads, which an adapter alone cannot), and, where known, the image processor's `preprocessor_config.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, ModulesToSaveWrapper
from safetensors import safe_open
from transformers import SamImageProcessorPil

from .files import check_safetensors, write_aside, write_json
from .msam import MSamModel
from .msam_config import checkpoint_type
from .tuner import TALoRAModel
from .tuner.convert import single_adapter

MSAM_CONFIG_NAME = "msam_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PROCESSOR_NAME = "preprocessor_config.json"
HEAD_NAME = "head.safetensors"
# What says together how an adapter is read: who writes one of these into a folder writes or deletes all of them.
ADAPTER_FILES = [CONFIG_NAME, WEIGHTS_NAME, MSAM_CONFIG_NAME, HEAD_NAME, PROCESSOR_NAME]
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
UPLOADED = [
    "README.md",
    "adapter_config.json",
    "base/*",
    MSAM_CONFIG_NAME,
    "predictions.png",
    PROCESSOR_NAME,
    "results.json",
    WEIGHTS_NAME,
]


def save_adapter(
    model: PeftModel,
    folder: str | Path,
    image_processor: SamImageProcessorPil | None = None,
    card: str | None = None,
) -> None:
    """Write all that was trained of an adapted mSAM, and what rebuilds the model around it.

    Works for every PEFT method on an `MSamModel`, stock LoRA included, and for an adapter of any name. A base
    checkpoint inside `folder` is named by its relative path, so that the folder can move.

    Args:
        model: A `PeftModel` around an `MSamModel`. Of its adapters the active one is written.
        folder: Where to; created if need be. An adapter that is there, with its image processor, is replaced; other
            files stay.
        image_processor: What made `pixel_values`, saved beside.
        card: Text of the model card; None leaves PEFT's.

    Raises:
        TypeError: If the model is no such one.
        ValueError: If several adapters are active, or something is trained that the adapter would not hold.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.get_base_model(), MSamModel):
        raise TypeError(
            f"A PeftModel around an MSamModel is needed, got {type(model).__name__}: `save_pretrained` it."
        )
    folder = Path(folder)
    base, adapter = model.get_base_model(), single_adapter(model)
    _check_all_is_saved(model, adapter)
    with write_aside(folder, owned=ADAPTER_FILES) as aside:
        model.save_pretrained(aside, selected_adapters=[adapter], save_embedding_layers=False)
        if adapter != "default":  # PEFT gives every other name a folder of its own
            for file in (aside / adapter).iterdir():
                file.rename(aside / file.name)
        rebuild = rebuild_config(base, folder, _heads_of(model, adapter))
        base_path = rebuild["base_model_name_or_path"]
        adapter_config = json.loads((aside / CONFIG_NAME).read_text())
        write_json(aside / CONFIG_NAME, {**adapter_config, "base_model_name_or_path": base_path})
        write_json(aside / MSAM_CONFIG_NAME, rebuild)
        if image_processor is not None:
            image_processor.save_pretrained(aside)
        if card is not None:
            (aside / "README.md").write_text(card)


def _check_all_is_saved(model: PeftModel, adapter: str) -> None:
    saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    kept = {tensor.data_ptr() for tensor in saved.values()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in kept]
    if lost:
        raise ValueError(
            f"{len(lost)} parameters are trained that the adapter {adapter!r} does not hold, such as {lost[0]}: they "
            "would be lost. Name their modules in the configuration's `modules_to_save`, or freeze them."
        )


def rebuild_config(base: MSamModel, folder: Path, heads: Collection[str] | None = None) -> dict[str, Any]:
    """What `msam_config.json` in `folder` says: all that rebuilds the model around an adapter with these heads."""
    return {
        "base_model_name_or_path": locate(base.config._name_or_path, folder),
        "decoder_mode": base.config.decoder_mode,
        "dtype": str(base.dtype).removeprefix("torch."),
        "image_size": base.config.vision_config.image_size,
        "tasks": [entry for entry in base.config.tasks if heads is None or entry["name"] in heads],
    }


def _heads_of(model: PeftModel, adapter: str) -> set[str]:
    """The heads that an adapter serves or has weights of; others may be there for other adapters alone."""
    heads, tuner = model.get_base_model().task_heads, model.base_model
    served = tuner.task_state.served(adapter) if isinstance(tuner, TALoRAModel) else heads
    wrapped = {name: head for name, head in heads.items() if isinstance(head, ModulesToSaveWrapper)}
    return {*served, *(name for name, head in wrapped.items() if adapter in head.modules_to_save)}


def load(
    adapter: str | Path, base: str | Path | None = None, is_trainable: bool = False, revision: str | None = None
) -> PeftModel:
    """Load an adapter's folder into a ready model: base checkpoint, mSAM with its heads, adapter.

    Args:
        adapter: Folder, or Hub id, as written by [`save_adapter`].
        base: The SAM checkpoint, if it is elsewhere than the adapter's `msam_config.json` says.
        is_trainable: Load for further training.
        revision: Of the Hub repository.

    Returns:
        The `PeftModel`, in evaluation mode unless `is_trainable`.

    Raises:
        OSError: If a file is missing or damaged; the message names it.
        ValueError: If base and adapter do not belong together, or a head was added or renamed that neither has
            weights of.

    Where the base is a saved mSAM whose tasks are not the adapter's (which has grown, say), its heads are brought into
    line. The original of a head that it lacks, which is seen while the adapter is disabled, is a copy of its first.
    """
    folder = fetch(adapter, revision)
    config = _read_json(folder / MSAM_CONFIG_NAME)
    check_safetensors(folder / WEIGHTS_NAME)
    if base is None:
        base = config["base_model_name_or_path"]
        if not base:
            raise ValueError(f"{folder} names no base checkpoint, as its model had none: give `base`.")
        base = folder / base if (folder / base).is_dir() else base
    model, new_heads = _load_base(base, config, folder)
    try:
        model = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    except RuntimeError as error:  # how PyTorch reports weights of another shape
        raise ValueError(f"The adapter {adapter} does not fit the base {base}: {error}") from error
    except KeyError as error:  # how PEFT reports missing weights of `modules_to_save`
        raise ValueError(f"{folder / WEIGHTS_NAME} lacks the weights {error}.") from error
    _check_keys(model, folder / WEIGHTS_NAME)
    for name in new_heads:
        if not isinstance(model.get_base_model().task_heads[name], ModulesToSaveWrapper):
            raise ValueError(
                f"The base {base} has no head for {name!r}, and the adapter {adapter} holds no weights of one: where "
                "heads are added or renamed, the adapter must train them (`modules_to_save`)."
            )
    return model.train(is_trainable)


def _load_base(base: str | Path, config: Mapping[str, Any], folder: Path) -> tuple[MSamModel, list[str]]:
    """The mSAM of an adapter, and the names of the heads for which its base, a saved mSAM, has no weights."""
    try:
        saved = checkpoint_type(base, {}) == "msam"
    except OSError as error:
        raise OSError(
            f"{folder}: its base checkpoint {base} is not there; say by `base=` where it is: {error}"
        ) from error
    model = MSamModel.from_pretrained(
        base,
        tasks=None if saved else config["tasks"],
        decoder_mode=config["decoder_mode"],
        image_size=config["image_size"],
        dtype=_dtype(config["dtype"], folder),
    )
    changed = model.config.tasks != config["tasks"]
    return model, model.set_task_heads(config["tasks"]) if changed else []


def _dtype(name: str, folder: Path) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"{folder / MSAM_CONFIG_NAME}: `dtype` must be one of {list(_DTYPES)}; got {name!r}.")
    return _DTYPES[name]


def _check_keys(model: PeftModel, file: Path) -> None:
    """PEFT only warns of weights that are missing, and says nothing of those that are left over."""
    with safe_open(file, framework="pt") as weights:
        found = set(weights.keys())
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if found != wanted:
        raise ValueError(
            f"{file} does not belong to its configuration: missing are {len(wanted - found)} weights, such as "
            f"{sorted(wanted - found)[:2]}; left over are {len(found - wanted)}, such as {sorted(found - wanted)[:2]}."
        )


def fetch(adapter: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter: itself, or the downloaded copy of a Hub repository.

    Raises:
        OSError: If it is neither, or the Hub refuses it; the message says what to do.
        ValueError: If the repository names a base checkpoint outside of itself by a relative path.
    """
    if Path(adapter).is_dir():
        return Path(adapter)
    try:
        with _explained(str(adapter)):
            copy = Path(snapshot_download(str(adapter), revision=revision))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise OSError(f"{adapter} is no folder, and no repository of the Hub within reach: {error}") from error
    for file in (copy / name for name in (CONFIG_NAME, MSAM_CONFIG_NAME)):
        base = json.loads(file.read_text()).get("base_model_name_or_path") if file.is_file() else None
        if base and os.path.normpath(base).startswith(".."):
            raise ValueError(f"{adapter}: the base checkpoint {base!r} in {file.name} leads out of the repository.")
    return copy


def load_image_processor(adapter: str | Path, revision: str | None = None) -> SamImageProcessorPil:
    """The image processor that was saved beside an adapter.

    Raises:
        OSError: If none was saved.
    """
    folder = fetch(adapter, revision)
    if not (folder / PROCESSOR_NAME).is_file():
        raise OSError(
            f"{folder / PROCESSOR_NAME} is missing: the adapter was saved without its image processor. Give it as "
            "`save_adapter(model, folder, image_processor)`, or make one by `make_image_processor(image_size)`."
        )
    return SamImageProcessorPil.from_pretrained(folder)


def push_to_hub(folder: str | Path, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Upload what [`save_adapter`] and the training recipe wrote into a folder. Checkpoints and other files stay here.

    Args:
        folder: As written by [`save_adapter`].
        repo_id: `user/name`; created if it does not exist.
        private: Whether a new repository is private; None takes the account's default.
        token: Access token; None takes the one that is logged in.

    Returns:
        The commit's URL.

    Raises:
        ValueError: If the base checkpoint is a local folder elsewhere: nobody could load the adapter.
        OSError: If the Hub refuses, or the connection is lost. All files arrive as one commit or none does, so the
            call can be repeated.
    """
    base = _read_json(Path(folder) / MSAM_CONFIG_NAME)["base_model_name_or_path"]
    if Path(base).is_absolute():
        raise ValueError(f"The base checkpoint of {folder} is the local folder {base}: put it on the Hub first.")
    api = HfApi(token=token)
    with _explained(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=UPLOADED,
            commit_message="Upload an adapter for mSAM",
        )
    return commit.commit_url


_ADVICE = {
    401: "the access token is missing or wrong, or there is no such repository; log in by `hf auth login`",
    403: "the access token does not allow this: it needs the right to read, or to write, this repository",
    404: "there is no such repository or revision; a private one needs a token that may read it",
}


@contextmanager
def _explained(repo_id: str):
    """Turn what goes wrong between here and the Hub into an OSError that names the repository and what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = _ADVICE.get(status, "try again later" if status >= 500 else "the request was refused")
        raise OSError(f"{repo_id}: the Hub answered {status}: {advice}. It said: {error}") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise OSError(
            f"{repo_id}: the Hub cannot be reached, or the connection was lost; try again: {error}"
        ) from error


def model_card(model: PeftModel, results: Mapping[str, Any], repo_id: str | None = None) -> str:
    """The model card of a trained adapter: what it predicts, how well, how to load it.

    Args:
        model: The trained `PeftModel` around an `MSamModel`.
        results: What the training recipe wrote to `results.json`; its tasks are the adapter's. The card says which
            others of the model were trained together with them.
        repo_id: Where it will be found; None writes a placeholder.
    """
    base, method = model.get_base_model(), results["method"]
    name = base.config._name_or_path
    metadata = ["library_name: peft", "pipeline_tag: image-segmentation"]
    metadata += ["tags:", "- segment-anything", "- multi-task", f"- {method}"]
    if _is_hub_id(name):
        metadata.append(f"base_model: {name}")
    tasks = "\n".join(
        f"- `{t['name']}` ({t['kind']}, {t['channels']} channels)"
        for t in base.config.tasks
        if t["name"] in results["after"]
    )
    rows = "\n".join(
        f"| {task} | {metric} | {before} | {after} |" for task, metric, before, after in results_table(results)
    )
    trained = results["parameters"]["encoder"]
    encoder = f", {trained:,} in the encoder" if trained else ""
    others = ", ".join(f"`{t['name']}`" for t in base.config.tasks if t["name"] not in results["after"])
    together = f" Trained together with {others}: parameters and images/s are those of all tasks." if others else ""
    return f"""---
{chr(10).join(metadata)}
---

# Several dense predictions from one Segment Anything encoder

An adapter ({method}) for mSAM, trained with `peft_talora`. Tasks:

{tasks}

![Images, labels and predictions](predictions.png)

## Use

```python
import peft_talora  # registers the PEFT type; without it PEFT says KeyError: 'TALORA'

model = peft_talora.load("{repo_id or "user/name"}")
processor = peft_talora.load_image_processor("{repo_id or "user/name"}")
inputs = processor(images=image, return_tensors="pt")
outputs = model(pixel_values=inputs["pixel_values"])
predictions = model.post_process(outputs.logits, inputs["original_sizes"])  # one map per task
```

## Figures

On {results["images"]["test"]} test images, before and after training on {results["images"]["train"]}; the checkpoint
was chosen on {results["images"]["validation"]} other images. Trained parameters: {results["parameters"]["adapter"]:,}
in the adapter, {results["parameters"]["heads"]:,} in the heads{encoder}.{together}

| task | metric | before | after |
|------|--------|-------:|------:|
{rows}

Image size {base.config.vision_config.image_size} px, seed {results["seed"]}, {results["images_per_second"]:.1f}
images/s in training; versions: {", ".join(f"{k} {v}" for k, v in results["versions"].items())}.
"""


def results_table(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Task, metric and its value before and after training, as text: a dash where there is none."""
    return [
        (task, name, _text(results["before"].get(task, {}).get(name)), _text(value))
        for task, metrics in results["after"].items()
        for name, value in metrics.items()
    ]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def locate(base: str, folder: Path) -> str:
    """A base checkpoint as `folder` names it: by its path from there, its full path, or its Hub id."""
    if not base or not Path(base).is_dir():
        return base
    path, folder = Path(base).resolve(), folder.resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _is_hub_id(base: str) -> bool:
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return not Path(base).exists()


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise OSError(
            f"{file} is missing: it says how to rebuild the heads. Folders written by `save_adapter` and by the "
            "training recipe have it; a bare PEFT adapter is loaded by PeftModel.from_pretrained."
        )
    return json.loads(file.read_text())
