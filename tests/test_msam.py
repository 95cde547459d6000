"""mSAM starts as SAM, routes tasks, samples and sizes, and survives saving, loading and resizing."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_SIZE, make_sam
from torch import nn
from torch.utils.data import default_collate
from transformers import (
    AutoConfig,
    AutoModel,
    SamImageProcessorPil,
    SamVisionConfig,
    SamVisionModel,
    Trainer,
    TrainingArguments,
)

from peft_talora.msam import MSamConfig, MSamModel, MSamTaskHead
from peft_talora.resize import resize_logits, resize_positions
from peft_talora.tasks import make_task

TASKS = {"segmentation": 5, "depth": 1, "normals": 3}  # T = 3, where the images are B = 2
MODES = pytest.mark.parametrize("mode", ["channel", "token"])


@pytest.fixture
def start(sam_folder):
    """MSamModel as it starts from SAM."""
    return MSamModel.from_pretrained(sam_folder, tasks=TASKS)


@pytest.fixture
def model(start):
    """The same with heads that differ, so that tasks and channels cannot be mistaken for each other."""
    return scramble(start)


def scramble(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.task_heads.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


class TaskedEncoder(nn.Module):
    """Stands in for an adapted encoder: notes its calls and shifts every row by its task's number plus one."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.calls = []

    def forward(self, pixel_values, task_ids=None):
        self.calls.append((tuple(pixel_values.shape), None if task_ids is None else task_ids.tolist()))
        embeddings = self.encoder(pixel_values).last_hidden_state
        return (embeddings if task_ids is None else embeddings + 1 + task_ids[:, None, None, None],)


def make_labels(size=(48, 64), batch=2):
    generator = torch.Generator().manual_seed(3)
    normals = torch.randn(batch, 3, *size, generator=generator)
    return {
        "segmentation": torch.randint(5, (batch, *size), generator=generator),
        "depth": torch.rand(batch, *size, generator=generator) + 0.5,
        "normals": normals / normals.norm(dim=1, keepdim=True),
    }


def assert_same_logits(left, right):
    assert left.keys() == right.keys()
    for name, logits in left.items():
        torch.testing.assert_close(logits, right[name], rtol=1e-5, atol=1e-5)


# The start


def test_every_channel_starts_as_sams_mask_without_prompts(sam, start, images):
    with torch.no_grad():
        mask_0 = sam(images, multimask_output=False).pred_masks[:, 0]
        logits = start(images).logits
    assert mask_0.std() > 0.1
    assert {name: tuple(low.shape) for name, low in logits.items()} == {
        name: (2, channels, IMAGE_SIZE // 2, IMAGE_SIZE // 2) for name, channels in TASKS.items()
    }  # patches of 8 px, four pixels a patch
    for low in logits.values():
        torch.testing.assert_close(low, mask_0.expand_as(low), rtol=1e-5, atol=1e-5)


def test_channels_start_equal_in_token_mode(sam, sam_folder, images):
    logits = MSamModel.from_pretrained(sam_folder, tasks=TASKS, decoder_mode="token")(images).logits["segmentation"]
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits), rtol=1e-5, atol=1e-5)
    mask_0 = sam(images, multimask_output=False).pred_masks[:, 0]
    assert not torch.allclose(logits[:, :1], mask_0, atol=1e-2)


def test_token_mode_copies_the_first_token_where_there_are_as_many_channels_as_sam_has_masks(sam, sam_folder):
    head = MSamModel.from_pretrained(sam_folder, tasks={"parts": 4}, decoder_mode="token").task_heads["parts"]
    tokens = head.mask_decoder.mask_tokens.weight
    assert torch.equal(tokens, sam.mask_decoder.mask_tokens.weight[:1].expand_as(tokens))


