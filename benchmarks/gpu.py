"""`make gpu`: the GPU tier, compute-sanitizer and the benchmark, in under ten minutes; a second call does what is left.

Each part is a process with a limit of its own. It is told to begin nothing new shortly before, and stopped at it; what
it did until then counts. Nothing is installed; written are the compiled part, `build/`, the two records and $OUT.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import gpu_record, machine, results, runner
from benchmarks.gpu_record import RECORD, Outcome, Record
from benchmarks.machine import ROOT
from benchmarks.sources import first_errors
from benchmarks.workloads import WORKLOADS, Workload

WORK = ROOT / "build" / "gpu"
"""Logs, plans, and the caches of Triton and inductor: they make a second call quick."""

CUDA_RECORD = results.FOLDER / "cuda.json"

START = 30.0
"""Seconds for what is not in a part's budget: imports, looking at the machine, writing records."""

FIRST = (
    "swin-b-s1", "nat-b-s1", "axial-65-row", "sam-h-global", "vit-global", "sagan-64", "ccnet-97", "vae-64", "sasa-s1",
    "maxvit-grid", "sam-h-window", "axial-129-column", "sagan-64-wide", "axial-65-column", "axial-129-row",
)  # fmt: skip
"""Workloads whose cells come first: one of each pattern, then the others that models have."""

_SANITIZED = "sanitized:"  # tests/gpu/sanitized.py ends with it


@dataclass(frozen=True)
class Budgets:
    """Seconds after which each part is stopped; 0 leaves it out."""

    engine: float = 200.0
    tests: float = 150.0
    sanitizer: float = 80.0
    benchmark: float = 120.0

    @property
    def total(self) -> float:
        """Of a whole call, at most."""
        return START + self.engine + self.tests + self.sanitizer + self.benchmark


