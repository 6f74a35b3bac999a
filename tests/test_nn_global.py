"""What the modules of nn_global.py do besides their forward: maps read, masks' memory, the penalty of overlaps."""

from __future__ import annotations

import pytest
import torch
from modules import Row, close, copied, dense_attention, flat, maps, normal, ready
from nn_global import ROWS, masks_of, within
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import visattn_kernels.nn as vn
from visattn_kernels.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))

NAMED = {row.name: row for row in ROWS}
AT = [(0, 0), (3, 2), (4, 6)]


def dense_rows(q, k, at, width, scale, seen=None):
    """Rows of softmax(scale * q kᵀ), one for each point; [B, P, keys]."""
    logits = scale * (flat(q) @ flat(k).transpose(1, 2))
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(2)[:, [y * width + x for y, x in at]]


def pool(x):
    return nn.functional.max_pool2d(x, 2)


LOOKS = {
    "danet-position": lambda m, x: (m.query(x), m.key(x), 1.0),
    "vae-groups": lambda m, x: (m.query(m.norm(x)), m.key(m.norm(x)), 6**-0.5),
    "nonlocal": lambda m, x: (m.query(x), m.key(pool(x)), 1.0),
    "nonlocal-pooled-after": lambda m, x: (m.query(x), pool(m.key(x)), 3**-0.5),
    "nonlocal-gaussian": lambda m, x: (x, pool(x), 6**-0.5),
    "ocnet-base": lambda m, x: (m.context.key(x), m.context.key(x), 2**-0.5),
    "ocnet-pooled": lambda m, x: (m.key(pool(x)), m.key(pool(x)), 3**-0.5),
}
"""Queries, keys and scale."""


@pytest.mark.parametrize("name", LOOKS)
def test_attention_map(name):
    row = NAMED[name]
    module = ready(row)
    x = maps(row, (10, 14) if name == "ocnet-pooled" else (5, 7))[0]
    q, k, scale = LOOKS[name](module, x)
    got = module.attention_map(x, AT)
    assert got.shape[2:] == k.shape[2:]
    close({"map": got.flatten(2)}, {"map": dense_rows(q, k, AT, 7, scale)})


