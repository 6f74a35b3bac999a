"""The example that swaps attention: its models in float64 before and after, what it refuses, its command."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published import published
from torch import nn

from examples import runs, swap_in
from visattn_kernels.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))

ROOT = Path(__file__).parents[1]


def hold(model: nn.Module, x: torch.Tensor, layers: int) -> nn.Module:
    """Results and gradients of the input before and after; the swapped model."""
    model, x = model.double(), x.double()
    swapped = copy.deepcopy(model)
    assert swap_in.swap(swapped) == layers
    assert list(swapped.state_dict()) == list(model.state_dict())
    assert max(swap_in.differences(model, swapped, x)) < 1e-9
    return swapped


@pytest.mark.parametrize("image", [56, 112, 68], ids=["one-window", "shifted", "shifted-and-padded"])
def test_swin(image):
    published("timm")
    model, x = swap_in.Settings("swin", image, 2, 2, 0).build()
    before = copy.deepcopy(model).double()
    swapped = hold(model, x, 2)
    with pytest.raises(ValueError, match=r"expected .*attn.forward to be that of its class.* Is the model swapped"):
        swap_in.swap(swapped)
    for copied in (copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped))):
        with torch.no_grad():
            copied.layers[0].blocks[1].attn.qkv.weight.mul_(1.1)  # its own, and what its attention reads
        assert swap_in.differences(swapped, copied, x.double())[0] > 1e-3
    swapped.load_state_dict({name: value * 0.9 for name, value in before.state_dict().items()})
    before.load_state_dict(swapped.state_dict())
    assert max(swap_in.differences(before, swapped, x.double())) < 1e-9


def sam_encoder(tokens: int, **options: object) -> nn.Module:
    """An encoder of two narrow layers, with windows of 3 and with the whole map, and random tables."""
    SamVisionConfig = published("transformers.models.sam.configuration_sam", "SamVisionConfig")
    SamVisionEncoder = published("transformers.models.sam.modeling_sam", "SamVisionEncoder")
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "output_channels": 8, "num_hidden_layers": 2}
    config = SamVisionConfig(
        **sizes, window_size=3, global_attn_indexes=[1], image_size=4 * tokens, patch_size=4, **options
    )
    model = SamVisionEncoder(config).eval()
    runs.seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    return model


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "plain"])
@pytest.mark.parametrize("tokens", [6, 7], ids=["divides", "padded"])
def test_sam(tokens, relative):
    model = sam_encoder(tokens, use_rel_pos=relative, attn_implementation="sdpa")
    swapped = hold(model, torch.randn(2, 3, 4 * tokens, 4 * tokens), 2)
    with pytest.raises(ValueError, match="Is the model swapped already"):
        swap_in.swap(swapped)
    with pytest.raises(NotImplementedError, match="attention_map reads rows"):
        swapped.layers[0].attn(torch.zeros(1, 3, 3, 24), output_attentions=True)


def test_a_wrong_table_would_show():
    model = sam_encoder(6, attn_implementation="sdpa").double()
    swapped = copy.deepcopy(model)
    swap_in.swap(swapped)
    for layer in swapped.layers:
        layer.attn.rel_pos_h.data = layer.attn.rel_pos_h.data.flip(0)
    assert swap_in.differences(model, swapped, torch.randn(1, 3, 24, 24).double())[0] > 1e-3


def dropped(model: nn.Module) -> nn.Module:
    """With dropout of the second layer's weights, which a swap meets after the first."""
    model.layers[1].attn.dropout = 0.1
    return model


def test_dropout():
    model = dropped(sam_encoder(6, attn_implementation="eager"))
    before = [dict(vars(layer)) for layer in model.layers]
    with pytest.raises(NotImplementedError, match=r"visattn: expected no dropout .*, but got dropout=0.1. Set it to 0"):
        swap_in.swap(model.train())
    assert [dict(vars(layer)) | {"training": False} for layer in model.layers] == before
    assert "forward" not in vars(model.layers[0].attn)
    assert swap_in.swap(model.eval()) == 2
    x = torch.randn(1, 3, 24, 24)
    assert swap_in.result(model, x).isfinite().all()
    with pytest.raises(NotImplementedError, match="expected no dropout"):
        model.train()(x)


def test_dropout_of_swin():
    SwinTransformerBlock = published("timm.models.swin_transformer", "SwinTransformerBlock")
    block = SwinTransformerBlock(24, (14, 14), num_heads=3, window_size=7, attn_drop=0.1)
    with pytest.raises(NotImplementedError, match="expected no dropout"):
        swap_in.swap(block)
    assert swap_in.swap(block.eval()) == 1
    with pytest.raises(NotImplementedError, match="expected no dropout"):
        block.train()(torch.randn(1, 14, 14, 24))


def test_classes_that_are_not_known():
    SwinTransformerBlock = published("timm.models.swin_transformer", "SwinTransformerBlock")

    class Other(SwinTransformerBlock):
        pass

    with pytest.raises(NotImplementedError, match=r"whose code is known, but got type\(0\)=.*Other"):
        swap_in.swap(nn.Sequential(Other(24, (14, 14), num_heads=3)))
    block = SwinTransformerBlock(24, (14, 14), num_heads=3)
    block.attn = nn.Identity()
    with pytest.raises(NotImplementedError, match=r"expected 0\.attn to be"):
        swap_in.swap(nn.Sequential(block))


def test_models_without_a_layer():
    with pytest.raises(NotImplementedError, match=r"expected a model with layers of .*, but got model=Linear"):
        swap_in.swap(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, but got model=None"):
        swap_in.swap(None)


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """What the command says of options that it does not take."""
    monkeypatch.setattr(sys, "argv", ["swap_in", *options])
    with pytest.raises(SystemExit) as end:
        runs.command(swap_in.main)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--model", "vit"], "visattn: expected --model to be one of swin, sam, but got --model=vit"),
        (["--image", "57"], "visattn: expected --image to be a multiple of 4, but got --image=57"),
        (["--layers", "13"], "visattn: expected --layers of at most 12, but got --layers=13"),
    ],
)
def test_options(options, line, capsys, monkeypatch):
    assert refused(capsys, monkeypatch, *options) == line + "\n"


@pytest.mark.parametrize(("model", "name"), [("swin", "timm"), ("sam", "transformers")])
def test_a_library_that_is_not_there(model, name, capsys, monkeypatch):
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    line = f"visattn: --model {model} needs {name}, which is not installed. Use pip install '.[published]'\n"
    assert refused(capsys, monkeypatch, "--model", model) == line


def test_command(tmp_path):
    published("timm")
    options = ["--image", "56", "--layers", "2", "--batch", "1", "--repeats", "1", "--threads", "1"]
    command = [sys.executable, "-m", "examples.swap_in", *options, "--output", tmp_path]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "12/12" in run.stderr
    title, _, head, _, *rows = (tmp_path / "compare.md").read_text().splitlines()
    assert title.startswith("swin_tiny_patch4_window7_224 before and after 2 layers are swapped, images 1×3×56²")
    assert [name.strip() for name in head.strip("| ").split("|")] == list(swap_in.HEAD)
    cells = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]
    assert [row[0] for row in cells] == list(swap_in.PASSES)
    assert all(float(row[-1]) < 1e-5 for row in cells)
