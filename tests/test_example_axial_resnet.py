"""The example of a ResNet of attention: what it leaves in its folder, and that it goes on where it stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")
typer = pytest.importorskip("typer")
testing = pytest.importorskip("typer.testing")
for library in ("rich", "sklearn", "matplotlib"):
    pytest.importorskip(library)

from examples import axial_resnet  # noqa: E402
from visattn_kernels.nn import AxialAttention, LocalRelation, StandAloneSelfAttention  # noqa: E402

HERE = Path(__file__).resolve().parents[1]
TINY = ("--width", 8, "--batch", 4)


def run(folder, *arguments):
    """Run the command in this process."""
    app = typer.Typer()
    app.command()(axial_resnet.main)
    told = [str(argument) for argument in (*TINY, "--output", folder, *arguments)]
    result = testing.CliRunner().invoke(app, told)
    if result.exception is not None and not isinstance(result.exception, ValueError):
        raise result.exception
    return result


def kept(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    result = run(straight, "--kind", "lr", "--train", 3)
    assert result.exit_code == 0
    assert "lr: accuracy 0." in result.stdout
    assert "on 360 digits after 3 steps" in result.stdout
    assert run(stopped, "--kind", "lr", "--train", 2).exit_code == 0
    assert run(stopped, "--kind", "lr", "--train", 3).exit_code == 0
    ours, theirs = kept(straight), kept(stopped)
    assert ours["step"] == theirs["step"] == 3
    assert all(torch.equal(x, theirs["model"][name]) for name, x in ours["model"].items())
    assert "expected kind=lr, with which the run" in str(run(stopped, "--kind", "axial").exception)


@pytest.mark.parametrize("kind", ["sasa", "lr", "axial"])
def test_the_picture_of_maps(tmp_path, kind):
    assert run(tmp_path, "--kind", kind, "--train", 1).exit_code == 0
    with Image.open(tmp_path / f"{kind}.png") as image:
        assert image.size == (3 * 8 * 36, 3 * 4 * 36)  # eight digits, each over its maps in three stages
        pixels = np.asarray(image.convert("RGB"))
    assert pixels[6:102, 6:102].std() > 20
    assert pixels[114:210, 6:102].std() > 5


def test_convolutions_have_no_maps(tmp_path):
    assert run(tmp_path, "--kind", "conv", "--train", 1).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("kind", ["sasa", "lr", "axial"])
def test_maps_are_weights(kind):
    model = axial_resnet.ResNet(kind, 8, 2).eval()
    maps = model.maps(torch.rand(2, 1, 32, 32))
    assert [list(found.shape) for found in maps] == [[2, side, side] for side in (32, 16, 8)]
    for found in maps:
        total = found.sum((1, 2))
        if kind == "sasa":  # zeros outside the map have a share
            assert (total <= 1 + 1e-5).all()
        else:
            torch.testing.assert_close(total, torch.ones(2))


def test_the_map_of_two_steps_is_what_they_do_to_values():
    torch.manual_seed(0)
    pair = axial_resnet.HeightThenWidth(8, 6).eval()  # one head, whose values are a map of one channel here
    x, values = torch.randn(1, 8, 6, 6), torch.randn(6, 6)
    found = pair.attention_map(x, [(2, 3)])[0, 0, 0]
    columns = pair.height.attention_map(x, [(y, i) for y in range(6) for i in range(6)])[0, :, 0]
    gathered = (columns * values).sum((1, 2)).view(6, 6)
    row = pair.width.attention_map(pair.height(x), [(2, 3)])[0, 0, 0]
    torch.testing.assert_close((found * values).sum(), (row * gathered).sum())


def test_multiply_adds_of_attention_by_hand():
    count = axial_resnet.multiply_adds
    assert count(torch.nn.Conv2d(8, 8, 3), 10) == 0
    # 100 queries of 49 keys, 8 channels of keys and of values; 7 rows and 7 columns, half of the channels each.
    assert count(StandAloneSelfAttention(8, 7, heads=2), 10) == 100 * (49 * (8 + 8) + 7 * 4 + 7 * 4)
    # The keys of each axis: those within 3, inside the map.
    seen = sum(min(y + 3, 9) - max(y - 3, 0) + 1 for y in range(10)) ** 2
    assert count(LocalRelation(8, 7, share_channels=4), 10) == seen * (2 + 8)
    # Each query sees 10 keys: q·k, q·r and k·r of 4 channels, v and r of 8.
    assert count(AxialAttention(8, "width", heads=2, size=10), 10) == 100 * 10 * (3 * 4 + 2 * 8)


def test_convolutions_are_counted():
    parameters, convolved, attended = axial_resnet.counts("conv", 8, 1)
    assert parameters == sum(x.numel() for x in axial_resnet.ResNet("conv", 8, 1).parameters())
    assert attended == 0
    stem = 32 * 32 * 9 * 8
    first = 32 * 32 * (8 * 8 + 9 * 8 * 8 + 8 * 32 + 8 * 32)  # down, 3×3, up, shortcut
    second = 32 * 32 * 32 * 16 + 16 * 16 * (9 * 16 * 16 + 16 * 64 + 32 * 64)
    third = 16 * 16 * 64 * 32 + 8 * 8 * (9 * 32 * 32 + 32 * 128 + 64 * 128)
    assert convolved == stem + first + second + third + 128 * 10
    assert axial_resnet.counts("axial", 8, 1)[2] > 0


def test_the_comparison_writes_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(axial_resnet, "KINDS", {"lr": axial_resnet.KINDS["lr"]})
    assert run(tmp_path, "--kind", "lr", "--compare", 1).exit_code == 0
    lines = (tmp_path / "compare.md").read_text().splitlines()
    assert lines[0].startswith("Forward and backward of a ResNet of width 8, blocks a stage: 1, 4 images of 32×32;")
    rows = [line.strip("| ").split(" | ") for line in lines[4:]]
    assert [row[0] for row in rows] == ["lr"]
    assert all(len(row) == len(axial_resnet.TABLE) for row in rows)
    assert 0 < float(rows[0][3]) < float(rows[0][2])


def test_a_wrong_option_is_one_line(tmp_path):
    assert "--width to be a multiple of 8, but got --width=12" in str(run(tmp_path, "--width", 12).exception)
    command = [sys.executable, "-m", "examples.axial_resnet", "--kind", "swin", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "visattn: expected --kind to be one of conv, sasa, lr, axial, but got --kind=swin\n"
    assert list(tmp_path.iterdir()) == []
