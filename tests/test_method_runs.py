"""Every method through the recipes, in this process, on a tiny SAM: trained, evaluated, resumed."""

import json
import math
import os
import runpy
import shutil
import signal
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_sam
from format_cases import scene, write_parquet
from PIL import Image
from safetensors.torch import load_file, save_file

import peft_talora
from peft_talora import SyntheticScenes, checkpoint, evaluation, fitting, results

RECIPES = Path(__file__).parent.parent / "recipes"
TASKS = ["segmentation", "depth"]
SINGLE = {"lora-stl": "lora-hps", "full-stl": "full-hps"}
METHODS = ["talora", "lora-stl", "lora-hps", "full-stl", "full-hps", "heads", "mtlora"]
PER_TASK = ["lora-stl", "full-stl", "mtlora"]


def call(recipe: str, *arguments) -> None:
    arguments = [*arguments, "--num_threads", torch.get_num_threads()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [recipe, *map(str, arguments)])
        patch.setenv("ACCELERATE_USE_CPU", "true")
        runpy.run_path(str(RECIPES / recipe), run_name="__main__")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """8 images, of which 7 are trained on in 3 steps of an epoch; steps 2 and 4 are saved within their epochs."""
    base = tmp_path_factory.mktemp("base")
    make_sam().save_pretrained(base)
    small = ["--base", base, "--num_images", 8, "--num_train_epochs", 2, "--per_device_train_batch_size", 2]
    return [*small, "--save_steps", 2, "--save_total_limit", 9]


def train(arguments, method, tasks, folder, *more):
    dropout = ["--dropout", 0.1] if "lora" in method else []
    call("train.py", *arguments, *dropout, "--method", method, "--tasks", *tasks, "--output_dir", folder, *more)


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    """The folders of a run of each method."""
    root = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        train(arguments, method, TASKS, root / method)
    return root


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def assert_same_weights(folder, other):
    weights, others = (load_file(f / "adapter_model.safetensors") for f in (folder, other))
    assert weights.keys() == others.keys()
    assert not [name for name, value in weights.items() if not torch.equal(value, others[name])]


@pytest.mark.parametrize("method", METHODS)
def test_results_have_the_same_keys_whatever_the_method(method, trained):
    results = read_results(trained / method)
    assert results.keys() == read_results(trained / "talora").keys()
    assert results["method"] == results["arguments"]["method"] == method
    assert list(results["after"]) == list(results["before"]) == list(results["validation"]["metrics"]) == TASKS
    assert all(math.isfinite(loss) for loss in results["validation"]["losses"].values())
    kinds = {kind for kind, number in results["parameters"].items() if number}
    assert kinds == {"heads", "all"} | ({"encoder"} if "full" in method else set()) | (
        {"adapter", "other"} if "lora" in method else set()
    )
    assert results["step_seconds"] > 0
    assert results["peak_mib"] > 100
    with (
        Image.open(trained / method / "predictions.png") as picture,
        Image.open(trained / "talora" / "predictions.png") as usual,
    ):
        assert picture.size == usual.size


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_repeats_the_figures_of_every_folder(method, trained, tmp_path):
    after = read_results(trained / method)["after"]
    parts = {trained / method / task: {task: after[task]} for task in TASKS}
    for folder, expected in (parts if method in PER_TASK else {trained / method: after}).items():
        assert read_results(folder)["after"] == expected
        call("evaluation.py", "--adapter", folder, "--output", tmp_path / "figures.json")
        found = json.loads((tmp_path / "figures.json").read_text())
        if method == "mtlora":  # two LoRAs were added up to one, in another order of sums
            assert found.keys() == expected.keys()
            for task, metrics in found.items():
                assert metrics == pytest.approx(expected[task], rel=2e-3)
        else:
            assert found == expected
        assert f"- {SINGLE.get(method, method)}\n" in (folder / "README.md").read_text()


@pytest.mark.parametrize("method", SINGLE)
def test_a_run_per_task_is_an_ordinary_run_of_that_task(method, arguments, trained, tmp_path):
    folder = trained / method / "depth"
    assert read_results(folder)["method"] == SINGLE[method]
    train(arguments, SINGLE[method], ["depth"], tmp_path)
    assert_same_weights(folder, tmp_path)
    assert read_results(tmp_path)["history"] == read_results(folder)["history"]


