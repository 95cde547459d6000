"""Bad files: each ends in an error that names it, or is left out and counted; nothing else happens."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from peft_talora import make_task, sources
from peft_talora.data import BadSample, FolderDataset, readable
from peft_talora.data.bad_samples import reading
from peft_talora.data.values import to_array

H, W = 12, 16
TASKS = [make_task(name, channels) for name, channels in {"segmentation": 4, "depth": 1, "normals": 3}.items()]
SAMPLES = 8


def write_folder(root: Path) -> None:
    """`SAMPLES` images with labels of all tasks, in every format that there is."""
    drawn = np.random.default_rng(0)
    for index in range(SAMPLES):
        vectors = drawn.normal(size=(3, H, W)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=0)
        depth = drawn.uniform(0.5, 5, (H, W)).astype(np.float32)
        pictures = {
            "image": drawn.integers(0, 256, (H, W, 3), dtype=np.uint8),
            "segmentation": drawn.integers(0, 4, (H, W), dtype=np.uint8),
        }
        arrays = {"normals": vectors}
        if index % 2:
            arrays["depth"] = depth
        else:
            pictures["depth"] = (1000 * depth).astype(np.uint16)
        for name, value in pictures.items():
            (root / "train" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(value).save(root / "train" / name / f"{index}.png")
        for name, value in arrays.items():
            (root / "train" / name).mkdir(parents=True, exist_ok=True)
            np.save(root / "train" / name / f"{index}.npy", value)


def truncated(file: Path, drawn: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: drawn.randrange(1, len(content) - 12)])


def emptied(file: Path, drawn: random.Random) -> None:
    file.write_bytes(b"")


def flipped(file: Path, drawn: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(drawn.randrange(1, 20)):
        content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    file.write_bytes(content)


def other_mode(file: Path, drawn: random.Random) -> None:
    if file.suffix == ".npy":
        np.save(file, np.array(["a", "b"]))
    elif file.parent.name == "depth":
        Image.new("RGB", (W, H)).save(file)
    elif file.parent.name == "image":
        Image.fromarray(np.full((H, W), 40000, dtype=np.uint16)).save(file)
    else:
        Image.fromarray(np.full((H, W), 300, dtype=np.uint16)).save(file)


def not_finite(file: Path, drawn: random.Random) -> None:
    value = np.full((H, W), 1.0, dtype=np.float32) if file.parent.name == "depth" else np.zeros((3, H, W), np.float32)
    value[..., 3, 4] = drawn.choice([np.nan, np.inf, -np.inf])
    np.save(file.with_suffix(".npy"), value)
    if file.suffix != ".npy":
        file.unlink()


def wrong_class(file: Path, drawn: random.Random) -> None:
    Image.fromarray(np.full((H, W), drawn.randrange(4, 255), dtype=np.uint8)).save(file)


def other_size(file: Path, drawn: random.Random) -> None:
    if file.suffix == ".npy":
        np.save(file, np.load(file)[..., 1:, :])
    else:
        with Image.open(file) as picture:
            small = picture.crop((0, 0, W - 1, H))
        small.save(file)


class Planted:
    """What runs code where it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def pickled(file: Path, drawn: random.Random) -> None:
    target = file.with_suffix(".npy")
    if drawn.random() < 0.5:
        np.save(target, np.array([Planted()], dtype=object), allow_pickle=True)
    else:
        target.write_bytes(pickle.dumps(Planted()))
    if file.suffix != ".npy":
        file.unlink()


MUTATIONS = {
    "image": (truncated, emptied, flipped, other_mode),
    "segmentation": (truncated, emptied, flipped, other_mode, wrong_class, other_size, pickled),
    "depth": (truncated, emptied, flipped, other_mode, not_finite, other_size, pickled),
    "normals": (truncated, emptied, flipped, other_mode, not_finite, other_size, pickled),
}


def same(sample: dict, other: dict) -> bool:
    labels, others = sample["labels"], other["labels"]
    return torch.equal(sample["image"], other["image"]) and all(torch.equal(labels[k], others[k]) for k in others)


def outcome(dataset: FolderDataset, index: int) -> dict | str:
    """The sample, or the message of the error that is documented."""
    try:
        return dataset[index]
    except BadSample as error:
        return str(error)


