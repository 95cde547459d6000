"""What an image is, by the frozen encoder: features by which a router tells domains apart.

Source: arXiv:2412.06418. One global feature token (GFT) and nine global assistant tokens (GAT) go through the encoder
with the image; the GFT after the last block describes it. Means of features stand beside it, as controls.

Axes: B images, K tokens, N patches, h w the grid, D the encoder's width, A heads, E width of a head, F features.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .encoder import embed_patches

TOKENS = 10  # one GFT, then nine GAT
KINDS = ("gft_readonly", "gft_global", "mean_block(i)", "mean_neck")


@dataclass
class Reading:
    """What a query has read; `features` (B, F) are there once the encoder has run."""

    features: Tensor | None = None


class DomainQuery(nn.Module, ABC):
    """Images → features, by an encoder without adapters.

    Attributes:
        kind: As `make_query` takes it.
        width: F.
        stop: Number of blocks that it reads.
        extra_passes: Passes through the encoder that it needs for itself; 0 where it reads along with one.
    """

    kind: str
    width: int
    stop: int
    extra_passes: int = 0

    @abstractmethod
    def forward(self, encoder: nn.Module, pixel_values: Tensor) -> Tensor:
        """Features (B, F) of images (B, 3, H, W). Adapters must be off."""

    @abstractmethod
    def reading(self, encoder: nn.Module):
        """A context manager that gives a `Reading`: whoever runs the encoder inside it gets the features beside.

        Blocks may be called one by one, up to `stop` of them. Hooks are gone afterwards, also after an exception.
        """


class ReadingQuery(DomainQuery):
    """One that reads what the encoder computes anyway."""

    def forward(self, encoder: nn.Module, pixel_values: Tensor) -> Tensor:
        """See `DomainQuery.forward`."""
        with self.reading(encoder) as reading, torch.no_grad():
            encoder(pixel_values)
        return reading.features


class GlobalFeatureToken(ReadingQuery):
    """The GFT that reads the image, which itself never sees it: one pass gives features and image embeddings.

    In each block, with the block's own weights, tokens (K, D) attend to themselves and to all patches of the image,
    windows or not, without relative positions; the patches' keys and values are those that the block computes:

        t ← t + proj(attention(q(t), [k(t), k(image)], [v(t), v(image)])),    t ← t + MLP(LN₂(t)),    t read by LN₁

    Cells by which windows are padded take no part.

    Args:
        vision_config: Of the encoder.
        seed: Of the tokens, N(0, 1), which are not trained by default; a gradient that they get passes through the
            tokens alone.
        stop: Blocks that it reads; None: all.
    """

    kind = "gft_readonly"

    def __init__(self, vision_config: PreTrainedConfig, seed: int = 0, stop: int | None = None):
        super().__init__()
        self.width = vision_config.hidden_size
        self.stop = vision_config.num_hidden_layers if stop is None else stop
        self.tokens = nn.Parameter(draw_tokens(self.width, seed), requires_grad=False)

    @contextmanager
    def reading(self, encoder: nn.Module):
        """See `DomainQuery.reading`."""
        reading, state, handles = Reading(), {}, []

        def begin(layer: nn.Module, inputs: tuple) -> None:
            state["grid"] = inputs[0].shape[:3]

        def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            state["qkv"] = output.detach()

        def read(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
            tokens = state["tokens"] if "tokens" in state else self.tokens.expand(len(output), -1, -1)
            patches_BN3D = _whole_grid(state.pop("qkv"), layer.window_size, *state["grid"])
            state["tokens"] = _token_block(layer, tokens, patches_BN3D)

        def end(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
            reading.features = state.pop("tokens")[:, 0]

        layers = list(encoder.layers)[: self.stop]
        try:
            for layer in layers:
                handles.append(layer.register_forward_pre_hook(begin))
                handles.append(layer.attn.qkv.register_forward_hook(keep))
                handles.append(layer.register_forward_hook(read))
            handles.append(layers[-1].register_forward_hook(end))
            yield reading
        finally:
            for handle in handles:
                handle.remove()


class GlobalAttention(DomainQuery):
    """The GFT of the released code: a pass of its own, in which tokens and patches see each other everywhere.

    No windows, no relative positions; tokens stand before the patches.

    Args:
        vision_config: Of the encoder.
        seed: Of the tokens, N(0, 1).
        stop: Blocks; None: all.
    """

    kind = "gft_global"
    extra_passes = 1

    def __init__(self, vision_config: PreTrainedConfig, seed: int = 0, stop: int | None = None):
        super().__init__()
        self.width = vision_config.hidden_size
        self.stop = vision_config.num_hidden_layers if stop is None else stop
        self.tokens = nn.Parameter(draw_tokens(self.width, seed), requires_grad=False)

    def forward(self, encoder: nn.Module, pixel_values: Tensor) -> Tensor:
        """See `DomainQuery.forward`."""
        patches_BND = embed_patches(encoder, pixel_values).flatten(1, 2)
        hidden = torch.cat([self.tokens.expand(len(patches_BND), -1, -1), patches_BND], dim=1)
        for layer in list(encoder.layers)[: self.stop]:
            hidden = _token_block(layer, hidden, None)
        return hidden[:, 0]

    def reading(self, encoder: nn.Module):
        """There is none: raises TypeError."""
        raise TypeError(f"{self.kind!r} changes what the image is in its pass; it cannot read along with another.")


class MeanFeatures(ReadingQuery):
    """The mean over the image of a block's output, or of the image embeddings: what the GFT has to beat.

    Args:
        vision_config: Of the encoder.
        block: Position of the block; None: the neck.
    """

    def __init__(self, vision_config: PreTrainedConfig, block: int | None = None):
        super().__init__()
        depth = vision_config.num_hidden_layers
        if block is not None and not 0 <= block < depth:
            raise ValueError(f"`query` is 'mean_block({block})'; the encoder has the blocks 0 to {depth - 1}.")
        self.block, self.kind = block, "mean_neck" if block is None else f"mean_block({block})"
        self.width = vision_config.output_channels if block is None else vision_config.hidden_size
        # After the neck there is no block to go on from, as if it were one more.
        self.stop = depth + 1 if block is None else block + 1

    @contextmanager
    def reading(self, encoder: nn.Module):
        """See `DomainQuery.reading`."""
        reading = Reading()

        def read(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            reading.features = output.mean((2, 3) if self.block is None else (1, 2)).detach()

        handle = (encoder.neck if self.block is None else encoder.layers[self.block]).register_forward_hook(read)
        try:
            yield reading
        finally:
            handle.remove()


def make_query(kind: str, vision_config: PreTrainedConfig, seed: int = 0, stop: int | None = None) -> DomainQuery:
    """A query by its name.

    Args:
        kind: ``"gft_readonly"``, ``"gft_global"``, ``"mean_block(i)"`` with the position of a block, ``"mean_neck"``.
        vision_config: Of the encoder.
        seed: Of tokens.
        stop: Number of blocks that tokens go through; None: all. Means do not read it.

    Raises:
        ValueError: For another kind, or a block or number of blocks that the encoder does not have.
    """
    depth = vision_config.num_hidden_layers
    tokens = {query.kind: query for query in (GlobalFeatureToken, GlobalAttention)}
    if kind in tokens:
        if stop is not None and not 1 <= stop <= depth:
            raise ValueError(f"`stop` is {stop}; allowed: 1 to {depth}, the encoder's blocks.")
        return tokens[kind](vision_config, seed, stop)
    mean = re.fullmatch(r"mean_neck|mean_block\((\d+)\)", kind)
    if mean is None:
        raise ValueError(f"`query` is {kind!r}; allowed: {', '.join(KINDS)}.")
    return MeanFeatures(vision_config, None if mean[1] is None else int(mean[1]))


def draw_tokens(width: int, seed: int) -> Tensor:
    """(1, K, D), standard normal; the global generator is left as it was."""
    return torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(seed))


def _token_block(layer: nn.Module, tokens_BKD: Tensor, patches_BN3D: Tensor | None) -> Tensor:
    """A block for tokens, which see themselves and, where given, patches by their queries, keys and values."""
    attention = layer.attn
    # Modules are called past their hooks, one of which brought us here.
    own_BK3D = attention.qkv.forward(layer.layer_norm1(tokens_BKD))
    query, key, value = _heads(own_BK3D, attention.num_attention_heads)
    if patches_BN3D is not None:
        _, seen, said = _heads(patches_BN3D, attention.num_attention_heads)
        key, value = torch.cat([key, seen], dim=2), torch.cat([value, said], dim=2)
    mixed_BAKE = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    tokens_BKD = tokens_BKD + attention.proj.forward(mixed_BAKE.transpose(1, 2).flatten(2))
    return tokens_BKD + layer.mlp.forward(layer.layer_norm2(tokens_BKD))


def _heads(qkv_BN3D: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, each (B, A, N, E)."""
    return qkv_BN3D.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _whole_grid(qkv: Tensor, window: int, batch: int, height: int, width: int) -> Tensor:
    """(B, N, 3 D) of a block's (B · windows, window, window, 3 D), or (B, h, w, 3 D), without padded cells."""
    if not window:
        return qkv.reshape(batch, height * width, -1)
    rows, columns = -(-height // window), -(-width // window)
    grid = qkv.reshape(batch, rows, columns, window, window, -1).transpose(2, 3)
    grid = grid.reshape(batch, rows * window, columns * window, -1)
    return grid[:, :height, :width].reshape(batch, height * width, -1)