@dataclass(frozen=True)
class Job:
    """A process of a part.

    Attributes:
        command: what is run, in the repository.
        environment: what is added to this process's.
        log: where its output goes.
    """

    command: Sequence[str]
    environment: dict[str, str]
    log: Path


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        code: its exit status; None if it was stopped at the limit.
        seconds: how long it ran.
    """

    code: int | None
    seconds: float


Run = Callable[[Sequence[Job], float], list[Ended]]
"""Runs jobs side by side, at most so many seconds."""


def processes(jobs: Sequence[Job], limit: float) -> list[Ended]:
    """The `Run` of a real call. What is stopped is a process with all that it started."""
    start = time.monotonic()
    running: list[subprocess.Popen[bytes]] = []
    ended: dict[int, Ended] = {}
    try:
        for job in jobs:
            with job.log.open("wb") as output:
                # A group of its own to be stopped by, in the same session, so that it ends with this program.
                environment = {**os.environ, **job.environment}
                running.append(
                    subprocess.Popen(
                        list(job.command),
                        cwd=ROOT,
                        env=environment,
                        stdout=output,
                        stderr=output,
                        preexec_fn=os.setpgrp,
                    )
                )
        while len(ended) < len(jobs) and time.monotonic() - start < limit:
            for i, process in enumerate(running):
                if i not in ended and process.poll() is not None:
                    ended[i] = Ended(process.returncode, round(time.monotonic() - start, 1))
            time.sleep(0.1)
    finally:
        for process in running:
            _end(process)
    return [ended.get(i, Ended(None, round(time.monotonic() - start, 1))) for i in range(len(jobs))]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process's group: what it left running too."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


@dataclass
class Driver:
    """One call of `make gpu`.

    Attributes:
        record: what is known, and is added to.
        budgets: of the parts.
        workers: processes that compile and run tests.
        path: where the record is written.
        work: where logs and caches are.
        say: told what a person should know.
        run: runs the processes of a part.
    """

    record: Record
    budgets: Budgets = field(default_factory=Budgets)
    workers: int = 16
    path: Path = RECORD
    work: Path = WORK
    say: Callable[[str], None] = print
    run: Run = processes

    def everything(self) -> bool:
        """Do what is left, part by part; whether all that ran passed."""
        start = time.monotonic()
        self.work.mkdir(parents=True, exist_ok=True)
        self.record.calls += 1
        before, spare = self.record.seconds, 0.0  # what a part leaves over is the next one's
        try:
            for part, limit in (
                (self.engine, self.budgets.engine),
                (self.tests, self.budgets.tests),
                (self.sanitizer, self.budgets.sanitizer),
                (self.benchmark, self.budgets.benchmark),
            ):
                if limit > 0:
                    begun = time.monotonic()
                    part(limit + spare)
                    spare = max(0.0, spare + limit - (time.monotonic() - begun))
                    self.record.seconds = round(before + time.monotonic() - start, 1)
                    self.record.save(self.path)
        finally:
            self._copies()
        return not self.record.failures

    # The compiled part, with the CUDA kernels for this GPU alone.

    def engine(self, limit: float) -> None:
        """Build it into the package, unless it was: what compiled before a limit is not compiled again."""
        record = self.record
        if record.engine is not None and record.engine.state == "passed":
            self.say("C++ and CUDA: built before")
            return
        log = self.work / "engine.log"
        self.say(f"C++ and CUDA: at most {limit:.0f} s, log in {log}")
        needs = {"TORCH_CUDA_ARCH_LIST": capability(), "MAX_JOBS": str(self.workers)}
        (ended,) = self.run([Job(ENGINE_COMMAND, needs, log)], limit)
        state = "unfinished" if ended.code is None else "passed" if ended.code == 0 else "failed"
        errors = first_errors(log.read_text(errors="replace")) if log.exists() else "no output"
        message = "" if state == "passed" else f"the compiled part does not build: {errors}"
        record.engine = Outcome(state, ended.seconds, message[:1000])
        self.say(f"C++ and CUDA: {message or 'built'}")

    # The tests.

    def tests(self, limit: float) -> None:
        """Run the tests that have not passed, those that failed before last."""
        record, log = self.record, self.work / "tests.jsonl"
        collected = self.work / "collected.json"
        passed, failed = sorted(record.having("passed")), record.having("failed")
        if record.collected and not record.left and not failed:
            self.say("tests: nothing is left")
            return
        again = [*failed, *record.having("unfinished"), *record.having("skipped")]
        plan = {
            "passed": passed,
            "last": sorted(again),
            "until": time.time() + max(limit - 40, 0.6 * limit),
            "log": str(log),
            "collected": str(collected),
        }
        for old in (log, collected):
            old.unlink(missing_ok=True)
        (self.work / "plan.json").write_text(json.dumps(plan))
        output = self.work / "tests.log"
        self.say(f"tests: at most {limit:.0f} s, {self.workers} processes, log in {output}")
        jobs = [Job(tier_command(self.workers), self._environment(), output)]
        (code,) = self.run(jobs, limit)
        if collected.exists():
            record.collected = json.loads(collected.read_text())
        if log.exists():
            record.absorb(log.read_text().splitlines())
        record.tests.pop("pytest", None)
        # 0: passed, 1: a test failed, 5: nothing was left to run. The rest is pytest's own trouble.
        if code.code not in (0, 1, 5, None) or not record.collected:
            message = f"exit status {code.code}: {_tail(output)}"
            record.tests["pytest"] = Outcome("failed", code.seconds, message[:300])
        counts = {state: len(record.having(state)) for state in ("passed", "failed", "skipped", "unfinished")}
        self.say(f"tests: {', '.join(f'{n} {state}' for state, n in counts.items())}, {len(record.left)} left")

    def _environment(self) -> dict[str, str]:
        """Of every process of the tier."""
        paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "VISATTN_GPU_PLAN": str(self.work / "plan.json"),
        }

    # The sanitizers.

    def sanitizer(self, limit: float) -> None:
        """Run the tools that have not passed, side by side: most of their time goes into starting."""
        known = self.record.sanitizer
        tools = [tool for tool in gpu_record.TOOLS if tool not in known or known[tool].state != "passed"]
        program = find_sanitizer()
        if program is None or not tools:
            known |= {tool: Outcome("skipped", 0.0, "compute-sanitizer is not installed") for tool in tools}
            self.say(f"compute-sanitizer: {'not installed' if tools else 'nothing is left'}")
            return
        self.say(f"compute-sanitizer: at most {limit:.0f} s, {', '.join(tools)}")
        environment = {**self._environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        jobs = [Job(sanitizer_command(program, tool), environment, self.work / f"{tool}.log") for tool in tools]
        for tool, job, ended in zip(tools, jobs, self.run(jobs, limit), strict=True):
            text = job.log.read_text(errors="replace") if job.log.exists() else ""
            known[tool] = one = verdict(text, ended)
            self.say(f"compute-sanitizer {tool}: {one.state}{f', {one.message}' if one.message else ''}")

    # The benchmark.

    def benchmark(self, limit: float) -> None:
        """Measure the cells that the benchmark's record has not, the most telling first."""
        cells = runner.Plan(ordered(), device="cuda").cells()
        goes_on = same_run(CUDA_RECORD)
        done = len(results.load(CUDA_RECORD).cells) if goes_on else 0
        if done == len(cells):
            self.say(f"benchmark: all {done} cells are measured")
        else:
            about = f"goes on after {done} cells" if goes_on else "begins anew"
            self.say(f"benchmark: at most {limit:.0f} s, {about}, log in {self.work / 'benchmark.log'}")
            command = benchmark_command(goes_on, max(limit - 60, 0.6 * limit))
            log = self.work / "benchmark.log"
            (ended,) = self.run([Job(command, self._environment(), log)], limit)
            fine = ended.code in (0, None)
            message = "" if fine else f"exit status {ended.code}: {_tail(log)}"
            self.record.benchmark = {"state": "ran" if fine else "failed", "message": message[:300]}
        measured = results.load(CUDA_RECORD).cells if same_run(CUDA_RECORD) else []
        self.record.benchmark |= {"cells": len(measured), "of": len(cells), "refused": refused(measured)}
        self.say(f"benchmark: {len(measured)} of {len(cells)} cells, ours refused {len(refused(measured))} times")

    def _copies(self) -> None:
        """Put records and logs into the folder for copies, if the environment names one."""
        folder = os.environ.get("OUT")
        if not folder:
            return
        to = Path(folder)
        to.mkdir(parents=True, exist_ok=True)
        for path in (self.path, CUDA_RECORD):
            if path.exists():
                shutil.copy(path, to / path.name)
        logs = [path for path in sorted(self.work.glob("*.log")) if path.exists()]
        with (to / "gpu.log").open("w") as all_logs:
            for path in logs:
                text = path.read_text(errors="replace")
                all_logs.write(f"===== {path.name}\n{text[-3_000_000:]}\n")


