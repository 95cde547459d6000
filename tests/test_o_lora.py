"""O-LoRA: a LoRA for each domain, of which the earlier ones stay as they are."""

import pytest
import torch
from learner_cases import QKV, Noise, assert_equal, learn, make_learner, make_optimizer, step, values
from peft import LoraConfig

from peft_talora import TALoRAConfig


def test_a_new_domain_trains_its_own_lora_alone():
    learner = make_learner("o-lora")
    for index in range(3):
        before = values(learner)
        learner.begin(index, Noise(index))
        name = learner.names[-1]
        assert all(f".{name}." in key for key in learner.trainable())
        optimizer = make_optimizer(learner)
        for batch in Noise(index):
            step(learner, optimizer, batch)
        after = values(learner)
        assert all(torch.equal(before[key], after[key]) for key in before if f".{name}." not in key)
        assert any(not torch.equal(value, before.get(key, torch.zeros(()))) for key, value in after.items())
        learner.end(index, Noise(index))
        assert not learner.trainable()
    assert learner.names == ["default", "domain_1", "domain_2"]
    assert learner.model.base_model.active_adapters == learner.names


def test_a_new_domain_starts_as_the_last_one_ended():
    learner = make_learner("o-lora", config=LoraConfig(r=2, target_modules=QKV))
    batch = next(iter(Noise(0)))
    learn(learner, Noise(0), Noise(1))
    before = learner.predict(batch)
    learner.begin(2, Noise(2))
    torch.testing.assert_close(learner.predict(batch), before, rtol=1e-5, atol=1e-6)


def test_updates_of_all_domains_add():
    learner = make_learner("o-lora", config=LoraConfig(r=2, lora_alpha=4, target_modules=QKV))
    learn(learner, Noise(0), Noise(1))
    layer = learner.model.base_model.model.vision_encoder.layers[0].attn.qkv
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    total = sum(2 * layer.lora_B[name].weight @ layer.lora_A[name].weight for name in learner.names)
    expected = layer.base_layer(x) + x @ total.T
    torch.testing.assert_close(layer(x), expected)


def test_the_penalty_by_hand():
    learner = make_learner("o-lora", config=LoraConfig(r=2, target_modules=QKV), strength=0.5)
    learn(learner, Noise(0), Noise(1))
    learner.begin(2, Noise(2))
    expected = 0.0
    for block in learner.model.base_model.model.vision_encoder.layers:
        first, second, third = (block.attn.qkv.lora_A[name].weight for name in learner.names)
        expected += ((first @ third.T) ** 2).sum() + ((second @ third.T) ** 2).sum()
    torch.testing.assert_close(learner.penalty(), expected)
    batch = next(iter(Noise(2)))
    torch.testing.assert_close(learner.loss(batch), learner.task(batch) + 0.5 * expected)


def test_the_penalty_makes_rows_orthogonal():
    learner = make_learner("o-lora", strength=100.0)
    learn(learner, Noise(0))
    learner.begin(1, Noise(1))
    before, optimizer = learner.penalty().item(), make_optimizer(learner)
    for batch in Noise(1, count=10):
        step(learner, optimizer, batch)
    assert learner.penalty().item() < 0.1 * before


def test_further_loras_are_drawn_by_seed_and_leave_the_global_generator():
    drawn = []
    for seed in (0, 0, 1):
        learner = make_learner("o-lora", seed=seed)
        learner.begin(0, Noise(0))
        torch.manual_seed(len(drawn))
        state = torch.get_rng_state()
        learner.begin(1, Noise(1))
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append({key: value for key, value in values(learner).items() if "lora_A.domain_1" in key})
    assert_equal(drawn[0], drawn[1])
    assert not any(torch.equal(value, drawn[2][key]) for key, value in drawn[0].items())


def test_domains_come_in_order():
    learner = make_learner("o-lora")
    with pytest.raises(ValueError, match="domain_index: got 1; the next domain is 0"):
        learner.begin(1, Noise(0))


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="its adapter is TALORA; allowed is LORA"):
        make_learner("o-lora", config=TALoRAConfig(r=2, target_modules=QKV))
    with pytest.raises(ValueError, match=r"modules_to_save: got \['mask_decoder'\]; allowed is none"):
        make_learner("o-lora", config=LoraConfig(target_modules=QKV, modules_to_save=["mask_decoder"]))
    learner = make_learner("o-lora")
    learn(learner, Noise(0), Noise(1))
    with pytest.raises(ValueError, match="has the adapters default, domain_1; allowed is one"):
        type(learner)(learner.model, learner.predict, learner.task_loss, iter)


def test_states_of_other_models_are_refused():
    learner = make_learner("o-lora")
    learn(learner, Noise(0), Noise(1))
    state = learner.state_dict()
    with pytest.raises(ValueError, match="has begun already"):
        learner.load_state_dict(state)
    fewer = make_learner("o-lora", config=LoraConfig(r=2, target_modules=r".*layers\.0\.attn\.qkv"))
    with pytest.raises(ValueError, match=r"it and the model differ in '.*layers\.1\.attn\.qkv"):
        fewer.load_state_dict(state)