def test_head_equals_sams_mask_decoder(sam):
    head = MSamTaskHead(sam.config.mask_decoder_config, 3)
    head.start_from_sam(sam.mask_decoder, sam.prompt_encoder.no_mask_embed)
    with torch.no_grad():
        head.no_mask_embed.weight.normal_()
        embeddings, positions = torch.randn(2, 16, 8, 8), torch.randn(1, 16, 8, 8)
        logits = head(embeddings, positions)
        for channel, dense in enumerate(head.no_mask_embed.weight):
            masks, _ = sam.mask_decoder(
                image_embeddings=embeddings,
                image_positional_embeddings=positions.repeat(2, 1, 1, 1),
                sparse_prompt_embeddings=None,
                dense_prompt_embeddings=dense[None, :, None, None],
                multimask_output=False,
            )
            torch.testing.assert_close(logits[:, channel], masks[:, 0, 0], rtol=1e-5, atol=1e-5)
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 0.1


@MODES
def test_every_parameter_of_a_head_gets_a_gradient(sam_folder, images, mode):
    model = scramble(MSamModel.from_pretrained(sam_folder, tasks=TASKS, decoder_mode=mode))
    model(images, labels=make_labels()).loss.backward()
    for name, parameter in model.task_heads.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias shifts all scores of a query alike, so softmax takes it away.
        assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name


def test_positional_embedding_is_frozen_and_everything_else_trainable(start):
    frozen = [name for name, parameter in start.named_parameters() if not parameter.requires_grad]
    assert frozen == ["shared_image_embedding.positional_embedding"]
    assert not start.training


# Tasks


def test_encoder_runs_once_for_all_heads(model, images):
    model.vision_encoder = encoder = TaskedEncoder(model.vision_encoder)
    model(images)
    model(images, task_ids=[2, 0])
    assert encoder.calls == [((2, 3, IMAGE_SIZE, IMAGE_SIZE), None)] * 2


def test_task_conditional_encoder_gets_task_major_rows(model, images):
    plain = {index: model(images, tasks=index).logits for index in range(3)}
    model.vision_encoder = encoder = TaskedEncoder(model.vision_encoder)
    model.task_conditional = True
    folded = model(images).logits
    assert encoder.calls == [((6, 3, IMAGE_SIZE, IMAGE_SIZE), [0, 0, 1, 1, 2, 2])]
    for index, name in enumerate(TASKS):
        alone = model(images, tasks=name).logits
        assert encoder.calls[-1] == ((2, 3, IMAGE_SIZE, IMAGE_SIZE), [index] * 2)
        assert_same_logits(alone, {name: folded[name]})
        assert not torch.allclose(alone[name], plain[index][name], atol=1e-3)
    assert model(images, tasks=["normals", "depth"]).logits.keys() == {"normals", "depth"}
    assert encoder.calls[-1][1] == [2, 2, 1, 1]


@pytest.mark.parametrize("conditional", [False, True])
def test_a_task_per_sample_equals_each_task_alone(model, conditional):
    model.vision_encoder = TaskedEncoder(model.vision_encoder)
    model.task_conditional = conditional
    images = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE)
    mixed = model(images, task_ids=torch.tensor([2, 0, 2, 2])).logits
    assert list(mixed) == ["segmentation", "normals"]
    every = model(images).logits
    assert_same_logits(mixed, {"segmentation": every["segmentation"][[1]], "normals": every["normals"][[0, 2, 3]]})
    by_name = model(images, task_ids=["normals", "segmentation", "normals", "normals"]).logits
    assert all(torch.equal(by_name[name], logits) for name, logits in mixed.items())


