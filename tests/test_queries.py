"""Queries read the frozen encoder, change nothing of it, and see what they say they see."""

from contextlib import suppress

import pytest
import torch
from conftest import make_sam
from peft import LoraConfig, get_peft_model
from test_encoder import make_hq_encoder
from torch import nn
from torch.testing import assert_close
from transformers.models.sam.modeling_sam import SamVisionEncoder

from peft_talora.continual.encoder import embed_patches, finish, run_blocks
from peft_talora.continual.queries import ASSISTANTS, make_query

ALONG = ["gft_readonly", "mean_block(0)", "mean_block(2)", "std_block(3)", "mean_neck"]
KINDS = [*ALONG, "gft_global"]
LINEARS = ["qkv", "proj", "lin1", "lin2"]


def make_encoder(window_size: int, attention: str = "sdpa") -> SamVisionEncoder:
    """The tiny SAM's encoder, 8 × 8, with other windows: 3 need padding, 4 do not."""
    config = make_sam().config.vision_config
    config.window_size, config._attn_implementation = window_size, attention
    encoder = SamVisionEncoder(config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "layer_norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.3 if parameter.ndim < 2 else 0.15)
    return encoder.eval()


def query_of(encoder, kind="gft_readonly", **options):
    return make_query(kind, encoder.config, **options)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def relative_positions(attn, q_nSd, side, places_S2):
    """(n, S, S): of the rows' queries towards the columns' places, both in one window of `side`."""
    apart_SS2 = (places_S2[:, None] - places_S2[None] + side - 1).clamp(0, 2 * side - 2)
    tables = zip((attn.rel_pos_h, attn.rel_pos_w), apart_SS2.unbind(-1), strict=True)
    return sum(torch.einsum("nsd,std->nst", q_nSd, table[apart_SS]) for table, apart_SS in tables)


def dense_pass(encoder, pixel_values, tokens_TD):
    """One image and tokens as one long sequence with a mask: what the tokens and the image become.

    The sequence has every cell that pads a window. Tokens see tokens and cells of the image; a cell sees its window.
    """
    D, n, T = encoder.config.hidden_size, encoder.config.num_attention_heads, len(tokens_TD)
    hidden = embed_patches(encoder, pixel_values)[0]
    for block in encoder.layers:
        side = block.window_size or 8
        padded = 8 + -8 % side
        y, x = torch.meshgrid(torch.arange(padded), torch.arange(padded), indexing="ij")
        real_S = ((y < 8) & (x < 8)).flatten()
        window_S = (y // side * 100 + x // side).flatten()
        grid = torch.zeros(padded, padded, D).to(hidden)
        grid[:8, :8] = block.layer_norm1(hidden)
        sequence = torch.cat([block.layer_norm1(tokens_TD), grid.flatten(0, 1)])
        q, k, v = (x.unflatten(1, (n, -1)).transpose(0, 1) for x in block.attn.qkv(sequence).split(D, 1))
        logits_nSS = q @ k.mT / (D // n) ** 0.5
        logits_nSS[:, T:, T:] += relative_positions(
            block.attn, q[:, T:], side, torch.stack([(y % side).flatten(), (x % side).flatten()], 1)
        )
        seen_SS = torch.zeros(T + padded**2, T + padded**2, dtype=torch.bool)
        seen_SS[:T] = torch.cat([torch.ones(T, dtype=torch.bool), real_S])
        seen_SS[T:, T:] = window_S[:, None] == window_S[None]
        read = logits_nSS.masked_fill(~seen_SS, -torch.inf).softmax(-1) @ v
        read = block.attn.proj(read.transpose(0, 1).flatten(1))
        tokens_TD = tokens_TD + read[:T]
        hidden = hidden + read[T:].unflatten(0, (padded, padded))[:8, :8]
        tokens_TD, hidden = (x + block.mlp(block.layer_norm2(x)) for x in (tokens_TD, hidden))
    return tokens_TD, hidden


@pytest.mark.parametrize("window_size", [3, 4])
@torch.no_grad()
def test_the_token_is_that_of_dense_masked_attention(images, window_size):
    encoder = make_encoder(window_size).double()
    query = query_of(encoder, seed=3)
    for image in images.double():
        tokens, hidden = dense_pass(encoder, image[None], query.tokens.double())
        assert_close(run_blocks(encoder, embed_patches(encoder, image[None]))[0], hidden, rtol=0, atol=1e-6)
        assert_close(query(encoder, image[None])[0], tokens[0].float(), rtol=0, atol=1e-6)
        assert 0.5 < tokens[0].std() < 5


@pytest.mark.parametrize("window_size", [3, 4])
@torch.no_grad()
def test_sdpa_and_eager_agree(images, window_size):
    features = [query_of(encoder)(encoder, images) for encoder in (make_encoder(window_size, way) for way in WAYS)]
    assert_close(*features, rtol=1e-5, atol=1e-5)


WAYS = ["sdpa", "eager"]


@torch.no_grad()
def test_cells_that_pad_windows_have_no_influence(sam, images):
    encoder, block = sam.vision_encoder, sam.vision_encoder.layers[0]
    query = query_of(encoder, stop=1)
    expected = query(encoder, images)
    inside_NHW1, _ = block.window_partition(torch.ones(2, 8, 8, 1), block.window_size)
    assert inside_NHW1.min() == 0

    def spoil(qkv, inputs, output):
        return torch.where(inside_NHW1.bool(), output, torch.nan) if output.ndim == 4 else output

    block.attn.qkv.register_forward_hook(spoil)
    with query.reading(encoder) as reading:
        assert encoder(images).last_hidden_state.isnan().any()
    assert torch.equal(reading.features, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [["qkv"], LINEARS])
@torch.no_grad()
def test_an_adapter_that_is_off_changes_nothing(sam, images, kind, targets):
    encoder, query = sam.vision_encoder, query_of(sam.vision_encoder, kind)
    expected = query(encoder, images)
    model = get_peft_model(sam, LoraConfig(target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_()
    changed = query(encoder, images)
    assert not torch.allclose(changed, expected)
    with model.disable_adapter():
        assert torch.equal(query(encoder, images), expected)
    assert torch.equal(query(encoder, images), changed)


@pytest.mark.parametrize("kind", ALONG)
@torch.no_grad()
def test_reading_along_leaves_the_image_as_it_is(sam, images, kind):
    encoder, query = sam.vision_encoder, query_of(sam.vision_encoder, kind)
    expected = encoder(images).last_hidden_state
    with query.reading(encoder) as reading:
        assert torch.equal(encoder(images).last_hidden_state, expected)
    assert torch.equal(reading.features, query(encoder, images))
    with query.reading(encoder) as reading:
        hidden = run_blocks(encoder, run_blocks(encoder, embed_patches(encoder, images), 0, 1), 1)
        assert torch.equal(finish(encoder, hidden), expected)
    assert torch.equal(reading.features, query(encoder, images))
    assert query.extra_passes == 0


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features(sam, images, kind):
    query = query_of(sam.vision_encoder, kind)
    features = query(sam.vision_encoder, images)
    assert query.kind == kind
    assert features.shape == (2, query.width)
    assert features.dtype == torch.float32
    assert not torch.allclose(features[0], features[1], rtol=0.01)
    for image, expected in zip(images, features, strict=True):
        assert_close(query(sam.vision_encoder, image[None])[0], expected, rtol=1e-5, atol=1e-5)
    # Without gradients to give, nothing is kept for them.
    with torch.enable_grad():
        assert not query(sam.vision_encoder, images).requires_grad


@torch.no_grad()
def test_the_pass_of_its_own_is_full_attention(sam, images):
    encoder, query = sam.vision_encoder, query_of(sam.vision_encoder, "gft_global", seed=1)
    x = torch.cat([query.tokens.expand(2, -1, -1), embed_patches(encoder, images).flatten(1, 2)], 1)
    for block in encoder.layers:
        attention = nn.MultiheadAttention(32, 2, batch_first=True).eval()
        attention.in_proj_weight, attention.in_proj_bias = block.attn.qkv.weight, block.attn.qkv.bias
        attention.out_proj = block.attn.proj
        y = block.layer_norm1(x)
        x = x + attention(y, y, y)[0]
        x = x + block.mlp(block.layer_norm2(x))
    assert_close(query(encoder, images), x[:, 0], rtol=1e-5, atol=1e-5)
    assert query.extra_passes == 1
    with pytest.raises(RuntimeError, match="pass of its own"):
        query.reading(encoder)


@torch.no_grad()
def test_means_and_deviations(sam, images):
    encoder = sam.vision_encoder
    hidden = run_blocks(encoder, embed_patches(encoder, images), 0, 2)
    assert_close(query_of(encoder, "mean_block(1)")(encoder, images), hidden.flatten(1, 2).sum(1) / 64)
    away = hidden.flatten(1, 2) - hidden.flatten(1, 2).mean(1, keepdim=True)
    assert_close(query_of(encoder, "std_block(1)")(encoder, images), (away.square().sum(1) / 64).sqrt())
    embedding = encoder(images).last_hidden_state
    assert_close(query_of(encoder, "mean_neck")(encoder, images), embedding.flatten(2).sum(2) / 64)


@pytest.mark.parametrize(("kind", "options"), [("gft_readonly", {"stop": 2}), ("mean_block(1)", {})])
@torch.no_grad()
def test_blocks_beyond_stop_do_not_matter(sam, images, kind, options):
    encoder, query = sam.vision_encoder, query_of(sam.vision_encoder, kind, **options)
    expected = query(encoder, images)
    assert query.stop == 2
    with query.reading(encoder) as reading:
        run_blocks(encoder, embed_patches(encoder, images), 0, 2)
    assert torch.equal(reading.features, expected)
    for block in encoder.layers[2:]:
        block.mlp.lin1.weight.fill_(torch.nan)
    with query.reading(encoder) as reading:
        assert encoder(images).last_hidden_state.isnan().all()
    assert torch.equal(reading.features, expected)


def test_gradients_reach_the_tokens_and_nothing_else(sam, images):
    model = get_peft_model(sam, LoraConfig(target_modules=LINEARS))
    encoder, query = sam.vision_encoder, query_of(sam.vision_encoder)
    query.tokens.requires_grad_()
    images.requires_grad_()
    with model.disable_adapter():
        query(encoder, images).square().sum().backward()
        assert (query.tokens.grad[0] != 0).all()
        assert (query.tokens.grad[1:] != 0).any()
        assert images.grad is None
        assert all(parameter.grad is None for parameter in model.parameters())

        with query.reading(encoder) as reading, torch.no_grad():
            encoder(images)
        assert reading.features.requires_grad
        with torch.no_grad(), query.reading(encoder) as reading:
            encoder(images)
        assert not reading.features.requires_grad


def test_the_gradient_is_that_of_the_features(images):
    encoder = make_encoder(3).double()
    query = query_of(encoder).double().requires_grad_()
    along = torch.randn(query.tokens.shape, generator=torch.Generator().manual_seed(0)).double()
    features = []
    for step in (-1e-3, 1e-3):  # features are float32
        with torch.no_grad():
            query.tokens.add_(step * along)
            features.append(query(encoder, images.double()).double().sum())
            query.tokens.sub_(step * along)
    query(encoder, images.double()).sum().backward()
    assert_close((query.tokens.grad * along).sum(), (features[1] - features[0]) / 2e-3, rtol=1e-2, atol=1e-3)


def test_the_graph_holds_the_tokens_way_alone(sam, images):
    """Also where the caller's own pass has gradients, to an adapter say."""
    encoder, query = sam.vision_encoder, query_of(sam.vision_encoder)
    query.tokens.requires_grad_()
    sam.requires_grad_(False)
    images.requires_grad_()
    with query.reading(encoder) as reading:
        embedding = encoder(images).last_hidden_state
    reading.features.sum().backward()
    assert images.grad is None
    assert query.tokens.grad is not None
    embedding.sum().backward()
    assert images.grad is not None


@pytest.mark.parametrize("kind", ALONG)
def test_no_hook_is_left(sam, images, kind):
    encoder, query = sam.vision_encoder, query_of(sam.vision_encoder, kind)
    before = hooks_of(sam)
    with query.reading(encoder):
        assert hooks_of(sam) > before
    assert hooks_of(sam) == before
    query(encoder, images)
    with suppress(ZeroDivisionError), query.reading(encoder):
        raise ZeroDivisionError
    assert hooks_of(sam) == before
    with pytest.raises(ValueError, match="size"):
        query(encoder, images[..., :32])
    assert hooks_of(sam) == before
    encoder.layers[1].attn.qkv = nn.Linear(3, 3)
    if query.stop > 1:
        with pytest.raises(RuntimeError, match="shapes"):
            query(encoder, images)
    assert hooks_of(sam) == before


def test_features_come_only_after_all_blocks_that_are_read(sam, images):
    encoder = sam.vision_encoder
    for kind, message in (("gft_readonly", "has run 2 of them"), ("mean_block(2)", "has not run that far")):
        with query_of(encoder, kind).reading(encoder) as reading:
            hidden = run_blocks(encoder, embed_patches(encoder, images), 0, 2)
        with pytest.raises(RuntimeError, match=message):
            reading.features  # noqa: B018
    with query_of(encoder).reading(encoder), pytest.raises(RuntimeError, match="block 2 was run after 0"):
        run_blocks(encoder, hidden, 2)


@torch.no_grad()
def test_the_last_images_count(sam, images):
    encoder, query = sam.vision_encoder, query_of(sam.vision_encoder)
    with query.reading(encoder) as reading:
        encoder(images.flip(0))
        encoder(images[:1])
    assert torch.equal(reading.features, query(encoder, images[:1]))


def test_tokens_depend_on_the_seed_alone(sam):
    state = torch.random.get_rng_state()
    first, again, other = (query_of(sam.vision_encoder, seed=seed).tokens for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.shape == (1 + ASSISTANTS, 32)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not first.requires_grad
    assert torch.equal(query_of(sam.vision_encoder, "gft_global", seed=5).tokens, first)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_half_precision_and_sam_hq(images, kind):
    encoder = make_hq_encoder()
    query = query_of(encoder, kind)
    whole = query(encoder, images)
    half = query(encoder.bfloat16(), images.bfloat16())
    assert half.dtype == torch.float32
    assert_close(half, whole, rtol=0.1, atol=0.2)


@pytest.mark.parametrize(
    ("kind", "stop", "message"),
    [
        ("gft", None, r"`kind` is 'gft'; allowed: 'gft_readonly'"),
        ("mean_block(-1)", None, "`kind` is"),
        ("mean_block(4)", None, r"allowed: mean_block\(0\) to mean_block\(3\)"),
        ("mean_block(2)", 2, r"allowed: mean_block\(0\) to mean_block\(1\)"),
        ("std_block(4)", None, r"allowed: std_block\(0\) to std_block\(3\)"),
        ("mean_neck", 3, "reads all 4 blocks"),
        ("gft_readonly", 0, "`stop` is 0; allowed: 1 to 4"),
        ("gft_global", 5, "`stop` is 5; allowed: 1 to 4"),
    ],
)
def test_queries_that_are_not_there_are_refused(sam, kind, stop, message):
    with pytest.raises(ValueError, match=message):
        query_of(sam.vision_encoder, kind, stop=stop)


@pytest.mark.parametrize("kind", ["gft_readonly", "gft_global"])
def test_tokens_of_another_encoder_are_refused(sam, images, kind):
    sam.config.vision_config.hidden_size = 64
    query = make_query(kind, sam.config.vision_config)
    sam.config.vision_config.hidden_size = 32
    with pytest.raises(ValueError, match="needs one of 32"):
        query(sam.vision_encoder, images)
