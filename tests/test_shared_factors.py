"""Domains as parts of one TA-LoRA: the factors learn with the first domain, later ones have some numbers of their own.

What every kind of adapters must do is in `test_adapters.py`.
"""

import copy
import json

import pytest
import torch
from continual_cases import adapters_of, changed, config_of, make_base, make_msam, masks, predict, snapshot, step
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from peft_talora import TALoRAConfig, to_lora
from peft_talora.continual.shared_factors import SHARED, SharedFactorAdapters

LAYERS = 16  # linear layers in the blocks of the encoder
both = pytest.mark.parametrize("own", ["column", "row"])


def fresh(own: str) -> SharedFactorAdapters:
    return SharedFactorAdapters(make_base(own), own)


def trained(own: str, names=("pits", "rails")) -> SharedFactorAdapters:
    adapters = adapters_of(own, list(names))
    for name in names:
        step(adapters, name)
    return adapters


class TestFactors:
    @both
    def test_they_train_with_the_first_domain_and_never_again(self, own):
        adapters = adapters_of(own, ["pits", "rails"])
        shared = {id(p) for p in adapters.shared_parameters().values()}
        own_ids = {id(p) for p in adapters.own_parameters("rails").values()}
        assert {id(p) for p in adapters.train("rails").values()} == shared | own_ids
        before = snapshot(adapters.base)
        step(adapters, "rails")
        moved = {name for name in changed(before, adapters.base) if SHARED in name.split(".")}
        assert len(moved) == len(shared)
        assert adapters.trained_with == "rails"
        assert not adapters.frozen
        assert {id(p) for p in adapters.train("rails").values()} == shared | own_ids
        for name in ("pits", "rails"):
            assert not {id(p) for p in adapters.train(name).values()} & shared
            assert not any(p.requires_grad for p in adapters.shared_parameters().values())
            assert adapters.frozen

    @both
    def test_all_domains_have_the_very_same(self, own):
        adapters = trained(own)
        parts = ("talora_in", "talora_out") + (("talora_core",) if own == "row" else ())
        for layer in adapters._layers():
            for part in parts:
                assert getattr(layer, part)["pits"] is getattr(layer, part)["rails"] is getattr(layer, part)[SHARED]
        assert len(adapters.shared_parameters()) == LAYERS * len(parts)

    def test_a_column_s_own_are_a_slice_of_the_core_and_a_number(self):
        own = adapters_of("column", ["pits"]).own_parameters("pits")
        assert sorted({tuple(p.shape) for p in own.values()}) == [(1,), (4, 4, 1)]
        assert len(own) == 2 * LAYERS

    def test_a_row_is_as_long_as_there_are_slices(self):
        base = make_base("row")
        adapters = SharedFactorAdapters(base, "row")
        adapters.add("pits", TALoRAConfig(r=4, r_task=3, target_modules=["qkv"]))
        own = adapters.own_parameters("pits")
        assert {tuple(p.shape) for p in own.values()} == {(3,)}
        cores = [p for key, p in adapters.shared_parameters().items() if key.endswith("talora_core")]
        assert all(core_ORK.flatten(0, 1).norm(dim=0).min() > 0.1 for core_ORK in cores)

    @both
    def test_the_update_is_that_of_the_formula(self, own):
        adapters = trained(own)
        layer = adapters._layers()[0]
        core_OR = layer.talora_core["rails"] @ layer.talora_task["rails"]["main"]
        expected = layer.scaling["rails"] * layer.talora_out[SHARED] @ core_OR @ layer.talora_in[SHARED].T
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(layer.get_delta_weight("rails"), expected, rtol=1e-5, atol=1e-7)

    @both
    def test_the_shared_adapter_itself_changes_nothing(self, own):
        adapters = trained(own)
        assert not any(layer.get_delta_weight(SHARED).any() for layer in adapters._layers())

    @both
    def test_a_first_domain_that_went_untrained_does_not_fix_them_at_zero(self, own, images):
        adapters = adapters_of(own, ["pits"])
        adapters.train("pits")
        adapters.unload("pits")
        adapters.add("rails", config_of(own, adapters.base))
        plain = predict(adapters, None, images)
        step(adapters, "rails")
        assert not torch.equal(predict(adapters, "rails", images), plain)

    @both
    @pytest.mark.parametrize("init_weights", ["lora", "orthogonal"])
    def test_nor_one_that_is_still_there(self, own, init_weights, images):
        """It stays the plain model while the factors learn with another."""
        adapters = fresh(own)
        for name in ("pits", "rails"):
            adapters.add(name, TALoRAConfig(r=4, r_task=3, target_modules=["qkv"], init_weights=init_weights))
        plain = predict(adapters, None, images)
        adapters.train("pits")
        step(adapters, "rails")
        assert not torch.equal(predict(adapters, "rails", images), plain)
        assert torch.equal(predict(adapters, "pits", images), plain)

    @both
    @pytest.mark.parametrize("init_weights", ["lora", "orthogonal", "gaussian"])
    def test_every_start_is_the_plain_model_and_learns(self, own, init_weights, images):
        adapters = fresh(own)
        plain = predict(adapters, None, images)
        for name in ("pits", "rails"):
            config = TALoRAConfig(r=4, r_task=3, target_modules=["qkv", "lin1"], init_weights=init_weights)
            adapters.add(name, config)
            parameters = adapters.train(name)
            with torch.no_grad():
                assert torch.equal(masks(adapters.base, images), plain)
            before = {key: p.detach().clone() for key, p in parameters.items()}
            step(adapters, name, steps=3)
            # In a column the number scales the slice, which has to be there first.
            assert all(not torch.equal(before[key], p) for key, p in parameters.items())

    @both
    def test_deep_copies_keep_what_is_shared(self, own, images):
        adapters = trained(own)
        other = copy.deepcopy(adapters)
        assert torch.equal(predict(other, "rails", images), predict(adapters, "rails", images))
        layer = other._layers()[0]
        assert layer.talora_in["pits"] is layer.talora_in["rails"]
        assert layer.talora_in["pits"] is not adapters._layers()[0].talora_in["pits"]

    def test_casting_keeps_what_is_shared(self):
        adapters = trained("column")
        adapters.base.double()
        layer = adapters._layers()[0]
        assert layer.talora_in["pits"] is layer.talora_in["rails"]
        assert layer.talora_in["pits"].dtype == torch.float64