def tier_command(workers: int) -> list[str]:
    """The GPU tier by pytest, its tests handed out one by one so that their order holds."""
    return [
        sys.executable, "-m", "pytest", "tests/gpu", "-p", "gpu.schedule", "-p", "no:cacheprovider", "--tb=short",
        "-n", str(workers), "--dist", "load", "--maxschedchunk", "1",
        # Warnings of versions never seen here are shown, and are no errors; our own are.
        "-W", "default", "-W", "error:visattn",
    ]  # fmt: skip


def sanitizer_command(program: str, tool: str) -> list[str]:
    """A tool on `tests/gpu/sanitized.py`."""
    options = [
        "--tool",
        tool,
        "--error-exitcode",
        "86",
        "--target-processes",
        "application-only",
        "--print-limit",
        "20",
    ]
    return [program, *options, sys.executable, "-m", "gpu.sanitized"]


def benchmark_command(resume: bool, stop_after: float) -> list[str]:
    """The benchmark on the GPU, into its own record."""
    names = ",".join(workload.name for workload in ordered())
    command = [sys.executable, "-m", "benchmarks", "run", "--device", "cuda", "--out", str(CUDA_RECORD), "-w", names]
    command += ["--seconds", "0.3", "--stop-after", f"{stop_after:.0f}"]
    return [*command, "--resume"] if resume else command


ENGINE_COMMAND = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
"""Builds the compiled part into the package."""


def capability() -> str:
    """The compute capability of the GPU, as TORCH_CUDA_ARCH_LIST has it."""
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"{major}.{minor}"