def test_tasks_come_by_name_position_or_list(model, images):
    every = model(images).logits
    assert list(every) == model.task_names == list(TASKS)
    for tasks in ("depth", 1, ["depth"], [1]):
        assert_same_logits(model(images, tasks=tasks).logits, {"depth": every["depth"]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": "edges"}, r"Unknown task 'edges'; known are \['segmentation', 'depth', 'normals'\]"),
        ({"tasks": -1}, "Unknown task -1"),
        ({"tasks": 3}, "Unknown task 3"),
        ({"tasks": []}, r"once, got \[\]"),
        ({"tasks": ["depth", 1]}, r"once, got \['depth', 'depth'\]"),
        ({"task_ids": [0, 3]}, "Unknown task 3"),
        ({"task_ids": torch.tensor([0])}, "1 ids for a batch of 2"),
        ({"task_ids": [0, 1], "tasks": "depth"}, "not both"),
        ({"labels": {}}, r"labels: got \[\], none of the wanted"),
        ({"labels": {"depth": torch.ones(2, 8, 8)}, "tasks": "normals"}, r"\['depth'\], none of .*\['normals'\]"),
        ({"labels": {"edges": torch.ones(2, 8, 8)}}, "Unknown task 'edges'"),
        ({"labels": {"depth": torch.ones(1, 8, 8)}}, "'depth' has 1 labels for a batch of 2"),
        ({"labels": {"depth": torch.ones(2, 8, 8)}, "original_sizes": [[8, 9], [8, 8]]}, r"\(8, 9\) does not fit"),
        ({"labels": {"depth": torch.ones(2, 8, 8)}, "original_sizes": [[8, 8]] * 3}, r"got shape \(3, 2\)"),
    ],
)
def test_wrong_requests_are_refused(model, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(images, **arguments)


def test_images_of_another_size_are_refused(model):
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 64\), this model takes \(batch, 3, 64, 64\).*image_size="):
        model(torch.randn(2, 3, 32, 64))


def test_only_the_merged_task_is_predicted(model, images, tmp_path):
    model.merged_task = "depth"
    model(images, tasks="depth")
    model(images, task_ids=[1, 1])
    for wrong in ({}, {"tasks": "normals"}, {"tasks": ["depth", "normals"]}, {"task_ids": [0, 1]}):
        with pytest.raises(ValueError, match="Only task 'depth' can be predicted"):
            model(images, **wrong)
    model.save_pretrained(tmp_path)
    assert MSamModel.from_pretrained(tmp_path).merged_task == "depth"
    model.merged_task = None
    assert len(model(images).logits) == 3
    with pytest.raises(ValueError, match="merged_task: unknown task 'edges'"):
        model.merged_task = "edges"


# Sizes and losses


