"""A folder that cannot be read is named, and the domains in memory go on as they were."""

import pytest
import torch
from continual_cases import adapters_of, predict, step
from safetensors.torch import load_file, save_file


@pytest.fixture
def saved(tmp_path):
    adapters = adapters_of("lora", ["pits", "rails"])
    step(adapters, "pits")
    adapters.save("pits", tmp_path)
    adapters.unload("pits")
    return adapters, tmp_path


def check_it_fails(saved, images, error, message):
    adapters, folder = saved
    step(adapters, "rails")
    before = predict(adapters, "rails", images)
    with pytest.raises(error, match=message):
        adapters.load("pits", folder)
    assert adapters.resident() == ["rails"]
    assert torch.equal(predict(adapters, "rails", images), before)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file(saved, images, name):
    (saved[1] / name).unlink()
    check_it_fails(saved, images, OSError, name)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_truncated_file(saved, images, name):
    file = saved[1] / name
    file.write_bytes(file.read_bytes()[:50])
    check_it_fails(saved, images, OSError, name)


def test_an_unknown_method(saved, images):
    (saved[1] / "adapter_config.json").write_text('{"peft_type": "UNHEARD_OF"}')
    check_it_fails(saved, images, OSError, r"adapter_config\.json: no configuration of an adapter")


def test_missing_weights(saved, images):
    file = saved[1] / "adapter_model.safetensors"
    state = load_file(file)
    state.popitem()
    save_file(state, file)
    check_it_fails(saved, images, ValueError, "missing are 1 weights, .* left over are 0")


def test_weights_of_another_shape(saved, images):
    file = saved[1] / "adapter_model.safetensors"
    save_file({key: tensor[:1] for key, tensor in load_file(file).items()}, file)
    check_it_fails(saved, images, ValueError, "has the shape .* needed is")
