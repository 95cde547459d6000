"""Overlap of classes, as a module of `evaluate`."""

import peft_talora.metric_module as dense
from peft_talora.metrics import SegmentationMetric


class Segmentation(dense.ClassMetric):
    """Overlap of class ids (H, W); 255 in a reference is ignored. `compute` takes `num_classes` too.

    miou: intersection over union, mean over the classes that occur in prediction or reference (0 to 1, higher is
    better). pixel_accuracy: share of pixels given their class (0 to 1, higher is better).
    """

    def make_metric(self, num_classes: int) -> SegmentationMetric:
        """Of so many classes."""
        return SegmentationMetric(num_classes)
