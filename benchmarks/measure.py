"""Time several providers fairly: turn by turn, so that a slow minute of a shared machine falls on all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.providers import Bench

WARM_CALL = 0.02
"""Calls shorter than this many seconds are preceded by an untimed one, which refills the caches after a change."""

_SPIN_CYCLES = 10_000_000

_SPIN_SECONDS = 0.006
"""How long that takes, about, with what comes before: part of each sample's time, though not of the sample."""

_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Attributes:
        seconds: per provider and cell, if the counts allow it.
        least, most: samples.
        patience: seconds after which a very slow provider has fewer than the least samples, though one.
    """

    seconds: float = 2.0
    least: int = 5
    most: int = 200
    patience: float = 60.0

    def repeats(self, call: float) -> int:
        """Samples for a call of so many seconds."""
        call = max(call, 1e-9)
        least = int(min(self.least, max(1, self.patience / call)))
        return max(least, min(self.most, int(self.seconds / call)))


def sample(bench: Bench) -> float:
    """Seconds of one pass. A backward's forward is done before, untimed."""
    return _sample_cuda(bench) if bench.case.device == "cuda" else _sample_cpu(bench)


def _sample_cpu(bench: Bench) -> float:
    out = bench.forward() if bench.which == "backward" else None
    start = time.perf_counter()
    if out is None:
        out = bench.forward()
    kept = bench.backward(out) if bench.which != "forward" else out
    seconds = time.perf_counter() - start
    del kept  # freed after the clock is read
    return seconds


def _sample_cuda(bench: Bench) -> float:
    """Time on the device: the launches hide behind a spin, and the L2 cache starts cold, as between layers."""
    out = bench.forward() if bench.which == "backward" else None
    torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
    start, end = torch.Event("cuda", enable_timing=True), torch.Event("cuda", enable_timing=True)
    torch.cuda._sleep(_SPIN_CYCLES)  # type: ignore[no-untyped-call]
    start.record()
    if out is None:
        out = bench.forward()
    kept = bench.backward(out) if bench.which != "forward" else out
    end.record()
    torch.cuda.synchronize()
    del kept
    return float(start.elapsed_time(end)) / 1e3


def warm_up(bench: Bench) -> float:
    """Run a pass until its time settles; seconds of one pass.

    The first call loads code, makes threads and compiles; a long one is not repeated for that.
    """
    start = time.perf_counter()
    bench.once()
    first = time.perf_counter() - start
    if first > 5:
        return first
    second = sample(bench)
    return second if second > 1 else min(second, sample(bench))


def turns(counts: list[int]) -> Iterator[int]:
    """Whose turn it is: index i comes `counts[i]` times, spread evenly over the whole."""
    rounds = max(counts, default=0)
    for turn in range(rounds):
        for i, count in enumerate(counts):
            if (turn + 1) * count // rounds > turn * count // rounds:
                yield i


def interleave(
    benches: list[Bench], budget: Budget, calls: list[float], progress: Callable[[int, int], None] | None = None
) -> list[list[float]]:
    """Samples of every bench, in seconds.

    Args:
        benches: warmed up.
        budget: how long.
        calls: seconds of one call of each.
        progress: told the samples done and the samples to do.
    """
    counts = [
        budget.repeats(call + (_SPIN_SECONDS if bench.case.device == "cuda" else 0.0))
        for bench, call in zip(benches, calls, strict=True)
    ]
    samples: list[list[float]] = [[] for _ in benches]
    for done, i in enumerate(turns(counts)):
        if calls[i] < WARM_CALL:
            benches[i].once()
        samples[i].append(sample(benches[i]))
        if progress:
            progress(done + 1, sum(counts))
    return samples


@dataclass(frozen=True)
class Summary:
    """Median and the 20th and 80th percentile of some samples."""

    median: float
    p20: float
    p80: float


def summary(samples: list[float]) -> Summary:
    """Summarise at least one sample."""
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0])
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return Summary(statistics.median(samples), p20, p80)
