"""Quantised bases, through PEFT's own backends: torchao's int8 and what bitsandbytes computes on a CPU.

PEFT computes the merged weight in floating point and quantises it anew, so merging costs up to a step of the grid.
"""

import peft
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, SamModel, TorchAoConfig
from tuner_cases import adapted_layers, assert_close, assert_visibly_different, saying, trainable_names

from peft_talora import MSamModel, TALoRAConfig

TASKS = {"normals": 3, "depth": 1}


@pytest.fixture(scope="module")
def torchao():
    if Version(peft.__version__) < Version("0.21"):
        pytest.skip("PEFT 0.20 does not know torchao 0.18; test_tuner_compatibility.py tests that it says so")
    return pytest.importorskip("torchao.quantization", reason="torchao is in the extra `test`")


@pytest.fixture
def int8(torchao, sam_folder) -> MSamModel:
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=["mask_decoder"])
    return MSamModel.from_pretrained(sam_folder, tasks=TASKS, quantization_config=config)


def rounding(weight: torch.Tensor) -> torch.Tensor:
    """What int8 may move each weight by: half a step, which is 1/127 of the largest weight of a row."""
    return 0.51 * weight.abs().amax(1, keepdim=True) / 127


def adapt(base: nn.Module):
    torch.manual_seed(0)
    model = get_peft_model(base, TALoRAConfig(r=4, init_weights=False, alpha=8.0))
    layer = adapted_layers(model)[0]
    x = torch.randn(2, 3, 3, layer.in_features, generator=torch.Generator().manual_seed(2))
    return model, layer, x


