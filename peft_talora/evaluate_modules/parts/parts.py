"""Overlap of parts, as a module of `evaluate`."""

import peft_talora.metric_module as dense
from peft_talora.metrics import PartsMetric


class Parts(dense.ClassMetric):
    """Overlap of the ids (H, W) of parts; 255 in a reference is ignored. `compute` takes `num_classes` too.

    miou: intersection over union, mean over the classes that occur in prediction or reference (0 to 1, higher is
    better).
    """

    def make_metric(self, num_classes: int) -> PartsMetric:
        """Of so many classes, with the background."""
        return PartsMetric(num_classes)
