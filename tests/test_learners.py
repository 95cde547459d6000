"""Ways to learn a stream of domains: what they add to sequential tuning, and that they can be resumed."""

import pytest
import torch
import torch.nn.functional as F
from learner_cases import (
    QKV,
    Noise,
    assert_equal,
    assert_resumes,
    learn,
    make_learner,
    make_optimizer,
    step,
    through_files,
    values,
)
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES

from peft_talora.continual.learners import LEARNERS, Learner
from peft_talora.continual.learners.learner import evaluating, single_images
from peft_talora.continual.learners.lwf import TEMPERATURE, swapped

NO_DROPOUT = LoraConfig(r=2, target_modules=QKV)
KINDS = pytest.mark.parametrize("kind", LEARNERS)


def test_kinds_have_their_names():
    assert list(LEARNERS) == ["sequential", "joint", "lwf", "ewc", "er", "o-lora"]
    assert [kind for kind, learner in LEARNERS.items() if learner.at_once] == ["joint"]
    assert all(issubclass(learner, Learner) for learner in LEARNERS.values())


@KINDS
def test_resumed_in_the_middle_of_a_domain_it_goes_on_bit_for_bit(kind):
    assert_resumes(kind, seed=3, **({"size": 3} if kind == "er" else {}))


@KINDS
def test_two_runs_are_equal(kind):
    one, two = (make_learner(kind) for _ in range(2))
    assert torch.equal(learn(one, Noise(0), Noise(1)), learn(two, Noise(0), Noise(1)))
    assert_equal(values(one), values(two))


@pytest.mark.parametrize(
    ("kind", "options"), [("joint", {}), ("ewc", {"strength": 0}), ("lwf", {"strength": 0}), ("er", {"size": 0})]
)
def test_without_its_own_part_it_is_sequential_bit_for_bit(kind, options):
    plain, other = make_learner("sequential"), make_learner(kind, **options)
    domains = [Noise(0), Noise(1), Noise(2)]
    assert torch.equal(learn(plain, *domains), learn(other, *domains))
    assert_equal(values(plain), values(other))


@KINDS
def test_the_first_domain_is_learnt_as_by_sequential(kind):
    plain, other = make_learner("sequential"), make_learner(kind)
    assert torch.equal(learn(plain, Noise(0)), learn(other, Noise(0)))
    assert_equal(values(plain), values(other))


@pytest.mark.parametrize("kind", ["lwf", "ewc", "er", "o-lora"])
def test_the_second_one_is_not(kind):
    plain, other = make_learner("sequential"), make_learner(kind)
    assert not torch.equal(learn(plain, Noise(0), Noise(1)), learn(other, Noise(0), Noise(1)))


@KINDS
def test_the_base_stays(kind):
    learner = make_learner(kind)
    before = values(learner)
    learn(learner, Noise(0), Noise(1))
    after = values(learner)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert all("lora_" in name for name in learner.trainable())


@pytest.mark.parametrize("kind", ["sequential", "joint", "lwf", "ewc", "er"])
def test_a_decoder_that_is_tuned_is_learnt_too(kind):
    """Among its parameters are some that the loss of one mask does not use."""
    config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=["mask_decoder"])
    learner = make_learner(kind, config=config)
    losses = learn(learner, Noise(0), Noise(1))
    assert losses.isfinite().all()
    assert all("modules_to_save" in name for name in learner.trainable())
    learner.load_state_dict(through_files(learner.state_dict()))


@KINDS
def test_the_state_of_another_kind_is_refused(kind):
    learner = make_learner(kind)
    other = "ewc" if kind != "ewc" else "lwf"
    with pytest.raises(ValueError, match=f"state: is that of '{other}'; this learner is '{kind}'"):
        learner.load_state_dict({"kind": other})


def test_a_model_in_which_nothing_is_trained_is_refused():
    learner = make_learner("sequential")
    learner.model.requires_grad_(False)
    with pytest.raises(ValueError, match="model: none of its parameters is trainable"):
        learner.parameters()


# -- learning without forgetting


