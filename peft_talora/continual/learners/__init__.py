"""Ways to learn a stream of domains, one object each; `LEARNERS` has them by kind."""

from .ewc import EWC
from .learner import Learner
from .lwf import LwF
from .o_lora import OLoRA
from .plain import Joint, Sequential
from .replay import ExperienceReplay

LEARNERS: dict[str, type[Learner]] = {
    learner.kind: learner for learner in (Sequential, Joint, LwF, EWC, ExperienceReplay, OLoRA)
}

__all__ = ["EWC", "LEARNERS", "ExperienceReplay", "Joint", "Learner", "LwF", "OLoRA", "Sequential"]
