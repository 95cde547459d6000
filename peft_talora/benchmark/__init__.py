"""Named protocols, the runs of a benchmark, and the table that is made of them; `recipes/benchmark.py` uses it."""
