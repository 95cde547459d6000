"""TALoRALayer: the formula, its special cases, shapes, starts, merging."""

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn
from tuner_cases import BATCH, TASKS, adapted_layers, assert_close, assert_visibly_different, saying

from peft_talora.tuner import Linear, TALoRAConfig, TALoRALayer

D_IN, D_OUT = 6, 18  # a fused layer, so that `qkv_parts` fits it
SETTINGS = {"r": 4, "r_out": 5, "r_task": 2, "alpha": 3.0, "init_weights": False}


class Holder(nn.Module):
    def __init__(self, d_in: int, d_out: int, bias: bool = True, device: str = "cpu"):
        super().__init__()
        self.qkv = nn.Linear(d_in, d_out, bias=bias, device=device)

    def forward(self, x):
        return self.qkv(x)


def adapt_linear(d_in=D_IN, d_out=D_OUT, tasks=TASKS, dtype=torch.float64, device="cpu", **values):
    """A model that is one adapted linear layer, and that layer."""
    torch.manual_seed(0)
    base = Holder(d_in, d_out, device=device).to(dtype)
    config = TALoRAConfig(target_modules=["qkv"], task_names=tasks, **{**SETTINGS, **values})
    model = get_peft_model(base, config)
    (layer,) = adapted_layers(model)
    return model, layer


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def fill(layer: TALoRALayer, factor_in=None, factor_out=None, core=None, rows=None) -> None:
    """Set the factors of the adapter named "default"."""
    with torch.no_grad():
        for parameter, value in (
            (layer.talora_in["default"], factor_in),
            (layer.talora_out["default"], factor_out),
            (layer.talora_core["default"], core),
        ):
            parameter.copy_(value)
        for task, row in zip(TASKS, rows, strict=True):
            layer.talora_task["default"][task].copy_(row)


def update_by_loops(layer: TALoRALayer, task: str) -> torch.Tensor:
    """The update of a task, one number at a time: s · Σ_o Σ_i Σ_k U[d, o] G[o, i, k] P[t, k] V[c, i]."""
    factor_in, factor_out = layer.talora_in["default"].tolist(), layer.talora_out["default"].tolist()
    core = layer.talora_core["default"].tolist()
    row = layer.talora_task["default"][task].tolist()
    ranks_out, ranks_in, ranks_task = (range(size) for size in layer.talora_core["default"].shape)
    return torch.tensor(
        [
            [
                layer.scaling["default"]
                * sum(
                    u[o] * sum(core[o][i][k] * row[k] for k in ranks_task) * v[i] for o in ranks_out for i in ranks_in
                )
                for v in factor_in
            ]
            for u in factor_out
        ],
        dtype=torch.float64,
    )


class TestFormula:
    @pytest.mark.parametrize("task", TASKS)
    def test_delta_weight_is_the_sum_written_out(self, task):
        """Independent of `fold`, and by the row's name: a task must not use another one's row."""
        _, layer = adapt_linear()
        delta = layer.get_delta_weight("default", task)
        assert_visibly_different(delta, torch.zeros_like(delta))
        assert_close(delta, update_by_loops(layer, task), 1e-12)
        assert torch.equal(delta, layer.get_delta_weight("default", TASKS.index(task)))

    @pytest.mark.parametrize("shape", [(BATCH, D_IN), (BATCH, 4, D_IN), (BATCH * 9, 3, 3, D_IN)], ids=str)
    def test_forward_adds_the_delta_weight(self, shape):
        model, layer = adapt_linear()
        x = inputs(*shape)
        outputs = []
        for task in TASKS:
            model.set_task(task)
            expected = layer.base_layer(x) + x @ layer.get_delta_weight("default", task).T
            outputs.append(model(x))
            assert_close(outputs[-1], expected, 1e-12)
        assert_visibly_different(layer.base_layer(x), *outputs)

    def test_input_without_batch_axis(self):
        model, layer = adapt_linear()
        model.set_task("edges")
        x = inputs(D_IN)
        assert_close(model(x), layer.base_layer(x) + layer.get_delta_weight("default", "edges") @ x, 1e-12)

    def test_every_row_has_its_own_task(self):
        model, layer = adapt_linear()
        x = inputs(5, 2, D_IN)
        ids = [2, 0, 0, 1, 2]
        expected = torch.stack(
            [
                layer.base_layer(row) + row @ layer.get_delta_weight("default", task).T
                for row, task in zip(x, ids, strict=True)
            ]
        )
        assert_close(model(x, task_ids=ids), expected, 1e-12)

    @pytest.mark.parametrize("ids", [[1, 1, 0, 2], [2, 0, 1, 1]], ids=str)
    def test_gradients_are_those_of_finite_differences(self, ids):
        model, _ = adapt_linear(d_in=3, d_out=4, r=2, r_out=3)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        values = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
        assert len(names) == 3 + len(TASKS)

        def run(x, *parameters):
            kwargs = {"task_ids": torch.tensor(ids)}
            return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,), kwargs)

        assert torch.autograd.gradcheck(run, (inputs(4, 2, 3).requires_grad_(), *values))

    def test_no_dense_update_is_built(self):
        """Work of one pass: the base, and two skinny products a row; nothing of size T · D_out · D_in."""
        from torch.utils.flop_counter import FlopCounterMode

        model, _ = adapt_linear(d_in=64, d_out=96, r=4, r_out=4)
        rows = 10
        with FlopCounterMode(display=False) as counter:
            model(inputs(BATCH, rows, 64), task_ids=[0, 2])
        base, skinny = 64 * 96, (64 + 96) * 4
        core, contraction = 4 * 4, BATCH * 2 * 4 * 4
        assert counter.get_total_flops() == 2 * (BATCH * rows * (base + skinny + core) + contraction)


