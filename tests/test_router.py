"""Routes: each image to its domain, to one that is named, or to the plain model."""

import pytest
import torch
from test_selectors import K, draw

from peft_talora.continual.router import BASE, ROUTES, Router, Routing
from peft_talora.continual.selectors import make_selector

NAMES = ["pits", "rails", "pills", "bottles", "polyps"]


def make_router(kind="ridge", names=NAMES):
    features, labels = draw()
    router = Router(make_selector(kind, features.shape[1]))
    router.fit(features, labels, names)
    return router


def test_automatically_by_the_selector():
    router, (features, labels) = make_router(), draw(20, seed=1)
    routing = router.route(features)
    index, scores = router.selector.predict(features)
    assert routing.names == [NAMES[i] for i in index]
    assert torch.equal(routing.scores, scores)
    assert sum(name == NAMES[i] for name, i in zip(routing.names, labels, strict=True)) > 95
    assert routing.names == router.route(features, "auto").names


def test_a_permutation_of_images_permutes_the_routes():
    router, features = make_router(), draw(4, seed=1)[0]
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    names = router.route(features).names
    assert router.route(features[order]).names == [names[i] for i in order]
    assert [router.route(row[None]).names[0] for row in features] == names


def test_routes_that_ask_nobody():
    router, features = make_router(), draw(1)[0]
    own = ["rails", BASE, "pits", "pits", "polyps"]
    assert router.route(features, "oracle", own) == Routing(own)
    assert router.route(features, "pills") == Routing(["pills"] * 5)
    assert router.route(features, "base") == Routing([BASE] * 5)


def test_without_domains_all_go_to_the_plain_model():
    router = Router(make_selector("ridge", 24))
    assert router.route(draw(1)[0]) == Routing([BASE] * 5)


@pytest.mark.parametrize("kind", ["ridge", "lda"])
@pytest.mark.parametrize("quantile", [0.05, 0.2])
def test_the_threshold_holds_back_what_no_domain_knows(kind, quantile):
    router, (features, labels) = make_router(kind), draw()
    scores = router.calibrate(quantile, features, labels)
    assert (scores < router.threshold).float().mean() <= quantile
    known, unknown = (
        router.route(draw(100, domains, seed=1)[0]).names.count(BASE) / 500 for domains in (range(K), range(K, 2 * K))
    )
    assert known < 2 * quantile
    assert unknown > 0.9


def test_the_threshold_itself_is_known():
    router, features = make_router(), draw(1)[0]
    scores = router.route(features).scores
    router.threshold = scores.min().item()
    assert BASE not in router.route(features).names
    router.threshold = scores.max().item()
    assert router.route(features).names.count(BASE) == 4
    assert torch.equal(router.route(features).scores, scores)


def test_fitting_anew_voids_the_threshold():
    router = make_router()
    router.calibrate(0.05, *draw())
    router.fit(*draw(domains=range(2)), NAMES[:2])
    assert router.threshold is None
    assert router.domains == NAMES[:2]


def test_one_domain():
    router = Router(make_selector("ridge", 24))
    router.fit(*draw(10, [0]), ["rails"])
    router.calibrate(0.05, *draw(10, [0]))
    assert router.route(draw(20, [0], seed=1)[0]).names.count("rails") > 15
    assert router.route(draw(20, [1], seed=1)[0]).names.count(BASE) == 20


@pytest.mark.parametrize("name", [*ROUTES, "two words", "a.b", "", "3d"])
def test_names_that_are_no_domain_s_are_refused(name):
    with pytest.raises(ValueError, match="allowed is an identifier that is none of auto, oracle, base"):
        Router(make_selector("ridge", 24), ["rails", name])
    router = make_router()
    with pytest.raises(ValueError, match="allowed is an identifier"):
        router.fit(*draw(), [*NAMES[:4], name])
    assert router.domains == NAMES


def test_wrong_calls_are_refused():
    router, features = make_router(), draw(1)[0]
    with pytest.raises(ValueError, match=r"`how` has \['snow'\]; allowed: 'auto', 'oracle', 'base' and \['pits'"):
        router.route(features, "snow")
    with pytest.raises(ValueError, match=r"`domains` has \['snow'\]; allowed: 'base' and \['pits'"):
        router.route(features, "oracle", ["snow", *NAMES[:4]])
    with pytest.raises(ValueError, match="has 2 names; 5 images"):
        router.route(features, "oracle", NAMES[:2])
    for how, domains in (("oracle", None), ("auto", NAMES), ("rails", NAMES)):
        with pytest.raises(ValueError, match="'oracle' needs them, and no other route"):
            router.route(features, how, domains)
    with pytest.raises(ValueError, match="allowed: each name once"):
        Router(make_selector("ridge", 24), ["rails", "rails"])
    for quantile in (0, 1):
        with pytest.raises(ValueError, match=f"`quantile` is {quantile}"):
            router.calibrate(quantile, *draw())
