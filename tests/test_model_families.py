"""Every family of models with default targets: the same properties, from injection to saving, and what is refused."""

import re

import pytest
import torch
import transformers
from family_models import FAMILIES, draw, make_sam2_video, make_sam3, make_sam_hq, needs_torchvision, parameters
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Swinv2Config, Swinv2Model
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession
from tuner_cases import (
    BATCH,
    MLP_2D,
    TASKS,
    TEXT,
    adapt,
    adapted_layers,
    assert_close,
    assert_same_gradients,
    assert_visibly_different,
    folded,
    gradients,
    outputs_of_all,
    saying,
    trainable_names,
)

from peft_talora.tuner import TALoRAConfig, TALoRALayer, use_task
from peft_talora.tuner.families import BLOCK_NORMS, DEFAULT_TARGETS, NOT_BY_SAMPLE

every_family = pytest.mark.parametrize("case", parameters(FAMILIES))
every_model = pytest.mark.parametrize("case", [*parameters(FAMILIES), *parameters([TEXT, MLP_2D])])
checkpointed = [case for case in FAMILIES if case.checkpointing]
other = [case for case in FAMILIES if not case.checkpointing]


def names_of(model: nn.Module, kind: type) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


class TestDefaults:
    @every_family
    def test_adapt_the_vision_encoder_s_attention_alone(self, case):
        found = names_of(adapt(case).get_base_model(), TALoRALayer)
        assert len(found) == case.count
        assert all(re.fullmatch(case.adapted, name) for name in found), found

    def test_every_default_belongs_to_a_tested_family(self):
        tested = {case.build().config.model_type for case in FAMILIES if "sam3" not in case.name}
        tested |= {"sam3", "sam3_vision_model", "sam3_vit_model"}  # these need torchvision to be built
        assert set(DEFAULT_TARGETS) - tested == {"msam", "sam2_video"}  # in test_msam_with_talora.py and below

    def test_names_in_sam3(self):
        """Without torchvision no SAM 3 can be built, yet its layers are told apart by their names alone."""
        vision, text = "vision_encoder.backbone.layers.0", "text_encoder.text_model.encoder.layers.0"
        names = [f"{vision}.attention.q_proj", f"{text}.self_attn.q_proj", "detr_decoder.layers.0.self_attn.q_proj"]
        assert [name for name in names if name.endswith(tuple(DEFAULT_TARGETS["sam3"]))] == names[:1]
        names = [f"{vision}.layer_norm1", f"{text}.layer_norm1", "detr_encoder.layers.0.layer_norm1"]
        assert [name for name in names if BLOCK_NORMS.fullmatch(name)] == names[:1]
        names = ["detr_decoder.box_head.layer1", "dot_product_scoring.query_proj", "dot_product_scoring.text_proj"]
        assert [name for name in names if NOT_BY_SAMPLE.fullmatch(name)] == names[:2]

    def test_layers_to_transform(self):
        model = get_peft_model(make_sam_hq(), TALoRAConfig(r=4, layers_to_transform=[0, 2]))
        found = names_of(model.get_base_model(), TALoRALayer)
        assert found == [f"vision_encoder.layers.{i}.attn.qkv" for i in (0, 2)]

    @every_family
    def test_train_norms_are_those_of_the_blocks(self, case):
        model = adapt(case, train_norms=True)
        start, end = "base_model.model.", ".modules_to_save.default.weight"
        trained = [name for name in trainable_names(model) if name.endswith(end)]
        norms = {name.removeprefix(start).removesuffix(end) for name in trained}
        assert norms == {name for name in names_of(case.build(), nn.LayerNorm) if re.fullmatch(case.norms, name)}
        assert len(norms) == 2 * len({name.rpartition(".")[0] for name in norms})


