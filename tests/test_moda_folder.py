"""The folder of a MoDA model: the same routes and masks in a fresh process, adapters read on demand, damage named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_sam
from moda_cases import NAMES, ask, make_images, make_moda, shake
from peft import PeftModel
from safetensors.torch import load_file, save_file

from peft_talora.continual import moda_folder
from peft_talora.continual.hq import make_sam_hq
from peft_talora.continual.kinds import KINDS, domain_config
from peft_talora.continual.moda_folder import load_moda, save_moda
from peft_talora.continual.queries import make_query

FRESH = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from safetensors.torch import save_file
from conftest import make_sam
from moda_cases import NAMES, ask, make_images
from peft_talora.continual.hq import make_sam_hq
from peft_talora.continual.moda_folder import load_moda

images = torch.cat([make_images(name, 1, 3) for name in NAMES])
for folder in sorted(Path(sys.argv[2]).iterdir()):
    model = load_moda(folder, make_sam_hq(make_sam()) if folder.name == "hq" else make_sam())
    with torch.no_grad():
        output = model(**ask(images))
    save_file({"masks": output.pred_masks, "scores": output.scores}, folder / "said.safetensors")
    print(folder.name, *output.domains)
"""


def images_of_all():
    return torch.cat([make_images(name, 1, 3) for name in NAMES])


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_fresh_process_routes_and_segments_the_same(tmp_path):
    models = {kind: make_moda(kind, fitted=False) for kind in KINDS}
    for kind, model in models.items():
        model.fit_selector(quantile=0.01)
        save_moda(model, tmp_path / kind)
    words = [sys.executable, "-c", FRESH, str(Path(__file__).parent), str(tmp_path)]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()
    assert said == [f"{kind} {' '.join(NAMES)}" for kind in sorted(KINDS)]
    for kind, model in models.items():
        with torch.no_grad():
            output = model(**ask(images_of_all()))
        found = load_file(tmp_path / kind / "said.safetensors")
        torch.testing.assert_close(found["masks"], output.pred_masks, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["scores"].float(), output.scores.float(), rtol=1e-4, atol=1e-5)


def test_a_domain_s_folder_holds_its_parameters_alone_and_loads_without_the_others(tmp_path):
    model = make_moda("lora")
    save_moda(model, tmp_path)
    images = make_images("dark", 2)
    for name in NAMES:
        folder = tmp_path / "domains" / name
        assert names_in(folder) == {"adapter_config.json", "adapter_model.safetensors"}
        own = model.adapters.own_parameters(name)
        assert sum(t.numel() for t in load_file(folder / "adapter_model.safetensors").values()) == sum(
            p.numel() for p in own.values()
        )
        alone = PeftModel.from_pretrained(make_sam(), str(folder))
        masks = alone.get_base_model()(**ask(images)).pred_masks
        torch.testing.assert_close(masks, model(**ask(images), route=name).pred_masks, rtol=1e-5, atol=1e-6)


def test_rows_lie_beside_the_factors_that_they_share(tmp_path):
    save_moda(make_moda("talora"), tmp_path)
    for name in NAMES:
        assert names_in(tmp_path / "domains" / name) == {"row.json", "row.safetensors"}
    assert "shared/adapter_model.safetensors" in names_in(tmp_path)


def test_adapters_are_read_when_they_are_needed_and_few_stay(tmp_path):
    names = [f"place_{index}" for index in range(5)]
    model = make_moda(names=names, fitted=False)
    save_moda(model, tmp_path)
    images = make_images("dark", 2)
    before = {name: model(**ask(images), route=name).pred_masks for name in names}
    loaded = load_moda(tmp_path, make_sam(), resident=2)
    assert loaded.adapters.resident() == []
    for name in (*names, *reversed(names)):
        torch.testing.assert_close(loaded(**ask(images), route=name).pred_masks, before[name])
        assert name in loaded.adapters.resident()
        assert len(loaded.adapters.resident()) <= 2
    mixed = loaded(**ask(images[:1].expand(5, -1, -1, -1)), route="oracle", domains=names)
    torch.testing.assert_close(mixed.pred_masks, torch.cat([before[name][:1] for name in names]), rtol=1e-5, atol=1e-5)
    copy = tmp_path / "copy"
    save_moda(loaded, copy)  # most of them are on disk alone
    again = load_moda(copy, make_sam())
    for name in names:
        torch.testing.assert_close(again(**ask(images), route=name).pred_masks, before[name])