def verdict(text: str, ended: Ended) -> Outcome:
    """What a tool's output says: passed only if all problems ran, and the tool has no error to report."""
    lines = [line.strip("= ") for line in text.splitlines() if line.strip("= ")]
    cannot = [line for line in lines if re.search("[Dd]evice (is )?not supported|LibraryNotLoaded", line)]
    if cannot:
        return Outcome("skipped", ended.seconds, f"it cannot run here: {cannot[0]}"[:300])
    if ended.code is None:
        return Outcome("unfinished", ended.seconds, "stopped at its limit")
    sums = [match[1] for line in lines if (match := re.match(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", line))]
    clean = bool(sums) and re.match("0 (errors|hazards)", sums[-1]) is not None
    if ended.code == 0 and clean and any(line.startswith(_SANITIZED) for line in lines):
        return Outcome("passed", ended.seconds)
    told = [line for line in lines if re.search("Error|Invalid|Race|hazard|Barrier|Uninit", line)]
    message = (told or sums or lines[-1:] or ["no output"])[0]
    return Outcome("failed", ended.seconds, f"exit status {ended.code}: {message}"[:300])


def _tail(log: Path) -> str:
    """The last lines of a log, on one."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return " | ".join([line for line in lines if line.strip()][-3:]) or "no output"


def find_sanitizer() -> str | None:
    """The program compute-sanitizer, on PATH or beside CUDA's compiler."""
    places = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    for place in places:
        for folder in ("bin", "compute-sanitizer"):
            path = Path(place or "/nowhere") / folder / "compute-sanitizer"
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
    return shutil.which("compute-sanitizer")


def ordered() -> list[Workload]:
    """The workloads of a GPU, the most telling first."""
    here = [workload for workload in WORKLOADS if workload.gpu_batch > 0]
    return sorted(here, key=lambda one: FIRST.index(one.name) if one.name in FIRST else len(FIRST))


def same_run(path: Path) -> bool:
    """Whether a results file is of this code and this machine, so that it can be gone on with."""
    try:
        old = results.load(path)
    except (OSError, ValueError):
        return False
    return not runner.differences(old, runner.new_report(runner.Plan(ordered(), device="cuda", out=path)))


def refused(cells: Sequence[results.Cell]) -> list[str]:
    """Our backends' entries that the tolerance policy refused, or that raised."""
    return [
        f"{' '.join(cell.key)}: {entry.name}: {entry.reason}"
        for cell in cells
        for entry in cell.entries
        if entry.ours and (entry.status == "refused" or entry.reason.startswith("raised "))
    ]


def collect() -> list[str]:
    """The tests of the tier in the order in which they run, collected without a GPU too.

    Raises:
        RuntimeError: pytest cannot collect them.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    plan, collected = WORK / "collect-plan.json", WORK / f"collected-{os.getpid()}.json"
    nothing: dict[str, Any] = {"passed": [], "last": [], "until": None}
    plan.write_text(json.dumps({**nothing, "log": os.devnull, "collected": str(collected)}))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {"PYTHONPATH": paths, "VISATTN_GPU_PLAN": str(plan), "VISATTN_COLLECT_GPU": "1"}
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-p", "gpu.schedule", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--collect-only", "-qq"], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"pytest cannot collect tests/gpu:\n{(done.stdout + done.stderr)[-2000:]}")
    names = json.loads(collected.read_text())
    collected.unlink()
    return list(names)


def resumed(path: Path = RECORD, fresh: bool = False) -> Record:
    """The record that this machine goes on with, or a new one."""
    new = gpu_record.begin()
    if fresh or not path.exists():
        return new
    try:
        old = gpu_record.load(path)
    except ValueError:
        return new
    return old if old.is_of(new) else new


def about_the_machine() -> str:
    """What is here: the GPU, versions, the commit."""
    commit, dirty = machine.commit()
    lines = [machine.nvidia_smi() or "nvidia-smi: not found"]
    lines += [f"{name} {value}" for name, value in machine.versions().items()]
    lines.append(f"commit {commit or 'unknown'}{' with changes' if dirty else ''}, sources {gpu_record.digest()}")
    return "\n".join(lines)
