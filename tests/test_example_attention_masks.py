"""The example of attention masks: what it leaves in its folder, and that it goes on where it stopped."""

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

from examples import attention_masks, runs  # noqa: E402

HERE = Path(__file__).resolve().parents[1]
TINY = ("--width", 2, "--images", 32, "--batch", 16)


def run(folder, *arguments):
    """Run the command in this process."""
    app = typer.Typer()
    app.command()(attention_masks.main)
    told = [str(argument) for argument in (*TINY, "--output", folder, *arguments)]
    result = testing.CliRunner().invoke(app, told)
    if result.exception is not None and not isinstance(result.exception, ValueError):
        raise result.exception
    return result


def kept(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs with four masks."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(folder, "--epochs", 2).exit_code == 0
    return folder


def test_a_run_leaves_pictures_a_table_and_its_trunk(trained):
    names = {path.name for path in trained.iterdir()}
    pictures = {"epoch-000.png", "epoch-001.png", "epoch-002.png", "masks.png"}
    assert names == {*pictures, "epochs.md", "trunk.pt", "checkpoint.pt"}
    with Image.open(trained / "epoch-001.png") as image:
        assert image.size == (2 * 3 * 68, 2 * 5 * 68)  # three scenes, each over its four masks
    with Image.open(trained / "masks.png") as image:
        assert image.size == (2 * 12 * 68, 2 * 4 * 68)  # the scenes, and three epochs
        pixels = np.asarray(image.convert("RGB"), dtype=float)
    assert pixels[4:132, 4:132].std() > 20
    assert (pixels[-132:-4, 4:132] - pixels[4:132, 4:132]).std() > 5
    lines = (trained / "epochs.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| 0", "| 1", "| 2"]


def test_the_checkpoint_has_accuracy_and_diversity_of_each_epoch(trained):
    told = kept(trained)["epochs"]
    assert told.shape == (3, len(attention_masks.EPOCHS))
    accuracy, diversity, on_digit = told[:, 2:].T
    assert ((accuracy >= 0) & (accuracy <= 1) & (on_digit > 0) & (on_digit < 1)).all()
    assert diversity[0] == pytest.approx(12, rel=0.1)  # masks begin even, so alike
    assert diversity[2] < diversity[0]


def test_a_run_goes_on_as_if_it_had_not_stopped(trained, tmp_path):
    assert run(tmp_path, "--epochs", 1).exit_code == 0
    assert run(tmp_path, "--epochs", 2).exit_code == 0
    torch.testing.assert_close(kept(tmp_path)["epochs"], kept(trained)["epochs"], rtol=0, atol=0, equal_nan=True)
    assert (tmp_path / "masks.png").read_bytes() == (trained / "masks.png").read_bytes()
    result = run(tmp_path, "--heads", 2)
    assert str(result.exception).startswith("visattn: expected heads=4, with which the run in")
    assert str(result.exception).endswith("but got --heads=2. --fresh begins anew, --output elsewhere.")


def test_a_single_mask_begins_with_the_weights_of_a_trunk(trained, tmp_path):
    assert run(tmp_path, "--heads", 1, "--epochs", 1, "--weights", trained / "trunk.pt").exit_code == 0
    assert kept(tmp_path)["epochs"][:, 3].abs().max() < 1e-6
    model = attention_masks.Classifier(2, 1)
    model.trunk.load(trained / "trunk.pt")
    theirs = torch.load(trained / "trunk.pt", weights_only=True)
    assert all(torch.equal(x, theirs[name]) for name, x in model.trunk.state_dict().items())


def test_weights_that_do_not_fit_are_refused(trained, tmp_path):
    result = run(tmp_path, "--width", 3, "--weights", trained / "trunk.pt")
    assert "expected the weights of this trunk, but got --weights=" in str(result.exception)
    assert "conv1.weight [3, 1, 3, 3], in the file [2, 1, 3, 3]" in str(result.exception)
    rule = "expected a file with a state dict, of tensors by name, but got"
    for name, told in {
        "epochs.md": rule,
        "checkpoint.pt": rule,
        "missing.pt": "expected a file to read, but got",
    }.items():
        assert told in str(run(tmp_path, "--weights", trained / name).exception)
    assert list(tmp_path.iterdir()) == []


def test_a_scene_has_its_digit_where_it_is_told():
    numbers, _ = runs.digits()
    images, boxes = attention_masks.scenes(numbers[:20], 3)
    again, _ = attention_masks.scenes(numbers[:20], 3)
    assert torch.equal(images, again)
    sides = boxes.amax(2).sum((1, 2)), boxes.amax(3).sum((1, 2))
    assert torch.equal(*sides)
    assert 18 <= sides[0].min() <= sides[0].max() <= 28
    assert ((images * boxes).sum() / boxes.sum()) > 2 * ((images * (1 - boxes)).sum() / (1 - boxes).sum())
    assert attention_masks.inside(boxes[:, :, ::4, ::4], boxes) > 0.75
    assert attention_masks.inside(torch.ones(20, 1, 16, 16), boxes) == pytest.approx(boxes.mean().item())


def test_naive_pooling_is_the_same():
    x = torch.randn(2, 8, 5, 7)
    layer = attention_masks.MultiHeadAttentionMask(8, 3)
    naive = attention_masks.NaiveMask(8, 3)
    naive.load_state_dict(layer.state_dict())
    torch.testing.assert_close(naive(x), layer(x))


def test_the_comparison_writes_a_table(tmp_path):
    assert run(tmp_path, "--compare", 1).exit_code == 0
    text = (tmp_path / "compare.md").read_text()
    assert "Pooling a map [16, 8, 56, 56] under 4 masks" in text
    assert [line.split(" | ")[0] for line in text.splitlines()[4:]] == ["| naive", "| visattn_kernels"]


def test_a_wrong_option_is_one_line(tmp_path):
    command = [sys.executable, "-m", "examples.attention_masks", "--output", tmp_path / "x", "--weights", "none.pt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "visattn: expected a file to read, but got --weights=none.pt. No such file or directory.\n"
