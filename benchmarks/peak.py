"""Peak memory of one pass, above its inputs.

On a CPU each measurement has a process of its own. There the provider runs once before, on a tiny problem if that will
do, so that libraries are loaded, threads are made and tables of indices are there; then the inputs are made, the peak
is reset, and the pass runs once. What the allocator holds free is given back before, so that the pass cannot hide.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import multiprocessing
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from benchmarks.cases import Case, Pass, make_inputs
from benchmarks.providers import Bench, Provider
from visattn_kernels.patterns import Global, Size

_STATUS = Path("/proc/self/status")
_TINY = Size(16, 16)


def peak_bytes(provider: Provider, case: Case, which: Pass, threads: int) -> int:
    """Bytes above the inputs at the highest point of a pass; a backward is counted with its forward.

    Raises:
        RuntimeError: the measurement failed, for want of memory say.
    """
    if case.device == "cuda":
        return _peak_cuda(provider, case, which)
    # Spawned, not forked: a fork inherits this process's heap, and a pool of threads without its threads.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_peak_cpu, provider, case, which, threads).result()
    except BrokenProcessPool as error:
        raise RuntimeError("the measuring process was killed: not enough memory?") from error


def _peak_cuda(provider: Provider, case: Case, which: Pass) -> int:
    bench = Bench(provider, case, which, make_inputs(case))
    bench.once()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    bench.once()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _peak_cpu(provider: Provider, case: Case, which: Pass, threads: int) -> int:
    """Runs in the child."""
    torch.set_num_threads(threads)
    inputs = make_inputs(case)
    if provider.slow_start:
        Bench(provider, case, which, inputs).once()  # what it compiles is for this shape alone
    else:
        small = _tiny(case)
        Bench(provider, small, which, make_inputs(small)).once()
    bench = Bench(provider, case, which, inputs)
    del inputs
    return peak_of(bench.once)


def peak_of(call: Callable[[], object]) -> int:
    """Bytes of resident memory above what is there before, at the highest point of a call.

    What the process held at its highest before may hide some of it: to be called in a process of its own.
    """
    gc.collect()
    _give_back()
    before, highest_yet = _status("VmRSS"), _maxrss()
    resets = _reset_peak()
    watch = _Watch()
    with watch:
        call()
    if resets:
        return max(0, _status("VmHWM") - before)
    return max(0, (_maxrss() if _maxrss() > highest_yet else watch.highest) - before)


def _tiny(case: Case) -> Case:
    """The same case on small grids. Tables and indices are made for a size: a case that has any stays itself."""
    w = case.workload
    if w.terms or not isinstance(w.pattern, Global):
        return case
    pooled = w.queries != w.keys
    small = dataclasses.replace(
        w, queries=_TINY, keys=Size(8, 8) if pooled else _TINY, cpu_batch=1, gpu_batch=1, picture=False
    )
    return dataclasses.replace(case, workload=small)


class _Watch:
    """Samples the resident memory while it is open, for kernels that cannot reset their peak."""

    def __init__(self) -> None:
        self.highest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.002):
            self.highest = max(self.highest, _status("VmRSS"))


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes; 0 where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _reset_peak() -> bool:
    """Set the peak of the resident memory back to its present size; whether the kernel did it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _maxrss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _give_back() -> None:
    """Make the allocator give its free memory back, where it is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