class TestFolders:
    @both
    def test_domains_and_shared_folder_give_the_same_outputs(self, own, images, tmp_path):
        adapters = trained(own)
        adapters.save_shared(tmp_path / "shared")
        expected = {name: predict(adapters, name, images) for name in (None, "pits", "rails")}
        for name in ("pits", "rails"):
            adapters.save(name, tmp_path / name)
        for name in ("pits", "rails"):  # each alone
            loaded = fresh(own)
            loaded.load_shared(tmp_path / "shared")
            assert loaded.resident() == []
            loaded.load("domain", tmp_path / name)
            assert torch.equal(predict(loaded, "domain", images), expected[name])
            assert torch.equal(predict(loaded, None, images), expected[None])
            assert loaded.frozen
            assert loaded.train("domain").keys() == loaded.own_parameters("domain").keys()

    @both
    def test_a_domain_s_file_holds_its_own_parameters_only(self, own, tmp_path):
        adapters = trained(own)
        adapters.save("rails", tmp_path)
        state, parameters = load_file(tmp_path / "row.safetensors"), adapters.own_parameters("rails")
        assert state.keys() == parameters.keys()
        assert all(torch.equal(state[key], p) for key, p in parameters.items())
        assert {file.name for file in tmp_path.iterdir()} == {"row.safetensors", "row.json"}

    @both
    def test_the_shared_folder_is_one_of_peft_s(self, own, images, tmp_path):
        adapters = trained(own)
        adapters.save_shared(tmp_path)
        model = PeftModel.from_pretrained(make_base(own), tmp_path)
        with torch.no_grad():
            assert torch.equal(masks(model.get_base_model(), images), predict(adapters, None, images))

    @both
    def test_the_first_domain_can_go_on_after_loading(self, own, images, tmp_path):
        adapters = trained(own, ["pits"])
        adapters.save_shared(tmp_path / "shared")
        adapters.save("pits", tmp_path / "pits")
        loaded = fresh(own)
        loaded.load_shared(tmp_path / "shared")
        loaded.load("pits", tmp_path / "pits")
        for model in (adapters, loaded):
            step(model, "pits")
        assert torch.equal(predict(loaded, "pits", images), predict(adapters, "pits", images))

    def test_factors_on_which_a_loaded_domain_depends_stay(self, tmp_path):
        """Also if they were saved before that domain was trained."""
        adapters = trained("column", ["pits"])
        adapters.save_shared(tmp_path / "shared")
        adapters.save("pits", tmp_path / "pits")
        adapters.add("rails", config_of("column", adapters.base))
        step(adapters, "rails")
        adapters.save("rails", tmp_path / "rails")
        loaded = fresh("column")
        loaded.load_shared(tmp_path / "shared")
        loaded.load("rails", tmp_path / "rails")
        loaded.load("pits", tmp_path / "pits")
        assert loaded.train("pits").keys() == loaded.own_parameters("pits").keys()

    @both
    def test_a_domain_becomes_a_stock_lora(self, own, images, tmp_path):
        adapters = trained(own)
        expected, plain = predict(adapters, "rails", images), predict(adapters, None, images)
        to_lora(adapters.peft_model, "main", tmp_path, adapter_name="rails")
        model = PeftModel.from_pretrained(make_base(own), tmp_path)
        assert model.peft_config["default"].peft_type == "LORA"
        with torch.no_grad():
            found = masks(model.get_base_model(), images)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (expected - plain).abs().max() > 1e-3

    def test_modules_trained_in_full_are_the_domain_s_own(self, images, tmp_path):
        adapters = fresh("column")
        config = TALoRAConfig(r=4, target_modules=["qkv"], modules_to_save=["mask_decoder"], train_norms=True)
        for name in ("pits", "rails"):
            adapters.add(name, config)
            step(adapters, name)
        names = adapters.own_parameters("rails")
        assert any("mask_decoder" in name for name in names)
        assert any("layer_norm1" in name for name in names)
        expected = predict(adapters, "rails", images)
        adapters.save_shared(tmp_path / "shared")
        adapters.save("rails", tmp_path)
        loaded = fresh("column")
        loaded.load_shared(tmp_path / "shared")
        loaded.load("rails", tmp_path)
        assert torch.equal(predict(loaded, "rails", images), expected)


