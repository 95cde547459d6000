"""Continual adaptation of SAM to a stream of domains: adapters per domain, routing, other learners, scores.

Importing it registers the PEFT type `BOTTLENECK`.
"""

from .bottleneck import BottleneckConfig
from .kinds import domain_config
from .moda import MoDAModel, MoDAOutput
from .moda_folder import load_moda, save_moda
from .queries import make_query

__all__ = [
    "BottleneckConfig",
    "MoDAModel",
    "MoDAOutput",
    "domain_config",
    "load_moda",
    "make_query",
    "save_moda",
]
