"""The metrics as modules of `evaluate`: loaded by path, offline, with the figures of the metrics themselves."""

import evaluate
import numpy as np
import pytest
import torch

from peft_talora import metric_path
from peft_talora.metrics import (
    DepthMetric,
    EdgesMetric,
    NormalsMetric,
    PartsMetric,
    SaliencyMetric,
    SegmentationMetric,
)

SIZES = ((6, 9), (8, 4), (5, 5))
RNG = np.random.default_rng(0)


def one_hot(classes):
    return torch.nn.functional.one_hot(torch.from_numpy(classes), 4).permute(2, 0, 1)


def classes(size):
    reference = RNG.integers(0, 4, size)
    reference[0, :2] = 255
    return RNG.integers(0, 4, size), reference


def probabilities(size):
    reference = RNG.integers(0, 2, size)
    reference[0, 0] = 255
    prediction = RNG.random(size, dtype=np.float32)
    prediction[1, :2] = 0, 1
    return prediction, reference


def metres(size):
    reference = RNG.uniform(1, 5, size).astype(np.float32)
    reference[0, 0] = 0
    return (reference + RNG.normal(0, 0.5, size)).astype(np.float32), reference


def vectors(size):
    reference = RNG.normal(size=(3, *size)).astype(np.float32)
    reference /= np.linalg.norm(reference, axis=0)
    reference[:, 0, 0] = 0
    return (reference + RNG.normal(0, 0.3, (3, *size))).astype(np.float32), reference


CASES = {
    "segmentation": (classes, SegmentationMetric(4), one_hot, {"num_classes": 4}),
    "parts": (classes, PartsMetric(4), one_hot, {"num_classes": 4}),
    "depth": (metres, DepthMetric(), lambda p: torch.from_numpy(p)[None], {}),
    "normals": (vectors, NormalsMetric(), torch.from_numpy, {}),
    "edges": (probabilities, EdgesMetric(), lambda p: torch.from_numpy(p).double().logit(1e-7)[None], {}),
    "saliency": (probabilities, SaliencyMetric(), lambda p: torch.from_numpy(p).double().logit(1e-7)[None], {}),
}


@pytest.mark.parametrize("kind", CASES)
def test_figures_are_those_of_the_metric(kind):
    draw, metric, to_logits, options = CASES[kind]
    pairs = [draw(size) for size in SIZES]
    metric.reset()
    for prediction, reference in pairs:
        metric.update(to_logits(prediction)[None].float(), torch.from_numpy(reference)[None])
    expected = metric.compute()
    predictions, references = zip(*pairs, strict=True)
    module = evaluate.load(metric_path(kind))
    assert module.compute(predictions=list(predictions), references=list(references), **options) == expected
    module.add_batch(predictions=list(predictions[:2]), references=list(references[:2]))
    module.add(prediction=predictions[2], reference=references[2])
    assert module.compute(**options) == expected
    assert module.description


def test_what_is_no_prediction_is_refused():
    with pytest.raises(ValueError, match="classes from 0 to 4; allowed: 0 to 3"):
        evaluate.load(metric_path("parts")).compute(predictions=[[[0, 4]]], references=[[[0, 1]]], num_classes=4)
    with pytest.raises(ValueError, match=r"to 1\.5; allowed: probabilities"):
        evaluate.load(metric_path("edges")).compute(predictions=[[[0, 1.5]]], references=[[[0, 1]]])
    with pytest.raises(ValueError, match="kind 'heat' is none of depth, edges, normals, parts"):
        metric_path("heat")
