"""Selectors choose by the exemplars alone, however they come, and know what they do not know."""

from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from peft_talora.continual.selectors import SELECTORS, held_out_scores, make_selector

D, K = 24, 5
CLOSED = ["ridge", "lda", "ncm"]


def draw(per_domain=10, domains=range(K), seed=0, spread=1.0):
    """Domains about means far apart, in an ellipsoid: most features say little, as those of a real encoder."""
    random = torch.Generator().manual_seed(100)
    means = 5 * torch.randn(20, D, generator=random)
    shape = torch.randn(D, D, generator=random) * torch.logspace(0, -1.5, D)
    noise = torch.Generator().manual_seed(seed)
    labels = torch.tensor(list(domains)).repeat_interleave(per_domain)
    features = means[labels] + spread * torch.randn(len(labels), D, generator=noise) @ shape.T + 30
    return features, labels


def fitted(kind, *args, num_domains=K, **options):
    selector = make_selector(kind, D, **options)
    selector.fit(*draw(*args), num_domains)
    return selector


@pytest.mark.parametrize("kind", SELECTORS)
def test_new_images_go_to_their_own_domain(kind):
    options = {"epochs": 80, "learning_rate": 3e-2} if kind == "linear_ce" else {}
    selector = fitted(kind, **options)
    assert selector.kind == kind
    features, labels = draw(50, seed=1)
    index, score = selector.predict(features)
    assert (index.dtype, score.dtype, index.shape, score.shape) == (torch.int64, torch.float32, (250,), (250,))
    assert (index == labels).float().mean() > 0.97
    assert not score.requires_grad


@pytest.mark.parametrize("kind", CLOSED)
def test_scores_of_unknown_domains_are_lower(kind):
    selector = fitted(kind)
    _, known = selector.predict(draw(50, seed=1)[0])
    _, unknown = selector.predict(draw(50, range(K, 2 * K), seed=2)[0])
    assert (known[:, None] > unknown).float().mean() > 0.95
    assert (known <= 0).all()


@pytest.mark.parametrize("kind", CLOSED)
def test_exemplars_may_come_in_any_parts_and_order(kind):
    features, labels = draw()
    at_once, bit_by_bit, shuffled = (make_selector(kind, D) for _ in range(3))
    at_once.fit(features, labels, K)
    for domain in range(K):  # as a stream has them
        of = labels == domain
        bit_by_bit.add(features[of], labels[of], domain + 1)
    for rows in torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split(7):
        shuffled.add(features[rows], labels[rows], K)
    new = draw(20, seed=1)[0]
    for other in (bit_by_bit, shuffled):
        for value, expected in zip(other.predict(new), at_once.predict(new), strict=True):
            assert_close(value, expected, rtol=1e-4, atol=1e-4)
        for name, buffer in at_once.named_buffers():
            assert_close(other.get_buffer(name), buffer, rtol=1e-4, atol=1e-8, msg=name)


@pytest.mark.parametrize("kind", SELECTORS)
def test_fitting_forgets_what_was_before(kind):
    selector, fresh = fitted(kind), fitted(kind, 4, range(2), num_domains=2)
    selector.fit(*draw(4, range(2)), 2)
    new = draw(20, seed=1)[0]
    for value, expected in zip(selector.predict(new), fresh.predict(new), strict=True):
        assert torch.equal(value, expected)


def test_ridge_is_regression_on_one_hot_labels():
    """Against least squares on rows added for the decay, with an intercept that is free of it."""
    features, labels = draw()
    selector = fitted("ridge", decay=0.1)
    x = features.double() - features.double().mean(0)
    y = torch.nn.functional.one_hot(labels).double()
    rows = (0.1 * x.square().sum() / D).sqrt() * torch.eye(D)
    weight = torch.linalg.lstsq(torch.cat([x, rows]), torch.cat([y - y.mean(0), torch.zeros(D, K)])).solution
    assert_close(selector.weight, weight)
    new = draw(20, seed=1)[0]
    expected = ((new.double() - features.double().mean(0)) @ weight + y.mean(0)).argmax(1)
    assert torch.equal(selector.predict(new)[0], expected)


@pytest.mark.parametrize("kind", ["lda", "ncm"])
def test_the_nearest_mean(kind):
    selector = fitted(kind)
    features, labels = draw()
    means = torch.stack([features[labels == k].double().mean(0) for k in range(K)])
    index, score = selector.predict(means)
    assert index.tolist() == list(range(K))
    assert_close(score, torch.zeros(K))
    if kind == "ncm":
        new = draw(20, seed=1)[0].double()
        assert torch.equal(selector.predict(new)[0], torch.cdist(new, means).argmin(1))


def test_scores_of_exemplars_are_about_minus_one_where_there_are_many():
    _, score = fitted("lda", 400).predict(draw(400)[0])
    assert -1.2 < score.mean() < -0.6


@pytest.mark.parametrize("kind", SELECTORS)
@pytest.mark.parametrize("per_domain", [1, 2, 10])
def test_one_domain(kind, per_domain):
    selector = make_selector(kind, D)
    selector.fit(*draw(per_domain, [0]), 1)
    index, score = selector.predict(torch.cat([draw(5, [0], seed=1)[0], draw(5, [3])[0]]))
    assert index.tolist() == [0] * 10
    assert score.isfinite().all()
    assert score[:5].min() > score[5:].max()


