"""Growing: tasks added, removed, renamed, and how alike they are; on mSAM and on a bare MLP. T = 3 tasks, B = 2."""

import copy

import pytest
import torch
from conftest import make_sam
from peft import PeftModel, get_peft_model
from torch import nn
from tuner_cases import (
    BATCH,
    MLP_2D,
    TASKS,
    VISION,
    adapt,
    adapted_layers,
    assert_close,
    assert_visibly_different,
    config_for,
    needs_peft_0_21,
    outputs_of_all,
    saying,
    trainable_names,
)

from peft_talora import MSamModel, TALoRAConfig, load, make_task, save_adapter

HEADS = {"segmentation": 4, "depth": 1, "normals": 3}  # not in alphabetical order
OLD = list(HEADS)


def scramble(model: nn.Module) -> None:
    """Make the adapter's heads and norms differ, as trained ones do, and its updates visible."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            generator = torch.Generator().manual_seed(number)
            if ".modules_to_save." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            if "talora_core" in name:
                parameter.mul_(8)


def make_model(sam_folder: str, decoder_mode: str = "channel", **values) -> PeftModel:
    torch.manual_seed(0)
    base = MSamModel.from_pretrained(sam_folder, tasks=HEADS, decoder_mode=decoder_mode)
    model = get_peft_model(base, TALoRAConfig(r=4, init_weights=False, **values)).eval()
    scramble(model)
    return model


@pytest.fixture
def model(sam_folder) -> PeftModel:
    return make_model(sam_folder, train_norms=True)


@torch.no_grad()
def logits_of(model: nn.Module, images: torch.Tensor, tasks: list[str]) -> dict[str, torch.Tensor]:
    """All in one call, one by one, and one task per image: each shape of call has bits of its own."""
    found = dict(model(pixel_values=images, tasks=tasks).logits)
    for task in tasks:
        found[f"{task} alone"] = model(pixel_values=images, tasks=[task]).logits[task]
    first, *_, last = tasks
    mixed = model(pixel_values=images, task_ids=[last, first]).logits
    return {**found, **{f"{task} mixed": values for task, values in mixed.items()}}


def assert_equal_logits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert values.abs().max() > 0.1, name
        assert torch.equal(actual[name], values), name


def train(model: nn.Module, images: torch.Tensor, task: str, steps: int = 6) -> list[float]:
    """Losses of some steps on one task, by an optimiser that is given all parameters and decays weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.1)
    target = torch.linspace(1, 3, 32)  # a ramp from left to right
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(pixel_values=images, tasks=[task]).logits[task] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def snapshot(model: PeftModel) -> dict:
    """All that an error must leave as it was."""
    state, base = model.base_model.task_state, model.get_base_model()
    return {
        "weights": {name: (value.sum().item(), value.shape) for name, value in model.state_dict().items()},
        "trainable": trainable_names(model),
        "configs": copy.deepcopy({name: config.to_dict() for name, config in model.peft_config.items()}),
        "state": copy.deepcopy((state.task_names, state.head_names, state.selected, state.trained_only)),
        "base": copy.deepcopy(base.config.to_dict()) if isinstance(base, MSamModel) else None,
    }


