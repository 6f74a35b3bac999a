"""A small ResNet that finds a digit in clutter through attention masks, and where its masks look, epoch by epoch.

    python -m examples.attention_masks --heads 4 --output out/attention_masks

Each scene of 64×64 has one of scikit-learn's digits at a random place and in a random size, fragments of others, and
noise. One mask (`SpatialAttentionMask`) or several (`MultiHeadAttentionMask`, kept apart by `diversity_loss`) pool the
last map of the trunk for a linear classifier, which therefore sees only what the masks let through.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn import functional as F

from examples import runs
from visattn_kernels.errors import expected
from visattn_kernels.nn import MultiHeadAttentionMask, SpatialAttentionMask, diversity_loss, masked_pool
from visattn_kernels.viz.output import Target

SIZE = 64
CLASSES = 10
FRAGMENTS = 8
PICTURES = 12
COMPARED = 56
"""The side of the map in the comparison: that of a ResNet's first stage at 224×224."""


def scenes(numbers: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put each digit on a canvas of its own, the same way for the same seed.

    Args:
        numbers (Tensor[N, 1, 8, 8]): digits; the fragments around each are of others.
        seed: of places, sizes, fragments and noise.

    Returns:
        The scenes (Tensor[N, 1, 64, 64], from 0 to 1), and where the digits are (Tensor[N, 1, 64, 64], 0 or 1).
    """
    random = np.random.default_rng(seed)
    source = numbers[:, 0].numpy()
    canvas = 0.1 * np.abs(random.standard_normal((len(source), SIZE, SIZE), dtype=np.float32))
    boxes = np.zeros((len(source), SIZE, SIZE), dtype=np.float32)
    for i, digit in enumerate(source):
        for _ in range(FRAGMENTS):
            y, x = random.integers(0, 6, 2)
            _put(canvas[i], source[random.integers(len(source))][y : y + 3, x : x + 3], (6, 9), random)
        boxes[i][_put(canvas[i], digit, (18, 28), random)] = 1
    return torch.from_numpy(canvas)[:, None].clamp(0, 1), torch.from_numpy(boxes)[:, None]


def _put(
    canvas: NDArray[np.float32], piece: NDArray[np.float32], sides: tuple[int, int], random: np.random.Generator
) -> tuple[slice, slice]:
    """Enlarge a piece to a side between two, and put it somewhere over what is there; returns the place."""
    side = int(random.integers(sides[0], sides[1] + 1))
    large = np.asarray(Image.fromarray(piece).resize((side, side), Image.Resampling.BICUBIC))
    y, x = random.integers(0, SIZE - side + 1, 2)
    place = slice(y, y + side), slice(x, x + side)
    canvas[place] = np.maximum(canvas[place], large)
    return place


class Block(nn.Module):
    """Two convolutions and a shortcut, with the names of torchvision's `BasicBlock`."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or out != channels:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The next map."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class Trunk(nn.Module):
    """Scenes (Tensor[B, 1, 64, 64]) to maps (Tensor[B, 4 * width, 16, 16])."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Block(width, width, 1))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2))
        self.layer3 = nn.Sequential(Block(2 * width, 4 * width, 1), Block(4 * width, 4 * width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The last map; it keeps a quarter of the resolution, so that masks have something to choose from."""
        y: torch.Tensor = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        return y

    def load(self, file: Path) -> None:
        """Take the weights of a file, all that there are.

        Raises:
            ValueError: the file has no state dict of this trunk.
        """
        try:
            state = torch.load(file, weights_only=True, map_location="cpu")
        except OSError as error:
            raise expected("a file to read", "--weights", file, ValueError, f"{error.strerror}.") from error
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError):
            state = None
        if not isinstance(state, Mapping) or not all(isinstance(x, torch.Tensor) for x in state.values()):
            raise expected("a file with a state dict, of tensors by name", "--weights", file, ValueError)
        ours = {name: list(x.shape) for name, x in self.state_dict().items()}
        theirs = {name: list(x.shape) for name, x in state.items()}
        wrong = [
            f"{name} {ours.get(name, 'not here')}, in the file {theirs.get(name, 'not there')}"
            for name in {**ours, **theirs}
            if ours.get(name) != theirs.get(name)
        ]
        if wrong:
            told = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise expected("the weights of this trunk", "--weights", file, ValueError, f"They differ: {told}.")
        self.load_state_dict(state)


