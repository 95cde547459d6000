"""A model with an adapter per domain: what it gives each image, and what learning a domain leaves alone."""

import pytest
import torch
from conftest import make_sam
from moda_cases import NAMES, ask, make_images, make_moda, shake, upper_lora
from peft import LoraConfig

from peft_talora import MSamModel
from peft_talora.continual.kinds import KINDS, domain_config
from peft_talora.continual.moda import MoDAModel
from peft_talora.continual.queries import make_query

DEPTH = 4


def mixed_batch():
    names = ["bright", "dark", "striped", "dark", "bright"]
    return names, torch.cat([make_images(name, 1, seed) for seed, name in enumerate(names)])


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_is_the_domain_s_adapter_and_auto_is_the_oracle_where_it_is_right(kind):
    model = make_moda(kind)
    names, images = mixed_batch()
    auto, oracle = model(**ask(images)), model(**ask(images), route="oracle", domains=names)
    assert auto.domains == names == oracle.domains
    assert auto.scores is not None
    assert oracle.scores is None
    torch.testing.assert_close(auto.pred_masks, oracle.pred_masks, rtol=1e-5, atol=1e-5)
    for name in NAMES:
        rows = [row for row, other in enumerate(names) if other == name]
        model.adapters.activate(name)
        masks = model.base(**ask(images[rows])).pred_masks
        assert torch.equal(oracle.pred_masks[rows], masks)
        assert torch.equal(model(**ask(images[rows]), route=name).pred_masks, masks)
    model.adapters.activate(None)
    assert (oracle.pred_masks - model.base(**ask(images)).pred_masks).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["lora", "decoder"])
