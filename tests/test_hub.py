"""An adapter's folder: saved, loaded, moved, damaged, described, and sent through a Hub that is a local server."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_sam
from hub_server import run_python, serve
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tuner_cases import saying

import peft_talora
from peft_talora import MSamModel, TALoRAConfig, files, hub, make_image_processor, save_adapter
from peft_talora.results import restrict
from peft_talora.small_sam import save_small_sam

TASKS = [
    {"name": "depth", "kind": "depth", "channels": 1},
    {"name": "normals", "kind": "normals", "channels": 3},
    {"name": "borders", "kind": "edges", "channels": 1},
]
HEADS = [f"task_heads.{task['name']}" for task in TASKS]
SAVED = {"README.md", "adapter_config.json", "adapter_model.safetensors", "msam_config.json"}
RESULTS = {
    "before": {"depth": {"rmse": 2.5}, "normals": {"mean_angle": 90.0}, "borders": {"odsf": 0.1}},
    "after": {"depth": {"rmse": 0.53217}, "normals": {"mean_angle": 31.25}, "borders": {"odsf": 0.5}},
    "method": "talora",
    "parameters": {"adapter": 1234, "encoder": 0, "heads": 56789},
    "images": {"train": 14, "validation": 2, "test": 3},
    "seed": 7,
    "images_per_second": 12.34,
    "versions": {"peft_talora": peft_talora.__version__},
}
CONFIGS = {
    "talora": lambda: TALoRAConfig(r=4, init_weights=False),
    "lora": lambda: LoraConfig(r=4, target_modules=["qkv"], modules_to_save=HEADS, init_lora_weights=False),
}


def make_model(base, method="talora", adapter_name="default"):
    """An adapted mSAM in which every trained parameter differs from where it started."""
    torch.manual_seed(3)
    model = get_peft_model(MSamModel.from_pretrained(base, tasks=TASKS), CONFIGS[method](), adapter_name=adapter_name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def predict(model, images):
    return dict(model(pixel_values=images).logits)


def assert_same_tensors(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_same_model(found, expected, images):
    assert_same_tensors(found.state_dict(), expected.state_dict())
    assert_same_tensors(predict(found, images), predict(expected, images))


def files_in(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


LOAD_ELSEWHERE = """
import os, sys, torch, peft_talora
folder, images, output = sys.argv[1:]
os.chdir(os.path.dirname(output))
model = peft_talora.load(folder)
with torch.no_grad():
    logits = dict(model(pixel_values=torch.load(images)).logits)