class Classifier(nn.Module):
    """A trunk, masks over its last map, and a linear layer over what they pool."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        channels = 4 * width
        self.trunk = Trunk(width)
        self.attention = (
            SpatialAttentionMask(channels, activation="softmax")
            if heads == 1
            else MultiHeadAttentionMask(channels, heads)
        )
        self.head = nn.Linear(heads * channels, CLASSES)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (Tensor[B, 10]) and masks (Tensor[B, M, 16, 16])."""
        x = self.trunk(x)
        attention = self.attention
        masks = attention.mask(x) if isinstance(attention, SpatialAttentionMask) else attention.masks(x)
        return self.head(masked_pool(x, masks).flatten(1)), masks


class Training:
    """The classifier and its optimizer."""

    def __init__(self, width: int, heads: int, diversity: float) -> None:
        self.model = Classifier(width, heads)
        self.diversity = diversity
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 2e-3, weight_decay=0.01)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """One update; its loss."""
        logits, masks = self.model(images)
        loss = F.cross_entropy(logits, labels) + self.diversity * diversity_loss(masks)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item()

    def look(self, images: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and masks of images, in evaluation."""
        self.model.eval()
        with torch.no_grad():
            found = [self.model(some) for some in torch.split(images, batch)]
        self.model.train()
        logits, masks = (torch.cat(parts) for parts in zip(*found, strict=True))
        return logits, masks

    def state(self) -> dict[str, Any]:
        """Everything that a run goes on from."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def inside(masks: torch.Tensor, boxes: torch.Tensor) -> float:
    """The share of the masks' weight that lies on the digits."""
    covered = F.adaptive_avg_pool2d(boxes, (masks.shape[2], masks.shape[3]))  # the part of each position's square
    return ((masks * covered).sum((2, 3)) / masks.sum((2, 3))).mean().item()


def picture(images: torch.Tensor, masks: torch.Tensor) -> Image.Image:
    """A sheet: some scenes, and under each its masks, one a row."""
    shown = runs.pixels(images, 0, 1)
    return runs.sheet([shown, *(runs.overlay(shown, masks[:, head]) for head in range(masks.shape[1]))], scale=2)


def history(images: torch.Tensor, epochs: torch.Tensor) -> Image.Image:
    """A sheet: some scenes, then a row of their masks for each epoch; the masks of a scene side by side.

    Args:
        images (Tensor[N, 1, H, W]): the scenes.
        epochs (Tensor[E, N, M, h, w]): the masks.
    """
    shown = runs.pixels(images, 0, 1).repeat_interleave(epochs.shape[2], 0)
    return runs.sheet([shown, *(runs.overlay(shown, masks.flatten(0, 1)) for masks in epochs.float())], scale=2)


class NaiveMask(MultiHeadAttentionMask):
    """The same pooling by a masked copy of the map for each head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The features under each mask."""
        return (x[:, None] * self.masks(x)[:, :, None]).sum((3, 4))  # of [B, M, C, H, W]


def one_step(width: int, batch: int, heads: int, naive: bool) -> runs.Step:
    """A forward and backward of the pooling alone, for `runs.compare`."""
    runs.seed(0)
    layer = (NaiveMask if naive else MultiHeadAttentionMask)(4 * width, heads)
    x = torch.randn(batch, 4 * width, COMPARED, COMPARED, requires_grad=True)

    def step() -> None:
        x.grad = None
        layer(x).square().sum().backward()

    return step


EPOCHS = ("epoch", "loss", "accuracy", "diversity loss", "weight on the digit")
"""What is told of each epoch, of the validation scenes but for the loss."""


def main(
    heads: Annotated[int, typer.Option(min=1, max=PICTURES, help="Masks.")] = 4,
    diversity: Annotated[float, typer.Option(min=0, help="Weight of the diversity loss; 0 leaves it out.")] = 0.01,
    epochs: Annotated[int, typer.Option(min=1, help="Times through the digits, each time in new scenes.")] = 15,
    width: Annotated[int, typer.Option(min=1, help="Channels of the first stage; the last has four times these.")] = 16,
    batch: Annotated[int, typer.Option(min=2, help="Images of a step.")] = 32,
    images: Annotated[int, typer.Option(min=2, max=runs.TRAINING, help="Digits to train on.")] = runs.TRAINING,
    weights: Annotated[Path | None, typer.Option(help="State dict of a trunk to begin with, such as trunk.pt.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=runs.SEEDS, help="Of weights, scenes and order.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("out/attention_masks"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, though the folder has a run.")] = False,
    compare: Annotated[int, typer.Option(min=0, help="Instead: time so many poolings, and naive ones.")] = 0,
) -> None:
    """Train a classifier of digits in clutter through attention masks, and see where the masks look."""
    if compare:
        shape = f"[{batch}, {4 * width}, {COMPARED}, {COMPARED}]"
        runs.report(
            output,
            f"Pooling a map {shape} under {heads} masks, forward and backward",
            {
                "naive": (one_step, (width, batch, heads, True)),
                "visattn_kernels": (one_step, (width, batch, heads, False)),
            },
            compare,
        )
        return
    settings: dict[str, Any] = {
        "heads": heads,
        "diversity": diversity,
        "width": width,
        "batch": batch,
        "images": images,
        "seed": seed,
    }
    settings["weights"] = None if weights is None else str(weights)
    runs.folder_of(output, "trunk.pt", "epochs.md", "masks.png")
    run = runs.Run(output, "attention_masks", settings, fresh)
    runs.seed(seed)
    numbers, labels = runs.digits()
    training = Training(width, heads, diversity)
    if run.state is None and weights is not None:
        training.model.trunk.load(weights)
    unseen = slice(runs.TRAINING, runs.TRAINING + max(PICTURES, -(-images // 4)))
    checked, boxes = scenes(numbers[unseen], seed)
    shown = checked[: PICTURES // heads]
    told: list[list[float]] = []
    kept: list[torch.Tensor] = []  # the masks of the scenes shown, after each epoch

    def look(epoch: int, loss: float) -> None:
        logits, masks = training.look(checked, batch)
        accuracy = (logits.argmax(1) == labels[unseen]).float().mean().item()
        told.append([epoch, loss, accuracy, diversity_loss(masks).item(), inside(masks, boxes)])
        kept.append(masks[: len(shown)].half())
        run.picture(f"epoch-{epoch:03}", picture(shown, kept[-1]))
        run.save({"epochs": torch.tensor(told, dtype=torch.float64), "masks": torch.stack(kept), **training.state()})
        typer.echo("  ".join(f"{name} {value:.3g}" for name, value in zip(EPOCHS, told[-1], strict=True)))

    if run.state is None:
        look(0, float("nan"))
    else:
        told, kept = run.state["epochs"].tolist(), list(run.state["masks"])
        training.load(run.state)
        torch.set_rng_state(run.state["random"])
    steps = images // batch or 1
    runs.not_below(len(told) - 1, epochs, "--epochs")
    with runs.progress("training", epochs * steps, (len(told) - 1) * steps) as one:
        for epoch in range(len(told), epochs + 1):
            seen, _ = scenes(numbers[:images], seed + epoch)
            losses = []
            for some in torch.split(torch.randperm(images), batch)[:steps]:
                losses.append(training.step(seen[some], labels[:images][some]))
                one(loss=losses[-1])
            look(epoch, sum(losses) / len(losses))
    trunk = io.BytesIO()
    torch.save(training.model.trunk.state_dict(), trunk)
    Target(output / "trunk.pt").write(trunk.getvalue())
    rows = [[f"{int(row[0])}", *(f"{value:.3f}" for value in row[1:])] for row in told]
    title = f"Validation on {len(checked)} scenes; an even mask has {boxes.mean():.3f} of its weight on the digit"
    runs.write_table(output / "epochs.md", title, EPOCHS, rows)
    runs.say_written(run.picture("masks", history(shown, torch.stack(kept))))


if __name__ == "__main__":
    runs.command(main)
