"""The training recipe on a model that FSDP2 splits over two processes, and what it refuses there."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from test_recipes import SMALL, TRAIN, load_recipe, read_results, run

import peft_talora
from peft_talora.sharding import is_split, refuse_split, set_up_deepspeed, set_up_fsdp, taking_whole, whole_state

CASES = Path(__file__).parent / "fsdp_cases.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# Nine batches of one image in each process make four steps, saved before the last.
FLAGS = [*SMALL, "--learning_rate", 3e-4, "--gradient_accumulation_steps", 2, "--save_steps", 3]
FLAGS += ["--per_device_train_batch_size", 1, "--num_train_epochs", 1, "--sample_steps", 4]
# Of one image to evaluate, the second process has none of its own.
FLAGS += ["--activation_checkpointing", "--max_eval_samples", 1]


@pytest.fixture(scope="module")
def split(sam_folder, tmp_path_factory):
    """The folder of a run by two processes, each with a part of the model, and its output."""
    folder = tmp_path_factory.mktemp("split")
    return folder, run(TORCHRUN, CASES, "--base", sam_folder, *FLAGS, "--output_dir", folder)


@pytest.fixture
def train_whole(sam_folder, tmp_path, monkeypatch):
    """Runs the same steps in this process, in the precision of the configuration."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)

    def train(*flags):
        whole = [
            "--gradient_accumulation_steps",
            4,
            "--num_threads",
            torch.get_num_threads(),
            "--output_dir",
            tmp_path,
        ]
        monkeypatch.setattr(sys, "argv", [TRAIN, *map(str, ["--base", sam_folder, *FLAGS, *whole, *flags])])
        load_recipe(TRAIN).main()

    yield train
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_split_model_learns_what_a_whole_one_does(split, train_whole, tmp_path):
    folder, output = split
    train_whole()
    one, other = read_results(tmp_path), read_results(folder)
    assert [entry["step"] for entry in other["history"]] == [4]
    assert other["before"]["depth"] == pytest.approx(one["before"]["depth"], rel=1e-4)
    assert other["after"]["depth"] == pytest.approx(one["after"]["depth"], rel=1e-3)
    assert other["after"]["depth"] != pytest.approx(one["before"]["depth"], rel=1e-2)
    # A percent: where a gradient is rounding alone, Adam makes whole steps of it.
    assert other["history"][0]["losses"] == pytest.approx(one["history"][0]["losses"], rel=1e-2)
    assert other["parameters"] == one["parameters"]
    assert output.count("Adapter, results.json and predictions.png are in") == 1
    assert [path.name for path in (folder / "samples").iterdir()] == ["step-000004.png"]
    peft_talora.load(folder)


def test_a_split_model_goes_on_with_the_very_weights(split, sam_folder, tmp_path):
    folder, _ = split
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    resume = ["--resume_from_checkpoint", "latest", "--output_dir", tmp_path]
    output = run(TORCHRUN, CASES, "--base", sam_folder, *FLAGS, *resume)
    assert "checkpoint-3: step 3 of 4" in output
    one, other = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert read_results(folder)["after"] == read_results(tmp_path)["after"]


def test_a_whole_model_does_not_go_on_from_a_split_ones_checkpoint(split, train_whole):
    with pytest.raises(ValueError, match=r"was trained with split_by='FSDP' \(now None\): resume with the same"):
        train_whole("--allow_reshard", "--resume_from_checkpoint", split[0] / "checkpoint-3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, "`fsdp_version` is 1; allowed: 2"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "is SHARDED_STATE_DICT, .* allowed: FULL_STATE_DICT"),
        ({}, None),
    ],
)
def test_fsdp_must_be_the_second_and_without_pickles(settings, message):
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", **settings})
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    plugin.set_mixed_precision("bf16")
    if message is None:
        set_up_fsdp(accelerator)
        assert plugin.mixed_precision_policy is None, "autocast does it"
        return
    with pytest.raises(ValueError, match=message):
        set_up_fsdp(accelerator)


def test_deepspeed_clips_as_it_is_told_and_keeps_to_float32():
    plugin = SimpleNamespace(deepspeed_config={"gradient_clipping": "auto"})
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, mixed_precision="no", state=state)
    set_up_deepspeed(accelerator, 0.5, None)
    assert plugin.deepspeed_config == {"gradient_clipping": 0.5}
    with pytest.raises(ValueError, match="`resume_from_checkpoint` is 'latest'; checkpoints of DeepSpeed are pickled"):
        set_up_deepspeed(accelerator, 0.5, "latest")
    accelerator.mixed_precision = "bf16"
    with pytest.raises(ValueError, match="mixed precision is 'bf16'; with DeepSpeed allowed: 'no'"):
        set_up_deepspeed(accelerator, 0.5, None)


def test_what_needs_the_whole_model_is_refused_by_name():
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with pytest.raises(ValueError, match=rf"split over processes by {kind.value}; the thing allows"):
            refuse_split(SimpleNamespace(distributed_type=kind), "the thing")
    refuse_split(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU), "the thing")


def test_a_whole_model_is_left_as_it_is():
    model = torch.nn.Linear(2, 3)
    assert not is_split(model)
    assert whole_state(model)["weight"].data_ptr() == model.weight.data_ptr()
    with taking_whole(model):
        model.load_state_dict({"weight": torch.ones(3, 2), "bias": torch.zeros(3)})
    assert torch.equal(model.weight, torch.ones(3, 2))
    set_up_fsdp(Accelerator(cpu=True))