@pytest.mark.parametrize("kind", SELECTORS)
def test_a_domain_without_exemplars_is_never_chosen(kind):
    selector = make_selector(kind, D)
    features, labels = draw()
    others = labels != 2
    selector.fit(features[others], labels[others], K + 1)
    index, _ = selector.predict(torch.cat([features, torch.zeros(3, D), torch.full((3, D), -1e6)]))
    assert not torch.isin(index, torch.tensor([2, K])).any()


@pytest.mark.parametrize("kind", SELECTORS)
@pytest.mark.parametrize("num_domains", [1, K])
def test_the_state_goes_into_a_fresh_selector(kind, num_domains, tmp_path):
    selector = fitted(kind, 4, range(num_domains), num_domains=num_domains)
    save_file(selector.state_dict(), tmp_path / "selector.safetensors")
    new = draw(20, seed=1)[0]
    for other in (make_selector(kind, D), fitted(kind, 3, range(3), num_domains=3), deepcopy(selector)):
        other.load_state_dict(load_file(tmp_path / "selector.safetensors"))
        for value, expected in zip(other.predict(new), selector.predict(new), strict=True):
            assert torch.equal(value, expected)
    empty = make_selector(kind, D)
    empty.load_state_dict(make_selector(kind, D).state_dict())
    with pytest.raises(RuntimeError, match="no exemplars yet"):
        empty.predict(new)
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_selector(kind, D + 1).load_state_dict(selector.state_dict())


@pytest.mark.parametrize("kind", CLOSED)
def test_learning_goes_on_after_loading(kind):
    features, labels = draw()
    first = labels < 3
    selector, loaded = make_selector(kind, D), make_selector(kind, D)
    selector.fit(features[first], labels[first], 3)
    loaded.load_state_dict(selector.state_dict())
    loaded.add(features[~first], labels[~first], K)
    new = draw(20, seed=1)[0]
    for value, expected in zip(loaded.predict(new), fitted(kind).predict(new), strict=True):
        assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_the_linear_layer_depends_on_its_seed_alone():
    state = torch.random.get_rng_state()
    first, again, other = (fitted("linear_ce", seed=seed).weight for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@torch.no_grad()
def test_the_linear_layer_learns_without_gradients_around():
    untrained = fitted("linear_ce", epochs=1, learning_rate=0.0)
    trained = fitted("linear_ce")
    assert not torch.allclose(untrained.weight, trained.weight)
    assert not trained.weight.requires_grad


@pytest.mark.parametrize("kind", CLOSED)
def test_held_out_scores_are_of_selectors_that_have_not_seen_them(kind):
    features, labels = draw(6)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    features, labels = features[order], labels[order]
    selector = make_selector(kind, D)
    scores = held_out_scores(selector, features, labels, folds=3)
    assert not selector.counts.any()
    out = torch.zeros(len(labels), dtype=torch.bool)
    for k in range(K):  # the second fold: every third of each domain
        out[(labels == k).nonzero()[1::3]] = True
    selector.fit(features[~out], labels[~out], K)
    assert torch.equal(scores[out], selector.predict(features[out])[1])
    selector.fit(features, labels, K)
    assert (scores < selector.predict(features)[1]).all()


def test_held_out_scores_where_folds_outnumber_exemplars():
    assert held_out_scores(make_selector("ridge", D), *draw(2), folds=5).isfinite().all()


@pytest.mark.parametrize(
    ("per_domain", "domains", "folds", "message"),
    [
        (5, range(K), 1, "`folds` is 1"),
        (1, range(K), 5, r"have \[1, 1, 1, 1, 1\] exemplars"),
        (5, [0, 2], 5, r"\[5, 0, 5\]"),
        (0, [0], 5, r"\[\]"),
    ],
)
def test_too_few_to_leave_some_out(per_domain, domains, folds, message):
    with pytest.raises(ValueError, match=message):
        held_out_scores(make_selector("ridge", D), *draw(per_domain, domains), folds=folds)


def test_wrong_exemplars_are_refused():
    selector, (features, labels) = make_selector("ridge", D), draw()
    with pytest.raises(ValueError, match=r"features are \(50, 23\).*allowed: \(N, 24\)"):
        selector.fit(features[:, 1:], labels, K)
    with pytest.raises(ValueError, match=r"labels \(49,\)"):
        selector.fit(features, labels[1:], K)
    with pytest.raises(ValueError, match="labels are 0 to 4; allowed of 4 domains: 0 to 3"):
        selector.fit(features, labels, K - 1)
    with pytest.raises(ValueError, match="labels are -1"):
        selector.add(features, labels - 1, K)
    broken = features.clone()
    broken[7, 3] = torch.nan
    with pytest.raises(ValueError, match="exemplar 7 are not finite"):
        selector.add(broken, labels, K)
    with pytest.raises(RuntimeError, match="no exemplars yet"):  # nothing of these was learned
        selector.predict(features)
    selector.fit(features, labels, K)
    with pytest.raises(ValueError, match=r"features are \(24,\); allowed: \(B, 24\)"):
        selector.predict(features[0])


def test_wrong_selectors_are_refused():
    with pytest.raises(ValueError, match="`kind` is 'knn'; allowed: 'ridge', 'lda', 'ncm', 'linear_ce'"):
        make_selector("knn", D)
    with pytest.raises(ValueError, match="`width` is 0"):
        make_selector("ridge", 0)
    with pytest.raises(ValueError, match="`decay` is 0"):
        make_selector("ridge", D, decay=0)
    with pytest.raises(ValueError, match="`epochs` is 0"):
        make_selector("linear_ce", D, epochs=0)
