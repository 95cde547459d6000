"""Weightings: each against its formula, worked out by hand on two tasks; its state; tasks without labels.

Two quadratic losses of two shared parameters x, at x = (2, 0):

    L_1 = ½ |x|² = 2, ∇L_1 = (2, 0),        L_2 = ½ |x − (3, −1)|² = 1, ∇L_2 = (−1, 1)
"""

import copy
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_talora.weighting import (
    AGGREGATORS,
    FAMO,
    LOSS_WEIGHTINGS,
    WEIGHTINGS,
    DualBalancing,
    DynamicAverage,
    GradNorm,
    LossWeighting,
    Numbers,
    make_weighting,
    square_root,
)

TASKS = ["a", "b"]
BOTH = torch.tensor([0, 1])
LOSSES = torch.tensor([2.0, 1.0], dtype=torch.float64)
GRADIENTS = torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)


def combine(weighting, losses=LOSSES, gradients=GRADIENTS, step=0):
    return weighting.combine(losses, gradients, BOTH, step)


def assert_close(value, expected, **tolerance):
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), **tolerance)


def test_equal_and_fixed_weights():
    assert_close(make_weighting("equal", TASKS).weights(3), [1.0, 1.0])
    assert_close(make_weighting("fixed", TASKS, {"b": 4.0, "a": 1.0}).weights(3), [1.0, 4.0])


def test_random_weights_are_of_seed_and_step_and_average_to_one():
    weighting = make_weighting("rlw", TASKS, seed=5)
    drawn = torch.stack([weighting.weights(step) for step in range(2000)])
    assert (drawn > 0).all()
    assert_close(drawn.sum(1), [2.0] * 2000)
    assert_close(drawn.mean(0), [1.0, 1.0], atol=0.05, rtol=0)
    state = torch.get_rng_state()
    assert torch.equal(make_weighting("rlw", TASKS, seed=5).weights(7), drawn[7])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(make_weighting("rlw", TASKS, seed=6).weights(7), drawn[7])


def test_dynamic_average_weighs_by_the_ratio_of_two_epochs():
    weighting = DynamicAverage(TASKS)
    for epoch, losses in enumerate(([4.0, 2.0], [2.0, 1.8])):
        for spread in (-0.5, 0.5):
            assert_close(weighting.weights(0, epoch), [1.0, 1.0])
            weighting.note(torch.tensor(losses, dtype=torch.float64) + spread, BOTH, epoch)
    first, second = math.exp(0.5 / 2), math.exp(0.9 / 2)
    expected = [2 * first / (first + second), 2 * second / (first + second)]
    assert_close(weighting.weights(0, 2), expected)
    weighting.note(LOSSES, BOTH, 2)
    assert_close(weighting.weights(1, 2), expected)


def test_a_task_without_labels_in_an_epoch_has_a_ratio_of_one():
    weighting = DynamicAverage(TASKS)
    weighting.note(LOSSES, BOTH, 0)
    weighting.note(LOSSES[:1] / 2, BOTH[:1], 1)
    assert_close(weighting.weights(0, 2), (2 * torch.tensor([0.5, 1.0]).double().div(2).softmax(0)).tolist())


@pytest.mark.parametrize(
    ("kind", "objective", "optimum"),
    [
        ("uncertainty", lambda s: ((-s).exp() * LOSSES + s).sum() / 2, [0.25, 0.5]),
        ("imtl-l", lambda s: (s.exp() * LOSSES - s).sum(), [0.5, 1.0]),
    ],
)
def test_learnt_weights_follow_the_objective_s_derivative_to_its_minimum(kind, objective, optimum):
    weighting = make_weighting(kind, TASKS)
    s = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=1e-2)
    for step in range(600):
        adam.zero_grad()
        objective(s).backward()
        adam.step()
        weighting.note(LOSSES, BOTH, 0)
        if step == 2:
            assert_close(weighting.numbers.values_T, s.tolist())
    assert_close(weighting.weights(0), optimum, rtol=1e-3, atol=0)


def test_the_geometric_loss_has_the_gradient_of_the_geometric_mean():
    x = torch.tensor([2.0, 0.0], dtype=torch.float64, requires_grad=True)
    losses = torch.stack([x.square().sum() / 2, (x - torch.tensor([3.0, -1.0])).square().sum() / 2])
    losses.prod().sqrt().backward()
    gradient, own = combine(make_weighting("gls", TASKS))
    assert_close(gradient, x.grad.tolist())
    assert_close(own, [math.sqrt(2) / 4, math.sqrt(2) / 2])


