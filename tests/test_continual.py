"""The recipe over a stream: what it leaves, that a kill changes nothing, and what it refuses."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from transformers import SamModel

from peft_talora.continual import load_moda
from peft_talora.continual.contestants import METHODS
from peft_talora.continual.scenes import DomainScenes

RECIPE = str(Path(__file__).parent.parent / "recipes" / "continual.py")
continual = SimpleNamespace(**runpy.run_path(RECIPE))
DOMAINS = ("pits", "polyps", "rails")
FLAGS = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "points": 32, "r": 2, "num_threads": 1}
FLAGS |= {"save_steps": 1, "exemplars": 3, "learning_rate": 1e-2}
PICTURES = {"matrix.png", "course.png"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> Path:
    """Folders of three generated domains and natural images, and the YAML file that lists them."""
    root, entries = tmp_path_factory.mktemp("stream"), []
    for name in (*DOMAINS, "natural"):
        for split, count in (("train", 5), ("test", 2)):
            scenes = DomainScenes(name, split, count, 64)
            for kind in ("image", "mask"):
                (root / name / split / kind).mkdir(parents=True)
            for index in range(count):
                sample = scenes[index]
                image = (sample["image"] * 255).round().byte().permute(1, 2, 0).numpy()
                Image.fromarray(image).save(root / name / split / "image" / f"{index}.png")
                mask = sample["masks"][0].byte() * 255
                Image.fromarray(mask.numpy()).save(root / name / split / "mask" / f"{index}.png")
        entries.append({"name": name, "root": name, "val": 0.2, "natural": name == "natural"})
    file = root / "stream.yaml"
    file.write_text(yaml.safe_dump(entries))
    return file


def run(monkeypatch, folder: Path, stream: Path, base: str, **changes) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    flags = {"output_dir": folder, "stream": stream, "base": base, **FLAGS, **changes}
    words = [word for name, value in flags.items() for word in (f"--{name}", *str(value).split())]
    monkeypatch.setattr(sys, "argv", [RECIPE, *words])
    continual.main()
    return json.loads((folder / "results.json").read_text())


def figures(results: dict) -> dict:
    """What two equal runs have in common."""
    return {key: value for key, value in results.items() if key not in ("seconds", "arguments")}


@pytest.mark.parametrize(
    ("method", "adapter"),
    [("moda", "lora"), ("moda", "talora"), ("moda", "hq"), ("sequential", "decoder"), ("joint", "adapter")]
    + [(method, "lora") for method in METHODS if method not in ("moda", "sequential", "joint")],
)
def test_a_run_leaves_figures_that_follow_from_its_matrix(method, adapter, stream, sam_folder, tmp_path, monkeypatch):
    results = run(monkeypatch, tmp_path, stream, sam_folder, method=method, adapter=adapter)
    own = results["matrix"]["iou"]
    R, K = torch.tensor(own["R"]), len(DOMAINS)
    assert results["domains"] == list(DOMAINS)
    assert R.shape == ((1, K) if method == "joint" else (K, K))
    assert own["last"] == pytest.approx(R[-1].mean().item(), abs=1e-4)
    if method == "joint":
        assert own["avg"] is own["ff"] is None
    else:
        assert own["avg"] == pytest.approx((R[0, 0] + R[1, :2].mean() + R[2].mean()).item() / 3, abs=1e-4)
        drops = (R[:2, 0].max() - R[2, 0] + R[1, 1] - R[2, 1]).item() / 2
        assert own["ff"] == pytest.approx(drops, abs=1e-4)
    written = {path.name for path in tmp_path.iterdir()}
    assert PICTURES | {"results.md"} <= written
    assert ("confusion.png" in written) == (method == "moda") == ("routing" in results)
    assert f"| {method}, {adapter}: IoU |" in (tmp_path / "results.md").read_text()
    assert own["zero_shot"] != own["R"][-1]
    assert results["encoder_passes"] >= 1
    if method == "moda":
        counts = torch.tensor(results["routing"]["counts"])
        assert counts.sum(1).tolist() == [2] * K
        assert results["routing"]["accuracy"] == pytest.approx(counts[:, :K].diag().sum().item() / (2 * K))
        assert own["oracle_gap"] == pytest.approx(sum(own["oracle"]) / K - own["last"], abs=1e-4)


def test_the_model_that_a_run_leaves_gives_its_figures_again(stream, sam_folder, tmp_path, monkeypatch):
    results = run(monkeypatch, tmp_path, stream, sam_folder)
    model = load_moda(tmp_path / "moda", SamModel.from_pretrained(sam_folder))
    assert model.domains == list(DOMAINS)
    folders = [tmp_path / "moda" / "domains" / name for name in DOMAINS]
    stored = sum(file.stat().st_size for folder in folders for file in folder.iterdir()) / len(DOMAINS)
    assert results["bytes_per_domain"] == pytest.approx(stored)
    assert results["parameters_per_domain"] == sum(p.numel() for p in model.learn("pits").values())


def test_settings_are_chosen_on_validation_images_of_the_domains_named(stream, sam_folder, tmp_path, monkeypatch):
    """The order is the given one, the scores are those of the validation images, and natural images only test."""
    names = ["polyps", "pits"]
    results = run(monkeypatch, tmp_path, stream, sam_folder, domains=" ".join(names), measure_on="val")
    assert results["domains"] == results["stages"] == names
    own, routing = results["matrix"]["iou"], results["routing"]
    assert len(own["R"]) == 2
    assert "natural" not in own
    assert routing["natural_to_base"] is None
    assert [sum(row) for row in routing["counts"]] == [1, 1]  # a fifth of five images validates
    assert (tmp_path / "results.md").exists()


class Killed(Exception):
    """Stands for a kill: raised where nothing catches it."""


@pytest.mark.parametrize(
    ("method", "adapter", "steps"), [("moda", "lora", 3), ("moda", "talora", 2), ("ewc", "lora", 3), ("er", "lora", 5)]
)
def test_a_kill_in_mid_stream_changes_nothing(method, adapter, steps, stream, sam_folder, tmp_path, monkeypatch):
    """Two steps a domain, saved at each: after three it is the middle of the second one."""
    whole = run(monkeypatch, tmp_path / "whole", stream, sam_folder, method=method, adapter=adapter)
    left = steps
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(Killed):
        run(monkeypatch, tmp_path / "killed", stream, sam_folder, method=method, adapter=adapter)
    monkeypatch.setattr(torch.optim.AdamW, "step", original)
    resumed = run(
        monkeypatch,
        tmp_path / "killed",
        stream,
        sam_folder,
        method=method,
        adapter=adapter,
        resume_from_checkpoint="latest",
    )
    assert figures(resumed) == figures(whole)


def test_two_processes_learn_what_one_does_of_as_many_images(stream, sam_folder, tmp_path, monkeypatch):
    """Points of the loss are drawn by each process, so the updates are alike and not equal."""
    # The loss is taken at nearly all points, so that the draw decides little.
    flags = {"domains": "pits rails", "prompts": "box", "points": 4096, "learning_rate": 1e-3, "num_train_epochs": 3}
    one = run(monkeypatch, tmp_path / "one", stream, sam_folder, **flags)
    flags = {**FLAGS, **flags, "per_device_train_batch_size": 1, "stream": stream, "base": sam_folder}
    words = [word for name, value in flags.items() for word in (f"--{name}", *str(value).split())]
    # torchrun would take `--r` for one of its own, if it were not for the dashes.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--", RECIPE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launch, *words, "--output_dir", tmp_path / "two"], env=environment, check=True, timeout=240)
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["stages"] == one["stages"] == ["pits", "rails"]
    progress = [
        json.loads(next((tmp_path / folder).glob("checkpoint-*/progress.json")).read_text())
        for folder in ("one", "two")
    ]
    assert [p["arguments"]["num_processes"] for p in progress] == [1, 2]
    for name in two["stages"]:
        updates = [learnt(tmp_path / folder / "moda" / "domains" / name) for folder in ("one", "two")]
        assert torch.cosine_similarity(*updates, dim=0) > 0.9


def learnt(folder: Path) -> torch.Tensor:
    """What a LoRA has learnt: its second factors, which start as zeros."""
    (file,) = folder.glob("*.safetensors")
    return torch.cat([value.flatten() for key, value in sorted(load_file(file).items()) if "lora_B" in key])


def test_other_arguments_are_not_resumed(stream, sam_folder, tmp_path, monkeypatch):
    run(monkeypatch, tmp_path, stream, sam_folder, method="sequential")
    with pytest.raises(ValueError, match=r"learning_rate=0.01 \(now 0.5\)"):
        run(
            monkeypatch,
            tmp_path,
            stream,
            sam_folder,
            method="sequential",
            learning_rate=0.5,
            resume_from_checkpoint="latest",
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "hope"}, "`method` is 'hope'; allowed: moda, sequential"),
        ({"method": "o-lora", "adapter": "decoder"}, "with 'o-lora' allowed: 'lora'"),
        ({"adapter": "wings"}, "'wings'"),
        ({"strength": 1, "method": "sequential"}, "`strength` is 1.0; with 'sequential' allowed: none"),
        ({"measure_on": "train"}, "`measure_on` is 'train'; allowed: 'test', 'val'"),
        ({"domains": "pits ferns"}, r"domains \['ferns'\] are unknown; allowed: pits, polyps, rails"),
        ({"num_train_epochs": 0}, "`num_train_epochs` is 0; allowed: 1 or more"),
        ({"prompts": "songs"}, r"prompts are \['songs'\]; allowed"),
        ({"query": "mean_block(9)"}, "mean_block"),
        ({"stream": "cosam"}, "`data_root` is None"),
        ({"per_device_train_batch_size": 50}, "do not fill one batch"),
    ],
)
def test_wrong_arguments_are_refused(changes, message, stream, sam_folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, tmp_path, **{"stream": stream, "base": sam_folder, **changes})
    assert not (tmp_path / "results.json").exists()