class TestSpecialCases:
    """What the Tucker form contains, exactly."""

    def test_contains_independent_loras(self):
        """r = r_out = T·ρ, r_task = T, and a core whose slice k has one identity block, at k."""
        rank, num_tasks = 2, len(TASKS)
        size = rank * num_tasks
        _, layer = adapt_linear(d_in=7, r=size, r_out=size, r_task=num_tasks, alpha=2.0 * size)
        lora_a, lora_b = inputs(num_tasks, rank, 7), inputs(num_tasks, D_OUT, rank)
        core = torch.zeros(size, size, num_tasks, dtype=torch.float64)
        for k in range(num_tasks):
            block = slice(k * rank, (k + 1) * rank)
            core[block, block, k] = torch.eye(rank)
        fill(layer, lora_a.reshape(size, 7).T, torch.cat(list(lora_b), dim=1), core, torch.eye(num_tasks))
        for task in range(num_tasks):
            assert_close(layer.get_delta_weight("default", task), 2.0 * lora_b[task] @ lora_a[task], 1e-12)

    def test_contains_a_free_core_per_task_between_shared_factors(self):
        """r_task = T and P = I: slice k of the core is the core of task k."""
        num_tasks, rank = len(TASKS), SETTINGS["r"]
        _, layer = adapt_linear(r_out=rank, r_task=num_tasks, alpha=rank * 0.5)
        shared_in, shared_out, cores = inputs(D_IN, rank), inputs(D_OUT, rank), inputs(num_tasks, rank, rank)
        fill(layer, shared_in, shared_out, cores.permute(1, 2, 0), torch.eye(num_tasks))
        for task in range(num_tasks):
            expected = 0.5 * shared_out @ cores[task] @ shared_in.T
            assert_close(layer.get_delta_weight("default", task), expected, 1e-12)

    def test_contains_the_cp_decomposition(self):
        """A super-diagonal core: a sum of rank-one tensors."""
        rank = 4
        _, layer = adapt_linear(r=rank, r_out=rank, r_task=rank, alpha=rank)
        a, b, c = inputs(D_IN, rank), inputs(D_OUT, rank), inputs(len(TASKS), rank)
        core = torch.zeros(rank, rank, rank, dtype=torch.float64)
        core[range(rank), range(rank), range(rank)] = 1.0
        fill(layer, a, b, core, c)
        for task in range(len(TASKS)):
            expected = sum(c[task, k] * torch.outer(b[:, k], a[:, k]) for k in range(rank))
            assert_close(layer.get_delta_weight("default", task), expected, 1e-12)


