import copy
import math
import pickle

import pytest
import torch
from torch import nn

from peft_talora.losses import IGNORE_INDEX
from peft_talora.metrics import Metric
from peft_talora.tasks import KINDS, Task, check_task_name, make_task
from peft_talora.tuner.config import check_task_names

B, H, W = 2, 3, 5
CHANNELS = {"segmentation": 6, "depth": 1, "normals": 3, "edges": 1, "saliency": 2, "parts": 7}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def good_label(task):
    """A label with both labelled pixels and others."""
    label = task.empty_label((H, W))
    if task.kind == "normals":
        label[2, 0] = -1
    else:
        label[0] = 1
    return label


def test_there_are_six_kinds():
    assert list(KINDS) == ["segmentation", "depth", "normals", "edges", "saliency", "parts"]


@EVERY_KIND
def test_loss_metric_decode_and_labels_fit_together(kind):
    task = make_task(kind, CHANNELS[kind])
    labels = torch.stack([good_label(task)] * B)
    logits = torch.randn(B, task.out_channels, H, W, generator=torch.Generator().manual_seed(0))
    metric = task.metric()
    metric.update(logits, labels)
    assert isinstance(metric, Metric)
    assert task.metric() is not metric
    assert task.loss(logits, labels).isfinite()
    assert all(math.isfinite(value) for value in metric.compute().values())
    assert task.decode(logits).shape == labels.shape
    assert labels.dtype == task.label_dtype


@EVERY_KIND
def test_labelled_pixels(kind):
    task = make_task(kind, CHANNELS[kind])
    labels = torch.stack([good_label(task)] * B)
    expected = torch.zeros(B, H, W, dtype=torch.bool)
    expected[:, 0] = True
    assert torch.equal(task.has_label(labels), expected)
    assert torch.equal(task.has_label(labels[0]), expected[0])


def test_not_a_number_is_no_label():
    assert make_task("depth", 1).has_label(torch.tensor([[math.nan, math.inf, 0, 1]])).tolist() == [
        [False] * 3 + [True]
    ]


@EVERY_KIND
def test_empty_label_counts_nowhere(kind):
    task = make_task(kind, CHANNELS[kind])
    label = task.empty_label((H, W))
    logits = torch.ones(1, task.out_channels, H, W)
    metric = task.metric()
    metric.update(logits, label[None])
    task.check_label(label, (H, W), "a.png")
    assert not task.has_label(label).any()
    assert task.loss(logits, label[None]) == 0
    assert all(math.isnan(value) for value in metric.compute().values())


@EVERY_KIND
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
def test_copies_are_equal(kind, copied):
    task = make_task("mine", CHANNELS[kind], kind)
    assert copied(task) == task
    assert hash(copied(task)) == hash(task)
    assert list(copied(task).metric().compute()) == list(task.metric().compute())
    assert task != make_task("other", CHANNELS[kind], kind)


@EVERY_KIND
def test_labels_of_another_size_are_refused(kind):
    task = make_task("mine", CHANNELS[kind], kind)
    task.check_label(good_label(task), (H, W), "a.png")
    with pytest.raises(ValueError, match=r"a.png: label of task 'mine' is .* allowed: \(.*4, 5\)"):
        task.check_label(good_label(task), (4, 5), "a.png")
    with pytest.raises(ValueError, match=r"is \(1, "):
        task.check_label(good_label(task)[None], (H, W), "a.png")


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("segmentation", 6, "a.png: label of task 'mine' holds 6; allowed: 0 to 5, and 255"),
        ("parts", -1, "holds -1; allowed: 0 to 6, and 255"),
        ("edges", 2, "holds 2; allowed: 0 to 1, and 255"),
        ("saliency", 254, "holds 254; allowed: 0 to 1, and 255"),
        ("depth", -0.5, "holds -0.5; allowed: finite metres above 0, and 0"),
        ("depth", math.nan, "holds nan"),
        ("depth", math.inf, "holds inf"),
        ("normals", 0.5, r"holds \[0.5, 0.5, 0.5\]; allowed: vectors of length 1, and the vector 0"),
        ("normals", math.nan, "holds .nan"),
    ],
)
def test_wrong_values_are_shown(kind, value, message):
    task = make_task("mine", CHANNELS[kind], kind)
    label = good_label(task)
    label[..., 1, 2] = value
    with pytest.raises(ValueError, match=message):
        task.check_label(label, (H, W), "a.png")