def test_famo_weighs_logarithms_and_learns_from_how_they_fall():
    """At first z = (½, ½), so that w = (¼, ½) / ¾. Then the first loss falls by a factor e, the second stays."""
    weighting = FAMO(TASKS)
    gradient, own = combine(weighting)
    assert_close(own, [1 / 3, 2 / 3])
    assert_close(gradient, [2 / 3 - 2 / 3, 2 / 3])
    learnt = []
    weighting.numbers.learn = lambda gradient, labelled: learnt.append(gradient)
    weighting.note_after(torch.tensor([2 / math.e, 1.0], dtype=torch.float64), BOTH)
    assert_close(learnt[0], [0.5 * (1 - 0.5), 0.5 * (0 - 0.5)])  # z (δ − z · δ): the first's share falls


def test_gradnorm_moves_weights_towards_the_lagging_task():
    """|∇L| = (2, √2), both have their first loss: the aim is the mean (2 + √2) / 2 of both, so 1 falls and 2 rises."""
    weighting = GradNorm(TASKS, learning_rate=0.1)
    gradient, own = combine(weighting)
    assert_close(own, [1.0, 1.0])
    assert_close(gradient, [1.0, 1.0])
    assert weighting.numbers.values_T[0] == pytest.approx(0.9, abs=1e-6)
    assert weighting.numbers.values_T[1] == pytest.approx(1.1, abs=1e-6)
    # Then the first task has half of its first loss, the second all: the aim is (½, 1) / ¾ to the power of 1.5.
    before = weighting.numbers.values_T.clone()
    norms = GRADIENTS.norm(dim=1)
    aim = (before * norms).mean() * (torch.tensor([0.5, 1.0]).double() / 0.75) ** 1.5
    expected = norms * (before * norms - aim).sign()
    learnt = []
    weighting.numbers.learn = lambda gradient, labelled: learnt.append(gradient)
    combine(weighting, losses=torch.tensor([1.0, 1.0], dtype=torch.float64))
    assert_close(learnt[0], expected.tolist())


def test_dual_balancing_scales_moving_means_to_the_longest():
    """Of logarithms the gradients are (1, 0) and (−1, 1): lengths 1 and √2."""
    weighting = DualBalancing(TASKS, decay=0.5)
    gradient, own = combine(weighting)
    assert_close(own, [0.5, 1.0])
    assert_close(gradient, [math.sqrt(2) - 1, 1.0])
    # With losses (1, 1), gradients of logarithms are (2, 0), (−1, 1), and their means (1.5, 0) and (−1, 1).
    gradient, _ = combine(weighting, losses=torch.ones(2, dtype=torch.float64))
    assert_close(gradient, [1.5 - 1.5 / math.sqrt(2), 1.5 / math.sqrt(2)])
    gradient, _ = combine(DualBalancing(TASKS, decay=0.0))
    assert_close(gradient, [math.sqrt(2) - 1, 1.0])
    with pytest.raises(ValueError, match=r"`decay` is 1.0; allowed"):
        DualBalancing(TASKS, decay=1.0)


def aligned():
    """Smallest singular value times the mean row of U Vᵀ (arXiv:2305.19000, equation 12)."""
    U, S, Vh = torch.linalg.svd(GRADIENTS, full_matrices=False)
    return (S.min() * U @ Vh).mean(0).tolist()


def conflict_averse(c=0.4):
    """g_0 + c |g_0| g_w / |g_w|, w of the simplex at the least g_w · g_0 + c |g_0| |g_w| (arXiv:2110.14048, eq. 4)."""
    mean = GRADIENTS.mean(0)
    shares = torch.linspace(0, 1, 100001, dtype=torch.float64)
    candidates = shares[:, None] * GRADIENTS[0] + (1 - shares)[:, None] * GRADIENTS[1]
    best = candidates[(candidates @ mean + c * mean.norm() * candidates.norm(dim=1)).argmin()]
    return (mean + c * mean.norm() * best / best.norm()).tolist()


@pytest.mark.parametrize(
    ("kind", "expected", "tolerance"),
    [
        # Each without its part against the other: (2, 0) + (−1, 1) and (−1, 1) + (1, 0).
        ("pcgrad", lambda: [1.0, 2.0], 1e-6),
        # Their mean: the same projections.
        ("upgrad", lambda: [0.5, 1.0], 1e-3),
        # The shortest in the hull: 0.4 (2, 0) + 0.6 (−1, 1).
        ("mgda", lambda: [0.2, 0.6], 1e-6),
        ("aligned-mtl", aligned, 1e-6),
        ("cagrad", conflict_averse, 2e-3),
    ],
)
def test_torchjd_s_weightings_are_their_papers(kind, expected, tolerance):
    gradient, own = combine(make_weighting(kind, TASKS))
    assert_close(gradient, expected(), atol=tolerance, rtol=0)
    assert_close(own, [1.0, 1.0])


