"""The metrics as modules of `evaluate`: `evaluate.load(metric_path("depth"))` finds them in this package, offline.

Axes: C classes, H W pixels; images of a call may be of different sizes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

from .metrics import Metric

_LEAST = 1e-7  # probability, whose logarithm is taken
PLANE = {"int64": datasets.List(datasets.List(datasets.Value("int64")))}
PLANE["float32"] = datasets.List(datasets.List(datasets.Value("float32")))


class DenseMetric(evaluate.Metric):
    """One kind of dense prediction; `compute` gives the figures of a metric of `peft_talora.metrics`."""

    prediction: datasets.List
    reference: datasets.List
    citation = ""

    @abstractmethod
    def make_metric(self, **options: Any) -> Metric:
        """A fresh metric; `options` are what `compute` was given beside predictions and references."""

    @abstractmethod
    def to_logits(self, prediction: np.ndarray, **options: Any) -> Tensor:
        """The logits (C, H, W) that a prediction is decoded from."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation=self.citation,
            features=datasets.Features({"predictions": self.prediction, "references": self.reference}),
            inputs_description="Lists of predictions and references, one of each per image.",
        )

    def _compute(self, predictions: Sequence, references: Sequence, **options: Any) -> dict[str, float]:
        metric = self.make_metric(**options)
        for prediction, reference in zip(predictions, references, strict=True):
            logits = self.to_logits(_array(prediction), **options)
            metric.update(logits[None], torch.from_numpy(_array(reference))[None])
        return metric.compute()


def _array(values: Sequence) -> np.ndarray:
    """Numbers as they were before they became a row of a table."""
    array = np.asarray(values)
    return array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else array


class ClassMetric(DenseMetric):
    """Of class ids (H, W); `num_classes` is given to `compute`."""

    prediction, reference = PLANE["int64"], PLANE["int64"]

    def to_logits(self, prediction: np.ndarray, num_classes: int) -> Tensor:
        """1 for the class of a pixel, 0 for others. Raises ValueError for an id that is none."""
        if prediction.min() < 0 or prediction.max() >= num_classes:
            least, most = prediction.min(), prediction.max()
            raise ValueError(f"predictions hold classes from {least} to {most}; allowed: 0 to {num_classes - 1}")
        return torch.nn.functional.one_hot(torch.from_numpy(prediction).long(), num_classes).permute(2, 0, 1).float()


class ProbabilityMetric(DenseMetric):
    """Of the probability (H, W) of class 1."""

    prediction, reference = PLANE["float32"], PLANE["int64"]

    def to_logits(self, prediction: np.ndarray) -> Tensor:
        """The logarithm of the odds. Raises ValueError for what is no probability."""
        if not ((prediction >= 0) & (prediction <= 1)).all():
            least, most = prediction.min(), prediction.max()
            raise ValueError(f"predictions hold values from {least} to {most}; allowed: probabilities, 0 to 1")
        return torch.from_numpy(prediction).double().logit(_LEAST)[None]
