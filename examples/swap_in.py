"""Published models with our attention in the place of theirs: Swin of timm, and the encoder of SAM of transformers.

    python -m examples.swap_in --model swin --output out/swap_in

`swap(model)` changes a model in place; its parameters, and their names, stay. The command gives a model random weights,
swaps a copy, and writes a table of both: how far their results and gradients differ, their time, and their memory.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from torch import nn

from examples import runs
from visattn_kernels import Global, RelativeBias, RelativeQuery, Window, attention
from visattn_kernels.errors import expected, told
from visattn_kernels.nn.common import by_head
from visattn_kernels.viz.exits import InputError

Change = tuple[Any, str, Any]
"""An object, one of its attributes, and what that becomes."""


def swap(model: nn.Module) -> int:
    """Replace the attention of every layer in place that is timm's `SwinTransformerBlock` or SAM's `SamVisionLayer`.

    Parameters, state dicts and hooks stay as they are, and so does whatever else attends, such as SAM's decoder. A
    swapped model can be copied, pickled, trained, and put on another device. Weights of SAM's layers are not returned;
    `visattn_kernels.attention_map` reads rows of them.

    Returns:
        The number of layers replaced.

    Raises:
        TypeError: `model` is no module.
        ValueError: it is swapped already.
        NotImplementedError: it has no such layer, a layer of another class or version, or one with dropout of its
            weights, in training; nothing is changed then. Dropout that begins later raises when it does.
    """
    if not isinstance(model, nn.Module):
        raise expected("model to be a torch.nn.Module", "model", told(model), TypeError)
    layers = [(name, layer, base) for name, layer in model.named_modules() if (base := _covered(layer))]
    changes = []
    for name, layer, base in layers:
        _same_class(layer, base, name)
        changes += LAYERS[base](layer, name)
    if not layers:
        names = " or ".join(LAYERS)
        hint = "visattn_kernels.nn has layers of other papers."
        raise expected(f"a model with layers of {names}", "model", type(model).__name__, NotImplementedError, hint)
    for changed, attribute, value in changes:
        setattr(changed, attribute, value)
    return len(layers)


# Swin


def swin_attention(block: Any, x: torch.Tensor) -> torch.Tensor:
    """What a block of Swin gathers: its windows, shifted or not, are a pattern on the map as it lies.

    Swin adds -100 where ours leaves a pair out: the same to rounding while logits differ by much less than that.

    Args:
        block: timm's `SwinTransformerBlock`.
        x: Tensor[B, H, W, C].
    """
    attn, window, shift = block.attn, block.window_size, block.shift_size
    _no_dropout(attn, attn.attn_drop.p)
    _, height, width, _ = x.shape
    bottom, right = -height % window[0], -width % window[1]
    back = (-shift[0], -shift[1])
    if bottom or right:
        # timm pads what it has rolled, so that its first rows and columns come to lie beyond the padding.
        x = nn.functional.pad(torch.roll(x, back, (1, 2)), (0, 0, 0, right, 0, bottom))
        x = torch.roll(x, shift, (1, 2))
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(3)  # views [B, H, W, heads, D]
    bias = RelativeBias(by_head(attn.relative_position_bias_table, window))
    y = attention(q, k, v, Window(window, shift), scale=attn.scale, terms=(bias,)).flatten(3)
    if bottom or right:
        y = torch.roll(torch.roll(y, back, (1, 2))[:, :height, :width], shift, (1, 2))
    out: torch.Tensor = attn.proj_drop(attn.proj(y))
    return out


def _swin(block: Any, name: str) -> list[Change]:
    """The block's call of its attention skips what rolls, pads and partitions."""
    _same_class(block.attn, "timm.models.swin_transformer.WindowAttention", f"{name}.attn")
    _fit(block, name, "_attn", "window_size", "shift_size")
    _no_dropout(block.attn, block.attn.attn_drop.p)
    return [*_forward(block.attn, name, partial(swin_attention, block)), (block, "_attn", block.attn.__call__)]


# SAM


def sam_attention(
    attn: Any, window_size: int, hidden_states: torch.Tensor, output_attentions: bool | None = None
) -> tuple[torch.Tensor, None]:
    """What a layer of SAM gathers, over the whole map or inside windows, and None for its weights.

    Args:
        attn: transformers' `SamVisionAttention` or `SamVisionSdpaAttention`.
        window_size: 0 for the whole map.
        hidden_states: Tensor[B, H, W, C].
        output_attentions: must be false.
    """
    if output_attentions:
        hint = "visattn_kernels.attention_map reads rows of the map."
        raise expected("no output_attentions", "output_attentions", output_attentions, NotImplementedError, hint)
    _no_dropout(attn, attn.dropout)
    x, (_, height, width, _) = hidden_states, hidden_states.shape
    if window_size:
        # As in SAM, padding takes part, with the biases of the projection for keys and values.
        x = nn.functional.pad(x, (0, 0, 0, -width % window_size, 0, -height % window_size))
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_attention_heads, -1)).unbind(3)  # views [B, H, W, heads, D]
    # Tables go by query minus key there, by key minus query here.
    terms = (RelativeQuery(attn.rel_pos_h.flip(0), attn.rel_pos_w.flip(0)),) if attn.use_rel_pos else ()
    y = attention(q, k, v, Window(window_size) if window_size else Global(), scale=attn.scale, terms=terms)
    return attn.proj(y.flatten(3)[:, :height, :width]), None