def test_normals_may_be_rounded():
    task = make_task("normals", 3)
    task.check_label(good_label(task) * 1.009, (H, W), "a.png")
    with pytest.raises(ValueError, match="vectors of length 1"):
        task.check_label(good_label(task) * 1.011, (H, W), "a.png")


def test_class_ids_are_integers_of_any_width():
    task = make_task("edges", 1)
    task.check_label(good_label(task).to(torch.uint8), (H, W), "a.png")
    with pytest.raises(ValueError, match=r"is of torch.float32; allowed: torch.int64"):
        task.check_label(good_label(task).float(), (H, W), "a.png")


def test_decoded_normals_have_length_1():
    logits = 9 * torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(make_task("normals", 3).decode(logits).norm(dim=1), torch.ones(B, H, W))


@pytest.mark.parametrize("channels", [1, 2])
def test_decoded_saliency_is_a_probability(channels):
    # 1 channel: sigmoid(ln 3) = 3/4. 2 channels, both ln 3: 1/2.
    logits = torch.full((B, channels, H, W), math.log(3))
    decoded = make_task("saliency", channels).decode(logits)
    torch.testing.assert_close(decoded, torch.full((B, H, W), 0.75 if channels == 1 else 0.5))


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind 'flow' of task 'motion' is none of segmentation, .* a Task can be"):
        make_task("motion", 2, "flow")
    with pytest.raises(ValueError, match="kind 'flow' of task 'flow'"):
        make_task("flow", 2)


@pytest.mark.parametrize(
    ("kind", "channels", "allowed"),
    [
        ("segmentation", 1, "2 to 255"),
        ("segmentation", 256, "2 to 255"),
        ("parts", 1, "2 to 255"),
        ("depth", 2, "1"),
        ("normals", 1, "3"),
        ("edges", 2, "1"),
        ("saliency", 3, "1 to 2"),
    ],
)
def test_wrong_channels_are_refused(kind, channels, allowed):
    with pytest.raises(ValueError, match=f"channels of task 'x' of kind '{kind}' is {channels}; allowed: {allowed}$"):
        make_task("x", channels, kind)


@pytest.mark.parametrize("name", ["", "two words", "2d", "a.b", "keys", "values", "get", "copy", "training"])
def test_names_that_cannot_be_a_module_are_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' cannot name a task; allowed are Python identifiers"):
        make_task(name, 1, "depth")


def accepts(check, value):
    """Whether a check raises no ValueError."""
    try:
        check(value)
    except ValueError:
        return False
    return True


def test_tasks_and_tuner_have_the_same_rule_for_names():
    good = [*KINDS, "main", "class", "_private", "Ärzte", "task_2", "name", "loss"]
    bad = ["", "two words", "2d", "a.b", "a-b", "depth ", None, 3, *dir(nn.ModuleDict()), *dir(nn.ParameterDict())]
    assert {"fromkeys", "setdefault", "_modules"} <= set(bad)
    for name in good + bad:
        assert accepts(check_task_name, name) == accepts(check_task_names, [name]) == (name in good), name


def l1(logits, labels):
    return (logits[:, 0] - labels).abs().mean()


def test_a_task_of_ones_own():
    depth = make_task("depth", 1)
    task = Task("height", "elevation", 1, l1, depth.metric, depth.decode)
    assert task.label_dtype == torch.int64
    assert (task.empty_label((H, W)) == IGNORE_INDEX).all()
    with pytest.raises(ValueError, match="out_channels of task 'height' is 0; allowed: 1 or more"):
        Task("height", "elevation", 0, l1, depth.metric, depth.decode)
