"""MoDA: an adapter per domain of a frozen SAM, and a router that says which of them an image needs.

Source: "Continual Learning for Segment Anything Model Adaptation", arXiv:2412.06418. A *domain* is where images come
from. Every domain's adapter starts from the same frozen model and is trained alone, so that no domain is forgotten for
another one; what is left is to tell domains apart, by features that the frozen encoder has of the image.

Axes: B images, P prompts of each, M masks of each prompt, N exemplars, D features, C channels, h w the encoder's grid.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, SamHQModel
from transformers.utils import ModelOutput

from ..msam import MSamModel
from .adapters import DomainAdapters
from .encoder import embed_patches, finish, first_adapted_block, run_blocks
from .kinds import make_adapters
from .queries import DomainQuery, make_query
from .router import AUTO, BASE, Router, Routing, check_route_name
from .selectors import make_selector


@dataclass
class MoDAOutput(ModelOutput):
    """What `MoDAModel.forward` returns.

    Attributes:
        pred_masks: (B, P, M, 4h, 4w) logits, of a prompted model.
        iou_scores: (B, P, M), of a prompted model.
        logits: per task (B, C, 4h, 4w), of an mSAM.
        domains: the domain of each image whose adapter was used, ``"base"`` where it was none.
        scores: (B,) how sure the router was, larger is surer; None where it was not asked.
        encoder_passes: (B,) passes through the encoder that each image took; a part counts by its blocks.
    """

    pred_masks: Tensor | None = None
    iou_scores: Tensor | None = None
    logits: dict[str, Tensor] | None = None
    domains: list[str] | None = None
    scores: Tensor | None = None
    encoder_passes: Tensor | None = None


@dataclass
class Look:
    """What the plain encoder has seen of a batch, as far as the query reads.

    Attributes:
        features: (B, D), for the router.
        passes: Through the encoder so far; a part counts by its blocks.
        blocks: How many blocks `hidden` has been through; 0 where there is nothing to go on from.
        hidden: (B, h, w, width), what enters the next block.
        on_the_way: Outputs of the blocks without windows, which SAM-HQ's decoder takes as well.
        embeddings: (B, C, h, w), if the blocks were all.
    """

    features: Tensor
    passes: float
    blocks: int = 0
    hidden: Tensor | None = None
    on_the_way: list[Tensor] = field(default_factory=list)
    embeddings: Tensor | None = None


class MoDAModel(nn.Module):
    """A frozen model, an adapter per domain, and what chooses among them for each image.

    ```python
    model = MoDAModel(SamModel.from_pretrained("facebook/sam-vit-base"))
    model.add_domain("rails", LoraConfig(target_modules=["qkv"]))
    model(pixel_values, route="rails", input_boxes=boxes)  # to train: the parameters of "rails" alone get gradients
    model.add_exemplars("rails", pixel_values)
    model.fit_selector()
    model(pixel_values, input_boxes=boxes)  # each image by the adapter of its domain
    ```

    The query reads the plain encoder up to one of its blocks. From there an image goes on with its adapter, or with
    none, and one pass is all it takes, unless its adapter changes blocks below: then it starts anew.

    Args:
        base: `SamModel`, `SamHQModel` or `MSamModel`; its weights are frozen.
        query: What describes an image by the frozen encoder. None: the standard deviation over the grid of the last
            block, by which images of known domains, and of none, were told apart far better than by the paper's global
            feature token. The mean of a lower block saves a part of a pass and finds fewer images of no domain.
        selector: Kind of the selector; see `make_selector`.
        exemplars: Images per domain whose features are kept.
        resident: Adapters that are in memory at most; the others are read from the model's folder when they are
            needed. None: all of them.

    Attributes:
        domains: Names, in the order in which they were added.
        features: (N, D) of the exemplars of each domain.
        quantile: As it was given to `fit_selector`.
        damaged: What is wrong with domains that could not be read, by name; their images go to the plain model.

    Raises:
        ValueError: For a number below 1, or an unknown selector.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        query: DomainQuery | None = None,
        selector: str = "lda",
        exemplars: int = 10,
        resident: int | None = None,
    ):
        super().__init__()
        for name, value in (("exemplars", exemplars), ("resident", 1 if resident is None else resident)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}; allowed: 1 or more.")
        self.base = base.requires_grad_(False).eval()
        if query is None:
            last = base.config.vision_config.num_hidden_layers - 1
            query = make_query(f"std_block({last})", base.config.vision_config)
        self.query = query
        self.router = Router(make_selector(selector, self.query.width))
        self.exemplars, self.resident = exemplars, resident
        self.quantile: float | None = None
        self.features: dict[str, Tensor] = {}
        self.damaged: dict[str, str] = {}
        self.adapters: DomainAdapters | None = None
        self.learning: str | None = None
        self._first_blocks: dict[str, int] = {}
        self._folders: OrderedDict[str, Path] = OrderedDict()  # of domains on disk, the one used last at the end

    @property
    def domains(self) -> list[str]:
        """The names of the domains, in the order in which they were added."""
        return list(self._first_blocks)

    # --- domains ---

    def add_domain(self, name: str, config: PeftConfig) -> dict[str, nn.Parameter]:
        """Add a domain and begin to learn it: its parameters, and no others, require gradients.

        Args:
            name: An identifier that is no word of a route.
            config: Of its adapter, whatever PEFT has. A `TALoRAConfig` shares the factors of the first domain.

        Returns:
            Its parameters by name, for an optimiser.

        Raises:
            ValueError: For a name that is taken or not allowed, or a kind of adapter that the others do not have.
        """
        check_route_name(name)
        if name in self.domains:
            raise ValueError(
                f"domain {name!r} is there already; allowed: a name other than {', '.join(self.domains)}."
            )
        adapters = self.adapters or make_adapters(self.base, config)
        adapters.add(name, config)
        self.adapters = adapters
        self._first_blocks[name] = first_adapted_block(self.base, name)
        return self.learn(name)

    def learn(self, name: str) -> dict[str, nn.Parameter]:
        """Go on learning a domain; returns its parameters. Raises ValueError for an unknown one."""
        self._check_known(name)
        self._fetch(name)
        self._folders.pop(name, None)  # what is on disk will not be what it is
        self.learning = name
        return self.adapters.train(name)

    def end_learning(self) -> None:
        """Freeze all domains."""
        self.learning = None
        if self.adapters is not None:
            self.adapters.freeze()

    def remove_domain(self, name: str) -> None:
        """Forget a domain; the others stay as they are, and the selector is fitted to them, if it was fitted.

        Raises:
            ValueError: For an unknown domain.
        """
        self._check_known(name)
        if self.learning == name:
            self.end_learning()
        if name in self.adapters.resident():
            self.adapters.unload(name)
        for known in (self._first_blocks, self._folders, self.features, self.damaged):
            known.pop(name, None)
        fitted = [other for other in self.router.domains if other != name]
        self.router = Router(self.router.selector)
        if fitted:
            self.fit_router(fitted, self.quantile)

    def add_exemplars(self, name: str, pixel_values: Tensor) -> None:
        """Keep the features of a domain's images (N, 3, H, W), up to `exemplars` of them, in the order given.

        Raises:
            ValueError: For an unknown domain.
        """
        self._check_known(name)
        features = [self.describe(image[None]) for image in pixel_values[: self.exemplars]]
        kept = [self.features[name]] if name in self.features else []
        self.features[name] = torch.cat([*kept, *features])[: self.exemplars]

    def fit_selector(self, quantile: float | None = None) -> None:
        """Fit the selector to the exemplars of all domains.

        Args:
            quantile: Share of the exemplars, left out of the fit, that score below the threshold under which an image
                goes to the plain model. None: no image does.

        Raises:
            ValueError: If a domain has no exemplars, or for a quantile outside (0, 1).
        """
        missing = [name for name in self.domains if name not in self.features]
        if missing or not self.domains:
            raise ValueError(
                f"domains without exemplars: {', '.join(missing) or 'there are none'}; add_exemplars first."
            )
        self.fit_router(self.domains, quantile)

    def fit_router(self, names: Sequence[str], quantile: float | None = None) -> None:
        """As `fit_selector`, to some of the domains: the others are not chosen."""
        labels_N = torch.cat([torch.full((len(self.features[name]),), k) for k, name in enumerate(names)])
        features_ND = torch.cat([self.features[name] for name in names])
        self.router.fit(features_ND, labels_N, names)
        self.quantile = quantile
        if quantile is not None:
            self.router.calibrate(quantile, features_ND, labels_N)

    # --- routing ---

    @torch.no_grad()
    def describe(self, pixel_values: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, H, W) by the frozen encoder, whatever adapter is active."""
        with self._switching():
            self._plug_in(BASE)
            return self.query(self.base.vision_encoder, pixel_values)

    def predict_domain(self, pixel_values: Tensor) -> Routing:
        """The domain of each image, by name, and how sure that is."""
        self._check_fitted()
        return self.router.route(self.describe(pixel_values))

    def forward(
        self,
        pixel_values: Tensor,
        route: str = AUTO,
        domains: Sequence[str] | None = None,
        **inputs: Any,
    ) -> MoDAOutput:
        """Segment every image by the adapter of its domain.

        Args:
            pixel_values: (B, 3, H, W).
            route: ``"auto"``, by the router; ``"oracle"``, by `domains`; a domain's name, for all images; ``"base"``,
                the plain model.
            domains: With ``"oracle"``, the domain of each image.
            inputs: What else the base model takes, such as `input_boxes` (B, P, 4) or `multimask_output`; tensors
                belong to the images.

        Raises:
            ValueError: For an unknown route or domain, or if the selector is not fitted.
        """
        with self._switching():
            if route == AUTO:
                self._check_fitted()
                look = self._look(pixel_values)
                routing = self.router.route(look.features)
            else:
                look = None
                routing = Router(self.router.selector, self.domains).route(pixel_values, route, domains)
            names = [BASE if route == AUTO and name in self.damaged else name for name in routing.names]
            parts, order, passes = [], [], torch.full((len(names),), look.passes if look else 0.0)
            for name in dict.fromkeys(names):
                rows = [row for row, other in enumerate(names) if other == name]
                self._plug_in(name)
                output, further = self._predict(name, pixel_values, look, rows, inputs)
                parts.append(output)
                order += rows
                passes[rows] += further
        back = None if len(parts) == 1 else torch.tensor(order).argsort()
        return MoDAOutput(**_joined(parts, back), domains=names, scores=routing.scores, encoder_passes=passes)

    @torch.no_grad()
    def _look(self, pixel_values: Tensor) -> Look:
        """The plain encoder's part of a forward."""
        encoder = self.base.vision_encoder
        depth, blocks = len(encoder.layers), self.query.stop
        self._plug_in(BASE)
        if self.query.extra_passes or isinstance(self.base, MSamModel):
            return Look(self.query(encoder, pixel_values), blocks / depth)
        on_the_way: list[Tensor] = []
        with self.query.reading(encoder) as reading:
            hidden = run_blocks(encoder, embed_patches(encoder, pixel_values), 0, blocks, on_the_way)
            embeddings = finish(encoder, hidden) if blocks == depth else None
        return Look(reading.features, blocks / depth, blocks, hidden, on_the_way, embeddings)

    def _predict(
        self, name: str, pixel_values: Tensor, look: Look | None, rows: Sequence[int], inputs: Mapping[str, Any]
    ) -> tuple[ModelOutput, float]:
        """Output of the images `rows` with the adapter that is active, and the encoder passes that it took."""
        batch = len(pixel_values)
        inputs = {key: _rows(value, rows, batch) for key, value in inputs.items()}
        if isinstance(self.base, MSamModel):
            return self.base(_rows(pixel_values, rows, batch), **inputs), 1.0
        encoder = self.base.vision_encoder
        depth = len(encoder.layers)
        first = depth if name == BASE else self._first_blocks[name]
        if look is None or not look.blocks or first < look.blocks:
            hidden, blocks, on_the_way = embed_patches(encoder, _rows(pixel_values, rows, batch)), 0, []
        else:
            hidden, blocks = _rows(look.hidden, rows, batch), look.blocks
            on_the_way = [_rows(output, rows, batch) for output in look.on_the_way]
        if blocks == depth:
            embeddings = _rows(look.embeddings, rows, batch)
        else:
            embeddings = finish(encoder, run_blocks(encoder, hidden, blocks, depth, on_the_way))
        taken = {"intermediate_embeddings": on_the_way} if isinstance(self.base, SamHQModel) else {}
        return self.base(image_embeddings=embeddings, **taken, **inputs), 1 - blocks / depth

    # --- adapters in memory and on disk ---

    @contextmanager
    def _switching(self):
        """Inside, adapters are switched as needed; what was being learnt goes on afterwards."""
        try:
            yield
        finally:
            if self.learning is not None and self.adapters.active != self.learning:
                self.adapters.train(self.learning)

    def _plug_in(self, name: str) -> None:
        """Have a domain's adapter active, or with ``"base"`` none."""
        if self.adapters is None or self.adapters.active == (None if name == BASE else name):
            return
        if name != BASE:
            self._fetch(name)
        self.adapters.activate(None if name == BASE else name)

    def _fetch(self, name: str) -> None:
        """Have a domain's adapter in memory; those used longest ago go, where there are too many and disk has them.

        Raises:
            OSError: If it is damaged; the message names the file.
        """
        if name in self.damaged:
            raise OSError(self.damaged[name])
        if name not in self.adapters.resident():
            self.adapters.load(name, self._folders[name])
        if name in self._folders:
            self._folders.move_to_end(name)
        if self.resident is None:
            return
        spare = [n for n in self._folders if n in self.adapters.resident() and n not in (name, self.learning)]
        while len(self.adapters.resident()) > self.resident and spare:
            self.adapters.unload(spare.pop(0))

    def _check_fitted(self) -> None:
        if self.domains and not self.router.domains:
            raise ValueError("the selector is not fitted; `add_exemplars` of each domain, then `fit_selector`.")

    def _check_known(self, name: str) -> None:
        if name not in self._first_blocks:
            raise ValueError(f"unknown domain {name!r}; known are: {', '.join(self.domains) or 'none'}.")

    def first_block(self, name: str) -> int:
        """The lowest block of the encoder that a domain's adapter changes; the number of blocks if it is none."""
        return self._first_blocks[name]

    def folder_of(self, name: str) -> Path | None:
        """Where a domain is on disk as it is now, if it is."""
        return self._folders.get(name)

    def note_saved(self, name: str, folder: Path) -> None:
        """Say that a domain, as it is now, is in a folder."""
        self._folders[name] = folder

    def expect_domain(self, name: str, first_block: int, folder: Path, damage: str | None) -> None:
        """Take up a domain that is on disk; with damage, which a warning tells, its images go to the plain model."""
        self._first_blocks[name] = first_block
        self._folders[name] = folder
        if damage is not None:
            self.damaged[name] = damage
            warnings.warn(f"Domain {name!r} is out of use, its images go to the plain model: {damage}", stacklevel=3)


def _rows(value: Any, rows: Sequence[int], batch: int) -> Any:
    """The rows of a tensor of the batch; all rows are the tensor itself, as is what is no tensor."""
    if not torch.is_tensor(value) or len(rows) == batch:
        return value
    return value[list(rows)]


def _joined(parts: Sequence[ModelOutput], back: Tensor | None) -> dict[str, Any]:
    """Outputs of groups of images as one, in the order of the images."""

    def join(values: Sequence[Tensor]) -> Tensor:
        return values[0] if back is None else torch.cat(list(values))[back.to(values[0].device)]

    if "logits" in parts[0]:
        return {"logits": {task: join([part.logits[task] for part in parts]) for task in parts[0].logits}}
    return {name: join([part[name] for part in parts]) for name in ("pred_masks", "iou_scores")}
