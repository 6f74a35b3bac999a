"""Equivalence with what others published: Swin and MaxViT of timm, SAM's encoder of transformers.

Each test runs their module with random weights, and our attention on q, k and v of their own projection with their own
table, brought into our order. Results and the gradients of the input and of every parameter must agree to the policy's
rule for float64. `make published` installs the two libraries, which nothing else needs.
"""

from __future__ import annotations

import pytest
import torch
from published import published
from tolerance import UNIT

import visattn_kernels as va
from visattn_kernels import backends

MaxxVitTransformerCfg, PartitionAttentionCl = published(
    "timm.models.maxxvit", "MaxxVitTransformerCfg", "PartitionAttentionCl"
)
SwinTransformerBlock = published("timm.models.swin_transformer", "SwinTransformerBlock")
SamVisionConfig = published("transformers.models.sam.configuration_sam", "SamVisionConfig")
SamVisionAttention, SamVisionLayer, SamVisionSdpaAttention = published(
    "transformers.models.sam.modeling_sam", "SamVisionAttention", "SamVisionLayer", "SamVisionSdpaAttention"
)

BACKENDS = [backend.name for backend in backends.REGISTRY if not backend.unavailable()]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every backend that is there."""
    return request.param


def random_weights(module):
    """The module in float64, every parameter normal: tables start at zero otherwise, which would show nothing."""
    module = module.double().eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread
    return module


def image(*shape):
    """A normal map in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def hold(module, theirs, ours, x, where=...):
    """Compare `theirs(x)` with `ours(x)`, and the gradients of x and of the parameters, over the positions `where`."""
    parameters = dict(module.named_parameters())
    results = []
    for forward in (theirs, ours):
        leaf = x.clone().requires_grad_()
        out = forward(leaf)
        grad = torch.zeros_like(out)
        grad[where] = image(*out.shape)[where]
        gradients = torch.autograd.grad(out, [leaf, *parameters.values()], grad, allow_unused=True)
        names = ("out", "input", *parameters)
        results.append(dict(zip(names, (out.detach()[where], *gradients), strict=True)))
    expected, got = results
    for name, value in expected.items():
        assert (value is None) == (got[name] is None), name
        if value is not None:
            torch.testing.assert_close(
                got[name], value, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
            )
            if name != "input":
                assert value.abs().max() > 1e-6 or name.endswith("qkv.bias"), f"{name} shows nothing"
    return expected, got


def query_minus_key(table):
    """A table by query minus key, `[2Kh-1, 2Kw-1, heads]`, by key minus query, `[heads, 2Kh-1, 2Kw-1]`."""
    return table.flip(0, 1).permute(2, 0, 1)


# Swin


def swin(block, backend):
    """A Swin block whose attention is ours."""
    attn, window, shift = block.attn, block.window_size, block.shift_size

    def forward(x):
        qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1))  # [B, H, W, 3, heads, D]
        table = attn.relative_position_bias_table.unflatten(0, [2 * size - 1 for size in window])
        y = va.attention(
            *qkv.unbind(3),
            va.Window(window, shift=shift),
            scale=attn.scale,
            terms=(va.RelativeBias(query_minus_key(table)),),
            backend=backend,
        )
        x = x + attn.proj(y.flatten(3))
        return x + block.mlp(block.norm2(x))

    return forward


def negligible(block, x):
    """Whether a weight of exp(-100), relative to the others, is nothing in float64.

    Swin masks by adding -100, so the keys of other windows keep a share of the softmax. Logits differ by no more than
    their range, so a key that is masked has at most exp(range - 100) of the weight of one that is not, and all of them
    together at most the area of the window times that.
    """
    attn = block.attn
    q, k, _ = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
    products = attn.scale * q.norm(dim=-1).amax() * k.norm(dim=-1).amax()
    spread = 2 * (products + attn.relative_position_bias_table.abs().amax())
    return attn.window_area * torch.exp(spread - 100) < torch.finfo(torch.float64).eps


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [((14, 21), 7, 3), ((14, 21), 7, 0), ((12, 20), (4, 5), (2, 1)), ((9, 6), (3, 2), (1, 0))],
    ids=str,
)
def test_swin(grid, window, shift, backend):
    block = random_weights(SwinTransformerBlock(24, grid, num_heads=3, window_size=window, shift_size=shift))
    assert (block.window_size, block.shift_size) == (
        va.Window(window, shift).window_size,
        va.Window(window, shift).shift,
    )
    x = image(2, *grid, 24)
    assert negligible(block, x)
    hold(block, block, swin(block, backend), x)


def test_swin_where_the_window_does_not_divide_the_map(backend):
    """Timm pads the rolled map with zero tokens, which are attended unmasked, as the biases of the projection.

    Rolled by 3, rows 3 to 9 of this map and columns 3 to 16 fill whole windows, where the two agree; rows 0 to 2 and
    columns 0 to 2 share a window with padding. Ours has none: there the two must differ.
    """
    block = random_weights(SwinTransformerBlock(24, (10, 17), num_heads=3, window_size=7, shift_size=3))
    x = image(2, 10, 17, 24)
    assert negligible(block, x)
    hold(block, block, swin(block, backend), x, (slice(None), slice(3, None), slice(3, None)))
    difference = (block(x) - swin(block, backend)(x)).abs().amax((0, 3))
    assert difference[:3].min() > 1e-6
    assert difference[:, :3].min() > 1e-6


