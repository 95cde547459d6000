"""Pre-training the small SAM: prompts and loss by hand, and the recipe from end to end, stopped and resumed."""

import json
import math
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import SamModel

from peft_talora import checkpoint, load_image_processor, make_small_sam, promptable
from peft_talora.data import ObjectScenes
from peft_talora.files import digest
from peft_talora.prompts import mask_boxes
from peft_talora.small_sam import take_over

RECIPE = str(Path(__file__).parent.parent / "recipes" / "pretrain_sam.py")
pretrain = SimpleNamespace(**runpy.run_path(RECIPE))
SIZE, STEPS = 32, 5
FLAGS = {"image_size": SIZE, "max_steps": STEPS, "per_device_train_batch_size": 2, "prompts": 3, "warmup_steps": 1}
FLAGS |= {"num_threads": 1, "test_images": 2, "save_steps": 2, "half_size_steps": 0}
B, P = 2, 5


def reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True, scope="module")
def _leave_no_state():
    """Accelerate keeps the precision of a process; other tests have another one."""
    threads = torch.get_num_threads()
    reset()
    yield
    reset()
    torch.set_num_threads(threads)


class Stopped(Accelerator):
    """An accelerator that is interrupted in the backward pass of a step."""

    def __init__(self, steps, **kwargs):
        super().__init__(**kwargs)
        self.left = steps

    def backward(self, loss, **kwargs):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        super().backward(loss, **kwargs)


def arguments(folder, **changes):
    return pretrain.PretrainArguments(**{"output_dir": str(folder), **FLAGS, **changes})


def flags(folder, **changes):
    return [
        str(word)
        for name, value in {"output_dir": folder, **FLAGS, **changes}.items()
        for word in (f"--{name}", value)
    ]


def call_main(monkeypatch, *words):
    reset()
    monkeypatch.setattr(sys, "argv", [RECIPE, *words])
    pretrain.main()


def contents(folder):
    return {path.name for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and what it was measured to be."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        call_main(monkeypatch, *flags(folder, dataloader_num_workers=0))
    return folder


def masks(size=SIZE):
    """(B, P, H, W), not empty, of many sizes."""
    found = torch.zeros(B, P, size, size, dtype=torch.bool)
    for b in range(B):
        for p in range(P):
            found[b, p, 3 * b : 4 + 4 * p, 2 * p : 2 * p + 3 + 7 * b] = True
    return found


@pytest.mark.parametrize(("kind", "labels"), [("click", [1]), ("click, one mask", [1]), ("points", [1, 1, 0])])
def test_points_lie_where_their_labels_say(kind, labels):
    targets = masks()
    prompts = pretrain.draw_prompts(targets, kind, torch.Generator().manual_seed(0))
    assert prompts.keys() == {"input_points", "input_labels"}
    assert prompts["input_points"].shape == (B, P, len(labels), 2)
    assert torch.equal(prompts["input_labels"], torch.tensor(labels).expand(B, P, -1))
    for b in range(B):
        for p in range(P):
            for (x, y), label in zip(prompts["input_points"][b, p].long().tolist(), labels, strict=True):
                assert targets[b, p, y, x] == bool(label)
                if not label:  # near: within ten pixels along either axis
                    rows, columns = targets[b, p].nonzero().T
                    assert torch.maximum((rows - y).abs(), (columns - x).abs()).min() <= 10


def test_a_point_outside_is_the_only_one_there_is():
    targets = torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool)
    targets[..., 0, 0] = False
    prompts = pretrain.draw_prompts(targets, "points", torch.Generator())
    assert prompts["input_points"][0, 0, 2].tolist() == [0, 0]


def test_boxes_are_near_their_masks():
    targets = masks()
    prompts = pretrain.draw_prompts(targets, "box", torch.Generator().manual_seed(0))
    assert prompts.keys() == {"input_boxes"}
    boxes = mask_boxes(targets.flatten(0, 1)).view(B, P, 4)
    sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    assert ((prompts["input_boxes"] - boxes).abs() <= 0.2 * sides + 1e-5).all()
    assert not torch.equal(prompts["input_boxes"], boxes)


def test_no_prompt_is_nothing():
    assert pretrain.draw_prompts(masks(), "none", torch.Generator()) == {}


def test_shares_of_prompts_sum_to_one():
    assert math.isclose(sum(pretrain.PROMPTS.values()), 1)


@pytest.mark.parametrize("kind", pretrain.PROMPTS)
def test_sam_takes_every_kind_of_prompt(kind):
    targets = masks()[:, :1] if kind == "none" else masks()
    prompts = pretrain.draw_prompts(targets, kind, torch.Generator().manual_seed(0))
    output = make_small_sam(SIZE)(
        pixel_values=torch.randn(B, 3, SIZE, SIZE), multimask_output=kind == "click", **prompts
    )
    assert output.pred_masks.shape[:3] == (B, targets.shape[1], 3 if kind == "click" else 1)
    assert pretrain.mask_loss(output.pred_masks, output.iou_scores, targets).isfinite()