def test_attention_map_of_the_last_time():
    row = NAMED["ccnet"]
    module = ready(row)
    x = maps(row, (5, 7))[0]
    once = vn.CrissCrossAttention(16, recurrence=1).double()
    once.load_state_dict(module.state_dict())
    ys, xs = (i.flatten() for i in torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij"))
    seen = (ys[:, None] == ys) | (xs[:, None] == xs)
    expected = dense_rows(once.query(x), once.key(x), AT, 7, 1.0, seen)
    close({"map": once.attention_map(x, AT).flatten(2)}, {"map": expected})
    close({"map": module.attention_map(x, AT)}, {"map": once.attention_map(once(x), AT)}, rtol=0)


@pytest.mark.parametrize("tensor", [False, True])
def test_attention_map_of_regions(tensor):
    row = NAMED["ocnet-regions"]
    module = ready(row)
    x = maps(row, (8, 10))[0]
    at = [(0, 0), (3, 5), (5, 6), (7, 9)]
    region = (within(8, 3)[:, None] * 3 + within(10, 3)).flatten()
    k = module.key(x)
    expected = dense_rows(k, k, at, 10, 3**-0.5, region[:, None] == region)
    close({"map": module.attention_map(x, torch.tensor(at) if tensor else at).flatten(2)}, {"map": expected})
    assert module.attention_map(x, []).shape == (2, 0, 8, 10)


def test_channel_map():
    x = normal(2, 6, 5, 7)
    weights = vn.DANetChannelAttention().channel_map(x)
    energy = torch.einsum("bchw,bdhw->bcd", x, x)
    close({"map": weights}, {"map": (-energy).softmax(2)})


def test_new_layers_change_nothing():
    """What starts at zero does so."""
    x = normal(2, 16, 5, 7, dtype=torch.float32)
    layers = [
        vn.NonLocalBlock(16),
        vn.NonLocalBlock(16, batch_norm=False),
        vn.DANetPositionAttention(16),
        vn.DANetChannelAttention(),
        vn.CrissCrossAttention(16),
    ]
    for layer in layers:
        assert torch.equal(layer(x), x), layer
    assert not vn.OCNetBlock(16)(x).any()
    assert not torch.equal(vn.NonLocalBlock(16, zero_init=False)(x), x)


FACTORS = {
    "sigma": [vn.SAGANAttention(16)],
    "gamma": [vn.DANetPositionAttention(16), vn.DANetChannelAttention(), vn.CrissCrossAttention(16)],
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", FACTORS)
def test_factors_that_were_scalars_load(name, assign):
    """State dicts of both shapes, of the layer and of a model around it; one of two elements is refused."""
    for layer in FACTORS[name]:
        assert getattr(layer, name).shape == (1,)
        model = nn.Sequential(nn.Identity(), copied(layer))
        for shape in ((), (1,)):
            state = {**layer.state_dict(), name: torch.full(shape, 0.7)}
            model[1].load_state_dict(state, assign=assign)
            assert getattr(model[1], name).tolist() == [pytest.approx(0.7)]
            model.load_state_dict({f"1.{key}": x * 2 for key, x in state.items()}, assign=assign)
            assert getattr(model[1], name).tolist() == [pytest.approx(1.4)]
            assert state[name].shape == shape
        with pytest.raises(RuntimeError, match="size mismatch"):
            layer.load_state_dict({**layer.state_dict(), name: torch.zeros(2)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_do_not_widen(dtype):
    """A factor of float32 beside a map of 16 bits, as a model in 16 bits or under autocast has it."""
    x = normal(1, 16, 4, 4, dtype=dtype)
    assert vn.DANetChannelAttention()(x).dtype == dtype
    for layer in (vn.SAGANAttention(16), vn.DANetPositionAttention(16), vn.CrissCrossAttention(16)):
        with torch.autocast("cpu", dtype):
            assert layer(x).dtype == dtype


def test_dropout_is_of_training():
    x = normal(2, 4, 6, 6, dtype=torch.float32)
    for layer in (vn.BaseOC(4, dropout=1.0), vn.PyramidOC(4, dropout=1.0)):
        assert not layer.train()(x).any()
        assert layer.eval()(x).any()


# Masks


class LargestTensor(TorchDispatchMode):
    """The most elements that an output of any operator has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_no_masked_copy_per_head(activation, normalize):
    """Forward and backward of what is pooled, of the weighted map and of the penalty; all less than two maps."""
    batch, channels, heads, height, width = 2, 8, 6, 5, 7
    module = vn.MultiHeadAttentionMask(channels, heads, activation=activation, normalize=normalize)
    x = normal(batch, channels, height, width, dtype=torch.float32).requires_grad_()
    with LargestTensor() as largest:
        masks = module.masks(x)
        loss = module(x).square().sum() + module.weighted(x).square().sum() + vn.diversity_loss(masks)
        torch.autograd.grad(loss, [x, *module.parameters()])
    assert x.numel() <= largest.elements < 2 * x.numel()
    with LargestTensor() as largest:  # the test sees what it is there to see
        (masks[:, :, None] * x[:, None]).sum((3, 4))
    assert largest.elements == heads * x.numel()


def test_masks_are_read():
    row = NAMED["multi-head-mask-normalized"]
    module = ready(row)
    x = maps(row, (5, 7))[0]
    masks = masks_of(module, x)
    weighted = (masks[:, :, None] * x[:, None]).sum(1)
    close({"masks": module.masks(x), "weighted": module.weighted(x)}, {"masks": masks, "weighted": weighted})
    one = ready(NAMED["spatial-mask"])
    x = maps(NAMED["spatial-mask"], (5, 7))[0]
    mask = masks_of(one, x)
    mean = (mask * x).sum((2, 3)) / mask.sum((2, 3))
    close({"mean": one.pool(x, normalize=True), "mask": one.mask(x)}, {"mean": mean, "mask": mask})
    close({"sum": one.pool(x)}, {"sum": (mask * x).sum((2, 3))})


@pytest.mark.parametrize("norm", ["sqrt", "l2", "sum"])
def test_diversity_loss(norm):
    """Against loops over pairs, and its gradient."""
    masks = normal(2, 3, 4, 5).square().requires_grad_()
    flat_masks = masks.flatten(2)
    if norm == "l2":
        p = flat_masks / flat_masks.square().sum(2, keepdim=True).sqrt()
    else:
        p = flat_masks / flat_masks.sum(2, keepdim=True)
    p = p.sqrt() if norm == "sqrt" else p
    total = sum(((p[:, i] * p[:, j]).sum(1) - int(i == j)).square() for i in range(3) for j in range(3)).mean()
    got = vn.diversity_loss(masks, norm=norm)
    close({"loss": got.detach()}, {"loss": total.detach()})
    close({"grad": torch.autograd.grad(got, masks)[0]}, {"grad": torch.autograd.grad(total, masks)[0]})


@pytest.mark.parametrize("norm", ["sqrt", "l2", "sum"])
def test_diversity_loss_at_its_ends(norm):
    """Masks apart cost nothing, equal ones the most; zeros bring no NaN."""
    apart = torch.eye(4).reshape(1, 4, 2, 2).requires_grad_()
    loss = vn.diversity_loss(apart, norm=norm)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, apart)[0].isfinite().all()
    equal = torch.ones(2, 3, 1, 1)
    assert vn.diversity_loss(equal, norm=norm).item() == pytest.approx(6, rel=1e-6)
    nothing = torch.zeros(1, 3, 4, 5, requires_grad=True)
    loss = vn.diversity_loss(nothing, norm=norm)
    assert loss.item() == pytest.approx(3, rel=1e-6)
    assert torch.autograd.grad(loss, nothing)[0].isfinite().all()


def test_diversity_loss_in_16_bits():
    masks = normal(2, 3, 40, 50, dtype=torch.float16).square() * 100
    exact = vn.diversity_loss(masks.double())
    with torch.autocast("cpu", torch.bfloat16):
        got = vn.diversity_loss(masks)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact.item(), rel=1e-4)


def test_normalized_pool_in_16_bits():
    """The sum of a large mask is no number of float16."""
    x, masks = torch.ones(1, 2, 300, 300, dtype=torch.float16), torch.ones(1, 1, 300, 300, dtype=torch.float16)
    assert vn.masked_pool(x, masks, normalize=True) == pytest.approx(1, rel=0.02)


# Arguments


def ocnet_map(at, regions=2):
    return vn.OCNetBlock(8, regions=regions).attention_map(normal(1, 8, 8, 6, dtype=torch.float32), at)


BAD = [
    (
        lambda: vn.NeighborhoodAttention(8, 3, pad=(True, False)),
        TypeError,
        r"pad to be a bool, but got pad=\(True, False\)",
    ),
    (lambda: vn.WindowAttention(8, 3, pad="no"), TypeError, "pad to be a bool, but got pad='no'"),
    (lambda: vn.NonLocalBlock(8, mode="dot_product"), ValueError, "mode to be one of embedded_gaussian, gaussian"),
    (lambda: vn.NonLocalBlock(8, pool=0), ValueError, "pool of 1 or more, but got pool=0"),
    (lambda: vn.NonLocalBlock(8.0), TypeError, "channels to be an integer"),
    (lambda: vn.OCNetBlock(8, activation="gelu"), ValueError, "activation to be one of relu, leaky_relu"),
    (lambda: vn.PyramidOC(8, regions=()), ValueError, "at least one number of regions"),
    (lambda: vn.PyramidOC(8, regions=3), TypeError, "a sequence of numbers of regions, but got regions=3"),
    (lambda: ocnet_map([(8, 0)]), ValueError, r"0 <= y < 8 and 0 <= x < 6, but got at=\(8, 0\)"),
    (lambda: ocnet_map((1, 2)), TypeError, r"at to be points .*, but got at\[0\]=1"),
    (lambda: ocnet_map([(0, 0)], regions=7), ValueError, "regions=7"),
    (lambda: vn.VAEAttention(32, eps=0.0), ValueError, r"eps to be a positive number, but got eps=0\.0"),
    (
        lambda: vn.SAGANAttention(8)(normal(1, 8, 1, 4, dtype=torch.float32)),
        RuntimeError,
        "2×2, .* but got its size=1×4",
    ),
    (lambda: vn.SAGANAttention(8)(torch.ones(1, 8, 4, 4, dtype=torch.int64)), TypeError, r"x\.dtype=torch\.int64"),
    (lambda: vn.DANetChannelAttention()(torch.ones(1, 8, 0, 4)), RuntimeError, r"x\.shape=\[1, 8, 0, 4\]"),
    (lambda: vn.masked_pool(normal(1, 2, 3, 4), torch.ones(1, 1, 3, 4, dtype=torch.bool)), TypeError, r"masks\.dtype"),
    (lambda: vn.OCNetBlock(8, regions=3)(normal(1, 8, 4, 2, dtype=torch.float32)), ValueError, "regions=3"),
    (lambda: vn.VAEAttention(8), ValueError, "groups to divide 8 channels, but got groups=32"),
    (lambda: vn.CrissCrossAttention(8, recurrence=0), ValueError, "recurrence of 1 or more"),
    (lambda: vn.DANetPositionAttention(8, key_channels=0), ValueError, "key_channels of 1 or more"),
    (lambda: vn.SqueezeExcite(8, gate="tanh"), ValueError, "gate to be one of sigmoid, hard_sigmoid"),
    (lambda: vn.MultiHeadAttentionMask(8, 0), ValueError, "heads of 1 or more"),
    (lambda: vn.diversity_loss(normal(2, 3, 4, 5), norm="l1"), ValueError, "norm to be one of sqrt, l2, sum"),
    (lambda: vn.diversity_loss(normal(2, 3, 4)), RuntimeError, r"masks of shape \[B, C, H, W\]"),
    (lambda: vn.masked_pool(normal(2, 3, 4, 5), normal(2, 3, 5, 4)), RuntimeError, r"masks\.shape=\[2, 3, 5, 4\]"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_arguments(call, kind, message):
    with pytest.raises(kind, match="visattn: expected .*" + message):
        call()


# State dicts of implementations that are no package: their layers, by their names, and their formula


def layers(**parts):
    """A module of parts, whose state dict has their names."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def convolution(inside, outside):
    return nn.Conv2d(inside, outside, 1)


def normed(inside, outside):
    return nn.Sequential(nn.Conv2d(inside, outside, 1), nn.BatchNorm2d(outside))


def three(channels, keys):
    return layers(
        query_conv=convolution(channels, keys),
        key_conv=convolution(channels, keys),
        value_conv=convolution(channels, channels),
        gamma=nn.Parameter(torch.zeros(1)),
    )


def positions(m, x):
    y = dense_attention(flat(m.query_conv(x)), flat(m.key_conv(x)), flat(m.value_conv(x)))
    return x + m.gamma * y.transpose(1, 2).reshape(x.shape)


def pooled_nonlocal():
    pool = nn.MaxPool2d(2)
    return layers(
        g=nn.Sequential(convolution(6, 3), pool),
        theta=convolution(6, 3),
        phi=nn.Sequential(convolution(6, 3), pool),
        W=normed(3, 6),
    )


def nonlocal_forward(m, x):
    y = dense_attention(flat(m.theta(x)), flat(m.phi(x)), flat(m.g(x)))
    return x + m.W(y.transpose(1, 2).reshape(len(x), -1, *x.shape[2:]))


def object_context(values):
    key = normed(4, 2)
    return layers(f_key=key, f_query=key, f_value=convolution(4, values), W=convolution(values, 4))


def in_place(norm, x):
    """The authors' InPlaceABN in evaluation: its factor is positive, and a leaky ReLU follows."""
    y = (x - norm.running_mean[:, None, None]) / (norm.running_var + norm.eps).sqrt()[:, None, None]
    y = y * (norm.weight.abs() + norm.eps)[:, None, None] + norm.bias[:, None, None]
    return torch.where(y < 0, 0.01 * y, y)


def context(m, x):
    k = flat(in_place(m.f_key[1], m.f_key[0](x)))
    y = dense_attention(k, k, flat(m.f_value(x)), k.shape[2] ** -0.5)
    return m.W(y.transpose(1, 2).reshape(len(x), -1, *x.shape[2:]))


def base_oc(m, x):
    return in_place(m.conv_bn_dropout[1], m.conv_bn_dropout[0](torch.cat([context(m.stages[0], x), x], 1)))


def pyramid_oc(m, x):
    """Of one region and of two by two."""
    parts = [[context(m.stages[1], x[:, :, ys, xs]) for xs in cut(x.shape[3])] for ys in cut(x.shape[2])]
    regions = torch.cat([torch.cat(row, 3) for row in parts], 2)
    wide = in_place(m.up_dr[1], m.up_dr[0](x))
    return in_place(m.conv_bn_dropout[1], m.conv_bn_dropout[0](torch.cat([wide, context(m.stages[0], x), regions], 1)))


def criss_cross(m, x):
    """One step of it."""
    y, column = (i.flatten() for i in torch.meshgrid(*map(torch.arange, x.shape[2:]), indexing="ij"))
    seen = (y[:, None] == y) | (column[:, None] == column)
    bias = x.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)
    gathered = dense_attention(flat(m.query_conv(x)), flat(m.key_conv(x)), flat(m.value_conv(x)), 1.0, bias)
    return x + m.gamma * gathered.transpose(1, 2).reshape(x.shape)


def gaussian(m, x):
    small = flat(nn.functional.max_pool2d(x, 2))
    y = dense_attention(flat(x), small, flat(m.g(x)))
    return x + m.W(y.transpose(1, 2).reshape(len(x), -1, *x.shape[2:]))


def attn_block(m, x):
    h = m.norm(x)
    y = dense_attention(flat(m.q(h)), flat(m.k(h)), flat(m.v(h)), x.shape[1] ** -0.5)
    return x + m.proj_out(y.transpose(1, 2).reshape(x.shape))


def attention_block(m, x):
    """Linear layers over a sequence of positions."""
    h = flat(m.group_norm(x))
    y = dense_attention(m.query(h), m.key(h), m.value(h), x.shape[1] ** -0.5)
    return x + m.proj_attn(y).transpose(1, 2).reshape(x.shape)


def base_oc_context(m, x):
    return in_place(m.conv_bn_dropout[1], m.conv_bn_dropout[0](context(m.stages[0], x)))


def cut(length):
    return slice(0, length // 2), slice(length // 2, length)


THEIRS = {
    "NONLocalBlock2D": (6, pooled_nonlocal, nonlocal_forward, lambda: vn.NonLocalBlock(6, pool_first=False)),
    "NONLocalBlock2D-no-norm": (
        6,
        lambda: layers(g=convolution(6, 3), theta=convolution(6, 3), phi=convolution(6, 3), W=convolution(3, 6)),
        nonlocal_forward,
        lambda: vn.NonLocalBlock(6, pool=1, batch_norm=False),
    ),
    "NONLocalBlock2D-gaussian": (
        6,
        lambda: layers(g=nn.Sequential(convolution(6, 3), nn.MaxPool2d(2)), W=normed(3, 6)),
        gaussian,
        lambda: vn.NonLocalBlock(6, mode="gaussian", pool_first=False),
    ),
    "CrissCrossAttention": (16, lambda: three(16, 2), criss_cross, lambda: vn.CrissCrossAttention(16, recurrence=1)),
    "AttnBlock": (
        32,
        lambda: layers(
            norm=nn.GroupNorm(32, 32, 1e-6), **{name: convolution(32, 32) for name in ("q", "k", "v", "proj_out")}
        ),
        attn_block,
        lambda: vn.VAEAttention(32),
    ),
    "AttentionBlock": (
        32,
        lambda: layers(
            group_norm=nn.GroupNorm(32, 32, 1e-5),
            **{name: nn.Linear(32, 32) for name in ("query", "key", "value", "proj_attn")},
        ),
        attention_block,
        lambda: vn.VAEAttention(32, eps=1e-5),
    ),
    "PAM_Module": (16, lambda: three(16, 2), positions, lambda: vn.DANetPositionAttention(16)),
    "SelfAttentionBlock2D": (
        4,
        lambda: object_context(3),
        context,
        lambda: vn.OCNetBlock(4, value_channels=3, activation="leaky_relu"),
    ),
    "BaseOC_Module": (
        4,
        lambda: layers(stages=nn.ModuleList([object_context(2)]), conv_bn_dropout=normed(8, 4)),
        base_oc,
        lambda: vn.BaseOC(4, activation="leaky_relu"),
    ),
    "BaseOC_Context_Module": (
        4,
        lambda: layers(stages=nn.ModuleList([object_context(2)]), conv_bn_dropout=normed(4, 4)),
        base_oc_context,
        lambda: vn.BaseOC(4, concat=False, activation="leaky_relu"),
    ),
    "Pyramid_OC_Module": (
        4,
        lambda: layers(
            stages=nn.ModuleList([object_context(4), object_context(4)]),
            conv_bn_dropout=normed(16, 4),
            up_dr=normed(4, 8),
        ),
        pyramid_oc,
        lambda: vn.PyramidOC(4, regions=(1, 2), activation="leaky_relu"),
    ),
    "SELayer": (
        32,
        lambda: layers(fc=nn.Sequential(nn.Linear(32, 2, False), nn.ReLU(), nn.Linear(2, 32, False), nn.Sigmoid())),
        lambda m, x: x * m.fc(x.mean((2, 3)))[:, :, None, None],
        lambda: vn.SqueezeExcite(32, bias=False),
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_translated_by_names(name):
    channels, make, forward, ours = THEIRS[name]
    theirs, ours = ready(Row(name, make, forward)), ours().double().eval()
    state = type(ours).translate(theirs.state_dict())
    assert all(x.is_contiguous() for x in state.values())  # as safetensors and FSDP2 want them
    ours.load_state_dict(state)
    for size in ((4, 6), (5, 7)):
        x = normal(2, channels, *size)
        close({"out": ours(x).detach()}, {"out": forward(theirs, x).detach()})


def test_translated_gammas():
    """Of the layers whose weights have the names of others here: CCNet's, mmcv's, and the channels' of DANet."""
    state = three(16, 2).double().state_dict()
    for shape in ((), (1,)):
        for ours in (vn.CrissCrossAttention(16).double(), vn.DANetPositionAttention(16).double()):
            ours.load_state_dict(ours.translate({**state, "gamma": torch.full(shape, 2.0)}))
            assert ours.gamma.tolist() == [2]
        channels = vn.DANetChannelAttention()
        channels.load_state_dict(channels.translate({"gamma": torch.full(shape, 0.5)}))
        assert channels.gamma.tolist() == [0.5]
    ours = vn.CrissCrossAttention(16).double()
    state["gamma.scale"] = state.pop("gamma")[0] + 3
    ours.load_state_dict(ours.translate(state))
    assert ours.gamma.tolist() == [3]
    with pytest.raises(ValueError, match="expected a state dict with the entries"):
        channels.translate(state)


SAGAN_NAMES = {
    "biggan": {"query": "theta", "key": "phi", "value": "g", "project": "o", "sigma": "gamma"},
    "snconv": {"query": "snconv1x1_theta", "key": "snconv1x1_phi", "value": "snconv1x1_g", "project": "snconv1x1_attn"},
    "tutorial": {"query": "query_conv", "key": "key_conv", "value": "value_conv", "sigma": "gamma"},
}


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("which", SAGAN_NAMES)
def test_sagan_of_others(which: str, shape: tuple[int, ...]) -> None:
    """Their names, and gammas of no dimension and of one."""
    options = {"pool": 1, "bias": True, "project": False} if which == "tutorial" else {}
    ours = ready(Row("sagan", lambda: vn.SAGANAttention(8, **options), None))
    theirs = {}
    for name, x in ours.state_dict().items():
        layer, dot, rest = name.partition(".")
        theirs[SAGAN_NAMES[which].get(layer, layer) + dot + rest] = x.reshape(shape) if layer == "sigma" else x
    fresh = vn.SAGANAttention(8, **options).double()
    fresh.load_state_dict(vn.SAGANAttention.translate(theirs))
    x = normal(1, 8, 4, 6)
    torch.testing.assert_close(fresh(x), ours(x), rtol=0, atol=0)


@pytest.mark.parametrize("old", [True, False], ids=["torch", "biggan"])
def test_sagan_with_spectral_norm_of_others(old: bool) -> None:
    """torch's older spectral norm, and BigGAN-PyTorch's, which keeps u as a row and the singular value beside it."""
    make = torch.nn.utils.spectral_norm if old else lambda layer: layer
    theirs = torch.nn.ModuleDict({name: torch.nn.Conv2d(*sizes, 1, bias=False) for name, sizes in
                                  {"theta": (8, 1), "phi": (8, 1), "g": (8, 4), "o": (4, 8)}.items()})  # fmt: skip
    theirs = torch.nn.ModuleDict({name: make(layer) for name, layer in theirs.items()}).double()
    state = {"gamma": torch.tensor(0.7, dtype=torch.float64)}
    for name, layer in theirs.items():
        for _ in range(30 if old else 0):
            layer.train()(normal(1, layer.in_channels, 2, 2))
        if not old:  # as it is early in training, far from the singular vector
            state |= {f"{name}.u0": normal(1, layer.out_channels), f"{name}.sv0": torch.ones(1)}
        state |= {f"{name}.{key}": x for key, x in layer.state_dict().items()}
    ours = vn.SAGANAttention(8, spectral_norm=True).double()
    ours.load_state_dict(vn.SAGANAttention.translate(state))
    for name, layer in {"theta": ours.query, "phi": ours.key, "g": ours.value, "o": ours.project}.items():
        weight = (theirs[name].weight_orig if old else theirs[name].weight).detach()
        if old:
            largest = torch.linalg.matrix_norm(weight.flatten(1), 2)
        else:  # BigGAN-PyTorch's `power_iteration`, which steps in evaluation too
            v = torch.nn.functional.normalize(state[f"{name}.u0"] @ weight.flatten(1))
            u = torch.nn.functional.normalize(v @ weight.flatten(1).T)
            largest = (v @ weight.flatten(1).T @ u.T).squeeze()
        torch.testing.assert_close(layer.eval().weight, weight / largest, rtol=1e-6, atol=1e-9)