def test_two_hundred_mutated_samples_are_named_and_nothing_else_happens(tmp_path, monkeypatch):
    """Flipped bits may leave a file that is still right, and what is cut off may be a checksum that nobody reads."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "sound")
    sound = FolderDataset(tmp_path / "sound", "train", TASKS)
    drawn, named = random.Random(0), 0
    for number in range(200):
        root = tmp_path / str(number)
        write_folder(root)
        kind = drawn.choice(list(MUTATIONS))
        mutate = drawn.choice(MUTATIONS[kind])
        index = drawn.randrange(SAMPLES)
        (file,) = (root / "train" / kind).glob(f"{index}.*")
        mutate(file, drawn)
        dataset = FolderDataset(root, "train", TASKS)
        found = outcome(dataset, index)
        if isinstance(found, str):
            assert str(file.with_suffix("")) in found, mutate
            good, problems = readable(dataset)
            assert (len(good), len(problems)) == (SAMPLES - 1, 1)
            named += 1
        else:
            assert mutate is flipped or (mutate is truncated and same(found, sound[index])), (mutate, file)
            assert 0 <= found["image"].min() <= found["image"].max() <= 1
        assert all(same(dataset[other], sound[other]) for other in range(SAMPLES) if other != index)
    assert named > 160
    assert not (tmp_path / "unpickled").exists()


def test_headers_of_npy_and_what_else_numpy_would_open_are_named(tmp_path):
    file, source, drawn = tmp_path / "1.npy", tmp_path / "sound.npy", random.Random(1)
    np.save(source, np.ones((H, W), dtype=np.float32))
    sound, problems = bytearray(source.read_bytes()), []
    for _ in range(300):
        content = sound.copy()
        for _ in range(3):
            content[drawn.randrange(100)] ^= 1 << drawn.randrange(8)
        file.write_bytes(content)
        try:
            with reading(file):
                to_array(file, (), str(file))
        except BadSample as error:
            problems.append(str(error))
    assert len(problems) > 100
    assert all(str(file) in problem for problem in problems)
    with open(file, "wb") as handle:
        np.savez(handle, label=np.ones((H, W)))
    with pytest.raises(BadSample, match=str(file)), reading(file):
        to_array(file, (), str(file))
    file.write_bytes(b"PK\x03\x04 and no archive")
    with pytest.raises(BadSample, match=str(file)), reading(file):
        to_array(file, (), str(file))


def test_class_255_and_an_empty_mask_are_no_faults(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(np.full((H, W), 255, dtype=np.uint8)).save(tmp_path / "train" / "segmentation" / "1.png")
    label = FolderDataset(tmp_path, "train", TASKS)[1]["labels"]["segmentation"]
    assert (label == 255).all()


def test_a_run_skips_what_cannot_be_read_and_says_so(tmp_path):
    write_folder(tmp_path)
    for index in (2, 5):
        emptied(tmp_path / "train" / "image" / f"{index}.png", random.Random(0))
    args = sources.DataArguments(data_root=str(tmp_path), on_bad_sample="skip")
    with pytest.warns(UserWarning, match=r"2 of 8 samples of 'train' are skipped:\n.*2\.png.*\n.*5\.png"):
        dataset = sources.open_split(args, "train", TASKS, 64)
    assert [dataset[index]["name"] for index in range(len(dataset))] == ["0", "1", "3", "4", "6", "7"]
    args.on_bad_sample = "raise"
    with pytest.raises(BadSample, match=r"2\.png"):
        sources.open_split(args, "train", TASKS, 64)[2]
    args.on_bad_sample = "hide"
    with pytest.raises(ValueError, match="`on_bad_sample` is 'hide'; allowed: 'raise', 'skip'"):
        sources.open_split(args, "train", TASKS, 64)


def test_a_folder_of_which_nothing_can_be_read_is_refused(tmp_path):
    write_folder(tmp_path)
    for file in (tmp_path / "train" / "image").iterdir():
        emptied(file, random.Random(0))
    with pytest.raises(BadSample, match=r"none of the 8 samples can be read; the first: .*0\.png"):
        readable(FolderDataset(tmp_path, "train", TASKS))


def test_a_sound_data_set_stays_itself(tmp_path):
    write_folder(tmp_path)
    dataset = FolderDataset(tmp_path, "train", TASKS)
    assert readable(dataset) == (dataset, [])
    assert not isinstance(readable(dataset)[0], Subset)


def test_errors_that_name_the_file_keep_their_words_and_others_get_its_name(tmp_path):
    file = tmp_path / "a.png"
    with pytest.raises(BadSample, match=f"^{file}: it is broken$"), reading(file):
        raise ValueError("it is broken")
    with pytest.raises(BadSample, match=f"^{file} holds 7$"), reading(file):
        raise ValueError(f"{file} holds 7")
    with pytest.raises(BadSample, match="EOFError"), reading(file):
        raise EOFError
    with pytest.raises(RuntimeError), reading(file):
        raise RuntimeError("a fault of the program")
