"""DCGAN and SAGAN on handwritten digits: 7s and 8s at 64×64, and where each sample's central pixel looks.

    python -m examples.sagan_digits --model sagan --output out/sagan_digits

The data are scikit-learn's digits (8×8, enlarged). Losses, learning rates and places of the attention layers are those
of the usual tutorial: hinge loss and spectral norm for SAGAN, cross entropy for DCGAN; Adam at 1e-4 (generator) and
4e-4 (discriminator), β (0, 0.9); attention after the third and the fourth stage.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from examples import runs
from visattn_kernels.errors import expected
from visattn_kernels.nn import SAGANAttention

SIZE = 64
NOISE = 20
SAMPLES = 8


class NaiveAttention(SAGANAttention):
    """The same layer as the tutorials write it: the map of every image is stored, and kept for the backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """By two products and a softmax."""
        q, k, v = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))  # [B, C, N]
        weights = torch.softmax(q.transpose(1, 2) @ k, dim=1)  # [B, N, N], over the index of the query convolution
        out: torch.Tensor = x + self.sigma * (v @ weights).unflatten(2, x.shape[2:])
        return out


def attention(channels: int, kind: type[SAGANAttention]) -> SAGANAttention:
    """The layer as the tutorial has it."""
    return kind(channels, pool=1, bias=True, project=False, softmax_over="queries")


def _as_it_is(layer: nn.Module) -> nn.Module:
    return layer


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {"dcgan": _as_it_is, "sagan": spectral_norm}
"""The models, and what they put around a convolution."""


