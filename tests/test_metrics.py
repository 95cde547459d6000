import math

import pytest
import torch

from peft_talora.losses import IGNORE_INDEX, balanced_bce, unit_vectors
from peft_talora.metrics import (
    DepthMetric,
    EdgesMetric,
    NormalsMetric,
    PartsMetric,
    SaliencyMetric,
    SegmentationMetric,
    delta_m,
)

B, H, W = 4, 11, 13
MAKERS = {
    "segmentation": lambda: SegmentationMetric(5),
    "parts": lambda: PartsMetric(5),
    "depth": DepthMetric,
    "normals": NormalsMetric,
    "edges": EdgesMetric,
    "saliency": SaliencyMetric,
    "saliency2": SaliencyMetric,
}
CHANNELS = {"segmentation": 5, "parts": 5, "depth": 1, "normals": 3, "edges": 1, "saliency": 1, "saliency2": 2}
METRICS = pytest.mark.parametrize("kind", MAKERS)


def make_batch(kind):
    """Logits and labels; the left column of pixels is unlabelled."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(B, CHANNELS[kind], H, W, generator=random)
    if kind == "depth":
        logits, labels = 2 + logits, 1 + torch.rand(B, H, W, generator=random)
        labels[..., 0] = torch.tensor([0, math.nan, math.inf, -1] + 7 * [0])
    elif kind == "normals":
        labels = unit_vectors(torch.randn(B, 3, H, W, generator=random))
        labels[..., 0] = torch.tensor([math.nan] + 10 * [0])
    else:
        labels = torch.randint(0, 5 if CHANNELS[kind] == 5 else 2, (B, H, W), generator=random)
        labels[..., 0] = IGNORE_INDEX
    return logits, labels


def figures_of(kind, *batches):
    metric = MAKERS[kind]()
    for logits, labels in batches:
        metric.update(logits, labels)
    return metric.compute()


@METRICS
def test_figures_are_those_with_a_direction_in_order(kind):
    figures = figures_of(kind, make_batch(kind))
    assert list(figures) == list(MAKERS[kind]().higher_is_better)
    assert all(type(value) is float and math.isfinite(value) for value in figures.values())


@METRICS
def test_two_parts_equal_the_whole(kind):
    logits, labels = make_batch(kind)
    parts = figures_of(kind, (logits[:1], labels[:1]), (logits[1:], labels[1:]))
    assert parts == pytest.approx(figures_of(kind, (logits, labels)), rel=1e-6)


@METRICS
def test_merged_states_equal_one_metric(kind):
    logits, labels = make_batch(kind)
    one, first, second = (MAKERS[kind]() for _ in range(3))
    for metric, part in ((one, slice(0, 1)), (one, slice(1, B)), (first, slice(0, 1)), (second, slice(1, B))):
        metric.update(logits[part], labels[part])
    second_before = {key: value.clone() for key, value in second.state.items()}
    first.merge(second.state)
    assert first.compute() == one.compute()
    assert all(torch.equal(second.state[key], value) for key, value in second_before.items())
    assert all(value.dtype == torch.float64 for value in first.state.values())


@METRICS
def test_unlabelled_pixels_change_nothing(kind):
    logits, labels = make_batch(kind)
    other = logits.clone()
    other[..., 0] = 30
    assert figures_of(kind, (other, labels)) == figures_of(kind, (logits, labels))


@METRICS
def test_without_labels_is_nan(kind):
    logits, labels = make_batch(kind)
    unlabelled = figures_of(kind, (logits[..., :1], labels[..., :1]))
    for figures in (MAKERS[kind]().compute(), unlabelled):
        assert list(figures) == list(MAKERS[kind]().higher_is_better)
        assert all(math.isnan(value) for value in figures.values())


@METRICS
def test_reset_forgets(kind):
    logits, labels = make_batch(kind)
    metric = MAKERS[kind]()
    metric.update(logits.flip(0, 2), labels)
    metric.reset()
    metric.update(logits, labels)
    assert metric.compute() == figures_of(kind, (logits, labels))


@METRICS
def test_half_precision_logits_count_as_float32(kind):
    logits, labels = make_batch(kind)
    logits = logits.bfloat16().requires_grad_()
    assert figures_of(kind, (logits, labels)) == figures_of(kind, (logits.float(), labels))


@METRICS
def test_wrong_shapes_are_refused(kind):
    logits, labels = make_batch(kind)
    with pytest.raises(ValueError, match="labels are"):
        MAKERS[kind]().update(logits, labels[..., 1:])
    with pytest.raises(ValueError, match="logits have 9 channels; allowed"):
        MAKERS[kind]().update(torch.zeros(B, 9, H, W), labels)


def test_state_of_another_metric_is_refused():
    with pytest.raises(ValueError, match="SegmentationMetric needs"):
        SegmentationMetric(3).merge(SegmentationMetric(4).state)


def test_segmentation_by_hand():
    # Labels      0 0 0 1 1 2 ignored     of 5 classes
    # Predicted   0 0 1 1 1 3 4
    # IoU: class 0: 2/3; class 1: 2/3; class 2: 0/1; class 3: 0/1 (only predicted); class 4 does not occur.
    # mIoU: (2/3 + 2/3 + 0 + 0) / 4 = 1/3. Accuracy: 4 of 6.
    labels = torch.tensor([[[0, 0, 0, 1, 1, 2, IGNORE_INDEX]]])
    logits = torch.eye(5)[torch.tensor([0, 0, 1, 1, 1, 3, 4])].T.view(1, 5, 1, 7)
    assert figures_of("segmentation", (logits, labels)) == pytest.approx({"miou": 1 / 3, "pixel_accuracy": 4 / 6})
    assert figures_of("parts", (logits, labels)) == pytest.approx({"miou": 1 / 3})


def test_labels_of_one_byte_do_not_overflow():
    # Class 99 of 100: 99 · 100 + 99 lies beyond a byte.
    labels = torch.full((1, 1, 1), 99, dtype=torch.uint8)
    metric = SegmentationMetric(100)
    metric.update(torch.eye(100)[99].view(1, 100, 1, 1), labels)
    assert metric.compute() == {"miou": 1, "pixel_accuracy": 1}


def test_pools_over_pixels_of_the_split():
    # Image 1: 1 labelled pixel, right. Image 2: 3 labelled pixels, all wrong. Pooled accuracy 1/4, not (1 + 0) / 2.
    labels = torch.tensor([[[0, IGNORE_INDEX, IGNORE_INDEX]], [[1, 1, 1]]])
    logits = torch.eye(5)[0].view(1, 5, 1, 1).expand(2, 5, 1, 3)
    batches = [(logits[:1], labels[:1]), (logits[1:], labels[1:])]
    assert figures_of("segmentation", *batches)["pixel_accuracy"] == 0.25


def test_depth_by_hand():
    # Labels     2    4    1    5    unknown
    # Predicted  2.4  2.4  −1   5
    # |error|    0.4  1.6  2    0    mean 4 / 4 = 1
    # relative   0.2  0.4  2    0    mean 2.6 / 4 = 0.65
    # squared    0.16 2.56 4    0    root of 6.72 / 4 = √1.68
    # ratio      1.2  1.67 miss 1    2 of 4 below 1.25
    labels = torch.tensor([[[2.0, 4, 1, 5, 0]]])
    logits = torch.tensor([2.4, 2.4, -1, 5, 9]).view(1, 1, 1, 5)
    expected = {"absolute_error": 1, "relative_error": 0.65, "rmse": math.sqrt(1.68), "delta_1.25": 0.5}
    assert figures_of("depth", (logits, labels)) == pytest.approx(expected)


def test_normals_by_hand():
    # Predictions turned from z towards x by 10°, 20°, 25°, 40°, 180°, of lengths 1 to 5; the sixth pixel is unknown.
    # Mean 275/5 = 55°; median 25°; below 11.25°: 1 of 5; below 22.5°: 2 of 5; below 30°: 3 of 5.
    angles = torch.tensor([10.0, 20, 25, 40, 180, 90]).deg2rad()
    lengths = torch.arange(1.0, 7)
    logits = (lengths * torch.stack([angles.sin(), 0 * angles, angles.cos()])).view(1, 3, 1, 6)
    labels = torch.tensor([0.0, 0, 1]).view(1, 3, 1, 1).repeat(1, 1, 1, 6)
    labels[..., 5] = 0
    figures = figures_of("normals", (logits, labels))
    assert figures.pop("median_angle") == pytest.approx(25, abs=0.01)
    assert figures == pytest.approx({"mean_angle": 55, "within_11.25": 0.2, "within_22.5": 0.4, "within_30": 0.6})


def test_median_angle_is_that_of_all_pixels():
    random = torch.Generator().manual_seed(0)
    logits, labels = (unit_vectors(torch.randn(2, 3, 50, 50, generator=random)) for _ in range(2))
    angles = (logits.double() * labels.double()).sum(1).clamp(-1, 1).acos().rad2deg()
    figures = figures_of("normals", (logits, labels))
    assert figures["median_angle"] == pytest.approx(angles.quantile(0.5).item(), abs=0.02)
    assert figures["mean_angle"] == pytest.approx(angles.mean().item(), abs=1e-3)


def test_equal_normals_are_0_degrees_apart_and_zero_is_90_degrees_off():
    labels = unit_vectors(torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)))
    assert figures_of("normals", (labels, labels))["mean_angle"] < 1e-4
    assert figures_of("normals", (torch.zeros(1, 3, 5, 5), labels))["mean_angle"] == pytest.approx(90)


def test_diverged_normals_show():
    labels = unit_vectors(torch.ones(1, 3, 1, 1))
    figures = figures_of("normals", (torch.full((1, 3, 1, 1), math.nan), labels))
    assert math.isnan(figures["mean_angle"])
    assert figures["median_angle"] > 179
    assert figures["within_30"] == 0


def edge_row(probabilities):
    """Logits (1, 1, 1, W) of a row of pixels."""
    return torch.tensor(probabilities).logit().view(1, 1, 1, -1)


def test_edges_by_hand():
    # Pixel        0     1     2     3     4     5     6     7     8     9
    # Label        0     0     1     0     0     0     0     1     0     0
    # Probability  .055  .855  .055  .055  .055  .655  .055  .055  .055  .355
    # The radius is 1, so pixels 1, 2, 3 and 6, 7, 8 are near an edge.
    # Threshold to .05: P = 6/10, R = 1, F = 0.75. To .35: pixels 1 (near), 5, 9: P = 1/3; found: pixel 2 only, so
    # R = 1/2, F = 0.4. To .65: pixels 1, 5: P = 1/2, R = 1/2, F = 1/2. To .85: pixel 1: P = 1, R = 1/2, F = 2/3.
    # Best: 0.75.
    probabilities = [0.055, 0.855, 0.055, 0.055, 0.055, 0.655, 0.055, 0.055, 0.055, 0.355]
    labels = torch.tensor([[[0, 0, 1, 0, 0, 0, 0, 1, 0, 0]]])
    figures = figures_of("edges", (edge_row(probabilities), labels))
    assert figures["ods_f"] == pytest.approx(0.75)
    # Without the pixels at .055 (0.005: below all thresholds) the best is 2/3.
    probabilities = [0.005 if p == 0.055 else p for p in probabilities]
    logits = edge_row(probabilities)
    figures = figures_of("edges", (logits, labels))
    assert figures["ods_f"] == pytest.approx(2 / 3)
    # Loss: both positives −ln 0.005; negatives: five of −ln 0.995 and −ln 0.145, −ln 0.345, −ln 0.645.
    negatives = (5 * math.log(0.995) + math.log(0.145) + math.log(0.345) + math.log(0.645)) / 8
    assert figures["loss"] == pytest.approx(-(math.log(0.005) + negatives) / 2)


def test_edges_radius_follows_the_diagonal():
    # 30 × 40 pixels: diagonal 50; 0.06 of it is a radius of 3. A prediction 3 pixels off the label in both directions
    # is right and found, one 4 pixels off is neither.
    labels = torch.zeros(1, 30, 40, dtype=torch.int64)
    labels[0, 10, 20] = 1
    for off, expected in ((3, 1.0), (4, 0.0)):
        logits = torch.full((1, 1, 30, 40), -20.0)
        logits[0, 0, 10 + off, 20 - off] = 20
        metric = EdgesMetric(tolerance=0.06)
        metric.update(logits, labels)
        assert metric.compute()["ods_f"] == expected


def test_edges_do_not_match_across_images():
    labels = torch.zeros(2, 5, 5, dtype=torch.int64)
    labels[0, 2, 2] = 1
    logits = torch.full((2, 1, 5, 5), -20.0)
    logits[1, 0, 2, 2] = 20
    assert figures_of("edges", (logits, labels))["ods_f"] == 0


def test_edges_are_not_found_by_unlabelled_pixels():
    # Pixel 0 is right and found; pixel 4 has only an unlabelled prediction near: P = 1, R = 1/2, F = 2/3.
    labels = torch.tensor([[[1, 0, 0, 0, 1, IGNORE_INDEX]]])
    logits = edge_row([0.9, 0.001, 0.001, 0.001, 0.001, 0.9])
    assert figures_of("edges", (logits, labels))["ods_f"] == pytest.approx(2 / 3)


def test_edges_in_an_image_without_any():
    figures = figures_of("edges", (torch.zeros(1, 1, 5, 5), torch.zeros(1, 5, 5, dtype=torch.int64)))
    assert math.isnan(figures["ods_f"])
    assert figures["loss"] == pytest.approx(math.log(2))


def test_edges_loss_is_that_of_the_split_as_one_batch():
    logits, labels = make_batch("edges")
    batches = [(logits[:1], labels[:1]), (logits[1:], labels[1:])]
    assert figures_of("edges", *batches)["loss"] == pytest.approx(balanced_bce(logits, labels).item())


def test_edges_tolerance_is_checked():
    with pytest.raises(ValueError, match="tolerance is -1; allowed: 0 or more"):
        EdgesMetric(tolerance=-1)


@pytest.mark.parametrize("channels", [1, 2])
def test_saliency_by_hand(channels):
    # Labels       1    1    1    0    0    0    ignored
    # Probability  .9   .7   .3   .8   .2   .1   .99
    # F = 1.3 · right / (0.3 · 3 + predicted). Threshold to .1: 3.9/6.9 = .565; to .2: 3.9/5.9 = .661; to .3: 3.9/4.9 =
    # .796; to .7: 2.6/3.9 = .667; to .8: 1.3/2.9; to .9: 1.3/1.9 = .684. Best: 3.9/4.9.
    # At 0.5: salient 2 right of 3 labelled and 3 predicted: 2/4. Background the same: 2/4.
    labels = torch.tensor([[[1, 1, 1, 0, 0, 0, IGNORE_INDEX]]])
    logits = edge_row([0.9, 0.7, 0.3, 0.8, 0.2, 0.1, 0.99])
    if channels == 2:
        logits = torch.cat([torch.full_like(logits, 5), logits + 5], 1)
    assert figures_of("saliency", (logits, labels)) == pytest.approx({"max_f": 3.9 / 4.9, "miou": 0.5})


def test_saliency_without_a_salient_pixel():
    figures = figures_of("saliency", (torch.full((1, 1, 2, 2), -9.0), torch.zeros(1, 2, 2, dtype=torch.int64)))
    assert math.isnan(figures["max_f"])
    assert figures["miou"] == 1


DIRECTIONS = {"depth": {"absolute_error": False, "delta_1.25": True}, "parts": {"miou": True}}
BASELINE = {"depth": {"absolute_error": 0.5, "delta_1.25": 0.8}, "parts": {"miou": 0.4}}


def test_delta_m_by_hand():
    # depth: error 0.4 against 0.5: +20 %; share 0.6 against 0.8: −25 %; mean −2.5 %. parts: 0.5 against 0.4: +25 %.
    # Δm = (−2.5 + 25) / 2 = 11.25 %.
    results = {"depth": {"absolute_error": 0.4, "delta_1.25": 0.6}, "parts": {"miou": 0.5}}
    assert delta_m(results, BASELINE, DIRECTIONS) == pytest.approx(11.25)
    assert delta_m(BASELINE, BASELINE, DIRECTIONS) == 0


@pytest.mark.parametrize(
    ("results", "baseline", "directions", "message"),
    [
        ({"edges": {"loss": 1}}, BASELINE, DIRECTIONS, "baseline lacks 'loss' of task 'edges'"),
        ({"parts": {"accuracy": 1}}, BASELINE, DIRECTIONS, "baseline lacks 'accuracy' of task 'parts'"),
        ({"parts": {"miou": 1}}, BASELINE, {}, "higher_is_better lacks 'miou' of task 'parts'"),
        ({"parts": {"miou": 1}}, {"parts": {"miou": 0}}, DIRECTIONS, "baseline of 'parts' has 'miou' = 0"),
        ({}, BASELINE, DIRECTIONS, "results are {}"),
        ({"parts": {}}, BASELINE, DIRECTIONS, "one figure or more"),
    ],
)
def test_delta_m_says_what_is_missing(results, baseline, directions, message):
    with pytest.raises(ValueError, match=message):
        delta_m(results, baseline, directions)