def test_figures_of_runs_per_task_are_put_together(trained):
    whole = read_results(trained / "lora-stl")
    runs = {task: read_results(trained / "lora-stl" / task) for task in TASKS}
    assert whole["after"] == {task: run["after"][task] for task, run in runs.items()}
    assert whole["validation"]["loss"] == sum(run["validation"]["loss"] for run in runs.values())
    assert whole["validation"]["losses"] == {task: run["validation"]["losses"][task] for task, run in runs.items()}
    for kind, number in whole["parameters"].items():
        assert number == sum(run["parameters"][kind] for run in runs.values())
    assert whole["step_seconds"] == sum(run["step_seconds"] for run in runs.values())
    assert whole["peak_mib"] == max(run["peak_mib"] for run in runs.values())
    assert whole["history"] == {task: run["history"] for task, run in runs.items()}


@pytest.mark.parametrize("method", ["mtlora", "full-hps"])
def test_a_resumed_run_ends_with_the_same_weights(method, arguments, trained, tmp_path):
    shutil.copytree(trained / method / "checkpoint-4", tmp_path / "checkpoint-4")
    train(arguments, method, TASKS, tmp_path, "--resume_from_checkpoint", "latest")
    for part in TASKS if method in PER_TASK else ["."]:
        assert_same_weights(tmp_path / part, trained / method / part)
    assert read_results(tmp_path)["after"] == read_results(trained / method)["after"]


def test_runs_per_task_are_resumed_where_they_stopped(arguments, trained, tmp_path):
    first, second = (tmp_path / task for task in TASKS)
    shutil.copytree(trained / "lora-stl" / TASKS[0], first)
    shutil.copytree(trained / "lora-stl" / TASKS[1] / "checkpoint-4", second / "checkpoint-4")
    weights = first / "adapter_model.safetensors"
    written = weights.stat().st_mtime_ns
    train(arguments, "lora-stl", TASKS, tmp_path, "--resume_from_checkpoint", "latest")
    assert weights.stat().st_mtime_ns == written, "a finished run stays as it is"
    assert_same_weights(second, trained / "lora-stl" / TASKS[1])
    assert read_results(tmp_path)["after"] == read_results(trained / "lora-stl")["after"]
    with pytest.raises(ValueError, match=r"results.json was trained with seed=0 \(now 1\)"):
        train(arguments, "lora-stl", TASKS, tmp_path, "--resume_from_checkpoint", "latest", "--seed", 1)


def test_loras_trained_for_the_tasks_are_one_talora(trained, tmp_path):
    for method in ("mtlora", "lora-stl"):
        loras = {task: trained / method / task for task in TASKS}
        errors = peft_talora.from_loras(loras, tmp_path / method, modules_from="depth")
        assert errors.overall < 1e-5