def test_the_loss_by_hand():
    """One prompt, one mask of 1 × 2 pixels, logits of log 3 (p = 3/4): the target covers the left pixel."""
    logits = torch.full((1, 1, 1, 1, 2), math.log(3))
    targets = torch.zeros(1, 1, 2, 4, dtype=torch.bool)
    targets[..., :2] = True
    focal = (-math.log(3 / 4) / 16 - math.log(1 / 4) * 9 / 16) / 2 / 2
    dice = 1 - (2 * 3 / 4 + 1) / (3 / 2 + 1 + 1)
    rating = (0.8 - 1 / 2) ** 2  # both pixels are predicted, one is right
    loss = pretrain.mask_loss(logits, torch.full((1, 1, 1), 0.8), targets)
    torch.testing.assert_close(loss.item(), 5 * focal + 2 * dice + rating, atol=1e-6, rtol=1e-5)


def test_the_best_of_the_masks_alone_is_drawn_to_the_target():
    targets = masks()
    small = torch.nn.functional.adaptive_avg_pool2d(targets.float(), SIZE // 2)
    right, wrong = 8 * (2 * small - 1), -8 * (2 * small - 1)
    logits = torch.stack([wrong, right, torch.zeros_like(right)], dim=2)
    logits[1] = logits[1, :, [1, 2, 0]]  # another mask is the best one of the second image
    logits.requires_grad_()
    iou = torch.rand(B, P, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pretrain.mask_loss(logits, iou, targets).backward()
    best = torch.zeros(B, 3, dtype=torch.bool)
    best[0, 1] = best[1, 0] = True
    assert torch.equal((logits.grad != 0).flatten(3).any(3), best[:, None].expand(-1, P, -1))
    assert (iou.grad != 0).all()  # all ratings are


def test_ratings_alone_are_left_of_the_loss_of_right_masks():
    targets = torch.zeros(1, 2, SIZE, SIZE, dtype=torch.bool)
    targets[:, :, 4:12, 8:20] = True
    small = targets[:, :, None, ::2, ::2]
    loss = pretrain.mask_loss(100.0 * small - 50, torch.full((1, 2, 1), 0.7), targets)
    torch.testing.assert_close(loss.item(), 0.09, atol=1e-6, rtol=1e-5)


def test_every_trained_parameter_has_one_optimizer():
    model = make_small_sam(SIZE)
    constant = model.shared_image_embedding.positional_embedding.requires_grad_(False)
    muon, adamw = pretrain.make_optimizers(model, arguments(""))
    assert (type(muon), type(adamw)) == (torch.optim.Muon, torch.optim.AdamW)
    names = {parameter: name for name, parameter in model.named_parameters()}
    taken = [[names.pop(p) for group in o.param_groups for p in group["params"]] for o in (muon, adamw)]
    assert list(names) == [constant]  # what one has taken, the other cannot
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(taken[0]) == linear
    assert {"vision_encoder.layers.0.attn.qkv.weight", "mask_decoder.iou_prediction_head.proj_in.weight"} <= linear
    assert {"vision_encoder.layers.0.attn.qkv.bias", "mask_decoder.mask_tokens.weight"} <= set(taken[1])


def test_targets_are_masks_of_their_image():
    scenes = ObjectScenes("train", 8, SIZE)
    targets = pretrain.MaskTargets(scenes, 6)
    assert len(targets) == 8
    for index in range(8):
        sample, item = scenes[index], targets[index]
        known = [mask.tolist() for mask in sample["masks"]]
        assert item["masks"].shape == (6, SIZE, SIZE)
        assert all(mask.tolist() in known for mask in item["masks"])
        assert item["prominent"].tolist() == known[promptable.most_prominent(sample["masks"])]
        image = item["pixel_values"] * targets.std + targets.mean
        torch.testing.assert_close(image, sample["image"])
        assert all(torch.equal(value, targets[index][name]) for name, value in item.items())


def test_a_step_is_a_function_of_seed_and_step():
    targets = pretrain.MaskTargets(ObjectScenes("train", 2, SIZE), 3)
    batch = torch.utils.data.default_collate([targets[0], targets[1]])
    model = make_small_sam(SIZE)
    losses = [pretrain.step_loss(model, batch, *which).item() for which in ((0, 0), (1, 0), (0, 0), (0, 1))]
    assert losses[0] == losses[2]
    assert len(set(losses)) == 3


def test_a_resumed_run_ends_with_the_same_bits(finished, tmp_path):
    """In bfloat16, with a worker that the other one did not have, stopped between checkpoints."""
    reset()
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(arguments(tmp_path), Stopped(3, mixed_precision="bf16", cpu=True))
    assert contents(tmp_path) == {"checkpoint-2"}
    reset()
    again = arguments(tmp_path, resume_from_checkpoint="latest", dataloader_num_workers=0)
    _, progress = pretrain.train(again, Accelerator(mixed_precision="bf16", cpu=True))
    assert contents(tmp_path) == {f"checkpoint-{STEPS}"}
    through, resumed = (load_file(f / f"checkpoint-{STEPS}" / "model.safetensors") for f in (finished, tmp_path))
    assert through.keys() == resumed.keys()
    start = make_small_sam(SIZE).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in through.items())
    assert sum(not torch.equal(value, start[name]) for name, value in through.items()) > 100
    history = json.loads((finished / "pretraining.json").read_text())["training"]["losses"]
    assert progress.history == history
    assert [entry["step"] for entry in history] == [2, 4, 5]


def test_other_arguments_are_not_resumed(finished):
    reset()
    other = arguments(finished, resume_from_checkpoint="latest", learning_rate=5e-4)
    with pytest.raises(ValueError, match=r"learning_rate=0.003 \(now 0.0005\)"):
        pretrain.train(other, Accelerator(mixed_precision="bf16", cpu=True))


def test_another_number_of_processes_does_not_go_on_but_may_measure(finished, tmp_path):
    """With it, steps have other images and the schedule is at another place."""
    reset()
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(arguments(tmp_path), Stopped(3, mixed_precision="bf16", cpu=True))
    for folder, step in ((tmp_path, 2), (finished, STEPS)):
        file = folder / f"checkpoint-{step}" / "progress.json"
        progress = json.loads(file.read_text())
        assert progress["arguments"].pop("num_processes") == 1
        progress["arguments"]["num_processes"] = 2
        file.write_text(json.dumps(progress))
        manifest = file.with_name("manifest.json")
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), file.name: digest(file)}))

    def resume(folder):
        reset()
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        return pretrain.train(arguments(folder, resume_from_checkpoint="latest"), accelerator)

    with pytest.raises(ValueError, match=r"num_processes=2 \(now 1\)"):
        resume(tmp_path)
    _, progress = resume(finished)
    assert (progress.step, progress.images) == (STEPS, 2 * STEPS)


