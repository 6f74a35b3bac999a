"""What compute-sanitizer is shown: `compute-sanitizer --tool memcheck python -m gpu.sanitized`, from `make gpu`.

Every kernel in every dtype on small problems, each backend forced by name, results held to the policy too. Nothing is
poisoned: a poisoned tensor is an initialised one, and initcheck would have nothing to find.
"""

from __future__ import annotations

import sys

import torch

from gpu.common import BACKENDS, SMALL, run_small

DONE = "sanitized:"
"""What the last line begins with, if all of it ran."""


def main() -> None:
    if not BACKENDS:
        sys.exit("no backend for GPUs is available")
    for backend in BACKENDS:
        for case in SMALL:
            run_small(case, backend)
    torch.cuda.synchronize()
    print(f"{DONE} {len(BACKENDS) * len(SMALL)} problems, {', '.join(BACKENDS)}", flush=True)


if __name__ == "__main__":
    main()
