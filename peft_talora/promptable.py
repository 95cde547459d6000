"""Images with masks, and how well promptable models segment them.

A sample is ``{"image": float32 (3, H, W) in [0, 1], "masks": bool (K, H, W), "name": str}``, as ``ObjectScenes`` makes
them; where the masks have classes, ``"classes"`` has K numbers.

Axes: K masks of an image, M masks that a model offers for each prompt, H W pixels of the image.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BaseImageProcessor, SamModel

from .data import FolderDataset, SyntheticScenes, make_image_processor
from .data.object_scenes import LEAST, MOST
from .data.scene import CLASSES, compose
from .data.synthetic import render
from .losses import IGNORE_INDEX
from .prompts import central_points, mask_boxes, mask_iou, regions
from .resize import resize_logits
from .tasks import make_task


class RoomMasks(SyntheticScenes):
    """The rooms of `SyntheticScenes` with the masks of their objects, the parts of these, floor, walls and ceiling."""

    def __getitem__(self, index: int) -> dict:
        random = self._random(index)
        scene = compose(random, self.size)
        image, labels = render(scene, np.random.default_rng(random.getrandbits(64)))
        objects, parts, classes = labels["objects"], labels["parts"], labels["segmentation"]
        found = [objects == k for k in range(1, scene.objects + 1)]
        found += [mask & (parts == part) for mask in found for part in np.unique(parts[mask]) if part]
        found += [classes == CLASSES.index(name) for name in ("floor", "wall", "ceiling")]
        return {
            "image": torch.from_numpy(image.astype(np.float32) / 255),
            "masks": _of_fair_size(torch.from_numpy(np.stack(found))),
            "name": self._name(index),
        }


class RegionMasks(Dataset):
    """Images of a folder with the connected regions of its segmentation (see `FolderDataset`) as masks.

    Args:
        root: Folder of the data set.
        split: Folder in `root`, with `image` and `segmentation`.
        ignored_class: That is no region.
    """

    def __init__(self, root: str | Path, split: str, ignored_class: int = IGNORE_INDEX):
        ignored = {} if ignored_class == IGNORE_INDEX else {"segmentation": ignored_class}
        self.images = FolderDataset(root, split, [make_task("segmentation", 255)], ignored_classes=ignored)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        sample = self.images[index]
        labels = sample["labels"]["segmentation"]
        masks = regions(labels, ignored=IGNORE_INDEX, least=int(LEAST * labels.numel()))
        masks = _of_fair_size(masks)
        classes = [int(labels[mask][0]) for mask in masks]
        return {"image": sample["image"], "masks": masks, "classes": classes, "name": sample["name"]}


def _of_fair_size(masks_KHW: Tensor) -> Tensor:
    """Without specks and what is nearly the whole image."""
    share = masks_KHW.flatten(1).float().mean(1)
    return masks_KHW[(share >= LEAST) & (share <= MOST)]


def most_prominent(masks_KHW: Tensor) -> int:
    """Index of the mask that a call without a prompt means: the largest area, weighted by a bell around the middle.

    Masks of half of the image and more are the ground of it, and come last.
    """
    bells = [torch.exp(-((torch.linspace(-1, 1, side) / 0.7) ** 2)) for side in masks_KHW.shape[1:]]
    weight_KHW = masks_KHW * torch.outer(*bells)
    ground_K = masks_KHW.flatten(1).float().mean(1) >= 0.5
    return int((weight_KHW.sum((1, 2)) - ground_K * masks_KHW[0].numel()).argmax())


@torch.no_grad()
def measure(models: Mapping[str, SamModel], scenes: Dataset) -> dict[str, dict]:
    """Mean intersection over union of promptable models, over all masks of all images, on equal prompts.

    ============  ====================================================================================================
    box           the smallest box around the mask; the one mask that the model means
    click         its innermost point; of three masks the one that the model rates best
    best of 3     the same click; of three masks the one that fits best
    no prompt     the most prominent mask of each image
    by class      of boxes and clicks, where the masks have classes
    ============  ====================================================================================================

    Args:
        models: By name, in evaluation mode.
        scenes: Samples as the head of this module describes them; an image without masks is left out.

    Returns:
        name → figure → value in [0, 1]; beside the models stands ``"box filled"``, the box as the mask. ``masks`` is
        the number of masks.

    Raises:
        ValueError: If no image has a mask.
    """
    processors = {name: make_image_processor(model.config.vision_config.image_size) for name, model in models.items()}
    found = {name: [] for name in models}
    filled, classes = [], []
    for index in range(len(scenes)):
        sample = scenes[index]
        if not len(sample["masks"]):
            continue
        for name, model in models.items():
            found[name].append(_measure_image(model, processors[name], sample))
        filled.append(mask_iou(_fill(mask_boxes(sample["masks"]), sample["masks"].shape[1:]), sample["masks"]))
        classes += sample.get("classes", [])
    if not filled:
        raise ValueError(f"`scenes`: none of the {len(scenes)} images has a mask; needed is one at least.")
    results = {name: _pool(rows, classes) for name, rows in found.items()}
    return {**results, "box filled": _pool([{"box": iou} for iou in filled], classes)}


def _measure_image(model: SamModel, processor: BaseImageProcessor, sample: Mapping) -> dict[str, Tensor]:
    """IoU (K,) by figure; of no prompt (1,)."""
    masks, image_size = sample["masks"], model.config.vision_config.image_size
    size = tuple(masks.shape[1:])
    image = (sample["image"] * 255).round().to(torch.uint8).numpy()
    inputs = processor([image], input_data_format="channels_first", return_tensors="pt").to(model.device)
    embeddings = model.get_image_embeddings(inputs["pixel_values"])
    scale = image_size / max(size)

    def predict(**prompts) -> tuple[Tensor, Tensor]:
        prompts = {
            name: value[None].to(model.device) if torch.is_tensor(value) else value for name, value in prompts.items()
        }
        output = model(image_embeddings=embeddings, **prompts)
        K, M = output.pred_masks.shape[1:3]
        logits = resize_logits(output.pred_masks.flatten(1, 2).cpu(), [size], image_size)
        return logits.view(K, M, *size) > 0, output.iou_scores[0].cpu()

    # The prompt encoder adds half a pixel: places are those of pixels' middles, before and after scaling.
    boxes, points = ((place + 0.5) * scale - 0.5 for place in (mask_boxes(masks), central_points(masks)))
    by_box, _ = predict(input_boxes=boxes, multimask_output=False)
    by_click, rating = predict(input_points=points[:, None], multimask_output=True)
    unprompted, _ = predict(multimask_output=False)
    click = mask_iou(by_click, masks[:, None])
    prominent = masks[most_prominent(masks)][None]
    return {
        "box": mask_iou(by_box[:, 0], masks),
        "click": click.gather(1, rating.argmax(1, keepdim=True))[:, 0],
        "best of 3": click.amax(1),
        "no prompt": mask_iou(unprompted[:, 0], prominent),
    }


def _pool(rows: list[dict[str, Tensor]], classes: list[int]) -> dict:
    iou = {figure: torch.cat([row[figure] for row in rows]) for figure in rows[0]}
    results = {figure: values.mean().item() for figure, values in iou.items()} | {"masks": len(iou["box"])}
    if classes:
        which = torch.tensor(classes)
        results["by class"] = {
            str(k): {figure: iou[figure][which == k].mean().item() for figure in ("box", "click") if figure in iou}
            for k in sorted(set(classes))
        }
    return results


def _fill(boxes_K4: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (K, H, W) of boxes."""
    y, x = torch.arange(size[0])[None, :, None], torch.arange(size[1])[None, None, :]
    left, top, right, bottom = (side[:, None, None] for side in boxes_K4.unbind(1))
    return (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
