"""The command `visattn` where it begins: version, help and `info`, what is not installed, and Ctrl-C at any moment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import visattn_cli
from visattn_kernels import backends
from visattn_kernels.backends import parts
from visattn_kernels.version import __version__
from visattn_kernels.viz import machine

HERE = Path(__file__).resolve().parents[1]
VIZ = ("typer", "click", "rich", "matplotlib", "PIL", "sklearn", "numpy")
"""What a plain `pip install .` does not bring, by the names that are imported."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def photo(tmp_path):
    """A picture beside the working folder."""
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "photo.png"
    image.linear_gradient("L").resize((24, 16)).convert("RGB").save(path)
    return path


def process(*command, **environment):
    """Run Python in a process of its own, on this checkout; what it says where the engine was not built is left out."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), **environment}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=60)
    done.stderr = re.sub(r"visattn: falling back to the reference backend.*\n", "", done.stderr)
    return done


def command(*arguments, before="", **environment):
    """Run the command in a process of its own, after some Python."""
    script = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
{before}
sys.argv = ["visattn", *{list(map(str, arguments))!r}]
from visattn_cli import main
main()
"""
    return process("-c", script, **environment)


def run(capsys, *arguments):
    """Run the command in this process: its exit code and what it printed."""
    capsys.readouterr()
    try:
        status = visattn_cli.run(arguments)
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


# Version and help


def test_version_and_help_import_nothing():
    """Neither torch nor the libraries of the command: a second or more."""
    after = (
        "import atexit\n"
        "atexit.register(lambda: print(*{'torch', 'visattn_kernels', 'typer', 'numpy'} & set(sys.modules), 'end'))"
    )
    done = command("--version", before=after)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\nend\n", "")
    for arguments in (["--help"], ["-h"], []):
        done = command(*arguments, before=after)
        assert (done.returncode, done.stderr) == (0, "")
        *text, last = done.stdout.splitlines()
        assert last == "end"
        assert {"info", *visattn_cli.PICTURES} <= {line.split()[0] for line in text if line.strip()}
        assert visattn_cli.ABOUT in text


def test_help_names_every_command(capsys):
    app = pytest.importorskip("visattn_kernels.viz.app").app
    names = {one.name or one.callback.__name__ for one in app.registered_commands}
    assert names == set(visattn_cli.PICTURES)
    assert "--power" in run(capsys, "attend", "--help")[1]
    assert "--at" in run(capsys, "map", "-h")[1]
    assert "--json" in run(capsys, "info", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("paint",), "paint"),
        (("--frames",), "--frames"),
        (("info", "china.png"), "china.png"),
        (("info", "--js"), "--js"),
        (("info", "a\nb\x1b[31m\udce9"), r"a\nb\x1b[31m\xe9"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(capsys, arguments, part):
    status, out, complaint = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"visattn: .*\. See visattn( info)? --help\n", complaint)
    assert part in complaint


def test_the_module_runs_the_command(folder, photo):
    done = process("-m", "visattn_kernels", "map", photo, "--at", "3,4", "-o", "m.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("m.png").read_bytes().startswith(b"\x89PNG")
    done = process("-m", "visattn_kernels", "attend", "missing.png")
    assert done.returncode == 2
    assert done.stderr == "visattn: expected IMAGE to be a file that exists, but got IMAGE=missing.png\n"
    assert [path.name for path in folder.iterdir()] == ["m.png"]


def test_letters_that_the_terminal_lacks():
    pytest.importorskip("typer")
    done = command("attend", "--help", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "attention? ? picture" in " ".join(done.stdout.split())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["--version"], ["attend", "--help"]])
