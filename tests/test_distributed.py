"""Two processes: gradients of data parallelism, and sharded models (FSDP1, FSDP2), against one process. float64."""

import gc
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import IMAGE_SIZE
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.models.sam.modeling_sam import SamVisionLayer

from peft_talora import MSamModel, TALoRAConfig, engine
from peft_talora.methods import METHODS
from peft_talora.methods.adapters import AdapterArguments

TASKS = {"segmentation": 4, "depth": 1, "normals": 3}  # not in alphabetical order
PROCESSES, BATCH = 2, 4  # of all processes together
MIXED = ["depth", "depth", "normals", "segmentation"]  # each process lacks a task that the other has
DATA_PARALLEL = [(batch, recomputed) for batch in ("folded", "mixed") for recomputed in (False, True)]
SHARDINGS = ("FSDP1", "FSDP2")
METHODS_IN_PARALLEL = [(name, way) for name in ("lora-hps", "full-hps", "mtlora") for way in ("DDP", "FSDP2")]


def build(sam_folder: str) -> PeftModel:
    """An adapted mSAM whose tasks differ; the same one at every call."""
    torch.manual_seed(0)
    base = MSamModel.from_pretrained(sam_folder, tasks=TASKS).double()
    model = get_peft_model(base, TALoRAConfig(r=4, init_weights=False, train_norms=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(4 if "talora_core" in name else 1).add_(0.05 * torch.randn_like(parameter))
    return model.train()


def images() -> torch.Tensor:
    shape = (BATCH, 3, IMAGE_SIZE, IMAGE_SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss(model, batch: str, samples: range) -> torch.Tensor:
    """Mean over the samples of a linear loss with other weights for every sample, task and pixel."""
    generator = torch.Generator().manual_seed(2)
    size = IMAGE_SIZE // 2  # four times the grid of patches of 8
    weights = {
        name: torch.randn(BATCH, channels, size, size, generator=generator, dtype=torch.float64) / size
        for name, channels in TASKS.items()
    }
    ids = [MIXED[sample] for sample in samples] if batch == "mixed" else None
    logits = model(pixel_values=images()[samples], task_ids=ids).logits
    total = 0
    for name, maps in logits.items():
        rows = [sample for sample in samples if batch == "folded" or MIXED[sample] == name]
        total = total + (maps * weights[name][rows]).sum()
    return total / len(samples)


def gradients(model) -> dict[str, torch.Tensor]:
    names = model.named_parameters()
    return {n.removeprefix("module."): p.grad for n, p in names if p.requires_grad and p.grad is not None}


def recompute(model: PeftModel) -> None:
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def gradients_in_parallel(sam_folder: str, batch: str, recomputed: bool, samples: range) -> dict[str, torch.Tensor]:
    model = build(sam_folder)
    if recomputed:
        recompute(model)
    parallel = DistributedDataParallel(model, find_unused_parameters=batch == "mixed")
    for _ in range(2):  # the second pass fails where the first one left the reducer waiting
        parallel.zero_grad()
        loss(parallel, batch, samples).backward()
    return gradients(parallel)


def shard(model: PeftModel, sharding: str):
    if sharding == "FSDP1":
        return FullyShardedDataParallel(
            model,
            use_orig_params=True,
            auto_wrap_policy=ModuleWrapPolicy({SamVisionLayer}),
            device_id=torch.device("cpu"),
        )
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model.get_base_model().vision_encoder.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_sharded(sam_folder: str, sharding: str, samples: range, folder: Path) -> dict:
    """Forward, one step, and the full state dict as PEFT saves it."""
    model = build(sam_folder)
    sharded = shard(model, sharding)
    optimizer = torch.optim.SGD([p for p in sharded.parameters() if p.requires_grad], lr=0.1)
    with torch.no_grad():
        before = dict(sharded(pixel_values=images()[samples]).logits)
    loss(sharded, "folded", samples).backward()
    optimizer.step()
    with torch.no_grad():
        after = dict(sharded(pixel_values=images()[samples]).logits)
    full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        # FSDP1 renames the modules that it wraps, so PEFT does not find the norms there: an unsharded twin names them.
        named = build(sam_folder) if sharding == "FSDP1" else model
        state = get_peft_model_state_dict(named, state_dict=full, save_embedding_layers=False)
        save_file(state, folder / f"{sharding}.safetensors")
    return {"before": before, "after": after}


def gradients_of_method(name: str, sam_folder: str, samples: range, parallel: str | None) -> dict[str, torch.Tensor]:
    """Of a method of the training recipe, in its own order of tasks."""
    torch.manual_seed(0)
    method, base = METHODS[name], MSamModel.from_pretrained(sam_folder, tasks=TASKS).double()
    model = method.add(base, AdapterArguments(method=name, r=4))
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.add_(0.05 * torch.randn_like(parameter))
    order = method.resolve_order("auto", torch.device("cpu"))
    wrapped = model
    if parallel == "DDP":
        wrapped = DistributedDataParallel(model, find_unused_parameters=order == "sequential")
    elif parallel is not None:
        wrapped = shard(model, parallel)
    for group in engine.task_groups(list(TASKS), order):
        method.activate(model, group)
        logits = wrapped(pixel_values=images()[samples], tasks=group).logits
        sum(maps.square().sum() for maps in logits.values()).div(len(samples)).backward()
    found = gradients(wrapped)
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}


def work(rank: int, sam_folder: str, folder: str) -> None:
    """What each process does; the first one writes what the tests look at."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    samples = range(BATCH)[rank * BATCH // PROCESSES : (rank + 1) * BATCH // PROCESSES]
    found = {key: gradients_in_parallel(sam_folder, *key, samples) for key in DATA_PARALLEL}
    for name, parallel in METHODS_IN_PARALLEL:
        found[name, parallel] = gradients_of_method(name, sam_folder, samples, parallel)
    for sharding in SHARDINGS:
        found[sharding] = train_sharded(sam_folder, sharding, samples, Path(folder))
    torch.save(found, f"{folder}/found-{rank}.pt")
    gc.collect()  # whatever holds the process group must be gone before the group is
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(sam_folder):
    """What two processes found, each its own part, and the folder they wrote to."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(sam_folder, folder), nprocs=PROCESSES)
        yield [torch.load(f"{folder}/found-{rank}.pt") for rank in range(PROCESSES)], Path(folder)


def largest_difference(found: dict, expected: dict) -> float:
    """Over all tensors, relative to the largest magnitude of all."""
    assert found.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    assert scale > 1e-2
    return float(max((found[name] - value).abs().max() for name, value in expected.items()) / scale)


@pytest.mark.parametrize(("batch", "recomputed"), DATA_PARALLEL)
def test_gradients_of_two_processes_are_those_of_one(two, sam_folder, batch, recomputed):
    model = build(sam_folder)
    loss(model, batch, range(BATCH)).backward()
    expected = gradients(model)
    for process in two[0]:
        difference = largest_difference(process[batch, recomputed], expected)
        assert difference <= 1e-6, difference
    rows = {name.split(".")[-1] for name, grad in expected.items() if ".talora_task." in name and grad.any()}
    assert rows == set(TASKS), "every task is somewhere in the batch"


@pytest.mark.parametrize(("name", "parallel"), METHODS_IN_PARALLEL)
def test_every_method_has_the_gradients_of_one_process(two, sam_folder, name, parallel):
    expected = gradients_of_method(name, sam_folder, range(BATCH), None)
    for process in two[0]:
        difference = largest_difference(process[name, parallel], expected)
        assert difference <= 1e-6, difference


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_sharded_model_predicts_and_learns_as_the_whole_one(two, sam_folder, sharding):
    model = build(sam_folder)
    with torch.no_grad():
        before = dict(model(pixel_values=images()).logits)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss(model, "folded", range(BATCH)).backward()
    optimizer.step()
    with torch.no_grad():
        after = dict(model(pixel_values=images()).logits)
    assert max((after[name] - before[name]).abs().max() for name in TASKS) > 0.1
    for name in TASKS:
        for moment, expected in (("before", before), ("after", after)):
            found = torch.cat([process[sharding][moment][name] for process in two[0]])
            torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_full_state_dict_of_a_sharded_model_saves_and_loads(two, sam_folder, sharding, tmp_path):
    processes, folder = two
    reference = build(sam_folder)
    reference.peft_config["default"].save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / f"{sharding}.safetensors").read_bytes())
    base = MSamModel.from_pretrained(sam_folder, tasks=TASKS).double()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    state = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert state.keys() == get_peft_model_state_dict(reference, save_embedding_layers=False).keys()
    with torch.no_grad():
        logits = loaded(pixel_values=images()).logits
    for name in TASKS:
        found = torch.cat([process[sharding]["after"][name] for process in processes])
        torch.testing.assert_close(logits[name], found, rtol=1e-12, atol=1e-12)
