"""What an image looks like to the frozen encoder, in one vector: by it domains are told apart.

Source: MoDA's global feature token and its assistants, arXiv:2412.06418, section 3.3.

Axes: B images, T tokens, h w the encoder's grid, D features, N windows of all images, n heads, C channels of the image
embedding.
"""

import re
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoder import embed_patches, finish, run_blocks

ASSISTANTS = 9


class Reading(Protocol):
    """What `DomainQuery.reading` gives."""

    @property
    def features(self) -> Tensor:
        """float32 (B, D), of the last images that went through the encoder.

        Raises:
            RuntimeError: Before the encoder has run as far as the query reads.
        """


class DomainQuery(nn.Module, ABC):
    """Features of images by an encoder that no adapter changes: adapters are off while a query reads.

    Attributes:
        kind: The name by which `make_query` makes it.
        width: D, the number of features.
        stop: How many blocks it reads: blocks from `stop` on may be anything.
        extra_passes: 0 if it reads along with a pass through the encoder, 1 if it needs a pass of its own.
    """

    extra_passes: int

    def __init__(self, kind: str, width: int, stop: int):
        super().__init__()
        self.kind, self.width, self.stop = kind, width, stop

    @abstractmethod
    def forward(self, encoder: nn.Module, pixel_values: Tensor) -> Tensor:
        """The features (B, D), float32, of images (B, 3, H, W), by a pass that goes no farther than it must.

        Args:
            encoder: The `vision_encoder` of a SAM, SAM-HQ or mSAM.
            pixel_values: As the encoder takes them.
        """

    @abstractmethod
    def reading(self, encoder: nn.Module) -> AbstractContextManager[Reading]:
        """Read along while the caller runs the encoder, or blocks of it by `run_blocks`.

        ```python
        with query.reading(encoder) as reading:
            embeddings = encoder(pixel_values).last_hidden_state  # bit for bit as without the query
        reading.features
        ```

        Gradients, to tokens that need any, are on or off as they are where the context is entered.

        Raises:
            RuntimeError: If the query needs a pass of its own.
        """


class GlobalFeatureToken(DomainQuery):
    """Tokens that read the image on its way through the blocks, while the image never sees them.

    In a block whose own `qkv` gives queries, keys and values of the image's grid x, tokens t go on by

        a = LN₁(t),    t′ = t + proj(softmax(q(a) [k(a), k(x)]ᵀ / √(D / n)) [v(a), v(x)]),    t″ = t′ + MLP(LN₂(t′))

    all by the block's own layers: over the whole grid even where the image's attention is cut into windows (cells that
    only pad them are left out), and without relative positions, for tokens have none. The features are token 0 after
    the last block that is read; the other tokens are its assistants.

    Attributes:
        tokens: (T, D), N(0, 1). They may be trained (``query.tokens.requires_grad_()``): the graph holds their way
            through the blocks and nothing of the image's. Features of other tokens have nothing to do with those kept.

    Args:
        kind: See `DomainQuery`.
        width: D, the width of the encoder.
        stop: See `DomainQuery`.
        seed: Of the tokens; PyTorch's global generator is left as it was.
    """

    extra_passes = 0

    def __init__(self, kind: str, width: int, stop: int, seed: int = 0):
        super().__init__(kind, width, stop)
        self.tokens = _draw_tokens(width, seed)

    def forward(self, encoder: nn.Module, pixel_values: Tensor) -> Tensor:
        """The features (B, D) of images; gradients to the tokens, if they need any and the caller has them on."""
        with self.reading(encoder) as reading, torch.no_grad():
            run_blocks(encoder, embed_patches(encoder, pixel_values), 0, self.stop)
        return reading.features

    @contextmanager
    def reading(self, encoder: nn.Module):
        """Read along; see `DomainQuery.reading`."""
        _check_width(self, encoder)
        tokens = _TokenReading(self.tokens, self.stop)
        with ExitStack() as hooks:
            for index, block in enumerate(encoder.layers[: self.stop]):
                for handle in tokens.watch(index, block):
                    hooks.callback(handle.remove)
            yield tokens


