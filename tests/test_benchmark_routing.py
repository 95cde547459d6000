"""What is measured of the router: on few small images, with the real queries, selectors and folders."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

RECIPE = str(Path(__file__).parent.parent / "recipes" / "benchmark_routing.py")
routing = SimpleNamespace(**runpy.run_path(RECIPE))


def run(monkeypatch, folder: Path, **flags) -> tuple[dict, str]:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")  # else the recipe starts itself anew with it
    flags = {"output": folder / "routing.json", "num_threads": torch.get_num_threads(), **flags}
    words = [word for name, value in flags.items() for word in (f"--{name}", *str(value).split())]
    monkeypatch.setattr(sys, "argv", [RECIPE, *words])
    routing.main()
    return json.loads((folder / "routing.json").read_text()), (folder / "routing.md").read_text()


def test_queries_are_compared_with_colours_alone(tmp_path, monkeypatch):
    flags = {"stages": "queries", "queries": "gft_readonly mean_block(1)", "selectors": "ridge lda"}
    flags |= {"num_images": 8, "num_test_images": 3, "exemplars": 5, "draws": 2, "quantile": 0.1}
    figures, text = run(monkeypatch, tmp_path, **flags)
    rows = figures["queries"]["rows"]
    assert list(rows) == ["gft_readonly", "mean_block(1)", "colour histogram"]
    for selectors in rows.values():
        for row in selectors.values():
            for found in row.values():
                low, high = found["range"]
                assert 0 <= low <= found["mean"] <= high <= 100
    accuracy = {query: rows[query]["ridge"]["accuracy"]["mean"] for query in rows}
    assert accuracy["mean_block(1)"] > 2 * accuracy["colour histogram"]
    assert f"| mean_block(1) | ridge | {accuracy['mean_block(1)']:.1f} [" in text


def test_histograms_know_colours_and_no_places():
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pool = routing.Pool(image, image)
    found = routing.histogram_of(pool)
    assert found.shape == (1, 512)
    assert found.sum().item() == pytest.approx(1)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    mixed = image.flatten(2)[..., order].unflatten(2, (16, 16))
    assert torch.equal(routing.histogram_of(routing.Pool(mixed, mixed)), found)
    assert found[0, (image[0, :, 0, 0] * 8).long() @ torch.tensor([64, 8, 1])] > 0


def test_passes_of_every_variant():
    passes = routing.Passes(SimpleNamespace(num_layers=4, image_size=64))
    assert {name: passes.build(name)() for name in routing.VARIANTS} == {
        "plain": 1,
        "the last block, decoder": 1,
        "gft_readonly, decoder": 1,
        "gft_global, decoder": 2,
        "a block in the middle, LoRA above it": 1,
        "a block in the middle, LoRA": 1.75,
        "the last block, LoRA": 2,
        "gft_readonly, LoRA": 2,
        "gft_global, LoRA": 2,
    }


def test_time_and_memory_are_ratios_to_plain_sam(tmp_path, monkeypatch):
    kept = "gft_readonly, LoRA"
    for name in set(routing.VARIANTS) - {"plain", kept}:
        monkeypatch.delitem(routing.VARIANTS, name)
    figures, text = run(monkeypatch, tmp_path, stages="passes", image_size=64, num_layers=4, rounds=1)
    rows = figures["passes"]["rows"]
    assert list(rows) == ["plain", kept, "plain again"]
    assert rows["plain"]["time"] == rows["plain"]["memory"] == 1
    assert rows[kept]["passes"] == 2
    assert rows[kept]["memory"] == pytest.approx(rows[kept]["peak_mib"] / rows["plain"]["peak_mib"], rel=0.02)
    assert "| plain | 1.00 | 1.00 (" in text


def test_many_domains_on_disk_and_few_in_memory(tmp_path, monkeypatch):
    (tmp_path / "routing.json").write_text(json.dumps({}))
    figures, text = run(monkeypatch, tmp_path, stages="many", domains="3", resident=1, exemplars=3)
    found = figures["many"]
    assert [(row["domains"], row["in_memory"]) for row in found["rows"]] == [(3, 1), (3, 3)]
    assert all(row["accuracy"] == 100 for row in found["rows"])
    least, most = found["bytes_of_a_domain"]
    own = 4 * found["parameters_of_a_domain"]
    assert own < least <= most < 1.05 * own
    assert "| 3 | 1 | " in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"stages": "query"}, "allowed: queries, passes, many"),
        ({"draws": 0}, "`draws` is 0"),
        ({"exemplars": 1}, "`exemplars` is 1"),
        ({"domains": "0"}, r"`domains` \[0\]"),
    ],
)
def test_wrong_arguments_are_refused(flags, message, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, tmp_path, **flags)
    assert not (tmp_path / "routing.json").exists()