# MaxViT


@pytest.mark.parametrize("partition", ["grid", "block"])
@pytest.mark.parametrize("table", ["bias", "bias_tf"])
@pytest.mark.parametrize("head_first", [True, False])
def test_maxvit(partition, table, head_first, backend):
    """The table of "bias" is by query minus key as Swin's, that of "bias_tf", the paper's own, by key minus query."""
    config = MaxxVitTransformerCfg(
        dim_head=8, head_first=head_first, rel_pos_type=table, window_size=(5, 7), grid_size=(5, 7)
    )
    module = random_weights(PartitionAttentionCl(24, partition, config))
    attn = module.attn
    assert attn.rel_pos is not None
    pattern = va.Grid((5, 7)) if partition == "grid" else va.Window((5, 7))

    def ours(x):
        qkv = attn.qkv(module.norm1(x))  # [B, H, W, 3 * heads * D]
        if head_first:
            q, k, v = qkv.unflatten(-1, (attn.num_heads, -1)).chunk(3, -1)
        else:
            q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
        stored = attn.rel_pos.relative_position_bias_table
        entries = query_minus_key(stored.unflatten(0, (9, 13))) if table == "bias" else stored
        y = va.attention(q, k, v, pattern, scale=attn.scale, terms=(va.RelativeBias(entries),), backend=backend)
        x = x + module.ls1(attn.proj(y.flatten(3)))
        return x + module.ls2(module.mlp(module.norm2(x)))

    hold(module, module, ours, image(2, 15, 21, 24))


# SAM


def sam_config(side, **options):
    """An encoder of 3 heads of 8 on a map of `side` by `side` tokens."""
    return SamVisionConfig(hidden_size=24, num_attention_heads=3, image_size=side, patch_size=1, mlp_dim=48, **options)


def sam_terms(attn):
    """SAM's decomposed relative positions: tables by query minus key, q without the attention's scale."""
    return (va.RelativeQuery(attn.rel_pos_h.flip(0), attn.rel_pos_w.flip(0)),)


def sam_qkv(attn, x):
    """q, k and v, each [B, H, W, heads, D]."""
    return attn.qkv(x).unflatten(-1, (3, attn.num_attention_heads, -1)).unbind(3)


def test_sam_global(backend):
    attn = random_weights(SamVisionSdpaAttention(sam_config(13), window_size=0))

    def ours(x):
        y = va.attention(*sam_qkv(attn, x), va.Global(), scale=attn.scale, terms=sam_terms(attn), backend=backend)
        return attn.proj(y.flatten(3))

    hold(attn, lambda x: attn(x)[0], ours, image(2, 13, 13, 24))


@pytest.mark.parametrize("side", [14, 17], ids=["divides", "padded"])
def test_sam_windowed(side, backend):
    """Tokens are padded with zeros before the projection, so that padded keys are its biases, and unmasked.

    To ours they are tokens of a larger map, of which the result is cut out.
    """
    layer = random_weights(SamVisionLayer(sam_config(side, attn_implementation="sdpa"), window_size=7))
    attn = layer.attn
    assert isinstance(attn, SamVisionSdpaAttention)
    pad = -side % 7

    def ours(x):
        tokens = torch.nn.functional.pad(layer.layer_norm1(x), (0, 0, 0, pad, 0, pad))
        q, k, v = sam_qkv(attn, tokens)
        biases = attn.qkv.bias.unflatten(0, (3, attn.num_attention_heads, -1))
        assert torch.equal(k[:, side:], biases[1].expand_as(k[:, side:]))
        assert torch.equal(v[:, :, side:], biases[2].expand_as(v[:, :, side:]))
        y = va.attention(q, k, v, va.Window(7), scale=attn.scale, terms=sam_terms(attn), backend=backend)
        x = x + attn.proj(y.flatten(3)[:, :side, :side])
        return x + layer.mlp(layer.layer_norm2(x))

    hold(layer, layer, ours, image(2, side, side, 24))


def test_the_map_of_sam(backend):
    """The weights that SAM's eager attention returns are rows of `attention_map`.

    It takes the softmax in float32 whatever the dtype: each logit s is rounded by u |s|, which moves a weight by twice
    that much of itself, and the exponential, the sum and the quotient round by a few u more.
    """
    attn = random_weights(SamVisionAttention(sam_config(9), window_size=0))
    x = image(2, 9, 9, 24)
    q, k, _ = sam_qkv(attn, x)
    at = [(i, j) for i in range(9) for j in range(9)]
    rows = va.attention_map(q, k, at, va.Global(), scale=attn.scale, terms=sam_terms(attn), backend=backend)
    theirs = attn(x)[1].unflatten(0, (2, 3)).transpose(1, 2).unflatten(-1, (9, 9))  # [B, N, heads, 9, 9]
    tables = sum(table.norm(dim=-1).amax() for table in (attn.rel_pos_h, attn.rel_pos_w))
    largest = q.norm(dim=-1).amax() * (attn.scale * k.norm(dim=-1).amax() + tables)
    bound = (2 * largest + 8) * UNIT[torch.float32]
    assert ((theirs - rows).abs() <= bound * rows).all()
