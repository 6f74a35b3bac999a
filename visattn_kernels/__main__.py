"""`python -m visattn_kernels` is the command `visattn`."""

from __future__ import annotations

from visattn_kernels.cli import main

if __name__ == "__main__":
    main()