@pytest.mark.parametrize("method", ["lora-stl", "mtlora"])
def test_tasks_see_the_same_images_where_labels_are_missing(method, arguments, tmp_path):
    generator = np.random.default_rng(0)
    for split, missing in (("train", {"segmentation": 0, "depth": 1}), ("val", {"depth": 0}), ("test", {"depth": 1})):
        for folder in ("image", *TASKS):
            (tmp_path / split / folder).mkdir(parents=True)
        for index in range(4):
            image = generator.integers(0, 255, size=(64, 64, 3), dtype=np.uint8)
            labels = {"segmentation": image[..., 0] // 128, "depth": image[..., 1].astype(np.uint16) * 10 + 500}
            Image.fromarray(image).save(tmp_path / split / "image" / f"{index}.png")
            for task, label in labels.items():
                if missing.get(task) != index:
                    Image.fromarray(label).save(tmp_path / split / task / f"{index}.png")
    run, data = tmp_path / "run", ["--data_root", tmp_path, "--val_split", "val", "--num_train_epochs", 1]
    train(arguments, method, ["segmentation=2", "depth=1"], run, *data)
    for task in TASKS:
        results = read_results(run / task)
        assert results["images"] == {"train": 4, "validation": 4, "test": 4}
        call("evaluation.py", "--adapter", run / task, "--output", tmp_path / "figures.json")
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert figures[task] == pytest.approx(results["after"][task], rel=1e-2)


@pytest.mark.parametrize("rate", [1e19, 1e30])
def test_a_loss_that_is_no_finite_number_ends_the_run(rate, arguments, tmp_path):
    with pytest.raises(FloatingPointError, match=r"the validation loss at step 3 is (nan|inf): lower `learning_rate`"):
        train(arguments, "heads", ["depth"], tmp_path, "--learning_rate", rate, "--warmup_ratio", 0)


def test_a_new_run_does_not_take_the_base_that_another_left(arguments, tmp_path, monkeypatch):
    _, base, *rest = arguments
    monkeypatch.setattr("peft_talora.small_sam.SMALL_SAM", str(base))
    weights = (tmp_path / "base" / "model.safetensors", base / "model.safetensors")
    shutil.copytree(base, weights[0].parent)
    state = load_file(weights[0])
    save_file({name: value + 1 for name, value in state.items()}, weights[0], metadata={"format": "pt"})
    train(rest, "heads", ["depth"], tmp_path, "--num_train_epochs", 1)
    assert weights[0].read_bytes() == weights[1].read_bytes()
    monkeypatch.setattr("peft_talora.small_sam.SMALL_SAM", str(tmp_path / "none"))
    train(rest, "heads", ["depth"], tmp_path, "--num_train_epochs", 1, "--resume_from_checkpoint", "latest")


def test_the_measurement_before_training_can_be_left_out(arguments, tmp_path):
    train(arguments, "heads", ["depth"], tmp_path, "--measure_before", "False", "--num_train_epochs", 1)
    assert read_results(tmp_path)["before"] == {}
    assert "| depth | rmse | - |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lora"], "`method` is 'lora'; allowed: talora"),
        (["--method", "heads", "--r", "4"], "`r` is 4, but the method 'heads'"),
        (["--method", "mtlora", "--task_order", "folded"], "`task_order` is 'folded'"),
        (["--method", "lora-stl", "--push_to_hub", "user/name"], "`push_to_hub` uploads one adapter"),
        (["--method", "lora-stl", "--tasks", "depth", "heat=1"], "'heat' is none of the kinds"),
        (["--method", "full-stl", "--resume_from_checkpoint", "x"], "with a run per task allowed: 'latest'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call("train.py", *arguments, "--output_dir", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stream_of_rows_is_trained_on_and_resumed_to_the_same_weights(arguments, tmp_path):
    """Of parquet files as the Hub has them; the first rows are held out, and a part of the split is trained on."""
    write_parquet(tmp_path / "set", {"train": 12, "val": 3}, size=(48, 64), make=partial(scene, size=(48, 64)))
    tasks = ["segmentation=13", "depth=1", "normals=3"]
    more = ["--data_root", tmp_path / "set", "--data_format", "nyuv2-13", "--streaming", "--test_split", "val"]
    more += ["--max_train_samples", 9, "--max_eval_samples", 2]
    train(arguments, "talora", tasks, tmp_path / "whole", *more)
    results = read_results(tmp_path / "whole")
    assert results["images"] == {"train": 8, "validation": 1, "test": 2}
    assert list(results["after"]) == ["segmentation", "depth", "normals"]
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "resumed" / f"checkpoint-{step}")
    train(arguments, "talora", tasks, tmp_path / "resumed", *more, "--resume_from_checkpoint", "latest")
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


def test_tasks_of_disjoint_folders_are_both_learnt(arguments, tmp_path):
    """One folder has segmentation alone, the other, of thrice the images, depth alone; they are drawn 2 : 1."""
    for task, count in (("segmentation", 6), ("depth", 18)):
        for split, number in (("train", count), ("test", 4)):
            scenes = SyntheticScenes(split, number, 64, count, [task])
            for folder in ("image", task):
                (tmp_path / task / split / folder).mkdir(parents=True)
            for sample in scenes:
                pixels = (255 * sample["image"]).byte().permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(tmp_path / task / split / "image" / f"{sample['name']}.png")
                np.save(tmp_path / task / split / task / f"{sample['name']}.npy", sample["labels"][task].numpy())
    more = ["--data_root", tmp_path / "segmentation", "--mix", tmp_path / "depth", "--mix_by", 2, 1]
    more += ["--num_train_epochs", 4, "--save_steps", 999]
    train(arguments, "talora", ["segmentation=10", "depth=1"], tmp_path / "run", *more)
    results = read_results(tmp_path / "run")
    before, after = results["before"], results["after"]
    assert after["segmentation"]["pixel_accuracy"] > 0.1 + before["segmentation"]["pixel_accuracy"]
    assert after["depth"]["absolute_error"] < 0.8 * before["depth"]["absolute_error"]