class TestShapes:
    def test_shapes_and_count(self):
        model, layer = adapt_linear()
        r, r_out, r_task = SETTINGS["r"], SETTINGS["r_out"], SETTINGS["r_task"]
        assert layer.talora_in["default"].shape == (D_IN, r)
        assert layer.talora_out["default"].shape == (D_OUT, r_out)
        assert layer.talora_core["default"].shape == (r_out, r, r_task)
        assert {name: row.shape for name, row in layer.talora_task["default"].items()} == dict.fromkeys(
            TASKS, (r_task,)
        )
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count == D_IN * r + D_OUT * r_out + r * r_out * r_task + len(TASKS) * r_task

    def test_count_at_the_size_of_vit_l(self):
        model, _ = adapt_linear(1024, 3072, r=32, r_out=32, r_task=4, device="meta", dtype=torch.float32)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 135_180
        assert model(torch.ones(BATCH, 5, 1024, device="meta"), task_ids=[0, 2]).shape == (BATCH, 5, 3072)

    def test_r_out_defaults_to_r(self):
        _, layer = adapt_linear(r_out=None)
        assert layer.talora_out["default"].shape == (D_OUT, SETTINGS["r"])

    def test_scaling_defaults_to_one_half(self):
        assert adapt_linear(alpha=None)[1].scaling["default"] == 0.5
        assert adapt_linear(alpha=6.0)[1].scaling["default"] == 1.5

    @pytest.mark.parametrize(("values", "name"), [({"r": 7}, "`r`=7"), ({"r_out": 19, "r": 6}, "`r_out`=19")])
    @pytest.mark.filterwarnings("ignore:With r=:UserWarning")
    def test_rank_larger_than_the_layer(self, values, name):
        with pytest.raises(ValueError, match=saying("qkv: ", name, "`rank_pattern`")):
            adapt_linear(**values)

    def test_rank_as_large_as_the_layer(self):
        _, layer = adapt_linear(r=D_IN, r_out=D_IN)
        assert layer.talora_in["default"].shape == (D_IN, D_IN)

    def test_names_itself(self):
        _, layer = adapt_linear()
        assert repr(layer).startswith("talora.Linear(")
        assert type(layer) is Linear
        assert layer.supports_lora_conversion()


class TestStart:
    def test_orthonormal_columns(self):
        _, layer = adapt_linear(init_weights="orthogonal")
        for factor in (layer.talora_in["default"], layer.talora_out["default"]):
            assert_close(factor.T @ factor, torch.eye(factor.shape[1]), 1e-6)

    @pytest.mark.parametrize("r_out", [3, 4, 5])
    @pytest.mark.parametrize("init_weights", ["lora", True])
    def test_all_tasks_share_one_lora(self, init_weights, r_out):
        _, layer = adapt_linear(init_weights=init_weights, r_out=r_out)
        factor, core = layer.talora_in["default"], layer.talora_core["default"]
        assert_close(factor.T @ factor, torch.eye(4), 1e-6)
        shared, others = core[:, :, 0], core[:, :, 1:]
        smaller = shared if r_out >= 4 else shared.T
        assert_close(smaller.T @ smaller, torch.eye(min(4, r_out)), 1e-6)
        assert not others.any()
        assert all(row[0] == 1 for row in layer.talora_task["default"].values())
        assert torch.equal(
            layer.cores("default", torch.arange(3)), (layer.scaling["default"] * shared).expand(3, -1, -1)
        )

    def test_gaussian_factors(self):
        _, layer = adapt_linear(200, 600, r=50, r_out=60, r_task=2, init_weights="gaussian")
        for factor in (layer.talora_in["default"], layer.talora_out["default"]):
            assert abs(factor.mean()) < 0.05
            assert abs(factor.std() - 1) < 0.05

    @pytest.mark.parametrize(
        ("init_weights", "zero"),
        [("lora", {"out"}), (True, {"out"}), ("orthogonal", {"core"}), ("gaussian", {"core"}), (False, set())],
    )
    def test_no_more_than_one_factor_is_zero(self, init_weights, zero):
        model, layer = adapt_linear(init_weights=init_weights, dtype=torch.float32)
        factors = {"in": layer.talora_in, "out": layer.talora_out, "core": layer.talora_core}
        assert {name for name, factor in factors.items() if not factor["default"].any()} == zero
        assert all(row.any() for row in layer.talora_task["default"].values())
        x = inputs(BATCH, D_IN).float()
        starts_as_base = torch.equal(model(x, task_ids=[0, 2]), layer.base_layer(x))
        assert starts_as_base is (init_weights is not False)

    def test_rows_have_unit_norm_on_average(self):
        tasks = [f"t{i}" for i in range(200)]
        _, layer = adapt_linear(4, 300, tasks=tasks, r_task=16, r=4, r_out=4, init_weights="orthogonal")
        rows = torch.stack(list(layer.talora_task["default"].values()))
        assert abs(rows.square().sum(1).mean() - 1) < 0.1

    @pytest.mark.parametrize("r_out", [3, 4, 5])
    @pytest.mark.parametrize(
        ("init_weights", "first"), [("orthogonal", "core"), ("gaussian", "core"), ("lora", "out")]
    )
    def test_the_zero_factor_moves_first_and_then_all_that_a_task_has(self, init_weights, first, r_out):
        """The slices that start at zero keep the weights of them in the rows waiting one step more."""
        model, layer = adapt_linear(init_weights=init_weights, r_out=r_out)
        x, target = inputs(BATCH, D_IN), inputs(BATCH, D_OUT)
        factors = {"in": layer.talora_in, "out": layer.talora_out, "core": layer.talora_core}
        factors = {name: factor["default"] for name, factor in factors.items()}
        rows = layer.talora_task["default"]
        moved = []
        for _ in range(3):
            model.zero_grad()
            (model(x, task_ids=[0, 2]) - target).square().mean().backward()
            moved.append({name for name, factor in factors.items() if factor.grad.any()})
            with torch.no_grad():
                for parameter in (*factors.values(), *rows.values()):
                    parameter.sub_(parameter.grad if parameter.grad is not None else 0)
        assert moved == [{first}, set(factors), set(factors)]
        for dim in (0, 1, 2):
            others = [d for d in range(3) if d != dim]
            assert factors["core"].grad.abs().amax(others).all(), "no row, column or slice of the core stays behind"
        assert factors["out"].grad.abs().amax(0).all()
        assert factors["in"].grad.abs().amax(0).all()
        assert [bool(rows[task].grad.all()) for task in TASKS] == [True, False, True]