class TestFrozenOthers:
    @pytest.mark.parametrize("init", ["zero", "copy:depth"])
    def test_old_tasks_stay_bit_identical_and_the_new_one_learns(self, model, images, init):
        expected = logits_of(model, images, OLD)
        assert_visibly_different(expected["depth"], expected["normals"][:, :1], expected["segmentation"][:, :1])
        model.add_task("edges", kind="edges", channels=1, init=init, freeze_others=True)
        assert_equal_logits(logits_of(model, images, OLD), expected)
        rows = [layer.talora_task["default"]["edges"].detach().clone() for layer in adapted_layers(model)]
        losses = train(model, images, "edges")
        assert losses[-1] < 0.8 * losses[0]
        assert_equal_logits(logits_of(model, images, OLD), expected)
        for layer, row in zip(adapted_layers(model), rows, strict=True):
            assert (layer.talora_task["default"]["edges"] - row).abs().max() > 0.01

    @needs_peft_0_21
    @pytest.mark.parametrize("decoder_mode", ["channel", "token"])
    def test_only_the_new_row_and_head_get_a_gradient(self, sam_folder, images, decoder_mode):
        model = make_model(sam_folder, decoder_mode, train_norms=True, bias="all")
        model.add_task("parts", channels=5, freeze_others=True)
        model(pixel_values=images).logits["parts"].square().mean().backward()
        touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert touched == trainable_names(model)
        rows = {name for name in touched if name.endswith("talora_task.default.parts")}
        heads = {name for name in touched if ".task_heads.parts.modules_to_save.default." in name}
        assert len(rows) == len(adapted_layers(model)) == 4
        assert rows | heads == touched
        assert len(heads) > 10

    def test_the_freeze_outlasts_what_peft_makes_trainable(self, model):
        everything = trainable_names(model)
        model.add_task("edges", channels=1, freeze_others=True)
        frozen = trainable_names(model)
        with model.disable_adapter():
            assert not trainable_names(model)
        assert trainable_names(model) == frozen
        model.set_adapter("default")
        assert trainable_names(model) == frozen
        model.add_adapter("second", TALoRAConfig(r=2))
        model(pixel_values=torch.randn(1, 3, 64, 64))  # PEFT touches the heads after the tuner; a call sees to it
        assert trainable_names(model) == frozen
        model.set_adapter("second")
        second = trainable_names(model)
        assert second
        assert all(".second" in name for name in second)
        model.set_adapter("default")
        assert trainable_names(model) == frozen
        model.train_only(None)
        assert trainable_names(model) == everything | frozen

    @needs_peft_0_21  # 0.20 cannot unload once its active adapter is deleted
    def test_the_freeze_ends_with_its_adapter(self, model):
        model.add_task("edges", channels=1, freeze_others=True)
        model.add_adapter("second", TALoRAConfig(r=2))
        model.set_adapter("second")
        model.delete_adapter("default")
        model.add_adapter("default", TALoRAConfig(r=4))
        model.set_adapter("default")
        assert {name.split(".")[-1] for name in trainable_names(model) if "talora_task" in name} == {*OLD, "edges"}
        model.train_only("edges")
        heads = model.unload().task_heads
        trainable = {name for name, head in heads.items() if next(head.parameters()).requires_grad}
        assert trainable == {"edges"}

    @needs_peft_0_21
    def test_train_only_chooses_and_ends(self):
        model = adapt(MLP_2D, bias="all")
        everything = trainable_names(model)
        for tasks in ("normals", ["depth", "edges"]):
            model.train_only(tasks)
            names = {name.split(".")[-1] for name in trainable_names(model)}
            assert names == ({tasks} if isinstance(tasks, str) else set(tasks))
        model.train_only(None)
        assert trainable_names(model) == everything
        model.train_only("depth")
        model.add_task("later")
        assert {name.split(".")[-1] for name in trainable_names(model)} == {"depth", "later"}
        model.rename_task("later", "last")
        model.remove_task("depth")
        assert {name.split(".")[-1] for name in trainable_names(model)} == {"last"}
        model.remove_task("last")
        assert trainable_names(model) == {name for name in everything if not name.endswith(".depth")}
        with pytest.raises(ValueError, match=saying("`tasks` is empty", "normals")):
            model.train_only([])

    @pytest.mark.parametrize("end", [lambda model: model.train_only(None), lambda model: model.remove_task("new")])
    def test_what_was_frozen_before_stays_frozen(self, end, tmp_path):
        adapt(MLP_2D).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(MLP_2D.build(), tmp_path)
        model.train_only(None)
        assert not trainable_names(model)
        model.train_only("depth")
        assert {name.split(".")[-1] for name in trainable_names(model)} == {"depth"}
        model.add_task("new", freeze_others=True)
        model.add_adapter("second", config_for(MLP_2D))
        assert {name.split(".")[-1] for name in trainable_names(model)} == {"new"}
        end(model)
        assert {name.split(".")[-1] for name in trainable_names(model)} <= {"new"}

    def test_what_the_user_froze_stays_frozen(self):
        model = adapt(MLP_2D)
        model.base_model.model.lin0.requires_grad_(False)
        before = trainable_names(model)
        model.train_only("depth")
        assert any("lin0" in name for name in trainable_names(model))
        model.add_task("new", freeze_others=True)
        model.remove_task("new")
        assert trainable_names(model) == before

    def test_without_it_the_rest_trains_on(self, model):
        before = trainable_names(model)
        model.add_task("edges", channels=1)
        added = trainable_names(model) - before
        assert before < trainable_names(model)
        assert all("edges" in name for name in added)


