"""The attention layers of the papers, each a short module over `visattn_kernels.attention`.

Maps are `[B, C, H, W]`, in and out, in either memory format.
"""

from visattn_kernels.nn.attention_mask import MultiHeadAttentionMask, SpatialAttentionMask, diversity_loss, masked_pool
from visattn_kernels.nn.ccnet import CrissCrossAttention
from visattn_kernels.nn.danet import DANetChannelAttention, DANetPositionAttention
from visattn_kernels.nn.nonlocal_block import NonLocalBlock
from visattn_kernels.nn.ocnet import BaseOC, OCNetBlock, PyramidOC
from visattn_kernels.nn.sagan import SAGANAttention, WeightlessSelfAttention
from visattn_kernels.nn.squeeze_excite import SqueezeExcite
from visattn_kernels.nn.vae import VAEAttention

__all__ = [
    "BaseOC",
    "CrissCrossAttention",
    "DANetChannelAttention",
    "DANetPositionAttention",
    "MultiHeadAttentionMask",
    "NonLocalBlock",
    "OCNetBlock",
    "PyramidOC",
    "SAGANAttention",
    "SpatialAttentionMask",
    "SqueezeExcite",
    "VAEAttention",
    "WeightlessSelfAttention",
    "diversity_loss",
    "masked_pool",
]
