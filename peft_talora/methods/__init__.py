"""What the training recipe can train: TA-LoRA, and the baselines that it is compared with."""

from .adapters import AdapterArguments
from .method import METHODS, Method, find_method

__all__ = ["METHODS", "AdapterArguments", "Method", "find_method"]
