"""Errors of depth, as a module of `evaluate`."""

import numpy as np
import torch

import peft_talora.metric_module as dense
from peft_talora.metrics import DepthMetric


class Depth(dense.DenseMetric):
    """Errors of depth (H, W) in metres, as in arXiv:1406.2283; 0 in a reference is unknown.

    absolute_error (m), relative_error, rmse (m): lower is better. delta_1.25: share of pixels within a factor of 1.25
    (0 to 1, higher is better).
    """

    prediction, reference = dense.PLANE["float32"], dense.PLANE["float32"]
    citation = "arXiv:1406.2283"

    def make_metric(self) -> DepthMetric:
        """There are no options."""
        return DepthMetric()

    def to_logits(self, prediction: np.ndarray) -> torch.Tensor:
        """Metres are predicted as they are."""
        return torch.from_numpy(prediction)[None]
