"""The fused forward of a TA-LoRA layer: equal to the plain formula, in less memory."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from tuner_cases import TASKS, assert_close, needs_peft_0_21

from peft_talora.tuner import TALoRAConfig, fused
from peft_talora.tuner.layer import Linear

IDS = [2, 0, 0, 1, 2]
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Windowed(nn.Module):
    """A layer that sees two windows of each sample in its leading axis, as in SAM: (B, 2, ..., D_in)."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True):
        super().__init__()
        self.qkv = nn.Linear(d_in, d_out, bias=bias)

    def forward(self, x):
        return self.qkv(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def adapted(dtype=torch.float32, bias=True, d_in=6, d_out=18, **values) -> tuple[nn.Module, Linear]:
    torch.manual_seed(0)
    base = Windowed(d_in, d_out, bias).to(dtype)
    settings = {
        "task_names": TASKS,
        "target_modules": ["qkv"],
        "r": 4,
        "r_out": 3,
        "alpha": 8.0,
        "init_weights": False,
    }
    model = get_peft_model(base, TALoRAConfig(**settings | values), autocast_adapter_dtype=False)
    return model, model.base_model.model.qkv


def plain(monkeypatch) -> None:
    monkeypatch.setattr("peft_talora.tuner.layer.can_fuse", lambda base_layer, x: False)


def inputs(dtype=torch.float32, d_in=6) -> torch.Tensor:
    return torch.randn(len(IDS), 2, 3, 4, d_in, generator=torch.Generator().manual_seed(1)).to(dtype)


def outcome(model: nn.Module, x: torch.Tensor, context=None, ids=IDS, seed=5) -> dict[str, torch.Tensor]:
    """Output and gradients of everything that has one."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    with context or nullcontext():
        y = model(x, task_ids=ids)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    (y * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.abs().max() > 1e-3 for grad in grads.values())
    return {"output": y.detach(), "input": x.grad, **grads}


def assert_same(actual: dict, expected: dict, relative: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert_close(actual[name], value, relative)


class TestEquality:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    def test_to_the_plain_formula(self, dtype, bias, monkeypatch):
        model, _ = adapted(dtype, bias)
        found = outcome(model, inputs(dtype))
        plain(monkeypatch)
        assert_same(found, outcome(model, inputs(dtype)), DTYPES[dtype])

    @pytest.mark.parametrize(
        "values",
        [
            {"qkv_parts": ["q", "v"]},
            pytest.param({"bias": "talora_only"}, marks=needs_peft_0_21),
            pytest.param({"bias": "all"}, marks=needs_peft_0_21),
            {"r_out": 4},
        ],
        ids=str,
    )
    def test_with_options(self, values, monkeypatch):
        """With a square core, too: there shapes do not tell it from its transpose."""
        model, _ = adapted(torch.float64, **values)
        found = outcome(model, inputs(torch.float64))
        plain(monkeypatch)
        assert_same(found, outcome(model, inputs(torch.float64)), 1e-10)

    @pytest.mark.parametrize("training", [True, False])
    def test_with_dropout(self, training, monkeypatch):
        model, _ = adapted(torch.float64, dropout=0.4)
        model.train(training)
        found = outcome(model, inputs(torch.float64))
        plain(monkeypatch)
        expected = outcome(model, inputs(torch.float64))
        assert_same(found, expected, 1e-10)
        other = outcome(model, inputs(torch.float64), seed=6)["output"]
        assert torch.equal(other, expected["output"]) is not training

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_under_autocast(self, dtype, monkeypatch):
        """float64 is what autocast leaves alone."""
        model, _ = adapted(dtype)
        found = outcome(model, inputs(dtype), torch.autocast("cpu", torch.bfloat16))
        assert found["output"].dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
        plain(monkeypatch)
        expected = outcome(model, inputs(dtype), torch.autocast("cpu", torch.bfloat16))
        assert_same(found, expected, 3e-2 if dtype == torch.float32 else 1e-10)

    def test_under_autocast_with_activations_in_half_precision(self, monkeypatch):
        model, _ = adapted()
        found = outcome(model, inputs(torch.bfloat16), torch.autocast("cpu", torch.bfloat16))
        plain(monkeypatch)
        expected = outcome(model, inputs(torch.bfloat16), torch.autocast("cpu", torch.bfloat16))
        assert_same(found, expected, 3e-2)

    def test_of_two_adapters(self, monkeypatch):
        model, layer = adapted(torch.float64)
        config = model.peft_config["default"]
        model.add_adapter("other", type(config)(**{**config.to_dict(), "r": 2, "peft_type": None}))
        model.base_model.set_adapter(["default", "other"])
        layer.to(torch.float64)
        found = outcome(model, inputs(torch.float64))
        plain(monkeypatch)
        assert_same(found, outcome(model, inputs(torch.float64)), 1e-10)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_under_checkpointing_of_the_call(self, use_reentrant):
        model, _ = adapted(torch.float64)
        expected = outcome(model, inputs(torch.float64))
        model.zero_grad()
        x = inputs(torch.float64).requires_grad_()
        y = checkpoint(lambda x: model(x, task_ids=IDS), x, use_reentrant=use_reentrant)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).double()
        (y * weights).sum().backward()
        assert torch.equal(x.grad, expected["input"])
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad or torch.equal(parameter.grad, expected[name])

    def test_under_compilation(self):
        """The compiler gets the plain formula, so both are compared here."""
        model, _ = adapted(torch.float64)
        expected = outcome(model, inputs(torch.float64), ids=torch.tensor(IDS))
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = outcome(compiled, inputs(torch.float64), ids=torch.tensor(IDS))
        assert_same({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected, 1e-10)

    def test_when_only_backward_is_under_autocast(self, monkeypatch):
        def gradients():
            model, _ = adapted()
            x = inputs().requires_grad_()
            loss = model(x, task_ids=IDS).square().sum()
            with torch.autocast("cpu", torch.bfloat16):
                loss.backward()
            return {"input": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}

        found = gradients()
        plain(monkeypatch)
        assert_same(found, gradients(), 3e-2)


class TestAnyUse:
    """What users do with a linear layer's output, shapes and transforms."""

    @pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6), (6,), (0, 6), (2, 0, 6)], ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    def test_every_shape_in_place_too(self, shape, bias, monkeypatch):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 9, bias=bias), nn.ReLU(inplace=True), nn.Linear(9, 5)).double()
        config = TALoRAConfig(target_modules=["0"], r=4, init_weights=False)
        model = get_peft_model(net, config, autocast_adapter_dtype=False)

        def run():
            model.zero_grad()
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
            y = model(x)
            y += 1
            y.square().sum().backward()
            grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            return {"output": y.detach(), "input": x.grad, **grads}

        found = run()
        assert found["output"].shape == (*shape[:-1], 5)
        plain(monkeypatch)
        for name, value in run().items():
            torch.testing.assert_close(found[name], value)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own forward mode uses it
    def test_transforms_of_torch_func(self):
        model, layer = adapted(torch.float64)
        model.set_task("edges")
        x = inputs(torch.float64)[0, 0, 0, 0]
        weight = layer.base_layer.weight + layer.get_delta_weight("default", "edges")
        torch.testing.assert_close(torch.func.jacrev(layer)(x[None])[0, :, 0], weight)
        torch.testing.assert_close(torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1], weight.sum(1))
        rows = torch.randn(7, 1, 6, dtype=torch.float64)
        torch.testing.assert_close(torch.func.vmap(layer)(rows), layer(rows.flatten(0, 1))[:, None])

    @pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
    def test_tracing(self, tmp_path):
        _, layer = adapted(task_names=["one"], r_out=4)
        traced = torch.jit.trace(layer, inputs())
        traced.save(tmp_path / "layer.pt")
        torch.testing.assert_close(torch.jit.load(tmp_path / "layer.pt")(inputs()), layer(inputs()))


