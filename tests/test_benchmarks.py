"""The benchmark measures what it says, refuses what is wrong, and leaves whole files behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import ceilings, compare, measure, plot, providers, runner, table, verify, workloads
from benchmarks.cases import PASSES, Case, from_layout, make_inputs, to_layout
from benchmarks.cli import app
from benchmarks.machine import ROOT
from benchmarks.peak import peak_bytes
from benchmarks.results import Cell, Entry, Report, load
from benchmarks.workloads import TermSpec, Workload
from visattn_kernels.backends import cpu
from visattn_kernels.patterns import Size
from visattn_kernels.terms import RelativeBias

TINY = Workload("tiny", "for tests", Size(5, 7), Size(3, 4), 2, 4, 6, gpu_batch=1, cpu_batch=2)
FAST = measure.Budget(0.0, 2, 2)
LIMITS = ceilings.Ceilings({"float32": 4e11, "bfloat16": 8e11}, 5e10, 2e10, {})
NAIVE = providers.find("naive")

needs_engine = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes seconds."""
    monkeypatch.setattr(ceilings, "measure", lambda device, threads: LIMITS)


def wrong_by(factor: float, leak: float = 0.0) -> providers.Provider:
    """The naive provider, with out wrong by a factor and its gradient by another."""

    def run(case, q, k, v, terms):
        out = NAIVE.run(case, q, k, v, terms) * factor
        return out + leak * (v.sum() - v.sum().detach())

    return replace(NAIVE, name="wrong", run=run)


def plan(**changes) -> runner.Plan:
    basic = runner.Plan([TINY], [NAIVE, providers.find("sdpa")], budget=FAST, memory=False, threads=1)
    return replace(basic, **changes)


# The run, end to end.


