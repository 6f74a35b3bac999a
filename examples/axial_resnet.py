"""A small ResNet whose 3×3 convolutions can be attention instead, and where its positions look.

    python -m examples.axial_resnet --kind axial --output out/axial_resnet

Three stages of bottleneck blocks, at 32×32, 16×16 and 8×8. The middle of each block is a 3×3 convolution, stand-alone
self-attention over 7×7 (SASA), local relation over 7×7 (LR-Net), or axial attention along the height, then the width
(Axial-DeepLab). Where the map shrinks, attention is followed by an average pooling. The data are scikit-learn's digits
(8×8, enlarged).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from examples import runs
from visattn_kernels.errors import expected
from visattn_kernels.nn import AxialAttention, LocalRelation, StandAloneSelfAttention
from visattn_kernels.patterns import Size

SIZE = 32
STAGES = 3
EXPANSION = 4
HEAD = 8
"""Channels of a head."""
POINT = (0.5, 0.5)
"""The position whose maps are drawn, as parts of the height and the width."""
SHOWN = 8


class HeightThenWidth(nn.Module):
    """Axial attention along both axes: in two steps each position sees all."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.height = AxialAttention(channels, "height", heads=channels // HEAD, size=side)
        self.width = AxialAttention(channels, "width", heads=channels // HEAD, size=side)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What each position gathered in the two steps."""
        y: torch.Tensor = self.width(self.height(x))
        return y

    def attention_map(self, x: torch.Tensor, at: list[tuple[int, int]]) -> torch.Tensor:
        """What positions see in the two steps, the heads' mean: `[B, len(at), 1, H, W]`.

        A position gathers its row, and each position of that has gathered its column: the products of both weights.
        """
        across = self.width.attention_map(self.height(x), at).mean(2).sum(2, keepdim=True)  # [B, n, 1, W], of its row
        down = []
        for y, _ in at:
            columns = self.height.attention_map(x, [(y, i) for i in range(x.shape[3])]).mean(2)  # [B, W, H, W]
            down.append(columns.diagonal(dim1=1, dim2=3))  # [B, H, W], of each position of the row its own column
        return (across * torch.stack(down, 1))[:, :, None]


KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "conv": lambda channels, side: nn.Conv2d(channels, channels, 3, padding=1, bias=False),
    "sasa": lambda channels, side: StandAloneSelfAttention(channels, 7, heads=channels // HEAD),
    "lr": lambda channels, side: LocalRelation(channels, 7, share_channels=HEAD),
    "axial": HeightThenWidth,
}
"""What is in the middle of a block: a layer for some channels of a map of this side."""


def multiply_adds(layer: nn.Module, side: int) -> int:
    """Those of the attention in a layer on one map, its projections left out.

    A pair of a query and a key takes D for its logit and Dv for its value in each head. To these come the products with
    tables of positions: one for each query and row or column of the neighborhood (SASA), or one for each pair in each
    table (axial). The local relation's positions only add.
    """
    if not isinstance(layer, (StandAloneSelfAttention, LocalRelation, AxialAttention)):
        return 0
    grid = Size(side, side)
    mask = layer.pattern.mask(grid, grid, outside=True)
    assert mask is not None
    pairs = int(mask.sum())
    if isinstance(layer, AxialAttention):
        keys, _, values = layer.widths
        return pairs * layer.heads * (3 * keys + 2 * values)
    if isinstance(layer, StandAloneSelfAttention):
        return pairs * 2 * layer.channels + side**2 * layer.relative_h.shape[1] * layer.channels
    return pairs * (layer.query.out_channels + layer.channels)


class Bottleneck(nn.Module):
    """Fewer channels, the layer in the middle, and more channels, beside a shortcut."""

    def __init__(self, kind: str, channels: int, middle: int, side: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * middle
        self.down = nn.Sequential(nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU())
        self.spatial = KINDS[kind](middle, side)
        self.side = side
        if isinstance(self.spatial, nn.Conv2d):
            self.spatial.stride = (stride, stride)
        self.pool = nn.Identity() if stride == 1 or kind == "conv" else nn.AvgPool2d(stride)
        last = nn.BatchNorm2d(out)
        nn.init.zeros_(last.weight)  # each block begins as its shortcut
        self.up = nn.Sequential(nn.BatchNorm2d(middle), nn.ReLU(), nn.Conv2d(middle, out, 1, bias=False), last)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or out != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The next map."""
        return torch.relu(self.shortcut(x) + self.up(self.pool(self.spatial(self.down(x)))))

    def map(self, x: torch.Tensor) -> torch.Tensor:
        """Where the position `POINT` looks, the heads' mean: `[B, H, W]`."""
        at = [(int(POINT[0] * x.shape[2]), int(POINT[1] * x.shape[3]))]
        found: torch.Tensor = self.spatial.attention_map(self.down(x), at)  # type: ignore[operator]
        return found[:, 0].mean(1)


class ResNet(nn.Module):
    """Images (Tensor[B, 1, 32, 32]) to logits (Tensor[B, 10])."""

    def __init__(self, kind: str, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        channels, side = width, SIZE
        self.stages = nn.ModuleList()
        for stage in range(STAGES):
            parts = []
            for i in range(blocks):
                stride = 2 if stage and not i else 1
                parts.append(Bottleneck(kind, channels, width << stage, side, stride))
                channels, side = EXPANSION * width << stage, side // stride
            self.stages.append(nn.Sequential(*parts))
        self.head = nn.Linear(channels, 10)
        # 1×1 convolutions are several times as quick in it
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Where the position `POINT` looks in the last block of each stage, `[B, H, W]` each."""
        x, found = self.stem(x), []
        for stage in self.stages:
            assert isinstance(stage, nn.Sequential)
            *blocks, last = stage
            for block in blocks:
                x = block(x)
            assert isinstance(last, Bottleneck)
            found.append(last.map(x))
            x = last(x)
        return found


class Training:
    """The network and its optimizer."""

    def __init__(self, kind: str, width: int, blocks: int) -> None:
        self.model = ResNet(kind, width, blocks)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3, weight_decay=0.05)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """One update; its loss."""
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item()

    def state(self) -> dict[str, Any]:
        """Everything that a run goes on from."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (Tensor[1797, 1, 32, 32], from 0 to 1), and which digits they show."""
    images, labels = runs.digits()
    images = F.interpolate(images, (SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
    return images.contiguous(memory_format=torch.channels_last), labels


def accuracy(model: ResNet, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of the images that are told right; the model is left in evaluation."""
    model.eval()
    with torch.no_grad():
        told = torch.cat([model(some).argmax(1) for some in torch.split(images, 90)])
    return (told == labels).float().mean().item()


def picture(model: ResNet, images: torch.Tensor) -> Any:
    """A sheet: digits, a white point where `POINT` is, and under each its map in each stage."""
    shown = runs.pixels(images, 0, 1)
    with torch.no_grad():
        rows = [runs.overlay(shown, found) for found in model.eval().maps(images)]
    for row in rows:
        row[:, int(POINT[0] * SIZE), int(POINT[1] * SIZE)] = 255
    return runs.sheet([shown, *rows], scale=3)


def one_step(kind: str, width: int, blocks: int, batch: int) -> runs.Step:
    """A forward and backward of a network of its own, for `runs.compare`."""
    runs.seed(0)
    model = ResNet(kind, width, blocks)
    images, labels = (x[:batch] for x in digits())

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]

    return step


def counts(kind: str, width: int, blocks: int) -> tuple[int, int, int]:
    """Parameters; multiply-adds of the convolutions for one image, and of the attention."""
    model = ResNet(kind, width, blocks).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, SIZE, SIZE))
    aten = torch.ops.aten
    found = counter.get_flop_counts()["Global"]  # the reference backend's products would be here too
    flops = sum(found.get(operator, 0) for operator in (aten.convolution, aten.addmm))
    attended = sum(
        multiply_adds(layer, block.side)
        for block in model.modules()
        if isinstance(block, Bottleneck)
        for layer in block.spatial.modules()
    )
    return sum(x.numel() for x in model.parameters()), flops // 2, attended


TABLE = ("3×3 by", "parameters", "multiply-adds, M", "of these attention, M", "ms", "peak MB")


def write_comparison(folder: Path, width: int, blocks: int, batch: int, repeats: int) -> None:
    """Write `compare.md`: sizes, work, time and memory of all kinds."""
    runs.folder_of(folder, "compare.md")
    costs = runs.compare({kind: (one_step, (kind, width, blocks, batch)) for kind in KINDS}, repeats)
    rows = []
    for kind, cost in costs.items():
        parameters, convolved, attended = counts(kind, width, blocks)
        rows.append(
            (
                kind,
                f"{parameters:,}",
                f"{(convolved + attended) / 1e6:.1f}",
                f"{attended / 1e6:.1f}",
                f"{cost.seconds * 1e3:.0f}",
                f"{cost.peak / 2**20:.0f}",
            )
        )
    title = (
        f"Forward and backward of a ResNet of width {width}, blocks a stage: {blocks}, {batch} images of {SIZE}×{SIZE}"
    )
    runs.write_table(folder / "compare.md", runs.measured(title, repeats), TABLE, rows)


def main(
    kind: Annotated[str, typer.Option(help=f"What replaces the 3×3 convolutions: {', '.join(KINDS)}.")] = "axial",
    train: Annotated[int, typer.Option(min=1, help="Updates.")] = 200,
    width: Annotated[int, typer.Option(min=HEAD, help=f"Channels inside the first blocks; {HEAD} a head.")] = 16,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of each stage.")] = 1,
    batch: Annotated[int, typer.Option(min=2, max=runs.TRAINING, help="Images of a step.")] = 32,
    every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=runs.SEEDS, help="Of weights and order.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("out/axial_resnet"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, though the folder has a run.")] = False,
    compare: Annotated[int, typer.Option(min=0, help="Instead: compare all kinds, so many steps of each timed.")] = 0,
) -> None:
    """Train a small ResNet of convolutions or of attention on handwritten digits, and see where positions look."""
    if kind not in KINDS:
        raise expected(f"--kind to be one of {', '.join(KINDS)}", "--kind", kind, ValueError)
    if width % HEAD:
        raise expected(f"--width to be a multiple of {HEAD}", "--width", width, ValueError)
    if compare:
        write_comparison(output, width, blocks, batch, compare)
        return
    settings = {"kind": kind, "width": width, "blocks": blocks, "batch": batch, "seed": seed}
    runs.folder_of(output, f"{kind}.png")
    run = runs.Run(output, "axial_resnet", settings, fresh)
    runs.seed(seed)
    images, labels = digits()
    training = Training(kind, width, blocks)
    done = 0
    if run.state is not None:
        done = run.state["step"]
        training.load(run.state)
        torch.set_rng_state(run.state["random"])
    runs.not_below(done, train, "--train")
    with runs.progress(kind, train, done) as one:
        for step in range(done + 1, train + 1):
            some = torch.randperm(runs.TRAINING)[:batch]
            one(loss=training.step(images[some], labels[some]))
            if step % every == 0 or step == train:
                run.save({"step": step, **training.state()})
    unseen, answers = images[runs.TRAINING :], labels[runs.TRAINING :]
    right = accuracy(training.model, unseen, answers)
    typer.echo(f"{kind}: accuracy {right:.3f} on {len(unseen)} digits after {max(done, train)} steps")
    if kind != "conv":
        runs.say_written(run.picture(kind, picture(training.model, unseen[:SHOWN])))


if __name__ == "__main__":
    runs.command(main)