class TestDerivatives:
    def parameters(self):
        _, layer = adapted(torch.float64, d_in=3, d_out=4, r=2, r_out=3)
        generator = torch.Generator().manual_seed(3)
        shapes = (4, 2, 3), (4, 2, 3), (3, 2), (2, 3, 2), (4, 3)
        values = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
        bias = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
        weight = layer.base_layer.weight

        def run(x, dropped, in_, cores, out, bias):
            return fused._FusedLinear.apply(x, dropped, weight, bias, in_, cores, out)

        return run, (*values, bias)

    def test_are_those_of_finite_differences(self):
        run, values = self.parameters()
        assert torch.autograd.gradcheck(run, values)
        assert torch.autograd.gradcheck(lambda x, *rest: run(x, None, *rest), (values[0], *values[2:]))

    def test_second_ones_too(self):
        run, values = self.parameters()
        assert torch.autograd.gradgradcheck(run, values)
        assert torch.autograd.gradgradcheck(lambda x, *rest: run(x, None, *rest), (values[0], *values[2:]))

    def test_of_several_losses_at_once(self):
        """A Jacobian by `is_grads_batched`, as libraries that balance losses take it."""
        model, _ = adapted(torch.float64)
        trained = [p for p in model.parameters() if p.requires_grad]
        x = inputs(torch.float64).requires_grad_()
        losses = model(x, task_ids=IDS).flatten(1).square().mean(1)[:2]
        grads = torch.autograd.grad(losses, [x, *trained], torch.eye(2).double(), is_grads_batched=True)
        for i in range(2):
            losses = model(x, task_ids=IDS).flatten(1).square().mean(1)[:2]
            for grad, expected in zip(grads, torch.autograd.grad(losses[i], [x, *trained]), strict=True):
                torch.testing.assert_close(grad[i], expected)

    @pytest.mark.parametrize("name", ["talora_in", "talora_out", "talora_core", "talora_task"])
    def test_of_one_factor_alone(self, name):
        """Frozen factors get no gradient, and the others the same as with all."""
        model, _ = adapted(torch.float64)
        expected = outcome(model, inputs(torch.float64))
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(name in key)
        found = outcome(model, inputs(torch.float64))
        assert 0 < len(found) - 2 < 6
        for key, value in found.items():
            assert torch.equal(value, expected[key])