def test_run_measures_every_cell(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    everyone = [NAIVE, *(providers.find(name) for name in ("sdpa", "sdpa-padded", "sdpa-flash", "visattn-cpu"))]
    before = torch.get_num_threads()
    report = runner.run(plan(providers=everyone, out=out))
    assert torch.get_num_threads() == before
    assert report.complete
    assert [cell.key for cell in report.cells] == [
        ("tiny", dtype, which) for dtype in ("float32", "bfloat16") for which in PASSES
    ]
    for cell in report.cells:
        for name in ("naive", "sdpa", "sdpa-padded"):
            entry = cell.entry(name)
            assert (entry.status, entry.reason, len(entry.samples)) == ("measured", "", 2)
            assert set(entry.checks) == ({"out"} if cell.which == "forward" else {"out", "q", "k", "v"})
        flash = cell.entry("sdpa-flash")
        assert (flash.status, flash.reason, flash.samples) == ("absent", "only on cuda", [])
        assert cell.best_peer.name in ("naive", "sdpa", "sdpa-padded")
        if not cpu.unavailable():
            assert cell.ours.name == "visattn-cpu"
            assert cell.ratio(cell.ours) == cell.best_peer.times.median / cell.ours.times.median


def test_results_file(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    report = runner.run(plan(out=out, dtypes=["float32"], passes=["both"]))
    plain = json.loads(out.read_text())
    assert {"schema", "commit", "dirty", "sources", "threads", "started", "finished", "complete"} <= set(plain)
    assert {"cpu", "cores", "flags", "memory_bytes", "gpu"} <= set(plain["hardware"])
    assert {"python", "torch", "visattn_kernels", "triton"} <= set(plain["versions"])
    assert plain["ceilings"] == LIMITS.plain()
    (cell,) = plain["cells"]
    assert cell["about"]["pattern"] == "Global()"
    derived = cell["entries"][0]["derived"]
    assert derived["p20"] <= derived["median"] <= derived["p80"]
    assert derived["flops_per_second"] == pytest.approx(cell["flops"] / derived["median"])
    assert derived["share_of_floor"] == pytest.approx(cell["floor"] / derived["median"])
    assert load(out) == report
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("text", "message"), [("{}", "no results file"), ("[", "no results file"), ('{"schema": 99}', "schema 99")]
)
def test_other_files_are_no_results(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(path)


class Interrupt(runner.Listener):
    """Ctrl-C after a number of cells."""

    def __init__(self, after: int) -> None:
        self.after, self.seen = after, 0

    def cell(self, case, which) -> None:
        if self.seen == self.after:
            raise KeyboardInterrupt
        self.seen += 1


def test_interrupted_then_resumed(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    todo = plan(out=out, dtypes=["float32"])
    with pytest.raises(KeyboardInterrupt):
        runner.run(todo, Interrupt(after=2))
    first = load(out)
    assert not first.complete
    assert [cell.which for cell in first.cells] == ["forward", "backward"]
    rest = Interrupt(after=9)
    second = runner.run(replace(todo, resume=True), rest)
    assert rest.seen == 1
    assert second.complete
    assert second.cells[:2] == first.cells
    assert [cell.which for cell in second.cells] == list(PASSES)


def test_a_new_provider_is_measured_with_all_on_resume(tmp_path: Path) -> None:
    todo = plan(out=tmp_path / "tiny.json", dtypes=["float32"], passes=["forward"], resume=True)
    runner.run(todo)
    report = runner.run(replace(todo, providers=[*todo.providers, providers.find("sdpa-padded")]))
    (cell,) = report.cells
    assert [entry.name for entry in cell.entries] == ["naive", "sdpa", "sdpa-padded"]


def test_nothing_is_resumed_across_settings_or_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = plan(out=tmp_path / "tiny.json", dtypes=["float32"], passes=["forward"], resume=True)
    runner.run(todo)
    with pytest.raises(ValueError, match="its threads is 1, now 2"):
        runner.run(replace(todo, threads=2))
    monkeypatch.setattr(runner.machine, "sources", lambda: "changed")
    with pytest.raises(ValueError, match="its sources"):
        runner.run(todo)


# Verification.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_right_answer_passes(dtype: str) -> None:
    case = Case(TINY, dtype, "cpu")
    inputs = make_inputs(case)
    bench = providers.Bench(NAIVE, case, "both", inputs)
    assert verify.verdict(verify.Truth(case, inputs).verify(bench.results())) == []


@pytest.mark.parametrize(
    ("provider", "which", "said"),
    [
        (wrong_by(1.1), "forward", "out: "),
        (wrong_by(1.0, leak=0.5), "both", "gradient of v: "),
        (wrong_by(float("nan")), "forward", "NaN"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_provider_is_refused(provider: providers.Provider, which, said: str, dtype: str) -> None:
    """Timed, but in no ratio, however fast."""
    report = runner.run(plan(providers=[NAIVE, provider], dtypes=[dtype], passes=[which]))
    (cell,) = report.cells
    entry = cell.entry("wrong")
    assert entry.status == "refused"
    assert said in entry.reason
    assert len(entry.samples) == 2
    entry.samples = [1e-12]
    assert cell.best_peer.name == "naive"
    assert "wrong is refused by the tolerance policy" in table.compact(report)


def test_a_wrong_batch_or_key_is_seen() -> None:
    """A provider that is right in its first map alone, or leaves out its last key."""
    case = Case(TINY, "float32", "cpu")
    inputs = make_inputs(case)
    truth = verify.Truth(case, inputs)
    right = providers.Bench(NAIVE, case, "both", inputs).results()
    out = right["out"].clone()
    out[-1] = out[0]
    assert verify.verdict(truth.verify({**right, "out": out}))
    grad = right["k"].clone()
    grad[-1, -1, -1] = 0
    assert verify.verdict(truth.verify({**right, "k": grad}))


def test_the_sampled_truth_is_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, and against autograd."""
    monkeypatch.setitem(verify._CHUNK, "cpu", 50)
    case = Case(TINY, "float64", "cpu")
    inputs = make_inputs(case)
    truth = verify.Truth(case, inputs)
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = (x[-1].flatten(0, 1).transpose(0, 1) for x in leaves)  # [heads, N, width]
    out = torch.softmax(q @ k.mT * TINY.factor, -1) @ v
    grads = torch.autograd.grad(out, leaves, inputs.grad[-1].flatten(0, 1).transpose(0, 1))
    for sample in (truth._exact(True)[0], truth._eager(True)):
        torch.testing.assert_close(sample["out"], out.detach()[:, truth.queries], rtol=1e-10, atol=1e-12)
        for name, grad, index in zip("qkv", grads, (truth.queries, truth.keys, truth.keys), strict=True):
            dense = grad[-1].flatten(0, 1).transpose(0, 1)[:, index]
            torch.testing.assert_close(sample[name], dense, rtol=1e-10, atol=1e-12)


# Providers and workloads.


def test_a_map_that_does_not_fit_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(workloads.find("image-320x213"), "float32", "cpu")
    assert providers.dense_bytes(case, "forward") == pytest.approx(37.2e9, rel=1e-2)
    monkeypatch.setattr(providers, "free_memory", lambda device: 24 * 10**9)
    assert "needs 37.2 GB to store the map; 24.0 GB are free" in NAIVE.reasons(case, "forward")
    assert providers.find("sdpa").reasons(case, "forward") == []
    monkeypatch.setattr(providers, "free_memory", lambda device: 70 * 10**9)
    assert NAIVE.reasons(case, "forward") == []
    assert NAIVE.reasons(case, "both") != []


def test_a_term_without_code_is_a_reason() -> None:
    """A peer never computes something near it instead."""
    term = TermSpec(RelativeBias, ("table",))
    report = runner.run(plan(workloads=[replace(TINY, terms=(term,))], dtypes=["float32"], passes=["forward"]))
    assert all(entry.status == "absent" for entry in report.cells[0].entries)
    assert "has no code for RelativeBias" in report.cells[0].entry("naive").reason


def test_what_a_provider_raises_is_its_reason() -> None:
    def run(case, q, k, v, terms):
        raise NotImplementedError("not today\nnor tomorrow")

    report = runner.run(plan(providers=[replace(NAIVE, run=run)], dtypes=["float32"], passes=["forward"]))
    entry = report.cells[0].entries[0]
    assert (entry.status, entry.reason) == ("absent", "raised NotImplementedError: not today")


def test_our_backends_come_from_the_registry() -> None:
    names = {provider.name for provider in providers.PROVIDERS if provider.ours}
    assert "visattn-cpu" in names
    assert "visattn-reference" not in names


@pytest.mark.parametrize("name", ["naive", "sdpa", "sdpa-padded"])
def test_peers_agree_with_each_other(name: str) -> None:
    case = Case(replace(TINY, scale=0.7), "float64", "cpu")
    inputs = make_inputs(case)
    results = [providers.Bench(providers.find(one), case, "both", inputs).results() for one in ("naive", name)]
    for key, expected in results[0].items():
        torch.testing.assert_close(results[1][key], expected)


def test_layouts_are_inverses() -> None:
    x = torch.randn(2, 3, 5, 4, 6).transpose(1, 2)
    for layout in ("maps", "tokens"):
        y = to_layout(x, layout)
        assert y.is_contiguous()
        assert y.data_ptr() != x.data_ptr()
        assert torch.equal(from_layout(y, layout, x.shape[1:3]), x)


def test_names_are_unique() -> None:
    for rows in (workloads.WORKLOADS, providers.PROVIDERS):
        assert len({row.name for row in rows}) == len(rows)
    with pytest.raises(KeyError, match="sagan-64"):
        workloads.find("nothing")
    with pytest.raises(KeyError, match="sdpa"):
        providers.find("nothing")


def test_logits_have_unit_variance() -> None:
    for name in ("sagan-64-wide", "global-d8"):
        workload = workloads.find(name)
        inputs = make_inputs(Case(workload, "float32", "cpu"))
        logits = inputs.q[0, :8].flatten(0, 2) @ inputs.k[0].flatten(0, 2).T * workload.factor
        assert 0.9 < float(logits.std()) < 1.1


def test_the_picture() -> None:
    inputs = make_inputs(Case(workloads.find("image-320x213"), "float32", "cpu"))
    assert inputs.q.shape == (1, 213, 320, 1, 3)
    assert torch.equal(inputs.q, inputs.v)
    assert 0 <= float(inputs.q.min()) < 0.1 < 0.9 < float(inputs.q.max()) <= 1


# Measuring.


def test_turns_are_spread_evenly() -> None:
    turns = list(measure.turns([8, 2, 4]))
    assert [turns.count(i) for i in range(3)] == [8, 2, 4]
    assert turns[: len(turns) // 2].count(1) == 1
    assert turns[: len(turns) // 2].count(2) == 2
    assert list(measure.turns([])) == []


def test_budget() -> None:
    budget = measure.Budget(seconds=2, least=5, most=200, patience=60)
    assert [budget.repeats(call) for call in (1e-6, 0.02, 1.0, 30.0, 500.0)] == [200, 100, 5, 2, 1]


def test_summary() -> None:
    assert measure.summary([3.0]) == measure.Summary(3, 3, 3)
    assert measure.summary([5.0, 1.0, 2.0, 4.0, 3.0, 0.0]) == measure.Summary(2.5, 1, 4)


def test_a_backward_is_timed_without_its_forward() -> None:
    seen = []

    class Bench(providers.Bench):
        def forward(self):
            seen.append(("forward", clock.reads))
            return super().forward()

        def backward(self, out):
            seen.append(("backward", clock.reads))
            return super().backward(out)

    class Clock:
        reads = 0

        def perf_counter(self) -> float:
            self.reads += 1
            return float(self.reads)

    clock = Clock()
    case = Case(TINY, "float32", "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "time", clock)
        measure.sample(Bench(NAIVE, case, "backward", make_inputs(case)))
    assert seen == [("forward", 0), ("backward", 1)]


def test_floors_are_those_of_the_performance_page() -> None:
    """sagan-64-wide, B 64: memory 24, products 109, exp 72 microseconds on one H200."""
    limits = ceilings.Ceilings(ceilings.H200_FLOPS, ceilings.H200_BYTES, ceilings.H200_EXPS, {})
    case = Case(workloads.find("sagan-64-wide"), "bfloat16", "cuda")
    cost, floor = case.cost("forward"), limits.floor(case, "forward")
    assert cost.bytes / limits.bytes == pytest.approx(24e-6, rel=0.03)
    assert cost.exps / limits.exps == pytest.approx(72e-6, rel=0.03)
    assert (floor.seconds, floor.binds) == (pytest.approx(109e-6, rel=0.01), "arithmetic")
    assert limits.floor(Case(workloads.find("sagan-64"), "bfloat16", "cuda"), "forward").binds == "exp"
    both, backward = limits.floor(case, "both").seconds, limits.floor(case, "backward").seconds
    assert both == pytest.approx(floor.seconds + backward)


def test_peak_memory_of_a_stored_map() -> None:
    """Two copies of a 32x64x64x64 map in float32: 2 * 33.6 MB. SDPA keeps none."""
    case = Case(
        replace(TINY, queries=Size(32, 64), keys=Size(64, 64), heads=1, value_dim=4, cpu_batch=1), "float32", "cpu"
    )
    naive = peak_bytes(NAIVE, case, "forward", threads=2)
    assert 60e6 < naive < 85e6
    assert peak_bytes(providers.find("sdpa"), case, "forward", threads=2) < 20e6


# Documents.


def report_of(tmp_path: Path, ours: float = 1e-3, peer: float = 4e-3) -> Path:
    """A results file with one cell."""
    entries = [
        Entry("naive", False, "measured", samples=[9e-3], peak_bytes=5 * 10**6),
        Entry("sdpa", False, "measured", samples=[peer] * 3, peak_bytes=2 * 10**6),
        Entry("flex", False, "absent", "no backward | here"),
        Entry("visattn-cpu", True, "measured", samples=[ours] * 3, peak_bytes=10**6),
    ]
    cell = Cell("tiny", "float32", "both", 1, 1, {}, 1e9, 1e6, 1e6, ours / 2, "exp", entries)
    report = Report("tiny", "cpu", 2, "2026-01-02T03:04:05+00:00", complete=True, versions={"torch": "2"}, cells=[cell])
    path = tmp_path / "tiny.json"
    report.save(path)
    return path


def test_tables(tmp_path: Path) -> None:
    report = load(report_of(tmp_path))
    row = "| `tiny` | fp32 | fwd + bwd | 1.00 | 4.00 sdpa | **4.00×** | 9.00 | 1.00 / 2.00 | 50% exp |"
    assert row in table.compact(report).splitlines()
    everything = table.everything(report)
    assert "Absent throughout: flex (no backward | here)." in everything
    other = replace(report.cells[0], which="forward", entries=[Entry("flex", False, "measured", samples=[1e-3])])
    everything = table.everything(replace(report, cells=[*report.cells, other]))
    assert "| flex | – | – | – | – | – | – | – | absent: no backward \\| here |" in everything
    widths = {line.replace("\\|", "").count("|") for line in everything.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_a_faster_peer_that_is_refused_is_told(tmp_path: Path) -> None:
    report = load(report_of(tmp_path))
    sdpa = report.cells[0].entry("sdpa")
    sdpa.status, sdpa.reason = "refused", "out: largest error"
    text = table.compact(report)
    assert "9.00 naive | **9.00×** <sup>1</sup>" in text
    assert "sdpa is refused by the tolerance policy (out: largest error); it took 4.00 ms, 4.00 times ours." in text


def test_a_block_of_one_dtype_has_no_other(tmp_path: Path) -> None:
    report = load(report_of(tmp_path))
    row = f"| `{report.cells[0].workload}` |"
    assert {cell.dtype for cell in report.cells} == {"float32"}
    assert table.render("tiny:float32", lambda name: report) == table.compact(report)
    assert row in table.compact(report)
    assert row not in table.render("tiny:bfloat16", lambda name: report)


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, " ".join(result.output.split())


def test_documents_are_updated_and_checked(tmp_path: Path) -> None:
    results, page = report_of(tmp_path), tmp_path / "page.md"
    blocks = [f"<!-- benchmarks:{name} -->\nold\n<!-- /benchmarks:{name} -->\n" for name in ("tiny", "tiny:all")]
    page.write_text("a\n" + "b\n".join(blocks))
    command = ("table", "--results", results, "--update", page)
    assert invoke(*command, "--check")[0] == 2
    assert "old" in page.read_text()
    assert invoke(*command)[0] == 0
    text = page.read_text()
    assert text.startswith("a\n<!-- benchmarks:tiny -->\n")
    assert "**4.00×**" in text
    assert "Absent throughout: flex" in text
    assert "old" not in text
    assert invoke(*command, "--check")[0] == 0
    report_of(tmp_path, ours=2e-3)
    code, output = invoke(*command, "--check")
    assert code == 2
    assert "out of date" in output
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "there is no <!-- benchmarks:NAME -->"),
        ("<!-- benchmarks:tiny -->\n", "is not closed"),
        ("<!-- benchmarks:gone -->\n<!-- /benchmarks:gone -->", "there are no results"),
        ("<!-- benchmarks:tiny:int8 -->\n<!-- /benchmarks:tiny:int8 -->", "must end in :all or a dtype"),
    ],
)
def test_documents_that_cannot_be_updated(tmp_path: Path, text: str, message: str) -> None:
    results, page = report_of(tmp_path), tmp_path / "page.md"
    page.write_text(text)
    code, output = invoke("table", "--results", results, "--update", page)
    assert code == 2
    assert message in output
    assert page.read_text() == text


def test_plot(tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    plot.draw(load(report_of(tmp_path)), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    empty = replace(load(report_of(tmp_path)), cells=[])
    with pytest.raises(ValueError, match="has no cell"):
        plot.draw(empty, tmp_path / "y.png")
    assert not (tmp_path / "y.png").exists()


# The command line.


@pytest.fixture
def tiny_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "WORKLOADS", (TINY,))


@pytest.mark.usefixtures("tiny_table")
def test_command_run(tmp_path: Path) -> None:
    out = tmp_path / "new" / "x.json"
    arguments = ("--provider", "naive,sdpa", "--pass", "forward", "--dtype", "float32", "--repeats", 3, "--no-memory")
    code, output = invoke("run", *arguments, "--out", out)
    assert code == 0
    assert "tiny float32 forward" in output
    (cell,) = load(out).cells
    assert [len(entry.samples) for entry in cell.entries] == [3, 3]


@pytest.mark.usefixtures("tiny_table")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workload", "nothing"), "there is no workload 'nothing'; there are tiny"),
        (("--provider", "nothing"), "there is no provider 'nothing'"),
        (("--pass", "sideways"), "there is no pass 'sideways'"),
        (("--dtype", "int8"), "there is no dtype 'int8'"),
        (("--device", "abacus"), "--device must be cpu or cuda"),
        (("--quick", "--resume"), "--resume needs --out"),
        (("--workload", "tiny", "--out", "/dev/null/x.json"), "cannot write"),
    ],
)
def test_command_run_says_what_is_wrong(arguments: tuple[str, ...], message: str) -> None:
    code, output = invoke("run", *arguments)
    assert code == 2
    assert message in output


def test_command_list() -> None:
    code, output = invoke("list")
    assert code == 0
    assert all(one.name in output for one in (*workloads.WORKLOADS, *providers.PROVIDERS))
    code, output = invoke("list", "--workload", "sagan-64")
    assert code == 0
    assert "only on cuda" in output


@needs_engine
def test_one_side_of_compare() -> None:
    task = compare.Task(("global-d8",), ("forward", "both"), ("float32",), budget=FAST, rounds=1)
    times = compare._time(ROOT, task)
    assert {key: len(samples) for key, samples in times.items()} == {
        "global-d8 float32 forward": 2,
        "global-d8 float32 both": 2,
    }


def test_compare_with_no_revision() -> None:
    task = compare.Task(("global-d8",), ("forward",), ("float32",))
    say: Callable[[str], None] = lambda text: None
    with pytest.raises(RuntimeError, match="no-such-revision"):
        compare.compare("no-such-revision", task, say)
