"""Fifteen traps of PEFT, transformers and SAM that this package was seen to fall into, or its users would.

Each has a test. The numbers are those of `TRAPS`, which names the tests that stand elsewhere; the others are here.
"""

import ast
import functools
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_SIZE, make_sam
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import SamModel, SamVisionConfig, SamVisionModel, Trainer, TrainingArguments
from tuner_cases import TASKS, adapted_layers, assert_close, assert_visibly_different, folded, saying

from peft_talora import MSamModel, TALoRAConfig, save_adapter

HEADS = {"normals": 3, "depth": 1}
TRAPS = {
    1: ["test_traps.test_trap_1_windows_are_folded_sample_major", "test_traps.test_trap_1_loras_adapter_names_fail"],
    2: [
        "test_peft_contract.TestMerge.test_merge_and_unload_keeps_the_trained_heads_and_norms",
        "test_peft_contract.TestMerge.test_unload_takes_the_updates_out_and_keeps_what_was_trained_in_full",
    ],
    3: [
        "test_traps.test_trap_3_a_module_dict_cannot_be_saved_but_its_heads_can",
        "test_traps.test_trap_3_the_heads_names_match_no_other_task",
    ],
    4: [
        "test_tuner_config.TestRejects.test_value",
        "test_tuner_model.TestNames.test_of_a_path_component",
        "test_tuner_model.TestNames.test_of_a_module_parameter_or_task",
    ],
    5: [
        "test_traps.test_trap_5_an_adapter_with_heads_is_refused_by_a_plain_sam",
        "test_tuner_model.TestSave.test_modules_to_save_the_model_does_not_have",
        "test_hub.test_save_and_load_round_trip",
    ],
    6: [
        "test_msam_with_talora.test_a_merged_task_is_predicted_alone",
        "test_msam_with_talora.test_a_merged_and_unloaded_model_is_a_plain_msam_of_one_task",
        "test_task_state.TestHeads.test_merged_task_follows_the_merge",
    ],
    7: [
        "test_traps.test_trap_7_the_trainer_drops_task_ids_and_the_call_says_so",
        "test_tuner_model.TestStart.test_task_type_warns_that_task_ids_vanish",
        "test_task_state.TestRouting.test_model_hands_task_ids_down",
    ],
    8: ["test_traps.test_trap_8_sams_own_image_embeddings_have_no_gradient"],
    9: ["test_traps.test_trap_9_a_stock_tiny_sam_proves_nothing"],
    10: [
        "test_msam.test_every_parameter_of_a_head_gets_a_gradient",
        "test_distributed.test_gradients_of_two_processes_are_those_of_one",
        "test_recipes.test_two_processes_train_to_the_end_and_write_one_result",
    ],
    11: [
        "test_hub_faults.test_trap_11_the_card_survives_push_to_hub",
        "test_hub_faults.test_trap_11_pefts_own_push_to_hub_loses_the_card_and_the_heads",
    ],
    12: ["test_traps.test_trap_12_sams_tied_embedding_is_not_in_an_msam"],
    13: [
        "test_traps.test_trap_13_reentrant_checkpointing_wants_input_gradients",
        "test_task_state.TestGradients.test_activation_checkpointing_gives_the_same_gradient",
    ],
    14: ["test_traps.test_trap_14_bare_names_hit_the_mask_decoder"],
    15: [
        "test_traps.test_trap_15_a_disabled_adapter_takes_its_heads_along",
        "test_traps.test_trap_15_only_one_adapter_with_heads_is_active",
    ],
}


