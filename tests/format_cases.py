"""Tiny copies of published data sets in their true layouts, with labels that are known."""

import json

import numpy as np
from datasets import Array2D, Array3D, Dataset, Features
from PIL import Image

H, W = 6, 8


def scene(seed, size=(H, W)):
    """What an image and its labels hold: image (H, W, 3) in [0, 1], classes from -1 to 6, metres, unit vectors."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((*size, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors[0, 0] = 0
    depth = rng.uniform(1, 9, size).astype(np.float32)
    depth[0, 1] = 0
    classes = rng.integers(-1, 7, size)
    classes[0, :2] = -1, 6
    return {
        "image": rng.random((*size, 3), dtype=np.float32),
        "segmentation": classes,
        "depth": depth,
        "normal": vectors,
    }


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def write_numbered(root, folders, split="train", images=11):
    """`<split>/<folder>/<number>.npy`; folder → part of the scene. The scene of a number has it as its seed."""
    for number in range(images):
        made = scene(number)
        for folder, part in folders.items():
            array = made[part][..., None] if part == "depth" else made[part]
            save(root / split / folder / f"{number}.npy", array)


def write_nyuv2(root):
    write_numbered(root, {"image": "image", "label": "segmentation", "depth": "depth", "normal": "normal"})


def write_cityscapes_7(root):
    write_numbered(root, {"image": "image", "label_7": "segmentation", "label_19": "segmentation", "depth": "depth"})


def write_parquet(root, splits, segmentation="segmentation", shards=2, size=(H, W), make=scene):
    """`data/<split>-<shard>-of-<shards>.parquet` with the columns of tanganke/nyuv2; split → number of rows."""
    features = Features(
        {
            "image": Array3D((3, *size), "float32"),
            segmentation: Array2D(size, "int64"),
            "depth": Array3D((1, *size), "float32"),
            "normal": Array3D((3, *size), "float32"),
            "noise": Array3D((1, *size), "float32"),
        }
    )

    def rows(count):
        for number in range(count):
            made = make(number)
            yield {
                "image": made["image"].transpose(2, 0, 1),
                segmentation: made["segmentation"],
                "depth": made["depth"][None],
                "normal": made["normal"].transpose(2, 0, 1),
                "noise": made["depth"][None],
            }

    (root / "data").mkdir(parents=True)
    for split, count in splits.items():
        table = Dataset.from_list(list(rows(count)), features=features)
        for shard in range(shards):
            file = root / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            table.shard(shards, shard, contiguous=True).to_parquet(file)


def write_cityscapes_19(root):
    """Two cities; the second image has neither disparity nor camera."""
    rng = np.random.default_rng(0)
    for city, frame in (("bochum", "000000_000313"), ("aachen", "000001_000019")):
        name = f"{city}_{frame}"
        ids = np.array([[7, 33, 0, 3, 26, 11, 8, 5]] * H, dtype=np.uint8)
        save(
            root / "leftImg8bit" / "train" / city / f"{name}_leftImg8bit.png",
            rng.integers(0, 256, (H, W, 3), np.uint8),
        )
        save(root / "gtFine" / "train" / city / f"{name}_gtFine_labelIds.png", ids)
        if city == "bochum":
            raw = np.array([[0, 1, 257, 2561, 1, 1, 1, 1]] * H, dtype=np.uint16)
            save(root / "disparity" / "train" / city / f"{name}_disparity.png", raw)
            camera = root / "camera" / "train" / city / f"{name}_camera.json"
            camera.parent.mkdir(parents=True)
            camera.write_text(json.dumps({"extrinsic": {"baseline": 0.25}, "intrinsic": {"fx": 2000.0}}))


def write_pascal(root):
    """Two images: one with two people, one without any."""
    from scipy.io import savemat

    names, rng = ("2008_000008", "2008_000015"), np.random.default_rng(0)
    for name in names:
        save(root / "JPEGImages" / f"{name}.jpg", rng.integers(0, 256, (H, W, 3), np.uint8))
        save(root / "sal_distill" / f"{name}.png", np.array([[0, 127, 128, 255] * 2] * H, dtype=np.uint8))
        normals = np.full((H, W, 3), 128, dtype=np.uint8)
        normals[:, 2:] = 255, 128, 128
        save(root / "normals_distill" / f"{name}.png", normals)
        context = np.full((H, W), 2, dtype=np.uint16)
        context[:, 4:] = 427
        save_mat(savemat, root / "pascal-context" / "trainval" / f"{name}.mat", {"LabelMap": context})
    voc, own = (np.array([[0, 15, 20, 255] * 2] * H, dtype=np.uint8), np.full((H, W), 9, dtype=np.uint8))
    save(root / "semseg" / "VOC12" / f"{names[0]}.png", voc)
    for name in names:
        save(root / "semseg" / "pascal-context" / f"{name}.png", own)
    left, right = np.zeros((2, H, W), dtype=np.uint8)
    left[:, 0], right[:, 1] = 1, 1
    people = [person(left, {"hair": left}), person(right, {"lfoot": right})]
    write_anno(savemat, root / "human_parts" / f"{names[0]}.mat", [thing(left), *people])
    write_anno(savemat, root / "human_parts" / f"{names[1]}.mat", [thing(right)])
    lists = root / "ImageSets" / "Context"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(names) + "\n")
    (lists / "val.txt").write_text(names[1] + "\n")
    (root / "json").mkdir()
    (root / "json" / "nyu_classes.json").write_text(json.dumps(["unknown", "television", "bottle"]))
    (root / "json" / "context_classes.json").write_text(json.dumps({"unknown": 0, "aeroplane": 2, "tvmonitor": 427}))


def save_mat(savemat, file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    savemat(file, content)


OBJECT = [("class", "O"), ("class_ind", "O"), ("mask", "O"), ("parts", "O")]


def thing(mask):
    """An object without parts, as PASCAL-Part has it."""
    return ("aeroplane", 1, mask, np.zeros((0, 0)))


def person(mask, parts):
    listed = np.array([list(parts.items())], dtype=object).reshape(1, -1, 2)
    listed = np.array([tuple(part) for part in listed[0]], dtype=[("part_name", "O"), ("mask", "O")])
    return ("person", 15, mask, listed)


def write_anno(savemat, file, objects):
    listed = np.empty(len(objects), dtype=OBJECT)
    for place, one in enumerate(objects):
        listed[place] = one
    anno = np.empty((1, 1), dtype=[("imname", "O"), ("objects", "O")])
    anno[0, 0] = (file.stem, listed)
    save_mat(savemat, file, {"anno": anno})


def write_nyud(root):
    """One image for training and one for validation."""
    rng = np.random.default_rng(0)
    for split, name in (("train", "0003"), ("val", "0001")):
        made = scene(int(name))
        save(root / "images" / f"{name}.jpg", rng.integers(0, 256, (H, W, 3), np.uint8))
        save(root / "segmentation" / f"{name}.png", np.array([[0, 1, 40, 2] * 2] * H, dtype=np.uint8))
        save(root / "depth" / f"{name}.npy", made["depth"])
        save(root / "normals" / f"{name}.npy", 0.97 * made["normal"])
        save(root / "edge" / f"{name}.npy", np.array([[0.0, 1.0] * 4] * H))
        (root / "gt_sets").mkdir(exist_ok=True)
        (root / "gt_sets" / f"{split}.txt").write_text(name + "\n")
