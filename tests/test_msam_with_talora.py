"""mSAM and the tuner together: the contract of four names, on a tiny real SAM. T = 3 tasks, B = 2 images."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import SamModel

from peft_talora import MSamModel, TALoRAConfig, use_task

TASKS = {"segmentation": 4, "depth": 1, "normals": 3}  # not in alphabetical order
CHECKPOINTING = {"none": None, "non-reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


def scramble(heads):
    """Make heads differ, as trained ones do: from one start, swapped tasks would not be noticed."""
    with torch.no_grad():
        for number, head in enumerate(heads.values()):
            generator = torch.Generator().manual_seed(number)
            for parameter in head.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def msam(sam_folder):
    model = MSamModel.from_pretrained(sam_folder, tasks=TASKS)
    scramble(model.task_heads)
    return model


@pytest.fixture
def model(msam):
    torch.manual_seed(0)
    model = get_peft_model(msam, TALoRAConfig(r=4, init_weights=False, train_norms=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "talora_core" in name:
                parameter.mul_(8)  # so that the tasks' embeddings differ by more than 0.1
    return model


def count_encoder_calls(model):
    calls = []
    model.get_base_model().vision_encoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


def loss(logits):
    """Another weight for every task and pixel, so that no two tasks can be swapped unnoticed."""
    generator = torch.Generator().manual_seed(9)
    return sum((logits[name] * torch.randn(logits[name].shape, generator=generator)).mean() for name in TASKS)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def assert_gradients_close(found, expected):
    assert max(grad.abs().max() for grad in expected.values()) > 1e-2
    for name, grad in expected.items():
        scale = grad.abs().max().clamp(min=1e-4)
        torch.testing.assert_close(found[name] / scale, grad / scale, atol=1e-4, rtol=0, msg=name)


def test_starts_as_the_base_model(sam_folder, images):
    sam = SamModel.from_pretrained(sam_folder).eval()
    model = get_peft_model(MSamModel.from_pretrained(sam_folder, tasks=TASKS), TALoRAConfig(r=4)).eval()
    with torch.no_grad():
        embeddings = sam.vision_encoder(images).last_hidden_state
        adapted = model.vision_encoder(images, task_ids=["depth", "normals"]).last_hidden_state
        assert torch.equal(adapted, embeddings)
        dense = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        dense = dense.expand(2, -1, *embeddings.shape[-2:])
        positions = sam.get_image_wide_positional_embeddings()
        masks, _ = sam.mask_decoder(
            image_embeddings=embeddings,
            image_positional_embeddings=positions.expand(2, -1, -1, -1),
            sparse_prompt_embeddings=None,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )[:2]
        logits = model(pixel_values=images).logits
    assert masks.abs().max() > 0.1
    for name, channels in TASKS.items():
        for channel in range(channels):
            torch.testing.assert_close(logits[name][:, channel], masks[:, 0, 0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_folded_equals_each_task_alone_equals_task_ids(model, images):
    model.eval()
    folded = model(pixel_values=images).logits
    mixed = model(pixel_values=images, task_ids=["normals", "segmentation"]).logits
    assert list(mixed) == ["segmentation", "normals"]
    for name in TASKS:
        alone = model(pixel_values=images, tasks=[name]).logits[name]
        torch.testing.assert_close(folded[name], alone, rtol=1e-5, atol=1e-5)
        with use_task(model, name):
            assert torch.equal(model(pixel_values=images).logits[name], alone)
    torch.testing.assert_close(mixed["normals"], folded["normals"][:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed["segmentation"], folded["segmentation"][1:], rtol=1e-5, atol=1e-5)
    embeddings = [model.vision_encoder(images, task_ids=[name] * 2).last_hidden_state for name in TASKS]
    assert (embeddings[0] - embeddings[1]).abs().mean() > 0.1


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_folded_and_task_by_task_give_the_same_gradients(model, images, checkpointing):
    model.train()
    loss(model(pixel_values=images).logits).backward()
    expected = gradients(model)
    if CHECKPOINTING[checkpointing] is not None:
        model.get_base_model().activation_checkpointing_enable(CHECKPOINTING[checkpointing])
    pixel_values = images.clone().requires_grad_()  # what reentrant checkpointing needs with a frozen stem
    loss(model(pixel_values=pixel_values).logits).backward()
    assert_gradients_close(gradients(model), expected)
    # All forwards before the one backward: recomputation must see each call's own task.
    logits = {name: model(pixel_values=pixel_values, tasks=[name]).logits[name] for name in TASKS}
    model.set_task("depth")
    loss(logits).backward()
    assert_gradients_close(gradients(model), expected)


def test_the_encoder_runs_once_unless_its_output_depends_on_the_task(msam, images):
    calls = count_encoder_calls(get_peft_model(msam, TALoRAConfig(r=4, task_names=["shared"])))
    msam(images)
    assert calls == [2]


def test_the_encoder_runs_once_with_stock_lora(msam, images):
    heads = [f"task_heads.{name}" for name in TASKS]
    calls = count_encoder_calls(get_peft_model(msam, LoraConfig(target_modules=["attn.qkv"], modules_to_save=heads)))
    msam(images)
    assert calls == [2]


def test_task_aware_passes_are_folded_into_one_call(model, images):
    calls = count_encoder_calls(model)
    model(pixel_values=images)
    model(pixel_values=images, tasks=["depth"])
    model(pixel_values=images, task_ids=[0, 2])
    with model.disable_adapter():
        model(pixel_values=images)
    model.set_task("depth")
    model.merge_adapter()
    model(pixel_values=images)
    assert calls == [6, 2, 2, 2, 2]


def test_only_adapter_heads_and_block_norms_train(model, images):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model.train()
    loss(model(pixel_values=images).logits).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        kinds = [".talora_" in name, ".modules_to_save." in name]
        moved = not torch.equal(parameter, before[name])
        assert moved == any(kinds), name
    trained_norms = {n.split(".modules_to_save")[0] for n in before if "norm" in n and "modules_to_save.default" in n}
    blocks = {n for n in trained_norms if ".vision_encoder." in n}
    assert len(blocks) == 2 * 4
    assert not any("neck" in name for name in blocks)


@torch.no_grad()
def test_a_merged_task_is_predicted_alone(model, images):
    model.eval()
    expected = model(pixel_values=images, tasks=["normals"]).logits["normals"]
    model.set_task("normals")
    model.merge_adapter()
    base = model.get_base_model()
    assert base.merged_task == "normals"
    merged = model(pixel_values=images).logits
    assert list(merged) == ["normals"]
    torch.testing.assert_close(merged["normals"], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Only task 'normals' can be predicted"):
        model(pixel_values=images, tasks=["depth"])
    model.unmerge_adapter()
    assert base.merged_task is None
    model.set_task(None)
    assert list(model(pixel_values=images).logits) == list(TASKS)


@torch.no_grad()
def test_a_merged_and_unloaded_model_is_a_plain_msam_of_one_task(model, images, tmp_path):
    model.eval()
    expected = model(pixel_values=images, tasks=["depth"]).logits["depth"]
    model.set_task("depth")
    plain = model.merge_and_unload()
    assert type(plain) is MSamModel
    plain.save_pretrained(tmp_path)
    loaded = MSamModel.from_pretrained(tmp_path)
    assert loaded.merged_task == "depth"
    torch.testing.assert_close(loaded(images, tasks=["depth"]).logits["depth"], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Only task 'depth' can be predicted"):
        loaded(images)


def test_unknown_and_duplicate_tasks_are_named(msam, model, images, sam_folder):
    with pytest.raises(ValueError, match=r"Unknown task 'edges'.*\['segmentation', 'depth', 'normals'\]"):
        model(pixel_values=images, tasks=["edges"])
    with pytest.raises(ValueError, match=r"Unknown tasks \['edges'\] in `task_names`"):
        get_peft_model(MSamModel.from_pretrained(sam_folder, tasks=TASKS), TALoRAConfig(task_names=["depth", "edges"]))
    with pytest.raises(ValueError, match="depth"):
        MSamModel.from_pretrained(
            sam_folder, tasks=[{"name": "depth", "channels": 1}, {"name": "depth", "channels": 1}]
        )