class TestRefusals:
    @pytest.fixture
    def saved(self, tmp_path):
        adapters = trained("column")
        adapters.save_shared(tmp_path / "shared")
        adapters.save("pits", tmp_path / "pits")
        return tmp_path

    def load(self, saved, own="column"):
        adapters = fresh(own)
        adapters.load_shared(saved / "shared")
        adapters.load("pits", saved / "pits")
        return adapters

    def edit(self, file, **values):
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    def test_what_is_saved_can_be_loaded(self, saved):
        adapters, own = self.load(saved), load_file(saved / "pits" / "row.safetensors")
        assert adapters.resident() == ["pits"]
        parameters = adapters.own_parameters("pits")
        assert own.keys() == parameters.keys()
        assert all(torch.equal(own[key], parameter) for key, parameter in parameters.items())

    @pytest.mark.parametrize("name", ["shared/shared_factors.json", "pits/row.json"])
    def test_unknown_versions(self, saved, name):
        self.edit(saved / name, version=2)
        with pytest.raises(ValueError, match=f"{name} is not of version 1"):
            self.load(saved)

    @pytest.mark.parametrize("name", ["shared/adapter_model.safetensors", "pits/row.safetensors", "pits/row.json"])
    @pytest.mark.parametrize("size", [None, 40], ids=["missing", "truncated"])
    def test_damage(self, saved, name, size):
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        if size:
            (saved / name).write_bytes(content[:size])
        with pytest.raises(OSError, match=name):
            self.load(saved)

    def test_missing_entries(self, saved):
        (saved / "pits" / "row.json").write_text('{"version": 1}')
        with pytest.raises(OSError, match=r"row\.json lacks \['own', "):
            self.load(saved)

    def test_other_factors(self, saved, images):
        adapters = adapters_of("column", ["rails"])
        before = predict(adapters, "rails", images)
        with pytest.raises(ValueError, match="belongs to other factors than those of the model"):
            adapters.load("pits", saved / "pits")
        assert adapters.resident() == ["rails"]
        assert torch.equal(predict(adapters, "rails", images), before)

    def test_another_division(self, saved):
        with pytest.raises(ValueError, match=r"TALORA with own='column'; needed is TALORA with 'row'"):
            self.load(saved, "row")

    def test_a_row_that_does_not_fit(self, saved):
        file = saved / "pits" / "row.safetensors"
        state = load_file(file)
        state.popitem()
        save_file(state, file)
        adapters = fresh("column")
        adapters.load_shared(saved / "shared")
        with pytest.raises(ValueError, match="missing are 1 weights"):
            adapters.load("pits", saved / "pits")
        assert adapters.resident() == []

    def test_the_factors_come_first_and_once(self, saved):
        adapters = fresh("column")
        with pytest.raises(ValueError, match="There are no shared factors yet"):
            adapters.save_shared(saved)
        with pytest.raises(ValueError, match="read the shared factors before it"):
            adapters.load("pits", saved / "pits")
        adapters.load_shared(saved / "shared")
        with pytest.raises(ValueError, match="has shared factors already"):
            adapters.load_shared(saved / "shared")

    def test_factors_of_another_model(self, saved):
        """Nothing is left of them."""
        base = make_base("hq")
        file = saved / "shared" / "adapter_model.safetensors"
        state = load_file(file)
        state.popitem()
        save_file(state, file)
        adapters = SharedFactorAdapters(base)
        with pytest.raises(ValueError, match="missing are 1 weights"):
            adapters.load_shared(saved / "shared")
        assert adapters.peft_model is None
        assert not any("talora" in name for name, _ in base.named_modules())

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (LoraConfig(target_modules=["qkv"]), "A TALoRAConfig is needed; got a LoraConfig"),
            (TALoRAConfig(r=2, target_modules=["qkv"]), r"differ from the shared .*: `r`=2 \(4\)"),
            (TALoRAConfig(r=4, alpha=3, target_modules=["qkv"]), r"`alpha`=3 \(None\)"),
            (TALoRAConfig(r=4, target_modules=["proj"]), r"`target_modules`=\['proj'\] \(\['qkv'\]\)"),
            (TALoRAConfig(r=4, target_modules=["qkv"], task_names=["a", "b"]), r"`task_names` is \['a', 'b'\]"),
            (TALoRAConfig(r=4, target_modules=["qkv"], bias="all"), "`bias`='all' is not allowed"),
        ],
    )
    def test_configurations(self, sam, config, message):
        adapters = SharedFactorAdapters(sam)
        adapters.add("pits", TALoRAConfig(r=4, target_modules=["qkv"]))
        with pytest.raises(ValueError, match=message):
            adapters.add("rails", config)
        assert adapters.resident() == ["pits"]

    def test_a_first_domain_that_fails_leaves_nothing(self, sam):
        adapters = SharedFactorAdapters(sam)
        config = TALoRAConfig(r=4, target_modules=["qkv"], modules_to_save=["nothing"])
        with pytest.raises(ValueError, match="names 'nothing', which SamModel does not have"):
            adapters.add("pits", config)
        assert adapters.peft_model is None
        assert not any("talora" in name for name, _ in sam.named_modules())

    def test_names_of_their_own(self, sam):
        adapters = SharedFactorAdapters(sam)
        for name in (SHARED, "main"):
            with pytest.raises(ValueError, match=f"name '{name}' is not allowed"):
                adapters.add(name, TALoRAConfig(r=4))
        assert adapters.peft_model is None

    def test_a_task_that_is_a_head(self, sam_folder):
        adapters = SharedFactorAdapters(make_msam(sam_folder))
        with pytest.raises(ValueError, match=r"`task_names` is \['depth'\]; .*, not in \['depth', 'edges'\]"):
            adapters.add("pits", TALoRAConfig(r=4, task_names=["depth"]))

    def test_an_unknown_division(self, sam):
        with pytest.raises(ValueError, match=r"`own` must be one of .* got 'core'"):
            SharedFactorAdapters(sam, "core")
