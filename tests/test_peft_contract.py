"""What PEFT and transformers let a user do with any method, done with this one; see also `test_tuner_model.py`."""

import copy
import pickle

import pytest
import torch
from conftest import make_sam
from peft import AutoPeftModel, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, SamModel
from tuner_cases import (
    BATCH,
    MLP_2D,
    TASKS,
    TEXT,
    VISION,
    adapt,
    adapted_layers,
    assert_close,
    assert_visibly_different,
    config_for,
    needs_peft_0_21,
    saying,
    trainable_names,
)

from peft_talora import MSamModel, TALoRAConfig, load, save_adapter, set_task
from peft_talora.tuner import Linear

HEADS = {"normals": 3, "depth": 1}  # not in alphabetical order


def make_msam(sam_folder, **values) -> MSamModel:
    return MSamModel.from_pretrained(sam_folder, tasks=HEADS, **values)


def redraw(model: nn.Module) -> nn.Module:
    """Move everything that trains, heads included, from where it started."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def adapt_msam(sam_folder, **values) -> PeftModel:
    config = TALoRAConfig(**{"r": 4, "init_weights": False, "train_norms": True, **values})
    return redraw(get_peft_model(make_msam(sam_folder), config))


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
    return dict(model(pixel_values=images, **kwargs).logits)


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def adapted_names(model: nn.Module) -> set[str]:
    prefix = "base_model.model."
    return {name.removeprefix(prefix) for name, module in model.named_modules() if isinstance(module, Linear)}


class TestTargets:
    BLOCKS = r"vision_encoder\.layers\.\d+\."

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (
                {"target_modules": ["attn.qkv", "mlp.lin2"], "exclude_modules": ["layers.0.attn.qkv"]},
                "qkv 123 lin2 0123",
            ),
            ({"target_modules": ["qkv", "proj"], "exclude_modules": r".*\.proj"}, "qkv 0123"),
            ({"target_modules": BLOCKS + r"attn\.qkv", "exclude_modules": r".*\.[12]\.attn\.qkv"}, "qkv 03"),
            ({"target_modules": ["qkv"], "layers_to_transform": 0, "layers_pattern": "layers"}, "qkv 0"),
            ({"target_modules": ["qkv"], "layers_to_transform": [0, 3], "layers_pattern": ["layers"]}, "qkv 03"),
            ({"target_modules": ["qkv"], "layers_to_transform": [2], "layers_pattern": "layers"}, "qkv 2"),
        ],
        ids=repr,
    )
    def test_which_layers(self, sam_folder, values, expected):
        words = expected.split()
        wanted = {
            f"vision_encoder.layers.{block}.{'mlp' if name.startswith('lin') else 'attn'}.{name}"
            for name, blocks in zip(words[::2], words[1::2], strict=True)
            for block in blocks
        }
        assert adapted_names(get_peft_model(make_msam(sam_folder), TALoRAConfig(**{"r": 2, **values}))) == wanted

    def test_all_linear_is_every_linear_layer_but_those_left_out(self, sam_folder):
        """Of an mSAM the heads are linear too; they train in full, so they are left out by name."""
        model = get_peft_model(
            make_msam(sam_folder), TALoRAConfig(r=2, target_modules="all-linear", exclude_modules=r"task_heads\..*")
        )
        linears = {name for name, m in make_msam(sam_folder).named_modules() if isinstance(m, nn.Linear)}
        assert adapted_names(model) == {name for name in linears if name.startswith("vision_encoder.")}
        assert len(adapted_names(model)) == 16

    def test_a_block_that_is_not_there(self, sam_folder):
        config = TALoRAConfig(target_modules=["qkv"], layers_to_transform=[7], layers_pattern="layers")
        with pytest.raises(ValueError, match=saying("layers_to_transform", "7")):
            get_peft_model(make_msam(sam_folder), config)

    def test_patterns_reach_the_whole_of_a_sam(self, sam_folder):
        model = get_peft_model(
            make_msam(sam_folder),
            TALoRAConfig(
                r=4, rank_pattern={r"layers\.[01]\.attn\.qkv": 2}, alpha_pattern={r"layers\.1\.attn\.qkv": 8.0}
            ),
        )
        layers = adapted_layers(model)
        assert [layer.r["default"] for layer in layers] == [2, 2, 4, 4]
        assert [layer.scaling["default"] for layer in layers] == [0.5, 4.0, 0.5, 0.5]


class TestBias:
    @needs_peft_0_21
    @pytest.mark.parametrize("bias", ["all", "talora_only"])
    def test_a_trained_bias_is_saved_and_comes_back(self, bias, tmp_path):
        model = redraw(adapt(TEXT, bias=bias))
        biases = {name for name in trainable_names(model) if name.endswith("bias")}
        everywhere = {name for name, _ in model.named_parameters() if name.endswith("bias")}
        assert biases == everywhere if bias == "all" else biases == {n for n in everywhere if ".base_layer." in n}
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(TEXT.build(), tmp_path)
        with torch.no_grad():
            outputs = [TEXT.call(m, TEXT.inputs(), task_ids=[0, 2]) for m in (model, loaded)]
            assert_visibly_different(outputs[0], TEXT.call(TEXT.build(), TEXT.inputs()))
        assert torch.equal(*outputs)


class TestSeveralAdapters:
    """Two adapters of other tasks and ranks on one mSAM: one for all heads with norms, one shared of one task."""

    @pytest.fixture
    def model(self, sam_folder):
        model = adapt_msam(sam_folder)
        model.add_adapter("joint", TALoRAConfig(task_names=["any"], r=2, init_weights=False, target_modules=["lin1"]))
        model.set_adapter("joint")
        redraw(model)
        model.set_adapter("default")
        return model

    def test_each_has_heads_and_norms_of_its_own(self, model, images):
        first = predict(model, images)
        model.set_adapter("joint")
        second = predict(model, images)
        with model.disable_adapter():
            base = predict(model, images)
        for name in HEADS:
            assert_visibly_different(first[name], second[name], base[name])
        model.set_adapter("default")
        assert_same(predict(model, images), first)

    def test_deleting_one_leaves_the_other(self, model, images):
        expected = predict(model, images)
        model.delete_adapter("joint")
        assert not any("joint" in name for name in model.state_dict())
        assert_same(predict(model, images), expected)
        with pytest.raises(ValueError, match="Adapter joint not found"):
            model.set_adapter("joint")

    def test_both_come_back_from_one_folder(self, model, sam_folder, images, tmp_path):
        expected = predict(model, images)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_msam(sam_folder), tmp_path)
        loaded.load_adapter(tmp_path / "joint", "joint")
        assert_same(predict(loaded, images), expected)
        for each in (model, loaded):
            each.set_adapter("joint")
        assert_same(predict(loaded, images), predict(model, images))

    def test_a_deleted_adapter_s_choice_is_not_the_next_one_s(self):
        model = adapt(MLP_2D)
        model.set_task("normals")
        model.add_adapter("further", config_for(MLP_2D))
        model.set_adapter("further")
        model.delete_adapter("default")
        model.add_adapter("default", config_for(MLP_2D))
        model.set_adapter("default")
        with pytest.raises(ValueError, match="none is selected"):
            model(MLP_2D.inputs())


class TestMerge:
    def test_unload_takes_the_updates_out_and_keeps_what_was_trained_in_full(self, sam_folder):
        """As PEFT has it: the heads and norms of `modules_to_save` stay in the model as they were trained."""
        model, start = adapt_msam(sam_folder), make_msam(sam_folder).state_dict()
        plain = model.unload()
        assert type(plain) is MSamModel
        assert plain.state_dict().keys() == start.keys()
        for name, value in plain.state_dict().items():
            trained = name.startswith("task_heads.") or ("layers." in name and "layer_norm" in name)
            assert torch.equal(value, start[name]) is not trained, name

    def test_merge_and_unload_keeps_the_trained_heads_and_norms(self, sam_folder, images):
        model = adapt_msam(sam_folder)
        expected = predict(model, images, tasks=["depth"])["depth"]
        model.set_task("depth")
        plain = model.merge_and_unload(safe_merge=True)
        assert plain.state_dict().keys() == make_msam(sam_folder).state_dict().keys()
        assert_close(predict(plain, images, tasks=["depth"])["depth"], expected, 1e-4)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_safe_merge_speaks_as_peft_does_and_changes_nothing(self, value):
        model = adapt(MLP_2D)
        model.set_task("edges")
        weights = [layer.weight.clone() for layer in adapted_layers(model)]
        with torch.no_grad():
            adapted_layers(model)[0].talora_in["default"][0, 0] = value
        message = r"NaNs detected in the merged weights\. The adapter default seems to be broken"
        with pytest.raises(ValueError, match=message):
            model.merge_adapter(safe_merge=True)
        assert all(torch.equal(a.weight, w) for a, w in zip(adapted_layers(model), weights, strict=True))

    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    def test_safe_merge_of_a_broken_last_layer_merges_none(self, sam_folder, images, merge):
        model = adapt_msam(sam_folder)
        model.set_task("depth")
        expected, modules = predict(model, images)["depth"], dict(model.named_modules())
        last = adapted_layers(model)[-1].talora_in["default"]
        sound = last.detach().clone()
        with torch.no_grad():
            last[0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaNs detected"):
            getattr(model, merge)(safe_merge=True)
        with torch.no_grad():
            last.copy_(sound)
        assert not any(layer.merged for layer in adapted_layers(model))
        assert dict(model.named_modules()) == modules
        assert_close(predict(model, images)["depth"], expected)
        assert predict(model, images, tasks=["normals"]).keys() == {"normals"}

    def test_a_failed_merge_keeps_what_was_merged_before(self):
        model = adapt(MLP_2D)
        model.add_adapter("other", config_for(MLP_2D))
        model.set_task("edges")
        model.base_model.task_state.select(["other"], "depth")
        model.merge_adapter(["default"])
        expected = MLP_2D.call(model, MLP_2D.inputs())
        with torch.no_grad():
            adapted_layers(model)[-1].talora_in["other"][0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaNs detected"), pytest.warns(UserWarning, match="Already following"):
            model.merge_adapter(["other"], safe_merge=True)
        assert [layer.merged_adapters for layer in adapted_layers(model)] == [["default"]] * 2
        assert_close(MLP_2D.call(model, MLP_2D.inputs()), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_merges_on_a_cpu(self, sam_folder, images, dtype):
        model = redraw(get_peft_model(make_msam(sam_folder, dtype=dtype), TALoRAConfig(r=4, init_weights=False)))
        model.set_task("depth")
        expected = predict(model, images.to(dtype))["depth"]
        assert expected.dtype == dtype
        assert expected.abs().max() > 0.1
        model.merge_adapter(safe_merge=True)
        assert_close(predict(model, images.to(dtype))["depth"], expected, 5e-2)
        model.unmerge_adapter()
        assert_close(predict(model, images.to(dtype))["depth"], expected, 5e-2)


class TestDisable:
    def test_the_base_knows_at_once(self, sam_folder):
        """And not only at the next forward: whoever asks `task_conditional` within the block gets the right answer."""
        model = adapt_msam(sam_folder)
        base = model.get_base_model()
        assert base.task_conditional is True
        with model.disable_adapter():
            assert base.task_conditional is False
        assert base.task_conditional is True


class TestPrecision:
    def test_autocast_with_heads(self, sam_folder, images):
        model = adapt_msam(sam_folder).train()
        expected = predict(model, images)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixel_values=images).logits
        sum(value.float().square().mean() for value in logits.values()).backward()
        for name in HEADS:
            assert_close(logits[name].detach(), expected[name], 0.1)
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


class TestLoading:
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_heads_and_norms_come_back(self, sam_folder, images, tmp_path, low_cpu_mem_usage):
        model = adapt_msam(sam_folder)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_msam(sam_folder), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not any(p.is_meta for p in loaded.parameters())
        assert_same(predict(loaded, images), predict(model, images))

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    def test_copies_of_an_msam(self, sam_folder, images, clone):
        model = adapt_msam(sam_folder)
        model.set_task("depth")
        other = clone(model)
        expected = predict(model, images)
        assert list(expected) == ["depth"]
        assert_same(predict(other, images), expected)
        other.set_task("normals")
        assert list(predict(other, images)) == ["normals"]
        assert_same(predict(model, images), expected)

    def test_auto_peft_model_of_a_saved_msam(self, sam_folder, images, tmp_path):
        """It imports a class by name, so it wants to be told that this package may be imported."""
        make_msam(sam_folder).save_pretrained(tmp_path / "msam")
        base = MSamModel.from_pretrained(tmp_path / "msam")
        model = redraw(get_peft_model(base, TALoRAConfig(r=4, init_weights=False)))
        save_adapter(model, tmp_path / "adapter")
        with pytest.raises(ValueError, match=saying("'peft_talora.msam'", "import_allowlist")):
            AutoPeftModel.from_pretrained(tmp_path / "adapter")
        loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["peft_talora"])
        assert_same(predict(loaded, images), predict(model, images))
        assert_same(predict(load(tmp_path / "adapter"), images), predict(model, images))

    def test_auto_peft_model_of_a_stock_sam_needs_the_tasks(self, sam_folder, images, tmp_path):
        model = adapt_msam(sam_folder)
        save_adapter(model, tmp_path)
        with pytest.raises(ValueError, match=saying("is a stock SAM", "tasks=")):
            AutoPeftModel.from_pretrained(tmp_path, import_allowlist=["peft_talora"])
        loaded = AutoPeftModel.from_pretrained(tmp_path, import_allowlist=["peft_talora"], tasks=HEADS)
        assert_same(predict(loaded, images), predict(model, images))

    def test_auto_model_of_an_adapter_s_folder(self, sam_folder, images, tmp_path):
        """transformers reads the base from the adapter's configuration, so that must be a saved mSAM."""
        make_msam(sam_folder).save_pretrained(tmp_path / "msam")
        base = MSamModel.from_pretrained(tmp_path / "msam")
        model = redraw(get_peft_model(base, TALoRAConfig(r=4, init_weights=False)))
        save_adapter(model, tmp_path / "adapter")
        loaded = AutoModel.from_pretrained(tmp_path / "adapter")
        assert type(loaded) is MSamModel
        assert_same(predict(loaded, images), predict(model, images))

    def test_auto_model_of_a_stock_sam_would_lose_the_heads(self, sam_folder, tmp_path):
        save_adapter(adapt_msam(sam_folder), tmp_path)
        with pytest.raises(ValueError, match=saying("'task_heads.normals'", "SamModel", "would be lost")):
            AutoModel.from_pretrained(tmp_path)


