"""The recipes, as processes of their own on a tiny SAM: trained, evaluated, killed and resumed, on two processes."""

import importlib.util
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import peft_talora
from peft_talora import checkpoint
from peft_talora.stopping import StopSignal

RECIPES = Path(__file__).parent.parent / "recipes"
TRAIN, EVALUATE = str(RECIPES / "train.py"), str(RECIPES / "evaluation.py")
PYTHON = [sys.executable]
TASKS = ["segmentation", "depth", "normals"]
SMALL = ["--num_images", "20", "--per_device_train_batch_size", "2", "--num_train_epochs", "2", "--num_threads", "1"]
SMALL += ["--learning_rate", "1e-3"]
# Random states matter: dropout and augmentation. 18 training images make 9 batches and 4 steps an epoch, so the
# checkpoints of steps 3 and 6 lie within epochs.
REPEATABLE = ["--dropout", "0.1", "--gradient_accumulation_steps", "2", "--save_steps", "3"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def start(command, *arguments):
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    """Exit code and output; a process that hangs is killed with all it started."""
    try:
        output, _ = process.communicate(timeout=240)
    except BaseException:
        process.terminate()  # torchrun ends its workers then, which a kill of the group would not reach
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def run(command, *arguments):
    code, output = finish(start(command, *arguments))
    assert code == 0, output
    return output


def load_recipe(path):
    """A recipe as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the parser of arguments looks their types up
    spec.loader.exec_module(module)
    return module


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def assert_same_weights(folder, other):
    weights, others = (load_file(f / "adapter_model.safetensors") for f in (folder, other))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


@pytest.fixture(scope="module")
def small(sam_folder):
    return ["--base", sam_folder, *SMALL]


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """The folders of two runs of the same arguments, at the same time: one goes through, one is killed.

    The kill comes as soon as the second checkpoint is there.
    """
    trained, killed = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("killed")
    launch = [*PYTHON, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    through = start(launch, TRAIN, *small, *REPEATABLE, "--output_dir", trained)
    victim = start(PYTHON, TRAIN, *small, *REPEATABLE, "--output_dir", killed)
    try:
        while not (killed / "checkpoint-6").exists():
            assert victim.poll() is None, victim.communicate()[0]
            time.sleep(0.005)
    finally:
        os.killpg(victim.pid, signal.SIGKILL)
        victim.communicate()
        code, output = finish(through)
    assert code == 0, output
    return trained, killed


@pytest.fixture(scope="module")
def trained(runs):
    return runs[0]


def test_training_writes_all_that_it_promises(trained):
    assert {path.name for path in trained.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "best",
        "checkpoint-6",
        "checkpoint-8",
        "msam_config.json",
        "predictions.png",
        "preprocessor_config.json",
        "results.json",
    }
    picture = np.asarray(Image.open(trained / "predictions.png").convert("RGB"))
    assert picture.std() > 20
    results = read_results(trained)
    assert list(results["before"]) == list(results["after"]) == TASKS
    for task, metrics in results["after"].items():
        assert metrics.keys() == results["before"][task].keys()
        assert all(math.isfinite(value) for value in metrics.values())
    assert results["parameters"]["all"] > sum(results["parameters"][kind] for kind in ("adapter", "heads", "other"))
    assert results["parameters"].pop("encoder") == 0 < min(results["parameters"].values())
    best = results["history"][-1]
    assert results["validation"] == {name: best[name] for name in ("metrics", "losses", "loss")}
    assert results["method"] == "talora"
    assert 0 < results["step_seconds"] < 10
    assert results["peak_mib"] > 100
    assert results["images"] == {"train": 18, "validation": 2, "test": 2}
    assert results["images_per_second"] > 0
    assert results["seed"] == 0
    assert results["arguments"]["dropout"] == 0.1
    assert set(results["versions"]) == {"peft_talora", "torch", "transformers", "peft", "accelerate"}
    assert [entry["step"] for entry in results["history"]] == [4, 8]
    card = (trained / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"
    assert "| depth | rmse |" in card


def test_training_lowers_the_losses(trained):
    results = read_results(trained)
    first, last = (entry["losses"] for entry in results["history"])
    assert all(last[task] < first[task] for task in TASKS)
    assert results["best_step"] == 8
    before, after = results["before"], results["after"]
    assert after["depth"]["rmse"] < before["depth"]["rmse"]
    assert after["normals"]["mean_angle"] < before["normals"]["mean_angle"]
    assert after["segmentation"]["pixel_accuracy"] > before["segmentation"]["pixel_accuracy"]


def test_evaluation_repeats_the_figures_to_the_last_digit(trained, tmp_path):
    output = run(PYTHON, EVALUATE, "--adapter", trained, "--output", tmp_path / "figures.json")
    after = read_results(trained)["after"]
    assert json.loads((tmp_path / "figures.json").read_text()) == after
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert repr(after["depth"]["rmse"]) in output


def test_a_killed_run_resumes_to_the_same_weights(small, runs):
    trained, killed = runs
    assert {path.name for path in killed.iterdir()} >= {"checkpoint-3", "checkpoint-6"}
    assert not (killed / "results.json").exists()
    progress = json.loads((killed / "checkpoint-6" / "progress.json").read_text())
    assert (progress["epoch"], progress["batch"]) == (1, 4)
    resume = ["--output_dir", killed, "--resume_from_checkpoint", "latest"]
    output = run(PYTHON, TRAIN, *small, *REPEATABLE, *resume)
    assert "checkpoint-6: step 6 of 8" in output
    assert_same_weights(killed, trained)
    resumed, uninterrupted = read_results(killed), read_results(trained)
    for key in ("before", "after", "history", "best_step"):
        assert resumed[key] == uninterrupted[key], key


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weighting", "fair"], "`weighting` is 'fair'; allowed: equal, fixed"),
        (
            ["--weighting", "pcgrad", "--updates", "alternating"],
            "with 'talora' and alternating updates allowed: equal",
        ),
        (["--weighting", "gls", "--task_order", "folded"], "`task_order` is 'folded'; a weighting that needs"),
        (["--weighting", "dwa", "--method", "lora-stl"], "`weighting` is 'dwa'; with 'lora-stl'"),
    ],
)
def test_weightings_that_do_not_go_are_refused(flags, message, small, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [TRAIN, *small, *flags, "--output_dir", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(TRAIN).main()


def test_resuming_with_other_tasks_is_refused(small, trained):
    weights = (trained / "adapter_model.safetensors").read_bytes()
    arguments = [*small, "--tasks", "depth", "edges", "--output_dir", trained, "--resume_from_checkpoint", "latest"]
    code, output = finish(start(PYTHON, TRAIN, *arguments))
    assert code != 0
    trained_on, given = "{'segmentation': 10, 'depth': 1, 'normals': 3}", "{'depth': 1, 'edges': 1}"
    assert f"was trained on the tasks {trained_on}, this run has {given}" in output
    assert (trained / "adapter_model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "depth", "heat"], "task 'heat': write name=channels or name=kind:channels"),
        (["--tasks", "depth", "heat=1"], "task 'heat=1': 'heat' is none of the kinds segmentation, depth"),
        (["--tasks", "segmentation=2"], "task 'segmentation' has 2 channels; generated scenes need 10"),
        (["--updates", "both"], "`updates` is 'both'; with 'talora' allowed: alternating, joint"),
        (["--method", "lora-stl", "--updates", "alternating"], "with 'lora-stl' allowed: joint"),
        (["--task_order", "both"], "`task_order` must be 'folded', 'sequential' or 'auto'; got 'both'"),
        (["--per_device_train_batch_size", "19"], "18 training images do not fill a step of 19"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, small, tmp_path, monkeypatch):
    threads = ["--num_threads", str(torch.get_num_threads())]  # of this process, where it runs for speed
    arguments = [*small, *threads, *arguments, "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [TRAIN, *arguments])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match=re.escape(message)):
        runpy.run_path(TRAIN, run_name="__main__")
    assert list(tmp_path.iterdir()) == []


def make_folder_dataset(root):
    """Ten images of 48 × 64 and 40 × 40 pixels in `train`, three in `test`: a bright rectangle on dark ground.

    Classes 0 and 1, and 9 around the border for "no label". The first image of `train` has a depth, and no
    segmentation; no other has a depth.
    """
    generator = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 3)):
        for name in ("image", "segmentation", "depth"):
            (root / split / name).mkdir(parents=True)
        for index in range(count):
            height, width = (48, 64) if index % 2 else (40, 40)
            classes = np.zeros((height, width), dtype=np.uint8)
            top, left = generator.integers(4, 16, size=2)
            classes[top : top + 16, left : left + 20] = 1
            image = generator.integers(0, 60, size=(height, width, 3)) + 150 * classes[..., None]
            classes[:2] = classes[-2:] = 9
            Image.fromarray(image.astype(np.uint8)).save(root / split / "image" / f"{index}.png")
            if split == "train" and index == 0:
                Image.fromarray(np.full((height, width), 1500, dtype=np.uint16)).save(root / split / "depth" / "0.png")
            else:
                Image.fromarray(classes).save(root / split / "segmentation" / f"{index}.png")


def test_a_folder_of_images_with_arguments_from_a_file(small, tmp_path):
    make_folder_dataset(tmp_path / "data")
    file = {
        "data_root": str(tmp_path / "data"),
        "tasks": ["segmentation=2", "edges=1", "depth=1"],
        "derive_edges": True,
        "ignored_class": 9,
        "val_fraction": 0.3,
        "weight_decay": "1e-5",
        "augment": False,
        "num_train_epochs": 5,
        "task_order": "folded",
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(file))
    run(PYTHON, TRAIN, "--config", tmp_path / "run.yaml", *small, "--seed", "1")
    results = read_results(tmp_path / "run")
    arguments = results["arguments"]
    assert {name: arguments[name] for name in file} == {**file, "weight_decay": 1e-5, "num_train_epochs": 2}
    assert results["task_order"] == "folded"
    assert results["images"] == {"train": 7, "validation": 3, "test": 3}
    assert results["after"]["segmentation"]["miou"] > 0
    assert results["after"]["edges"].keys() == results["before"]["edges"].keys()
    assert set(results["after"]["depth"].values()) == {None}, "no test image has a depth"
    # The image with a depth is trained on; which adapter is best hangs on the tasks that have validation labels.
    assert all(math.isfinite(entry["loss"]) for entry in results["history"])
    assert all(list(entry["losses"]) == ["segmentation", "edges"] for entry in results["history"])
    model = peft_talora.load(tmp_path / "run")
    assert model.get_base_model().task_names == ["segmentation", "edges", "depth"]


def convert(monkeypatch, capsys, *arguments) -> str:
    """Run recipes/convert.py in this process; what it printed."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    runpy.run_path(str(RECIPES / "convert.py"), run_name="__main__")
    return capsys.readouterr().out


def test_an_adapter_is_converted_there_and_back_and_compressed(trained, tmp_path, monkeypatch, capsys):
    for task in TASKS:
        convert(monkeypatch, capsys, "to_lora", "--adapter", trained, "--task", task, "--output", tmp_path / task)
    loras = ["--loras", *(f"{task}={tmp_path / task}" for task in TASKS)]
    printed = convert(monkeypatch, capsys, "from_loras", *loras, "--output", tmp_path / "all")
    assert float(printed.split()[-1]) < 1e-12
    expected, found = (peft_talora.load(folder) for folder in (trained, tmp_path / "all"))
    pixel_values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, logits in expected(pixel_values=pixel_values).logits.items():
            torch.testing.assert_close(found(pixel_values=pixel_values).logits[name], logits, atol=1e-4, rtol=1e-4)
    assert peft_talora.load_image_processor(tmp_path / "all").size == {"longest_edge": 64}
    printed = convert(monkeypatch, capsys, "compress", "--adapter", trained, "--r", 2, "--output", tmp_path / "small")
    assert 0 < float(printed.split()[-1]) < 1
    assert peft_talora.load(tmp_path / "small").peft_config["default"].r == 2
    convert(monkeypatch, capsys, "compress", "--adapter", tmp_path / "small", "--r", 1, "--output", tmp_path / "small")
    assert peft_talora.load_image_processor(tmp_path / "small").size == {"longest_edge": 64}  # in place, too
    curve = ["curve", *loras, "--ranks", 1, 16, "--output", tmp_path / "curve.png"]
    rows = [line.split() for line in convert(monkeypatch, capsys, *curve).splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "16"]
    assert float(rows[1][1]) < 1e-6 < float(rows[0][1])  # one adapter's tasks share its 16 columns
    with pytest.raises(ValueError, match="`ranks` must be"):
        convert(monkeypatch, capsys, *curve[:-4], 0, *curve[-3:])
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (640, 360)


def test_alternating_updates_are_a_clipped_step_per_task(sam_folder, tmp_path):
    train = load_recipe(TRAIN)
    args = train.TrainArguments(base=str(sam_folder), output_dir=str(tmp_path), num_images=3, num_threads=1)
    args.learning_rate, args.updates, args.max_grad_norm, args.weight_decay = 1e-3, "alternating", 0.5, 0.1
    args.per_device_train_batch_size = 2
    run, by_hand = (train.build(args, StopSignal()) for _ in range(2))
    (batch,) = by_hand.loader
    model, kept = by_hand.model, {name: p.clone() for name, p in run.model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1, fused=True)
    norms = []
    for task in TASKS:
        labels = {task: batch["labels"][task]}
        output = model(batch["pixel_values"], tasks=[task], labels=labels, original_sizes=batch["original_sizes"])
        (output.losses[task] * {"normals": 4}.get(task, 1)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
    assert max(norms) > 0.5, "gradients are clipped"
    with train.tqdm(disable=True) as bar:
        train.train_epoch(run, bar)
    assert (run.progress.step, run.progress.images) == (1, 2)
    expected = dict(model.named_parameters())
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad != torch.equal(parameter, kept[name]) or not expected[name].any(), name


@pytest.fixture(scope="module")
def by_two(small, tmp_path_factory):
    """Folders and outputs of runs by two processes: of both orders, and with an optimiser step per task."""
    torchrun = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", TRAIN, *small]
    torchrun += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--save_steps", "6"]
    # Adam makes whole steps out of rounding where a gradient is tiny, so the orders stay close at a small rate only.
    torchrun += ["--learning_rate", "3e-4"]
    changes = {order: ["--updates", "joint", "--task_order", order] for order in ("sequential", "folded")}
    changes["alternating"] = ["--updates", "alternating"]
    changes["folded"] += ["--report_to", "tensorboard", "--logging_steps", 4, "--cosine_steps", 4, "--sample_steps", 8]
    configured = [*PYTHON, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    configured += [RECIPES / "accelerate" / "cpu_2.yaml", *torchrun[torchrun.index(TRAIN) :]]
    commands = dict.fromkeys(changes, torchrun) | {"alternating": configured}
    folders = {name: tmp_path_factory.mktemp(name) for name in changes}
    outputs = {name: run(commands[name], *flags, "--output_dir", folders[name]) for name, flags in changes.items()}
    return folders, outputs


@pytest.mark.parametrize("order", ["sequential", "folded"])
def test_two_processes_train_to_the_end_and_write_one_result(order, by_two):
    folder, output = by_two[0][order], by_two[1][order]
    results = read_results(folder)
    assert (results["processes"], results["task_order"]) == (2, order)
    assert [entry["step"] for entry in results["history"]] == [4, 8]
    assert output.count("before training") == output.count("Adapter, results.json and predictions.png are in") == 1
    if order == "folded":
        events = EventAccumulator(str(folder / "logs" / "train"))
        events.Reload()
        assert [event.step for event in events.Scalars("cosine/depth-normals")] == [4, 8]
        assert [path.name for path in (folder / "samples").iterdir()] == ["step-000008.png"]
    states = {path.name for path in (folder / "checkpoint-6").glob("random_states_*")}
    assert states == {"random_states_0.pkl", "random_states_1.pkl"}
    peft_talora.load(folder)


def test_two_processes_learn_the_same_in_both_orders(by_two):
    sequential, folded = (read_results(by_two[0][order]) for order in ("sequential", "folded"))
    assert sequential["before"]["depth"] == pytest.approx(folded["before"]["depth"], rel=1e-4)
    for one, other in zip(sequential["history"], folded["history"], strict=True):
        # A percent: where a gradient is rounding alone, such as of the keys' biases, Adam makes whole steps of it.
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-2)


@pytest.fixture(scope="module")
def by_one(small, tmp_path_factory):
    """The folder of a run of the same steps by one process, and its flags."""
    folder = tmp_path_factory.mktemp("one")
    flags = ["--learning_rate", 3e-4, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4]
    run(PYTHON, TRAIN, *small, *flags, "--output_dir", folder)
    return folder, flags


def test_two_processes_take_the_steps_per_task_of_one(by_two, by_one):
    one, two = (read_results(folder)["history"] for folder in (by_one[0], by_two[0]["alternating"]))
    joint = read_results(by_two[0]["sequential"])["history"]
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two] == [4, 8]
    assert two[-1]["losses"] == pytest.approx(one[-1]["losses"], rel=1e-2)
    # Of depth, whose gradients are more than rounding from the first step on.
    depth = {name: history[-1]["losses"]["depth"] for name, history in (("one", one), ("two", two), ("joint", joint))}
    assert depth["two"] == pytest.approx(depth["one"], rel=1e-3)
    assert depth["two"] != pytest.approx(depth["joint"], rel=3e-3)


def test_one_process_goes_on_where_two_stopped(by_two, by_one, small, tmp_path, monkeypatch, capsys):
    """The steps that are left are those of the same images, at the same learning rates."""
    found = by_two[0]["alternating"] / "checkpoint-6"
    resume = ["--resume_from_checkpoint", found, "--output_dir", tmp_path, "--num_threads", torch.get_num_threads()]

    def go_on(*flags):
        monkeypatch.setattr(sys, "argv", [TRAIN, *map(str, [*small, *by_one[1], *resume, *flags])])
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        load_recipe(TRAIN).main()

    with pytest.raises(ValueError, match=r"with num_processes=2 \(now 1\): resume .*, or share a step out otherwise"):
        go_on()
    with pytest.raises(ValueError, match=r"has 4 images a step, and .* make 8: give such that make 4"):
        go_on("--allow_reshard", "--per_device_train_batch_size", 2)
    go_on("--allow_reshard")
    assert "checkpoint-6: step 6 of 8" in capsys.readouterr().out
    one, resumed = (read_results(folder)["history"] for folder in (by_one[0], tmp_path))
    assert [entry["step"] for entry in resumed] == [4, 8]
    assert resumed[-1]["losses"] == pytest.approx(one[-1]["losses"], rel=1e-2)


def test_two_processes_go_on_where_one_stopped(by_one, small, tmp_path):
    """Over a whole epoch: the second process has no random state yet."""
    torchrun = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", TRAIN]
    resume = ["--resume_from_checkpoint", by_one[0] / "checkpoint-4", "--allow_reshard", "--output_dir", tmp_path]
    output = run(torchrun, *small, *by_one[1], "--gradient_accumulation_steps", 2, *resume)
    assert "checkpoint-4: step 4 of 8" in output
    one, resumed = (read_results(folder)["history"] for folder in (by_one[0], tmp_path))
    assert [entry["step"] for entry in resumed] == [4, 8]
    assert resumed[-1]["losses"] == pytest.approx(one[-1]["losses"], rel=1e-2)


def test_two_processes_stop_together_if_one_is_asked_to(small, tmp_path):
    launch = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", TRAIN, *small]
    launched = start(launch, "--per_device_train_batch_size", 1, "--num_train_epochs", 99, "--output_dir", tmp_path)
    try:
        while not (tmp_path / "checkpoint-9").exists():
            assert launched.poll() is None, launched.communicate()[0]
            time.sleep(0.05)
        children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGTERM)
    finally:
        _, output = finish(launched)
    assert output.count("stopped after step") == 1
    assert "exitcode  : 143" in output
    stopped = int(re.search(r"stopped after step (\d+)", output)[1])
    assert checkpoint.find_checkpoint(tmp_path, "latest").name == f"checkpoint-{stopped}"


