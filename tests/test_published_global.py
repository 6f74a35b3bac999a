"""State dicts of published implementations in the modules of `visattn_kernels.nn`: the layers must agree in float64.

Against timm, torchvision, diffusers and mmcv; each is skipped where it is not installed. Layers of no package are in
test_nn_global.py, by the names of their entries.
"""

from __future__ import annotations

import pytest
from modules import Row, close, normal, ready
from published import published
from torch import nn

import visattn_kernels.nn as vn


def hold(theirs, ours, channels: int) -> None:
    """Their random weights, translated, give their results."""
    theirs = ready(Row("theirs", lambda: theirs, lambda module, x: x))
    ours = ours.double().eval()
    ours.load_state_dict(ours.translate(theirs.state_dict()))
    for height, width in ((4, 6), (5, 7)):
        x = normal(2, channels, height, width)
        close({"out": ours(x).detach()}, {"out": theirs(x).detach()})


@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("norm", [None, {"type": "BN"}])
@pytest.mark.parametrize(
    ("mode", "scale"), [("embedded_gaussian", None), ("embedded_gaussian", 1.0), ("gaussian", 1.0)]
)
def test_nonlocal_of_mmcv(mode, scale, norm, sub_sample):
    make = published("mmcv.cnn", "NonLocal2d")
    theirs = make(6, mode=mode, use_scale=scale is None, norm_cfg=norm, sub_sample=sub_sample)
    pool = 2 if sub_sample else 1
    ours = vn.NonLocalBlock(6, mode=mode, pool=pool, pool_first=False, scale=scale, batch_norm=norm is not None)
    hold(theirs, ours, 6)


@pytest.mark.parametrize("use_scale", [False, True])
def test_nonlocal_of_timm(use_scale):
    theirs = published("timm.layers.non_local_attn", "NonLocalAttn")(16, use_scale=use_scale, rd_channels=5)
    ours = vn.NonLocalBlock(16, inner_channels=5, pool=1, scale=16**-0.5 if use_scale else 1.0)
    hold(theirs, ours, 16)


def test_vae_of_diffusers():
    """As its autoencoders make it."""
    theirs = published("diffusers.models.attention_processor", "Attention")(
        8,
        heads=1,
        dim_head=8,
        norm_num_groups=4,
        eps=1e-6,
        bias=True,
        residual_connection=True,
        upcast_softmax=True,
        _from_deprecated_attn_block=True,
    )
    hold(theirs, vn.VAEAttention(8, groups=4), 8)


def test_vae_in_an_autoencoder_of_diffusers():
    """The layer that the whole model has, with the widths of its own."""
    block = published("diffusers.models.unets.unet_2d_blocks", "UNetMidBlock2D")(
        64, temb_channels=None, attention_head_dim=64
    )
    hold(block.attentions[0], vn.VAEAttention(64), 64)


@pytest.mark.parametrize(("act", "activation"), [(nn.ReLU, "relu"), (nn.SiLU, "silu")])
@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
def test_squeeze_excite_of_timm(act, activation, gate):
    theirs = published("timm.models._efficientnet_blocks", "SqueezeExcite")(16, act_layer=act, gate_layer=gate)
    hold(theirs, vn.SqueezeExcite(16, rd_channels=4, activation=activation, gate=gate), 16)


@pytest.mark.parametrize("bias", [False, True])
def test_se_module_of_timm(bias):
    theirs = published("timm.layers", "SEModule")(32, bias=bias)
    hold(theirs, vn.SqueezeExcite(32, rd_channels=8, bias=bias), 32)


@pytest.mark.parametrize(("scale", "gate"), [(nn.Sigmoid, "sigmoid"), (nn.Hardsigmoid, "hard_sigmoid")])
def test_squeeze_excite_of_torchvision(scale, gate):
    theirs = published("torchvision.ops", "SqueezeExcitation")(16, 4, nn.ReLU, scale)
    hold(theirs, vn.SqueezeExcite(16, reduction=4, gate=gate), 16)


def test_feature_extraction_of_torchvision():
    """Our modules are nodes of its graphs, by the names that they have in the model, and give what hooks see."""
    extractor = published("torchvision.models.feature_extraction", "create_feature_extractor")
    model = nn.Sequential()
    model.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
    model.stage = nn.Sequential(vn.SwinBlock(16, 3, shift=1, heads=2), vn.SAGANAttention(16, spectral_norm=True))
    model.last = vn.NonLocalBlock(16)
    model = ready(Row("model", lambda: model, None))
    seen = {}
    for name in ("stage.0", "stage.1", "last"):
        model.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: seen.update({name: y.detach()}))
    features = extractor(model, {"stage.0": "first", "stage.1": "second", "last": "third"})
    for height, width in ((12, 9), (7, 14)):
        x = normal(2, 3, height, width)
        out = model(x).detach()
        got = {name: y.detach() for name, y in features(x).items()}
        close(got, dict(zip(("first", "second", "third"), (seen["stage.0"], seen["stage.1"], out), strict=True)), 0)