def test_lwf_adds_the_distance_to_the_model_before_the_domain():
    learner = make_learner("lwf", config=NO_DROPOUT, strength=0.7)
    learn(learner, Noise(0))
    batch = next(iter(Noise(1)))
    with torch.no_grad():
        teacher = torch.sigmoid(learner.predict(batch) / TEMPERATURE)
    learner.begin(1, Noise(1))
    assert torch.equal(learner.loss(batch), learner.task(batch)), "it is its own teacher at first"
    step(learner, make_optimizer(learner), batch)
    logits = learner.predict(batch)
    student = torch.sigmoid(logits / TEMPERATURE)
    divergence = teacher * (teacher / student).log() + (1 - teacher) * ((1 - teacher) / (1 - student)).log()
    assert divergence.mean() > 1e-5
    expected = learner.task(batch) + 0.7 * TEMPERATURE**2 * divergence.mean()
    torch.testing.assert_close(learner.loss(batch), expected, rtol=1e-4, atol=1e-6)


def test_lwf_keeps_closer_to_what_it_predicted():
    domain, batch, away = Noise(1), next(iter(Noise(1))), []
    for strength in (0.0, 100.0):
        learner = make_learner("lwf", config=NO_DROPOUT, strength=strength)
        learn(learner, Noise(0))
        with torch.no_grad():
            before = learner.predict(batch)
        learn(learner, domain, first=1)
        with torch.no_grad():
            away.append(F.mse_loss(learner.predict(batch), before).item())
    assert away[1] < 0.7 * away[0]


def test_the_teacher_goes_also_after_an_exception_and_has_no_dropout():
    learner = make_learner("lwf")
    learn(learner, Noise(0))
    learner.model.base_model.model.mask_decoder.eval()
    before, modes = values(learner), [module.training for module in learner.model.modules()]
    zeros = {name: torch.zeros_like(parameter) for name, parameter in learner.trainable().items()}

    def look_and_fail():
        with evaluating(learner.model), swapped(learner.trainable(), zeros):
            assert not any(parameter.any() for parameter in learner.parameters())
            assert not any(module.training for module in learner.model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        look_and_fail()
    assert_equal(before, values(learner))
    assert modes == [module.training for module in learner.model.modules()]


# -- elastic weight consolidation


def test_ewc_s_fisher_is_the_mean_square_of_gradients_by_image():
    learner = make_learner("ewc", config=NO_DROPOUT, gamma=0.5)
    domains = [Noise(0), Noise(1)]
    expected = None
    for index, domain in enumerate(domains):
        learn(learner, domain, first=index)
        squares = {name: torch.zeros_like(parameter) for name, parameter in learner.trainable().items()}
        for batch in domain:
            for image in single_images(batch):
                learner.model.zero_grad()
                learner.task(image).backward()
                for name, parameter in learner.trainable().items():
                    squares[name] += parameter.grad.square() / 4
        expected = {name: squares[name] + (0.5 * expected[name] if expected else 0) for name in squares}
    assert max(fisher.max() for fisher in learner.fisher.values()) > 1e-6
    for name, fisher in learner.fisher.items():
        torch.testing.assert_close(fisher, expected[name])
        assert torch.equal(learner.anchor[name], learner.trainable()[name])
    assert learner.penalty() == 0


def test_ewc_s_penalty_by_hand():
    learner = make_learner("ewc", config=NO_DROPOUT, strength=3.0)
    learn(learner, Noise(0))
    batch = next(iter(Noise(1)))
    name, parameter = next(iter(learner.trainable().items()))
    learner.fisher = {key: torch.zeros_like(value) for key, value in learner.fisher.items()}
    learner.fisher[name] += 0.25
    with torch.no_grad():
        parameter += 2
    expected = learner.task(batch) + 3 / 2 * 0.25 * 4 * parameter.numel()
    torch.testing.assert_close(learner.loss(batch), expected)


def test_measuring_leaves_gradients_alone():
    learner = make_learner("ewc")
    learner.begin(0, Noise(0))
    learner.end(0, Noise(0))
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_ewc_moves_less():
    away = []
    for strength in (0.0, 1e6):
        learner = make_learner("ewc", config=NO_DROPOUT, strength=strength)
        learn(learner, Noise(0))
        before = values(learner)
        important = make_learner("ewc", config=NO_DROPOUT)
        learn(important, Noise(0))
        learn(learner, Noise(1), first=1)
        after = values(learner)
        away.append(sum((f * (after[n] - before[n]).square()).sum().item() for n, f in important.fisher.items()))
    assert away[1] < 0.5 * away[0]


def test_ewc_refuses_other_parameters_and_empty_domains():
    learner, other = make_learner("ewc"), make_learner("ewc", config=LoraConfig(r=3, target_modules=QKV))
    learn(other, Noise(0))
    with pytest.raises(ValueError, match=r"state: fisher and model differ in '.*lora_A"):
        learner.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="gave no image"):
        learner.end(0, Noise(0, count=0))
    with pytest.raises(ValueError, match=r"gamma: got 1\.5"):
        make_learner("ewc", gamma=1.5)