torch.save({"state": model.state_dict(), "logits": logits}, output)
"""


@pytest.mark.parametrize("method", CONFIGS)
def test_save_and_load_round_trip(method, sam_folder, images, tmp_path):
    model = make_model(sam_folder, method)
    save_adapter(model, tmp_path)
    assert files_in(tmp_path) == SAVED
    again = peft_talora.load(tmp_path)
    assert_same_model(again, model, images)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert again.get_base_model().config.tasks == TASKS
    assert max(value.abs().max() for value in predict(model, images).values()) > 0.1


def test_a_moved_folder_loads_in_another_process(sam_folder, images, tmp_path):
    first, moved = tmp_path / "first", tmp_path / "moved"
    shutil.copytree(sam_folder, first / "base")
    model = make_model(str(first / "base"))
    save_adapter(model, first)
    assert json.loads((first / "msam_config.json").read_text())["base_model_name_or_path"] == "base"
    first.rename(moved)
    torch.save(images, tmp_path / "images.pt")
    run_python(LOAD_ELSEWHERE, moved, tmp_path / "images.pt", tmp_path / "loaded.pt")
    loaded = torch.load(tmp_path / "loaded.pt")
    assert_same_tensors(loaded["state"], model.state_dict())
    assert_same_tensors(loaded["logits"], predict(model, images))


def test_a_base_elsewhere_is_named_in_full(sam_folder, tmp_path, monkeypatch):
    shutil.copytree(sam_folder, tmp_path / "sam")
    monkeypatch.chdir(tmp_path)
    model = make_model("sam")
    save_adapter(model, "adapter")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir("other")
    loaded = peft_talora.load(tmp_path / "adapter")
    assert loaded.get_base_model().config._name_or_path == str(tmp_path / "sam")
    assert_same_tensors(loaded.state_dict(), model.state_dict())


def test_an_adapter_of_another_name_is_saved_alike(sam_folder, images, tmp_path):
    model = make_model(sam_folder, adapter_name="mine")
    model.add_adapter("further", TALoRAConfig(r=2))  # not active, so it stays behind
    save_adapter(model, tmp_path)
    assert files_in(tmp_path) == SAVED
    assert not (tmp_path / "mine").exists()
    assert_same_tensors(predict(peft_talora.load(tmp_path), images), predict(model, images))


def test_several_active_adapters_are_refused(sam_folder, tmp_path):
    model = make_model(sam_folder)
    model.add_adapter("other", TALoRAConfig(modules_to_save=[]))  # PEFT refuses two with heads of their own
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"\['default', 'other'\], of which one is meant.*`set_adapter`"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
    model.set_adapter("other")
    save_adapter(model, tmp_path)
    assert files_in(tmp_path) == SAVED


def test_what_is_trained_beside_the_adapter_is_not_lost_without_a_word(sam_folder, tmp_path):
    model = make_model(sam_folder)
    model.get_base_model().vision_encoder.neck.conv1.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=saying("1 parameters", "'default'", "neck.conv1.weight", "modules_to_save")):
        save_adapter(model, tmp_path)
    assert files_in(tmp_path) == set()


def test_models_of_another_kind_are_refused(sam_folder, tmp_path):
    for model in (make_model(sam_folder).get_base_model(), get_peft_model(make_sam(), TALoRAConfig())):
        with pytest.raises(TypeError, match=saying("PeftModel around an MSamModel", type(model).__name__)):
            save_adapter(model, tmp_path)


def test_a_base_that_has_moved_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "adapter")
    file = tmp_path / "adapter" / "msam_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "away")}))
    with pytest.raises(OSError, match=saying(str(tmp_path / "adapter"), "away", "base=")):
        peft_talora.load(tmp_path / "adapter")
    peft_talora.load(tmp_path / "adapter", base=config["base_model_name_or_path"])


def test_training_can_go_on(sam_folder, tmp_path):
    model = make_model(sam_folder)
    save_adapter(model, tmp_path)
    again = peft_talora.load(tmp_path, is_trainable=True)
    assert all(module.training for module in again.modules())
    trained = [[name for name, p in m.named_parameters() if p.requires_grad] for m in (again, model)]
    assert trained[0] == trained[1] != []


def test_image_size_and_decoder_mode_come_back(sam_folder, tmp_path):
    torch.manual_seed(0)
    base = MSamModel.from_pretrained(sam_folder, tasks={"depth": 1}, decoder_mode="token", image_size=96)
    model = get_peft_model(base, TALoRAConfig(r=2, init_weights=False)).eval()
    save_adapter(model, tmp_path)
    assert_same_model(peft_talora.load(tmp_path), model, torch.randn(1, 3, 96, 96))


def test_image_processor_round_trip(sam_folder, tmp_path):
    processor = make_image_processor(64, normalize=False)
    save_adapter(make_model(sam_folder), tmp_path, image_processor=processor)
    assert files_in(tmp_path) == SAVED | {"preprocessor_config.json"}
    again = peft_talora.load_image_processor(tmp_path)
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8).numpy()
    pixels = [p(image, return_tensors="pt")["pixel_values"] for p in (again, processor)]
    assert torch.equal(*pixels)
    assert pixels[0].shape == (1, 3, 64, 64)


def test_saving_again_replaces_files_and_keeps_others(sam_folder, images, tmp_path):
    save_adapter(make_model(sam_folder, "lora"), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    model = make_model(sam_folder)
    save_adapter(model, tmp_path, card="a card\n")
    assert files_in(tmp_path) == SAVED | {"notes.txt"}
    assert (tmp_path / "README.md").read_text() == "a card\n"
    assert_same_model(peft_talora.load(tmp_path), model, images)


def test_saving_without_an_image_processor_leaves_no_earlier_one(sam_folder, tmp_path):
    save_adapter(make_model(sam_folder), tmp_path, make_image_processor(64, normalize=False))
    (tmp_path / "results.json").write_text("{}")
    save_adapter(make_model(sam_folder), tmp_path)
    assert files_in(tmp_path) == SAVED | {"results.json"}


def test_a_failed_write_leaves_what_was_there(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError, match="killed"), files.write_aside(tmp_path) as aside:  # noqa: PT012
        (aside / "a.txt").write_text("new")
        (aside / "b.txt").write_text("half")
        raise RuntimeError("killed")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_failed_save_leaves_a_folder_that_loads(sam_folder, images, tmp_path, monkeypatch):
    model = make_model(sam_folder)
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(hub, "write_json", lambda file, content: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(make_model(sam_folder, "lora"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_same_model(peft_talora.load(tmp_path), model, images)


def test_files_written_aside_arrive_with_their_folders(tmp_path):
    with files.write_aside(tmp_path / "new" / "folder") as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "a.txt").write_text("a")
        assert files_in(tmp_path / "new" / "folder") == {f"{aside.name}/inner/a.txt"}
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["inner"]


@pytest.fixture(scope="module")
def saved(sam_folder, tmp_path_factory):
    """An adapter's folder, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(make_model(sam_folder), folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


