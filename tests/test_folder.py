import numpy as np
import pytest
import torch
from format_cases import save
from PIL import Image

from peft_talora.data import FolderDataset
from peft_talora.tasks import make_task

H, W = 6, 8
SEGMENTATION, DEPTH, NORMALS, EDGES = (
    make_task(name, channels) for name, channels in {"segmentation": 4, "depth": 1, "normals": 3, "edges": 1}.items()
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def train(tmp_path, rng):
    """The folder of a split with images b and a, both segmented."""
    for stem, suffix in (("b", ".png"), ("a", ".jpg")):
        save(tmp_path / "train" / "image" / f"{stem}{suffix}", rng.integers(0, 256, (H, W, 3), dtype=np.uint8))
        save(tmp_path / "train" / "segmentation" / f"{stem}.png", rng.integers(0, 4, (H, W), dtype=np.uint8))
    return tmp_path / "train"


def read(train, *tasks, **options):
    return FolderDataset(train.parent, "train", tasks, **options)


def test_images_come_in_the_order_of_stems(train):
    dataset = read(train, SEGMENTATION)
    assert [sample["name"] for sample in dataset] == ["a", "b"]
    with Image.open(train / "image" / "b.png") as file:
        expected = np.array(file).transpose(2, 0, 1) / np.float32(255)
    assert np.array_equal(dataset[1]["image"].numpy(), expected)


def test_missing_label_is_absent(train):
    save(train / "depth" / "a.png", np.full((H, W), 1500, dtype=np.uint16))
    a, b = read(train, SEGMENTATION, DEPTH)
    assert set(a["labels"]) == {"segmentation", "depth"}
    assert set(b["labels"]) == {"segmentation"}


def test_ignored_class_becomes_255(train):
    save(train / "segmentation" / "a.png", np.arange(H * W, dtype=np.uint8).reshape(H, W) % 5)
    label = read(train, SEGMENTATION, ignored_classes={"segmentation": 4})[0]["labels"]["segmentation"]
    assert label.dtype == torch.int64
    assert label.flatten()[:6].tolist() == [0, 1, 2, 3, 255, 0]


def test_palette_png_holds_class_ids(train):
    classes = np.tile(np.arange(W, dtype=np.uint8) % 4, (H, 1))
    file = Image.fromarray(classes).convert("P")
    file.putdata(classes.flatten())
    file.putpalette([7, 7, 7, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    file.save(train / "segmentation" / "a.png")
    assert np.array_equal(read(train, SEGMENTATION)[0]["labels"]["segmentation"], classes)


def test_depth_png_is_in_millimetres(train):
    save(train / "depth" / "a.png", np.array([[0, 1500, 40000] + [1] * (W - 3)] * H, dtype=np.uint16))
    label = read(train, DEPTH, SEGMENTATION)[0]["labels"]["depth"]
    assert label.dtype == torch.float32
    assert label[0, :3].tolist() == pytest.approx([0, 1.5, 40])
    label = read(train, DEPTH, SEGMENTATION, depth_scale=0.01)[0]["labels"]["depth"]
    assert label[0, :3].tolist() == pytest.approx([0, 15, 400])


def test_depth_npy_is_in_metres(train, rng):
    depth = rng.uniform(1, 9, (H, W))
    save(train / "depth" / "a.npy", depth)
    assert np.array_equal(read(train, DEPTH, SEGMENTATION)[0]["labels"]["depth"], depth.astype(np.float32))


@pytest.fixture
def normals(rng):
    """Unit vectors (3, H, W), the first unknown."""
    vectors = rng.standard_normal((3, H, W)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=0)
    vectors[:, 0, 0] = 0
    return vectors


def test_normals_npy_in_either_order(train, normals):
    save(train / "normals" / "a.npy", normals)
    save(train / "normals" / "b.npy", normals.transpose(1, 2, 0).astype(np.float64))
    for sample in read(train, NORMALS):
        assert np.array_equal(sample["labels"]["normals"], normals)


def test_normals_png_are_renormalised_and_grey_is_unknown(train, normals):
    save(train / "normals" / "a.png", np.round((normals.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8))
    label = read(train, NORMALS, SEGMENTATION)[0]["labels"]["normals"]
    assert (label[:, 0, 0] == 0).all()
    assert (label.norm(dim=0).flatten()[1:] - 1).abs().max() < 1e-5
    assert np.abs(label.numpy() - normals).max() < 0.02


def test_edges_are_derived_where_they_have_no_folder(train):
    classes = np.zeros((H, W), dtype=np.uint8)
    classes[:, 4:] = 1
    classes[:2] = 3
    save(train / "segmentation" / "a.png", classes)
    label = read(train, EDGES, derive_edges=True, ignored_classes={"segmentation": 3})[0]["labels"]["edges"]
    assert label.dtype == torch.int64
    assert label[4].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert label[2].tolist() == [255, 255, 255, 1, 1, 255, 255, 255]
    assert (label[:2] == 255).all()


def test_edges_of_a_folder_are_preferred(train):
    for stem in "ab":
        save(train / "edges" / f"{stem}.png", np.eye(H, W, dtype=np.uint8))
    label = read(train, EDGES, derive_edges=True)[0]["labels"]["edges"]
    assert np.array_equal(label, np.eye(H, W))


def test_edges_are_derived_from_the_first_segmentation_whatever_its_name(train):
    roads, blank = (make_task(name, 4, "segmentation") for name in ("roads", "blank"))
    outlines = make_task("outlines", 1, "edges")
    classes = np.zeros((H, W), dtype=np.uint8)
    classes[:, 4:] = 1
    classes[:2] = 9
    for stem in "ab":
        save(train / "roads" / f"{stem}.png", classes)
        save(train / "blank" / f"{stem}.png", np.zeros((H, W), dtype=np.uint8))
    options = {"derive_edges": True, "ignored_classes": {"roads": 9}}
    label = read(train, outlines, roads, blank, **options)[0]["labels"]["outlines"]
    assert label[4].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert (label[:2] == 255).all()
    assert not read(train, outlines, blank, roads, **options)[0]["labels"]["outlines"].any()
    # Without a task of that kind it is the folder of that name.
    save(train / "segmentation" / "a.png", np.tile(np.arange(W, dtype=np.uint8) // 2, (H, 1)))
    label = read(train, outlines, derive_edges=True)[0]["labels"]["outlines"]
    assert label[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("kind", ["edges", "saliency"])
@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_white_on_black_mask_is_refused_unless_255_is_said_to_mean_ignored(train, kind, suffix):
    task = make_task("mine", 1, kind)
    mask = np.zeros((H, W), dtype=np.uint8)
    mask[1:3] = 255
    save(train / "mine" / f"a{suffix}", mask)
    message = rf"a\{suffix}: label of task 'mine' holds 255 .*1 for the positive class, where 255 means ignored"
    for options in ({}, {"ignored_classes": {"mine": 2}}):
        with pytest.raises(ValueError, match=rf"{message}.*ignored_classes={{'mine': 255}}"):
            read(train, SEGMENTATION, task, **options)[0]
    label = read(train, SEGMENTATION, task, ignored_classes={"mine": 255})[0]["labels"]["mine"]
    assert np.array_equal(label, mask)


@pytest.mark.parametrize("values", [(0, 0), (0, 1), (1, 255)])
def test_binary_labels_with_a_positive_or_without_255_are_read_as_they_are(train, values):
    mask = np.zeros((H, W), dtype=np.uint8)
    mask[1:3], mask[3:5] = values
    save(train / "edges" / "a.png", mask)
    assert np.array_equal(read(train, SEGMENTATION, EDGES)[0]["labels"]["edges"], mask)


def test_segmentation_of_0_and_255_only_is_read_as_it_is(train):
    classes = np.zeros((H, W), dtype=np.uint8)
    classes[0] = 255
    save(train / "segmentation" / "a.png", classes)
    assert np.array_equal(read(train, SEGMENTATION)[0]["labels"]["segmentation"], classes)


@pytest.mark.parametrize("missing", ["image", "segmentation"])
def test_missing_folder_is_named_with_what_is_expected(train, missing):
    (train / missing).rename(train / "elsewhere")
    with pytest.raises(ValueError, match=rf"{missing} is missing; expected: <root>/<split>/image"):
        read(train, SEGMENTATION)


def test_folder_without_images_is_rejected(train):
    for path in (train / "image").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="image holds no images"):
        read(train, SEGMENTATION)


def test_image_without_any_label_is_named_without_decoding(train):
    (train / "image" / "c.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"c\.png has no label of any task; tasks: segmentation"):
        read(train, SEGMENTATION)
    save(train / "image" / "c.png", np.zeros((H, W, 3), dtype=np.uint8))
    sample = read(train, SEGMENTATION, allow_unlabelled=True)[2]
    assert sample["name"] == "c"
    assert (sample["labels"]["segmentation"] == 255).all()


def test_two_files_of_one_stem_are_rejected(train):
    save(train / "segmentation" / "a.npy", np.zeros((H, W), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"a\.png and a\.npy have the same stem"):
        read(train, SEGMENTATION)


def test_unknown_folder_in_ignored_classes_is_rejected(train):
    with pytest.raises(ValueError, match="'parts'; allowed: segmentation"):
        read(train, SEGMENTATION, ignored_classes={"parts": 0})


@pytest.mark.parametrize(
    ("task", "file", "array", "message"),
    [
        (SEGMENTATION, "a.png", np.full((H, W), 11, dtype=np.uint8), "holds 11"),
        (SEGMENTATION, "a.png", np.zeros((H, W + 1), dtype=np.uint8), r"\(6, 9\)"),
        (SEGMENTATION, "a.png", np.zeros((H, W, 3), dtype=np.uint8), "mode RGB; allowed: L, P"),
        (SEGMENTATION, "a.npy", np.zeros((H, W)), "float64; allowed: integer"),
        (DEPTH, "a.png", np.zeros((H, W), dtype=np.uint8), "mode L; allowed: I;16"),
        (DEPTH, "a.npy", np.full((H, W), np.nan), "nan"),
        (NORMALS, "a.npy", np.ones((3, H, W)), "length 1"),
        (NORMALS, "a.npy", np.ones((H, W)), r"\(6, 8\)"),
    ],
)
def test_wrong_label_is_rejected_by_file_name(train, task, file, array, message):
    (train / "segmentation" / "a.png").unlink()
    save(train / "segmentation" / "a.npy", np.zeros((H, W), dtype=np.uint8))
    if task is SEGMENTATION:
        (train / "segmentation" / "a.npy").unlink()
    save(train / task.name / file, array)
    with pytest.raises(ValueError, match=rf"(?s)a\.{file[2:]}.*{message}"):
        read(train, SEGMENTATION, task)[0]


def test_pickled_npy_is_refused(train):
    np.save(train / "segmentation" / "c.npy", np.array([[{}]]), allow_pickle=True)
    save(train / "image" / "c.png", np.zeros((H, W, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="allow_pickle"):
        read(train, SEGMENTATION)[2]
