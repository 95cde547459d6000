"""Checkpoints: what a run needs to go on as if nothing had happened, and nothing half."""

import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import get_linear_schedule_with_warmup

from peft_talora import MSamModel, TALoRAConfig, checkpoint
from peft_talora.checkpoint import (
    Progress,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_best,
    save_checkpoint,
)

TASKS = {"depth": 1, "normals": 3}


def make_run(sam_folder, seed=0, tasks=TASKS):
    """A run as the training recipe builds it, with dropout, on images drawn from PyTorch's random numbers."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(seed)
    model = get_peft_model(
        MSamModel.from_pretrained(sam_folder, tasks=tasks), TALoRAConfig(r=4, dropout=0.3, init_weights=False)
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = accelerator.prepare(get_linear_schedule_with_warmup(optimizer, 2, 20))
    accelerator.register_save_state_pre_hook(checkpoint.save_adapter_only)
    accelerator.register_load_state_pre_hook(checkpoint.load_adapter_only)
    return SimpleNamespace(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        progress=Progress(tasks=model.get_base_model().config.tasks),
    )


def train(run, steps):
    """Losses of some steps."""
    losses = []
    for _ in range(steps):
        logits = run.model(pixel_values=torch.randn(1, 3, 64, 64)).logits
        loss = sum(value.square().mean() for value in logits.values())
        run.accelerator.backward(loss)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        run.progress.step += 1
        losses.append(loss.item())
    return losses


def trained(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def save(run, folder, keep=2):
    save_checkpoint(run.accelerator, folder, run.progress, keep)


@pytest.fixture(scope="module")
def run(sam_folder):
    """A run that some tests save; its step is theirs to set."""
    run = make_run(sam_folder)
    train(run, 1)
    return run


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """A checkpoint, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("saved")
    run.progress.step = 1
    save(run, folder)
    return folder / "checkpoint-1"


