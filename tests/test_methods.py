"""The methods: what each trains, how many encoder passes it needs, what it saves. On a tiny real SAM."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import peft_talora
from peft_talora import Collator, MSamModel, SyntheticScenes, engine, evaluation, hub, make_image_processor
from peft_talora.data import SYNTHETIC_TASKS
from peft_talora.methods import METHODS, find_method, mtlora
from peft_talora.methods.adapters import AdapterArguments
from peft_talora.results import count_parameters

TASKS = {name: SYNTHETIC_TASKS[name] for name in ("segmentation", "depth", "normals")}
ARGUMENTS = AdapterArguments(r=4)
ONE_RUN = [name for name, method in METHODS.items() if method.alone is None]
CPU = torch.device("cpu")
# Of the tiny SAM: the linear layers of a block, (D_in, D_out), four blocks of them with two norms of width 32.
LINEARS, BLOCKS, NORMS = [(32, 96), (32, 32), (32, 64), (64, 32)], 4, 4 * 2 * 2 * 32


def make_base(sam_folder) -> MSamModel:
    """An mSAM whose channels differ; heads start with equal ones."""
    model = MSamModel.from_pretrained(sam_folder, tasks=TASKS)
    torch.manual_seed(0)
    with torch.no_grad():
        for head in model.task_heads.values():
            head.no_mask_embed.weight += 0.3 * torch.randn_like(head.no_mask_embed.weight)
    return model


def make(sam_folder, name, **arguments):
    """A model of that method, with keywords for its passes on a CPU."""
    method, args = METHODS[name], replace(ARGUMENTS, **arguments)
    model = method.add(make_base(sam_folder), args)
    return model, {
        "order": method.resolve_order("auto", CPU),
        "activate": lambda tasks: method.activate(model, tasks),
    }


def shaken(model):
    """Every trained parameter moved a little, so that no update is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def batch(sam_folder):
    scenes = SyntheticScenes("train", num_images=2, size=64, tasks=list(TASKS))
    base = make_base(sam_folder)
    return Collator([base.task(name) for name in TASKS], make_image_processor(64))([scenes[0], scenes[1]])


def predict(model, pixel_values, passes):
    logits = {}
    with torch.no_grad():
        for group in engine.task_groups(list(TASKS), passes["order"]):
            passes["activate"](group)
            logits |= model(pixel_values=pixel_values, tasks=group).logits
    return logits


@pytest.mark.parametrize("name", ONE_RUN)
def test_starts_as_the_base_model(name, sam_folder, images):
    with torch.no_grad():
        expected = make_base(sam_folder)(pixel_values=images).logits
    model, passes = make(sam_folder, name)
    for task, logits in predict(model.eval(), images, passes).items():
        torch.testing.assert_close(logits, expected[task], atol=2e-6, rtol=1e-5)


def lora(r: int) -> int:
    return BLOCKS * sum(r * (d_in + d_out) for d_in, d_out in LINEARS)


def talora(r: int, tasks: int) -> int:
    return lora(r) + BLOCKS * len(LINEARS) * (r * r * tasks + tasks * tasks)


@pytest.mark.parametrize(
    ("name", "arguments", "adapter", "other"),
    [
        ("talora", {}, talora(4, 3), NORMS),
        ("lora-hps", {}, lora(4), NORMS),
        ("lora-hps", {"train_norms": False}, lora(4), 0),
        ("mtlora", {}, lora(4) + 3 * lora(4), NORMS),
        ("mtlora", {"r_task": 2}, lora(4) + 3 * lora(2), NORMS),
        ("heads", {}, 0, 0),
        ("full-hps", {}, 0, 0),
    ],
)
def test_what_is_trained_is_counted(name, arguments, adapter, other, sam_folder):
    base = make_base(sam_folder)
    heads, encoder = (sum(p.numel() for p in m.parameters()) for m in (base.task_heads, base.vision_encoder))
    full = name == "full-hps"
    assert count_parameters(make(sam_folder, name, **arguments)[0]) == {
        "adapter": adapter,
        "encoder": encoder if full else 0,
        "heads": heads,
        "other": other,
        "all": base.num_parameters() + adapter,
    }