class TestTorchao:
    def test_the_encoder_is_quantised_and_the_heads_are_not(self, torchao, int8):
        assert isinstance(int8.vision_encoder.layers[0].attn.qkv.weight, torchao.Int8Tensor)
        assert {type(p) for p in int8.task_heads.parameters()} == {nn.Parameter}

    def test_forward_is_the_base_and_the_update(self, int8, images):
        model, layer, x = adapt(int8)
        assert layer.quantization_backend.backend_name == "torchao"
        outputs = []
        with torch.no_grad():
            for task in TASKS:
                model.set_task(task)
                outputs.append(layer(x))
                assert_close(outputs[-1], layer.base_layer(x) + x @ layer.get_delta_weight("default", task).T)
            assert_visibly_different(layer.base_layer(x), *outputs)
            model.set_task(None)
            logits = model(pixel_values=images).logits
        assert min(value.abs().max() for value in logits.values()) > 0.1

    def test_starts_as_the_quantised_base(self, int8, images):
        with torch.no_grad():
            expected = int8(images).logits
            logits = get_peft_model(int8, TALoRAConfig(r=4)).eval()(pixel_values=images).logits
        for name in TASKS:
            assert_close(logits[name], expected[name])

    def test_gradients_flow_and_move_the_adapter_only(self, torchao, int8, images):
        model, _, _ = adapt(int8)
        model.train()
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        sum(value.square().mean() for value in model(pixel_values=images).logits.values()).backward()
        optimizer.step()
        assert before.keys() == trainable_names(model)
        for name, value in before.items():
            assert ".talora_" in name or ".task_heads." in name
            assert not torch.equal(model.get_parameter(name), value), name
        assert isinstance(adapted_layers(model)[0].base_layer.weight, torchao.Int8Tensor)

    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_merge_and_unmerge_up_to_a_step_of_the_grid(self, torchao, int8, safe_merge):
        model, layer, x = adapt(int8)
        with torch.no_grad():
            model.set_task("depth")
            start, expected = layer.get_base_weight(), layer(x)
            model.merge_adapter(safe_merge=safe_merge)
            assert isinstance(layer.base_layer.weight, torchao.Int8Tensor)
            merged = start + layer.get_delta_weight("default", "depth")
            assert ((layer.get_base_weight() - merged).abs() <= rounding(merged)).all()
            assert_close(layer(x), expected, 1e-2)
            model.unmerge_adapter()
            assert ((layer.get_base_weight() - start).abs() <= rounding(merged) + rounding(start)).all()

    def test_broken_weights_are_refused_by_safe_merge(self, int8):
        model, layer, _ = adapt(int8)
        model.set_task("depth")
        start = layer.get_base_weight().clone()
        with torch.no_grad():
            layer.talora_core["default"][0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(layer.get_base_weight(), start)

    def test_merge_and_unload_leaves_a_quantised_model(self, torchao, int8, images):
        model, _, _ = adapt(int8)
        model.set_task("depth")
        with torch.no_grad():
            expected = model(pixel_values=images).logits["depth"]
            plain = model.merge_and_unload()
            assert isinstance(plain.vision_encoder.layers[0].attn.qkv.weight, torchao.Int8Tensor)
            assert_close(plain(images, tasks=["depth"]).logits["depth"], expected, 5e-2)

    def test_quantised_heads_are_refused(self, torchao, sam_folder):
        config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
        with pytest.raises(ValueError, match=saying("heads", "'mask_decoder'", "`modules_to_not_convert`")):
            MSamModel.from_pretrained(sam_folder, tasks=TASKS, quantization_config=config)

    def test_a_stock_sam(self, torchao, sam_folder, images):
        """Without heads, the whole of it may be quantised."""
        config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
        sam = SamModel.from_pretrained(sam_folder, quantization_config=config)
        model = get_peft_model(sam, TALoRAConfig(task_names=list(TASKS), r=4, init_weights=False))
        encoder = model.get_base_model().vision_encoder
        assert_visibly_different(*(encoder(images, task_ids=[task] * 2).last_hidden_state for task in TASKS))


class Blocks(nn.Module):
    """Two linear layers on tokens (B, L, 64): bitsandbytes' CPU kernels want three axes and widths of 64."""

    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return self.lin1(torch.tanh(self.lin0(x)))


BITSANDBYTES = {
    "int8": ("Linear8bitLt", {"has_fp16_weights": False, "threshold": 6.0}, 2e-2),
    "nf4": ("Linear4bit", {"quant_type": "nf4", "compute_dtype": torch.float32}, 0.2),
}


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # bitsandbytes says that it computes in float16
@pytest.mark.parametrize("kind", BITSANDBYTES)
class TestBitsandbytes:
    """Runs where bitsandbytes is installed; it is in no extra of this package, for it is large.

    In evaluation mode bitsandbytes 0.50 packs 4-bit weights anew for some CPUs, and PEFT cannot read them then (for
    stock LoRA neither), so merging there is tested in training mode.
    """

    def quantised(self, kind: str) -> Blocks:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        torch.manual_seed(0)
        model = Blocks()
        layer_type, settings, _ = BITSANDBYTES[kind]
        for name, layer in dict(model.named_children()).items():
            quantised = getattr(bitsandbytes.nn, layer_type)(layer.in_features, layer.out_features, **settings)
            quantised.load_state_dict(layer.state_dict())
            setattr(model, name, quantised.to("cpu"))
        return model.to("cpu").eval()

    def adapted(self, kind: str):
        config = TALoRAConfig(
            task_names=list(TASKS), target_modules=["lin0", "lin1"], r=4, alpha=8.0, init_weights=False
        )
        model = get_peft_model(self.quantised(kind), config)
        return model, adapted_layers(model)[0], torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))

    def test_forward_and_gradients(self, kind):
        model, layer, x = self.adapted(kind)
        assert kind[-1] in layer.quantization_backend.backend_name
        model.set_task("depth")
        with torch.no_grad():
            update = x @ layer.get_delta_weight("default", "depth").T
            assert_close(layer(x), layer.base_layer(x) + update, 1e-3)
            assert update.abs().max() > 0.1
        model(x, task_ids=["depth", "normals"]).square().mean().backward()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)

    def test_merge_and_unmerge(self, kind):
        model, layer, x = self.adapted(kind)
        model.train().set_task("depth")
        with torch.no_grad():
            expected = layer(x)
            model.merge_adapter(safe_merge=True)
            assert_close(layer(x), expected, BITSANDBYTES[kind][2])
            model.unmerge_adapter()
            assert_close(layer(x), expected, BITSANDBYTES[kind][2])


def test_quantised_heads_are_refused_with_bitsandbytes_too(sam_folder):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=saying("heads", "'mask_decoder'", "`llm_int8_skip_modules`")):
        MSamModel.from_pretrained(sam_folder, tasks=TASKS, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
