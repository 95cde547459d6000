"""To stock LoRA folders, read where this package is not installed, and back."""

import json
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from conftest import IMAGE_SIZE
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_msam_with_talora import TASKS, scramble
from tuner_cases import MLP_2D, adapt, assert_close, assert_visibly_different, saying

import peft_talora
from peft_talora import MSamModel, TALoRAConfig, from_loras, make_image_processor, save_adapter, to_lora
from peft_talora.tuner.convert import adapted_layers

# Runs where importing this package fails, as where it is not installed.
STOCK_CODE = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peft_talora":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import SamModel, SamVisionModel

base, images, output, *folders = sys.argv[1:]
pixel_values = load_file(images)["pixel_values"]
found = {}
for folder in folders:
    model = PeftModel.from_pretrained(SamModel.from_pretrained(base), folder).eval()
    found[folder] = model.get_image_embeddings(pixel_values)
    found[f"{folder} merged"] = model.merge_and_unload(safe_merge=True).get_image_embeddings(pixel_values)
with torch.no_grad():
    model = PeftModel.from_pretrained(SamVisionModel.from_pretrained(base), folders[0]).eval()
    found["vision model"] = model(pixel_values).last_hidden_state
assert "peft_talora" not in sys.modules
save_file({name: x.contiguous() for name, x in found.items()}, output)
"""
CONFIGS = {
    "norms": {"r": 4, "train_norms": True},
    "narrow": {"r": 6, "r_out": 3, "alpha": 5.0, "qkv_parts": ["q", "v"]},
    "patterns": {
        "r": 4,
        "r_out": 3,
        "target_modules": r"vision_encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])",
        "rank_pattern": {"qkv": 2, r"layers\.1\.mlp\.lin1": [5, 7]},
        "alpha_pattern": {"lin2": 3.0},
    },
}
saves_biases = Version(peft.__version__) >= Version("0.21")  # before, PEFT saved those of its own methods only
if saves_biases:
    CONFIGS |= {"biases": {"r": 4, "bias": "talora_only"}, "all-biases": {"r": 4, "bias": "all"}}


def make_model(sam_folder, tasks=TASKS, adapter_name="default", **values) -> PeftModel:
    """An adapted mSAM in which all that is trained has moved, and tasks differ visibly."""
    msam = MSamModel.from_pretrained(sam_folder, tasks=tasks)
    scramble(msam.task_heads)
    torch.manual_seed(len(tasks))
    model = get_peft_model(msam, TALoRAConfig(init_weights=False, **values), adapter_name=adapter_name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "talora_core" in name:
                parameter.mul_(6)
            elif parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def embed(model, images, task) -> torch.Tensor:
    model.set_task(task)
    embeddings = model.get_base_model().vision_encoder(images).last_hidden_state
    model.set_task(None)
    return embeddings


def read(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


class TestToLora:
    def test_gives_equal_embeddings_where_this_package_is_not_installed(self, sam_folder, images, tmp_path):
        expected = {}
        for name, values in CONFIGS.items():
            model = make_model(sam_folder, **values)
            for task in TASKS if name == "norms" else ["depth"]:
                folder = tmp_path / f"{name}-{task}"
                to_lora(model, task, folder)
                expected[str(folder)] = embed(model, images, task)
        assert_visibly_different(*expected.values())
        save_file({"pixel_values": images}, tmp_path / "images.safetensors")
        arguments = [sam_folder, tmp_path / "images.safetensors", tmp_path / "found.safetensors", *expected]
        subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", STOCK_CODE, *map(str, arguments)], check=True)
        found = load_file(tmp_path / "found.safetensors")
        for folder, embeddings in expected.items():
            assert 0.1 < embeddings.abs().max() < 10
            assert_close(found[folder], embeddings)
            assert_close(found[f"{folder} merged"], embeddings)
        assert_close(found["vision model"], next(iter(expected.values())))

    def test_ranks_are_the_smaller_ones(self, sam_folder, tmp_path):
        model = make_model(sam_folder, **CONFIGS["patterns"])
        to_lora(model, "depth", tmp_path)
        config = LoraConfig.from_pretrained(str(tmp_path))
        assert config.r == config.lora_alpha == 5
        assert config.rank_pattern == config.alpha_pattern
        assert len(config.rank_pattern) == 15  # all layers but the one of rank 5
        assert set(config.rank_pattern.values()) == {2, 3}
        state = load_file(tmp_path / "adapter_model.safetensors")
        assert len(state) == 32
        assert state["base_model.model.vision_encoder.layers.1.mlp.lin1.lora_A.weight"].shape == (5, 32)
        assert state["base_model.model.vision_encoder.layers.0.attn.qkv.lora_B.weight"].shape == (96, 2)

    def test_disabled_thirds_have_zero_rows(self, sam_folder, tmp_path):
        to_lora(make_model(sam_folder, **CONFIGS["narrow"]), "depth", tmp_path)
        b = load_file(tmp_path / "adapter_model.safetensors")[
            "base_model.model.vision_encoder.layers.0.attn.qkv.lora_B.weight"
        ]
        thirds = [third.abs().max() > 0 for third in b.chunk(3)]
        assert thirds == [True, False, True]

    def test_the_head_lies_beside(self, sam_folder, tmp_path):
        model = make_model(sam_folder, train_norms=True)
        to_lora(model, "depth", tmp_path)
        assert read(tmp_path)["base_model_name_or_path"] == sam_folder
        assert not [name for name in read(tmp_path)["modules_to_save"] if "task_heads" in name]
        head = load_file(tmp_path / "head.safetensors")
        trained = model.task_heads["depth"].modules_to_save["default"].state_dict()
        assert head.keys() == trained.keys()
        assert all(torch.equal(head[name], trained[name]) for name in head)
        with safe_open(tmp_path / "head.safetensors", framework="pt") as file:
            told = json.loads(file.metadata()["msam_config"])
        assert told["tasks"] == [{"name": "depth", "kind": "depth", "channels": 1}]
        assert told["image_size"] == IMAGE_SIZE

    def test_a_merged_model_is_exported_as_an_unmerged_one(self, sam_folder, tmp_path):
        model = make_model(sam_folder)
        to_lora(model, "depth", tmp_path / "before")
        model.set_task("normals")
        model.merge_adapter()
        to_lora(model, "depth", tmp_path / "after")
        one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_an_adapter_of_one_task_is_exported_for_any_head(self, sam_folder, images, tmp_path):
        model = make_model(sam_folder, task_names=["main"])
        to_lora(model, "normals", tmp_path)
        with safe_open(tmp_path / "head.safetensors", framework="pt") as file:
            assert '"normals"' in file.metadata()["msam_config"]
        to_lora(model, list(TASKS).index("normals"), tmp_path / "by position")
        with safe_open(tmp_path / "by position" / "head.safetensors", framework="pt") as file:
            assert '"normals"' in file.metadata()["msam_config"]
        for task in ("main", 3):
            with pytest.raises(ValueError, match=saying(repr(task), str(list(TASKS)))):
                to_lora(model, task, tmp_path)
        sam = PeftModel.from_pretrained(MSamModel.from_pretrained(sam_folder, tasks=TASKS), tmp_path)
        assert_close(sam.vision_encoder(images)[0], embed(model, images, None))

    def test_nothing_of_an_earlier_adapter_stays(self, sam_folder, tmp_path):
        model = make_model(sam_folder)
        save_adapter(model, tmp_path, make_image_processor(IMAGE_SIZE))
        (tmp_path / "notes.txt").write_text("mine")
        to_lora(model, "depth", tmp_path)
        lora = {"adapter_config.json", "adapter_model.safetensors"}
        others = {"README.md", "notes.txt"}
        assert {file.name for file in tmp_path.iterdir()} == {*lora, *others, "head.safetensors"}
        with pytest.raises(OSError, match=r"msam_config\.json is missing"):
            peft_talora.load(tmp_path)
        to_lora(adapt(MLP_2D), "depth", tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == {*lora, *others}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_written_in_float32(self, dtype, tmp_path):
        model = adapt(MLP_2D, r_out=2).to(dtype)
        to_lora(model, "normals", tmp_path)
        state = load_file(tmp_path / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        for name, layer in adapted_layers(model.get_base_model(), "default").items():
            a, b = (state[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            assert_close(b @ a, layer.float().get_delta_weight("default", "normals").detach())

    def test_any_model_and_any_adapter(self, tmp_path):
        model = adapt(MLP_2D, adapter_name="first")
        model.add_adapter("second", TALoRAConfig(task_names=["day"], r=2, target_modules=["lin1"], init_weights=False))
        to_lora(model, 0, tmp_path, adapter_name="second")
        assert not (tmp_path / "head.safetensors").exists()
        lora = PeftModel.from_pretrained(MLP_2D.build(), tmp_path)
        model.set_adapter("second")
        assert_close(lora(MLP_2D.inputs()), model(MLP_2D.inputs()))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [(("edge",), ["'edge'", "edges"]), ((3,), ["3", "edges"]), ((0, "absent"), ["'absent'", "default"])],
    )
    def test_refuses(self, arguments, words, tmp_path):
        task, *adapter = arguments
        with pytest.raises(ValueError, match=saying(*words)):
            to_lora(adapt(MLP_2D), task, tmp_path / "new", *adapter)
        assert not (tmp_path / "new").exists()

    def test_an_unknown_adapter_is_told_by_names_alone(self, tmp_path):
        with pytest.raises(ValueError, match=r"'absent' is no .* its adapters are \{'default': 'TALORA'\}\.$"):
            to_lora(adapt(MLP_2D), 0, tmp_path, "absent")

    def test_refuses_another_method_and_layers_in_heads(self, sam_folder, tmp_path):
        lora = get_peft_model(MLP_2D.build(), LoraConfig(target_modules=["lin0"]))
        with pytest.raises(ValueError, match=saying("'default'", "no TA-LoRA adapter", "LORA")):
            to_lora(lora, 0, tmp_path)
        model = make_model(sam_folder, target_modules=["q_proj"], modules_to_save=[])
        with pytest.raises(ValueError, match=saying("layers in the heads", "task_heads.depth")):
            to_lora(model, "depth", tmp_path)


def save_loras(sam_folder, folder, images, **changes) -> tuple[dict, dict]:
    """A stock LoRA per task, each of other ranks and scaling, on an mSAM of that task; what it embeds and predicts."""
    settings = {
        "segmentation": {"r": 3, "lora_alpha": 4, "rank_pattern": {"layers.1.attn.qkv": 5}},
        "depth": {"r": 2, "lora_alpha": 6, "use_rslora": True},
        "normals": {
            "r": 4,
            "lora_alpha": 1,
            "alpha_pattern": {"layers.2.attn.qkv": 3},
            "init_lora_weights": "gaussian",
        },
    }
    expected = {}
    for seed, (task, values) in enumerate(settings.items()):
        msam = MSamModel.from_pretrained(sam_folder, tasks={task: TASKS[task]})
        torch.manual_seed(seed)
        config = {
            "target_modules": ["qkv"],
            "modules_to_save": [f"task_heads.{task}"],
            **values,
            **changes.get(task, {}),
        }
        model = get_peft_model(msam, LoraConfig(**config)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_((0.2 if "lora_" in name else 0.05) * torch.randn_like(parameter))
            expected[task] = (model.vision_encoder(images)[0], model(pixel_values=images).logits[task])
        save_adapter(model, folder / task)
    return {task: folder / task for task in settings}, expected


@torch.no_grad()
def assert_gives(folder, images, expected) -> PeftModel:
    model = peft_talora.load(folder)
    assert model.get_base_model().task_names == list(expected)
    logits = model(pixel_values=images).logits
    for task, (embeddings, predicted) in expected.items():
        assert_close(embed(model, images, task), embeddings)
        assert_close(logits[task], predicted, 1e-4)
    assert_visibly_different(*(embeddings for embeddings, _ in expected.values()))
    return model


class TestFromLoras:
    def test_is_exact_without_ranks(self, sam_folder, images, tmp_path):
        loras, expected = save_loras(sam_folder, tmp_path, images)
        errors = from_loras(loras, tmp_path / "all")
        assert errors.overall < 1e-12
        assert set(errors.layers) == {f"vision_encoder.layers.{i}.attn.qkv" for i in range(4)}
        model = assert_gives(tmp_path / "all", images, expected)
        config = model.peft_config["default"]
        assert (config.task_names, config.r, config.r_out, config.r_task) == (list(TASKS), 11, 11, 3)
        ranks = [
            len(layer.talora_in["default"].T) for layer in adapted_layers(model.get_base_model(), "default").values()
        ]
        assert ranks == [9, 11, 9, 9]
        for layer in adapted_layers(model.get_base_model(), "default").values():
            for factor in (layer.talora_in["default"], layer.talora_out["default"]):
                assert_close(factor.T @ factor, torch.eye(factor.shape[1]), 1e-5)
            assert layer.scaling["default"] == 0.5

    def test_a_head_of_an_earlier_export_is_not_taken(self, sam_folder, images, tmp_path):
        to_lora(make_model(sam_folder), "depth", tmp_path / "depth")
        loras, expected = save_loras(sam_folder, tmp_path, images)
        from_loras(loras, tmp_path / "all")
        assert_gives(tmp_path / "all", images, expected)

    def test_copies_of_one_base_are_one_base(self, sam_folder, images, tmp_path):
        loras, expected = save_loras(sam_folder, tmp_path, images)
        for folder in loras.values():
            shutil.copytree(sam_folder, folder / "base")
            for file in (folder / "msam_config.json", folder / "adapter_config.json"):
                file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "base"}))
        from_loras(loras, tmp_path / "all")
        assert read(tmp_path / "all")["base_model_name_or_path"] == str(loras["segmentation"] / "base")
        assert_gives(tmp_path / "all", images, expected)
        (loras["depth"] / "base" / "model.safetensors").write_bytes(b"another")
        with pytest.raises(ValueError, match=saying("different base", "segmentation/base", "'depth'")):
            from_loras(loras, tmp_path / "all")

    def test_an_image_processor_of_an_earlier_adapter_does_not_stay(self, sam_folder, images, tmp_path):
        loras, _ = save_loras(sam_folder, tmp_path, images)
        make_image_processor(IMAGE_SIZE).save_pretrained(tmp_path / "all")
        from_loras(loras, tmp_path / "all")
        assert not (tmp_path / "all" / "preprocessor_config.json").exists()

    def test_tasks_are_in_the_given_order(self, sam_folder, images, tmp_path):
        loras, expected = save_loras(sam_folder, tmp_path, images)
        order = ["normals", "segmentation", "depth"]
        from_loras({task: loras[task] for task in order}, tmp_path / "all")
        assert_gives(tmp_path / "all", images, {task: expected[task] for task in order})

    def test_error_is_that_of_the_dense_updates_and_falls_with_the_rank(self, sam_folder, images, tmp_path):
        loras, _ = save_loras(sam_folder, tmp_path, images)
        overall = []
        for rank in (1, 3, 6, 9, 11):
            errors = from_loras(loras, tmp_path / "cut", r=rank)
            model = peft_talora.load(tmp_path / "cut")
            squares = torch.zeros(2, dtype=torch.float64)
            for name, layer in adapted_layers(model.get_base_model(), "default").items():
                exact = {task: dense_lora(folder, name) for task, folder in loras.items()}
                found = {task: layer.get_delta_weight("default", task).detach() for task in loras}
                both = [(exact[task] - found[task], exact[task]) for task in loras]
                squares += torch.stack(
                    [sum(x.double().square().sum() for x in side) for side in zip(*both, strict=True)]
                )
            assert errors.overall == pytest.approx((squares[0] / squares[1]).sqrt().item(), abs=1e-6)
            overall.append(errors.overall)
        assert overall[0] > 0.3
        assert overall == sorted(overall, reverse=True)
        assert overall[-1] < 1e-12

    def test_ranks_are_limits(self, sam_folder, images, tmp_path):
        loras, _ = save_loras(sam_folder, tmp_path, images)
        from_loras(loras, tmp_path / "cut", r=10, r_out=6, r_task=2)
        config = PeftConfig.from_pretrained(str(tmp_path / "cut"))
        assert (config.r, config.r_out, config.r_task) == (10, 6, 2)
        assert set(map(tuple, config.rank_pattern.values())) == {(9, 6)}

    def test_there_and_back(self, sam_folder, images, tmp_path):
        """Three exports of one adapter, with equal norms, make that adapter again, heads included."""
        model = make_model(sam_folder, r=4, train_norms=True)
        for task in TASKS:
            to_lora(model, task, tmp_path / task)
        errors = from_loras({task: tmp_path / task for task in TASKS}, tmp_path / "all", r=4)
        assert errors.overall < 1e-6  # rounding to float32 in between leaves a little beyond rank 4
        with torch.no_grad():
            logits = model(pixel_values=images).logits
        expected = {task: (embed(model, images, task), logits[task]) for task in TASKS}
        assert_gives(tmp_path / "all", images, expected)

    def test_norms_that_differ_need_a_choice(self, sam_folder, images, tmp_path):
        for seed, task in enumerate(TASKS):
            torch.manual_seed(seed)
            to_lora(
                make_model(sam_folder, {task: TASKS[task]}, r=2 + seed, train_norms=seed > 0), task, tmp_path / task
            )
        loras = {task: tmp_path / task for task in TASKS}
        with pytest.raises(
            ValueError, match=saying("'segmentation'", "'depth'", "layers.0.layer_norm1.weight", "modules_from")
        ):
            from_loras(loras, tmp_path / "all")
        from_loras(loras, tmp_path / "all", modules_from="normals")
        found, source = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("all", "normals"))
        norms = [name for name in source if "layer_norm" in name and "task_heads" not in name]
        assert len(norms) == 16
        assert all(torch.equal(found[name], source[name]) for name in norms)
        peft_talora.load(tmp_path / "all")
        from_loras(loras, tmp_path / "none", modules_from="segmentation")
        assert peft_talora.load(tmp_path / "none").peft_config["default"].modules_to_save == [
            f"task_heads.{task}" for task in TASKS
        ]

    @pytest.mark.skipif(not saves_biases, reason="this PEFT does not save biases of methods that are not its own")
    def test_biases_travel(self, sam_folder, images, tmp_path):
        model = make_model(sam_folder, r=4, bias="talora_only")
        for task in TASKS:
            to_lora(model, task, tmp_path / task)
        from_loras({task: tmp_path / task for task in TASKS}, tmp_path / "all")
        loaded = peft_talora.load(tmp_path / "all")
        assert loaded.peft_config["default"].bias == "talora_only"
        assert_close(embed(loaded, images, "depth"), embed(model, images, "depth"))

    def test_any_model(self, tmp_path):
        nets = {}
        for seed, name in enumerate(["day", "night"]):
            torch.manual_seed(seed)
            config = LoraConfig(r=2 + 2 * seed, target_modules=["lin0", "lin1"], init_lora_weights=False)
            nets[name] = get_peft_model(MLP_2D.build(), config).eval()
            nets[name].save_pretrained(tmp_path / name)
        from_loras({name: tmp_path / name for name in nets}, tmp_path / "both")
        assert not (tmp_path / "both" / "msam_config.json").exists()
        model = PeftModel.from_pretrained(MLP_2D.build(), tmp_path / "both")
        assert [layer.r["default"] for layer in adapted_layers(model.get_base_model(), "default").values()] == [6, 6]
        outputs = [model(MLP_2D.inputs(), task_ids=[name] * 2) for name in nets]
        assert_visibly_different(*outputs)
        for output, net in zip(outputs, nets.values(), strict=True):
            assert_close(output, net(MLP_2D.inputs()))


def dense_lora(folder, layer) -> torch.Tensor:
    """What stock PEFT adds to a layer's weight."""
    config, state = LoraConfig.from_pretrained(str(folder)), load_file(folder / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
    ending = layer.removeprefix("vision_encoder.")
    alpha = config.alpha_pattern.get(ending, config.lora_alpha)
    return b @ a * alpha / (len(a) ** 0.5 if config.use_rslora else len(a))


def save_lora(folder, build=MLP_2D.build, edit=None, **values) -> None:
    config = LoraConfig(**{"r": 2, "target_modules": ["lin0"], **values})
    get_peft_model(build(), config).save_pretrained(folder)
    if edit:
        (folder / "adapter_config.json").write_text(json.dumps({**read(folder), **edit}))


class Mixed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.conv, self.lin0 = (
            torch.nn.Embedding(5, 4),
            torch.nn.Conv2d(2, 2, 3),
            torch.nn.Linear(4, 4),
        )


class TestFromLorasRefuses:
    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"use_dora": True}, ["use_dora=True"]),
            ({"lora_bias": True}, ["lora_bias=True"]),
            ({"target_modules": ["conv"], "build": Mixed}, ["conv.lora_A.weight", "no LoRA matrix", "(2, 2, 3, 3)"]),
            ({"target_modules": ["embedding"], "build": Mixed}, ["embedding.lora_embedding_A", "no LoRA matrix"]),
            ({"init_lora_weights": "olora"}, ["init_lora_weights='olora'", "base weights"]),
            ({"edit": {"layer_replication": [[0, 1]]}}, ["layer_replication=[[0, 1]]"]),
            ({"edit": {"peft_type": "LOHA"}}, ["'LOHA'", "'LORA'"]),
            ({"target_modules": ["lin1"]}, ["'day'", "'night'", "lin0", "lin1"]),
            ({"edit": {"base_model_name_or_path": "user/other"}}, ["'night'", "user/other", "different base"]),
        ],
        ids=["dora", "lora-bias", "conv", "embedding", "olora", "replication", "loha", "targets", "base"],
    )
    def test_what_cannot_be_represented(self, values, words, tmp_path, recwarn):
        save_lora(tmp_path / "day")
        save_lora(tmp_path / "night", **values)
        with pytest.raises(ValueError, match=saying(*words)):
            from_loras({"day": tmp_path / "day", "night": tmp_path / "night"}, tmp_path / "both")
        assert not (tmp_path / "both").exists()

    def test_a_folder_without_safetensors(self, tmp_path):
        save_lora(tmp_path / "day")
        weights = tmp_path / "day" / "adapter_model.safetensors"
        torch.save(load_file(weights), tmp_path / "day" / "adapter_model.bin")
        weights.unlink()
        with pytest.raises(OSError, match=saying("adapter_model.safetensors is missing")):
            from_loras({"day": tmp_path / "day"}, tmp_path / "both")
        weights.write_bytes(b"broken")
        with pytest.raises(OSError, match=saying("truncated or corrupt")):
            from_loras({"day": tmp_path / "day"}, tmp_path / "both")

    def test_a_half_of_a_layer(self, tmp_path):
        save_lora(tmp_path / "day")
        file = tmp_path / "day" / "adapter_model.safetensors"
        save_file({name: x for name, x in load_file(file).items() if "lora_A" in name}, file)
        with pytest.raises(ValueError, match=saying("lin0", "['A']")):
            from_loras({"day": tmp_path / "day"}, tmp_path / "both")

    def test_a_folder_without_matrices(self, tmp_path):
        save_lora(tmp_path / "day")
        save_file({"base_model.model.lin1.weight": torch.zeros(2)}, tmp_path / "day" / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=saying("day", "no LoRA matrices", "lin1.weight")):
            from_loras({"day": tmp_path / "day"}, tmp_path / "both")

    def test_matrices_of_different_ranks(self, tmp_path):
        save_lora(tmp_path / "day")
        file = tmp_path / "day" / "adapter_model.safetensors"
        save_file({name: x[:1] if "lora_A" in name else x for name, x in load_file(file).items()}, file)
        with pytest.raises(ValueError, match=saying("lin0", "'lora_A': (1, 6)", "'lora_B': (9, 2)")):
            from_loras({"day": tmp_path / "day"}, tmp_path / "both")

    @pytest.mark.parametrize(("width", "shapes"), [((4, 9), "(9, 4)"), ((6, 8), "(8, 6)")], ids=["input", "output"])
    def test_layers_of_different_shapes(self, width, shapes, tmp_path):
        save_lora(tmp_path / "day")
        save_lora(tmp_path / "night", build=lambda: torch.nn.ModuleDict({"lin0": torch.nn.Linear(*width)}))
        with pytest.raises(ValueError, match=saying("'day'", "'night'", "lin0", "(9, 6)", shapes)):
            from_loras({"day": tmp_path / "day", "night": tmp_path / "night"}, tmp_path / "both")

    def test_a_head_that_does_not_say_whose_it_is(self, sam_folder, tmp_path):
        to_lora(make_model(sam_folder), "depth", tmp_path / "depth")
        head = tmp_path / "depth" / "head.safetensors"
        for metadata in (None, {"format": "pt"}):
            save_file({"a": torch.zeros(1)}, head, metadata=metadata)
            with pytest.raises(ValueError, match=saying("head.safetensors", "does not say", "`to_lora`")):
                from_loras({"depth": tmp_path / "depth"}, tmp_path / "all")

    def test_tasks_that_are_not_the_heads(self, sam_folder, images, tmp_path):
        loras, _ = save_loras(sam_folder, tmp_path, images)
        with pytest.raises(ValueError, match=saying("['depth']", "'roads'")):
            from_loras({"roads": loras["depth"]}, tmp_path / "all")
        to_lora(make_model(sam_folder), "normals", tmp_path / "exported")
        with pytest.raises(ValueError, match=saying("'normals'", "not of 'roads'")):
            from_loras({"roads": tmp_path / "exported"}, tmp_path / "all")

    def test_a_head_that_is_missing(self, sam_folder, images, tmp_path):
        loras, _ = save_loras(sam_folder, tmp_path, images, depth={"modules_to_save": None})
        with pytest.raises(ValueError, match=saying("['depth']", "no head")):
            from_loras(loras, tmp_path / "all")

    def test_different_image_processors(self, sam_folder, images, tmp_path):
        loras, _ = save_loras(sam_folder, tmp_path, images)
        for task, folder in loras.items():
            make_image_processor(IMAGE_SIZE, normalize=task != "depth").save_pretrained(folder)
        with pytest.raises(ValueError, match=saying("image processors", "['depth']", "'segmentation'")):
            from_loras(loras, tmp_path / "all")
        make_image_processor(IMAGE_SIZE).save_pretrained(loras["depth"])
        from_loras(loras, tmp_path / "all")
        assert peft_talora.load_image_processor(tmp_path / "all").size == {"longest_edge": IMAGE_SIZE}

    def test_models_of_another_shape(self, sam_folder, images, tmp_path):
        loras, _ = save_loras(sam_folder, tmp_path, images)
        file = loras["depth"] / "msam_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "image_size": 128}))
        with pytest.raises(ValueError, match=saying("image_size", "'depth': 128")):
            from_loras(loras, tmp_path / "all")

    def test_names(self, tmp_path):
        save_lora(tmp_path / "day")
        for arguments, words in (
            (({}, "x"), ["empty"]),
            (({"two words": tmp_path / "day"}, "x"), ["'two words'"]),
            (({"day": tmp_path / "day"}, "x", None, None, None, "night"), ["modules_from", "'night'"]),
            (({"day": tmp_path / "day"}, "x", -1), ["`r`", "-1", "at least 1"]),
            (({"day": tmp_path / "day"}, "x", 2, 0), ["`r_out`", "0", "at least 1"]),
            (({"day": tmp_path / "day"}, "x", 2, 2, -2), ["`r_task`", "-2", "at least 1"]),
        ):
            with pytest.raises(ValueError, match=saying(*words)):
                from_loras(*arguments)