class TestStart:
    def test_a_zero_row_is_the_base_model(self, sam_folder, model, images):
        model = make_model(sam_folder)
        model.add_task("edges", channels=1)
        plain = MSamModel.from_pretrained(sam_folder, tasks={"edges": 1}).eval()
        with torch.no_grad():
            expected = make_sam().vision_encoder(images).last_hidden_state
            assert expected.abs().mean() > 0.1
            assert torch.equal(model.vision_encoder(images, task_ids=["edges"] * BATCH)[0], expected)
            for layer in adapted_layers(model):
                assert not layer.get_delta_weight("default", "edges").any()
            logits = model(pixel_values=images, tasks=["edges"]).logits["edges"]
            assert torch.equal(logits, plain(images).logits["edges"])  # the head is SAM's decoder

    @pytest.mark.parametrize("decoder_mode", ["channel", "token"])
    def test_a_copied_task_starts_as_the_other(self, sam_folder, images, decoder_mode):
        model = make_model(sam_folder, decoder_mode)
        model.add_task("angles", kind="normals", channels=3, init="copy:normals")
        model.add_task("parts", channels=5, init="copy:normals")
        with torch.no_grad():
            logits = [model(pixel_values=images, tasks=[t]).logits[t] for t in ("normals", "angles", "parts")]
            with model.disable_adapter():  # the originals are SAM's decoder, whatever was copied
                originals = model(pixel_values=images).logits
        assert_visibly_different(*(logits[0][:, channel] for channel in range(3)))
        assert torch.equal(logits[0], logits[1])
        # In mode "token" the tokens attend to one another, so channels are alike but not those of fewer channels.
        first = logits[0][:, 0] if decoder_mode == "channel" else logits[2][:, 0]
        start = originals["depth" if decoder_mode == "channel" else "parts"][:, 0]
        for channel in range(5):
            assert_close(logits[2][:, channel], first)
            assert_close(originals["parts"][:, channel], start)
        assert_visibly_different(logits[0][:, 0], logits[2][:, 0] if decoder_mode == "token" else start)

    def test_a_copied_row(self):
        model = adapt(MLP_2D)
        model.add_task("again", init="copy:normals")
        x = MLP_2D.inputs()
        with torch.no_grad():
            assert torch.equal(model(x, task_ids=["again"] * BATCH), model(x, task_ids=["normals"] * BATCH))
        for layer in adapted_layers(model):
            rows = layer.talora_task["default"]
            assert rows["again"] is not rows["normals"]

    def test_from_a_base_with_trained_heads_the_first_one_is_copied(self, sam_folder, tmp_path, images):
        plain = make_model(sam_folder)
        plain.set_task(None)
        trained = plain.unload().eval()
        trained.save_pretrained(tmp_path)
        model = get_peft_model(MSamModel.from_pretrained(tmp_path), TALoRAConfig(r=4, init_weights=False)).eval()
        model.add_task("parts", channels=2)
        with torch.no_grad():
            embeddings = trained.vision_encoder(images)[0]
            expected = trained.task_heads["segmentation"](embeddings, trained._image_positional_embeddings(8, 8))
            logits = model(pixel_values=images, tasks=["parts"]).logits["parts"]
        for channel in range(2):
            assert_close(logits[:, channel], expected[:, 0])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_new_weights_are_like_the_others(self, sam_folder, dtype):
        model = make_model(sam_folder).to(dtype)
        for name, init in {"one": "zero", "two": "copy:depth"}.items():
            model.add_task(name, kind="saliency", channels=2, init=init)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        heads = model.get_base_model().task_heads
        assert [heads[name].training for name in ("depth", "one", "two")] == [False] * 3

    def test_while_disabled(self, model, images):
        with torch.no_grad(), model.disable_adapter():
            model.add_task("edges", channels=1, init="copy:depth")
            disabled = model(pixel_values=images, tasks=["depth", "edges"]).logits
            assert not trainable_names(model)
        with torch.no_grad():
            enabled = model(pixel_values=images, tasks=["depth", "edges"]).logits
        for logits in (disabled, enabled):
            assert torch.equal(logits["depth"], logits["edges"])
        assert_visibly_different(disabled["edges"], enabled["edges"])

    def test_heads_of_a_model_without_adapter(self, sam_folder, images):
        model = MSamModel.from_pretrained(sam_folder, tasks=HEADS).eval()
        model.add_task_head("edges", None, 1, start=model.task_heads["depth"])
        model.rename_task_head("depth", "range")
        model.remove_task_head("segmentation")
        with torch.no_grad():
            logits = model(images).logits
        assert list(logits) == model.task_names == ["range", "normals", "edges"]
        assert torch.equal(logits["edges"], logits["range"])
        assert not any(module.training for module in model.modules())

    def test_on_the_meta_device(self):
        model = adapt(MLP_2D).to("meta")
        model.add_task("new", init="copy:depth")
        assert all(layer.talora_task["default"]["new"].is_meta for layer in adapted_layers(model))

    def test_a_task_of_ones_own_kind(self, model, images):
        heat = make_task("heat", 1, "saliency")
        model.add_task("heat", kind=heat)
        base = model.get_base_model()
        assert base.task("heat") is heat
        assert base.config.tasks[-1] == {"name": "heat", "kind": "saliency", "channels": 1}
        model.rename_task("heat", "warmth")
        assert base.task("warmth").name == "warmth"
        assert model(pixel_values=images, labels={"warmth": torch.ones(2, 64, 64).long()}).loss > 0

    @pytest.mark.parametrize("init_weights", ["lora", "orthogonal"])
    def test_rows_that_cannot_train_are_said(self, init_weights):
        message = "The core or the output factor of adapter 'default' is zero"
        with pytest.warns(UserWarning, match=message):
            adapt(MLP_2D, init_weights=init_weights).add_task("new")
        with pytest.warns(UserWarning, match=message):
            adapt(MLP_2D, init_weights=init_weights).add_task("new", init="copy:depth", freeze_others=True)
        adapt(MLP_2D, init_weights=init_weights).add_task("new", init="copy:depth")
        adapt(MLP_2D).add_task("new")

    def test_tied_tasks_are_said(self):
        with pytest.warns(UserWarning, match="`r_task=1`"):
            adapt(MLP_2D, task_names=["one"], r_task=1, r_out=4).add_task("two")