def test_a_run_goes_on_as_if_nothing_had_happened(sam_folder, tmp_path):
    first = make_run(sam_folder)
    train(first, 2)
    first.progress.history.append(
        {"step": 2, "loss": 1.5, "losses": {"depth": 1.5}, "metrics": {"depth": {"rmse": 2}}}
    )
    first.progress.best_loss, first.progress.seconds = 1.5, 0.1 + 0.2
    save_best(first.accelerator, first.model, tmp_path)
    save(first, tmp_path)
    at_saving = trained(first)
    expected = train(first, 3), random.random(), np.random.rand()

    second = make_run(sam_folder, seed=1)
    train(second, 1)
    assert not all(torch.equal(a, b) for a, b in zip(trained(second).values(), at_saving.values(), strict=True))
    tasks, elsewhere = second.progress.tasks, tmp_path / "elsewhere"
    second.progress = load_checkpoint(second.accelerator, tmp_path / "checkpoint-2", elsewhere, Progress(tasks=tasks))
    best = load_file(elsewhere / "best" / "adapter_model.safetensors")
    assert_same_tensors(best, load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors"))
    assert second.progress == Progress(
        tasks=tasks, step=2, best_loss=1.5, seconds=0.1 + 0.2, history=first.progress.history
    )
    assert_same_tensors(trained(second), at_saving)
    assert (train(second, 3), random.random(), np.random.rand()) == expected
    assert_same_tensors(trained(second), trained(first))
    assert second.scheduler.get_last_lr() == first.scheduler.get_last_lr()


def test_only_what_is_trained_is_saved(run, saved):
    weights = load_file(saved / "adapter_model.safetensors")
    assert sum(value.numel() for value in weights.values()) == sum(value.numel() for value in trained(run).values())
    assert all("talora_" in name or "task_heads." in name for name in weights)
    assert {path.name for path in saved.iterdir()} == {
        "adapter_model.safetensors",
        "manifest.json",
        "optimizer.bin",
        "progress.json",
        "random_states_0.pkl",
        "scheduler.bin",
    }


def test_the_newest_are_kept(run, tmp_path):
    for step in (8, 9, 10):
        run.progress.step = step
        save(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"


def test_checkpoints_of_a_run_that_was_given_up_do_not_outlive_a_new_one(run, tmp_path):
    for step in (100, 200):
        run.progress.step = step
        save(run, tmp_path)
    run.progress.step = 7
    save(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def moments_of_a_save(monkeypatch):
    """Counts the changes of folders in a save; at the one that is set, the process is as if it were killed."""
    kill = SimpleNamespace(at=0, count=0)

    def killing(change):
        def changed(*args, **keywords):
            kill.count += 1
            if kill.count == kill.at:
                raise KeyboardInterrupt
            return change(*args, **keywords)

        return changed

    for owner, name in ((Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, killing(getattr(owner, name)))
    return kill


def test_a_step_that_is_saved_again_is_never_without_a_checkpoint(run, tmp_path, monkeypatch):
    """The only one that is kept, whichever change of folders is the last one."""
    run.progress.step = 4
    save(run, tmp_path, keep=1)
    kill = moments_of_a_save(monkeypatch)
    for at in range(1, 99):
        kill.at, kill.count = at, 0
        try:
            save(run, tmp_path, keep=1)
        except KeyboardInterrupt:
            assert checkpoint.read_progress(find_checkpoint(tmp_path, "latest")).step == 4
        else:
            break
    assert at > 4
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_at_least_one_is_kept(run, tmp_path):
    with pytest.raises(ValueError, match="`save_total_limit` is 0; allowed: 1 or more"):
        save(run, tmp_path, keep=0)
    assert list(tmp_path.iterdir()) == []


def test_a_leftover_of_a_killed_save_is_ignored_and_replaced(run, saved, tmp_path):
    leftover = tmp_path / ".saving-checkpoint-5"
    shutil.copytree(saved, leftover)
    (leftover / "junk.bin").write_bytes(b"half")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_checkpoint(tmp_path, "latest")
    run.progress.step = 5
    save(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert {path.name for path in (tmp_path / "checkpoint-5").iterdir()} == {path.name for path in saved.iterdir()}


def test_saving_the_same_step_again_replaces_it(run, tmp_path):
    run.progress.step = 3
    save(run, tmp_path)
    (tmp_path / "checkpoint-3" / "junk.bin").write_bytes(b"old")
    save(run, tmp_path)
    assert not (tmp_path / "checkpoint-3" / "junk.bin").exists()


def test_a_failed_save_leaves_the_older_checkpoint(run, saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "checkpoint-1")
    run.progress.step = 2
    monkeypatch.setattr(checkpoint, "write_json", lambda file, content: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(run, tmp_path)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"


def test_half_removed_and_foreign_folders_are_no_checkpoints(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoint-4")
    for name in ("checkpoint-9", "checkpoint-best", "best"):
        (tmp_path / name).mkdir()
        shutil.copy(saved / "optimizer.bin", tmp_path / name)
    shutil.copy(saved / "manifest.json", tmp_path / "checkpoint-best")
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-4"]


def test_a_checkpoint_is_found_by_path(saved, tmp_path):
    assert find_checkpoint(tmp_path, str(saved)) == saved
    with pytest.raises(ValueError, match=r"'latest', but .*nowhere holds no checkpoint"):
        find_checkpoint(tmp_path / "nowhere", "latest")
    with pytest.raises(ValueError, match=r"nothing is no checkpoint; it has no manifest\.json"):
        find_checkpoint(tmp_path, str(tmp_path / "nothing"))


@pytest.mark.parametrize("other", [{"depth": 1, "edges": 1}, {"normals": 3, "depth": 1}, {"depth": 1}])
def test_other_tasks_than_trained_are_refused(other, run, saved):
    tasks = [{"name": name, "kind": name, "channels": channels} for name, channels in other.items()]
    before = trained(run)
    with pytest.raises(ValueError, match="trained on the tasks") as error:
        load_checkpoint(run.accelerator, saved, saved.parent, Progress(tasks=tasks))
    assert str(TASKS) in str(error.value)
    assert str(other) in str(error.value)
    assert_same_tensors(trained(run), before)


@pytest.mark.parametrize("kept", [0, 100, -1000])
def test_truncated_weights_are_named(kept, run, saved, tmp_path):
    damaged = Path(shutil.copytree(saved, tmp_path / "checkpoint-1"))
    file = damaged / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(OSError, match=r"checkpoint-1/adapter_model\.safetensors: missing, truncated or corrupt"):
        load_checkpoint(run.accelerator, damaged, tmp_path, Progress(tasks=run.progress.tasks))


def test_other_arguments_than_trained_are_refused(run, saved, tmp_path):
    run.progress.step, run.progress.arguments = 5, {"learning_rate": 0.1, "seed": 0}
    save(run, tmp_path)
    run.progress.arguments = {}
    now = Progress(tasks=run.progress.tasks, arguments={"learning_rate": 0.2, "seed": 0})
    with pytest.raises(ValueError, match=r"was trained with learning_rate=0\.1 \(now 0\.2\): resume with the same"):
        load_checkpoint(run.accelerator, tmp_path / "checkpoint-5", tmp_path, now)


@pytest.mark.parametrize("name", ["random_states_0.pkl", "optimizer.bin", "scheduler.bin"])
def test_damaged_states_are_named(name, run, saved, tmp_path):
    damaged = Path(shutil.copytree(saved, tmp_path / "checkpoint-1"))
    (damaged / name).write_bytes((damaged / name).read_bytes()[:100])
    with pytest.raises(OSError, match=rf"{name}: missing, truncated or corrupt"):
        load_checkpoint(run.accelerator, damaged, tmp_path, Progress(tasks=run.progress.tasks))


@pytest.mark.parametrize("kept", [None, 100])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "optimizer_1.bin", "scheduler_1.bin"])
def test_states_of_a_run_with_two_optimizers_are_named(name, kept, tmp_path):
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 1)
    optimizers = [torch.optim.AdamW([parameter]) for parameter in model.parameters()]
    accelerator.prepare(model, *optimizers, *(get_linear_schedule_with_warmup(o, 2, 20) for o in optimizers))
    save_checkpoint(accelerator, tmp_path, Progress(tasks=[], step=1), keep=1)
    load_checkpoint(accelerator, tmp_path / "checkpoint-1", tmp_path, Progress(tasks=[]))
    file = tmp_path / "checkpoint-1" / name
    content = file.read_bytes()
    file.unlink()
    if kept is not None:
        file.write_bytes(content[:kept])
    with pytest.raises(OSError, match=name.partition(".")[0]):
        load_checkpoint(accelerator, tmp_path / "checkpoint-1", tmp_path, Progress(tasks=[]))


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.bin", "progress.json", "random_states_0.pkl"]
)
def test_one_changed_bit_is_named_before_anything_is_loaded(name, run, saved, tmp_path):
    """Each of the files could still be read."""
    damaged = Path(shutil.copytree(saved, tmp_path / "checkpoint-1"))
    content = bytearray((damaged / name).read_bytes())
    content[-3] ^= 1
    (damaged / name).write_bytes(content)
    before = trained(run)
    with pytest.raises(OSError, match=f"{name}: missing, truncated or corrupt"):
        load_checkpoint(run.accelerator, damaged, tmp_path, Progress(tasks=run.progress.tasks))
    assert_same_tensors(trained(run), before)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"progress.json": "0"}'])
def test_a_damaged_manifest_is_named(content, run, saved, tmp_path):
    damaged = Path(shutil.copytree(saved, tmp_path / "checkpoint-1"))
    (damaged / "manifest.json").write_text(content)
    with pytest.raises(OSError, match=r"checkpoint-1/.*json: missing, truncated or corrupt"):
        load_checkpoint(run.accelerator, damaged, tmp_path, Progress(tasks=run.progress.tasks))


def test_batches_of_an_epoch_are_shared_out_anew(run, tmp_path):
    def shares(processes, batch, accumulated):
        return dict(zip(checkpoint.SHARES, (processes, batch, accumulated), strict=True))

    tasks = run.progress.tasks
    began = Progress(tasks=tasks, arguments=shares(2, 2, 2), step=5, batch=6)  # steps of 8 images
    save_checkpoint(run.accelerator, tmp_path, began, keep=2)

    def load(*now):
        wanted = Progress(tasks=tasks, arguments=shares(*now))
        return load_checkpoint(run.accelerator, tmp_path / "checkpoint-5", tmp_path, wanted, checkpoint.SHARES)

    assert [load(*now).batch for now in ((1, 8, 1), (4, 1, 2), (1, 1, 8))] == [3, 6, 24]
    assert load(1, 8, 1).arguments == shares(1, 8, 1)
    with pytest.raises(
        ValueError, match=r"has 8 images a step, and num_processes=1, .* make 4: give such that make 8"
    ):
        load(1, 4, 1)
