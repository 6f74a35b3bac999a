"""The GPU tier without a GPU: it is collected in order, its driver resumes, its record and its summary hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tolerance
import torch
from cases import Case, TermCase, differentiate, expected, hold, inputs
from gpu import schedule
from tolerance import TF32, cut_to_tf32, tf32_products
from typer.testing import CliRunner

import visattn_kernels as va
from benchmarks import cli, gpu, gpu_record, machine, providers, runner, table
from benchmarks.gpu import Budgets, Driver, Ended, Job
from benchmarks.gpu_record import TOOLS, Outcome, Record
from visattn_kernels import backends, reference
from visattn_kernels.terms import TERM_TENSORS

FILES = ("backends", "cases", "nan", "races", "sizes", "streams")

WITHOUT = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def record(**fields) -> Record:
    hardware = {"gpu": {"name": "NVIDIA H200", "capability": "9.0", "driver": "580.1"}}
    versions = {"torch": "2.11.0", "triton": "3.6.0"}
    return Record("0123456789abcdef", False, "feed", hardware, versions, "2026-11-21T12:00:00+00:00", **fields)


# What is collected.


@pytest.fixture(scope="module")
def collected() -> list[str]:
    return gpu.collect()


def test_the_tier_is_collected_in_order(collected: list[str]) -> None:
    assert {name.partition("::")[0] for name in collected} == {f"tests/gpu/test_{file}.py" for file in FILES}
    assert collected == sorted(collected, key=schedule.order)
    assert len(set(collected)) == len(collected) > 1500
    assert collected[0].startswith("tests/gpu/test_backends.py")
    ranks = [schedule.order(name)[1] for name in collected]
    assert set(ranks[: ranks.index(2)]) == {0, 1}
    mixed = collected[ranks.index(2) :]
    part = {name.partition("[")[0] for name in mixed[:200]}
    assert len(part) >= 4, "a part of the tests that are mixed is no sample of them"
    assert schedule.order(collected[0], frozenset(collected[:1])) > schedule.order(collected[-1])


def test_each_backend_for_gpus_runs_the_whole_table(collected: list[str]) -> None:
    from cases import CASES
    from gpu.common import DTYPES, FOR_GPUS

    assert [backend.name for backend in FOR_GPUS] == [
        backend.name for backend in backends.REGISTRY if backend.name not in ("cpu", "reference")
    ]
    for backend in FOR_GPUS:
        for case in CASES:
            name = f"tests/gpu/test_cases.py::test_forward_and_backward[{case.id}-{backend.name}]"
            assert (name in collected) == (case.dtype in DTYPES), name


@WITHOUT
def test_without_a_gpu_each_file_is_one_skip() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VISATTN", "PYTEST"))}
    done = subprocess.run(command, cwd=machine.ROOT, env=environment, capture_output=True, text=True)
    assert f"{len(FILES)} skipped in" in done.stdout
    assert f"SKIPPED [{len(FILES)}] " in done.stdout
    assert "needs an NVIDIA GPU; make gpu runs it" in done.stdout


def test_tensors_move_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    from cases import LAYOUTS
    from gpu.common import to_gpu

    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x.clone(memory_format=torch.contiguous_format))
    for layout in LAYOUTS:
        for batch in (2, 0):
            x = inputs(Case(layouts=(layout,) * 4, batch=batch))["q"]
            y = to_gpu(x)
            assert (y.stride(), y.storage_offset(), y.shape) == (x.stride(), x.storage_offset(), x.shape)
            assert y.untyped_storage().nbytes() == x.untyped_storage().nbytes()
            assert torch.equal(x, y)
            assert not batch or y.data_ptr() != x.data_ptr()


# The driver.


class Machine:
    """Runs jobs as a machine with a GPU would: some tests pass, one fails, some are left."""

    def __init__(self, names: list[str], fails: frozenset[str] = frozenset(), most: int = 10**6) -> None:
        self.names, self.fails, self.most = names, fails, most
        self.ran: list[list[str]] = []
        self.sanitizer_output = "========= ERROR SUMMARY: 0 errors\nsanitized: 12 problems, triton"
        self.benchmark_code = 0

    def __call__(self, jobs: Sequence[Job], limit: float) -> list[Ended]:
        assert limit > 0
        return [self.one(job, limit) for job in jobs]

    def one(self, job: Job, limit: float) -> Ended:
        command = " ".join(job.command)
        job.log.write_text(self.sanitizer_output if "--tool" in command else f"ran {command}\n")
        if "-m pytest" in command:
            plan = json.loads(Path(job.environment["VISATTN_GPU_PLAN"]).read_text())
            assert time.time() < plan["until"] < time.time() + limit
            order = sorted(self.names, key=lambda name: schedule.order(name, frozenset(plan["last"])))
            Path(plan["collected"]).write_text(json.dumps(order))
            run = [name for name in order if name not in plan["passed"]][: self.most]
            self.ran.append(run)
            with Path(plan["log"]).open("w") as log:
                for name in run:
                    log.write(json.dumps({"event": "start", "id": name}) + "\n")
                    outcome = "failed" if name in self.fails else "passed"
                    message = "AssertionError: `out` is wrong" if name in self.fails else ""
                    end = {"event": "end", "id": name, "outcome": outcome, "seconds": 0.5, "message": message}
                    log.write(json.dumps(end) + "\n")
            return Ended(int(bool(self.fails)), 3.0)
        return Ended(self.benchmark_code if "benchmarks" in command else 0, 2.0)


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for everything; OUT too."""
    monkeypatch.setenv("OUT", str(tmp_path / "copies"))
    monkeypatch.setattr(gpu, "CUDA_RECORD", tmp_path / "cuda.json")
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "/opt/compute-sanitizer")
    return tmp_path