class TestRemove:
    @pytest.mark.parametrize("removed", OLD)
    def test_the_others_stay_bit_identical(self, model, images, removed):
        others = [task for task in OLD if task != removed]
        expected = logits_of(model, images, others)
        model.remove_task(removed)
        assert_equal_logits(logits_of(model, images, others), expected)
        assert list(model(pixel_values=images).logits) == others
        assert not [name for name in model.state_dict() if removed in name]
        with pytest.raises(ValueError, match=saying("Unknown task", removed)):
            model(pixel_values=images, tasks=[removed])

    def test_nothing_is_left_of_it(self, model, images):
        model(pixel_values=images, labels={"depth": torch.ones(BATCH, 64, 64)})
        model.remove_task("depth")
        model.add_task("depth", kind="saliency", channels=2)
        assert model.task_names == model.peft_config["default"].task_names == ["segmentation", "normals", "depth"]
        assert model.get_base_model().task("depth").kind == "saliency"
        for layer in adapted_layers(model):
            assert not layer.talora_task["default"]["depth"].any()

    def test_the_selection_goes_with_its_task(self):
        model = adapt(MLP_2D)
        x = MLP_2D.inputs()
        model.set_task("normals")
        expected = model(x)
        model.remove_task("depth")  # before the selected one, whose position changes
        model.remove_task("edges")
        model.add_task("later")
        assert torch.equal(model(x), expected)
        model.remove_task("normals")
        assert model.base_model.task_state.selected == {}
        model.add_task("more")
        with pytest.raises(ValueError, match="none is selected"):
            model(x)

    def test_positions_move_up(self, model, images):
        by_name = model(pixel_values=images, task_ids=["normals", "depth"]).logits
        model.remove_task("segmentation")
        by_position = model(pixel_values=images, task_ids=torch.tensor([1, 0])).logits
        for task, values in by_name.items():
            assert torch.equal(by_position[task], values)

    def test_down_to_one_task_and_up_again(self, model, images):
        for task in ("segmentation", "depth"):
            model.remove_task(task)
        assert not model.get_base_model().task_conditional
        with pytest.raises(ValueError, match=saying("'normals' is the only task", "`delete_adapter`")):
            model.remove_task("normals")
        with torch.no_grad():
            expected = model(pixel_values=images).logits["normals"]
            model.add_task("depth", channels=1)
            assert model.get_base_model().task_conditional
            assert_close(model(pixel_values=images).logits["normals"], expected)


class TestRename:
    def test_outputs_selection_and_parameters_stay(self, model, images):
        expected = logits_of(model, images, OLD)
        before = dict(model.named_parameters())
        model.set_task("depth")
        model.rename_task("depth", "range")
        assert list(model(pixel_values=images).logits) == ["range"]
        model.set_task(None)
        renamed = logits_of(model, images, ["segmentation", "range", "normals"])
        assert_equal_logits({name.replace("range", "depth"): values for name, values in renamed.items()}, expected)
        for name, parameter in model.named_parameters():
            old = name.replace("task_heads.range", "task_heads.depth").replace("default.range", "default.depth")
            assert before[old] is parameter  # an optimiser that has it keeps it
        assert list(model.get_base_model().task_heads) == ["segmentation", "range", "normals"]
        assert model.get_base_model().config.tasks[1] == {"name": "range", "kind": "depth", "channels": 1}


