"""`train.py` with FSDP2 over CPU processes, as `recipes/accelerate/fsdp.yaml` sets it up over GPUs.

python -m torch.distributed.run --standalone --nproc_per_node 2 tests/fsdp_cases.py <flags of train.py>

Accelerate offers FSDP to several kinds of devices, and CPUs are none of them: it is told that these are of another
kind. All else is as it is for users.
"""

import os
import runpy
from pathlib import Path

import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType

RECIPES = Path(__file__).parent.parent / "recipes"

if __name__ == "__main__":
    settings = yaml.safe_load((RECIPES / "accelerate" / "fsdp.yaml").read_text())
    # As `accelerate launch` hands them on.
    os.environ.update({name.upper(): str(value) for name, value in settings["fsdp_config"].items()})
    os.environ.update(ACCELERATE_USE_FSDP="true", ACCELERATE_MIXED_PRECISION=settings["mixed_precision"])
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    runpy.run_path(str(RECIPES / "train.py"), run_name="__main__")
