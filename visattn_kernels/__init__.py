"""Memory-efficient attention for two-dimensional feature maps."""

from visattn_kernels.attention import (
    attention,
    attention_map,
    attention_received,
    channels_first,
    explain,
    heads_last,
    merge,
)
from visattn_kernels.patterns import Global
from visattn_kernels.version import __version__

__all__ = [
    "Global",
    "__version__",
    "attention",
    "attention_map",
    "attention_received",
    "channels_first",
    "explain",
    "heads_last",
    "merge",
]
