"""Protocols: what they ask of the recipe fits the tasks, and other data does not get their name."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from peft_talora import FolderDataset, SyntheticScenes
from peft_talora.benchmark.protocols import CAMVID_2, PROTOCOLS, SYNTHETIC_3, SYNTHETIC_6
from peft_talora.data import FORMATS, SYNTHETIC_TASKS
from peft_talora.engine import parse_task

ALL = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


@ALL
def test_the_recipe_reads_the_tasks_that_are_meant(protocol):
    for task, text in zip(protocol.tasks, protocol.train_arguments()["tasks"], strict=True):
        parsed = parse_task(text, {})
        assert parsed == {"name": task.name, "kind": task.kind, "channels": task.out_channels}


@ALL
def test_every_task_has_a_figure_in_the_order_of_its_metric(protocol):
    for task in protocol.tasks:
        figures, metric = protocol.higher_is_better[task.name], task.metric().higher_is_better
        assert figures
        assert figures.items() <= metric.items()
        assert [name for name in metric if name in figures] == list(figures)


def test_generated_scenes_have_all_tasks_and_share_no_split():
    assert {task.name: task.out_channels for task in SYNTHETIC_6.tasks} == SYNTHETIC_TASKS
    assert SYNTHETIC_3.tasks == SYNTHETIC_6.tasks[:3]
    for protocol in (SYNTHETIC_3, SYNTHETIC_6):
        assert protocol.train_arguments()["val_split"] == "val"
        for split, folder in protocol.folders.items():
            protocol.check_split(split, SyntheticScenes(folder, protocol.images[split], 16))


def test_papers_protocols_have_the_papers_figures():
    figures = {name: protocol.higher_is_better for name, protocol in PROTOCOLS.items()}
    assert list(figures["pascal-mtlora"]["saliency"]) == ["miou"]
    assert list(figures["pascal-invpt"]["saliency"]) == ["max_f"]
    assert list(figures["pascal-invpt"]["edges"]) == ["ods_f"]
    assert figures["pascal-mtlora"]["normals"] == {"mean_angle": False}
    assert sum(map(len, figures["nyuv2-13"].values())) == 9


def test_a_test_split_named_val_chooses_nothing():
    for name in ("nyuv2-13", "cityscapes-7", "pascal-mtlora", "pascal-invpt"):
        arguments = PROTOCOLS[name].train_arguments()
        assert arguments["test_split"] == "val"
        assert "val_split" not in arguments


def test_data_is_given_where_it_is_needed_and_nowhere_else():
    with pytest.raises(ValueError, match=r"'camvid-2' needs `data_root`: .*train, val .*segmentation, edges"):
        CAMVID_2.check_data_root(None)
    with pytest.raises(ValueError, match="generated"):
        SYNTHETIC_3.check_data_root("scenes")
    CAMVID_2.check_data_root("camvid")
    SYNTHETIC_3.check_data_root(None)


def test_unknown_figures_are_refused():
    with pytest.raises(ValueError, match="'mean_iou' of task 'segmentation'"):
        replace(CAMVID_2, figures={"segmentation": ("mean_iou",)})


@pytest.fixture
def streets(tmp_path):
    """Five training images and one more of each other split, as CamVid is laid out, of 6 × 8 pixels."""
    for split, count in {"train": 5, "val": 1, "test": 1}.items():
        for kind in ("image", "segmentation"):
            (tmp_path / split / kind).mkdir(parents=True)
            for index in range(count):
                array = np.full((6, 8), 11 if index else 3, dtype=np.uint8)
                Image.fromarray(array).save(tmp_path / split / kind / f"{index}.png")
    return tmp_path


def test_other_data_does_not_get_the_protocol_s_name(streets):
    dataset = FolderDataset(streets, "train", CAMVID_2.tasks, True, {"segmentation": 11})
    small = replace(CAMVID_2, images={"train": None, "val": 0, "test": 1}, image_size=(6, 8))
    small.check_split("train", dataset)
    with pytest.raises(ValueError, match="5 images; 'camvid-2' has 367"):
        replace(small, images={"train": 367, "val": 0, "test": 1}).check_split("train", dataset)
    with pytest.raises(ValueError, match=r"images of \(6, 8\); 'camvid-2' has \(360, 480\)"):
        replace(small, image_size=(360, 480)).check_split("train", dataset)


def test_published_data_is_read_as_it_is_published():
    for name in ("nyuv2-13", "cityscapes-7", "pascal-mtlora", "pascal-invpt"):
        protocol = PROTOCOLS[name]
        published = FORMATS[protocol.data_format]
        assert {task.name for task in protocol.tasks} <= published.columns.keys()
        assert published.images == {"train": protocol.images["train"], "val": protocol.images["test"]}
        assert protocol.train_arguments()["data_format"] == [published.name]