def call(at: Path, machine: Machine, known: Record) -> tuple[bool, Record]:
    """One call of the driver, and its record as it was read back."""
    driver = Driver(known, path=at / "gpu.json", work=at / "work", say=lambda text: None, run=machine)
    return driver.everything(), gpu_record.load(at / "gpu.json")


NAMES = [f"tests/gpu/test_{file}.py::test_{i}" for file in ("cases", "races") for i in range(4)]


def test_a_second_call_runs_what_has_not_passed_and_what_failed_last(at: Path) -> None:
    bad = "tests/gpu/test_races.py::test_2"
    here = Machine(NAMES, frozenset({bad}), most=6)
    passed, known = call(at, here, record())
    assert not passed
    assert (len(known.having("passed")), list(known.having("failed")), len(known.left)) == (5, [bad], 2)
    assert known.failures == [f"{bad}: AssertionError: `out` is wrong"]
    assert known.remaining[0] == "2 of 8 tests"  # and not the compiled part
    assert [one.state for one in known.sanitizer.values()] == ["passed"] * 4
    assert known.engine == Outcome("passed", 2.0)
    assert (at / "copies" / "gpu.json").read_text() == (at / "gpu.json").read_text()
    assert "gpu.sanitized" not in (at / "copies" / "gpu.log").read_text()
    assert "===== tests.log" in (at / "copies" / "gpu.log").read_text()

    left = known.left
    mended = Machine(NAMES)
    passed, known = call(at, mended, known)
    assert passed
    assert sorted(mended.ran[0][:2]) == sorted(left)
    assert mended.ran[0][2:] == [bad]
    assert (len(known.having("passed")), known.failures, known.left, known.calls) == (8, [], [], 2)
    assert known.remaining == [f"{known.benchmark['of']} of {known.benchmark['of']} cells of the benchmark"]

    nothing = Machine(NAMES)
    assert call(at, nothing, known)[0]
    assert nothing.ran == []


@pytest.mark.parametrize(
    ("output", "ended", "state", "message"),
    [
        ("========= ERROR SUMMARY: 0 errors\nsanitized: 12", Ended(0, 9.0), "passed", ""),
        ("sanitized: 12\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", Ended(0, 9.0),
         "passed", ""),
        ("========= Invalid __global__ read of size 2\n========= ERROR SUMMARY: 3 errors\nsanitized: 12",
         Ended(86, 9.0), "failed", "exit status 86: Invalid __global__ read of size 2"),
        ("sanitized: 12\n========= ERROR SUMMARY: 3 errors", Ended(0, 9.0), "failed", "exit status 0: 3 errors"),
        ("========= ERROR SUMMARY: 0 errors", Ended(0, 9.0), "failed", "exit status 0: 0 errors"),
        ("sanitized: 12", Ended(0, 9.0), "failed", "exit status 0: sanitized: 12"),
        ("", Ended(1, 9.0), "failed", "exit status 1: no output"),
        ("ModuleNotFoundError: No module named 'x'", Ended(1, 9.0), "failed",
         "exit status 1: ModuleNotFoundError: No module named 'x'"),
        ("========= Error: Device not supported. Please refer to", Ended(1, 9.0), "skipped",
         "it cannot run here: Error: Device not supported. Please refer to"),
        ("", Ended(None, 110.0), "unfinished", "stopped at its limit"),
    ],
)  # fmt: skip
def test_what_a_sanitizer_says(output: str, ended: Ended, state: str, message: str) -> None:
    assert gpu.verdict(output, ended) == Outcome(state, ended.seconds, message)


