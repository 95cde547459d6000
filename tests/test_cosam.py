"""CoSAM's manifests from the layouts of its data sets, each made small; and the recipe that writes them."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peft_talora.continual.cosam import SOURCES, make_manifest, squares
from peft_talora.continual.manifest import ManifestImages, check_files, read_manifest
from peft_talora.continual.stream import manifest_stream

RECIPE = str(Path(__file__).parent.parent / "recipes" / "prepare.py")
SIZE = (12, 16)


def save(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(file)


def noise(size=SIZE):
    return np.random.default_rng(0).integers(0, 256, (*size, 3))


def marked(size=SIZE):
    mask = np.zeros(size)
    mask[2:8, 3:10] = 255
    return mask


def write_bsdata(root):
    polygon = {"label": "pitting", "points": [[3, 2], [9, 2], [9, 7], [3, 7]], "shape_type": "polygon"}
    label = {"imagePath": "x", "imageHeight": SIZE[0], "imageWidth": SIZE[1], "shapes": [polygon]}
    (root / "BSData/label").mkdir(parents=True)
    for place in range(6):
        for time in (200828110014, 200907232354):
            stem = f"01_{time}_{277500 + place}_315_crop_1"
            save(root / f"BSData/data/{stem}.jpg", noise())
            (root / f"BSData/label/{stem}.json").write_text(json.dumps(label))
    save(root / "BSData/data/01_200828110055_305000_090_crop_2.jpg", noise())  # without a defect


def write_rsdds(root):
    for kind, size in (("I", (70, 16)), ("II", (40, 10))):
        folder = root / f"RSDDs dataset/Type-{kind} RSDDs dataset"
        for number in range(5):
            mask = np.zeros(size)
            mask[2:8, 2:9] = mask[-6:-2, 2:9] = 255
            save(folder / f"Rail surface images/rail_{number}.jpg", noise(size))
            save(folder / f"GroundTruth/rail_{number}.jpg", mask)


def write_mvtec(root):
    for category in ("carpet", "grid", "leather", "tile", "wood", "pill", "bottle"):
        folder = root / "mvtec_anomaly_detection" / category
        save(folder / "train/good/000.png", noise())
        save(folder / "test/good/000.png", noise())
        for defect in ("hole", "cut"):
            for stem in ("000", "001", "002"):
                save(folder / f"test/{defect}/{stem}.png", noise())
                save(folder / f"ground_truth/{defect}/{stem}_mask.png", marked())


def write_camo(root):
    folder = root / "CAMO-V.1.0-CVIU2019"
    for split, numbers in (("Train", range(4)), ("Test", range(4, 6))):
        for number in numbers:
            save(folder / f"Images/{split}/camourflage_{number:05d}.jpg", noise())
            save(folder / f"GT/camourflage_{number:05d}.png", marked())


def write_kvasir(root):
    for number in range(6):
        save(root / f"Kvasir-SEG/images/cju{number}.jpg", noise())
        save(root / f"Kvasir-SEG/masks/cju{number}.jpg", marked())
        if number < 2:
            save(root / f"sessile-main-Kvasir-SEG/images/cju{number}.jpg", noise())


def write_coco(root):
    images, annotations = [], []
    for key in range(4):
        images.append({"id": key, "height": SIZE[0], "width": SIZE[1], "file_name": f"{key:012d}.jpg"})
        save(root / f"coco/val2017/{key:012d}.jpg", noise())
        common = {"image_id": key, "iscrowd": 0}
        annotations.append({"id": 10 * key, "area": 42, "segmentation": [[3, 2, 9, 2, 9, 7, 3, 7]], **common})
        annotations.append({"id": 10 * key + 1, "area": 1, "segmentation": [[1, 1, 2, 1, 2, 2, 1, 2]], **common})
        runs = {"size": list(SIZE), "counts": [0, SIZE[0] * SIZE[1]]}
        annotations.append({"id": 10 * key + 2, "area": 192, "segmentation": runs, **common, "iscrowd": 1})
    file = root / "coco/annotations/instances_val2017.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """All data sets, small; nothing of it is changed."""
    root = tmp_path_factory.mktemp("data")
    for write in (write_bsdata, write_rsdds, write_mvtec, write_camo, write_kvasir, write_coco):
        write(root)
    return root


def counts(manifest):
    return tuple(sum(entry["split"] == split for entry in manifest["images"]) for split in ("train", "test"))


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ("bsdata", (8, 4)),
        ("rsdds_1", (8, 2)),
        ("rsdds_2", (8, 2)),
        ("mvtec_textures", (24, 6)),
        ("mvtec_pill", (4, 2)),
        ("mvtec_bottle", (4, 2)),
        ("camo", (4, 2)),
        ("polyp", (4, 2)),
        ("natural", (0, 4)),
    ],
)
def test_every_layout_is_read(data_root, domain, expected):
    manifest = make_manifest(domain, data_root, 0)
    assert counts(manifest) == expected
    assert check_files(manifest, data_root) == []
    for split, count in zip(("train", "test"), expected, strict=True):
        for index in range(count):
            sample = ManifestImages(manifest, split, data_root)[index]
            assert sample["masks"].any()
            assert sample["masks"].shape[1:] == sample["image"].shape[1:]
    if not domain.startswith("rsdds"):
        assert sample["masks"].sum() == 42


def test_the_sources_are_cosam_s_stream():
    assert next(iter(SOURCES)) == "bsdata"
    assert list(SOURCES)[-1] == "natural"
    assert sum(sum(source.published) for name, source in SOURCES.items() if name != "natural") == 3672


def test_what_shows_one_thing_gets_one_split(data_root):
    """A place of the screw at two times; squares of one rail."""
    for domain, part in (("bsdata", slice(2, 4)), ("rsdds_1", slice(0, None))):
        splits = {}
        for entry in make_manifest(domain, data_root, 0)["images"]:
            thing = tuple(Path(entry["image"]).stem.split("_")[part])
            splits.setdefault(thing, set()).add(entry["split"])
        assert all(len(found) == 1 for found in splits.values())
        assert len(splits) == {"bsdata": 6, "rsdds_1": 5}[domain]


def test_splits_are_drawn_by_the_seed_and_do_not_depend_on_the_root(data_root, tmp_path):
    assert make_manifest("camo", data_root, 3, 5)["order"] == 3
    first, again, other = (make_manifest("bsdata", data_root, 0, seed) for seed in (0, 0, 1))
    assert first == again != other
    write_bsdata(tmp_path / "elsewhere")
    assert make_manifest("bsdata", tmp_path / "elsewhere", 0) == first


def test_sessile_polyps_are_what_is_tested_on(data_root):
    tested = [entry["image"] for entry in make_manifest("polyp", data_root, 0)["images"] if entry["split"] == "test"]
    assert tested == ["Kvasir-SEG/images/cju0.jpg", "Kvasir-SEG/images/cju1.jpg"]


def test_squares_cover_a_long_picture():
    """70 × 16: squares from rows 0, 16, 32, 48, and the last from row 54."""
    mask = np.ones((70, 16), dtype=bool)
    assert [top for _, top, _, _ in squares(mask)] == [0, 16, 32, 48, 54]
    assert [left for left, _, _, _ in squares(mask.T)] == [0, 16, 32, 48, 54]
    mask[:] = False
    mask[20, 3] = True
    assert squares(mask) == [[0, 16, 16, 32]]
    assert squares(np.ones((16, 16), dtype=bool)) == [[0, 0, 16, 16]]


def test_what_is_missing_is_named_with_its_address(tmp_path):
    for domain, source in SOURCES.items():
        with pytest.raises(FileNotFoundError) as error:
            make_manifest(domain, tmp_path, 0)
        assert source.address in str(error.value)
        assert source.layout[0] in str(error.value)
    with pytest.raises(ValueError, match="domain is 'cars'; allowed: bsdata"):
        make_manifest("cars", tmp_path, 0)


def test_folders_that_are_not_as_published_are_named(tmp_path):
    write_camo(tmp_path)
    (tmp_path / "CAMO-V.1.0-CVIU2019/GT/camourflage_00000.png").unlink()
    with pytest.raises(ValueError, match=r"camourflage_00000\.jpg has no partner named 'camourflage_00000'"):
        make_manifest("camo", tmp_path, 0)
    save(tmp_path / "CAMO-V.1.0-CVIU2019/GT/camourflage_00000.png", np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"is a mask of \(3, 3\) for an image of \(12, 16\)"):
        make_manifest("camo", tmp_path, 0)
    write_kvasir(tmp_path)
    save(tmp_path / "sessile-main-Kvasir-SEG/images/other.jpg", noise())
    with pytest.raises(ValueError, match=r"other\.jpg has no partner named 'other'"):
        make_manifest("polyp", tmp_path, 0)


def run_recipe(monkeypatch, *arguments):
    """The exit code."""
    monkeypatch.setattr(sys, "argv", [RECIPE, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(RECIPE, run_name="__main__")
    return end.value.code


def test_the_recipe_writes_manifests_and_checks_them(data_root, tmp_path, monkeypatch, capsys):
    output = tmp_path / "manifests"
    assert run_recipe(monkeypatch, "cosam", "--data_root", data_root, "--output", output, "--seed", 3) == 0
    assert {file.stem for file in output.iterdir()} == set(SOURCES)
    assert read_manifest(output / "camo.json")["seed"] == 3
    stream = manifest_stream(output, data_root)
    assert stream.names == [name for name in SOURCES if name != "natural"]
    assert len(stream.natural) == 4
    assert run_recipe(monkeypatch, "check", "--data_root", data_root, "--output", output) == 0
    manifest = read_manifest(output / "camo.json")
    manifest["images"][0]["sha256"] = "0" * 64
    (output / "camo.json").write_text(json.dumps(manifest))
    (output / "polyp.json").write_text("{}")
    capsys.readouterr()
    assert run_recipe(monkeypatch, "check", "--data_root", data_root, "--output", output) == 1
    printed = capsys.readouterr().out
    assert f"{manifest['images'][0]['image']} has changed since the manifest was made" in printed
    assert "polyp.json is of version None" in printed


def test_the_recipe_takes_an_order_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    write_camo(tmp_path)
    arguments = ("cosam", "--data_root", tmp_path, "--output", tmp_path / "m", "--order")
    assert run_recipe(monkeypatch, *arguments, "polyp", "camo") == 1
    printed = capsys.readouterr().out
    assert "polyp: Kvasir-SEG is missing" in printed
    assert "https://datasets.simula.no/kvasir-seg/" in printed
    assert read_manifest(tmp_path / "m/camo.json")["order"] == 1
    assert run_recipe(monkeypatch, *arguments, "camo", "camo") == 2
    assert "--order names a domain twice" in capsys.readouterr().err
    assert run_recipe(monkeypatch, "check", "--data_root", tmp_path, "--output", tmp_path / "none") == 1