def test_a_run_with_workers_saves_when_all_its_processes_are_asked_to_stop(small, tmp_path):
    """A scheduler of jobs sends SIGTERM to the group."""
    process = start(
        PYTHON, TRAIN, *small, "--num_train_epochs", 99, "--dataloader_num_workers", 1, "--output_dir", tmp_path
    )
    try:
        while not (tmp_path / "checkpoint-9").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
    finally:
        code, output = finish(process)
    assert code == 143, output
    stopped = int(re.search(r"stopped after step (\d+)", output)[1])
    assert checkpoint.find_checkpoint(tmp_path, "latest").name == f"checkpoint-{stopped}"


def test_every_configuration_of_accelerate_is_one():
    files = sorted((RECIPES / "accelerate").glob("*.yaml"))
    assert {file.stem: load_config_from_file(str(file)).num_processes for file in files} == {
        "cpu_2": 2,
        "fsdp": 8,
        "gpu_1": 1,
        "gpu_8": 8,
        "nodes_2": 16,
        "zero2": 8,
    }
    for file in files:
        assert ("Untested" in file.read_text()) == (file.stem != "cpu_2"), file


def test_speed_is_measured_of_equal_results_and_figures_of_before_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")  # else the recipe starts itself anew with it
    sizes = [f"--num_threads={torch.get_num_threads()}"]
    sizes += [f"--{name}=32" for name in ("image_size", "inference_image_size", "layer_image_size")]
    for figure in ("P2", "P7", "P9"):
        arguments = ["--only", figure, "--output", tmp_path / "speed.json", "--num_layers", 1, "--rounds", 1, *sizes]
        monkeypatch.setattr(sys, "argv", ["benchmark_speed.py", *map(str, arguments)])
        runpy.run_path(str(RECIPES / "benchmark_speed.py"), run_name="__main__")
    figures = json.loads((tmp_path / "speed.json").read_text())
    assert list(figures) == ["P2", "P7", "P9"]
    for figure in figures.values():
        assert figure.keys() >= {"value", "range", "goal", "setup"}
        assert figure["range"][0] <= figure["value"] <= figure["range"][1]
    assert figures["P9"]["value"] == pytest.approx(
        (16 * (768 + 2304) + 16 * 16 * 4 + 4 * 4) / (4 * 16 * (768 + 2304)), abs=1e-4
    )
    assert "P2: " in capsys.readouterr().out