def test_what_did_not_learn_is_not_written_again_and_what_is_gone_goes(tmp_path):
    model = make_moda()
    save_moda(model, tmp_path)
    file = "adapter_model.safetensors"
    times = {name: (tmp_path / "domains" / name / file).stat().st_mtime_ns for name in NAMES}
    shake(model, "bright")
    model.remove_domain("striped")
    save_moda(model, tmp_path)
    assert {path.name for path in (tmp_path / "domains").iterdir()} == {"dark", "bright-2"}
    assert (tmp_path / "domains/dark" / file).stat().st_mtime_ns == times["dark"]
    loaded = load_moda(tmp_path, make_sam())
    images = make_images("bright", 1)
    torch.testing.assert_close(
        loaded(**ask(images), route="bright").pred_masks, model(**ask(images), route="bright").pred_masks
    )
    loaded.add_domain("late", domain_config("lora", loaded.base, r=4))  # it goes on from there
    assert loaded.domains == ["dark", "bright", "late"]


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_domain_is_named_and_the_others_work(damage, tmp_path):
    model = make_moda()
    save_moda(model, tmp_path)
    file = tmp_path / "domains" / "bright" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    with pytest.warns(UserWarning, match=r"Domain 'bright' .*domains.bright.adapter_model.safetensors"):
        loaded = load_moda(tmp_path, make_sam())
    images = images_of_all()
    with torch.no_grad():
        output, whole = loaded(**ask(images)), model(**ask(images))
    assert output.domains == ["dark", "base", "striped"]
    torch.testing.assert_close(output.pred_masks[[0, 2]], whole.pred_masks[[0, 2]], rtol=1e-5, atol=1e-5)
    with pytest.raises(OSError, match=r"bright.adapter_model.safetensors"):
        loaded(**ask(images), route="bright")
    with pytest.raises(OSError, match=r"bright.adapter_model.safetensors"):
        save_moda(loaded, tmp_path / "elsewhere")
    loaded.remove_domain("bright")
    assert loaded(**ask(images[[0, 2]])).domains == ["dark", "striped"]


def test_what_does_not_fit_is_refused(tmp_path):
    save_moda(make_moda(query=make_query("gft_readonly", make_sam().config.vision_config)), tmp_path)
    with pytest.raises(OSError, match=r"moda.json is missing"):
        load_moda(tmp_path / "domains", make_sam())
    with pytest.raises(ValueError, match=r"`base` is a 'sam_hq'; .*made of the 'sam'"):
        load_moda(tmp_path, make_sam_hq(make_sam()))
    config = json.loads((tmp_path / "moda.json").read_text())
    (tmp_path / "moda.json").write_text(json.dumps({**config, "version": 2}))
    with pytest.raises(ValueError, match=r"version 2; known is 1"):
        load_moda(tmp_path, make_sam())
    (tmp_path / "moda.json").write_text("{")
    with pytest.raises(OSError, match=r"moda.json: not JSON"):
        load_moda(tmp_path, make_sam())
    (tmp_path / "moda.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "moda.safetensors")
    save_file({key: value for key, value in tensors.items() if key != "query.tokens"}, tmp_path / "moda.safetensors")
    with pytest.raises(ValueError, match=r"moda.safetensors does not fit"):
        load_moda(tmp_path, make_sam())
    (tmp_path / "moda.safetensors").write_bytes(b"none")
    with pytest.raises(OSError, match=r"moda.safetensors"):
        load_moda(tmp_path, make_sam())


def test_an_interrupted_save_leaves_the_model_that_was_there(tmp_path, monkeypatch):
    """Whatever it was that had been written by then."""
    model = make_moda("talora", names=["dark"])
    save_moda(model, tmp_path)
    images = make_images("dark", 1)
    before = load_moda(tmp_path, make_sam())(**ask(images)).pred_masks
    shake(model, "dark")  # as long as it is the only one, the shared factors learn with it
    write = moda_folder.write_json

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(moda_folder, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        save_moda(model, tmp_path)
    assert torch.equal(load_moda(tmp_path, make_sam())(**ask(images)).pred_masks, before)
    monkeypatch.setattr(moda_folder, "write_json", write)
    save_moda(model, tmp_path)
    after = load_moda(tmp_path, make_sam())(**ask(images)).pred_masks
    torch.testing.assert_close(after, model(**ask(images)).pred_masks)
    assert not torch.allclose(after, before)
    assert sorted(path.name for path in (tmp_path / "domains").iterdir()) == ["dark-3"]  # dark-2 was written before
    assert len(list(tmp_path.glob("shared*"))) == len(list(tmp_path.glob("moda*.safetensors"))) == 1
