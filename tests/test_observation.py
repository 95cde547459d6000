"""Observation: trackers are told what happens, and nothing else happens because of it."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from balancing_cases import GIVEN, batch_of, make_collator, make_model
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peft_talora.balancing import Balancer
from peft_talora.observation import ObservationArguments, check_observation
from peft_talora.weighting import make_weighting

TRAIN = Path(__file__).parent.parent / "recipes" / "train.py"
TASKS = ["segmentation", "depth", "normals"]
PAIRS = ["segmentation-depth", "segmentation-normals", "depth-normals"]
OBSERVED = ["--report_to", "tensorboard", "--logging_steps", 2, "--cosine_steps", 3, "--sample_steps", 3]


def train(sam_folder, folder, *flags, dropout=("--dropout", 0.1)):
    """Six steps in two epochs, with dropout."""
    small = ["--base", sam_folder, "--num_images", 14, "--per_device_train_batch_size", 4, *dropout]
    small += ["--save_steps", 4, "--num_threads", torch.get_num_threads(), "--learning_rate", 1e-3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(TRAIN), *map(str, [*small, "--output_dir", folder, *flags])])
        patch.setenv("ACCELERATE_USE_CPU", "true")
        runpy.run_path(str(TRAIN), run_name="__main__")


def read(folder):
    """What was told: tag → step → value; and tag → steps of pictures."""
    events = EventAccumulator(str(folder / "logs" / "train"))
    events.Reload()
    tags = events.Tags()
    scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags["scalars"]}
    return scalars, {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}


@pytest.fixture(scope="module")
def observed(sam_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("observed")
    train(sam_folder, folder, *OBSERVED)
    return folder


def test_all_that_is_promised_is_told(observed):
    scalars, pictures = read(observed)
    results = json.loads((observed / "results.json").read_text())
    figures = [f"{task}/{name}" for task, metrics in results["after"].items() for name in metrics]
    every_two = [f"{kind}/{task}" for kind in ("loss", "weight") for task in TASKS]
    every_two += ["learning_rate", "images_per_second", "memory_mib"]
    steps = {tag: [2, 4, 6] for tag in every_two}
    steps |= {f"cosine/{pair}": [3, 6] for pair in PAIRS}
    steps |= {f"validation/{name}": [3, 6] for name in figures}
    steps |= {name: [3, 6] for name in ["validation_loss", *(f"validation_loss/{task}" for task in TASKS)]}
    assert {tag: list(values) for tag, values in scalars.items()} == steps
    assert pictures == {"predictions": [3, 6]}
    for entry in results["history"]:
        assert scalars["validation_loss"][entry["step"]] == pytest.approx(entry["loss"])
        assert scalars["validation/depth/rmse"][entry["step"]] == pytest.approx(entry["metrics"]["depth"]["rmse"])
    assert scalars["weight/normals"][2] == 4
    assert all(-1 <= value <= 1 for pair in PAIRS for value in scalars[f"cosine/{pair}"].values())
    assert scalars["learning_rate"][2] > scalars["learning_rate"][6] > 0
    for step in (3, 6):
        assert np.asarray(Image.open(observed / "samples" / f"step-{step:06d}.png")).std() > 20


@pytest.mark.parametrize("weighting", ["fixed", "famo"])
def test_a_run_that_is_observed_ends_with_the_same_weights(weighting, observed, sam_folder, tmp_path):
    flags = [] if weighting == "fixed" else ["--weighting", weighting]
    train(sam_folder, tmp_path / "alone", *flags)
    if weighting != "fixed":
        train(sam_folder, tmp_path / "observed", *flags, *OBSERVED)
        observed = tmp_path / "observed"
        assert len({tuple(read(observed)[0][f"weight/{task}"].values()) for task in TASKS}) > 1
    weights, others = (load_file(f / "adapter_model.safetensors") for f in (observed, tmp_path / "alone"))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_the_weights_of_an_aggregator_are_those_of_the_gradients(sam_folder, tmp_path):
    train(sam_folder, tmp_path, "--weighting", "pcgrad", *OBSERVED)
    scalars = read(tmp_path)[0]
    assert any(value < 0 for pair in PAIRS for value in scalars[f"cosine/{pair}"].values())
    # PCGrad adds to the gradients of tasks whatever takes away that they are against each other.
    assert max(value for task in TASKS for value in scalars[f"weight/{task}"].values()) > 1


def test_one_process_tells_what_two_have_found_and_changes_nothing(sam_folder, tmp_path):
    small = ["--num_images", 10, "--num_train_epochs", 1, "--num_threads", 1]
    told = ["--report_to", "tensorboard", "--logging_steps", 1, "--cosine_steps", 1, "--sample_steps", 2]
    train(sam_folder, tmp_path / "one", *small, *told, "--per_device_train_batch_size", 2, dropout=())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, TRAIN, *small]
    command += ["--base", sam_folder, "--learning_rate", 1e-3, "--per_device_train_batch_size", 1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for name, flags in {"told": told, "alone": []}.items():
        words = map(str, [*command, *flags, "--output_dir", tmp_path / name])
        subprocess.run([*words], env=environment, check=True, timeout=240, capture_output=True)
    weights, others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("told", "alone"))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    (one, _), (two, pictures) = (read(tmp_path / name) for name in ("one", "told"))
    assert len([*(tmp_path / "told" / "logs" / "train").glob("events*")]) == 1
    assert two.keys() == one.keys()
    assert pictures == {"predictions": [2, 4]}
    for task in TASKS:
        assert list(two[f"loss/{task}"]) == [1, 2, 3, 4]
        # Of the first step. Later on, Adam makes whole steps out of rounding where a gradient is tiny; and cosines are
        # of that rounding as long as all channels of a head are equal.
        assert two[f"loss/{task}"][1] == pytest.approx(one[f"loss/{task}"][1], rel=1e-5)


@pytest.mark.parametrize("flags", [["--method", "heads"], ["--method", "lora-stl"], ["--tasks", "depth"]])
def test_cosines_of_what_is_not_shared_are_refused(flags, sam_folder, tmp_path):
    dropout = [] if "heads" in flags else ["--dropout", 0.1]
    with pytest.raises(ValueError, match="`cosine_steps` is 3, but no two tasks share what is trained"):
        train(sam_folder, tmp_path, *flags, *OBSERVED, dropout=dropout)
    assert not [*tmp_path.rglob("events*")]


def test_a_resumed_run_goes_on_telling(observed, sam_folder, tmp_path):
    """Steps after the checkpoint that were told before are taken back, so that none is there twice."""
    shutil.copytree(observed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    train(sam_folder, tmp_path / "run", *OBSERVED, "--resume_from_checkpoint", "latest")
    whole, resumed = read(observed)[0], read(tmp_path / "run")[0]
    for tag in ("loss/depth", "cosine/depth-normals", "validation_loss", "learning_rate"):
        assert resumed[tag] == whole[tag], tag


def test_cosines_are_those_of_the_gradients(sam_folder, tmp_path):
    accelerator, model = Accelerator(cpu=True), make_model(sam_folder)
    collator = make_collator(model)
    balancer = Balancer(accelerator, model, collator.tasks, make_weighting("fixed", TASKS, GIVEN))
    batch, rows = batch_of(collator, 0, [0]), []
    state = torch.get_rng_state()
    found = balancer.cosines([batch])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [f"{a}-{b}" for a, b in found] == PAIRS
    shared = [p for n, p in model.named_parameters() if p.requires_grad and not any(t in n.split(".") for t in TASKS)]
    for task in TASKS:
        output = model(
            pixel_values=batch["pixel_values"],
            tasks=[task],
            labels={task: batch["labels"][task]},
            original_sizes=batch["original_sizes"],
        )
        grads = torch.autograd.grad(output.losses[task], shared, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    expected = [torch.cosine_similarity(rows[a], rows[b], dim=0).item() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert list(found.values()) == pytest.approx(expected, abs=1e-6)
    halves = Accelerator(cpu=True, gradient_accumulation_steps=2)
    balancer = Balancer(halves, model, collator.tasks, make_weighting("fixed", TASKS, GIVEN))
    whole = balancer.cosines([batch_of(collator, 0, range(4))])
    parts = balancer.cosines([batch_of(collator, 0, [0, 1]), batch_of(collator, 0, [2, 3])])
    assert list(parts.values()) == pytest.approx(list(whole.values()), abs=1e-9)
    lacking = batch_of(collator, 0, [2])
    assert balancer.cosines([lacking]) == {}, "depth and normals have no labels"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_to": "paper"}, "`report_to` is 'paper'; installed: .*tensorboard"),
        ({"logging_steps": 0}, "`logging_steps` is 0; allowed: 1 or more"),
        ({"cosine_steps": 3}, "`cosine_steps` is 3, but `report_to` names no tracker"),
    ],
)
def test_what_cannot_be_told_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_observation(ObservationArguments(**changes))