class TestQkvParts:
    @pytest.mark.parametrize("parts", [["q"], ["v"], ["q", "v"], ["k", "v"]], ids="".join)
    def test_disabled_thirds_are_zero(self, parts):
        model, layer = adapt_linear(qkv_parts=parts, r_out=4)
        assert layer.talora_out["default"].shape == (len(parts) * D_IN, 4)
        x = inputs(BATCH, 3, D_IN)
        base = layer.base_layer(x)
        for task in TASKS:
            thirds = dict(zip("qkv", layer.get_delta_weight("default", task).split(D_IN), strict=True))
            assert [part for part in thirds if thirds[part].any()] == parts
            model.set_task(task)
            changed = dict(zip("qkv", (model(x) - base).split(D_IN, dim=-1), strict=True))
            assert [part for part in changed if changed[part].any()] == parts

    def test_enabled_thirds_are_in_order(self):
        """The rows of q and v are where the full factor has them."""
        _, full = adapt_linear(r_out=4)
        _, some = adapt_linear(r_out=4, qkv_parts=["q", "v"])
        out = full.talora_out["default"].detach().clone()
        rows = [full.talora_task["default"][task].detach() for task in TASKS]
        enabled = torch.cat([out[:D_IN], out[2 * D_IN :]])
        fill(some, full.talora_in["default"].detach(), enabled, full.talora_core["default"].detach(), rows)
        expected = full.get_delta_weight("default", "edges").clone()
        expected[D_IN : 2 * D_IN] = 0
        assert_close(some.get_delta_weight("default", "edges"), expected, 1e-12)

    def test_layer_of_another_shape(self):
        with pytest.raises(ValueError, match=saying("qkv: ", "`qkv_parts`=['q']", "12 outputs", "6 inputs")):
            adapt_linear(d_out=12, qkv_parts=["q"])

    def test_rank_is_bounded_by_the_enabled_rows(self):
        with pytest.raises(ValueError, match=saying("`r_out`=7", "6 features")):
            adapt_linear(qkv_parts=["k"], r_out=7)


class TestDropout:
    def test_active_in_training_only(self):
        model, layer = adapt_linear(dropout=0.5)
        x = inputs(BATCH, D_IN)
        model.set_task("depth")
        model.eval()
        evaluated = model(x)
        assert torch.equal(model(x), evaluated)
        assert_close(evaluated, layer.base_layer(x) + x @ layer.get_delta_weight("default").T, 1e-12)
        model.train()
        assert_visibly_different(model(x), model(x), evaluated)

    def test_drops_inputs_of_the_update_and_keeps_their_mean(self):
        model, layer = adapt_linear(dropout=0.25)
        x = inputs(1, D_IN).expand(20_000, D_IN)
        model.set_task("depth")
        model.train()
        expected = layer.base_layer(x[:1]) + x[:1] @ layer.get_delta_weight("default").T
        assert_close(model(x).mean(0, keepdim=True), expected, 0.05)

    def test_no_dropout_is_no_dropout(self):
        model, _ = adapt_linear()
        x = inputs(BATCH, D_IN)
        model.train()
        assert torch.equal(model(x, task_ids=[0, 1]), model(x, task_ids=[0, 1]))