class TestProperties:
    @every_model
    def test_starts_as_the_base_model(self, case):
        base = case.build().requires_grad_(False)  # as the tuner does: the last bits of `matmul` depend on it
        expected = case.call(base, case.inputs())
        assert 0.05 < expected.std() < 20
        with torch.no_grad():
            model = adapt(case, init_weights="orthogonal")
            assert torch.equal(case.call(model, case.inputs(), task_ids=["edges", "depth"]), expected)

    @every_model
    def test_mixed_batch_equals_each_task_alone(self, case):
        model, x = adapt(case), case.inputs()
        alone = outputs_of_all(case, model)
        assert_visibly_different(*alone)
        with torch.no_grad():
            mixed = case.call(model, x, task_ids=["edges", "depth"])
            assert_close(mixed, torch.stack([alone[2][0], alone[0][1]]))
            many, ids = folded(x)
            assert_close(case.call(model, many, task_ids=ids), alone.flatten(0, 1))
            for task, expected in zip(TASKS, alone, strict=True):
                with use_task(model, task):
                    assert_close(case.call(model, x), expected)

    @every_model
    def test_merge_equals_unmerged(self, case):
        model, x = adapt(case), case.inputs()
        expected = outputs_of_all(case, model)
        model.set_task("normals")
        model.merge_adapter()
        with torch.no_grad():
            assert_close(case.call(model, x), expected[1], 1e-4)
            model.unmerge_adapter()
            model.set_task("edges")
            assert_close(case.call(model.merge_and_unload(), x), expected[2], 1e-4)

    @every_model
    def test_save_and_load_round_trip(self, case, tmp_path):
        model = adapt(case)
        expected = outputs_of_all(case, model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.build(), tmp_path)
        assert torch.equal(outputs_of_all(case, loaded), expected)

    @pytest.mark.parametrize("case", parameters(checkpointed))
    @pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
    # Swin checkpoints its stages and, inside them, its layers, which run without gradients in the first pass.
    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
    def test_activation_checkpointing_gives_the_same_gradient(self, case, use_reentrant):
        model = adapt(case, dtype=torch.float64).double()
        x, ids = folded(case.inputs(dtype=torch.float64))
        weights = torch.randn(len(x), generator=torch.Generator().manual_seed(5))

        def loss(x):
            return (case.call(model, x, task_ids=ids).flatten(1).square().mean(1) * weights).sum()

        expected = gradients(model, x, loss)
        model.get_base_model().activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": use_reentrant}
        )
        model.train()
        assert_same_gradients(gradients(model, x, loss), expected)

    @pytest.mark.parametrize("case", parameters(other))
    def test_activation_checkpointing_is_refused_where_transformers_has_none(self, case):
        with pytest.raises(ValueError, match=saying(type(case.build()).__name__, "does not support", "checkpointing")):
            adapt(case).get_base_model().activation_checkpointing_enable()


def test_adapted_decoder_on_embeddings_made_before():
    """SAM 2's come as a list: the call shows no batch size, and its layers still tell the samples apart."""
    case = next(case for case in FAMILIES if case.name == "sam2")
    model = adapt(case, target_modules=["output_hypernetworks_mlps.1.proj_in"], alpha=32.0)
    with torch.no_grad():
        embeddings = model.get_base_model().get_image_embeddings(case.inputs())
        alone = [model(image_embeddings=list(embeddings), task_ids=[task] * BATCH).pred_masks for task in TASKS]
        mixed = model(image_embeddings=list(embeddings), task_ids=["edges", "depth"]).pred_masks
    assert_visibly_different(*alone)
    assert_close(mixed, torch.stack([alone[2][0], alone[0][1]]))


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="5.18 reads a field that its configuration lacks",
)
class TestSam2Video:
    """Its images come one frame at a time, out of a session: a task is chosen for the call."""

    def masks(self, model: nn.Module, **kwargs) -> torch.Tensor:
        video = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        session = Sam2VideoInferenceSession(video=video, video_height=32, video_width=32, dtype=torch.float32)
        point = {"point_coords": torch.full((1, 1, 1, 2), 9.0), "point_labels": torch.ones(1, 1, 1).int()}
        session.add_point_inputs(session.obj_id_to_idx(1), 0, point)
        session.obj_with_new_inputs = [1]
        return model(inference_session=session, frame_idx=0, **kwargs).pred_masks

    def test_one_task_per_call(self):
        base = make_sam2_video()
        expected = self.masks(base)
        torch.manual_seed(7)
        model = get_peft_model(base, TALoRAConfig(task_names=TASKS, r=4, alpha=16.0, init_weights=False))
        names = names_of(model.get_base_model(), TALoRALayer)
        assert names == [f"vision_encoder.backbone.blocks.{i}.attn.qkv" for i in range(6)]
        by_task = []
        for task in TASKS:
            with use_task(model, task):
                by_task.append(self.masks(model))
            assert torch.equal(self.masks(model, task_ids=[task]), by_task[-1])
        assert_visibly_different(*by_task)
        with model.disable_adapter():
            assert torch.equal(self.masks(model), expected)
        with pytest.raises(ValueError, match=saying("`task_ids` has 2 entries", "batch of 1")):
            self.masks(model, task_ids=["depth", "edges"])