class Generator(nn.Module):
    """Noise (Tensor[B, 20, 1, 1]) to images (Tensor[B, 1, 64, 64]) in [-1, 1]."""

    def __init__(self, width: int, model: str, kind: type[SAGANAttention] = SAGANAttention) -> None:
        super().__init__()
        wrap = WRAPS[model]
        sizes = [NOISE, width * 8, width * 4, width * 2, width]
        stages: list[nn.Module] = []
        for i in range(4):
            stride, padding = (1, 0) if i == 0 else (2, 1)
            stages += [
                wrap(nn.ConvTranspose2d(sizes[i], sizes[i + 1], 4, stride, padding)),
                nn.BatchNorm2d(sizes[i + 1]),
                nn.ReLU(),
            ]
            if model == "sagan" and i == 2:
                stages.append(attention(sizes[i + 1], kind))
        self.stages = nn.Sequential(*stages)
        self.attention = attention(width, kind) if model == "sagan" else None
        self.last = nn.ConvTranspose2d(width, 1, 4, 2, 1)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """The images."""
        x = self.stages(noise)
        return torch.tanh(self.last(x if self.attention is None else self.attention(x)))

    def central_maps(self, noise: torch.Tensor) -> torch.Tensor:
        """Where the central position of the last attention layer looks: [B, 32, 32], that row of the map alone."""
        assert self.attention is not None
        x = self.stages(noise)
        return self.attention.attention_map(x, [(x.shape[2] // 2, x.shape[3] // 2)])[:, 0]


class Discriminator(nn.Sequential):
    """Images (Tensor[B, 1, 64, 64]) to a number each."""

    def __init__(self, width: int, model: str, kind: type[SAGANAttention] = SAGANAttention) -> None:
        wrap = WRAPS[model]
        sizes = [1, width, width * 2, width * 4, width * 8]
        stages: list[nn.Module] = []
        for i in range(4):
            stages += [wrap(nn.Conv2d(sizes[i], sizes[i + 1], 4, 2, 1)), nn.LeakyReLU(0.1)]
            if model == "sagan" and i >= 2:
                stages.append(attention(sizes[i + 1], kind))
        super().__init__(*stages, nn.Conv2d(width * 8, 1, 4), nn.Flatten(0))


def digits() -> torch.Tensor:
    """The 7s and 8s of scikit-learn's digits, Tensor[353, 1, 64, 64] in [-1, 1]."""
    images, labels = runs.digits()
    chosen = images[(labels == 7) | (labels == 8)]
    return F.interpolate(chosen, (SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 1) * 2 - 1


class Training:
    """Both networks and their optimizers."""

    def __init__(self, width: int, model: str, kind: type[SAGANAttention] = SAGANAttention) -> None:
        self.hinge = model == "sagan"
        self.generator, self.discriminator = Generator(width, model, kind), Discriminator(width, model, kind)
        for part in [*self.generator.modules(), *self.discriminator.modules()]:
            if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)) and not self.hinge:
                nn.init.normal_(part.weight, 0.0, 0.02)  # as DCGAN begins
        options = {"betas": (0.0, 0.9)}
        self.optimizers = {
            "generator": torch.optim.Adam(self.generator.parameters(), 1e-4, **options),  # type: ignore[arg-type]
            "discriminator": torch.optim.Adam(self.discriminator.parameters(), 4e-4, **options),  # type: ignore[arg-type]
        }

    def step(self, real: torch.Tensor) -> dict[str, float]:
        """One update of the discriminator, then one of the generator; their losses."""
        noise = torch.randn(2, len(real), NOISE, 1, 1)
        with torch.no_grad():
            fake = self.generator(noise[0])
        wrong = self._loss(self.discriminator(real), True) + self._loss(self.discriminator(fake), False)
        self._update("discriminator", wrong)
        told = self.discriminator(self.generator(noise[1]))
        fooled = -told.mean() if self.hinge else self._loss(told, True)
        self._update("generator", fooled)
        return {"d": wrong.item(), "g": fooled.item()}

    def _loss(self, told: torch.Tensor, real: bool) -> torch.Tensor:
        """What the discriminator loses by what it told of images that are real, or are not."""
        if self.hinge:
            return F.relu(1 - told if real else 1 + told).mean()
        return F.binary_cross_entropy_with_logits(told, torch.full_like(told, float(real)))

    def _update(self, which: str, loss: torch.Tensor) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizers[which].step()

    def state(self) -> dict[str, Any]:
        """Everything that a run goes on from."""
        parts = {"generator": self.generator, "discriminator": self.discriminator}
        return {
            **{name: part.state_dict() for name, part in parts.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


def samples(generator: Generator, noise: torch.Tensor) -> Any:
    """A sheet: a row of samples, and under each the map of its central pixel, if there is attention; twice."""
    generator.eval()
    rows = []
    with torch.no_grad():
        for some in torch.split(noise, SAMPLES):
            rows.append(runs.pixels(generator(some), -1, 1))
            if generator.attention is not None:
                rows.append(runs.heat(generator.central_maps(some), (SIZE, SIZE)))
    generator.train()
    return runs.sheet(rows)


def one_step(width: int, batch: int, naive: bool) -> runs.Step:
    """A step of a SAGAN of its own, for `runs.compare`."""
    runs.seed(0)
    training = Training(width, "sagan", NaiveAttention if naive else SAGANAttention)
    real = digits()[:batch]
    return lambda: training.step(real)


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(WRAPS)}.")] = "sagan",
    steps: Annotated[int, typer.Option(min=1, help="Updates of each network.")] = 1500,
    width: Annotated[int, typer.Option(min=8, help="Channels of the largest map; the tutorial has 64.")] = 24,
    batch: Annotated[int, typer.Option(min=2, max=353, help="Images of a step.")] = 32,
    every: Annotated[int, typer.Option(min=1, help="Steps between pictures, and checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(min=0, max=runs.SEEDS, help="Of weights, noise and order.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("out/sagan_digits"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, though the folder has a run.")] = False,
    compare: Annotated[int, typer.Option(min=0, help="Instead: time so many steps, and steps of naive attention.")] = 0,
) -> None:
    """Train a DCGAN or a SAGAN on handwritten 7s and 8s, and see where its samples' central pixels look."""
    if model not in WRAPS:
        raise expected(f"--model to be one of {', '.join(WRAPS)}", "--model", model, ValueError)
    if compare:
        runs.report(
            output,
            f"A training step of SAGAN, width {width}, {batch} images",
            {"naive": (one_step, (width, batch, True)), "visattn_kernels": (one_step, (width, batch, False))},
            compare,
        )
        return
    runs.folder_of(output, f"{model}.png")
    run = runs.Run(output, "sagan_digits", {"model": model, "width": width, "batch": batch, "seed": seed}, fresh)
    runs.seed(seed)
    images = digits()
    training = Training(width, model)
    noise = torch.randn(2 * SAMPLES, NOISE, 1, 1)
    done = 0
    if run.state is not None:
        done, noise = run.state["step"], run.state["noise"]
        training.load(run.state)
        torch.set_rng_state(run.state["random"])
    runs.not_below(done, steps, "--steps")
    with runs.progress(model, steps, done) as one:
        for step in range(done + 1, steps + 1):
            one(**training.step(images[torch.randperm(len(images))[:batch]]))
            if step % every == 0 or step == steps:
                run.picture(f"{model}-{step:05}", samples(training.generator, noise))
                run.save({"step": step, "noise": noise, **training.state()})
    runs.say_written(run.picture(model, samples(training.generator, noise)))


if __name__ == "__main__":
    runs.command(main)