class _TokenReading:
    """The tokens on their way along the image; see `GlobalFeatureToken`."""

    def __init__(self, tokens_TD: nn.Parameter, stop: int):
        self.start_TD, self.stop = tokens_TD, stop
        self.gradients = torch.is_grad_enabled() and tokens_TD.requires_grad
        self.tokens_BTD = None
        self.blocks = 0  # that the tokens have been through
        self.qkv_NHWD = None

    @property
    def features(self) -> Tensor:
        if self.tokens_BTD is None or self.blocks < self.stop:
            raise RuntimeError(f"the query reads {self.stop} blocks; the encoder has run {self.blocks} of them.")
        return self.tokens_BTD[:, 0].float()

    def watch(self, index: int, block: nn.Module) -> list:
        """Hooks on block number `index`, as handles."""

        def begin(block: nn.Module, inputs: tuple[Tensor]) -> None:
            self.qkv_NHWD = None
            if index == 0:
                hidden = inputs[0]
                with torch.set_grad_enabled(self.gradients):
                    self.tokens_BTD = self.start_TD.to(hidden).expand(len(hidden), -1, -1)
                self.blocks = 0

        def keep(qkv: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if self.qkv_NHWD is None:  # of the image; the tokens' own call comes second
                self.qkv_NHWD = output.detach()

        def step(block: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if index != self.blocks:
                raise RuntimeError(f"block {index} was run after {self.blocks} blocks; a query reads them in order.")
            with torch.set_grad_enabled(self.gradients):
                self.tokens_BTD = _next_tokens(block, self.tokens_BTD, self.qkv_NHWD, inputs[0].shape[1:3])
            self.qkv_NHWD, self.blocks = None, index + 1

        return [
            block.register_forward_pre_hook(begin),
            block.attn.qkv.register_forward_hook(keep),
            block.register_forward_hook(step),
        ]


def _next_tokens(block: nn.Module, tokens_BTD: Tensor, qkv_NHWD: Tensor, grid: tuple[int, int]) -> Tensor:
    """One block for the tokens: see `GlobalFeatureToken`. `qkv_NHWD` has 3 D channels."""
    D = tokens_BTD.shape[-1]
    image_BHWD = qkv_NHWD[..., D:]
    if block.window_size > 0:
        padded = tuple(side + -side % block.window_size for side in grid)
        image_BHWD = block.window_unpartition(image_BHWD, block.window_size, padded, tuple(grid))
    image_k, image_v = image_BHWD.flatten(1, 2).split(D, -1)
    q, k, v = block.attn.qkv(block.layer_norm1(tokens_BTD)).split(D, -1)
    return _after_attention(block, tokens_BTD, q, torch.cat([k, image_k], 1), torch.cat([v, image_v], 1))


def _after_attention(block: nn.Module, x_BTD: Tensor, q_BTD: Tensor, k_BSD: Tensor, v_BSD: Tensor) -> Tensor:
    """The rest of a block: attention of q to k and v in heads, without positions, `proj` and MLP with residuals."""
    q, k, v = (x.unflatten(-1, (block.attn.num_attention_heads, -1)).transpose(1, 2) for x in (q_BTD, k_BSD, v_BSD))
    read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x_BTD = x_BTD + block.attn.proj(read)
    return x_BTD + block.mlp(block.layer_norm2(x_BTD))


class GlobalPass(DomainQuery):
    """The way of the method's released code: tokens and patches see each other in a pass of their own.

    Every block attends over tokens and the whole grid, both ways, without windows and without relative positions.
    The features are token 0 after the last block that is read.

    Attributes:
        tokens: (T, D), N(0, 1); see `GlobalFeatureToken`, though here the graph of trained tokens holds the images'
            way too.

    Args:
        kind: See `DomainQuery`.
        width: D, the width of the encoder.
        stop: See `DomainQuery`.
        seed: Of the tokens; PyTorch's global generator is left as it was.
    """

    extra_passes = 1

    def __init__(self, kind: str, width: int, stop: int, seed: int = 0):
        super().__init__(kind, width, stop)
        self.tokens = _draw_tokens(width, seed)

    def forward(self, encoder: nn.Module, pixel_values: Tensor) -> Tensor:
        """The features (B, D) of images."""
        _check_width(self, encoder)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.tokens.requires_grad):
            patches_BSD = embed_patches(encoder, pixel_values).flatten(1, 2)
            tokens_BTD = self.tokens.to(patches_BSD).expand(len(patches_BSD), -1, -1)
            x = torch.cat([tokens_BTD, patches_BSD], 1)
            for block in encoder.layers[: self.stop]:
                x = _after_attention(block, x, *block.attn.qkv(block.layer_norm1(x)).chunk(3, -1))
            return x[:, 0].float()

    def reading(self, encoder: nn.Module) -> AbstractContextManager[Reading]:
        """Refused: raises RuntimeError."""
        raise RuntimeError(f"the query {self.kind!r} needs a pass of its own; call it with the images.")


class GridStatistic(DomainQuery):
    """The mean or the standard deviation over the grid of what a block or the neck gives, channel by channel.

    The mean says what there is in an image; the deviation, how much of it changes from place to place. They are also
    the controls of the tokens, which have to beat them.

    Args:
        kind: ``"mean_neck"``, ``"mean_block(i)"`` or ``"std_block(i)"``.
        width: Channels of what is pooled.
        stop: i + 1 for block i; all blocks for the neck.
    """

    extra_passes = 0

    def __init__(self, kind: str, width: int, stop: int):
        super().__init__(kind, width, stop)
        self.of_neck, self.of_spread = kind == "mean_neck", kind.startswith("std")

    def forward(self, encoder: nn.Module, pixel_values: Tensor) -> Tensor:
        """The features (B, D) of images."""
        with self.reading(encoder) as reading, torch.no_grad():
            hidden = run_blocks(encoder, embed_patches(encoder, pixel_values), 0, self.stop)
            if self.of_neck:
                finish(encoder, hidden)
        return reading.features

    @contextmanager
    def reading(self, encoder: nn.Module):
        """Read along; see `DomainQuery.reading`."""
        pooled = _PooledReading(self.kind, (2, 3) if self.of_neck else (1, 2), self.of_spread)
        handle = (encoder.neck if self.of_neck else encoder.layers[self.stop - 1]).register_forward_hook(pooled.take)
        try:
            yield pooled
        finally:
            handle.remove()


class _PooledReading:
    def __init__(self, kind: str, grid_axes: tuple[int, int], of_spread: bool):
        self.kind, self.grid_axes, self.of_spread, self.pooled = kind, grid_axes, of_spread, None

    @property
    def features(self) -> Tensor:
        if self.pooled is None:
            raise RuntimeError(f"the query {self.kind!r} has seen nothing: the encoder has not run that far.")
        return self.pooled

    def take(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        grid = output.detach().float()
        self.pooled = grid.std(self.grid_axes, correction=0) if self.of_spread else grid.mean(self.grid_axes)


def make_query(kind: str, vision_config, seed: int = 0, stop: int | None = None) -> DomainQuery:
    """A query by name.

    ===================  =============================================================================================
    ``gft_readonly``     `GlobalFeatureToken`: one token with nine assistants that read along
    ``gft_global``       `GlobalPass`: the same tokens in a pass of their own, as the released code has them
    ``mean_block(i)``    `GridStatistic`: the mean of block i, counted from 0
    ``std_block(i)``     `GridStatistic`: the standard deviation of block i
    ``mean_neck``        `GridStatistic`: the mean of the image embedding
    ===================  =============================================================================================

    Args:
        kind: One of the table.
        vision_config: Of the encoder: `SamVisionConfig` or `SamHQVisionConfig`.
        seed: Of the tokens.
        stop: How many blocks may be read; None: all. A `GridStatistic` takes what it takes, so there it is only
            checked.

    Raises:
        ValueError: For an unknown kind, a `stop` outside 1 … number of blocks, or a statistic that lies beyond it.
    """
    blocks = vision_config.num_hidden_layers
    limit = blocks if stop is None else stop
    if not 1 <= limit <= blocks:
        raise ValueError(f"`stop` is {stop}; allowed: 1 to {blocks}, the number of blocks.")
    if kind == "gft_readonly":
        return GlobalFeatureToken(kind, vision_config.hidden_size, limit, seed)
    if kind == "gft_global":
        return GlobalPass(kind, vision_config.hidden_size, limit, seed)
    if kind == "mean_neck":
        if limit < blocks:
            raise ValueError(f"`stop` is {stop}; 'mean_neck' reads all {blocks} blocks.")
        return GridStatistic(kind, vision_config.output_channels, blocks)
    if block := re.fullmatch(r"(mean|std)_block\((\d+)\)", kind):
        if int(block[2]) >= limit:
            raise ValueError(f"`kind` is {kind!r}; allowed: {block[1]}_block(0) to {block[1]}_block({limit - 1}).")
        return GridStatistic(kind, vision_config.hidden_size, int(block[2]) + 1)
    raise ValueError(
        f"`kind` is {kind!r}; allowed: 'gft_readonly', 'gft_global', 'mean_block(i)', 'std_block(i)', 'mean_neck'."
    )


def _draw_tokens(width: int, seed: int) -> nn.Parameter:
    tokens_TD = torch.randn(1 + ASSISTANTS, width, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(tokens_TD, requires_grad=False)


def _check_width(query: DomainQuery, encoder: nn.Module) -> None:
    width = encoder.config.hidden_size
    if width != query.width:
        raise ValueError(f"the query is {query.width} wide; this encoder needs one of {width}.")
