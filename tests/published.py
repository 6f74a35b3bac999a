"""The libraries whose modules ours are compared with; a test that needs one is skipped where it is not installed."""

from __future__ import annotations

import importlib
import warnings

import pytest

from examples.swap_in import declare_torchvision

WHY = "compares with {}, which is not installed; `make published` installs it"


def published(module: str, *names: str):
    """The things of these names in a module of a library, or a skip."""
    library = module.partition(".")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library in ("timm", "torchvision", "transformers"):
            declare_torchvision()
        pytest.importorskip(library, reason=WHY.format(library))
        found = importlib.import_module(module)
    return getattr(found, names[0]) if len(names) == 1 else [getattr(found, name) for name in names]
