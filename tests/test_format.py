"""Published data sets are read as they are on disk: units, ignored labels and splits as ours."""

import numpy as np
import pytest
import torch
from format_cases import (
    H,
    W,
    scene,
    write_cityscapes_7,
    write_cityscapes_19,
    write_nyud,
    write_nyuv2,
    write_parquet,
    write_pascal,
)
from PIL import Image

from peft_talora.benchmark.protocols import CITYSCAPES_7, NYUV2_13, PASCAL_INVPT
from peft_talora.data import FORMATS, BadSample
from peft_talora.tasks import make_task


def check_labels(labels, made):
    """Of `scene`, whatever form they were stored in."""
    classes = np.where(made["segmentation"] < 0, 255, made["segmentation"])
    assert np.array_equal(labels["segmentation"], classes)
    assert (labels["segmentation"] == 255).any()
    depth = next(labels[name] for name in ("depth", "inverse_depth") if name in labels)
    assert np.array_equal(depth, made["depth"])
    if "normals" in labels:
        assert np.abs(labels["normals"].numpy() - made["normal"].transpose(2, 0, 1)).max() < 1e-6
        assert (labels["normals"][:, 0, 0] == 0).all()


@pytest.mark.parametrize(
    ("name", "write", "tasks"),
    [("nyuv2-13", write_nyuv2, NYUV2_13.tasks), ("cityscapes-7", write_cityscapes_7, CITYSCAPES_7.tasks)],
)
def test_numbered_files_of_mtan(tmp_path, name, write, tasks):
    write(tmp_path)
    dataset = FORMATS[name].open(tmp_path, "train", tasks)
    assert [sample["name"] for sample in dataset] == [str(number) for number in range(11)], "by number: 2 before 10"
    for number in (0, 10):
        sample = dataset[number]
        assert np.array_equal(sample["image"], scene(number)["image"].transpose(2, 0, 1))
        check_labels(sample["labels"], scene(number))
    assert set(dataset[0]["labels"]) == {task.name for task in tasks}


@pytest.mark.parametrize(
    ("name", "column", "tasks"),
    [
        ("nyuv2-13", "segmentation", NYUV2_13.tasks),
        ("cityscapes-7", "segmentation_7", CITYSCAPES_7.tasks),
    ],
)
def test_parquet_of_the_hub(tmp_path, name, column, tasks):
    write_parquet(tmp_path / "set", {"train": 3, "val": 2}, column)
    dataset = FORMATS[name].open(tmp_path / "set", "train", tasks)
    assert len(dataset) == 3
    assert len(FORMATS[name].open(tmp_path / "set", "val", tasks)) == 2
    for number, sample in enumerate(dataset):
        assert np.array_equal(sample["image"], scene(number)["image"].transpose(2, 0, 1))
        check_labels(sample["labels"], scene(number))
    assert len(FORMATS[name].open(tmp_path / "set", "train[:2]", tasks)) == 2


def test_cityscapes_own_tree(tmp_path):
    write_cityscapes_19(tmp_path)
    first, second = FORMATS["cityscapes-19"].open(tmp_path, "train", FORMATS["cityscapes-19"].tasks)
    assert [first["name"], second["name"]] == ["aachen_000001_000019", "bochum_000000_000313"]
    assert set(first["labels"]) == {"segmentation"}
    assert first["labels"]["segmentation"][0].tolist() == [0, 18, 255, 255, 13, 2, 1, 255]
    assert second["labels"]["disparity"][0, :4].tolist() == [0, 0, 1, 10]
    assert second["labels"]["depth"][0, :4].tolist() == pytest.approx([0, 0, 500, 50]), "0.25 m · 2000 px / disparity"