def test_a_sanitizer_that_found_something_fails_the_call_and_runs_again(at: Path) -> None:
    here = Machine(NAMES)
    here.sanitizer_output = "========= Invalid __shared__ write\n========= ERROR SUMMARY: 1 error\nsanitized: 12"
    passed, known = call(at, here, record())
    assert not passed
    assert [one.state for one in known.sanitizer.values()] == ["failed"] * 4
    assert len(known.failures) == 4
    assert call(at, Machine(NAMES), known)[0]


def test_what_is_not_done_is_not_called_passed(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Machine(NAMES)
    here.benchmark_code = 1
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    passed, known = call(at, here, record())
    assert not passed
    (failure,) = known.failures
    assert failure.startswith("benchmark: exit status 1: ran ")
    assert {one.state for one in known.sanitizer.values()} == {"skipped"}

    class Broken(Machine):
        def one(self, job: Job, limit: float) -> Ended:
            job.log.write_text("ImportError: no xdist\n")
            return Ended(4, 1.0)

    passed, known = call(at, Broken(NAMES), record())
    assert not passed
    assert known.failures[0].endswith("does not build: ImportError: no xdist")
    assert known.failures[1] == "pytest: exit status 4: ImportError: no xdist"
    assert "every test: none was collected" in known.remaining


def test_what_was_cut_off_is_left_and_a_crash_keeps_its_message() -> None:
    known = record(collected=["a", "b", "c", "d"])
    end = {"event": "end", "seconds": 1.0}
    lines = [
        {"event": "start", "id": "a"},
        {**end, "id": "a", "outcome": "failed", "message": "illegal memory access"},
        {**end, "id": "a", "outcome": "failed", "message": "worker 'gw1' crashed"},
        {"event": "start", "id": "b"},
        {"event": "start", "id": "c"},
        {**end, "id": "c", "outcome": "skipped", "message": "needs 50 GB"},
    ]
    known.absorb([*map(json.dumps, lines), '{"event": "end", "id": "b", "outc'])
    assert known.tests["a"].message == "illegal memory access"
    assert known.tests["b"].state == "unfinished"
    assert known.left == ["b", "d"]
    text = gpu_record.render(known)
    assert "- `a: illegal memory access`" in text
    assert "Skipped: needs 50 GB (1)." in text
    assert "Left to run: the compiled part; 2 of 4 tests; compute-sanitizer memcheck, racecheck" in text


def test_a_record_goes_on_only_with_the_same_code_and_kind_of_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = record(collected=["a"], tests={"a": Outcome("passed", 1.0)})
    path = tmp_path / "gpu.json"
    known.save(path)
    for change, goes_on in (
        ({}, True),
        ({"commit": "another"}, True),
        ({"sources": "other"}, False),
        ({"versions": {"torch": "2.12.0"}}, False),
        ({"hardware": {"gpu": {"name": "NVIDIA A100", "capability": "8.0"}}}, False),
    ):
        monkeypatch.setattr(gpu_record, "begin", lambda change=change: replace(record(), **change))
        assert bool(gpu.resumed(path).tests) == goes_on, change
    monkeypatch.setattr(gpu_record, "begin", record)
    assert not gpu.resumed(path, fresh=True).tests
    path.write_text("{")
    assert not gpu.resumed(path).tests
    with pytest.raises(ValueError, match="no record of a GPU"):
        gpu_record.load(path)


def test_processes_are_stopped_at_the_limit_with_all_that_they_started(tmp_path: Path) -> None:
    quick = Job(["sh", "-c", "echo $VISATTN_X; exit 3"], {"VISATTN_X": "hello"}, tmp_path / "quick")
    slow = Job(["sh", "-c", "sleep 60 & echo $! ; wait"], {}, tmp_path / "slow")
    start = time.monotonic()
    ended = gpu.processes([quick, slow], 1.0)
    assert time.monotonic() - start < 15
    assert [one.code for one in ended] == [3, None]
    assert quick.log.read_text() == "hello\n"
    stat = Path(f"/proc/{int(slow.log.read_text())}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("a grandchild is still running")


def test_all_parts_together_take_less_than_ten_minutes() -> None:
    assert Budgets().total < 600


def test_what_does_not_build_is_a_failure_and_tried_again(at: Path) -> None:
    class Broken(Machine):
        codes: tuple[int | None, ...] = (1, None, 0)
        built = 0

        def one(self, job: Job, limit: float) -> Ended:
            if "setup.py" in " ".join(job.command):
                assert re.fullmatch(r"\d+\.\d", job.environment["TORCH_CUDA_ARCH_LIST"])
                assert job.environment["MAX_JOBS"].isdigit()
                job.log.write_text(
                    "[3/9] c++ -c a.cpp\na.cpp:3: error: no such instruction\n  3 | x\na.cpp:4:1: error: nor this\n"
                    "visattn: the compiled part does not build\nninja: stopped\n"
                )
                self.built += 1
                return Ended(self.codes[self.built - 1], 2.0)
            return super().one(job, limit)

    here = Broken(NAMES)
    passed, known = call(at, here, record())
    assert not passed
    assert known.failures == [
        "the compiled part: the compiled part does not build: a.cpp:3: error: no such instruction | "
        "a.cpp:4:1: error: nor this | visattn: the compiled part does not build"
    ]
    passed, known = call(at, here, known)
    assert passed
    assert known.remaining[0] == "the compiled part"
    passed, known = call(at, here, known)
    assert passed
    assert known.engine == Outcome("passed", 2.0)
    call(at, here, known)
    assert here.built == 3


# What a person sees.


@WITHOUT
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RECORD", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu_record, "RECORD", tmp_path / "gpu.json")
    before = sorted(path.name for path in gpu.CUDA_RECORD.parent.iterdir())
    done = CliRunner().invoke(cli.app, ["gpu"])
    assert done.exit_code == 2
    assert "needs an NVIDIA GPU, and torch finds none here" in done.output
    assert sorted(path.name for path in gpu.CUDA_RECORD.parent.iterdir()) == before
    assert not list(tmp_path.iterdir())


def test_the_plan_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "collect", lambda: NAMES)
    done = CliRunner().invoke(cli.app, ["gpu", "--plan"])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[3:11] == NAMES
    assert [line for line in lines if line in TOOLS] == list(TOOLS)
    assert lines.index("swin-b-s1 bfloat16 forward") < lines.index("image-320x213 float32 both")
    assert lines[-1] == f"at most {Budgets().total:.0f} s in all"


def test_the_summary_in_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = machine.ROOT / "docs" / "hardware.md"
    assert "<!-- benchmarks:gpu -->" in page.read_text()
    assert not table.update(page, table.finder([]), check=True), "update with: python -m benchmarks table --update"
    monkeypatch.setattr(gpu_record, "RECORD", tmp_path / "gpu.json")
    assert gpu_record.summary(tmp_path / "gpu.json") == gpu_record.EMPTY
    known = record(
        collected=NAMES,
        tests={name: Outcome("passed", 1.0) for name in NAMES[:6]},
        sanitizer={tool: Outcome("passed", 9.0) for tool in TOOLS},
        engine=Outcome("passed", 100.0),
        benchmark={"cells": 5, "of": 5, "refused": [], "state": "ran", "message": ""},
    )
    text = gpu_record.render(known)
    assert text.startswith("NVIDIA H200 (compute capability 9.0, driver 580.1); torch 2.11.0, Triton 3.6.0; 012345")
    assert "| `tests/gpu/test_cases.py` | 4 | 0 | 0 | 0 |" in text
    assert "| `tests/gpu/test_races.py` | 2 | 0 | 0 | 2 |" in text
    assert "| compute-sanitizer racecheck | 1 | 0 | 0 | 0 |" in text
    assert text.endswith("Left to run: 2 of 8 tests.")
    known.tests |= {name: Outcome("passed", 1.0) for name in NAMES}
    assert gpu_record.render(known).endswith("Nothing is left to run.")


def test_files_without_their_repository_can_be_told_their_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISATTN_COMMIT", "abc123-dirty")
    if machine.ROOT.joinpath(".git").exists():
        assert machine.commit()[0] != "abc123"
    monkeypatch.setattr(machine, "_git", lambda *arguments: None)
    assert machine.commit() == ("abc123", True)


# The benchmark on a GPU.


def test_each_backend_for_gpus_is_a_provider() -> None:
    names = [provider.name for provider in providers.PROVIDERS if provider.ours]
    assert names == [f"visattn-{backend.name}" for backend in backends.REGISTRY if backend.name != "reference"]


def test_the_most_telling_workloads_come_first() -> None:
    names = [workload.name for workload in gpu.ordered()]
    assert names[: len(gpu.FIRST)] == list(gpu.FIRST)
    assert sorted(names) == sorted(workload.name for workload in runner.WORKLOADS if workload.gpu_batch)


def test_no_cell_begins_after_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import ceilings
    from benchmarks.measure import Budget
    from benchmarks.workloads import Workload
    from visattn_kernels.patterns import Size

    tiny = Workload("tiny", "for tests", Size(5, 7), Size(3, 4), 2, 4, 6, gpu_batch=1, cpu_batch=2)
    limits = ceilings.Ceilings({"float32": 4e11, "bfloat16": 8e11}, 5e10, 2e10, {})
    monkeypatch.setattr(ceilings, "measure", lambda device, threads: limits)
    plan = runner.Plan(
        [tiny], [providers.find("naive")], budget=Budget(0.0, 2, 2), memory=False, threads=1, out=tmp_path / "x.json"
    )
    stopped = runner.run(replace(plan, stop_after=0.0))
    assert not stopped.complete
    assert not stopped.cells
    done = runner.run(replace(plan, resume=True, stop_after=600.0))
    assert done.complete
    assert len(done.cells) == 6
    assert runner.differences(done, runner.new_report(plan)) == []
    grown = {**done.hardware, "memory_bytes": 2 * done.hardware["memory_bytes"]}
    assert runner.differences(replace(done, hardware=grown), done) == []
    assert runner.differences(replace(done, hardware={**grown, "cores": 99}), done) == ["hardware"]


# The row of TF32.

TF32_CASES = [
    Case(head_dim=1, value_dim=1),
    Case(pattern=va.Window(3, shift=1), terms=tuple(TermCase(name) for name in ("RelativeQuery", "RelativeKey"))),
    Case(queries=(7, 11), keys=(7, 11), pattern=va.Neighborhood(3, border="zero"), terms=(TermCase("RelativeValue"),)),
]


def rounded(case: Case, bits: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Results of the formula with operands of products rounded to nearest, without so many lower bits."""

    def to_nearest(x: torch.Tensor) -> torch.Tensor:
        return ((x.view(torch.int32) + (1 << (bits - 1))) & -(1 << bits)).view(torch.float32)

    def formula(q, k, v, **extra):
        return reference.formula(q, k, v, case.pattern, scale=case.true_scale, terms=case.build_terms(extra))

    with monkeypatch.context() as patch, tf32_products():
        patch.setattr(tolerance, "cut_to_tf32", to_nearest)
        return differentiate(formula, inputs(case), case.wanted)


@pytest.mark.parametrize("case", TF32_CASES, ids=lambda case: case.id)
def test_the_row_of_tf32_takes_its_rounding_and_no_coarser(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, eager = expected(case, tf32=True)
    hold(case, rounded(case, 13, monkeypatch), tf32=True)
    hold(case, expected(case)[1], tf32=True)  # float32 itself
    assert (eager["out"] - exact["out"]).abs().max() > 100 * (expected(case)[1]["out"] - exact["out"]).abs().max()
    with pytest.raises(AssertionError, match="error"):
        hold(case, rounded(case, 16, monkeypatch), tf32=True)  # bfloat16
    with pytest.raises(AssertionError, match="error"):
        hold(case, rounded(case, 13, monkeypatch))  # TF32 is no float32


def test_products_of_tf32_differentiate_as_products_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing cut, the gradients are those of the formula."""
    case = replace(TF32_CASES[1], terms=tuple(TermCase(name) for name in ("RelativeQuery", "RelativeValue")))
    monkeypatch.setattr(tolerance, "cut_to_tf32", lambda x: x)

    def formula(q, k, v, **extra):
        return reference.formula(q, k, v, case.pattern, scale=case.true_scale, terms=case.build_terms(extra))

    plain = differentiate(formula, inputs(case), case.wanted)
    with tf32_products():
        through = differentiate(formula, inputs(case), case.wanted)
    for name, x in plain.items():
        torch.testing.assert_close(through[name], x, rtol=1e-5, atol=1e-6)
    assert set(plain) >= {f"grad_{name}" for name in TERM_TENSORS if name in case.term_tensors}


def test_cutting_leaves_eleven_bits_and_what_is_no_number() -> None:
    x = torch.tensor([1 + 2.0**-10, 1 + 2.0**-11, -3.0, 0.0, torch.inf, -torch.inf])
    assert cut_to_tf32(x).tolist() == [1 + 2.0**-10, 1.0, -3.0, 0.0, torch.inf, -torch.inf]
    assert cut_to_tf32(torch.tensor(torch.nan)).isnan()
    assert cut_to_tf32(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    assert tolerance.UNIT[TF32] == 2.0**-11