def test_a_mixed_batch_is_its_images_one_by_one_in_any_order(kind):
    model = make_moda(kind)
    names, images = mixed_batch()
    alone = torch.cat([model(**ask(image[None])).pred_masks for image in images])
    for seed in range(3):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        output = model(**ask(images[order]))
        assert output.domains == [names[row] for row in order]
        torch.testing.assert_close(output.pred_masks, alone[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_domain_is_the_plain_model(kind):
    model = make_moda(kind, names=NAMES[:2])
    images = make_images("striped", 2)
    plain = model(**ask(images), route="base").pred_masks
    model.add_domain("striped", domain_config(kind, model.base, r=4))
    assert torch.equal(model(**ask(images), route="base").pred_masks, plain)
    torch.testing.assert_close(model(**ask(images), route="striped").pred_masks, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_a_domain_changes_nothing_of_the_others(kind):
    model = make_moda(kind)
    images = make_images("dark", 2)
    before = {name: model(**ask(images), route=name).pred_masks for name in (*NAMES, "base")}
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = model.add_domain("late", domain_config(kind, model.base, r=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in parameters.values()}
    for _ in range(2):
        model(**ask(images), route="late").pred_masks.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(model(**ask(images), route="dark").pred_masks, before["dark"])  # in between, too
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in kept.items())
    model.end_learning()
    assert not any(p.requires_grad for p in model.parameters())
    for name, masks in before.items():
        assert torch.equal(model(**ask(images), route=name).pred_masks, masks), name
    assert (model(**ask(images), route="late").pred_masks - before["base"]).abs().max() > 1e-3


def test_what_is_learnt_goes_on_after_other_domains_were_asked():
    model = make_moda()
    learning = model.learn("dark")
    images = mixed_batch()[1]
    model(**ask(images))
    model.describe(images)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in learning.values()}
    model(**ask(images), route="dark").pred_masks.mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in learning.values())


def test_a_domain_that_could_not_be_added_leaves_no_trace():
    model = MoDAModel(make_sam())
    with pytest.raises(ValueError, match="bias"):
        model.add_domain("dark", LoraConfig(target_modules=["qkv"], bias="all"))
    assert model.domains == []
    assert model.adapters is None
    model.add_domain("dark", domain_config("talora", model.base))
    assert model.domains == ["dark"]


def test_removing_a_domain_leaves_the_rest_as_it_was():
    model = make_moda()
    images = make_images("dark", 2)
    before = {name: model(**ask(images), route=name).pred_masks for name in ("dark", "striped")}
    model.remove_domain("bright")
    assert model.domains == ["dark", "striped"]
    for name, masks in before.items():
        assert torch.equal(model(**ask(images), route=name).pred_masks, masks)
    assert set(model(**ask(mixed_batch()[1])).domains) <= {"dark", "striped"}
    for name in ("dark", "striped"):
        model.remove_domain(name)
    plain = make_sam().requires_grad_(False)(**ask(images)).pred_masks  # the last bits depend on it
    assert torch.equal(model(**ask(images), route="base").pred_masks, plain)
    assert sorted(model.base.state_dict()) == sorted(make_sam().state_dict())


def test_one_domain_is_enough():
    model = make_moda(names=["dark"])
    assert model(**ask(make_images("dark", 3))).domains == ["dark"] * 3


def passes(model, images, **route):
    blocks = []
    handles = [layer.register_forward_hook(lambda *_: blocks.append(1)) for layer in model.base.vision_encoder.layers]
    said = model(**ask(images), **route).encoder_passes
    for handle in handles:
        handle.remove()
    return said, len(blocks) / DEPTH


@pytest.mark.parametrize("query", ["mean_block(1)", "mean_neck", "gft_readonly"])
@pytest.mark.parametrize("kind", ["decoder", "hq"])
def test_one_pass_serves_query_and_masks_where_adapters_sit_in_the_decoder(kind, query):
    query = make_query(query, make_sam().config.vision_config)
    model, images = make_moda(kind, query=query), make_images("dark", 2)
    said, taken = passes(model, images)
    assert said.tolist() == [1, 1]
    assert taken == 1
    oracle = model(**ask(images), route="oracle", domains=["dark"] * 2)
    assert torch.equal(model(**ask(images)).pred_masks, oracle.pred_masks)


@pytest.mark.parametrize(("query", "blocks"), [("mean_block(1)", 2), ("gft_readonly", 4), ("gft_global", 4)])
def test_all_blocks_adapted_take_a_pass_after_the_query_unless_the_plain_model_is_meant(query, blocks):
    model = make_moda("lora", query=make_query(query, make_sam().config.vision_config))
    images = make_images("dark", 2)
    said, taken = passes(model, images)
    assert said.tolist() == [1 + blocks / DEPTH] * 2
    if query == "gft_global":  # reads the blocks' parts, not the blocks; there is nothing to go on from
        assert taken == 1
        return
    assert taken == 1 + blocks / DEPTH
    model.router.threshold = 1.0
    said, taken = passes(model, images)
    assert said.tolist() == [1, 1]
    assert taken == 1
    assert passes(model, images, route="dark")[1] == 1


def test_adapters_above_the_blocks_that_the_query_reads_go_on_from_there():
    sam = make_sam()
    query = make_query("gft_readonly", sam.config.vision_config, stop=2)
    model, images = make_moda(config=upper_lora(), query=query), make_images("dark", 2)
    said, taken = passes(model, images)
    assert said.tolist() == [1, 1]
    assert taken == 1
    auto, oracle = model(**ask(images)), model(**ask(images), route="oracle", domains=["dark"] * 2)
    assert torch.equal(auto.pred_masks, oracle.pred_masks)
    model.router.threshold = 1.0
    torch.testing.assert_close(model(**ask(images)).pred_masks, model(**ask(images), route="base").pred_masks)


@pytest.mark.parametrize("query", ["mean_block(1)", "mean_neck"])
def test_an_adapted_neck_is_not_passed_by(query):
    query = make_query(query, make_sam().config.vision_config)
    model = make_moda(config=LoraConfig(r=4, target_modules=["vision_encoder.neck.conv1"]), query=query)
    images = make_images("dark", 2)
    auto, oracle = model(**ask(images)), model(**ask(images), route="oracle", domains=["dark"] * 2)
    assert torch.equal(auto.pred_masks, oracle.pred_masks)
    assert (auto.pred_masks - model(**ask(images), route="base").pred_masks).abs().max() > 1e-3


def test_a_query_that_reads_adapted_blocks_reads_the_plain_model():
    query = make_query("gft_readonly", make_sam().config.vision_config)
    model, images = make_moda(config=upper_lora(), query=query), make_images("dark", 2)
    assert passes(model, images)[0].tolist() == [2, 2]  # all blocks to look, all blocks anew
    features = model.describe(images)
    assert torch.equal(features, model.query(make_sam().vision_encoder, images))
    model.adapters.activate("dark")
    assert torch.equal(model.describe(images), features)


def test_images_of_no_domain_go_to_the_plain_model():
    model = make_moda(fitted=False)
    model.fit_selector(quantile=0.01)
    names, images = mixed_batch()
    assert model(**ask(images)).domains == names
    strange = 20 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    output = model(**ask(strange))
    assert output.domains == ["base", "base"]
    assert torch.equal(output.pred_masks, model(**ask(strange), route="base").pred_masks)


def test_domains_are_routed_in_front_of_all_tasks_of_an_msam(sam_folder):
    tasks = {"segmentation": 3, "depth": 1}
    base = MSamModel.from_pretrained(sam_folder, tasks=tasks).eval()
    model = MoDAModel(base)
    for name in NAMES[:2]:
        model.add_domain(name, LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["task_heads.depth"]))
        shake(model, name)
        model.add_exemplars(name, make_images(name, 4))
    model.fit_selector()
    images = torch.cat([make_images("bright", 1, 7), make_images("dark", 2, 8)])
    output = model(images)
    assert output.domains == ["bright", "dark", "dark"]
    model.adapters.activate("dark")
    for task, logits in base(images[1:]).logits.items():
        assert torch.equal(output.logits[task][1:], logits)
    assert list(model(images, tasks=["depth"]).logits) == ["depth"]


@pytest.mark.parametrize("name", ["auto", "oracle", "base", "two words", "dark", "vision_encoder"])
def test_names_that_could_be_mistaken_are_refused(name):
    model = make_moda(names=["dark"])
    with pytest.raises(ValueError, match=name):
        model.add_domain(name, domain_config("lora", model.base))
    assert model.domains == ["dark"]


def test_what_is_missing_is_named():
    model = make_moda(fitted=False)
    images = make_images("dark", 2)
    with pytest.raises(ValueError, match="not fitted"):
        model(**ask(images))
    with pytest.raises(ValueError, match=r"`how` has .'night'"):
        model(**ask(images), route="night")
    with pytest.raises(ValueError, match="`domains` has 1 names"):
        model(**ask(images), route="oracle", domains=["dark"])
    with pytest.raises(ValueError, match="unknown domain 'night'"):
        model.learn("night")
    model.add_domain("late", domain_config("lora", model.base))
    with pytest.raises(ValueError, match="without exemplars: late"):
        model.fit_selector()
    with pytest.raises(ValueError, match="`resident` is 0"):
        MoDAModel(make_sam(), resident=0)
