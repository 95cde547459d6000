"""TALoRAConfig and the registration of the PEFT type."""

import importlib
import inspect
import json
import pickle

import peft
import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from tuner_cases import saying

import peft_talora.tuner
from peft_talora.tuner import TALoRAConfig

EVERYTHING = {
    "task_names": ["zebra", "depth", "apple"],
    "r": 6,
    "r_out": 5,
    "r_task": 2,
    "alpha": 3.0,
    "dropout": 0.25,
    "init_weights": "gaussian",
    "qkv_parts": ["q", "v"],
    "train_norms": True,
    "target_modules": ["qkv", "proj"],
    "exclude_modules": ["lin1"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "rank_pattern": {"z.proj": 3, "a.qkv": [2, 4]},
    "alpha_pattern": {"z.proj": 1.5},
    "modules_to_save": ["neck"],
    "bias": "talora_only",
}


class TestRegistration:
    def test_type_is_a_real_member(self):
        assert PeftType("TALORA") is PeftType.TALORA
        assert PeftType["TALORA"] is PeftType.TALORA
        assert PeftType.TALORA in list(PeftType)
        assert "TALORA" in list(PeftType)
        assert list(PeftType).count("TALORA") == 1
        assert PeftType.TALORA == "TALORA"
        assert (PeftType.TALORA.name, PeftType.TALORA.value) == ("TALORA", "TALORA")
        assert isinstance(PeftType.TALORA, PeftType)

    def test_member_survives_pickle(self):
        assert pickle.loads(pickle.dumps(PeftType.TALORA)) is PeftType.TALORA

    def test_peft_knows_the_method(self):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.TALORA] is TALoRAConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TALORA] is peft_talora.tuner.TALoRAModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.TALORA] == "talora_"
        assert isinstance(peft.get_peft_config({"peft_type": "TALORA"}), TALoRAConfig)

    def test_importing_again_changes_nothing(self):
        member, names = PeftType.TALORA, list(PeftType)
        importlib.reload(peft_talora.tuner)
        importlib.reload(peft_talora.tuner)
        assert PeftType.TALORA is member
        assert list(PeftType) == names
        assert peft_talora.tuner.TALoRAConfig is TALoRAConfig


class TestDefaults:
    def test_every_field_has_a_default(self):
        config = TALoRAConfig()
        assert config.peft_type is PeftType.TALORA
        assert (config.task_names, config.r, config.r_out, config.r_task, config.alpha) == (None, 8, None, None, None)
        assert (config.dropout, config.init_weights, config.bias) == (0.0, "lora", "none")
        assert config.qkv_parts == ["q", "k", "v"]
        assert config.train_norms is False
        assert config.target_modules is config.exclude_modules is config.modules_to_save is None
        assert config.rank_pattern == config.alpha_pattern == {}

    def test_two_configs_share_no_container(self):
        one, other = TALoRAConfig(), TALoRAConfig()
        one.qkv_parts.pop()
        one.rank_pattern["x"] = 1
        assert other.qkv_parts == ["q", "k", "v"]
        assert other.rank_pattern == {}

    def test_every_field_is_explained(self):
        for name in EVERYTHING:
            assert f"    {name}: " in inspect.getdoc(TALoRAConfig)
            assert TALoRAConfig.__dataclass_fields__[name].metadata["help"]


class TestRoundTrip:
    def test_saved_config_comes_back_equal(self, tmp_path):
        config = TALoRAConfig(**EVERYTHING)
        config.save_pretrained(str(tmp_path))
        for cls in (TALoRAConfig, PeftConfig):
            loaded = cls.from_pretrained(str(tmp_path))
            assert type(loaded) is TALoRAConfig
            assert loaded.peft_type is PeftType.TALORA
            for name, value in EVERYTHING.items():
                assert getattr(loaded, name) == value, name
            assert loaded.to_dict() == config.to_dict()

    def test_task_order_is_kept_where_keys_are_sorted(self, tmp_path):
        TALoRAConfig(task_names=["c", "a", "b"]).save_pretrained(str(tmp_path))
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert list(saved) == sorted(saved)
        assert saved["task_names"] == ["c", "a", "b"]
        assert saved["peft_type"] == "TALORA"

    @pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "modules_to_save"])
    def test_sets_become_sorted_lists(self, name):
        assert getattr(TALoRAConfig(**{name: {"c", "a", "b"}}), name) == ["a", "b", "c"]
        assert getattr(TALoRAConfig(**{name: ["c", "a"]}), name) == ["c", "a"]

    def test_tuples_of_tasks_keep_their_order(self):
        assert TALoRAConfig(task_names=("c", "a")).task_names == ["c", "a"]

    @pytest.mark.parametrize("init_weights", [True, False, "lora", "orthogonal", "gaussian"])
    def test_init_weights_keeps_its_type(self, init_weights, tmp_path):
        TALoRAConfig(init_weights=init_weights).save_pretrained(str(tmp_path))
        loaded = TALoRAConfig.from_pretrained(str(tmp_path)).init_weights
        assert loaded == init_weights
        assert type(loaded) is type(init_weights)