def _sam(layer: Any, name: str) -> list[Change]:
    """The layer believes that it has no windows, so it gives its attention the whole map."""
    module = "transformers.models.sam.modeling_sam"
    _same_class(layer.attn, f"{module}.SamVisionSdpaAttention", f"{name}.attn", f"{module}.SamVisionAttention")
    _fit(layer, name, "window_size")
    _no_dropout(layer.attn, layer.attn.dropout)
    attend = partial(sam_attention, layer.attn, layer.window_size)
    return [*_forward(layer.attn, name, attend), (layer, "window_size", 0)]


LAYERS: dict[str, Callable[[Any, str], list[Change]]] = {
    "timm.models.swin_transformer.SwinTransformerBlock": _swin,
    "transformers.models.sam.modeling_sam.SamVisionLayer": _sam,
}
"""The layers that are replaced, known by name so that no library is imported, and how."""


def _covered(layer: nn.Module) -> str | None:
    """The name in `LAYERS` of a module's class, or of one that it derives from."""
    return next((name for name in map(_name, type(layer).__mro__) if name in LAYERS), None)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _same_class(module: object, known: str, name: str, *others: str) -> None:
    """A class derived from a known one may compute something else."""
    if _name(type(module)) not in (known, *others):
        rule = f"{name} to be {' or '.join((known, *others))}, whose code is known"
        raise expected(rule, f"type({name})", _name(type(module)), NotImplementedError)


def _fit(layer: object, name: str, *attributes: str) -> None:
    """Another version may call its attention otherwise, and a change would be without effect."""
    for attribute in attributes:
        if not hasattr(layer, attribute):
            rule = f"a version of {_name(type(layer))} with `{attribute}`"
            raise expected(rule, name, type(layer).__name__, NotImplementedError, f"Use {INSTALL}")


def _forward(attn: nn.Module, name: str, forward: Callable[..., Any]) -> list[Change]:
    now = vars(attn).get("forward")
    if isinstance(now, partial):
        value = getattr(now.func, "__name__", type(now.func).__name__)
        rule = f"{name}.attn.forward to be that of its class"
        raise expected(rule, "forward", value, ValueError, "Is the model swapped already?")
    return [(attn, "forward", forward)]


def _no_dropout(attn: nn.Module, share: float) -> None:
    if attn.training and share:
        hint = "Set it to 0, or call model.eval()."
        raise expected("no dropout of attention weights in training", "dropout", share, NotImplementedError, hint)


# The command

INSTALL = "pip install '.[published]'"


def library(name: str, module: str) -> ModuleType:
    """A module of a library, or the line that says how to install it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            declare_torchvision()
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        text = f"visattn: --model {name} needs {missing}, which is not installed. Use {INSTALL}"
        raise InputError(text) from error


def declare_torchvision() -> None:
    """Let torchvision import, of whose operators nothing here calls one, though both libraries import it.

    Its compiled part loads only beside the build of torch that it was made for. Where it does not, the operators that
    torchvision describes to torch must be declared for it to import at all.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return  # transformers can do without
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


SWIN = "swin_tiny_patch4_window7_224"
DEPTHS, HEADS = (2, 2, 6, 2), (3, 6, 12, 24)


def swin(image: int, layers: int) -> nn.Module:
    """Swin-T, with its first layers alone."""
    timm = library("swin", "timm")
    depths = [min(depth, layers - sum(DEPTHS[:i])) for i, depth in enumerate(DEPTHS) if layers > sum(DEPTHS[:i])]
    options = {"img_size": image, "depths": depths, "num_heads": HEADS[: len(depths)]}
    model: nn.Module = timm.create_model(SWIN, pretrained=False, **options)
    return model


def sam(image: int, layers: int) -> nn.Module:
    """The encoder of SAM-B with fewer layers: of three one sees the whole map, and so does the last."""
    config = library("sam", "transformers.models.sam.configuration_sam").SamVisionConfig(
        image_size=image,
        num_hidden_layers=layers,
        global_attn_indexes=sorted({*range(2, layers, 3), layers - 1}),
        attn_implementation="sdpa",
    )
    model: nn.Module = library("sam", "transformers.models.sam.modeling_sam").SamVisionEncoder(config)
    return model


