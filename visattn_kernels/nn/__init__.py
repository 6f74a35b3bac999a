"""The attention layers of the papers, each a short module over `visattn_kernels.attention`.

Maps are `[B, C, H, W]`, in and out, in either memory format.
"""

from visattn_kernels.nn.attention_mask import MultiHeadAttentionMask, SpatialAttentionMask, diversity_loss, masked_pool
from visattn_kernels.nn.axial import AxialAttention, AxialBlock
from visattn_kernels.nn.ccnet import CrissCrossAttention
from visattn_kernels.nn.danet import DANetChannelAttention, DANetPositionAttention
from visattn_kernels.nn.local_relation import LocalRelation
from visattn_kernels.nn.maxvit import GridAttention
from visattn_kernels.nn.nat import NeighborhoodAttention
from visattn_kernels.nn.nonlocal_block import NonLocalBlock
from visattn_kernels.nn.ocnet import BaseOC, OCNetBlock, PyramidOC
from visattn_kernels.nn.sagan import SAGANAttention, WeightlessSelfAttention
from visattn_kernels.nn.sasa import StandAloneSelfAttention
from visattn_kernels.nn.squeeze_excite import SqueezeExcite
from visattn_kernels.nn.swin import SwinBlock, WindowAttention
from visattn_kernels.nn.vae import VAEAttention
from visattn_kernels.nn.vitdet import ViTDetAttention

__all__ = [
    "AxialAttention",
    "AxialBlock",
    "BaseOC",
    "CrissCrossAttention",
    "DANetChannelAttention",
    "DANetPositionAttention",
    "GridAttention",
    "LocalRelation",
    "MultiHeadAttentionMask",
    "NeighborhoodAttention",
    "NonLocalBlock",
    "OCNetBlock",
    "PyramidOC",
    "SAGANAttention",
    "SpatialAttentionMask",
    "SqueezeExcite",
    "StandAloneSelfAttention",
    "SwinBlock",
    "VAEAttention",
    "ViTDetAttention",
    "WeightlessSelfAttention",
    "WindowAttention",
    "diversity_loss",
    "masked_pool",
]
