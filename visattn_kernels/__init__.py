"""Memory-efficient attention for two-dimensional feature maps."""

from visattn_kernels import flops as _flops
from visattn_kernels.attention import (
    attention,
    attention_map,
    attention_received,
    channels_first,
    explain,
    heads_last,
    merge,
)
from visattn_kernels.patterns import Column, CrissCross, Global, Grid, Neighborhood, Row, Window
from visattn_kernels.terms import KeyBias, RelativeBias, RelativeKey, RelativeQuery, RelativeValue
from visattn_kernels.version import __version__

__all__ = [
    "Column",
    "CrissCross",
    "Global",
    "Grid",
    "KeyBias",
    "Neighborhood",
    "RelativeBias",
    "RelativeKey",
    "RelativeQuery",
    "RelativeValue",
    "Row",
    "Window",
    "__version__",
    "attention",
    "attention_map",
    "attention_received",
    "channels_first",
    "explain",
    "heads_last",
    "merge",
]

_flops.register()