@pytest.mark.parametrize("kept", [0, 100, -1000])
def test_truncated_weights_are_named(kept, damaged):
    file = damaged / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(OSError, match=r"damaged/adapter_model\.safetensors: truncated or corrupt"):
        peft_talora.load(damaged)


@pytest.mark.parametrize("name", ["msam_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name, damaged):
    (damaged / name).unlink()
    with pytest.raises(OSError, match=rf"damaged/{name}"):
        peft_talora.load(damaged)


@pytest.mark.parametrize("name", ["no/such/folder", "no/folder", "nothing"])
def test_what_is_neither_folder_nor_repository_is_named(name):
    with pytest.raises(OSError, match=f"{name} is no folder"):
        peft_talora.load(name)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT's own, milder word
def test_weights_that_are_missing_or_left_over_are_named(damaged):
    file = damaged / "adapter_model.safetensors"
    weights = load_file(file)
    row, head = (next(name for name in weights if part in name) for part in ("talora_task", "task_heads"))
    for lost in (row, head):
        save_file({name: value for name, value in weights.items() if name != lost}, file)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors (does not belong|lacks)"):
            peft_talora.load(damaged)
    save_file({**weights, "stray": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"left over are 1, such as \['stray'\]"):
        peft_talora.load(damaged)


def test_the_precision_of_the_base_comes_back(sam_folder, images, tmp_path):
    base = MSamModel.from_pretrained(sam_folder, tasks={"depth": 1}, dtype=torch.bfloat16)
    model = get_peft_model(base, TALoRAConfig(r=2, init_weights=False)).eval()
    save_adapter(model, tmp_path)
    loaded = peft_talora.load(tmp_path)
    assert loaded.get_base_model().dtype == torch.bfloat16
    assert_same_model(loaded, model, images.bfloat16())


@pytest.mark.parametrize("dtype", ["load", "int8", "float99"])
def test_a_precision_that_is_none_is_named(dtype, damaged):
    file = damaged / "msam_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": dtype}))
    with pytest.raises(ValueError, match=rf"damaged/msam_config\.json: `dtype` must be one of \['float16'.*'{dtype}'"):
        peft_talora.load(damaged)


def test_a_base_that_nobody_else_has_is_not_pushed(saved):
    with pytest.raises(ValueError, match=r"is the local folder .*: put it on the Hub first"):
        peft_talora.push_to_hub(saved, "user/name")


def test_a_base_of_another_architecture_is_refused(saved, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="type 'vit'"):
        peft_talora.load(saved, base=tmp_path)


def test_a_base_of_another_width_is_refused(saved, tmp_path):
    save_small_sam(tmp_path, image_size=64)
    with pytest.raises(ValueError, match="does not fit the base"):
        peft_talora.load(saved, base=tmp_path)


def test_a_model_without_a_base_needs_one_to_load(sam_folder, images, tmp_path):
    model = make_model(sam_folder)
    model.get_base_model().config._name_or_path = ""  # as of a model that was made from a config
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="names no base checkpoint"):
        peft_talora.load(tmp_path)
    assert_same_model(peft_talora.load(tmp_path, base=sam_folder), model, images)