def test_pascal_context(tmp_path):
    write_pascal(tmp_path)
    tasks = FORMATS["pascal-context"].tasks
    assert {task.name for task in tasks} == {task.name for task in PASCAL_INVPT.tasks}
    both, alone = FORMATS["pascal-context"].open(tmp_path, "train", tasks)
    assert both["labels"]["segmentation"][0, :4].tolist() == [0, 15, 20, 255]
    assert alone["labels"]["segmentation"][0].tolist() == [9] * W, "the file of PASCAL-Context where VOC has none"
    assert both["labels"]["parts"][0].tolist() == [1, 6] + [0] * (W - 2)
    assert "parts" not in alone["labels"], "an image without people has no label of their parts"
    assert both["labels"]["saliency"][0, :4].tolist() == [0, 0, 1, 1]
    normals = both["labels"]["normals"]
    assert normals[0, 0].tolist() == pytest.approx([0, 0, 0, 0, 1, 1, 1, 1], abs=1e-4), "of televisions alone"
    assert both["labels"]["edges"][0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert len(FORMATS["pascal-context"].open(tmp_path, "val", tasks)) == 1


def test_normals_of_pascal_context_are_those_of_indoor_classes(tmp_path):
    write_pascal(tmp_path)
    (tmp_path / "json" / "context_classes.json").write_text('{"unknown": 0, "bottle": 2, "tvmonitor": 9}')
    normals = FORMATS["pascal-context"].open(tmp_path, "train", [make_task("normals", 3)])[0]["labels"]["normals"]
    assert normals[0, 0].tolist() == pytest.approx([0, 0, 1, 1, 0, 0, 0, 0], abs=1e-4), "427 is neither"


def test_nyud(tmp_path):
    write_nyud(tmp_path)
    (sample,) = FORMATS["nyud-40"].open(tmp_path, "train", FORMATS["nyud-40"].tasks)
    assert sample["name"] == "0003"
    assert sample["labels"]["segmentation"][0, :4].tolist() == [255, 0, 39, 1]
    assert np.array_equal(sample["labels"]["depth"], scene(3)["depth"])
    assert np.abs(sample["labels"]["normals"].numpy() - scene(3)["normal"].transpose(2, 0, 1)).max() < 1e-6
    assert sample["labels"]["edges"][0, :2].tolist() == [0, 1]
    assert sample["labels"]["edges"].shape == (H, W)


def test_nyud_as_astmt_has_it(tmp_path):
    """Of the same labels in other files."""
    savemat = pytest.importorskip("scipy.io").savemat
    write_nyud(tmp_path)
    before = FORMATS["nyud-40"].open(tmp_path, "train", FORMATS["nyud-40"].tasks)[0]["labels"]
    ids = np.array(Image.open(tmp_path / "segmentation" / "0003.png"), dtype=np.float64)
    savemat(tmp_path / "segmentation" / "0003.mat", {"segmentation": ids})
    savemat(tmp_path / "depth" / "0003.mat", {"depth": scene(3)["depth"]})
    eight_bits = np.round(127.5 * (1 + scene(3)["normal"])).astype(np.uint8)
    Image.fromarray(eight_bits).save(tmp_path / "normals" / "0003.jpg", quality=100, subsampling=0)
    Image.fromarray(np.array([[0, 255] * 4] * H, dtype=np.uint8)).save(tmp_path / "edge" / "0003.png")
    for file in ("segmentation/0003.png", "depth/0003.npy", "normals/0003.npy", "edge/0003.npy"):
        (tmp_path / file).unlink()
    after = FORMATS["nyud-40"].open(tmp_path, "train", FORMATS["nyud-40"].tasks)[0]["labels"]
    for name in ("segmentation", "depth", "edges"):
        assert torch.equal(after[name], before[name]), name
    known = before["normals"].square().sum(dim=0) > 0
    cosine = (after["normals"] * before["normals"]).sum(dim=0)[known]
    assert cosine.mean() > 0.99, "but for what jpg makes of noise"
    (tmp_path / "depth" / "0003.mat").write_bytes(b"")
    with pytest.raises(BadSample, match=r"depth/0003.mat"):
        FORMATS["nyud-40"].open(tmp_path, "train", [make_task("depth", 1)])[0]


def test_of_a_label_of_several_files_the_broken_one_is_named(tmp_path):
    write_cityscapes_19(tmp_path)
    camera = tmp_path / "camera" / "train" / "bochum" / "bochum_000000_000313_camera.json"
    for text in ("{", "{}"):
        camera.write_text(text)
        with pytest.raises(BadSample, match=str(camera)):
            FORMATS["cityscapes-19"].open(tmp_path, "train", [make_task("depth", 1)])[1]
    write_pascal(tmp_path)
    context = tmp_path / "pascal-context" / "trainval" / "2008_000008.mat"
    context.write_bytes(context.read_bytes()[:100])
    with pytest.raises(BadSample, match=str(context)):
        FORMATS["pascal-context"].open(tmp_path, "train", [make_task("normals", 3)])[0]


def test_what_is_missing_is_named_with_where_it_is_published(tmp_path):
    depth = [make_task("depth", 1)]
    for name, words in (
        ("cityscapes-19", "leftImg8bit/train is missing.*cityscapes-dataset.com"),
        ("pascal-context", "ImageSets/Context is missing.*PASCAL_MT.tgz"),
        ("nyud-40", "gt_sets is missing.*MTLoRA"),
    ):
        task = [make_task("segmentation", 21)] if name == "pascal-context" else depth
        with pytest.raises(ValueError, match=words):
            FORMATS[name].open(tmp_path, "train", task)
    with pytest.raises(ValueError, match=r"cannot be read as a data set with the split 'train'.*tanganke/nyuv2"):
        FORMATS["nyuv2-13"].open(tmp_path, "train", depth)
    write_nyuv2(tmp_path)
    with pytest.raises(ValueError, match="nyuv2-13 has no labels of edges; it has those of segmentation, depth"):
        FORMATS["nyuv2-13"].open(tmp_path, "train", [make_task("edges", 1)])
    write_nyud(tmp_path / "nyud")
    with pytest.raises(ValueError, match=r"gt_sets/test.txt.*published by"):
        FORMATS["nyud-40"].open(tmp_path / "nyud", "test", depth)


def test_a_file_that_is_missing_or_wrong_is_named(tmp_path):
    write_nyud(tmp_path)
    depth = tmp_path / "depth" / "0003.npy"
    np.save(depth, np.full((H, W), np.nan, dtype=np.float32))
    with pytest.raises(BadSample, match=f"{depth}.*finite metres"):
        FORMATS["nyud-40"].open(tmp_path, "train", [make_task("depth", 1)])[0]
    depth.unlink()
    with pytest.raises(BadSample, match=r"No such file.*0003.npy"):
        FORMATS["nyud-40"].open(tmp_path, "train", [make_task("depth", 1)])[0]
    write_pascal(tmp_path / "pascal")
    parts = tmp_path / "pascal" / "human_parts" / "2008_000008.mat"
    parts.write_bytes((tmp_path / "pascal" / "pascal-context" / "trainval" / "2008_000008.mat").read_bytes())
    with pytest.raises(BadSample, match=f"{parts} has no anno"):
        FORMATS["pascal-context"].open(tmp_path / "pascal", "train", [make_task("parts", 7)])[0]
