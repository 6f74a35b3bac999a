"""The attention layers of the papers, each a short module over `visattn_kernels.attention`.

Maps are `[B, C, H, W]`, in and out, in either memory format.
"""

from visattn_kernels.nn.axial import AxialAttention, AxialBlock
from visattn_kernels.nn.local_relation import LocalRelation
from visattn_kernels.nn.maxvit import GridAttention
from visattn_kernels.nn.nat import NeighborhoodAttention
from visattn_kernels.nn.sagan import SAGANAttention, WeightlessSelfAttention
from visattn_kernels.nn.sasa import StandAloneSelfAttention
from visattn_kernels.nn.swin import SwinBlock, WindowAttention
from visattn_kernels.nn.vitdet import ViTDetAttention

__all__ = [
    "AxialAttention",
    "AxialBlock",
    "GridAttention",
    "LocalRelation",
    "NeighborhoodAttention",
    "SAGANAttention",
    "StandAloneSelfAttention",
    "SwinBlock",
    "ViTDetAttention",
    "WeightlessSelfAttention",
    "WindowAttention",
]