class TestSave:
    def test_msam_comes_back_equal(self, model, images, tmp_path):
        """Names of which one ends with the other, heads of new and old tasks, trained and untrained."""
        model.add_task("mydepth", kind="depth", channels=1, init="copy:depth", freeze_others=True)
        train(model, images, "mydepth", steps=2)
        model.add_task("parts", channels=2)
        model.rename_task("normals", "a_normals")
        model.remove_task("segmentation")
        tasks = ["depth", "a_normals", "mydepth", "parts"]
        expected = logits_of(model, images, tasks)
        save_adapter(model, tmp_path)
        loaded = load(tmp_path)
        assert loaded.peft_config["default"].task_names == loaded.get_base_model().task_names == tasks
        assert_equal_logits(logits_of(loaded, images, tasks), expected)
        loaded.remove_task("depth")
        save_adapter(loaded, tmp_path)
        left = [task for task in tasks if task != "depth"]
        expected = logits_of(loaded, images, left)
        assert_equal_logits(logits_of(load(tmp_path), images, left), expected)

    @pytest.mark.parametrize(
        ("change", "tasks"),
        [
            (lambda model: model.add_task("edges", channels=1), [*OLD, "edges"]),
            (lambda model: model.rename_task("depth", "range"), ["segmentation", "range", "normals"]),
            (lambda model: model.remove_task("segmentation"), ["depth", "normals"]),
            (
                lambda model: model.remove_task("depth") or model.add_task("depth", channels=1),
                [*OLD[:1], "normals", "depth"],
            ),
        ],
        ids=["add", "rename", "remove", "replace"],
    )
    def test_a_changed_adapter_of_a_saved_msam_comes_back(self, sam_folder, images, tmp_path, change, tasks):
        MSamModel.from_pretrained(sam_folder, tasks=HEADS).save_pretrained(tmp_path / "base")
        base = MSamModel.from_pretrained(tmp_path / "base")
        model = get_peft_model(base, TALoRAConfig(r=4, init_weights=False)).eval()
        change(model)
        scramble(model)
        expected = logits_of(model, images, tasks)
        save_adapter(model, tmp_path / "adapter")
        loaded = load(tmp_path / "adapter")
        assert loaded.task_names == list(loaded.get_base_model().task_heads) == tasks
        assert_equal_logits(logits_of(loaded, images, tasks), expected)
        assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]

    def test_a_head_that_nobody_saved_is_named(self, sam_folder, tmp_path):
        MSamModel.from_pretrained(sam_folder, tasks=HEADS).save_pretrained(tmp_path / "base")
        base = MSamModel.from_pretrained(tmp_path / "base")
        model = get_peft_model(base, TALoRAConfig(r=4, modules_to_save=[]))
        save_adapter(model, tmp_path / "adapter")
        load(tmp_path / "adapter")
        model.rename_task("depth", "range")
        save_adapter(model, tmp_path / "adapter")
        with pytest.raises(
            ValueError, match=saying("no head for 'range'", "`modules_to_save`", str(tmp_path / "base"))
        ):
            load(tmp_path / "adapter")

    def test_parameters_come_back_in_the_same_order(self, model, images, tmp_path):
        """An optimiser's saved state knows parameters by their positions."""
        model.add_task("angles", kind="normals", channels=3)  # sorts before the others
        model.rename_task("depth", "range")
        model.remove_task("segmentation")
        model.add_task("segmentation", channels=2)
        save_adapter(model, tmp_path)
        loaded = load(tmp_path, is_trainable=True)
        assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
        assert_equal_logits(
            logits_of(loaded.eval(), images, ["angles", "range"]), logits_of(model, images, ["angles", "range"])
        )

    def test_bare_suffixes_in_modules_to_save(self, sam_folder, images, tmp_path):
        """A user's own short names, which would match other heads, or none, after a change."""
        model = make_model(sam_folder, modules_to_save=["depth", "normals", "segmentation", "neck"])
        model.add_task("mydepth", kind="depth", channels=1)
        model.rename_task("depth", "range")
        assert model.peft_config["default"].modules_to_save == [
            "vision_encoder.neck",
            *(f"task_heads.{name}" for name in ["segmentation", "range", "normals", "mydepth"]),
        ]
        expected = logits_of(model, images, ["range", "mydepth"])
        save_adapter(model, tmp_path)
        assert_equal_logits(logits_of(load(tmp_path), images, ["range", "mydepth"]), expected)

    def test_a_model_without_heads_comes_back_equal(self, tmp_path):
        model = adapt(VISION)
        model.add_task("parts", init="copy:edges")
        model.rename_task("normals", "angles")
        model.remove_task("edges")
        model.add_task("edges", init="copy:parts")
        model.rename_task("angles", "normals")
        expected = outputs_of_all(VISION, model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(VISION.build(), tmp_path)
        assert loaded.peft_config["default"].task_names == ["depth", "normals", "parts", "edges"]
        assert torch.equal(outputs_of_all(VISION, loaded), expected)


class TestSharedUpdate:
    """An adapter of one task that serves several heads: a task is a head alone."""

    def test_a_head_comes_and_goes(self, sam_folder, images, tmp_path):
        model = make_model(sam_folder, task_names=["main"])
        expected = logits_of(model, images, OLD)
        model.add_task("edges", channels=1, init="copy:depth", freeze_others=True)
        assert all(".task_heads.edges." in name for name in trainable_names(model))
        with torch.no_grad():
            new = model(pixel_values=images, tasks=["depth", "edges"]).logits
        assert torch.equal(new["edges"], new["depth"])
        train(model, images, "edges", steps=2)
        assert_equal_logits(logits_of(model, images, OLD), expected)
        model.rename_task("edges", "borders")
        model.rename_task("main", "all_tasks")
        assert model.peft_config["default"].task_names == ["all_tasks"]
        before = logits_of(model, images, [*OLD, "borders"])
        save_adapter(model, tmp_path)
        assert_equal_logits(logits_of(load(tmp_path), images, [*OLD, "borders"]), before)
        with pytest.raises(ValueError, match="Unknown task 'all_tasks'"):
            model.remove_task("all_tasks")
        model.remove_task("borders")
        assert_equal_logits(logits_of(model, images, OLD), expected)


class TestSeveralAdapters:
    @pytest.fixture
    def two(self, model) -> PeftModel:
        model.add_adapter("second", TALoRAConfig(r=2, init_weights=False))
        model.set_adapter("second")
        scramble(model)
        model.set_adapter("default")
        return model

    def test_the_other_adapter_is_left_alone(self, two, images):
        two.set_adapter("second")
        expected = logits_of(two, images, OLD)
        two.add_task("edges", channels=1, adapter_name="default")
        assert all("second" in name for name in trainable_names(two))
        assert_equal_logits(logits_of(two, images, OLD), expected)
        with pytest.raises(ValueError, match=saying("Unknown task 'edges'", "depth")):
            two(pixel_values=images, tasks=["edges"])
        two.set_adapter("default")
        two.train_only("edges")
        assert all(".default.edges" in n or ".edges.modules_to_save.default" in n for n in trainable_names(two))

    def test_a_head_that_is_there_is_shared(self, two, images, tmp_path):
        two.add_task("edges", channels=1)
        with pytest.raises(ValueError, match=saying("has a head for 'edges'", "`channels`")):
            two.add_task("edges", channels=1, adapter_name="second")
        two.add_task("edges", adapter_name="second", init="copy:depth")
        expected = {}
        for adapter in ("default", "second"):
            two.set_adapter(adapter)
            expected[adapter] = logits_of(two, images, [*OLD, "edges"])
        assert torch.equal(expected["second"]["edges alone"], expected["second"]["depth alone"])
        assert_visibly_different(*(logits["edges"] for logits in expected.values()))
        two.remove_task("edges", adapter_name="default")  # the second adapter's head stays
        assert_equal_logits(logits_of(two, images, [*OLD, "edges"]), expected["second"])
        two.rename_task("edges", "borders", adapter_name="second")
        save_adapter(two, tmp_path)
        loaded = logits_of(load(tmp_path), images, [*OLD, "borders"])
        assert_equal_logits({name.replace("borders", "edges"): v for name, v in loaded.items()}, expected["second"])
        two.remove_task("borders")
        assert two.get_base_model().task_names == OLD

    def test_a_head_is_renamed_in_all(self, two, images):
        two.rename_task("depth", "range")
        for adapter in ("default", "second"):
            two.set_adapter(adapter)
            assert two.peft_config[adapter].task_names == ["segmentation", "range", "normals"]
            assert "task_heads.range" in two.peft_config[adapter].modules_to_save
            assert list(two(pixel_values=images).logits) == ["segmentation", "range", "normals"]

    def test_a_head_of_another_adapter_alone(self, two, images, tmp_path):
        two.add_task("edges", channels=1)
        two.rename_task("edges", "borders")
        two.set_adapter("second")
        assert list(two(pixel_values=images).logits) == OLD
        expected = logits_of(two, images, OLD)
        save_adapter(two, tmp_path)
        assert load(tmp_path).get_base_model().task_names == OLD
        assert_equal_logits(logits_of(load(tmp_path), images, OLD), expected)
        two.delete_adapter("default")
        assert two.get_base_model().task_names == two.base_model.task_state.head_names == OLD
        assert_equal_logits(logits_of(two, images, OLD), expected)
        with two.disable_adapter():
            assert list(two(pixel_values=images).logits) == OLD

    def test_heads_that_growing_did_not_make_stay(self, two):
        two.add_task("edges", channels=1)
        two.add_task("edges", adapter_name="second")
        two.remove_task("depth", adapter_name="second")
        two.set_adapter("second")
        two.delete_adapter("default")
        assert two.get_base_model().task_names == [*OLD, "edges"]

    def test_an_adapter_of_some_heads_comes_back(self, sam_folder, images, tmp_path):
        model = make_model(sam_folder, task_names=["depth", "segmentation"])
        assert model.peft_config["default"].modules_to_save == ["task_heads.segmentation", "task_heads.depth"]
        assert list(model(pixel_values=images).logits) == ["segmentation", "depth"]
        save_adapter(model, tmp_path)
        loaded, tasks = load(tmp_path), ["depth", "segmentation"]
        assert list(loaded(pixel_values=images).logits) == ["segmentation", "depth"]
        assert_equal_logits(logits_of(loaded, images, tasks), logits_of(model, images, tasks))

    def test_one_task_is_left_beside_another_adapter(self, two, images):
        expected = logits_of(two, images, ["depth", "normals"])["depth alone"]
        two.remove_task("segmentation")
        two.remove_task("normals")
        assert list(two(pixel_values=images).logits) == ["depth"]
        assert_close(two(pixel_values=images).logits["depth"], expected)
        with pytest.raises(ValueError, match=saying("Unknown task 'normals'", "['depth']")):
            two(pixel_values=images, tasks=["normals"])
        two.add_task("normals")
        assert two.peft_config["default"].task_names == ["depth", "normals"]
        assert list(two(pixel_values=images).logits) == ["depth", "normals"]
        two.add_adapter("shared", TALoRAConfig(task_names=["everything"], modules_to_save=[]))
        for call in (lambda: two.add_task("everything", channels=1), lambda: two.rename_task("depth", "everything")):
            with pytest.raises(ValueError, match=saying("Duplicate", "everything")):
                call()

    def test_a_head_more_makes_no_adapter_shared(self, sam_folder, images):
        base = MSamModel.from_pretrained(sam_folder, tasks={"depth": 1})
        model = get_peft_model(base, TALoRAConfig(r=4, r_task=2, init_weights=False)).eval()
        model.add_adapter("second", TALoRAConfig(r=4, r_task=2, init_weights=False))
        assert not base.task_conditional
        model.add_task("normals", channels=3)
        model.set_adapter("second")
        assert list(model(pixel_values=images).logits) == ["depth"]

    def test_without_heads_the_lists_are_independent(self):
        model = adapt(MLP_2D)
        model.add_adapter("second", config_for(MLP_2D))
        model.rename_task("depth", "range")
        model.remove_task("edges")
        assert [model.peft_config[name].task_names for name in ("default", "second")] == [["range", "normals"], TASKS]
        model.set_adapter("second")
        model.delete_adapter("default")
        assert_visibly_different(*outputs_of_all(MLP_2D, model))

    def test_one_adapter_must_be_meant(self):
        model = adapt(MLP_2D)
        model.add_adapter("second", config_for(MLP_2D))
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(ValueError, match=saying("`adapter_name` is needed", "second")):
            model.add_task("new")
        with pytest.raises(ValueError, match=saying("Unknown adapter 'third'", "second")):
            model.task_affinity("third")


class TestErrors:
    """Each names what is wrong and what is allowed, and changes nothing."""

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"name": "depth", "channels": 1}, ["Duplicate", "depth"]),
            ({"name": "keys", "channels": 1}, ["'keys' is not allowed"]),
            ({"name": "my-edges", "channels": 1}, ["'my-edges' is not allowed", "identifier"]),
            ({"name": "default", "kind": "edges", "channels": 1}, ["'default' is not allowed", "adapter"]),
            ({"name": "heat", "channels": 1}, ["kind 'heat'", "segmentation, depth"]),
            ({"name": "heat", "kind": "edges", "channels": 3}, ["channels", "3", "allowed: 1"]),
            ({"name": "edges"}, ["channels=None", "whole numbers"]),
            ({"name": "edges", "channels": 1, "init": "ones"}, ["'zero' or 'copy:<task>'", "normals", "'ones'"]),
            ({"name": "edges", "channels": 1, "init": "copy:parts"}, ["'copy:<task>'", "normals", "copy:parts"]),
            ({"name": "edges", "channels": 1, "adapter_name": "other"}, ["Unknown adapter 'other'", "default"]),
            ({"name": "heat", "kind": make_task("edges", 1)}, ["the Task 'edges'", "'heat'"]),
            ({"name": "edges", "kind": make_task("edges", 1), "channels": 2}, ["1 channels", "channels=2"]),
        ],
    )
    def test_add(self, model, arguments, words):
        before = snapshot(model)
        with pytest.raises(ValueError, match=saying(*words)):
            model.add_task(freeze_others=True, **arguments)
        assert snapshot(model) == before

    @pytest.mark.parametrize("arguments", [{"kind": "edges"}, {"channels": 1}])
    def test_add_without_heads(self, arguments):
        model = adapt(MLP_2D)
        before = snapshot(model)
        with pytest.raises(ValueError, match=saying("MLP has no task heads", "leave out `kind` and `channels`")):
            model.add_task("parts", **arguments)
        assert snapshot(model) == before

    def test_remove_and_rename(self, model):
        before = snapshot(model)
        for call, words in [
            (lambda: model.remove_task("edges"), ["Unknown task 'edges'", "normals"]),
            (lambda: model.remove_task(0), ["by name; got 0", "normals"]),
            (lambda: model.rename_task(0, "new"), ["by name; got 0", "normals"]),
            (lambda: model.train_only([3]), ["index 3", "normals"]),
            (lambda: model.rename_task("edges", "borders"), ["Unknown task 'edges'", "normals"]),
            (lambda: model.rename_task("depth", "normals"), ["Duplicate", "normals"]),
            (lambda: model.rename_task("depth", "default"), ["'default' is not allowed"]),
            (lambda: model.rename_task("depth", "items"), ["'items' is not allowed"]),
            (lambda: model.train_only("edges"), ["Unknown task 'edges'", "normals"]),
        ]:
            with pytest.raises(ValueError, match=saying(*words)):
                call()
            assert snapshot(model) == before

    def test_nothing_changes_while_merged(self, model):
        model.set_task("depth")
        model.merge_adapter()
        before = snapshot(model)
        for call in (
            lambda: model.add_task("edges", channels=1),
            lambda: model.remove_task("normals"),
            lambda: model.rename_task("normals", "angles"),
            lambda: model.train_only("normals"),
        ):
            with pytest.raises(ValueError, match=saying("merged", "`unmerge_adapter`")):
                call()
        assert snapshot(model) == before
        model.unmerge_adapter()
        again = get_peft_model(model.merge_and_unload(), TALoRAConfig(r=4, init_weights=False))
        before = snapshot(again)
        for call in (
            lambda: again.add_task("edges", channels=1),
            lambda: again.remove_task("normals"),
            lambda: again.rename_task("normals", "angles"),
        ):
            with pytest.raises(ValueError, match="while the update of 'depth' is merged"):
                call()
        assert snapshot(again) == before

    def test_heads_that_are_adapted_inside(self, sam_folder):
        model = make_model(sam_folder, target_modules=["qkv", "q_proj"], modules_to_save=[])
        before = snapshot(model)
        with pytest.raises(ValueError, match="Layers inside the task heads are adapted"):
            model.add_task("edges", channels=1)
        assert snapshot(model) == before