@pytest.mark.parametrize(
    ("name", "passes_of_a_step"), [("talora", 3), ("lora-hps", 1), ("full-hps", 1), ("heads", 1), ("mtlora", 3)]
)
def test_shared_methods_serve_all_heads_by_one_encoder_pass(name, passes_of_a_step, sam_folder, batch):
    model, passes = make(sam_folder, name)
    model, calls = shaken(model), []
    model.get_base_model().vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    engine.backward(Accelerator(cpu=True), model, batch, weights=dict.fromkeys(TASKS, 1.0), **passes)
    assert len(calls) == passes_of_a_step
    found = {n for n, p in model.named_parameters() if p.requires_grad}
    assert found == expected == {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    scenes, tasks = SyntheticScenes("test", 2, 64, tasks=list(TASKS)), [model.get_base_model().task(t) for t in TASKS]
    collator = Collator(tasks, make_image_processor(64))
    evaluation.evaluate(Accelerator(cpu=True), model, scenes, collator, 2, **passes)
    assert len(calls) == 2 * passes_of_a_step


def test_the_encoder_is_trained_whole_and_held_once(sam_folder, images):
    model, _ = make(sam_folder, "full-hps")
    encoder = model.get_base_model().vision_encoder
    frozen = [name for name, p in encoder.named_parameters() if not p.requires_grad]
    assert not frozen
    names = {name.removeprefix("modules_to_save.default.") for name, _ in encoder.named_parameters()}
    assert names == {name for name, _ in make_base(sam_folder).vision_encoder.named_parameters()}
    with model.disable_adapter(), pytest.raises(RuntimeError, match="was not kept"):
        model(pixel_values=images)


@pytest.mark.parametrize("name", ["lora-hps", "full-hps", "heads"])
def test_save_and_load_round_trip(name, sam_folder, images, tmp_path):
    model, passes = make(sam_folder, name, alpha=8.0) if name == "lora-hps" else make(sam_folder, name)
    expected = predict(shaken(model).eval(), images, passes)
    METHODS[name].save(model, list(TASKS), tmp_path, None, "")
    for task, logits in predict(peft_talora.load(tmp_path), images, passes).items():
        torch.testing.assert_close(logits, expected[task], atol=2e-6, rtol=1e-5)


def test_a_task_of_mtlora_is_a_lora_of_the_sum_of_both(sam_folder, images, tmp_path):
    model, passes = make(sam_folder, "mtlora", r_task=2, alpha=6.0)
    expected = predict(shaken(model).eval(), images, passes)
    for task, logits in expected.items():
        mtlora.save_task(model, [task], tmp_path / task, make_image_processor(64), "The card.")
        assert {file.name for file in (tmp_path / task).iterdir()} == {
            "README.md",
            hub.WEIGHTS_NAME,
            hub.MSAM_CONFIG_NAME,
            hub.PROCESSOR_NAME,
            "adapter_config.json",
        }
        rebuild = json.loads((tmp_path / task / hub.MSAM_CONFIG_NAME).read_text())
        assert rebuild["base_model_name_or_path"] == sam_folder
        loaded = peft_talora.load(tmp_path / task)
        assert loaded.get_base_model().task_names == [task]
        assert loaded.peft_config["default"].r == 6
        with torch.no_grad():
            torch.testing.assert_close(loaded(pixel_values=images).logits[task], logits, atol=1e-5, rtol=1e-4)
    weights = load_file(tmp_path / "depth" / hub.WEIGHTS_NAME)
    assert not [name for name in weights if "normals" in name or "segmentation" in name]
    with torch.no_grad():  # a task's own LoRA is no other's
        other = predict(model, images, {**passes, "activate": lambda tasks: mtlora.activate(model, ["depth"])})
    assert (other["normals"] - expected["normals"]).abs().max() > 1e-3
    torch.testing.assert_close(other["depth"], expected["depth"])


def test_a_task_of_mtlora_can_move_without_its_run(sam_folder, images, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(sam_folder, run / "base")
    model, passes = make(run / "base", "mtlora")
    expected = predict(shaken(model).eval(), images, passes)["depth"]
    for _ in range(2):  # the second replaces the first
        mtlora.save_task(model, ["depth"], run / "depth", None, "The card.")
    (run / "depth").rename(moved)
    shutil.rmtree(run)
    for file in (hub.MSAM_CONFIG_NAME, "adapter_config.json"):
        assert json.loads((moved / file).read_text())["base_model_name_or_path"] == "base"
    with torch.no_grad():
        found = peft_talora.load(moved)(pixel_values=images).logits["depth"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(OSError, match="the Hub cannot be reached"):  # that is all that is wrong with it
        peft_talora.push_to_hub(moved, "user/name")


def test_mtlora_takes_one_task_in_a_pass(sam_folder):
    with pytest.raises(ValueError, match=re.escape("'folded'; with a LoRA per task allowed: 'sequential' and 'auto'")):
        METHODS["mtlora"].resolve_order("folded", CPU)
    model, _ = make(sam_folder, "mtlora")
    with pytest.raises(ValueError, match="serves one task"):
        mtlora.activate(model, ["depth", "normals"])


def test_shared_methods_keep_the_order_that_is_asked_for():
    assert METHODS["lora-hps"].resolve_order("auto", CPU) == METHODS["heads"].resolve_order("auto", CPU) == "folded"
    assert METHODS["lora-hps"].resolve_order("sequential", CPU) == "sequential"
    assert METHODS["talora"].resolve_order("auto", CPU) == "sequential"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("lora-hps", {"r_task": 2}),
        ("lora-stl", {"qkv_parts": ["q"]}),
        ("mtlora", {"orthogonality": 0.1}),
        ("mtlora", {"init_weights": "gaussian"}),
        ("full-hps", {"r": 8}),
        ("heads", {"dropout": 0.1}),
    ],
)
def test_arguments_that_a_method_does_not_read_are_refused(name, arguments):
    METHODS[name].check(AdapterArguments(method=name))
    METHODS["talora"].check(AdapterArguments(**arguments))
    ((argument, value),) = arguments.items()
    with pytest.raises(ValueError, match=re.escape(f"`{argument}` is {value!r}, but the method {name!r}")):
        METHODS[name].check(AdapterArguments(method=name, **arguments))


def test_methods_are_found_by_name():
    for name, method in METHODS.items():
        assert find_method(name) is method
        assert method.alone is None or METHODS[method.alone].add is method.add
    with pytest.raises(ValueError, match="`method` is 'lora'; allowed: talora, lora-stl, lora-hps"):
        find_method("lora")


def test_the_flags_of_talora_reach_its_configuration(sam_folder):
    arguments = {"init_weights": "gaussian", "qkv_parts": ["q", "v"], "target_modules": r".*layers\.\d+\.attn\.qkv"}
    model, _ = make(sam_folder, "talora", r_task=2, alpha=1.0, dropout=0.1, train_norms=False, **arguments)
    config = model.peft_config["default"]
    for name, value in {**arguments, "r": 4, "r_task": 2, "alpha": 1.0, "dropout": 0.1}.items():
        assert getattr(config, name) == value
    assert METHODS["talora"].regularizer(model, ARGUMENTS) is None
    model = make(sam_folder, "talora", init_weights="orthogonal")[0]
    loss = METHODS["talora"].regularizer(model, replace(ARGUMENTS, orthogonality=3.0))()
    assert loss.item() == pytest.approx(3.0 * 4 / 3, rel=1e-4)  # the core is zero: a third of the rank
