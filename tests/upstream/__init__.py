"""PEFT's own tests over our configuration.

PEFT's wheel does not hold its tests, its source package does: `source.py` fetches that of the installed version and
unpacks its tests below `.cache/`, which git ignores. The test modules here take PEFT's test classes, put our
parameters in place of PEFT's and list what does not apply, with the reason.
"""