@pytest.mark.parametrize("size", [(37, 50), (50, 37), (64, 64), (101, 333)])
def test_post_process_crops_and_resizes_as_sams_processor(model, size):
    processor = SamImageProcessorPil(
        size={"longest_edge": IMAGE_SIZE}, pad_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    image = torch.randint(256, (*size, 3), dtype=torch.uint8).numpy()
    inputs = processor(image, return_tensors="pt")
    low = torch.randn(1, 5, 32, 32)
    (theirs,) = processor.post_process_masks(
        [low], inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False
    )
    ours = model.post_process({"segmentation": low}, inputs["original_sizes"])["segmentation"]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(model.post_process({"segmentation": low}, size)["segmentation"], theirs)


def test_all_that_the_processor_gives_is_taken_and_the_whole_output_post_processed(model):
    processor = SamImageProcessorPil(
        size={"longest_edge": IMAGE_SIZE}, pad_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    inputs = processor(torch.randint(256, (37, 50, 3), dtype=torch.uint8).numpy(), return_tensors="pt")
    output = model(**inputs)
    maps = model.post_process(output, inputs["original_sizes"])
    expected = model.post_process(model(inputs["pixel_values"]).logits, (37, 50))
    assert maps.keys() == expected.keys() == TASKS.keys()
    for name, value in expected.items():
        assert torch.equal(maps[name], value)


def test_images_of_several_sizes_lie_in_the_upper_left_corner(model):
    low = {"depth": torch.randn(3, 1, 32, 32)}
    sizes = torch.tensor([[40, 30], [20, 50], [40, 30]])
    padded = model.post_process(low, sizes)["depth"]
    assert padded.shape == (3, 1, 40, 50)
    for row, (height, width) in enumerate(sizes.tolist()):
        alone = model.post_process({"depth": low["depth"][row : row + 1]}, (height, width))["depth"]
        torch.testing.assert_close(padded[row : row + 1, :, :height, :width], alone)
        outside = padded[row].clone()
        outside[:, :height, :width] = 0
        assert outside.abs().max() == 0


def test_normals_are_unit_vectors_after_post_processing(model, images):
    logits = model(images).logits
    low = {name: logits[name].to(torch.bfloat16) for name in ("normals", "depth")}
    full = model.post_process(low, (48, 64))
    assert full["normals"].dtype == torch.float32
    torch.testing.assert_close(full["normals"].norm(dim=1), torch.ones(2, 48, 64))
    assert (full["depth"].abs() - 1).abs().max() > 0.1


def test_losses_are_taken_at_label_size_and_add_up(model, images):
    labels = make_labels()
    output = model(images, labels=labels)
    full = model.post_process(output.logits, (48, 64))
    for name in TASKS:
        torch.testing.assert_close(output.losses[name], model.task(name).loss(full[name], labels[name]))
    torch.testing.assert_close(output.loss, sum(output.losses.values()))
    assert model(images, labels={"depth": labels["depth"]}).losses.keys() == {"depth"}
    assert model(images, tasks="depth", labels=labels).losses.keys() == {"depth"}


def test_padding_of_labels_never_counts(model, images):
    sizes = torch.tensor([[40, 30], [20, 50]])
    padded = {name: torch.stack([model.task(name).empty_label((44, 52))] * 2) for name in TASKS}
    alone = []
    for row, (height, width) in enumerate(sizes.tolist()):
        labels = make_labels((height, width), batch=1)
        for name, label in labels.items():
            padded[name][row, ..., :height, :width] = label[0]
        alone.append(model(images[row : row + 1], labels=labels).losses)
    losses = model(images, labels=padded, original_sizes=sizes).losses
    pixels = sizes.prod(1).float()
    for name in TASKS:  # every loss here is a mean over labelled pixels
        expected = (torch.stack([one[name] for one in alone]) * pixels).sum() / pixels.sum()
        torch.testing.assert_close(losses[name], expected, rtol=1e-4, atol=1e-5)


def test_a_task_per_sample_takes_its_rows_of_labels_and_sizes(model, images):
    labels = make_labels((40, 50))
    sizes = torch.tensor([[40, 50], [40, 50]])
    losses = model(images, task_ids=[2, 1], labels=labels, original_sizes=sizes).losses
    assert losses.keys() == {"normals", "depth"}
    for name, row in (("normals", slice(0, 1)), ("depth", slice(1, 2))):
        alone = model(images[row], tasks=name, labels={name: labels[name][row]}).losses[name]
        torch.testing.assert_close(losses[name], alone, rtol=1e-4, atol=1e-5)


def test_a_kind_of_ones_own_needs_a_task_object(sam_folder, images, tmp_path):
    height = replace(make_task("height", 1, kind="depth"), kind="height")
    model = MSamModel.from_pretrained(sam_folder, tasks={"height": height})
    labels = {"height": make_labels()["depth"]}
    assert model(images, labels=labels).loss > 0
    model.save_pretrained(tmp_path)
    loaded = MSamModel.from_pretrained(tmp_path)
    assert loaded.config.tasks == [{"name": "height", "kind": "height", "channels": 1}]
    loaded(images)
    with pytest.raises(ValueError, match=r"kind 'height'.*set model.task_objects\['height'\]"):
        loaded(images, labels=labels)
    loaded.task_objects["height"] = height
    assert torch.equal(loaded(images, labels=labels).loss, model(images, labels=labels).loss)
    assert MSamModel.from_pretrained(tmp_path, tasks=[height]).task("height") is height


def test_output_is_a_tuple_on_request(model, images):
    labels = make_labels()
    output = model(images, labels=labels)
    loss, losses, logits = model(images, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert losses.keys() == logits.keys() == TASKS.keys()


# Training


def test_activation_checkpointing_gives_the_same_gradient(model, images):
    model.train()
    model(images, labels=make_labels()).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.vision_encoder.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    assert model.vision_encoder.layers[0].gradient_checkpointing
    model(images, labels=make_labels()).loss.backward()
    for name, parameter in model.vision_encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_trainer_trains_it(model, images, tmp_path):
    labels = make_labels()
    samples = [
        {"pixel_values": images[row], "labels": {name: label[row] for name, label in labels.items()}} for row in (0, 1)
    ]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, data_collator=default_collate, train_dataset=samples, eval_dataset=samples)
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert [name for name in still if "k_proj.bias" not in name] == ["shared_image_embedding.positional_embedding"]


# Saving and loading


@MODES
def test_save_and_load_round_trip(sam_folder, images, tmp_path, mode):
    tasks = {"normals": 3, "depth": 1}  # not in the order of the alphabet
    model = scramble(MSamModel.from_pretrained(sam_folder, tasks=tasks, decoder_mode=mode))
    model.save_pretrained(tmp_path)
    for load in (MSamModel.from_pretrained, AutoModel.from_pretrained):
        loaded, info = load(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert isinstance(loaded, MSamModel)
        assert loaded.task_names == ["normals", "depth"]
        model.config._name_or_path = loaded.config._name_or_path
        assert loaded.config.to_dict() == model.config.to_dict()
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
        assert all(torch.equal(logits, loaded(images).logits[name]) for name, logits in model(images).logits.items())
        assert not loaded.shared_image_embedding.positional_embedding.requires_grad
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MSamConfig)
    assert MSamModel.from_pretrained(tmp_path, tasks=tasks, decoder_mode=mode).task_names == ["normals", "depth"]


def test_precision_and_attention_are_passed_on(sam_folder, images):
    model = MSamModel.from_pretrained(sam_folder, tasks=TASKS, dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {module.config._attn_implementation for module in model.modules() if "config" in vars(module)} == {"eager"}
    logits = model(images.bfloat16()).logits["depth"]
    reference = MSamModel.from_pretrained(sam_folder, tasks=TASKS)(images).logits["depth"]
    assert logits.dtype == torch.bfloat16
    assert (logits - reference).abs().mean() < 0.1 * reference.std()


def test_a_saved_model_refuses_other_tasks(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tasks: .* was saved with .*'normals'.* got .*'edges'"):
        MSamModel.from_pretrained(tmp_path, tasks={"edges": 1})
    with pytest.raises(ValueError, match=r"decoder_mode: .* was saved with channel, got token"):
        MSamModel.from_pretrained(tmp_path, decoder_mode="token")


def test_a_stock_sam_needs_tasks(sam_folder):
    with pytest.raises(ValueError, match="stock SAM: say what to predict by tasks="):
        MSamModel.from_pretrained(sam_folder)
    with pytest.raises(ValueError, match="at least one task"):
        MSamModel(MSamConfig())


def test_another_architecture_is_refused(tmp_path):
    config = SamVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8)
    SamVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type 'sam_vision_model'; allowed are 'sam', 'sam_hq', 'msam'"):
        MSamModel.from_pretrained(tmp_path, tasks=TASKS)


def test_a_truncated_file_is_named(sam_folder, tmp_path):
    shutil.copytree(sam_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(OSError, match=r"model\.safetensors: truncated or corrupt"):
        MSamModel.from_pretrained(tmp_path, tasks=TASKS)


def test_pickled_weights_are_not_read(sam_folder, tmp_path):
    shutil.copy(Path(sam_folder, "config.json"), tmp_path)
    torch.save(make_sam().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        MSamModel.from_pretrained(tmp_path, tasks=TASKS)


# Other input sizes


@pytest.mark.parametrize("size", [96, 40])
def test_another_image_size_runs_and_is_saved(sam_folder, tmp_path, size):
    model = MSamModel.from_pretrained(sam_folder, tasks=TASKS, image_size=size)
    images = torch.randn(2, 3, size, size)
    logits = model(images).logits
    assert logits["normals"].shape == (2, 3, size // 2, size // 2)
    assert model.post_process(logits, (30, 20))["depth"].shape == (2, 1, 30, 20)
    assert model.vision_encoder.layers[1].attn.rel_pos_h.shape[0] == 2 * (size // 8) - 1
    model.save_pretrained(tmp_path)
    loaded = MSamModel.from_pretrained(tmp_path)
    assert loaded.config.vision_config.image_size == loaded.config.prompt_encoder_config.image_size == size
    assert loaded.config.prompt_encoder_config.image_embedding_size == size // 8
    assert all(torch.equal(value, loaded(images).logits[name]) for name, value in logits.items())
    again = MSamModel.from_pretrained(tmp_path, image_size=IMAGE_SIZE)
    assert again(torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)).logits["depth"].shape == (1, 1, 32, 32)


def test_resized_tables_are_what_sam_interpolates_on_the_fly(sam):
    attention = sam.vision_encoder.layers[1].attn
    theirs = attention.get_rel_pos(12, 12, attention.rel_pos_h)
    windowed = sam.vision_encoder.layers[0].attn.rel_pos_h.clone()
    ramp = torch.linspace(0, 1, 8)
    with torch.no_grad():
        sam.vision_encoder.pos_embed.copy_(ramp[None, None, :, None].expand_as(sam.vision_encoder.pos_embed))
    resize_positions(sam.vision_encoder, 96)
    torch.testing.assert_close(attention.get_rel_pos(12, 12, attention.rel_pos_h), theirs)
    assert torch.equal(sam.vision_encoder.layers[0].attn.rel_pos_h, windowed)
    table = sam.vision_encoder.pos_embed
    assert table.shape == (1, 12, 12, 32)
    assert (table.diff(dim=1).abs() < 1e-6).all()  # the ramp runs along the width and stays monotonous
    assert (table.diff(dim=2) >= 0).all()
    assert table.requires_grad


def test_the_same_image_size_is_the_identity(sam_folder, start, images):
    same = MSamModel.from_pretrained(sam_folder, tasks=TASKS, image_size=IMAGE_SIZE)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in start.state_dict().items())
    low = torch.randn(1, 2, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(resize_logits(low, [(IMAGE_SIZE, IMAGE_SIZE)], IMAGE_SIZE), low)


def test_image_size_must_be_a_multiple_of_the_patch_size(sam_folder):
    with pytest.raises(ValueError, match="image_size: got 60; allowed are multiples of the patch size, 8"):
        MSamModel.from_pretrained(sam_folder, tasks=TASKS, image_size=60)


# The configuration


def test_tasks_are_normalised_in_their_order():
    entries = [{"name": "b", "kind": "depth", "channels": 1}, {"name": "a", "kind": "a", "channels": 2}]
    short = MSamConfig(tasks={"b": make_task("b", 1, kind="depth"), "a": 2})
    assert short.tasks == entries
    assert MSamConfig(tasks=[make_task("b", 1, kind="depth"), {"name": "a", "channels": 2}]).tasks == entries
    assert MSamConfig.from_dict(short.to_dict()).tasks == entries


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": [{"name": "a", "channels": 1}] * 2}, r"every name may occur once, got \['a', 'a'\]"),
        ({"tasks": {"surface normals": 3}}, "'surface normals' cannot name a task; allowed are Python identifiers"),
        ({"tasks": {"keys": 3}}, "'keys' cannot name a task"),
        ({"tasks": {"training": 3}}, "'training' cannot name a task"),
        ({"tasks": {"setdefault": 3}}, "'setdefault' cannot name a task"),
        ({"tasks": {3: 1}}, "3 cannot name a task"),
        ({"tasks": ["depth"]}, "a list holds Task objects or dicts .*, got 'depth'; the short form is a dict"),
        ({"tasks": "depth"}, "a list holds Task objects or dicts .*, got 'd'"),
        ({"tasks": {"depth": 0}}, "'depth' has channels=0; allowed are whole numbers from 1"),
        ({"tasks": {"depth": 1.0}}, "channels=1.0"),
        ({"tasks": {"depth": True}}, "channels=True"),
        ({"tasks": [{"name": "depth"}]}, "must have the keys 'name' and 'channels'"),
        ({"tasks": [{"name": "depth", "channels": 1, "loss": 2}]}, "may have 'kind'"),
        ({"tasks": {"a": make_task("depth", 1)}}, "the key 'a' holds a Task named 'depth'"),
        ({"tasks": {"depth": 1}, "decoder_mode": "both"}, "decoder_mode: got 'both'; allowed are 'channel', 'token'"),
    ],
)
def test_wrong_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MSamConfig(**arguments)
