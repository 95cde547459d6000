import pytest
import torch
from transformers import AutoImageProcessor

from peft_talora.data import Collator, make_image_processor
from peft_talora.tasks import make_task

TASKS = [make_task(name, channels) for name, channels in {"segmentation": 5, "depth": 1, "normals": 3}.items()]
SIZES = (24, 40), (32, 16)


def make_sample(name, size, generator):
    labels = {
        "segmentation": torch.randint(5, size, generator=generator),
        "depth": 1 + torch.rand(size, generator=generator),
        "normals": torch.nn.functional.normalize(torch.randn(3, *size, generator=generator), dim=0),
    }
    return {"image": torch.rand(3, *size, generator=generator), "labels": labels, "name": name}


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    return [make_sample(f"s{index}", size, generator) for index, size in enumerate(SIZES)]


def test_batch_has_the_documented_shapes(samples):
    batch = Collator(TASKS, make_image_processor(64))(samples)
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["original_sizes"].dtype == torch.int64
    assert batch["original_sizes"].tolist() == [list(size) for size in SIZES]
    shapes = {name: tuple(label.shape) for name, label in batch["labels"].items()}
    assert shapes == {"segmentation": (2, 32, 40), "depth": (2, 32, 40), "normals": (2, 3, 32, 40)}


def test_images_fill_the_long_side_and_are_padded_with_zeros(samples):
    first, second = Collator(TASKS, make_image_processor(80))(samples)["pixel_values"]
    assert (first[:, 48:] == 0).all()
    assert (first[:, :48].abs().amax(0) > 0).all()
    assert (second[:, :, 40:] == 0).all()
    assert (second[:, :, :40].abs().amax(0) > 0).all()


def test_pixel_values_are_normalised_by_sams_mean_and_deviation():
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])  # of 8-bit values
    generator = torch.Generator().manual_seed(0)
    sample = make_sample("x", (32, 32), generator)
    sample["image"] = (
        torch.randint(256, (3, 32, 32), generator=generator) / 255
    )  # as from an 8-bit file, square: exact
    expected = (sample["image"] * 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(Collator(TASKS, make_image_processor(32))([sample])["pixel_values"][0], expected, atol=1e-5)
    as_they_are = Collator(TASKS, make_image_processor(32, normalize=False))([sample])["pixel_values"][0]
    assert torch.allclose(as_they_are, sample["image"], atol=1e-6)


def test_images_are_rounded_to_8_bits():
    sample = {"image": torch.full((3, 8, 8), 99.7 / 255), "labels": {"depth": torch.ones(8, 8)}, "name": "x"}
    pixel_values = Collator(TASKS, make_image_processor(8, normalize=False))([sample])["pixel_values"]
    assert torch.allclose(pixel_values, torch.tensor(100 / 255))


def test_labels_are_padded_with_the_ignored_value(samples):
    batch = Collator(TASKS, make_image_processor(32))(samples)
    for task in TASKS:
        for label, sample, (height, width) in zip(batch["labels"][task.name], samples, SIZES, strict=True):
            assert torch.equal(label[..., :height, :width], sample["labels"][task.name])
            assert (label[..., height:, :] == task.ignored_label).all()
            assert (label[..., width:] == task.ignored_label).all()


def test_absent_label_is_ignored_everywhere(samples):
    del samples[1]["labels"]["depth"], samples[0]["labels"]["normals"], samples[1]["labels"]["normals"]
    batch = Collator(TASKS, make_image_processor(32))(samples)
    assert set(batch["labels"]) == {task.name for task in TASKS}
    assert (batch["labels"]["depth"][1] == 0).all()
    assert (batch["labels"]["depth"][0, :24] > 0).all()
    assert (batch["labels"]["normals"] == 0).all()


def test_sample_without_labels_is_named(samples):
    samples[1]["labels"] = {}
    with pytest.raises(ValueError, match="'s1' has no labels"):
        Collator(TASKS, make_image_processor(32))(samples)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # transformers leaves the file it reads open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("normalize", [True, False])
def test_image_processor_survives_saving(tmp_path, samples, normalize):
    processor = make_image_processor(48, normalize)
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    batches = [Collator(TASKS, p)(samples)["pixel_values"] for p in (processor, again)]
    assert torch.equal(*batches)


def test_wrong_image_size_is_rejected():
    with pytest.raises(ValueError, match="image_size is 0"):
        make_image_processor(0)