@functools.cache
def names_of_tests(module: str) -> set[str]:
    """`test_x`, or `TestX.test_y`, of a file of tests."""
    body = ast.parse((Path(__file__).parent / f"{module}.py").read_text()).body
    names = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    for group in (node for node in body if isinstance(node, ast.ClassDef)):
        names |= {f"{group.name}.{node.name}" for node in group.body if isinstance(node, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("number", range(1, 16))
def test_every_trap_has_a_test(number):
    assert TRAPS[number]
    for test in TRAPS[number]:
        module, _, name = test.partition(".")
        assert name.split(".")[-1].startswith("test_")
        assert name in names_of_tests(module), test


def make_msam(sam_folder) -> MSamModel:
    return MSamModel.from_pretrained(sam_folder, tasks=HEADS)


def test_trap_1_windows_are_folded_sample_major(images):
    """A windowed block sees (B · windows, w, w, C); every sample's windows get that sample's task."""
    model = get_peft_model(
        make_sam().vision_encoder, TALoRAConfig(task_names=TASKS, target_modules=["qkv", "lin1"], init_weights=False)
    )
    seen = []
    for layer in adapted_layers(model):
        layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    many, ids = folded(images)  # six rows, task-major
    with torch.no_grad():
        output = model(pixel_values=many, task_ids=ids).last_hidden_state
        assert seen[:4] == [(6 * 9, 3, 3, 32), (6, 8, 8, 32), (6, 8, 8, 32), (6, 8, 8, 32)]
        for row, task in enumerate(ids):
            alone = model(pixel_values=many[row][None], task_ids=[int(task)]).last_hidden_state
            assert_close(output[row][None], alone)
    assert_visibly_different(*output[::2])


def test_trap_1_loras_adapter_names_fail(images):
    """Which is why a task is not an adapter here: stock LoRA's names per sample do not survive windows."""
    model = get_peft_model(make_sam(), LoraConfig(target_modules=["attn.qkv"])).eval()
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 2 and 18"):
        model(pixel_values=images, adapter_names=["default", "__base__"])


def test_trap_3_a_module_dict_cannot_be_saved_but_its_heads_can(sam_folder):
    with pytest.raises(TypeError, match="ModuleDict"):
        get_peft_model(make_msam(sam_folder), TALoRAConfig(modules_to_save=["task_heads"]))
    model = get_peft_model(make_msam(sam_folder), TALoRAConfig())
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "task_heads" in name}
    for part in ("no_mask_embed.weight", "mask_decoder.mask_tokens.weight"):  # embedding and decoder in one module
        assert f"base_model.model.task_heads.depth.modules_to_save.default.{part}" in trained


def test_trap_3_the_heads_names_match_no_other_task(sam_folder):
    """PEFT compares the ends of names, so a bare "depth" takes `far_depth` along; with the container it does not."""
    tasks = [{"name": "depth", "channels": 1}, {"name": "far_depth", "kind": "depth", "channels": 1}]

    def trained(modules_to_save):
        base = MSamModel.from_pretrained(sam_folder, tasks=tasks)
        model = get_peft_model(base, TALoRAConfig(modules_to_save=modules_to_save))
        return {name.split(".")[3] for name, p in model.named_parameters() if p.requires_grad and "heads" in name}

    assert trained(["depth"]) == {"depth", "far_depth"}
    assert trained(["task_heads.depth"]) == {"depth"}
    assert trained(None) == {"depth", "far_depth"}


def test_trap_5_an_adapter_with_heads_is_refused_by_a_plain_sam(sam_folder, tmp_path):
    save_adapter(get_peft_model(make_msam(sam_folder), TALoRAConfig()), tmp_path)
    with pytest.raises(ValueError, match=saying("`modules_to_save`", "'task_heads.normals'", "SamModel")):
        PeftModel.from_pretrained(SamModel.from_pretrained(sam_folder), tmp_path)


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 1)

    def forward(self, x, labels=None):
        return {"loss": (self.inner(x) - labels).square().mean()}


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_trap_7_the_trainer_drops_task_ids_and_the_call_says_so(tmp_path, remove_unused_columns):
    torch.manual_seed(0)
    model = get_peft_model(Regression(), TALoRAConfig(task_names=TASKS, target_modules=["inner"], r=1, r_task=2))
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=remove_unused_columns,
    )
    rows = [{"x": torch.randn(6), "labels": torch.ones(1), "task_ids": task} for task in (2, 0)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    if remove_unused_columns:
        with pytest.raises(ValueError, match="none is selected"):
            trainer.train()
    else:
        trainer.train()
        core = adapted_layers(model)[0].talora_core["default"]
        assert core.any(), "the first step moves the core"


def test_trap_8_sams_own_image_embeddings_have_no_gradient(images):
    """So an encoder is trained through `vision_encoder(pixel_values)`, as mSAM does."""
    model = get_peft_model(make_sam(), TALoRAConfig(task_names=["one"], init_weights=False))
    assert not model.get_image_embeddings(images).requires_grad
    output = model.vision_encoder(images).last_hidden_state
    assert_close(model.get_image_embeddings(images), output)
    output.square().mean().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_trap_9_a_stock_tiny_sam_proves_nothing(images):
    """transformers draws its encoder so small that all images look alike; the tests' own SAM is drawn anew."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64, "output_channels": 16}
    stock = SamVisionModel(SamVisionConfig(image_size=IMAGE_SIZE, patch_size=8, num_pos_feats=8, **sizes)).eval()
    with torch.no_grad():
        alike, different = stock(images).last_hidden_state, make_sam().vision_encoder(images).last_hidden_state
    assert (alike[0] - alike[1]).abs().max() < 1e-5
    assert 0.1 < different.std() < 3
    assert (different[0] - different[1]).abs().max() > 0.1


def test_trap_12_sams_tied_embedding_is_not_in_an_msam(sam_folder, tmp_path):
    sam, msam = SamModel.from_pretrained(sam_folder), make_msam(sam_folder)
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(sam.state_dict(), tmp_path / "sam.safetensors")
    save_file(msam.state_dict(), tmp_path / "msam.safetensors")
    assert [name for name in msam.state_dict() if "positional_embedding" in name] == [
        "shared_image_embedding.positional_embedding"
    ]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_trap_13_reentrant_checkpointing_wants_input_gradients(sam_folder, images):
    """Only the encoder trains, behind a frozen stem: without gradients of the input nothing would be learnt."""

    def gradients(*steps) -> list[torch.Tensor | None]:
        torch.manual_seed(0)
        model = get_peft_model(make_msam(sam_folder), TALoRAConfig(r=4, init_weights=False)).train()
        base = model.get_base_model()
        for step in steps:
            step(base)
        sum(value.square().mean() for value in model(pixel_values=images).logits.values()).backward()
        return [p.grad for name, p in model.named_parameters() if ".talora_" in name]

    def reentrant(base):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})

    expected = gradients()
    assert all(grad.abs().max() > 0 for grad in expected)
    assert gradients(reentrant)[0] is None
    for found, wanted in zip(gradients(reentrant, MSamModel.enable_input_require_grads), expected, strict=True):
        assert_close(found, wanted, 1e-4)


def test_trap_13_the_old_name_of_checkpointing_warns(sam_folder):
    with pytest.warns(FutureWarning, match="activation_checkpointing_enable"):
        make_msam(sam_folder).gradient_checkpointing_enable()


def test_trap_14_bare_names_hit_the_mask_decoder(sam):
    def blocks(targets):
        model = get_peft_model(make_sam(), TALoRAConfig(target_modules=targets, r=2))
        return {name.split(".")[2] for name, module in model.named_modules() if module in adapted_layers(model)}

    assert blocks(["lin1", "lin2"]) == {"vision_encoder", "mask_decoder"}
    assert blocks(r".*vision_encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])") == {"vision_encoder"}


def with_two_adapters(sam_folder) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(make_msam(sam_folder), TALoRAConfig(r=4, init_weights=False))
    model.add_adapter("further", TALoRAConfig(r=2, init_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def test_trap_15_a_disabled_adapter_takes_its_heads_along(sam_folder, images):
    model, start = with_two_adapters(sam_folder), make_msam(sam_folder)
    adapted = model(pixel_values=images).logits
    with model.disable_adapter():
        plain = model(pixel_values=images).logits
    for name, expected in start(images).logits.items():
        assert torch.equal(plain[name], expected)
        assert_visibly_different(adapted[name], expected)


def test_trap_15_only_one_adapter_with_heads_is_active(sam_folder):
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        with_two_adapters(sam_folder).base_model.set_adapter(["default", "further"])
