"""The orthogonality regulariser."""

import pytest
import torch
from tuner_cases import MLP_3D, TASKS, VISION, adapt, adapted_layers, saying

from peft_talora.tuner import orthogonality_loss


def by_hand(layer, power: int) -> torch.Tensor:
    def distance(matrix):
        return (matrix.T @ matrix - torch.eye(matrix.shape[1])).norm() ** power

    core = layer.talora_core["default"]  # (3, 4, 2): four columns of three numbers cannot be orthonormal
    core_term = sum(distance(core[:, :, k].T) for k in range(2)) / 2
    return (distance(layer.talora_out["default"]) + distance(layer.talora_in["default"]) + core_term) / 3


@pytest.mark.parametrize("squared", [True, False])
def test_is_the_mean_distance_from_orthonormal_columns(squared):
    model = adapt(VISION)
    for layer in adapted_layers(model):
        layer.talora_out["default"].data *= 1.5
    expected = torch.stack([by_hand(layer, 2 if squared else 1) for layer in adapted_layers(model)]).mean()
    torch.testing.assert_close(orthogonality_loss(model, squared=squared), expected)


def test_of_orthonormal_factors_is_that_of_the_core():
    """The core starts at zero, and ‖0 − I‖² is the smaller of its ranks."""
    model = adapt(MLP_3D, init_weights="orthogonal")
    torch.testing.assert_close(orthogonality_loss(model), torch.tensor(3 / 3))
    orthogonality_loss(model).backward()
    assert all(layer.talora_in["default"].grad.abs().max() < 1e-5 for layer in adapted_layers(model))


def test_pulls_factors_to_orthonormal_columns():
    model = adapt(MLP_3D)
    for layer in adapted_layers(model):
        layer.talora_in["default"].data += 0.3
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(300):
        optimizer.zero_grad()
        loss = orthogonality_loss(model)
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
    for layer in adapted_layers(model):
        gram = layer.talora_in["default"].T @ layer.talora_in["default"]
        torch.testing.assert_close(gram, torch.eye(4), atol=0.02, rtol=0)


def test_of_one_adapter_and_in_full_precision():
    model = adapt(MLP_3D)
    model.add_adapter("other", model.peft_config["default"])
    with torch.no_grad():
        for layer in adapted_layers(model):
            layer.talora_in["other"] *= 2
    one, other = (orthogonality_loss(model, name) for name in ("default", "other"))
    assert other > one + 1
    assert torch.equal(orthogonality_loss(model), one)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(orthogonality_loss(model), (one + other) / 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonality_loss(model, "other"), other)


def test_works_on_the_meta_device():
    loss = orthogonality_loss(adapt(MLP_3D).to("meta"))
    assert (loss.device.type, loss.shape) == ("meta", ())


def test_an_adapter_that_is_not_there_is_named():
    model = adapt(MLP_3D, task_names=TASKS[:2])
    with pytest.raises(ValueError, match=saying("'other'", "['default']")):
        orthogonality_loss(model, "other")
    with pytest.raises(ValueError, match=saying("an active adapter", "adapters are []")):
        orthogonality_loss(MLP_3D.build())
