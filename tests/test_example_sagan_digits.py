"""The example sagan_digits: a few steps, interrupted and resumed, and what they leave."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from building import ROOT
from PIL import Image

from examples import runs, sagan_digits

TINY = ["--width", "8", "--batch", "4", "--every", "1"]


def run(*options: str, status: int = 0) -> str:
    """The command in a process of its own; its output."""
    command = [sys.executable, "-m", "examples.sagan_digits", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def opened(path: Path) -> np.ndarray:
    """The pixels of a picture."""
    with Image.open(path) as image:
        return np.asarray(image)


def test_training_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, then a third of the same run, are three; each leaves samples, with their central pixels' maps."""
    monkeypatch.chdir(tmp_path)
    options = {"model": "sagan", "width": 8, "batch": 4, "every": 1, "seed": 3, "fresh": False, "compare": 0}
    folders = [tmp_path / "resumed", tmp_path / "whole"]
    for folder, steps in ((folders[0], 2), (folders[0], 3), (folders[1], 3)):
        sagan_digits.main(**options, steps=steps, output=folder)
    resumed, whole = (torch.load(folder / "checkpoint.pt", weights_only=True)["state"] for folder in folders)
    assert resumed["step"] == whole["step"] == 3
    for name, x in whole["generator"].items():
        assert torch.equal(x, resumed["generator"][name]), name
    pictures = [opened(folder / "sagan.png") for folder in folders]
    assert pictures[0].shape == (4 * 68, 8 * 68, 3)  # two rows of samples, each over its maps, with a gap around each
    assert np.array_equal(*pictures)
    assert sorted(path.name for path in folders[1].glob("sagan-*.png")) == [f"sagan-0000{i}.png" for i in (1, 2, 3)]


def test_its_maps_are_rows_of_the_naive_one() -> None:
    runs.seed(0)
    generator = sagan_digits.Generator(8, "sagan").double().eval()
    assert generator.attention is not None
    noise = torch.randn(2, sagan_digits.NOISE, 1, 1, dtype=torch.float64)
    x = generator.stages(noise)
    q, k = (layer(x).flatten(2) for layer in (generator.attention.query, generator.attention.key))
    weights = torch.softmax(q.transpose(1, 2) @ k, dim=1)  # [B, N, N], a column for each position
    centre = 16 * 32 + 16
    torch.testing.assert_close(generator.central_maps(noise).flatten(1), weights[:, :, centre])


def test_naive_attention_is_the_same_layer() -> None:
    runs.seed(0)
    ours = sagan_digits.attention(8, sagan_digits.SAGANAttention).double()
    theirs = sagan_digits.attention(8, sagan_digits.NaiveAttention).double()
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        torch.nn.init.constant_(layer.sigma, 0.7)
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_command(tmp_path: Path) -> None:
    text = run("--model", "dcgan", "--steps", "1", *TINY, "--output", str(tmp_path))
    assert opened(tmp_path / "dcgan.png").shape == (2 * 68, 8 * 68, 3)
    assert str(tmp_path / "dcgan.png") in "".join(text.split())
    text = run("--model", "dcgan", "--steps", "1", "--width", "16", "--output", str(tmp_path), status=2)
    assert "visattn: expected width=8" in text
    assert "but got --width=16" in text


def test_comparing(tmp_path: Path) -> None:
    run("--compare", "1", *TINY[:4], "--output", str(tmp_path))
    lines = (tmp_path / "compare.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| attention", "| ---", "| naive", "| visattn_kernels"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "gan"], "visattn: expected --model to be one of dcgan, sagan, but got --model=gan"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_bad_options(options: list[str], message: str) -> None:
    assert message in " ".join(run(*options, status=2).split())