class TestRejects:
    """Every message names the argument and shows the value."""

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"task_names": []}, ["task_names", "empty"]),
            ({"task_names": "depth"}, ["task_names", "'depth'", "list"]),
            ({"task_names": {"depth"}}, ["task_names", "{'depth'}", "order"]),
            ({"task_names": ["depth", "edges", "depth"]}, ["task_names", "Duplicate", "'depth'"]),
            ({"task_names": ["human parts"]}, ["Task name", "'human parts'", "identifier"]),
            ({"task_names": ["3d"]}, ["Task name", "'3d'", "identifier"]),
            ({"task_names": ["a.b"]}, ["Task name", "'a.b'", "identifier"]),
            ({"task_names": [""]}, ["Task name", "''", "identifier"]),
            ({"task_names": ["depth", 1]}, ["Task name", "1", "identifier"]),
            ({"task_names": ["keys"]}, ["Task name", "'keys'", "attribute"]),
            ({"task_names": ["values"]}, ["Task name", "'values'", "attribute"]),
            ({"task_names": ["forward"]}, ["Task name", "'forward'", "attribute"]),
            ({"task_names": ["setdefault"]}, ["Task name", "'setdefault'", "attribute"]),
            ({"task_names": ["training"]}, ["Task name", "'training'", "attribute"]),
            ({"task_names": ["_parameters"]}, ["Task name", "'_parameters'", "attribute"]),
            ({"r": 0}, ["`r`", "got 0"]),
            ({"r": None}, ["`r`", "got None"]),
            ({"r": 2.0}, ["`r`", "got 2.0"]),
            ({"r": True}, ["`r`", "got True"]),
            ({"r_out": -1}, ["`r_out`", "got -1"]),
            ({"r_task": 0}, ["`r_task`", "got 0"]),
            ({"rank_pattern": {"proj": 0}}, ["rank_pattern", "'proj'", "got 0"]),
            ({"rank_pattern": {"proj": [4, 0]}}, ["rank_pattern", "'proj'", "[1]", "got 0"]),
            ({"rank_pattern": {"proj": [4, 4, 4]}}, ["rank_pattern", "'proj'", "got [4, 4, 4]"]),
            ({"dropout": 1.0}, ["`dropout`", "got 1.0"]),
            ({"dropout": -0.1}, ["`dropout`", "got -0.1"]),
            ({"init_weights": "zeros"}, ["`init_weights`", "'zeros'", "orthogonal"]),
            ({"init_weights": None}, ["`init_weights`", "None", "orthogonal"]),
            ({"qkv_parts": []}, ["`qkv_parts`", "[]"]),
            ({"qkv_parts": ["v", "q"]}, ["`qkv_parts`", "['v', 'q']", "order"]),
            ({"qkv_parts": ["q", "q"]}, ["`qkv_parts`", "['q', 'q']"]),
            ({"qkv_parts": ["q", "o"]}, ["`qkv_parts`", "['q', 'o']"]),
            ({"bias": "lora_only"}, ["`bias`", "'lora_only'", "talora_only"]),
            ({"layers_to_transform": [0], "target_modules": "qkv"}, ["`layers_to_transform`", "`target_modules`"]),
            ({"layers_to_transform": 0, "target_modules": "qkv"}, ["`layers_to_transform`", "`target_modules`"]),
            ({"layers_pattern": "layers"}, ["`layers_pattern`", "`layers_to_transform`"]),
        ],
        ids=repr,
    )
    def test_value(self, values, words):
        with pytest.raises(ValueError, match=saying(*words)):
            TALoRAConfig(**values)

    def test_block_zero_is_not_none(self):
        config = TALoRAConfig(target_modules=["qkv"], layers_to_transform=0, layers_pattern="layers")
        assert config.layers_to_transform == 0
