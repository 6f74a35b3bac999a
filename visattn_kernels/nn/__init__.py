"""The attention layers of the papers, each a short module over `visattn_kernels.attention`.

Maps are `[B, C, H, W]`, in and out, in either memory format.
"""

from visattn_kernels.nn.axial import AxialAttention, AxialBlock
from visattn_kernels.nn.sagan import SAGANAttention, WeightlessSelfAttention

__all__ = ["AxialAttention", "AxialBlock", "SAGANAttention", "WeightlessSelfAttention"]
