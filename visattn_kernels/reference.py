"""The truth that every kernel is held to: dense attention in pure torch.

It stores the whole map, runs in any dtype on any device, and is differentiable any number of times. It sees only
patterns and terms, so that no mistake of a kernel can be in it too.
"""

from __future__ import annotations

import torch

from visattn_kernels.patterns import Grid, Pattern


def logits(q: torch.Tensor, k: torch.Tensor, pattern: Pattern, *, scale: float) -> torch.Tensor:
    """The scores of every query with every key, `[B, heads, H, W, Hk, Wk]`, -inf outside the pattern.

    Args:
        q (Tensor[B, H, W, heads, D]): queries.
        k (Tensor[B, Hk, Wk, kv_heads, D]): keys.
        pattern: which keys a query sees.
        scale: factor of q·k.
    """
    group = q.shape[3] // k.shape[3]
    k = k.repeat_interleave(group, dim=3)  # [B, Hk, Wk, heads, D]
    scores = torch.einsum("byxhd,bvuhd->bhyxvu", q, k) * scale
    mask = pattern.mask(Grid(q.shape[1], q.shape[2]), Grid(k.shape[1], k.shape[2]), q.device)
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def weights(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the keys and its log-sum-exp; a query with no key has weights 0 and lse -inf.

    Args:
        scores (Tensor[B, heads, H, W, Hk, Wk]): logits.

    Returns:
        The map, shaped like `scores`, and lse (Tensor[B, heads, H, W]).
    """
    # A query with no key is computed with scores of 0 and masked after, so that its gradient is 0 and not NaN.
    empty = (scores == -torch.inf).flatten(-2).all(-1)
    scores = scores.masked_fill(empty[..., None, None], 0)
    lse = scores.flatten(-2).logsumexp(-1)
    weights = torch.exp(scores - lse[..., None, None]).masked_fill(empty[..., None, None], 0)
    return weights, lse.masked_fill(empty, -torch.inf)


def formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with every operation in the dtype of its inputs; see `attention` for the arguments."""
    probabilities, lse = weights(logits(q, k, pattern, scale=scale))
    v = v.repeat_interleave(q.shape[3] // v.shape[3], dim=3)
    out = torch.einsum("bhyxvu,bvuhd->byxhd", probabilities, v)
    return out, lse.permute(0, 2, 3, 1)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention; 16-bit inputs are computed in float32.

    Args:
        q (Tensor[B, H, W, heads, D]): queries.
        k (Tensor[B, Hk, Wk, kv_heads, D]): keys.
        v (Tensor[B, Hk, Wk, kv_heads, Dv]): values.
        pattern: which keys a query sees.
        scale: factor of q·k.

    Returns:
        out (Tensor[B, H, W, heads, Dv]), dtype of q, and lse (Tensor[B, H, W, heads]), float32 or float64.

    Memory:
        `B * heads * H*W * Hk*Wk` elements, several times.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = formula(q.to(dtype), k.to(dtype), v.to(dtype), pattern, scale=scale)
    return out.to(q.dtype), lse


def attention_map(
    q: torch.Tensor, k: torch.Tensor, at: torch.Tensor, pattern: Pattern, *, scale: float
) -> torch.Tensor:
    """Rows of the map at the queries `at` (int64 Tensor[P, 2]), `[B, P, heads, Hk, Wk]`, float32 or float64."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    probabilities, _ = weights(logits(q.to(dtype), k.to(dtype), pattern, scale=scale))
    return probabilities[:, :, at[:, 0], at[:, 1]].transpose(1, 2)


def attention_received(q: torch.Tensor, k: torch.Tensor, pattern: Pattern, *, scale: float) -> torch.Tensor:
    """The sum of each key's weights over all queries and its head group, `[B, Hk, Wk, kv_heads]`."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    probabilities, _ = weights(logits(q.to(dtype), k.to(dtype), pattern, scale=scale))
    per_head = probabilities.sum((2, 3))  # [B, heads, Hk, Wk]
    groups = (q.shape[0], k.shape[3], q.shape[3] // k.shape[3], *per_head.shape[2:])
    return per_head.reshape(groups).sum(2).permute(0, 2, 3, 1)
