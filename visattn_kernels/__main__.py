"""`python -m visattn_kernels` is the command `visattn`, except that Python imports the package first, and so torch."""

from __future__ import annotations

from visattn_cli import main

if __name__ == "__main__":
    main()
