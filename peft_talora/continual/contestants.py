"""From a base and two words, how to learn and what to plug in, to what a recipe trains and asks.

Axes: B images, P masks of each, h w of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, SamHQModel, SamModel

from .adapters import adapter_parameters
from .hq import correct_decoder, make_sam_hq
from .kinds import domain_config
from .learners import LEARNERS, Learner
from .learners.moda import MoDA
from .measuring import Answer
from .moda import AUTO, MoDAModel
from .prompting import ask
from .queries import make_query

METHODS = (MoDA.kind, *LEARNERS)
Loss = Callable[[Tensor, Mapping[str, Any]], Tensor]
Batches = Callable[[Any], Iterable[Mapping[str, Any]]]


@dataclass(frozen=True)
class Contestant:
    """One way to learn a stream with one kind of adapter.

    Attributes:
        learner: What trains.
        moda: The model of MoDA; None with the others.
        answer: (arguments of a call, route, domain of the images) → `Answer`; both words are MoDA's alone.
        zero_shot: Arguments of a call → what the model says without any adapter.
        own_parameters: Number of parameters of a domain; where one adapter serves all, its number.
    """

    learner: Learner
    moda: MoDAModel | None
    answer: Callable[..., Answer]
    zero_shot: Callable[[Mapping[str, Any]], Answer]
    own_parameters: Callable[[], int]


def check_choice(method: str, adapter: str) -> None:
    """Raise ValueError for an unknown method, or one that does not go with the kind of adapter."""
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}; allowed: {', '.join(METHODS)}.")
    if method == "o-lora" and adapter != "lora":
        raise ValueError(f"`adapter` is {adapter!r}; with 'o-lora' allowed: 'lora'.")


def default_rate(method: str, adapter: str) -> float:
    """Where to start tuning the learning rate, for AdamW: the best one on the generated stream's validation images.

    `recipes/benchmark_continual.py` found them, for all methods with LoRA and for MoDA with all kinds of adapters.
    """
    if adapter == "decoder":
        return 1e-3
    return {"moda": 1e-2, "lwf": 3e-4}.get(method, 3e-3)


def load_base(name: str, adapter: str) -> PreTrainedModel:
    """A promptable model from a checkpoint of SAM, or of SAM-HQ.

    Args:
        name: Folder, or repository on the Hub.
        adapter: With ``"hq"`` the model is a `SamHQModel`; a SAM gets an untrained branch.

    Raises:
        ValueError: For a checkpoint of another kind, or SAM-HQ's with another adapter.
    """
    kind = AutoConfig.from_pretrained(name).model_type
    if kind == "sam_hq" and adapter == "hq":
        return correct_decoder(SamHQModel.from_pretrained(name)).eval()
    if kind != "sam":
        raise ValueError(f"`base` {name!r} is a {kind!r}; allowed: 'sam', and 'sam_hq' with the adapter 'hq'.")
    base = SamModel.from_pretrained(name).eval()
    return make_sam_hq(base).eval() if adapter == "hq" else base


def make_contestant(
    base: PreTrainedModel,
    method: str,
    adapter: str,
    task_loss: Loss,
    batches: Batches,
    seed: int = 0,
    r: int = 16,
    strength: float | None = None,
    query: str | None = None,
    selector: str = "lda",
    exemplars: int = 10,
    quantile: float | None = None,
) -> Contestant:
    """Put a model and its learner together.

    Args:
        base: As [`load_base`] gives it; it is changed in place.
        method: One of `METHODS`.
        adapter: One of `kinds.KINDS`.
        task_loss: See `Learner`.
        batches: See `Learner`.
        seed: Of what learners and selectors draw.
        r: Rank, or width of the bottleneck.
        strength: Of the penalty of LwF, EWC and O-LoRA; images in ER's buffer. None: the learner's own.
        query: MoDA's, see `make_query`. None: `MoDAModel`'s own.
        selector: MoDA's, see `make_selector`.
        exemplars: MoDA's images per domain whose features are kept.
        quantile: MoDA's way back to the plain model, see `MoDAModel.fit_selector`.

    Raises:
        ValueError: For what is unknown, or does not go together.
    """
    check_choice(method, adapter)
    if method == MoDA.kind:
        reader = None if query is None else make_query(query, base.config.vision_config, seed)
        model = MoDAModel(base, reader, selector, exemplars)
        make_config = partial(domain_config, adapter, base, r)
        learner = MoDA(model, partial(_predict_learning, model), task_loss, batches, make_config, seed, quantile)
        return Contestant(
            learner,
            model,
            partial(_answer_routed, model),
            partial(_answer_routed, model, route="base"),
            partial(_size_of_last, model),
        )
    adapted = get_peft_model(base, domain_config(adapter, base, r))
    options = {} if strength is None else {"size": int(strength)} if method == "er" else {"strength": strength}
    if strength is not None and method in ("sequential", "joint"):
        raise ValueError(f"`strength` is {strength}; with {method!r} allowed: none.")
    learner = LEARNERS[method](adapted, partial(_predict, base), task_loss, batches, seed, **options)
    return Contestant(
        learner, None, partial(_answer, base), partial(_answer_disabled, adapted), partial(_size, base, learner)
    )


def _predict(base: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    return base(**ask(batch, batch["prompt"])).pred_masks[:, :, 0]


def _predict_learning(model: MoDAModel, batch: Mapping[str, Any]) -> Tensor:
    return model(**ask(batch, batch["prompt"]), route=model.learning).pred_masks[:, :, 0]


def _answer(base: PreTrainedModel, asked: Mapping[str, Any], **_: Any) -> Answer:
    return Answer(base(**asked).pred_masks[:, :, 0], None, torch.ones(len(asked["pixel_values"])))


def _answer_disabled(adapted, asked: Mapping[str, Any]) -> Answer:
    with adapted.disable_adapter():
        return _answer(adapted.get_base_model(), asked)


def _answer_routed(model: MoDAModel, asked: Mapping[str, Any], route: str = AUTO, domain: str | None = None) -> Answer:
    domains = [domain] * len(asked["pixel_values"]) if route == "oracle" else None
    output = model(**asked, route=route, domains=domains)
    return Answer(output.pred_masks[:, :, 0], output.domains, output.encoder_passes)


def _size(base: PreTrainedModel, learner: Learner) -> int:
    names: Sequence[str] = list(learner.model.peft_config)
    return sum(p.numel() for name in names for p in adapter_parameters(base, name).values())


def _size_of_last(model: MoDAModel) -> int:
    return sum(p.numel() for p in model.adapters.own_parameters(model.domains[-1]).values())
