"""Angles between normals, as a module of `evaluate`."""

import datasets
import numpy as np
import torch

import peft_talora.metric_module as dense
from peft_talora.metrics import NormalsMetric


class Normals(dense.DenseMetric):
    """Angles between normals (3, H, W), as in arXiv:1411.4734; predictions of any length, 0 in a reference is unknown.

    mean_angle, median_angle (degrees): lower is better. within_11.25, within_22.5, within_30: share of pixels within
    so many degrees (0 to 1, higher is better).
    """

    prediction, reference = datasets.List(dense.PLANE["float32"]), datasets.List(dense.PLANE["float32"])
    citation = "arXiv:1411.4734"

    def make_metric(self) -> NormalsMetric:
        """There are no options."""
        return NormalsMetric()

    def to_logits(self, prediction: np.ndarray) -> torch.Tensor:
        """Vectors are predicted as they are."""
        return torch.from_numpy(prediction)