@dataclass(frozen=True)
class Known:
    """What the command knows of a model.

    Attributes:
        title: how tables call it.
        make: builds it from the side of the image and the number of layers.
        patch: what the side must be a multiple of.
        image, layers, batch: if the command is not told.
        most: layers at most.
    """

    title: str
    make: Callable[[int, int], nn.Module]
    patch: int
    image: int
    layers: int
    batch: int
    most: int


MODELS = {
    "swin": Known(SWIN, swin, 4, 224, sum(DEPTHS), 4, sum(DEPTHS)),
    "sam": Known("SAM-B's encoder", sam, 16, 1024, 3, 1, 12),
}


@dataclass(frozen=True)
class Settings:
    """A model and its input."""

    model: str
    image: int
    layers: int
    batch: int
    seed: int

    def build(self) -> tuple[nn.Module, torch.Tensor]:
        """The model in evaluation, with random weights, and images for it.

        Where these libraries begin, tables are zero or nearly so, and a wrong one would not show.
        """
        runs.seed(self.seed)
        model = MODELS[self.model].make(self.image, self.layers).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model, torch.randn(self.batch, 3, self.image, self.image)


def result(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits or features."""
    y = model(x)
    out: torch.Tensor = getattr(y, "last_hidden_state", y)
    return out


def differences(model: nn.Module, swapped: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """The largest difference of the results, and of the gradients of x, over the largest number of the first's."""
    kept = []
    for one in (model, swapped):
        leaf = x.clone().requires_grad_()
        out = result(one, leaf)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
        kept.append((out.detach(), torch.autograd.grad(out, leaf, grad)[0]))
    first, second = (float((a - b).abs().max() / a.abs().max()) for a, b in zip(*kept, strict=True))
    return first, second


def one_pass(settings: Settings, swapped: bool, backward: bool) -> runs.Step:
    """A pass through a model of its own, for `runs.compare`."""
    model, x = settings.build()
    if swapped:
        swap(model)
    if not backward:
        return partial(_forward_alone, model, x)
    x.requires_grad_()
    grad = torch.randn(result(model, x).shape)
    return lambda: result(model, x).backward(grad)  # type: ignore[no-untyped-call]


@torch.no_grad()
def _forward_alone(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return result(model, x)


HEAD = ("pass", "ms", "ours", "quicker", "MB", "ours", "smaller", "differ")
PASSES = {"forward": False, "fwd + bwd": True}


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "swin",
    image: Annotated[int, typer.Option(min=0, help="Side of the images; 0 is the model's own.")] = 0,
    layers: Annotated[int, typer.Option(min=0, help="The first layers alone; 0 is all of Swin, 3 of SAM.")] = 0,
    batch: Annotated[int, typer.Option(min=0, help="Images; 0 is 4 for Swin, 1 for SAM.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Passes of each that are timed.")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="0 is as many as torch takes.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=runs.SEEDS, help="Of weights and images.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder of the table, compare.md.")] = Path("out/swap_in"),
) -> None:
    """Put our attention into a published model with random weights; compare results, gradients, time and memory."""
    if model not in MODELS:
        raise expected(f"--model to be one of {', '.join(MODELS)}", "--model", model, ValueError)
    known = MODELS[model]
    if image % known.patch:
        raise expected(f"--image to be a multiple of {known.patch}", "--image", image, ValueError)
    if layers > known.most:
        raise expected(f"--layers of at most {known.most}", "--layers", layers, ValueError)
    runs.folder_of(output, "compare.md")
    if threads:
        torch.set_num_threads(threads)
    settings = Settings(model, image or known.image, layers or known.layers, batch or known.batch, seed)
    before, x = settings.build()
    after = copy.deepcopy(before)
    count = swap(after)
    difference = differences(before, after, x)
    del before, after
    steps = {
        (name, swapped): (one_pass, (settings, swapped, backward))
        for name, backward in PASSES.items()
        for swapped in (False, True)
    }
    costs = runs.compare({f"{name}, {swapped}": step for (name, swapped), step in steps.items()}, repeats)
    rows = []
    for name, far in zip(PASSES, difference, strict=True):
        old, new = (costs[f"{name}, {swapped}"] for swapped in (False, True))
        rows.append(
            (
                name,
                f"{old.seconds * 1e3:.0f}",
                f"{new.seconds * 1e3:.0f}",
                f"{old.seconds / new.seconds:.2f}×",
                f"{old.peak / 2**20:.0f}",
                f"{new.peak / 2**20:.0f}",
                f"{old.peak / max(new.peak, 1):.1f}×",
                f"{far:.1e}",
            )
        )
    title = (
        f"{known.title} before and after {count} layers are swapped, images {settings.batch}×3×{settings.image}², "
        "float32; MB at the peak, above the model; what differs most in results, then in the images' gradients, over "
        "their largest number"
    )
    runs.write_table(output / "compare.md", runs.measured(title, repeats), HEAD, rows)


if __name__ == "__main__":
    runs.command(main)
