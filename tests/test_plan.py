"""Plan: what a run asks of train.py, where its record goes, and what is run when."""

import shutil
from dataclasses import replace

import pytest
from benchmark_cases import OURS, make_benchmark

from peft_talora.benchmark.plan import run_seeds
from peft_talora.benchmark.protocols import CAMVID_2, SYNTHETIC_3, SYNTHETIC_6
from peft_talora.benchmark.records import check_record, describe_weights, read_record, write_record


def test_other_weights_of_a_base_of_the_same_name_are_another_setting(tmp_path, sam_folder):
    base = shutil.copytree(sam_folder, tmp_path / "base")
    benchmark = make_benchmark(tmp_path, base=str(base))
    settings = benchmark.settings(SYNTHETIC_3)
    assert settings == make_benchmark(tmp_path, base=str(base)).settings(SYNTHETIC_3)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert describe_weights(str(base)) != settings["base_weights"]
    write_record(tmp_path / "talora-seed0.json", replace(OURS[0], arguments=settings))
    with pytest.raises(ValueError, match=r"is of a run with base_weights="):
        check_record(tmp_path / "talora-seed0.json", benchmark.settings(SYNTHETIC_3))
    assert describe_weights("facebook/sam-vit-base") is None
    job = benchmark.job("a", SYNTHETIC_3, settings)
    assert "--base_weights" not in job.command()
    assert job.context["base_weights"] == settings["base_weights"]


def test_what_is_changed_of_the_protocol_goes_for_its_own_runs_alone(tmp_path):
    benchmark = make_benchmark(tmp_path, data_root="images")
    own, other = benchmark.settings(SYNTHETIC_3), benchmark.settings(SYNTHETIC_6)
    assert (own["num_images"], own["num_train_epochs"]) == (8, 1)
    assert {name: own[name] for name in own if name in ("per_device_train_batch_size", "image_size")} == {
        name: other[name] for name in ("per_device_train_batch_size", "image_size")
    }
    assert other["num_images"] == SYNTHETIC_6.images["train"]
    assert "--data_root images" in " ".join(benchmark.job("a", SYNTHETIC_3, own).command())
    assert "--data_root" not in benchmark.job("a", SYNTHETIC_6, other).command()


def test_records_of_variants_are_apart_from_those_of_methods(tmp_path):
    methods, variants = make_benchmark(tmp_path), make_benchmark(tmp_path, group="ablations")
    assert variants.record_file("talora", 0) == methods.record_file("talora", 0)
    assert variants.record_file("r-4", 0).parent == methods.records / "ablations"
    assert variants.cost_file.parent == methods.records / "ablations"


def test_every_variant_has_a_record_of_every_seed_and_only_what_is_missing_is_run(tmp_path, capsys):
    variants = {name: {"method": name, "learning_rate": 1e-3} for name in ("heads", "talora")}
    benchmark = make_benchmark(tmp_path, variants=variants, seeds=range(2))
    run_seeds(replace(benchmark, seeds=range(1)))
    files = [benchmark.record_file(name, seed) for seed in range(2) for name in variants]
    assert [file.exists() for file in files] == [True, True, False, False]
    written = files[0].stat().st_mtime_ns
    capsys.readouterr()
    run_seeds(benchmark)
    assert files[0].stat().st_mtime_ns == written
    first, *others, last = capsys.readouterr().out.splitlines()
    assert first == "synthetic-3: 2 of 4 runs are done"
    assert len(others) == 1
    assert last.endswith("done, 0 to go")
    found = read_record(files[3])
    assert (found.name, found.seed, found.arguments["learning_rate"]) == ("talora", 1, 1e-3)
    assert found.arguments["r"] == 16, "train.py's own default"
    assert "output_dir" not in found.arguments
    assert found.metrics == {"depth": {"rmse": 1}}
    assert found.parameters == {"heads": 3}
    assert found.validation_loss == pytest.approx(1.001)
    assert not any(path.is_file() for path in benchmark.work.rglob("*"))
    with pytest.raises(ValueError, match=r"num_images=8 \(not 16\)"):
        run_seeds(replace(benchmark, changes={**benchmark.changes, "num_images": 16}))


def test_a_run_that_diverges_says_which_and_what_to_do_and_ends_the_others(tmp_path):
    variants = {
        "wait": {"method": "wait", "learning_rate": 1e-3},
        "r-4": {"method": "talora", "r": 4, "learning_rate": 3.0},
        "talora": {"method": "talora", "learning_rate": 3.0},
    }
    benchmark = make_benchmark(tmp_path, variants=variants)
    advice = "widen the learning rates of talora downwards on synthetic-3"
    with pytest.raises(RuntimeError, match=f"r-4, a variant of talora, diverged with seed 0 and .* rate 3: {advice}"):
        run_seeds(benchmark)
    assert not benchmark.record_file("r-4", 0).exists()
    ended = benchmark.job("wait-seed0", SYNTHETIC_3, {"method": "talora", "learning_rate": 1e-3})
    assert ended.start().wait() == 0, "a process that is alive would hold the folder"
    del variants["wait"], variants["r-4"]
    with pytest.raises(RuntimeError, match=f"^talora diverged with seed 0 and learning rate 3: {advice}"):
        run_seeds(benchmark)


@pytest.mark.parametrize("changed", [False, True], ids=["same code", "other code"])
def test_an_interrupted_run_goes_on_if_the_code_is_the_same(tmp_path, changed):
    variants = {"talora": {"method": "talora", "learning_rate": 1e-3}}
    benchmark = make_benchmark(tmp_path, variants=variants)
    arguments = {**benchmark.settings(SYNTHETIC_3), **variants["talora"], "seed": 0}
    interrupted = benchmark.job("talora-seed0", SYNTHETIC_3, arguments)
    interrupted.start().wait()
    progress = interrupted.folder / "checkpoint-1" / "manifest.json"
    progress.parent.mkdir()
    progress.write_text("{}")
    if changed:
        (benchmark.root / "recipes" / "another.py").write_text("")
    run_seeds(benchmark)
    found = read_record(benchmark.record_file("talora", 0))
    assert found.versions == {"resumed": str(not changed)}


def test_other_images_of_a_folder_are_another_setting(tmp_path):
    image = tmp_path / "val" / "image" / "a.jpg"
    image.parent.mkdir(parents=True)
    image.write_text("a")
    benchmark = make_benchmark(tmp_path, protocol=CAMVID_2, data_root=str(tmp_path))
    before = benchmark.settings(CAMVID_2)["images"]
    assert benchmark.settings(SYNTHETIC_3)["images"] is None
    image.write_text("ab")
    assert benchmark.settings(CAMVID_2)["images"] not in (None, before)