class TestAffinity:
    @pytest.mark.parametrize("parts", [["q", "k", "v"], ["q", "v"]])
    def test_equals_the_dense_updates(self, sam_folder, parts):
        model = make_model(sam_folder, qkv_parts=parts, alpha_pattern={"vision_encoder.layers.1.attn.qkv": 9.0})
        with torch.no_grad():
            for layer in adapted_layers(model):  # away from orthonormal columns
                layer.talora_in["default"].add_(0.1 * torch.randn(1, 4))
                layer.talora_out["default"].add_(0.1 * torch.randn(1, 4))
        model.add_task("edges", channels=1, init="copy:depth")
        affinity = model.task_affinity()
        assert affinity.task_names == [*OLD, "edges"]
        assert affinity.layers == [f"vision_encoder.layers.{i}.attn.qkv" for i in range(4)]
        layers = adapted_layers(model)
        with torch.no_grad():
            updates_LTX = torch.stack(
                [torch.stack([layer.get_delta_weight("default", t).flatten() for t in range(4)]) for layer in layers]
            )
            rows_LTK = torch.stack(
                [torch.stack([layer.talora_task["default"][t] for t in affinity.task_names]) for layer in layers]
            )
        for found, vectors in (
            (affinity.updates_by_layer, updates_LTX),
            (affinity.updates, updates_LTX.transpose(0, 1).flatten(1)),
            (affinity.rows_by_layer, rows_LTK),
        ):
            unit = nn.functional.normalize(vectors.double(), dim=-1)
            torch.testing.assert_close(found, unit @ unit.mT, atol=1e-6, rtol=0)
            assert found.min() < 0.5  # tasks that differ are told apart
            torch.testing.assert_close(found[..., 1, 3], torch.ones_like(found[..., 1, 3]), atol=1e-12, rtol=0)
        torch.testing.assert_close(affinity.rows, affinity.rows_by_layer.mean(0))

    def test_a_zero_row_has_no_direction(self):
        model = adapt(MLP_2D)
        model.add_task("new")
        affinity = model.task_affinity()
        for cosines in (affinity.rows, affinity.updates, affinity.rows_by_layer[0], affinity.updates_by_layer[1]):
            assert cosines[3].isnan().all()
            assert cosines[:3, :3].isfinite().all()
        with torch.no_grad():
            model.get_base_model().lin0.talora_task["default"]["new"].fill_(1.0)
        affinity = model.task_affinity()
        assert torch.equal(affinity.rows[3], affinity.rows_by_layer[0, 3])  # the mean of the one that is no NaN

    def test_dense_updates_are_never_built(self):
        base = nn.Sequential(nn.Linear(4000, 4000))
        model = get_peft_model(base, config_for(MLP_2D, target_modules=["0"]))
        with torch.profiler.profile(profile_memory=True) as profile:
            model.task_affinity()
        largest = max(event.cpu_memory_usage for event in profile.events())
        assert 0 < largest < 4000 * 4000


def test_copies_grow_on_their_own():
    model = adapt(MLP_2D)
    twin = copy.deepcopy(model)
    twin.add_task("new", freeze_others=True)
    assert all(name.endswith(".new") for name in trainable_names(twin))
    assert model.peft_config["default"].task_names == TASKS
    assert_visibly_different(*outputs_of_all(MLP_2D, model))
    assert torch.equal(outputs_of_all(MLP_2D, twin), outputs_of_all(MLP_2D, model))