# -- experience replay


def test_er_s_loss_is_the_mean_over_all_images():
    learner = make_learner("er", config=NO_DROPOUT, size=3)
    learner.end(0, Noise(0))
    large = next(iter(Noise(1)))
    batch = large | {
        name: torch.cat([large[name], large[name].flip(0)]) for name in ("pixel_values", "boxes", "masks")
    }
    random = torch.Generator()
    random.set_state(learner.generator.get_state())
    loss = learner.loss(batch)
    replayed = [learner.buffer[index] for index in torch.randperm(3, generator=random).tolist()]
    again = {name: torch.cat([image[name] for image in replayed]) for name in ("pixel_values", "boxes", "masks")}
    again |= {"prompt": "box", "step": 0}
    torch.testing.assert_close(loss, (4 * learner.task(batch) + 3 * learner.task(again)) / 7)


def test_er_keeps_whole_images_without_their_names():
    learner = make_learner("er", size=64)
    learner.end(0, Noise(0))
    assert learner.seen == len(learner.buffer) == 4
    expected = [image for batch in Noise(0) for image in single_images(batch)]
    for kept, image in zip(learner.buffer, expected, strict=True):
        assert kept.keys() == {"pixel_values", "boxes", "masks", "prompt", "step"}
        assert_equal(kept, image)


def test_every_image_has_the_same_chance_to_be_kept():
    """100 images of which 20 are kept, in 300 runs: each is kept 60 times, give or take 7."""
    kept = torch.zeros(100)
    learner = make_learner("er", size=20)
    for seed in range(300):
        learner.buffer, learner.seen = [], 0
        learner.generator.manual_seed(seed)
        for index in range(100):
            learner._offer({"pixel_values": torch.tensor([index])})
        found = torch.cat([image["pixel_values"] for image in learner.buffer])
        assert len(found) == len(found.unique()) == 20
        kept[found] += 1
    assert kept.min() > 60 - 4 * 7
    assert kept.max() < 60 + 4 * 7
    assert kept.view(2, 50).sum(1).sub(3000).abs().max() < 150


def test_er_refuses_wrong_sizes():
    with pytest.raises(ValueError, match="size: got -1"):
        make_learner("er", size=-1)
    large, small = make_learner("er", size=4), make_learner("er", size=3)
    large.end(0, Noise(0))
    with pytest.raises(ValueError, match="state: has 4 images; the buffer's size is 3"):
        small.load_state_dict(large.state_dict())


def test_er_refuses_images_that_cannot_be_mixed():
    learner = make_learner("er")
    learner.end(0, Noise(0))
    with pytest.raises(ValueError, match=r"gave {'prompt': 'none', 'step': 0} with an image, before"):
        learner.end(1, [batch | {"prompt": "none"} for batch in Noise(1)])


def test_parts_of_a_batch_are_the_images_or_hold_for_all_of_them():
    batch = next(iter(Noise(0)))
    for row, image in enumerate(single_images(batch | {"scale": 0.5, "flag": True, "nothing": None, "sizes": [1, 2]})):
        assert image.keys() == batch.keys() - {"names"} | {"scale", "flag", "nothing"}
        assert torch.equal(image["pixel_values"], batch["pixel_values"][row : row + 1])
        assert image["pixel_values"].data_ptr() != batch["pixel_values"][row : row + 1].data_ptr()
        assert (image["prompt"], image["scale"], image["flag"], image["nothing"]) == ("box", 0.5, True, None)
