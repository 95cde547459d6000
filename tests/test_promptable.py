"""How well promptable models segment: masks of rooms and regions, figures against ones worked out by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SamModel

from peft_talora import promptable
from peft_talora.data import SyntheticScenes
from peft_talora.data.object_scenes import LEAST, MOST
from peft_talora.data.synthetic import CLASSES
from peft_talora.promptable import RegionMasks, RoomMasks, measure, most_prominent
from peft_talora.prompts import central_points, mask_boxes, mask_iou

SIDE = 64


def rectangle(top, left, bottom, right, size=(SIDE, SIDE)):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def triangle(size=(SIDE, SIDE)):
    return torch.ones(size, dtype=torch.bool).tril() & rectangle(0, 0, 40, 40, size)


class Scenes(list):
    """Samples with given masks; the images are noise."""

    def __init__(self, *masks, classes=None):
        random = torch.Generator().manual_seed(0)
        for index, found in enumerate(masks):
            image = torch.rand(3, *found.shape[1:], generator=random)
            self.append({"image": image, "masks": found, "name": str(index)})
            if classes is not None:
                self[-1]["classes"] = classes[index]


NONE = torch.zeros(0, SIDE, SIDE, dtype=torch.bool)


def test_the_most_prominent_is_the_largest_near_the_middle():
    middle, corner, ground = rectangle(24, 24, 40, 40), rectangle(0, 0, 20, 20), rectangle(20, 0, 64, 64)
    assert most_prominent(torch.stack([corner, middle, ground])) == 1
    assert most_prominent(torch.stack([ground, corner])) == 1  # a ground comes last, however small the rest is
    assert most_prominent(torch.stack([rectangle(28, 28, 36, 36), middle])) == 1
    half, more = rectangle(0, 0, 32, 64), rectangle(0, 0, 40, 64)
    assert most_prominent(torch.stack([half, more])) == 1  # nothing but grounds: the heaviest of them
    assert most_prominent(torch.stack([half, rectangle(0, 0, 31, 64)])) == 1


def test_the_bell_weighs_by_hand():
    """Two pixels each on an image of 3 × 5: weights exp(−(x / 0.7)²) with x of −1, 0, 1 and −1, −½, 0, ½, 1."""
    beside, above, corner = rectangle(1, 3, 2, 5, (3, 5)), rectangle(0, 2, 1, 4, (3, 5)), rectangle(0, 0, 1, 2, (3, 5))
    far, near = np.exp(-1 / 0.49), np.exp(-0.25 / 0.49)
    assert near + far > far * (1 + near) > far * (near + far)
    assert most_prominent(torch.stack([corner, above, beside])) == 2
    assert most_prominent(torch.stack([corner, above])) == 1


@pytest.fixture(scope="module")
def rooms():
    return RoomMasks("test", 4, SIDE)


def test_rooms_are_those_of_the_synthetic_scenes(rooms):
    scenes = SyntheticScenes("test", 4, SIDE)
    for index in range(len(rooms)):
        room, scene = rooms[index], scenes[index]
        assert torch.equal(room["image"], scene["image"])
        assert room["name"] == scene["name"]


def test_masks_of_rooms_follow_their_labels(rooms):
    scenes = SyntheticScenes("test", 4, SIDE)
    parts_seen = 0
    for index in range(len(rooms)):
        masks, labels = rooms[index]["masks"], scenes[index]["labels"]
        share = masks.flatten(1).float().mean(1)
        assert ((share >= LEAST) & (share <= MOST)).all()
        rest = [mask.tolist() for mask in masks]
        for name in ("floor", "wall", "ceiling"):
            ground = labels["segmentation"] == CLASSES.index(name)
            if LEAST <= ground.float().mean() <= MOST:
                rest.remove(ground.tolist())
        for mask in map(torch.tensor, rest):
            assert len(labels["segmentation"][mask].unique()) == 1  # an object or its part has one class
            whole = [
                other for other in map(torch.tensor, rest) if (other | mask).equal(other) and not other.equal(mask)
            ]
            parts_seen += bool(whole) and len(labels["parts"][mask].unique()) == 1
    assert parts_seen > 0


def write_image(folder: Path, name: str, labels: np.ndarray):
    for part in ("image", "segmentation"):
        (folder / "val" / part).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (*labels.shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "val" / "image" / f"{name}.png")
    Image.fromarray(labels.astype(np.uint8)).save(folder / "val" / "segmentation" / f"{name}.png")


def test_regions_of_a_folder(tmp_path):
    labels = np.zeros((40, 60), dtype=np.uint8)
    labels[5:15, 10:20] = labels[20:35, 30:50] = 3
    labels[5:15, 40:50] = 11
    labels[0, :10] = labels[2, :9] = 4  # 10 pixels of 2400 are more than 1/256 of them, 9 are less
    labels[36:, :] = 255
    write_image(tmp_path, "a", labels)
    sample = RegionMasks(tmp_path, "val")[0]
    assert sample["image"].shape == (3, 40, 60)
    assert sample["name"] == "a"
    labels = torch.from_numpy(labels)
    expected = [(0, labels == 0), (3, rectangle(20, 30, 35, 50, (40, 60))), (3, rectangle(5, 10, 15, 20, (40, 60)))]
    expected += [(11, labels == 11), (4, rectangle(0, 0, 1, 10, (40, 60)))]
    assert sample["classes"] == [classes for classes, _ in expected]
    assert torch.equal(sample["masks"], torch.stack([mask for _, mask in expected]))
    without = RegionMasks(tmp_path, "val", ignored_class=11)[0]
    assert without["classes"] == [0, 3, 3, 4]


def test_what_is_nearly_the_whole_image_is_no_region(tmp_path):
    labels = np.zeros((40, 60), dtype=np.uint8)
    labels[:2] = 1
    write_image(tmp_path, "a", labels)
    assert RegionMasks(tmp_path, "val")[0]["classes"] == [1]


def test_filled_boxes_by_hand():
    """A box fills a rectangle wholly, a triangle (40 · 41 / 2 pixels) by its share of the square."""
    masks = torch.stack([rectangle(3, 5, 20, 30), triangle()])
    results = measure({}, Scenes(masks, NONE, rectangle(0, 0, 9, 9)[None]))
    assert results.keys() == {"box filled"}
    assert results["box filled"] == {"box": pytest.approx((1 + 820 / 1600 + 1) / 3), "masks": 3}


def test_figures_by_class_are_means_of_their_masks():
    masks = torch.stack([rectangle(3, 5, 20, 30), triangle()])
    results = measure({}, Scenes(masks, NONE, triangle()[None], classes=[[7, 2], [], [7]]))["box filled"]
    share = 820 / 1600
    assert results["by class"] == {"2": {"box": pytest.approx(share)}, "7": {"box": pytest.approx((1 + share) / 2)}}


def test_without_any_mask_there_is_nothing_to_measure(sam):
    with pytest.raises(ValueError, match="none of the 2 images has a mask"):
        measure({"a": sam}, Scenes(NONE, NONE))


class Oracle(SamModel):
    """A SAM that answers from the masks of the one image, at the resolution of its low-resolution masks.

    A box gets the mask with that box; a click gets noise, the mask under it, and an empty mask that it rates best; no
    prompt gets the mask 0. All places are read as SAM's prompt encoder reads them.
    """

    def know(self, masks):
        self.masks, self.asked = masks, []
        return self

    def forward(self, image_embeddings, input_points=None, input_boxes=None, multimask_output=True):
        assert image_embeddings.shape[0] == 1
        scale, (H, W) = self.config.vision_config.image_size / max(self.masks.shape[1:]), self.masks.shape[1:]
        if input_boxes is not None:
            true = (mask_boxes(self.masks) + 0.5) * scale
            away = (true - input_boxes[0][:, None] - 0.5).abs().amax(2)
            assert (away.amin(1) < 1e-3).all()  # pixels
            chosen = away.argmin(1).tolist()
            assert not multimask_output
        elif input_points is not None:
            places = ((input_points[0, :, 0] + 0.5) / scale).long()
            chosen = [int(self.masks[:, y, x].long().argmax()) for x, y in places.tolist()]
            assert multimask_output
        else:
            chosen = [0]
            assert not multimask_output
        self.asked.append(chosen)
        side = self.config.vision_config.image_size // 2
        canvas = torch.zeros(len(chosen), 1, side, side)
        small = torch.nn.functional.interpolate(
            self.masks[chosen, None].float(), (round(H * scale / 2), round(W * scale / 2)), mode="area"
        )
        canvas[:, :, : small.shape[2], : small.shape[3]] = small
        logits = canvas[None] - 0.5
        if multimask_output:
            logits = torch.cat([-logits, logits, -torch.ones_like(logits)], dim=2)
        rating = torch.tensor([0.1, 0.2, 0.9])[: logits.shape[2]].expand(1, len(chosen), -1)
        return type("Output", (), {"pred_masks": logits, "iou_scores": rating})


@pytest.mark.parametrize("size", [(64, 64), (48, 64), (256, 128)])
def test_an_oracle_is_right_and_its_bad_rating_is_not(sam, size):
    """Also of images that are padded and scaled: places and masks go to the model's input and back."""
    H, W = size
    masks = torch.stack(
        [rectangle(H // 4, W // 4, H // 2, W // 2, size), rectangle(H // 2, W // 8, 3 * H // 4, W, size)]
    )
    oracle = Oracle(sam.config).know(masks)
    figures = measure({"oracle": oracle}, Scenes(masks))["oracle"]
    assert oracle.asked == [[0, 1], [0, 1], [0]]
    assert figures["box"] > 0.97
    assert figures["best of 3"] > 0.97
    assert figures["click"] == 0
    assert figures["no prompt"] == pytest.approx(
        mask_iou(masks[:1], masks[most_prominent(masks)][None]).item(), abs=0.03
    )
    assert figures["masks"] == 2


def test_figures_are_those_of_sam_itself(sam):
    """Without scaling: box, click and no prompt asked of the model one by one."""
    masks = torch.stack([rectangle(8, 8, 40, 50), rectangle(30, 2, 60, 20), triangle()])
    scenes = Scenes(masks)
    figures = measure({"sam": sam}, scenes)["sam"]
    processor = promptable.make_image_processor(SIDE)
    pixels = (scenes[0]["image"] * 255).round().to(torch.uint8).numpy()
    pixel_values = processor([pixels], input_data_format="channels_first", return_tensors="pt")["pixel_values"]
    iou = {name: [] for name in ("box", "click", "best of 3")}

    @torch.no_grad()
    def ask(**prompts):
        output = sam(pixel_values=pixel_values, **prompts)
        logits = torch.nn.functional.interpolate(output.pred_masks[:, 0], (SIDE, SIDE), mode="bilinear")[0]
        return logits > 0, output.iou_scores[0, 0]

    for mask, box, point in zip(masks, mask_boxes(masks), central_points(masks), strict=True):
        found, _ = ask(input_boxes=box[None, None], multimask_output=False)
        iou["box"].append(mask_iou(found, mask[None]).item())
        found, rating = ask(input_points=point[None, None, None], multimask_output=True)
        every = mask_iou(found, mask[None])
        iou["click"].append(every[rating.argmax()].item())
        iou["best of 3"].append(every.max().item())
    found, _ = ask(multimask_output=False)
    for name, values in iou.items():
        assert figures[name] == pytest.approx(np.mean(values), abs=2e-3), name
    prominent = mask_iou(found, masks[most_prominent(masks)][None]).item()
    assert figures["no prompt"] == pytest.approx(prominent, abs=2e-3)
    assert figures["best of 3"] >= figures["click"]


def test_models_are_asked_alike(sam):
    """Two names of one model have equal figures; a mean over masks, not over images."""
    one, two = rectangle(8, 8, 40, 50)[None], torch.stack([triangle(), rectangle(30, 2, 60, 20)])
    both = measure({"a": sam, "b": sam}, Scenes(one, two))
    assert both["a"] == both["b"]
    scenes = Scenes(one, two)
    apart = []
    for sample in scenes:
        single = Scenes(sample["masks"])
        single[0]["image"] = sample["image"]
        apart.append(measure({"a": sam}, single)["a"])
    for name in ("box", "click", "best of 3"):
        assert both["a"][name] == pytest.approx((apart[0][name] + 2 * apart[1][name]) / 3, abs=1e-6)
    assert both["a"]["no prompt"] == pytest.approx((apart[0]["no prompt"] + apart[1]["no prompt"]) / 2, abs=1e-6)