def test_a_run_writes_all_that_it_promises(finished):
    assert contents(finished) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "pretraining.json",
        f"checkpoint-{STEPS}",
    }
    assert load_image_processor(finished).size["longest_edge"] == SIZE


def test_the_result_is_a_stock_sam_in_float32_of_half_rounded_weights(finished):
    trained = load_file(finished / f"checkpoint-{STEPS}" / "model.safetensors")
    stored = load_file(finished / "model.safetensors")
    model, info = SamModel.from_pretrained(finished, output_loading_info=True)
    assert not any(info.values()), info
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert model.config.to_dict()["dtype"] in ("float32", torch.float32)
    state = model.state_dict()
    for name, value in trained.items():
        assert torch.equal(state[name], value.half().float()), name


def test_its_figures_are_those_of_what_was_written(finished):
    results = json.loads((finished / "pretraining.json").read_text())
    model = SamModel.from_pretrained(finished, attn_implementation="eager")  # the sums of the recipe, bit by bit
    models = {"pre-trained": model.eval(), "untrained": make_small_sam(SIZE)}
    for kind in ("objects", "rooms"):
        measured = promptable.measure(models, pretrain.make_scenes(kind, "test", 2, SIZE))
        assert results["figures"][kind] == measured
    assert results["training"]["images"] == 2 * STEPS
    assert results["training"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_the_card_has_the_figures(finished):
    figures = json.loads((finished / "pretraining.json").read_text())["figures"]
    card = (finished / "README.md").read_text()
    for kind, models in figures.items():
        for name, values in models.items():
            cells = [f"{values[c]:.3f}" if c in values else "" for c in ("box", "click", "best of 3", "no prompt")]
            assert f"| {kind}, {values['masks']} masks | {name} | {' | '.join(cells)} |" in card
    assert f"for images of {SIZE} pixels" in card
    assert f"{2 * STEPS} generated images (objects)" in card


def test_a_finished_run_is_measured_again_beside_others(finished, monkeypatch, tmp_path):
    """From its checkpoint alone, by what it says of its own training."""
    reset()
    alone, other = tmp_path / "alone", tmp_path / "other"
    names = ("config.json", "model.safetensors", "pretraining.json", "README.md")
    for file in (finished / name for name in names):
        alone.mkdir(exist_ok=True)
        shutil.copyfile(file, alone / file.name)
    make_small_sam(64, seed=3).save_pretrained(other)
    (other / "pretraining.json").write_text('{"training": {"data": "rooms", "images": 1234, "minutes": 5.4}}')
    before = json.loads((alone / "pretraining.json").read_text())
    call_main(monkeypatch, "--measure", str(alone), "--compare", f"other={other}", "--test_images", "1")
    after = json.loads((alone / "pretraining.json").read_text())
    assert contents(alone) == set(names)
    assert (alone / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert after["training"] == before["training"]
    assert list(after["figures"]["objects"]) == ["pre-trained", "untrained", "other", "box filled"]
    card = (alone / "README.md").read_text()
    assert "| other |" in card
    assert "'other' is the same network trained on 1,234 images (rooms) in 5 minutes" in card


def test_only_what_the_recipe_has_finished_is_measured_again(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"`measure` is .*: it has no pretraining.json"):
        call_main(monkeypatch, "--measure", str(tmp_path))
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "cats"}, "`data` is 'cats'; allowed: objects, rooms"),
        ({"save_steps": 0}, "`save_steps` is 0; allowed: 1 or more"),
        ({"max_steps": 0}, "`max_steps` is 0; allowed: 1 or more"),
        ({"compare": "folder"}, "`compare` has 'folder'; write name=folder"),
        ({"compare": "untrained=folder"}, "`compare` has the name 'untrained'"),
        ({"compare": "other=no/such/folder"}, "`compare`: no/such/folder"),
        ({"data_root": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_done(changes, message, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        call_main(monkeypatch, *flags(tmp_path, **changes))
    assert not contents(tmp_path)


def test_an_interrupted_report_leaves_nothing_half_written(tmp_path):
    """The folder of a finished training without a report stays as it is, until all files can be written."""
    reset()
    args, accelerator = arguments(tmp_path), Accelerator(cpu=True)
    model, progress = make_small_sam(SIZE), checkpoint.Progress(tasks=[], history=[{"loss": object()}])
    with pytest.raises(TypeError):
        pretrain.report(args, accelerator, model, progress)
    assert not contents(tmp_path)


def test_the_seed_decides_the_images_but_not_the_held_out_ones():
    batches = []
    for seed in (0, 0, 1):
        reset()
        batches.append(
            next(
                pretrain.batches_from(
                    arguments("", seed=seed, dataloader_num_workers=0), Accelerator(cpu=True), "train", 0
                )
            )
        )
    images = [batch["pixel_values"] for batch in batches]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_two_image_sizes_resume_in_either_to_the_same_bits(tmp_path):
    sizes = {"image_size": 2 * SIZE, "half_size_steps": 4, "max_steps": 3, "dataloader_num_workers": 0}

    def run(folder, accelerator, **changes):
        return pretrain.train(arguments(folder, **sizes, **changes), accelerator(mixed_precision="bf16", cpu=True))

    reset()
    model, progress = run(tmp_path / "through", Accelerator)
    assert model.config.vision_config.image_size == 2 * SIZE
    assert [entry["step"] for entry in progress.history] == [2, 4, 2, 3]
    wanted = load_file(tmp_path / "through" / "checkpoint-3" / "model.safetensors")
    half = load_file(tmp_path / "through" / "half-size" / "checkpoint-4" / "model.safetensors")
    assert half["vision_encoder.pos_embed"].shape[1:3] == (4, 4)
    assert wanted["vision_encoder.pos_embed"].shape[1:3] == (8, 8)
    for stop in (3, 6):  # in the first stage, and in the second
        folder = tmp_path / str(stop)
        reset()
        with pytest.raises(KeyboardInterrupt):
            run(folder, lambda stop=stop, **kwargs: Stopped(stop, **kwargs))
        reset()
        run(folder, Accelerator, resume_from_checkpoint="latest")
        resumed = load_file(folder / "checkpoint-3" / "model.safetensors")
        assert all(torch.equal(value, resumed[name]) for name, value in wanted.items())


def test_the_second_size_starts_from_the_first(tmp_path):
    trained, model = make_small_sam(SIZE, seed=1), make_small_sam(2 * SIZE)
    take_over(model, trained)
    assert torch.equal(model.mask_decoder.mask_tokens.weight, trained.mask_decoder.mask_tokens.weight)
    assert torch.equal(
        model.shared_image_embedding.positional_embedding, trained.shared_image_embedding.positional_embedding
    )
    table = make_small_sam(SIZE, seed=1).vision_encoder.pos_embed
    torch.testing.assert_close(model.vision_encoder.pos_embed.mean((1, 2)), table.mean((1, 2)), atol=1e-5, rtol=1e-4)
    assert model(torch.randn(1, 3, 2 * SIZE, 2 * SIZE)).pred_masks.shape[-1] == SIZE
