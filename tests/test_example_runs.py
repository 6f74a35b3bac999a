"""What the examples share: the folder of a run, and what they say of one that is not theirs."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("typer", reason="the examples need the packages of [viz]")

from examples import runs
from visattn_kernels.viz.exits import InputError

SETTINGS = {"width": 8, "seed": 0}


def begin(folder, example="one", fresh=False, **settings):
    return runs.Run(folder, example, {**SETTINGS, **settings}, fresh)


def refused(folder, rule, **options):
    with pytest.raises(ValueError, match=f"^visattn: expected {rule}"):
        begin(folder, **options)


def test_goes_on(tmp_path):
    run = begin(tmp_path)
    assert run.state is None
    run.save({"step": 3, "x": torch.ones(2)})
    state = begin(tmp_path).state
    assert state["step"] == 3
    assert torch.equal(state["x"], torch.ones(2))
    assert begin(tmp_path, fresh=True).state is None


def test_a_run_of_another(tmp_path):
    begin(tmp_path).save({"step": 1})
    refused(tmp_path, "width=8, with which the run in .* was begun, but got --width=16", width=16)
    refused(tmp_path, "example=one, with which the run in .* was begun, but got example=two", example="two")


def contents():
    whole, other = (runs.io.BytesIO() for _ in range(2))
    torch.save({"settings": {}, "state": {}}, whole)
    torch.save({"a": 1}, other)
    return {
        "empty": b"",
        "text": b"hello",
        "cut": whole.getvalue()[:200],
        "bare": whole.getvalue(),
        "other": other.getvalue(),
    }


@pytest.mark.parametrize("what", contents())
def test_a_checkpoint_that_is_none(tmp_path, what):
    (tmp_path / "checkpoint.pt").write_bytes(contents()[what])
    refused(tmp_path, f"a checkpoint that an example wrote, but got the file={re.escape(str(tmp_path))}")
    assert begin(tmp_path, fresh=True).state is None


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        refused(folder, "a folder, or a place for one, but got --output=")
    (tmp_path / "checkpoint.pt").mkdir()
    refused(tmp_path, "a file to read, but got the checkpoint=.*Is a directory")


def test_fewer_steps_than_done():
    runs.not_below(5, 5, "--steps")
    with pytest.raises(ValueError, match=r"^visattn: expected --steps of 5 or more, .*, but got --steps=2\."):
        runs.not_below(5, 2, "--steps")


def test_no_comparison_without_the_engine(monkeypatch):
    """A reference that is timed as if it were the engine would be a wrong table."""
    monkeypatch.setattr(runs.cpu, "unavailable", lambda: ["it was not built"])
    with pytest.raises(ValueError, match=r"^visattn: expected the compiled engine, .*=reference\. it was not built$"):
        runs.compare({}, 1)


def test_files_that_could_not_be_written_are_refused_before_the_work(tmp_path):
    (tmp_path / "compare.md").mkdir()
    with pytest.raises(InputError, match=r"^visattn: expected --output to be a regular file, but got --output="):
        runs.report(tmp_path, "title", {"a": (pytest.fail, ("computed for nothing",))}, 1)
    with pytest.raises(ValueError, match=r"^visattn: expected a folder, or a place for one, but got --output=a\0b"):
        runs.folder_of(runs.Path("a\0b"))
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(InputError, match="regular file"):
        begin(tmp_path, fresh=True)


def test_text_of_others_is_no_markup(tmp_path, capsys):
    """As the name of a processor, or of a folder."""
    runs.write_table(tmp_path / "t.md", "A[red]B[/] CPU\n\x1b[31m", ("name", "ms"), [("a", "1")])
    runs.say_written(runs.Path("caf\udce9\n.png"))
    said = capsys.readouterr().out
    assert r"A[red]B[/] CPU\n\x1b[31m" in " ".join(said.split())
    assert said.endswith("caf\\xe9\\n.png\n")
