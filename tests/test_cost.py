"""Cost: medians over rounds, all variants in one go."""

import json
from dataclasses import replace

import pytest
from benchmark_cases import make_benchmark

from peft_talora.benchmark.cost import measure_cost


def test_costs_are_medians_over_rounds_and_measured_in_one_go(tmp_path, capsys):
    variants = {name: {"method": name, "learning_rate": 1e-3} for name in ("heads", "talora")}
    both = make_benchmark(tmp_path, variants=variants)
    one = replace(both, variants={"heads": variants["heads"]})
    measure_cost(one, steps=4, rounds=3)
    found = json.loads(one.cost_file.read_text())
    assert found["methods"] == {"heads": {"step_seconds": 0.3, "peak_mib": 100}}
    assert (found["steps"], found["rounds"]) == (4, 3)
    assert found["settings"] == one.settings(one.protocol)
    assert found["variants"] == one.variants
    capsys.readouterr()
    measure_cost(both, steps=4, rounds=2)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"synthetic-3/cost/{name}-{turn}" for turn in range(2) for name in variants
    ]
    assert json.loads(both.cost_file.read_text())["methods"].keys() == variants.keys()
    measure_cost(both, steps=4, rounds=2)
    assert capsys.readouterr().out == "", "what is there has all that is wanted"
    measure_cost(both, steps=4, rounds=1)
    assert json.loads(both.cost_file.read_text())["rounds"] == 1
    with pytest.raises(ValueError, match="has talora too, and all costs of a table are measured in one go"):
        measure_cost(one, steps=4, rounds=1)
    assert not any(path.is_file() for path in both.work.rglob("*")), "folders of finished runs are deleted"
