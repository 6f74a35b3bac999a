"""flex_attention: what a user writes for it, a mask of blocks and a function of the score, for any pattern.

The mask of blocks is made once for a size, outside the timed region. The function adds what the terms say; q·rel and
k·rel are vectors per position, computed before, as is usual. Keys that lie outside the map (border="zero") are zeros
around it. A function of the score cannot change the values: RelativeValue has no code here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.naive import Tables
from benchmarks.workloads import Workload
from visattn_kernels.patterns import CrissCross, Global, Pattern, Size

Attend = Callable[..., Any]


@cache
def compiled() -> Attend:
    """flex_attention, compiled for each shape."""
    # Past the limit, 8 shapes, dynamo runs the uncompiled function, which stores the map.
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(flex_attention, dynamic=False)


def attend(
    w: Workload, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: Tables, kernel: Attend
) -> torch.Tensor:
    """The attention of a workload.

    Args:
        w: its pattern and grids.
        q, k (Tensor[B, heads, N, D]): queries and keys.
        v (Tensor[B, heads, N, Dv]): values.
        tables: the tensors of RelativeBias, RelativeQuery and RelativeKey.
        kernel: flex_attention, compiled or not.
    """
    (top, bottom), (left, right) = w.pattern.margin()
    if top or bottom or left or right:
        around = (0, 0, left, right, top, bottom)
        k, v = (F.pad(x.view(*x.shape[:2], *w.keys, x.shape[-1]), around).flatten(2, 3) for x in (k, v))
    mask = None if isinstance(w.pattern, Global) else block_mask(w.pattern, w.queries, w.keys, q.device)
    out = kernel(q, k, v, score_mod=_score_mod(w, q, k, tables), block_mask=mask, scale=w.factor)
    assert isinstance(out, torch.Tensor)
    return out


@lru_cache(maxsize=8)
def block_mask(pattern: Pattern, queries: Size, keys: Size, device: torch.device) -> BlockMask:
    """The pairs of a pattern, with the positions outside the map that exist."""
    (top, bottom), (left, right) = pattern.margin()
    width, extended = queries.width, keys.width + left + right
    union = isinstance(pattern, CrissCross)

    def visible(b: Any, h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        along_h = pattern.sees(0, queries.height, i // width, j // extended - top)
        along_w = pattern.sees(1, queries.width, i % width, j % extended - left)
        return along_h | along_w if union else along_h & along_w

    count = (keys.height + top + bottom) * extended
    return create_block_mask(visible, None, None, queries.height * width, count, device=device)


def _score_mod(w: Workload, q: torch.Tensor, k: torch.Tensor, tables: Tables) -> Attend | None:
    """Adds the terms to a score; None where there are none."""
    (top, _), (left, right) = w.pattern.margin()
    width, extended = w.queries.width, w.keys.width + left + right
    reach, stride = w.pattern.reach(w.queries, w.keys), w.pattern.stride(w.queries)
    bias = tables.get("RelativeBias", {}).get("table")
    of_query = _vectors(q, tables.get("RelativeQuery", {}))
    of_key = _vectors(k, tables.get("RelativeKey", {}))
    if bias is None and not of_query and not of_key:
        return None

    def score(score: torch.Tensor, b: Any, h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        along_h = (j // extended - top - i // width) // stride[0] + reach[0] - 1
        along_w = (j % extended - left - i % width) // stride[1] + reach[1] - 1
        # Masked pairs are computed too.
        entries = along_h.clamp(0, 2 * reach[0] - 2), along_w.clamp(0, 2 * reach[1] - 2)
        if bias is not None:
            score = score + bias[h, entries[0], entries[1]]
        for axis, vectors in of_query.items():
            score = score + vectors[b, h, i, entries[axis]]
        for axis, vectors in of_key.items():
            score = score + vectors[b, h, j, entries[axis]]
        return score

    return score


def _vectors(x: torch.Tensor, tables: Any) -> dict[int, torch.Tensor]:
    """The products of every position with a relative table, `[B, heads, N, 2K - 1]`, by axis."""
    return {axis: x @ tables[name].mT for axis, name in enumerate(("rel_h", "rel_w")) if name in tables}