class TestTransformersOwnMethods:
    """`add_adapter` and its kin of `PreTrainedModel`, without a `PeftModel`."""

    @torch.no_grad()
    def encode(self, model: SamModel, images: torch.Tensor, task: str) -> torch.Tensor:
        set_task(model, task)
        return model.vision_encoder(images).last_hidden_state

    @pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # what a second adapter says
    def test_on_a_sam(self, images, tmp_path):
        sam, base = make_sam(), make_sam().requires_grad_(False)
        sam.add_adapter(TALoRAConfig(task_names=["a", "b"], r=4, alpha=16, init_weights=False), "one")
        sam.add_adapter(TALoRAConfig(task_names=["c", "d", "e"], r=2, alpha=16, init_weights=False), "two")
        assert sam.active_adapters() == ["two"]
        two = self.encode(sam, images, "e")
        sam.set_adapter("one")
        one = self.encode(sam, images, "b")
        with torch.no_grad():
            plain = base.vision_encoder(images).last_hidden_state
            assert_visibly_different(plain, one, two)
            sam.disable_adapters()
            assert torch.equal(sam.vision_encoder(images).last_hidden_state, plain)
        sam.enable_adapters()
        assert torch.equal(self.encode(sam, images, "b"), one)
        sam.save_pretrained(tmp_path)
        other = make_sam()
        other.load_adapter(tmp_path, "one")
        assert torch.equal(self.encode(other, images, "b"), one)
        with pytest.warns(UserWarning, match="Setting active adapter to two"):
            sam.delete_adapter("one")
        assert torch.equal(self.encode(sam, images, "e"), two)
        with pytest.raises(ValueError, match=saying("'one'", "['two']")):
            set_task(sam, "b", "one")
        sam.delete_adapter("two")
        with torch.no_grad():
            assert torch.equal(sam.vision_encoder(images).last_hidden_state, plain)

    def test_on_an_msam(self, sam_folder, images, tmp_path):
        msam = make_msam(sam_folder)
        plain = predict(make_msam(sam_folder).requires_grad_(False), images)
        msam.add_adapter(TALoRAConfig(r=4, init_weights=False, train_norms=True))
        trained = predict(redraw(msam), images)
        assert msam.task_conditional is True
        for name in HEADS:
            assert_visibly_different(trained[name], plain[name])
        msam.disable_adapters()
        assert msam.task_conditional is False
        assert_same(predict(msam, images), plain)
        msam.enable_adapters()  # heads and norms with it, which transformers itself leaves disabled
        assert msam.task_conditional is True
        assert_same(predict(msam, images), trained)
        msam.save_pretrained(tmp_path)
        other = make_msam(sam_folder)
        other.load_adapter(tmp_path)
        assert_same(predict(other, images), trained)
        other.delete_adapter("default")
        assert_same(predict(other, images), plain)


