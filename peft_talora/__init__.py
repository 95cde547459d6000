"""TA-LoRA for the Segment Anything Model: several dense predictions from one encoder, as a PEFT method.

Importing this package registers the PEFT types `TALORA` and `BOTTLENECK`.
"""

from .continual import BottleneckConfig, MoDAModel, MoDAOutput, domain_config, load_moda, make_query, save_moda
from .data import AugmentedDataset, Collator, FolderDataset, JointAugmentation, SyntheticScenes, make_image_processor
from .hub import load, load_image_processor, push_to_hub, save_adapter
from .lora import from_loras, to_lora
from .losses import IGNORE_INDEX
from .metrics import delta_m, metric_path
from .msam import MSamConfig, MSamModel, MSamOutput
from .plotting import draw_predictions
from .small_sam import SMALL_SAM, make_small_sam, save_small_sam
from .tasks import KINDS, Task, make_task
from .tuner import TALoRAConfig, TALoRAModel, compress, orthogonality_loss, set_task, use_task
from .version import __version__

__all__ = [
    "IGNORE_INDEX",
    "KINDS",
    "SMALL_SAM",
    "AugmentedDataset",
    "BottleneckConfig",
    "Collator",
    "FolderDataset",
    "JointAugmentation",
    "MSamConfig",
    "MSamModel",
    "MSamOutput",
    "MoDAModel",
    "MoDAOutput",
    "SyntheticScenes",
    "TALoRAConfig",
    "TALoRAModel",
    "Task",
    "__version__",
    "compress",
    "delta_m",
    "domain_config",
    "draw_predictions",
    "from_loras",
    "load",
    "load_image_processor",
    "load_moda",
    "make_image_processor",
    "make_query",
    "make_small_sam",
    "make_task",
    "metric_path",
    "orthogonality_loss",
    "push_to_hub",
    "save_adapter",
    "save_moda",
    "save_small_sam",
    "set_task",
    "to_lora",
    "use_task",
]