def test_output_that_cannot_be_written(arguments):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "visattn_kernels", *arguments],
            env={**os.environ, "PYTHONPATH": str(HERE)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert re.fullmatch(r"visattn: .*No space left on device\n", done.stderr)


# What the machine has


def test_info(capsys):
    status, out, complaint = run(capsys, "info")
    assert (status, complaint) == (0, "")
    lines = out.splitlines()
    for heading in ("Versions", "Processor", "CUDA", "Backends", "Missing"):
        assert heading in lines
    text = " ".join(out.split())
    for part in (
        f"visattn_kernels {__version__}",
        f"torch {torch.__version__}",
        f"torch's {torch.version.cuda or 'none'}",
        f"torch uses {torch.backends.cpu.get_cpu_capability()}",
        f"threads {torch.get_num_threads()} of",
        "reference available",
    ):
        assert part in text
    for backend in backends.REGISTRY:
        assert all(reason in text for reason in backend.unavailable())


def test_info_as_json(capsys):
    status, out, complaint = run(capsys, "info", "--json")
    assert (status, complaint) == (0, "")
    facts = json.loads(out)
    assert out.isascii()
    keys = {name: set(value) if isinstance(value, dict) else None for name, value in facts.items()}
    assert keys == {
        "visattn_kernels": None,
        "python": None,
        "torch": {"version", "cuda", "hip"},
        "libraries": {"triton", "numpy", "typer", "rich", "matplotlib", "pillow", "scikit-learn"},
        "processor": {
            *("model", "instruction_sets", "torch_uses", "engine_uses", "engine_reason", "threads", "usable_cores"),
        },
        "cuda_kernels": {"architectures", "reason"},
        "backends": {backend.name for backend in backends.REGISTRY},
    }
    assert facts["torch"] == {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    for backend in backends.REGISTRY:
        reasons = backend.unavailable()
        assert facts["backends"][backend.name] == {"available": not reasons, "about": backend.about, "reasons": reasons}
    assert bool(facts["cuda_kernels"]["architectures"]) != bool(facts["cuda_kernels"]["reason"])
    assert bool(facts["processor"]["engine_uses"]) != bool(facts["processor"]["engine_reason"])


def test_info_names_what_the_cuda_kernels_were_compiled_for(monkeypatch, capsys):
    flags = "".join(f" -gencode arch=compute_{x[-3:].strip('_')},code={x}" for x in ("sm_80", "sm_90a", "compute_120"))
    monkeypatch.setattr(parts, "failure", lambda part: "")
    monkeypatch.setattr(parts, "built_cuda", lambda: (flags.strip(), ((8, 8),)))
    assert json.loads(run(capsys, "info", "--json")[1])["cuda_kernels"] == {
        "architectures": ["sm_80", "sm_90a", "compute_120"],
        "reason": "",
    }
    assert "our kernels compiled for sm_80 sm_90a compute_120 " in " ".join(run(capsys, "info")[1].split())
    monkeypatch.setattr(parts, "failure", lambda part: "the CUDA kernels were not built: no toolkit")
    text = " ".join(run(capsys, "info")[1].split())
    assert "our kernels the CUDA kernels were not built: no toolkit " in text


def test_info_says_what_is_missing(monkeypatch, capsys):
    engine = backends.Backend("cpu", "", lambda: ["no compiler"], lambda problem: [])
    monkeypatch.setattr(backends, "REGISTRY", (engine, backends.REGISTRY[-1]))
    monkeypatch.setattr(backends.cpu, "unavailable", engine.unavailable)
    monkeypatch.setattr(parts, "failure", lambda part: "no compiler")
    monkeypatch.setattr(machine, "_version", lambda name: None if name in ("pillow", "triton") else "1.0")
    text = " ".join(run(capsys, "info")[1].split())
    for part in (
        "cpu not available: no compiler",
        "engine uses nothing: no compiler",
        "our kernels no compiler",
        "C++ engine no compiler",
        "triton not installed",
        "pillow: pip install 'visattn_kernels[viz]'",
    ):
        assert part in text


@pytest.mark.skipif(bool(backends.cpu.unavailable()), reason="the engine is not there")
def test_info_with_an_instruction_set_that_is_not_there(monkeypatch, capsys):
    def isa():
        raise RuntimeError("visattn: expected an instruction set of this CPU, but got VISATTN_CPU_ISA=mmx")

    monkeypatch.setattr(backends.cpu, "isa", isa)
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert "VISATTN_CPU_ISA=mmx" in out


# What is not installed


def without(*libraries):
    """Python in which libraries are not installed."""
    return f"sys.modules.update(dict.fromkeys({libraries!r}))"


def test_a_plain_install_has_version_help_and_info():
    for arguments in (["--version"], ["--help"], ["info"], ["info", "--json"]):
        done = command(*arguments, before=without(*VIZ, "triton"))
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert done.stdout
    assert json.loads(done.stdout)["torch"]["version"] == torch.__version__


@pytest.mark.parametrize(
    ("library", "arguments"),
    [
        ("matplotlib", ("attend",)),
        ("matplotlib", ("patterns",)),
        ("PIL", ("map", "--at", "1,1")),
        ("typer", ("attend",)),
        ("rich", ("map",)),
    ],
)
def test_drawing_names_what_is_not_installed(folder, library, arguments):
    done = command(*arguments, before=without(library))
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(
        rf"visattn: .* needs {library}.*, which is not installed\. Use pip install 'visattn_kernels\[viz\]'\n",
        done.stderr,
    )
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (("info",), set()),
        (("attend", "--help"), {"typer", "rich"}),
        (("map", "photo", "--at", "1,1"), {"typer", "rich", "matplotlib", "PIL"}),
    ],
)
def test_each_command_imports_what_it_needs(photo, arguments, needed):
    """Not what draws, to describe the machine; not scikit-learn, for a picture of the user's; no compiler at all."""
    before = """
import atexit
names = {"matplotlib", "PIL", "sklearn", "scipy", "typer", "rich", "torch._dynamo", "sympy", "triton"}
atexit.register(lambda: print("imported", *names & set(sys.modules)))
"""
    done = command(*(photo if argument == "photo" else argument for argument in arguments), before=before)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.splitlines()[-1].split()[1:]) == needed


