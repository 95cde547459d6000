"""Comparison: what a run asks of continual.py, how settings are chosen, and that the table is what the records say."""

import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from peft_talora.benchmark import comparison
from peft_talora.benchmark.comparison import Comparison, Wanted, make_table, run_missing, run_seeds, to_markdown, tune
from peft_talora.benchmark.intervals import t_quantile

ROOT = Path(__file__).parent.parent
TINY = {"num_images": 5, "num_test_images": 1, "num_train_epochs": 1, "points": 16, "exemplars": 2}


def make_comparison(folder: Path, base: str = "base", **changes) -> Comparison:
    values = {
        "entries": ["moda/lora", "ewc/lora"],
        "shared": {**TINY, "base": base},
        "tuning_domains": ["pits", "polyps"],
        "seeds": range(1),
        "workers": 1,
        "num_threads": 1,
        "root": ROOT,
        "output": folder / "results",
        "work": folder / "work",
        "say": print,
    }
    return Comparison(**{**values, **changes})


def record(name: str, seed: int, R: list[list[float]], **changes) -> dict:
    """Of a run of two domains with the matrix R."""
    method, adapter = name.split("/")
    iou = {"R": R, "zero_shot": [10.0, 20.0], "last": sum(R[-1]) / 2, "avg": 1.0 * seed, "ff": None}
    iou |= {"natural": 50.0 + seed, "natural_zero_shot": 49.0}
    boundary = {"R": R, "zero_shot": [5.0, 7.0], "last": 30.0}
    results = {
        "domains": ["pits", "polyps"],
        "matrix": {"iou": iou, "boundary_iou": boundary},
        "bytes_per_domain": 1000,
        "encoder_passes": 1.5,
        "seconds": 60,
        "routing": {"accuracy": 0.9, "false_alarms": 0.01, "natural_to_base": None},
    }
    arguments = {"method": method, "adapter": adapter, "seed": seed, "learning_rate": 1e-3, **TINY}
    found = {"name": name, "arguments": arguments, "context": {"base_weights": "a"}, "results": results}
    return {**found, "commit": "c", "hardware": "h", **changes}


def test_the_table_has_means_intervals_and_differences_seed_by_seed():
    ours = [record("moda/lora", seed, [[40.0, 10.0], [40.0, last]]) for seed, last in enumerate((60.0, 62.0, 66.0))]
    theirs = [record("joint/lora", seed, [[50.0, last]]) for seed, last in enumerate((50.0, 51.0, 52.0))]
    table = make_table(ours + theirs)
    row = table["methods"]["moda/lora"]
    assert row["seeds"] == 3
    assert row["learning_rate"] == 1e-3
    lasts = torch.tensor([50.0, 51.0, 53.0])
    assert row["last"] == pytest.approx(lasts.mean().item())
    half = t_quantile(0.975, 2) * lasts.std().item() / math.sqrt(3)
    assert row["ci95"]["last"] == pytest.approx([row["last"] - half, row["last"] + half], rel=1e-6)
    assert (row["ff"], row["oracle_last"]) == (None, None)
    assert row["routing_accuracy"] == pytest.approx(90)
    assert row["false_alarms"] == pytest.approx(1)
    assert row["course"] == pytest.approx([40, row["last"]])
    assert table["methods"]["joint/lora"]["course"] == pytest.approx([50.5])
    difference = table["differences"]["joint/lora"]
    assert difference["seeds"] == 3
    assert difference["mean"] == pytest.approx((0 + 0.5 + 2) / 3)
    assert table["without_training"] == {"iou": 15.0, "boundary_iou": 6.0, "natural": 49.0}
    text = to_markdown(table, "Title")
    assert f"| moda/lora | {row['last']:.1f} ± {half:.1f} |" in text
    assert "| without training | 15.0 |" in text
    assert "| joint/lora | +0.8 [" in text


def test_records_of_different_settings_or_of_failure_make_no_table():
    ours = record("moda/lora", 0, [[40.0, 10.0], [40.0, 60.0]])
    other = record("ewc/lora", 0, [[40.0, 10.0], [40.0, 60.0]])
    other["arguments"] = {**other["arguments"], "num_images": 6}
    with pytest.raises(ValueError, match=r"ewc/lora is of a run with num_images=6 \(not 5\), as moda/lora has"):
        make_table([ours, other])
    with pytest.raises(ValueError, match="ewc/lora diverged with seed 0"):
        make_table([ours, record("ewc/lora", 0, [[1.0, 2.0]], results=None)])
    with pytest.raises(ValueError, match="no records"):
        make_table([])


def scored(scores, monkeypatch) -> list[dict]:
    """Runs as they would end if `scores` of their arguments were what they reach; returns all arguments asked for."""
    asked = []

    def run_missing(_, wanted):
        asked.extend(run.arguments for run in wanted)
        ends = [scores(run.arguments) for run in wanted]
        return [{"results": end if end is None else {"matrix": {"iou": {"last": end}}}} for end in ends]

    monkeypatch.setattr(comparison, "run_missing", run_missing)
    return asked