class TestMerge:
    @pytest.mark.parametrize("task", TASKS)
    def test_merged_layer_is_the_unmerged_one(self, task):
        model, layer = adapt_linear()
        x, weight = inputs(BATCH, 3, D_IN), layer.base_layer.weight.detach().clone()
        model.set_task(task)
        before = model(x)
        model.merge_adapter()
        assert layer.merged
        assert_close(layer.base_layer.weight, weight + update_by_loops(layer, task), 1e-12)
        assert_close(model(x), before, 1e-12)
        assert torch.equal(model(x), layer.base_layer(x))
        model.unmerge_adapter()
        assert not layer.merged
        assert layer.merged_tasks == {}
        assert_close(layer.base_layer.weight, weight, 1e-12)
        assert_close(model(x), before, 1e-12)

    def test_unmerge_subtracts_what_was_merged(self):
        model, layer = adapt_linear()
        weight = layer.base_layer.weight.detach().clone()
        model.set_task("depth")
        model.merge_adapter()
        layer.task_state.selected["default"] = torch.tensor([2])  # behind the back of the merged layer
        model.unmerge_adapter()
        assert_close(layer.base_layer.weight, weight, 1e-12)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_safe_merge_refuses_a_broken_adapter(self, value):
        model, layer = adapt_linear()
        weight = layer.base_layer.weight.detach().clone()
        model.set_task("depth")
        with torch.no_grad():
            layer.talora_in["default"][0, 0] = value
        with pytest.raises(ValueError, match=saying("NaNs", "default", "broken")):
            model.merge_adapter(safe_merge=True)
        assert not layer.merged
        assert torch.equal(layer.base_layer.weight, weight)

    def test_safe_merge_of_a_sound_adapter(self):
        model, layer = adapt_linear()
        model.set_task("depth")
        expected = layer.base_layer.weight + layer.get_delta_weight("default")
        model.merge_adapter(safe_merge=True)
        assert torch.equal(layer.base_layer.weight, expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_on_a_cpu(self, dtype):
        model, layer = adapt_linear(dtype=dtype)
        model.set_task("edges")
        assert layer.get_delta_weight("default").dtype == torch.float32  # the parameters' type, not the base's
        x = inputs(BATCH, D_IN).to(dtype)
        before = model(x)
        model.merge_adapter(safe_merge=True)
        assert layer.base_layer.weight.dtype == dtype
        assert_close(model(x), before, 2e-2)

    def test_delta_weight_of_half_precision_parameters(self):
        model, layer = adapt_linear(dtype=torch.float32)
        expected = layer.get_delta_weight("default", "edges")
        model.half()
        delta = layer.get_delta_weight("default", "edges")
        assert delta.dtype == torch.float16
        assert_close(delta, expected, 1e-2)
        core = layer.cores("default", torch.tensor([TASKS.index("edges")]))[0].float()
        exact = layer.output_factor("default").float() @ core @ layer.talora_in["default"].float().T
        assert torch.equal(delta, exact.half())  # rounded once, at the end


class TestPrecision:
    def test_bfloat16_base(self):
        reference, _ = adapt_linear(dtype=torch.float32)
        model, _ = adapt_linear(dtype=torch.bfloat16)
        model.load_state_dict(reference.state_dict())
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        x = inputs(BATCH, 3, D_IN).bfloat16()
        output = model(x, task_ids=[0, 2])
        assert output.dtype == torch.bfloat16
        assert_close(output, reference(x.float(), task_ids=[0, 2]), 2e-2)
        output.float().square().mean().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)

    def test_autocast(self):
        model, layer = adapt_linear(dtype=torch.float32)
        x = inputs(BATCH, 3, D_IN).float()
        expected = model(x, task_ids=[0, 2])
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x, task_ids=[0, 2])
            assert layer.cores("default", torch.arange(len(TASKS))).dtype == torch.float32
        assert output.dtype == torch.bfloat16
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert_close(output, expected, 2e-2)

    def test_the_base_decides_on_the_dtype(self):
        """A base layer that casts in a hook, as those do whose weights are stored in another precision."""
        model, layer = adapt_linear(dtype=torch.float32)
        x = inputs(BATCH, 3, D_IN).float()
        expected = model(x, task_ids=[0, 2])
        layer.base_layer.register_forward_hook(lambda module, args, output: output.bfloat16())
        output = model(x, task_ids=[0, 2])
        assert output.dtype == torch.bfloat16
        assert_close(output, expected, 2e-2)

    def test_autocast_of_the_adapter_can_be_left_off(self):
        torch.manual_seed(0)
        config = TALoRAConfig(target_modules=["qkv"], task_names=TASKS, **SETTINGS)
        model = get_peft_model(Holder(D_IN, D_OUT).bfloat16(), config, autocast_adapter_dtype=False)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model(inputs(BATCH, D_IN).bfloat16(), task_ids=[0, 2]).dtype == torch.bfloat16
