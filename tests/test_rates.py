"""Rates and updates: the lowest validation loss chooses, earlier searches count, another base is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_cases import make_benchmark, record

from peft_talora.benchmark.protocols import PROTOCOLS, SYNTHETIC_3, SYNTHETIC_6
from peft_talora.benchmark.rates import choose, rate_notes
from peft_talora.benchmark.records import read_comparable, read_record, write_record
from peft_talora.methods import METHODS

RESULTS = Path(__file__).parent.parent / "docs" / "results"
RATES = (3e-4, 1e-3, 3e-3)


def write_tuning(tmp_path, losses, updates="alternating"):
    """Records of what a search of learning rates has found for talora: rate → loss; the other updates are worse."""
    benchmark = make_benchmark(tmp_path)
    others = "joint" if updates == "alternating" else "alternating"
    found = {(updates, rate): loss for rate, loss in losses.items()}
    found |= {(others, rate): loss for rate, loss in zip(RATES, (9.0, 8.0, 9.0), strict=True)}
    for (way, rate), loss in found.items():
        arguments = {"method": "talora", "seed": 100, "learning_rate": rate, "updates": way}
        validation = None if loss is None else {"metrics": {}, "losses": {"depth": 0.1}, "loss": loss}
        made = record("talora", 100, (1, 1, 1, 1), validation=validation)
        file = benchmark.output / "runs" / "learning-rates" / f"talora-{way}-{rate:g}-seed100.json"
        write_record(file, replace(made, arguments={**benchmark.settings(SYNTHETIC_3), **arguments}))
    return benchmark


def talora(rate, updates="alternating"):
    """What `choose` gives."""
    return {"talora": {"learning_rate": rate, "updates": updates}}


def test_the_learning_rate_is_that_of_the_lowest_validation_loss(tmp_path, capsys):
    benchmark = write_tuning(tmp_path, {3e-4: 2.0, 1e-3: 1.5, 3e-3: None})
    assert choose(benchmark, RATES, tuning=True) == talora(1e-3)
    assert "WARNING" not in capsys.readouterr().out
    found = json.loads((benchmark.output / "learning-rates.json").read_text())
    losses = found["methods"]["talora"]["validation_loss"]
    assert losses == {
        "alternating": {"0.0003": 2.0, "0.001": 1.5, "0.003": None},
        "joint": {"0.0003": 9.0, "0.001": 8.0, "0.003": 9.0},
    }


def test_updates_are_chosen_with_the_learning_rate(tmp_path):
    assert choose(write_tuning(tmp_path, {3e-4: 2.0, 1e-3: 1.5, 3e-3: 3.0}, "joint"), RATES, True) == talora(
        1e-3, "joint"
    )
    heads = replace(make_benchmark(tmp_path), variants={"heads": {"method": "heads"}})
    choose(heads, RATES, tuning=True)
    losses = json.loads(heads.rates_file.read_text())["methods"]["heads"]["validation_loss"]
    assert list(losses) == ["joint"], "heads share nothing that is trained"


def test_a_best_rate_at_a_border_is_looked_beyond(tmp_path, capsys):
    benchmark = write_tuning(tmp_path, {3e-4: 2.0, 1e-3: 1.5, 3e-3: 1.0, 1e-2: None})
    assert choose(benchmark, RATES, tuning=True) == talora(3e-3)
    found = json.loads(benchmark.rates_file.read_text())["methods"]["talora"]
    assert list(found["validation_loss"]["alternating"]) == ["0.0003", "0.001", "0.003", "0.01"]
    assert not found["at_border"]
    benchmark.rates_file.unlink()
    write_tuning(tmp_path, {3e-4: 0.5, 1e-4: 0.4, 3e-5: 0.3})
    assert choose(benchmark, RATES, tuning=True) == talora(3e-5)
    assert "WARNING: 3e-05 is at the border" in capsys.readouterr().out, "it is looked beyond twice"
    assert choose(benchmark, RATES, tuning=True) == talora(3e-5), "and not again by the same command"


def test_learning_rates_of_earlier_searches_count_and_a_border_is_noted(tmp_path):
    benchmark = write_tuning(tmp_path, {3e-4: 1.0, 1e-3: 1.5, 3e-3: 2.0, 1e-4: 0.9, 3e-5: 0.8})
    choose(benchmark, RATES, tuning=True)
    used = {"learning_rate": 3e-5, "updates": "alternating"}
    records = [record("talora", 0, (1, 1, 1, 1), arguments=used)]
    where = (
        "Learning rates and updates are those of the lowest validation loss on synthetic-3, the same for all tasks "
        "of a method."
    )
    assert rate_notes(benchmark, records) == [
        where,
        "The learning rate of talora, 3e-05, is at the border of those tried: 3e-05, 0.0001, 0.0003, 0.001, 0.003.",
    ]
    wider = write_tuning(tmp_path, {1e-5: 0.5, 3e-6: 0.7})
    assert choose(wider, (3e-6, 1e-5), tuning=True) == talora(1e-5)
    assert choose(benchmark, RATES, tuning=True) == talora(1e-5), "the earlier grid does not lose it"
    assert rate_notes(benchmark, records) == [], "the records have another rate"
    records = [record("talora", 0, (1, 1, 1, 1), arguments={**used, "learning_rate": 1e-5})]
    assert rate_notes(benchmark, records) == [where]


def test_learning_rates_are_kept_for_other_protocols_and_not_for_other_bases(tmp_path):
    choose(write_tuning(tmp_path, {3e-4: 2.0, 1e-3: 1.5, 3e-3: 3.0}), RATES, tuning=True)
    both = {name: {"method": name} for name in ("talora", "heads")}
    larger = {"num_images": 16, "num_train_epochs": 1}
    other = make_benchmark(tmp_path, protocol=SYNTHETIC_6, changes=larger)
    assert choose(other, RATES, tuning=True) == talora(1e-3)
    with pytest.raises(ValueError, match="no learning rate of heads: run the stage"):
        choose(replace(other, variants=both), RATES, tuning=False)
    with pytest.raises(ValueError, match="with other base, base_weights"):
        choose(replace(other, base="another"), RATES, tuning=True)
    with pytest.raises(ValueError, match="with other num_images"):
        choose(make_benchmark(tmp_path, changes=larger), RATES, tuning=True)


def test_a_single_learning_rate_is_taken(tmp_path):
    benchmark = make_benchmark(tmp_path)
    assert choose(benchmark, (0.5,), tuning=True) == talora(0.5)
    assert not benchmark.output.exists()


def test_divergence_is_an_outcome_of_the_search_unless_nothing_else_comes(tmp_path):
    benchmark = make_benchmark(tmp_path)
    with pytest.raises(RuntimeError, match=r"talora diverged with every learning rate of \[2, 3\]: give lower ones"):
        choose(benchmark, (2, 3), tuning=True)
    assert choose(benchmark, (0.5, 0.7, 2), tuning=True) == talora(0.07), "two rates lower than those given"
    diverged = benchmark.output / "runs" / "learning-rates" / "talora-joint-2-seed100.json"
    assert read_record(diverged).validation is None


def test_the_methods_defaults_are_what_the_committed_search_chose():
    found = json.loads((RESULTS / "learning-rates.json").read_text())["methods"]
    assert found.keys() == METHODS.keys()
    for name, method in METHODS.items():
        chosen = found[name]
        assert (chosen["learning_rate"], chosen["updates"]) == (method.learning_rate, method.updates[0]), name
        assert set(chosen["validation_loss"]) == set(method.updates)


def test_the_committed_records_are_comparable():
    folders = [folder for folder in (RESULTS / "runs").iterdir() if folder.name in PROTOCOLS]
    assert {"synthetic-3", "synthetic-6", "camvid-2"} <= {folder.name for folder in folders}
    for folder in folders:
        assert read_comparable(sorted(folder.glob("*-seed*.json"))), folder