@pytest.mark.parametrize("weighting", ["uncertainty", "db-mtl"])
def test_a_resumed_run_weighs_its_tasks_as_before(weighting, arguments, tmp_path):
    train(arguments, "talora", TASKS, tmp_path / "whole", "--weighting", weighting)
    found = tmp_path / "whole" / "checkpoint-4"
    resume = ["--weighting", weighting, "--resume_from_checkpoint", found]
    train(arguments, "talora", TASKS, tmp_path / "resumed", *resume)
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")
    damaged = found / "learnt.pt"
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(OSError, match=f"{damaged}: missing, truncated or corrupt"):
        train(arguments, "talora", TASKS, tmp_path / "resumed", *resume)


@pytest.mark.parametrize("method", ["talora", "lora-stl"])
def test_a_run_that_is_asked_to_stop_saves_and_is_resumed_to_the_same_weights(method, arguments, trained, tmp_path):
    """SIGTERM in the middle of step 3 of 6: it is taken to its end; of a run per task no other one begins."""
    taken, before = results.note_step, signal.getsignal(signal.SIGTERM)

    def note_step(progress, seconds):
        taken(progress, seconds)
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "note_step", note_step)
        with pytest.raises(SystemExit) as stopped:
            train(arguments, method, TASKS, tmp_path)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    folder = tmp_path / (TASKS[0] if method in SINGLE else "")
    assert checkpoint.find_checkpoint(folder, "latest").name == "checkpoint-3"
    assert not (tmp_path / TASKS[1]).exists()
    train(arguments, method, TASKS, tmp_path, "--resume_from_checkpoint", "latest")
    for name in TASKS if method in SINGLE else [""]:
        assert_same_weights(tmp_path / name, trained / method / name)


@pytest.mark.parametrize(("method", "measuring"), [("talora", 3), ("talora", 4), ("lora-stl", 3), ("lora-stl", 4)])
def test_a_run_that_is_asked_to_stop_while_it_measures_begins_nothing_else(
    method, measuring, arguments, trained, tmp_path
):
    """SIGTERM in the last validation, the third measuring, or in the final one, whose results are written."""
    taken, measured = evaluation.evaluate, []

    def evaluate(*args, **keywords):
        measured.append(args)
        if len(measured) == measuring:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken(*args, **keywords)

    finished = measuring == 4 and method not in SINGLE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluate", evaluate)
        with nullcontext() if finished else pytest.raises(SystemExit, match="143"):
            train(arguments, method, TASKS, tmp_path)
    folder = tmp_path / (TASKS[0] if method in SINGLE else "")
    assert len(measured) == measuring
    assert (folder / "results.json").exists() == (measuring == 4)
    assert not (tmp_path / TASKS[1]).exists()
    train(arguments, method, TASKS, tmp_path, "--resume_from_checkpoint", "latest")
    for name in TASKS if method in SINGLE else [""]:
        assert_same_weights(tmp_path / name, trained / method / name)


@pytest.mark.parametrize("method", ["talora", "lora-stl"])
def test_smaller_batches_take_the_same_steps(method, arguments, tmp_path):
    """As if one image fitted into memory; the resumed run tries again, and all of them fit."""
    more = ["--gradient_accumulation_steps", 1, "--save_steps", 2]
    train(arguments, method, TASKS, tmp_path / "whole", *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "find_batch_size", lambda accelerator, size, attempt: attempt(1) or 1)
        train(arguments, method, TASKS, tmp_path / "parts", *more)
    for name in TASKS if method in SINGLE else [""]:
        whole, parts = (read_results(tmp_path / folder / name) for folder in ("whole", "parts"))
        shares = ("per_device_train_batch_size", "gradient_accumulation_steps")
        assert [parts["arguments"][share] for share in shares] == [1, 2]
        assert [entry["step"] for entry in parts["history"]] == [entry["step"] for entry in whole["history"]]
        for one, other in zip(parts["history"], whole["history"], strict=True):
            assert one["losses"] == pytest.approx(other["losses"], rel=1e-2), "dropout is drawn anew"
        shutil.rmtree(tmp_path / "parts" / name / "checkpoint-6")
    (tmp_path / "parts" / (TASKS[1] if method in SINGLE else "") / "results.json").unlink()
    train(arguments, method, TASKS, tmp_path / "parts", *more, "--resume_from_checkpoint", "latest")
    assert read_results(tmp_path / "parts" / (TASKS[1] if method in SINGLE else ""))["history"][-1]["step"] == 6