# Ctrl-C

SEND = "os.kill(os.getpid(), signal.SIGINT)"
LOSE = """
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    pass
"""
CHANGE = """
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    raise SystemError("initialization raised an exception") from None
"""


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param("torch", SEND, id="torch"),
        pytest.param("torch", CHANGE, id="torch, changed"),
        pytest.param("visattn_kernels.viz.images", LOSE, id="images, lost"),
        pytest.param("matplotlib.figure", SEND, id="matplotlib"),
    ],
)
def test_ctrl_c_while_a_library_loads(folder, photo, name, how):
    """A signal at the import of a library, where an exception would reach us, or become another, or be lost."""
    before = f"""
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            sys.meta_path.remove(self)
            exec({how!r})
sys.meta_path.insert(0, Interrupt())
"""
    done = command("map", photo, "--at", "3,3", before=before)
    assert (done.returncode, done.stderr) == (130, "visattn: interrupted, nothing was written\n")
    assert "wrote" not in done.stdout
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("becomes", [None, KeyboardInterrupt, SystemError], ids=["lost", "raised", "changed"])
def test_ctrl_c_in_a_careful_block(monkeypatch, becomes):
    monkeypatch.setattr(visattn_cli, "_interrupted", False)
    with pytest.raises(KeyboardInterrupt), visattn_cli.careful():  # noqa: PT012
        try:
            visattn_cli._interrupt()
        except KeyboardInterrupt:
            if becomes:
                raise becomes from None
    with pytest.raises(KeyboardInterrupt):
        visattn_cli.settle()
    monkeypatch.setattr(visattn_cli, "_interrupted", False)
    visattn_cli.settle()
    with pytest.raises(SystemError), visattn_cli.careful():
        raise SystemError
    assert visattn_cli._careful == 0


def test_ctrl_c_while_it_computes(folder, photo):
    before = f"""
from visattn_kernels.viz import compute
slab = compute.attention
def attention(*arguments, **options):
    {SEND}
    return slab(*arguments, **options)
compute.attention = attention
"""
    done = command("attend", photo, before=before)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "visattn: interrupted, nothing was written\n"
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_ctrl_c_leaves_the_terminal_as_it_was(folder, photo):
    """The bar hides the cursor."""
    script = f"""
import os, signal, sys
from visattn_cli import main
from visattn_kernels.viz import compute
def attention(*arguments, **options):
    {SEND}
compute.attention = attention
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["visattn", "attend", {str(photo)!r}]
main()
"""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "TERM": "xterm"}
    outer, inner = os.openpty()
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, stdout=inner, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(inner)
    shown = os.read(outer, 1 << 16).decode()
    os.close(outer)
    assert (done.returncode, done.stderr) == (130, "visattn: interrupted, nothing was written\n")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert list(folder.iterdir()) == []


def test_ctrl_c_after_the_file_is_there_is_too_late(folder, photo):
    """What is said is what was done: the file is written, and the command ends as if nothing had been."""
    before = f"""
from pathlib import Path
replace = Path.replace
def replaced(*arguments):
    done = replace(*arguments)
    {SEND}
    return done
Path.replace = replaced
"""
    done = command("map", photo, "--at", "3,3", before=before)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("wrote      map.png\n")
    assert [path.name for path in folder.iterdir()] == ["map.png"]


def test_an_interrupt_that_was_ignored_from_the_start_stays_so():
    """As under nohup, and in the background of a script."""
    before = """
import atexit
signal.signal(signal.SIGINT, signal.SIG_IGN)
atexit.register(lambda: print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN))
"""
    done = command("paint", before=before)
    assert (done.returncode, done.stdout) == (2, "True\n")


# Text of others


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("price_$5_and_$6 [red].png", "price_$5_and_$6 [red].png"),
        ("日本語 é 😀", "日本語 é 😀"),
        ("caf\udce9.png", r"caf\xe9.png"),
        ("\udce6\udc97\udca5.png", "日.png"),  # UTF-8 where the locale knows ASCII alone
        ("a\nb\tc\x1b[31m\x7f", r"a\nb\tc\x1b[31m\x7f"),
        ("e\u202egnp.exe", r"e\u202egnp.exe"),
        ("\ud800", r"\ud800"),
        ("\u2028", r"\u2028"),
        ("نمی\u200cخواهم", "نمی\u200cخواهم"),
    ],
)
def test_text_of_others_is_one_line_of_letters(text, printed):
    assert visattn_cli.printable(text) == printed
    printed.encode()