def front_matter(card):
    _, header, body = card.split("---\n", 2)
    return yaml.safe_load(header), body


@pytest.mark.parametrize("method", CONFIGS)
def test_the_card_says_what_how_well_and_how_to_load(method, sam_folder):
    header, body = front_matter(
        hub.model_card(make_model(sam_folder, method), {**RESULTS, "method": method}, "ann/rooms")
    )
    assert header["library_name"] == "peft"
    assert {method, "segment-anything", "multi-task"} <= set(header["tags"])
    assert "base_model" not in header, "a local folder is no model of the Hub"
    assert sam_folder not in body
    for words in (
        "- `depth` (depth, 1 channels)",
        "- `normals` (normals, 3 channels)",
        "- `borders` (edges, 1 channels)",
        "| depth | rmse | 2.5000 | 0.5322 |",
        "| normals | mean_angle | 90.0000 | 31.2500 |",
        'peft_talora.load("ann/rooms")',
        "import peft_talora",
        "On 3 test images",
        "1,234\nin the adapter, 56,789 in the heads",
        f"peft_talora {peft_talora.__version__}",
    ):
        assert words in body, words
    assert body.count("```") % 2 == 0
    assert "together" not in body


def test_the_card_of_one_task_says_which_others_its_numbers_include(sam_folder):
    results = {**RESULTS, "arguments": {}}
    _, body = front_matter(hub.model_card(make_model(sam_folder), restrict(results, ["normals"])))
    assert "- `normals` (normals, 3 channels)\n\n" in body
    assert "- `depth`" not in body
    assert "56,789 in the heads. Trained together with `depth`, `borders`: parameters and images/s are" in body


@pytest.mark.parametrize(
    ("name", "listed"), [("facebook/sam-vit-base", True), ("/gone/sam", False), ("../runs/base", False), ("", False)]
)
def test_the_card_lists_a_base_of_the_hub_only(name, listed, sam_folder):
    model = make_model(sam_folder)
    model.get_base_model().config._name_or_path = name
    header, _ = front_matter(hub.model_card(model, RESULTS))
    assert header.get("base_model") == (name if listed else None)


PUSH_AND_LOAD = """
import sys, torch, peft_talora
folder, images, output = sys.argv[1:]
print(peft_talora.push_to_hub(folder, "user/name", private=True))
model = peft_talora.load("user/name")
processor = peft_talora.load_image_processor("user/name")
with torch.no_grad():
    logits = dict(model(pixel_values=torch.load(images)).logits)
torch.save({"logits": logits, "size": processor.pad_size["height"]}, output)
try:
    peft_talora.load("user/other")
except OSError as error:
    print("absent")
"""


def test_pushed_to_the_hub_and_loaded_from_there(sam_folder, images, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(sam_folder, folder / "base")
    model = make_model(str(folder / "base"))
    card = hub.model_card(model, RESULTS, "user/name")
    save_adapter(model, folder, make_image_processor(64), card)
    for left_behind in ("checkpoint-12/optimizer.bin", "best/adapter_model.safetensors", ".saving-x/half.json"):
        (folder / left_behind).parent.mkdir()
        (folder / left_behind).write_bytes(b"left behind")
    torch.save(images, tmp_path / "images.pt")
    with serve() as server:
        output = run_python(
            PUSH_AND_LOAD,
            folder,
            tmp_path / "images.pt",
            tmp_path / "loaded.pt",
            **server.environment(tmp_path / "home"),
        )
    (repository,) = server.repositories.values()
    assert repository.created["name"] == "name"
    assert repository.created["visibility"] == "private"
    base = {f"base/{name}" for name in files_in(sam_folder)}
    assert set(repository.files) - {".gitattributes"} == SAVED | base | {"preprocessor_config.json"}
    assert repository.files["README.md"].decode() == card
    assert output.split() == [f"{server.url}/user/name/commit/{repository.commit_id}", "absent"]
    loaded = torch.load(tmp_path / "loaded.pt")
    assert loaded["size"] == 64
    assert_same_tensors(loaded["logits"], predict(model, images))