class TestInterrupt:
    def interrupt(self, module: nn.Module, call) -> None:
        def stop(*_):
            raise KeyboardInterrupt

        handle = module.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            call()
        handle.remove()

    @pytest.mark.parametrize("where", ["vision_encoder.neck", "task_heads.depth"])
    def test_a_direct_call_of_the_encoder_inherits_nothing(self, sam_folder, images, where):
        model = adapt_msam(sam_folder)
        base = model.get_base_model()
        encoder = base.vision_encoder
        self.interrupt(base.get_submodule(where), lambda: model(pixel_values=images, task_ids=["depth", "normals"]))
        assert model.base_model.task_state.calls == []
        with pytest.raises(ValueError, match="none is selected"):
            encoder(images)
        model.set_task("normals")
        with torch.no_grad():
            chosen = encoder(images).last_hidden_state
            assert_close(chosen, encoder(images, task_ids=["normals"] * BATCH).last_hidden_state)

    def test_nor_after_an_interrupted_direct_call(self, images):
        sam = make_sam()
        sam.add_adapter(TALoRAConfig(task_names=TASKS, r=2, init_weights=False))
        encoder = sam.vision_encoder
        self.interrupt(encoder.neck, lambda: encoder(images, task_ids=[0, 1]))
        with pytest.raises(ValueError, match="none is selected"):
            encoder(images)


class TestCost:
    def test_values_of_task_ids_are_read_once(self, images):
        """Reading a tensor's values waits for the device: at the entry that gets the ids, at no other one inside."""
        from torch.utils._python_dispatch import TorchDispatchMode

        class Counter(TorchDispatchMode):
            def __init__(self):
                super().__init__()
                self.count = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                self.count += "unique" in str(function)
                return function(*args, **(kwargs or {}))

        class Passing(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder = VISION.build()

            def forward(self, x, task_ids=None):
                return self.encoder(x, task_ids=task_ids).last_hidden_state

        model = get_peft_model(Passing(), TALoRAConfig(task_names=TASKS, target_modules=["qkv"], init_weights=False))
        with torch.no_grad(), Counter() as counter:
            model(images, task_ids=torch.tensor([2, 0]))
            assert counter.count == 1
            model(images, task_ids=["edges", "depth"])
            model.set_task("depth")
            model.get_base_model().encoder(images)
            assert counter.count == 1
        with pytest.raises(ValueError, match="index 3"):
            model(images, task_ids=torch.tensor([3, 0]))