def test_settings_are_chosen_by_validation_and_searched_beyond_the_border(tmp_path, monkeypatch):
    """EWC's best rate lies beyond the grid, its best strength inside; MoDA diverges at the highest rate."""

    def scores(arguments):
        rate, strength = arguments["learning_rate"], arguments.get("strength", 1000)
        if arguments["method"] == "moda":
            return None if rate > 1e-3 else 50 - abs(math.log10(rate / 1e-3))
        return 50 - abs(math.log10(rate / 1e-2)) - abs(math.log10(strength / 1e3))

    asked = scored(scores, monkeypatch)
    made = make_comparison(tmp_path)
    tune(made, [3e-4, 1e-3, 3e-3])
    found = json.loads(made.choices_file.read_text())
    assert found["chosen"]["moda/lora"]["settings"] == {"learning_rate": 1e-3}
    assert found["chosen"]["ewc/lora"]["settings"] == {"learning_rate": 1e-2, "strength": 1e3}
    assert found["chosen"]["moda/lora"]["at_border"] == []
    assert found["chosen"]["ewc/lora"]["at_border"] == ["learning_rate"]
    assert {a["seed"] for a in asked} == {comparison.TUNING_SEED}
    assert found["seed"] == comparison.TUNING_SEED
    assert {a["measure_on"] for a in asked} == {"val"}
    assert all(a["domains"] == ["pits", "polyps"] for a in asked)
    # Others are added to what the file has.
    tune(make_comparison(tmp_path, entries=["joint/lora"]), [1e-3])
    assert set(json.loads(made.choices_file.read_text())["chosen"]) == {"moda/lora", "ewc/lora", "joint/lora"}
    scored(lambda _: None, monkeypatch)
    with pytest.raises(RuntimeError, match="joint/lora diverged with every learning_rate"):
        tune(make_comparison(tmp_path, entries=["joint/lora"]), [1e-3])


def test_runs_need_settings(tmp_path):
    with pytest.raises(ValueError, match="no settings of moda/lora, ewc/lora: run the stage `tuning`"):
        run_seeds(make_comparison(tmp_path))


def test_a_record_of_other_arguments_is_refused(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(record("moda/lora", 0, [[1.0, 2.0]])))
    wanted = Wanted("moda/lora", file, {**record("moda/lora", 0, [[1.0, 2.0]])["arguments"], "num_images": 7})
    with pytest.raises(ValueError, match=r"num_images=5 \(not 7\)"):
        run_missing(make_comparison(tmp_path), [wanted])


def test_the_recipe_makes_records_and_a_table_of_them(sam_folder, tmp_path, monkeypatch, capsys):
    """Two real runs, chosen settings given; a second call finds them done."""
    recipe = ROOT / "recipes" / "benchmark_continual.py"
    made = make_comparison(tmp_path, shared={})
    made.output.mkdir()
    settings = {"moda/lora": {"settings": {"learning_rate": 1e-3}}, "lwf/lora": {"settings": {"learning_rate": 1e-3}}}
    settings["lwf/lora"]["settings"]["strength"] = 2.0
    made.choices_file.write_text(json.dumps({"chosen": settings}))
    flags = {"entries": "moda/lora lwf/lora", "seeds": 1, "stages": "runs table", "base": sam_folder, "num_threads": 1}
    flags |= {"num_images": 5, "num_test_images": 1, "num_train_epochs": 1}
    flags |= {"output_dir": made.output, "work_dir": made.work}
    words = [word for name, value in flags.items() for word in (f"--{name}", *str(value).split())]
    monkeypatch.setattr(sys, "argv", [str(recipe), *words])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    runpy.run_path(str(recipe), run_name="__main__")
    table = json.loads((made.output / "cosam-generated.json").read_text())
    assert set(table["methods"]) == {"moda/lora", "lwf/lora"}
    assert table["methods"]["lwf/lora"]["strength"] == 2.0
    own = json.loads((made.records / "moda-lora-seed0.json").read_text())
    assert table["methods"]["moda/lora"]["last"] == own["results"]["matrix"]["iou"]["last"]
    assert own["arguments"]["num_images"] == 5
    assert own["results"]["matrix"]["iou"]["natural"] > 0
    with Image.open(made.output / "cosam-generated.png") as picture:
        assert picture.width > 300
    assert not list(made.work.glob("*/*"))  # finished runs are discarded
    capsys.readouterr()
    runpy.run_path(str(recipe), run_name="__main__")
    assert "2 of 2 runs are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--entries", "moda"], "'moda'; allowed: <method>/<adapter>"),
        (["--entries", "o-lora/decoder"], "with 'o-lora' allowed: 'lora'"),
        (["--stages", "run"], "allowed: tuning, runs, table"),
        (["--seeds", "101"], "up to 100"),
        (["--num_images", "0"], "`num_images` is 0"),
        (["--learning_rates", "-1"], "positive numbers"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(flags, message, tmp_path, monkeypatch):
    recipe = str(ROOT / "recipes" / "benchmark_continual.py")
    monkeypatch.setattr(sys, "argv", [recipe, *flags, "--output_dir", str(tmp_path / "a")])
    main = runpy.run_path(recipe)["main"]
    with pytest.raises(ValueError, match=message):
        main()
    assert not (tmp_path / "a").exists()


def test_a_comparison_is_of_what_is_shared_and_what_is_an_entrys_own(tmp_path):
    made = replace(make_comparison(tmp_path), shared={"num_images": 5})
    assert made.arguments("ewc/lora", 3, strength=2.0) == {
        "num_images": 5,
        "method": "ewc",
        "adapter": "lora",
        "seed": 3,
        "strength": 2.0,
    }