class PlainHeads(nn.Module):
    """A base of the contract of `TALoRAModel` in which nothing is of transformers: (B, 6) → {task: (B, 2)}."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vision_encoder = MLP_2D.build()
        self.task_heads = nn.ModuleDict({task: nn.Linear(5, 2) for task in TASKS})
        self.task_conditional = False
        self.merged_task = None

    def forward(self, x):
        ids = torch.arange(len(TASKS)).repeat_interleave(len(x))
        condition = {"task_ids": ids} if self.task_conditional else {}
        encoded = self.vision_encoder(x.repeat(len(TASKS), 1), **condition).chunk(len(TASKS))
        return {task: self.task_heads[task](part) for task, part in zip(TASKS, encoded, strict=True)}


def test_contract_with_an_encoder_that_is_a_plain_module():
    base, x = PlainHeads(), MLP_2D.inputs()
    with torch.no_grad():
        start = base(x)
        model = get_peft_model(base, TALoRAConfig(target_modules=["lin0"], r=4, alpha=16.0, init_weights=False))
        outputs = model(x)
        for task in TASKS:
            assert_visibly_different(outputs[task], start[task])
            with use_task(model, task):
                model.merge_adapter()
                assert_close(model(x)[task], outputs[task])
                model.unmerge_adapter()
    unloaded = model.unload()
    assert unloaded.vision_encoder._forward_pre_hooks == {}


class TestRefused:
    @needs_torchvision
    def test_layers_that_see_all_decoder_layers_at_once(self):
        """Two decoder layers and two samples: the numbers divide, so nothing else would notice."""
        config = {"task_names": TASKS, "r": 2}
        for target in ("detr_decoder.box_head.layer1", "dot_product_scoring.query_proj"):
            with pytest.raises(ValueError, match=saying(target, "slowest axis", "`exclude_modules`", str(TASKS))):
                get_peft_model(make_sam3(), TALoRAConfig(target_modules=[target], **config))
            get_peft_model(make_sam3(), TALoRAConfig(target_modules=[target], r=2))  # of one task

    @needs_torchvision
    def test_all_other_linear_layers_of_sam3_keep_samples_apart(self):
        case = next(case for case in FAMILIES if case.name == "sam3")
        left_out = r".*(presence_head\.layer3|box_head\.layer\d|query_proj|box_rpb_embed_[xy]\.layer\d)"
        model = adapt(case, target_modules="all-linear", exclude_modules=left_out, r=2, r_out=2)
        alone = outputs_of_all(case, model)
        with torch.no_grad():
            mixed = case.call(model, case.inputs(), task_ids=["edges", "depth"])
        assert_close(mixed, torch.stack([alone[2][0], alone[0][1]]), 1e-4)

    def test_layer_that_sees_no_samples(self):
        """Swin v2 computes its position bias from a table: (1, 2w−1, 2w−1, 2)."""
        sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4}
        base, target = draw(Swinv2Model, Swinv2Config(**sizes)), "continuous_position_bias_mlp.2"
        model = get_peft_model(base, TALoRAConfig(task_names=TASKS, target_modules=[target], r=2))
        images = torch.zeros(BATCH, 3, 32, 32)
        with pytest.raises(ValueError, match=saying(target, "(1, 7, 7, 512)", "`exclude_modules`", "`set_task`")):
            model(pixel_values=images, task_ids=["depth", "edges"])
        with use_task(model, "depth"):
            assert model(pixel_values=images).last_hidden_state.isfinite().all()

    def test_thirds_of_a_projection_that_is_not_fused(self):
        vit = next(case for case in FAMILIES if case.name == "vit")
        with pytest.raises(ValueError, match=saying("layers.0.attention.q_proj", "`qkv_parts`", "16 outputs")):
            adapt(vit, qkv_parts=["q", "v"])

    def test_thirds_where_sam2_widens(self):
        sam2 = next(case for case in FAMILIES if case.name == "sam2")
        with pytest.raises(ValueError, match=saying("blocks.1.attn.qkv", "`qkv_parts`", "48 outputs and 8 inputs")):
            adapt(sam2, qkv_parts=["q", "v"])
        model = adapt(sam2, qkv_parts=["q", "v"], exclude_modules=r".*blocks\.[13]\..*")
        assert len(adapted_layers(model)) == 4

    def test_family_without_a_default(self):
        with pytest.raises(ValueError, match="specify `target_modules`"):
            get_peft_model(TEXT.build(), TALoRAConfig())
        with pytest.raises(ValueError, match=saying("`train_norms=True`", "BertModel", "`modules_to_save`")):
            adapt(TEXT, train_norms=True)