def test_nash_s_weights_solve_the_bargaining_equation():
    """J Jᵀ α = 1 / α, up to the scale of the gradients (arXiv:2202.01017, claim 3.1)."""
    gradients = torch.tensor([[2.0, 0.0], [-1.0, 2.0]], dtype=torch.float64)
    gradient, _ = combine(make_weighting("nash-mtl", TASKS), gradients=gradients)
    alpha = torch.linalg.solve(gradients.T, gradient)
    assert (alpha > 0).all()
    products = alpha * (gradients @ gradients.T @ alpha)
    assert_close(products / products.mean(), [1.0, 1.0], atol=1e-2, rtol=0)


def test_a_square_root_has_the_inner_products():
    rows = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    root = square_root(rows @ rows.T)
    torch.testing.assert_close(root @ root.T, rows @ rows.T)


@pytest.mark.parametrize("kind", AGGREGATORS)
def test_torchjd_s_weightings_repeat_by_seed_and_step(kind):
    drawn = torch.Generator().manual_seed(1)
    gradients = torch.randn(3, 6, dtype=torch.float64, generator=drawn)
    losses, labelled = torch.ones(3, dtype=torch.float64), torch.arange(3)
    weighting = make_weighting(kind, ["a", "b", "c"], seed=1)
    state = torch.get_rng_state()
    found, _ = weighting.combine(losses, gradients, labelled, 4)
    assert torch.equal(torch.get_rng_state(), state)
    weighting.combine(losses, gradients.flip(0), labelled, 5)
    again, _ = weighting.combine(losses, gradients, labelled, 4)
    assert torch.equal(found, again)
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_a_restored_weighting_goes_on_as_the_first_one(kind, tmp_path):
    def steps(weighting, begin, end):
        found = []
        for step in range(begin, end):
            drawn = torch.Generator().manual_seed(step)
            losses = torch.rand(2, dtype=torch.float64, generator=drawn) + 0.5
            if isinstance(weighting, LossWeighting):
                found.append(weighting.weights(step))
            else:
                gradients = torch.randn(2, 5, dtype=torch.float64, generator=drawn)
                found += weighting.combine(losses, gradients, BOTH, step)
            weighting.note(losses, BOTH, step // 2)
            if isinstance(weighting, FAMO):
                weighting.note_after(0.9 * losses, BOTH)
        return found

    given = {"a": 1.0, "b": 2.0}
    whole = make_weighting(kind, TASKS, given, seed=1)
    steps(whole, 0, 5)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    restored = make_weighting(kind, TASKS, given, seed=1)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for value, expected in zip(steps(restored, 5, 9), steps(whole, 5, 9), strict=True):
        assert torch.equal(value, expected)
        assert value.isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in WEIGHTINGS if kind not in LOSS_WEIGHTINGS])
def test_one_labelled_task_of_three_goes_downhill(kind):
    """Its gradient has the direction of its own loss, whatever the others have been before."""
    weighting = make_weighting(kind, ["a", "b", "c"])
    drawn = torch.Generator().manual_seed(0)
    gradients = torch.randn(3, 5, dtype=torch.float64, generator=drawn)
    weighting.combine(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), gradients, torch.arange(3), 0)
    gradient, own = weighting.combine(LOSSES[:1], gradients[1:2], torch.tensor([1]), 1)
    assert torch.cosine_similarity(gradient, gradients[1], dim=0) == pytest.approx(1)
    assert own.shape == (1,)
    assert own > 0


def test_numbers_of_other_tasks_have_no_gradient():
    numbers = Numbers(torch.zeros(3, dtype=torch.float64), learning_rate=0.1)
    numbers.learn(torch.tensor([2.0], dtype=torch.float64), torch.tensor([1]))
    assert_close(numbers.values_T, [0.0, -0.1, 0.0], atol=1e-6, rtol=0)


def test_unknown_kinds_no_tasks_and_foreign_states_are_refused():
    with pytest.raises(ValueError, match="weighting is 'fair'; allowed: equal, fixed, uncertainty"):
        make_weighting("fair", TASKS)
    with pytest.raises(ValueError, match="at least one"):
        make_weighting("equal", [])
    weighting = copy.deepcopy(make_weighting("gls", TASKS))
    with pytest.raises(ValueError, match=r"state has \['s'\]; GeometricLoss has none"):
        weighting.load_state_dict({"s": 1})


def test_without_torchjd_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchjd.aggregation", None)
    with pytest.raises(ImportError, match=r"pip install 'peft_talora\[balancing\]'"):
        make_weighting("pcgrad", TASKS)


@pytest.mark.parametrize("kind", ["gls", "famo", "gradnorm"])
def test_gradients_may_be_on_an_accelerator(kind):
    """Losses and what is learnt are on the CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weighting = make_weighting(kind, TASKS)
        labelled_S = torch.tensor([0, 1])
        gradient_N, own_S = weighting.combine(LOSSES.clone(), torch.ones(2, 5, device="cuda"), labelled_S, 0)
    assert (gradient_N.device.type, own_S.device.type) == ("cuda", "cpu")
