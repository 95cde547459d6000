"""Domains of noise, a tiny SAM with an adapter, and the training loop that tests of learners share."""

import copy
import json
from dataclasses import dataclass

import torch
from conftest import IMAGE_SIZE, make_sam
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save

from peft_talora.continual.learners import LEARNERS
from peft_talora.continual.mask_loss import PointLoss
from peft_talora.continual.prompting import ask

QKV = r".*vision_encoder\.layers\.\d+\.attn\.qkv"


@dataclass
class Noise:
    """A domain of two batches of two images, by seed."""

    seed: int
    count: int = 2

    def __iter__(self):
        random = torch.Generator().manual_seed(self.seed)
        for index in range(self.count):
            x = torch.arange(IMAGE_SIZE) < 20 + 4 * self.seed + 2 * index
            yield {
                "pixel_values": torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=random),
                "boxes": torch.tensor([[[4.0, 4.0, 50.0, 60.0]]]).expand(2, 1, 4),
                "masks": x.expand(2, 1, IMAGE_SIZE, IMAGE_SIZE),
                "names": [f"{self.seed}-{index}-a", f"{self.seed}-{index}-b"],
                "prompt": "box",
                "step": 0,
            }


def make_learner(kind, config=None, init=0, **options):
    """A learner of the kind over a tiny SAM; `init` is the seed of the adapter's first values."""
    sam = make_sam()
    torch.manual_seed(init)
    model = get_peft_model(sam, config or LoraConfig(r=2, target_modules=QKV, lora_dropout=0.1)).train()

    def predict(batch):
        return model(**ask(batch, batch["prompt"])).pred_masks[:, :, 0]

    loss = PointLoss(100)
    return LEARNERS[kind](model, predict, lambda z, batch: loss(z, batch["masks"], batch["step"]), iter, **options)


def make_optimizer(learner):
    return torch.optim.AdamW(learner.parameters(), lr=0.02, weight_decay=0.1)


def step(learner, optimizer, batch):
    optimizer.zero_grad()
    loss = learner.loss(batch)
    loss.backward()
    optimizer.step()
    return loss.detach()


def learn(learner, *domains, first=0):
    """Learn domains, one step a batch; gives the losses of all steps."""
    losses = []
    for index, domain in enumerate(domains, start=first):
        learner.begin(index, domain)
        torch.manual_seed(index)  # of dropout
        optimizer = make_optimizer(learner)
        losses += [step(learner, optimizer, batch) for batch in domain]
        learner.end(index, domain)
    return torch.stack(losses)


def values(learner):
    """Of all parameters of the model, by name."""
    return {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}


def through_files(state):
    """A state as safetensors and JSON give it back."""
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    plain = {name: value for name, value in state.items() if name not in tensors}
    return json.loads(json.dumps(plain)) | load(save(tensors))


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name], name


def assert_resumes(kind, **options):
    """Two domains and a third one, whole and with a new process in the middle of the second and after it."""
    domains = [Noise(0), Noise(1), Noise(2)]
    whole = make_learner(kind, **options)
    expected = learn(whole, *domains)

    learner = make_learner(kind, **options)
    learn(learner, domains[0])
    learner.begin(1, domains[1])
    torch.manual_seed(1)
    optimizer = make_optimizer(learner)
    batches = list(domains[1])
    losses = [step(learner, optimizer, batches[0])]
    learner, optimizer = _anew(kind, learner, optimizer, **options)
    losses += [step(learner, optimizer, batch) for batch in batches[1:]]
    learner.end(1, domains[1])
    learner, _ = _anew(kind, learner, None, **options)
    losses += learn(learner, domains[2], first=2)
    assert torch.equal(torch.stack(losses), expected[2:])
    assert_equal(values(whole), values(learner))
    assert_equal(through_files(whole.state_dict()), through_files(learner.state_dict()))


def _anew(kind, old, optimizer, **options):
    """The learner and its optimizer, made anew from what is kept."""
    dropout = torch.get_rng_state()
    state, kept = through_files(old.state_dict()), [p.detach().clone() for p in old.trainable().values()]
    moments = copy.deepcopy(optimizer.state_dict()) if optimizer else None
    new = make_learner(kind, init=99, **options)
    new.load_state_dict(state)
    with torch.no_grad():
        for parameter, value in zip(new.trainable().values(), kept, strict=True):
            parameter.copy_(value)
    if optimizer:
        optimizer = make_optimizer(new)
        optimizer.load_state_dict(moments)
    torch.set_rng_state(dropout)
    return new, optimizer