def saved_bytes(model: nn.Module, x: torch.Tensor, **kwargs) -> int:
    """Bytes kept for backward, each storage once; without the model's own parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x, **kwargs)
    return sum(storage.nbytes() for storage in found.values())


class TestMemory:
    rows, width, rank = 500, 64, 4

    def sizes(self, context=None, **values):
        x = torch.randn(len(IDS), 2, self.rows, self.width, requires_grad=True)
        model, _ = adapted(d_in=self.width, d_out=3 * self.width, r=self.rank, r_out=self.rank, **values)
        torch.manual_seed(0)
        base = Windowed(self.width, 3 * self.width)
        lora = LoraConfig(target_modules=["qkv"], r=self.rank, lora_dropout=values.get("dropout", 0.0))
        lora = get_peft_model(base, lora)
        with context or nullcontext():
            return saved_bytes(model, x, task_ids=IDS), saved_bytes(lora, x)

    def test_input_and_projection_are_all_that_is_kept(self):
        """Of the activations x and z; of the update's small factors a few numbers an entry."""
        ours, lora = self.sizes()
        activations = 4 * len(IDS) * 2 * self.rows * (self.width + self.rank)
        cores = 4 * len(IDS) * self.rank * self.rank
        assert activations <= ours <= activations + 8 * cores
        assert ours <= 1.03 * lora

    def test_no_copy_of_the_weight_under_autocast(self):
        ours, lora = self.sizes(torch.autocast("cpu", torch.bfloat16))
        activations = 2 * len(IDS) * 2 * self.rows * (self.width + self.rank)
        cores = 4 * len(IDS) * self.rank * self.rank
        assert activations <= ours <= activations + 8 * cores
        assert ours <= lora

    def test_dropout_keeps_its_output_and_its_mask(self):
        ours, lora = self.sizes(dropout=0.5)
        assert ours <= 1.03 * lora


class TestWhatIsNotFused:
    @pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
    @pytest.mark.parametrize("everywhere", [False, True], ids=["own", "global"])
    def test_a_layer_with_hooks_is_called(self, kind, everywhere):
        model, layer = adapted()
        seen = []
        owner, name = (nn.modules.module, f"module_{kind}") if everywhere else (layer.base_layer, kind)
        handle = getattr(owner, f"register_{name}_hook")(lambda module, *_: seen.append(module))
        try:
            model(inputs().requires_grad_(), task_ids=IDS).sum().backward()
        finally:
            handle.remove()
        assert seen.count(layer.base_layer) == 1

    def test_a_layer_with_a_forward_of_its_own_is_called(self):
        model, layer = adapted()
        expected = model(inputs(), task_ids=IDS)
        forward = layer.base_layer.forward
        layer.base_layer.forward = lambda x: forward(x) + 1
        assert_close(model(inputs(), task_ids=IDS), expected + 1)

    def test_a_trained_weight_gets_its_gradient(self):
        model, layer = adapted()
        layer.base_layer.weight.requires_grad_(True)
        assert "base_model.model.qkv.base_layer.weight" in outcome(model, inputs())

    def test_a_parametrised_weight_is_used(self):
        _, layer = adapted()
        nn.utils.parametrizations.weight_norm(layer.base_layer)
        assert not fused.can_fuse(layer.base_layer, inputs())

    def test_a_dtype_that_the_layer_refuses_is_refused(self):
        model, _ = adapted()
        with pytest.raises(RuntimeError, match="dtype"):
            model(inputs(torch.bfloat16), task_ids=IDS)
