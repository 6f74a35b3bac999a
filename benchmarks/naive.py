"""What the papers' code does, on plain `[B, heads, N, D]` tensors: the providers "naive", and SDPA in place of bmm.

Global, Window, Grid, Row and Column attention are one thing to plain PyTorch: the map is cut into equal cells, and each
cell attends to itself (Swin, MaxViT, Axial-DeepLab and SAM do so). Neighborhoods gather the keys of every query;
CCNet's criss-cross is two products and one softmax. What depends on sizes alone, such as a table of indices, is made
once and kept, as a module of the papers keeps it in a buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

Tables = Mapping[str, Mapping[str, torch.Tensor]]
"""The tensors of the terms, by the name of the term and of the tensor, such as `tables["RelativeQuery"]["rel_h"]`."""

_SWIN_MASK = -100.0
"""What Swin adds to the score of two positions that the cyclic shift has brought together."""


@dataclass(frozen=True)
class Cells:
    """A map `[B, heads, N, D]` cut into cells of one size, which it must divide.

    Attributes:
        height, width: of a cell.
        shift: of Swin: the cuts are at `y ≡ shift`, and the first and the last cell are one, after a roll.
        strided: of MaxViT: a cell takes every `H / height`-th row and every `W / width`-th column.
    """

    height: int
    width: int
    shift: tuple[int, int] = (0, 0)
    strided: bool = False

    def cut(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The cells of a map."""
        batch, heads, _, width = x.shape
        x = x.view(batch, heads, *grid, width)
        if any(self.shift):
            x = torch.roll(x, (-self.shift[0], -self.shift[1]), (2, 3))
        x = x.view(batch, heads, *self._split(grid), width).permute(self._order)
        return x.reshape(batch, heads, -1, self.height * self.width, width)  # [B, heads, cells, n, D]

    def join(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The map of some cells."""
        batch, heads, width = x.shape[0], x.shape[1], x.shape[-1]
        split = self._split(grid)
        x = x.view(batch, heads, *(split[axis - 2] for axis in self._order[2:6]), width)
        x = x.permute(self._inverse).reshape(batch, heads, *grid, width)
        if any(self.shift):
            x = torch.roll(x, self.shift, (2, 3))
        return x.reshape(batch, heads, -1, width)  # [B, heads, N, D]

    def _split(self, grid: tuple[int, int]) -> tuple[int, int, int, int]:
        counts = grid[0] // self.height, grid[1] // self.width
        if self.strided:
            return self.height, counts[0], self.width, counts[1]
        return counts[0], self.height, counts[1], self.width

    @property
    def _order(self) -> tuple[int, ...]:
        """The axes of the split map as cells by rows and columns, then positions by rows and columns."""
        return (0, 1, 3, 5, 2, 4, 6) if self.strided else (0, 1, 2, 4, 3, 5, 6)

    @property
    def _inverse(self) -> tuple[int, ...]:
        return tuple(self._order.index(axis) for axis in range(7))


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of every query to every key, of whatever grid, with bmm and softmax. Arguments as of `cells`."""
    batch, heads = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [B * heads, N, D]
    scores = torch.bmm(q, k.transpose(1, 2))
    if scale != 1:
        scores = scores * scale
    return torch.bmm(torch.softmax(scores, -1), v).view(batch, heads, q.shape[1], v.shape[2])


def cells(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, int],
    cut: Cells,
    scale: float,
    tables: Tables | None = None,
) -> torch.Tensor:
    """Attention inside each cell with bmm and softmax: every score and every term is stored.

    Args:
        q, k (Tensor[B, heads, N, D]): queries and keys.
        v (Tensor[B, heads, N, Dv]): values.
        grid: rows and columns of the map.
        cut: the cells.
        scale: factor of q·k.
        tables: the tensors of RelativeBias, RelativeQuery, RelativeKey and RelativeValue.
    """
    tables = tables or {}
    q, k, v = (cut.cut(x, grid) for x in (q, k, v))
    shape = (*q.shape[:3], cut.height, cut.width, cut.height, cut.width)
    scores = torch.bmm(q.flatten(0, 2), k.flatten(0, 2).transpose(1, 2))
    if scale != 1:
        scores = scores * scale
    for term in _score_terms(q, k, grid, cut, tables):
        scores = (scores.view(shape) + term).view(scores.shape)
    weights = torch.softmax(scores, -1)
    out = torch.bmm(weights, v.flatten(0, 2)).view(*q.shape[:4], v.shape[-1])
    if "RelativeValue" in tables:
        out = out + _value_term(weights.view(shape), cut, tables["RelativeValue"])
    return cut.join(out, grid)


def cells_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, int],
    cut: Cells,
    scale: float,
    tables: Tables | None = None,
) -> torch.Tensor:
    """Attention inside each cell with SDPA; the score terms are summed to its `attn_mask`. Arguments as of `cells`."""
    q, k, v = (cut.cut(x, grid) for x in (q, k, v))
    terms = _score_terms(q, k, grid, cut, tables or {})
    mask = None
    if terms:
        # A bias that no query enters has one map for the whole batch, and is not repeated.
        bias = sum(terms[1:], terms[0]).expand(-1, *q.shape[1:3], cut.height, cut.width, cut.height, cut.width)
        mask = bias.flatten(5, 6).flatten(3, 4).flatten(1, 2)  # [B or 1, heads * cells, n, n]
    q4, k4, v4 = (x.flatten(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q4, k4, v4, attn_mask=mask, scale=scale)
    return cut.join(out.view(*q.shape[:4], v.shape[-1]), grid)


def _score_terms(
    q: torch.Tensor, k: torch.Tensor, grid: tuple[int, int], cut: Cells, tables: Tables
) -> list[torch.Tensor]:
    """What is added to the scores; each fits into `[B, heads, cells, y, x, y', x']`."""
    size, terms = (cut.height, cut.width), []
    if "RelativeBias" in tables:
        table = tables["RelativeBias"]["table"]  # [heads, 2h - 1, 2w - 1]
        bias = table.flatten(1).index_select(1, bias_index(size, table.device))
        terms.append(bias.view(1, table.shape[0], 1, *size, *size))
    q, k = (x.view(*x.shape[:3], *size, x.shape[-1]) for x in (q, k))
    if "RelativeQuery" in tables:
        along_h, along_w = (_gathered(tables["RelativeQuery"], name, size) for name in ("rel_h", "rel_w"))
        if along_h is not None:
            terms.append(torch.einsum("bngyxd,nyud->bngyxu", q, along_h)[..., None])
        if along_w is not None:
            terms.append(torch.einsum("bngyxd,nxvd->bngyxv", q, along_w)[..., None, :])
    if "RelativeKey" in tables:
        along_h, along_w = (_gathered(tables["RelativeKey"], name, size) for name in ("rel_h", "rel_w"))
        if along_h is not None:
            terms.append(torch.einsum("bnguvd,nyud->bngyuv", k, along_h)[..., None, :, :])
        if along_w is not None:
            terms.append(torch.einsum("bnguvd,nxvd->bngxuv", k, along_w)[..., None, :, :, :])
    if any(cut.shift):
        terms.append(swin_mask(grid, cut, q.dtype, q.device))
    return terms


def _value_term(weights: torch.Tensor, cut: Cells, tables: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What is added to out, `[B, heads, cells, n, Dv]`, of the weights `[B, heads, cells, y, x, y', x']`."""
    size, parts = (cut.height, cut.width), []
    along_h, along_w = (_gathered(tables, name, size) for name in ("rel_h", "rel_w"))
    if along_h is not None:
        parts.append(torch.einsum("bngyxu,nyud->bngyxd", weights.sum(-1), along_h))
    if along_w is not None:
        parts.append(torch.einsum("bngyxv,nxvd->bngyxd", weights.sum(-2), along_w))
    return sum(parts[1:], parts[0]).flatten(3, 4)


def _gathered(tables: Mapping[str, torch.Tensor], name: str, size: tuple[int, int]) -> torch.Tensor | None:
    """A relative table as `[heads or 1, queries, keys, D]` along its axis; None where there is none."""
    if name not in tables:
        return None
    table, length = tables[name], size[name == "rel_w"]  # [2K - 1, D] or [heads, 2K - 1, D]
    table = table if table.dim() == 3 else table[None]
    table = table.index_select(1, _offsets(length, table.device).flatten())
    return table.view(-1, length, length, table.shape[-1])


@lru_cache(maxsize=16)
def _offsets(length: int, device: torch.device) -> torch.Tensor:
    """Key minus query of every pair along an axis, as an index into a table."""
    at = torch.arange(length, device=device)
    return at[None, :] - at[:, None] + length - 1


@lru_cache(maxsize=16)
def bias_index(size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The entry of a flat bias table of every pair of a cell, [n * n]."""
    along_h, along_w = (_offsets(length, device) for length in size)
    return (along_h[:, None, :, None] * (2 * size[1] - 1) + along_w[None, :, None, :]).flatten()


@lru_cache(maxsize=4)
def swin_mask(grid: tuple[int, int], cut: Cells, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Swin's mask [1, 1, cells, y, x, y', x']: -100 for two positions that lie on either side of the roll's seam."""
    seam_h, seam_w = (
        torch.arange(length, device=device) >= length - shift for length, shift in zip(grid, cut.shift, strict=True)
    )
    part = (seam_h[:, None] * 2 + seam_w[None, :]).view(1, 1, -1, 1)
    n = cut.height * cut.width
    part = Cells(cut.height, cut.width).cut(part, grid).view(-1, n)
    other = (part[:, :, None] != part[:, None, :]).to(dtype) * _SWIN_MASK
    return other.view(1, 1, -1, cut.height, cut.width, cut.height, cut.width)


# Neighborhoods: the keys and values of every query are gathered, K * K times the map.


def neighborhood(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, int],
    kernel: tuple[int, int],
    scale: float,
    tables: Tables | None = None,
) -> torch.Tensor:
    """NAT: windows pushed inside at the border, by a table of indices, with RelativeBias.

    Args:
        q, k, v: as of `cells`.
        grid: rows and columns of the map.
        kernel: rows and columns of a window, odd.
        scale: factor of q·k.
        tables: the tensors of the term that it may have.
    """
    keys, entries = neighbors(grid, kernel, q.device)

    def gather(x: torch.Tensor) -> torch.Tensor:
        return x.index_select(2, keys.flatten()).view(*x.shape[:2], *keys.shape, x.shape[-1])

    scores = (q.unsqueeze(-2) @ gather(k).transpose(-1, -2)).squeeze(-2) * scale  # [B, heads, N, K * K]
    if tables and "RelativeBias" in tables:
        table = tables["RelativeBias"]["table"]  # [heads, 2Kh - 1, 2Kw - 1]
        scores = scores + table.flatten(1).index_select(1, entries.flatten()).view(-1, *entries.shape)
    return (torch.softmax(scores, -1).unsqueeze(-2) @ gather(v)).squeeze(-2)


@lru_cache(maxsize=4)
def neighbors(
    grid: tuple[int, int], kernel: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of every query, [N, K * K], and the entries of a flat bias table for them."""
    keys, entries = [], []
    for length, size in zip(grid, kernel, strict=True):
        at = torch.arange(length, device=device)
        start = (at - size // 2).clamp(0, length - size)
        keys.append(start[:, None] + torch.arange(size, device=device))  # [length, K]
        entries.append(keys[-1] - at[:, None] + size - 1)
    return _joined(keys[0], keys[1], grid[1]), _joined(entries[0], entries[1], 2 * kernel[1] - 1)


def _joined(along_h: torch.Tensor, along_w: torch.Tensor, width: int) -> torch.Tensor:
    """Indices `[H, Kh]` and `[W, Kw]` of the axes as indices of the flat grid, `[N, Kh * Kw]`."""
    return (along_h[:, None, :, None] * width + along_w[None, :, None, :]).flatten(2).flatten(0, 1)


def neighborhood_zero(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, int],
    kernel: tuple[int, int],
    scale: float,
    tables: Tables | None = None,
) -> torch.Tensor:
    """SASA: the map padded with zeros, its windows unfolded, with RelativeQuery. Arguments as of `neighborhood`."""
    (rows, columns), count = kernel, kernel[0] * kernel[1]
    pad = (0, 0, columns // 2, columns // 2, rows // 2, rows // 2)

    def unfold(x: torch.Tensor) -> torch.Tensor:
        windows = F.pad(_map(x, grid), pad).unfold(2, rows, 1).unfold(3, columns, 1)
        return windows.reshape(*x.shape[:2], -1, x.shape[-1], count)  # [B, heads, N, D, K * K]

    scores = (q.unsqueeze(-2) @ unfold(k)).squeeze(-2) * scale
    if tables and "RelativeQuery" in tables:
        for name, size, axis in (("rel_h", rows, -1), ("rel_w", columns, -2)):
            table = tables["RelativeQuery"][name]
            table = table if table.dim() == 3 else table.expand(q.shape[1], -1, -1)  # [heads, 2K - 1, D]
            seen = table[:, size - 1 - size // 2 : size + size // 2]  # of these 2K - 1, a centred window sees K
            term = torch.einsum("bnid,nkd->bnik", q, seen).unsqueeze(axis)
            scores = (scores.view(*scores.shape[:-1], *kernel) + term).flatten(-2)
    return (unfold(v) @ torch.softmax(scores, -1).unsqueeze(-1)).squeeze(-1)


def criss_cross(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple[int, int], scale: float) -> torch.Tensor:
    """CCNet: scores along the column and the row of each query, one softmax. Arguments as of `cells`.

    The query itself is in both: in the column its score is -inf.
    """
    q, k, v = (_map(x, grid) for x in (q, k, v))  # [B, heads, H, W, D]
    columns = torch.einsum("bnyxd,bnuxd->bnyxu", q, k)
    itself = torch.eye(grid[0], dtype=torch.bool, device=q.device)[:, None, :]  # [y, 1, y']
    columns = columns.masked_fill(itself, -torch.inf)
    scores = torch.cat([columns, torch.einsum("bnyxd,bnyvd->bnyxv", q, k)], -1)
    if scale != 1:
        scores = scores * scale
    weights = torch.softmax(scores, -1)
    along_column, along_row = weights[..., : grid[0]], weights[..., grid[0] :]
    out = torch.einsum("bnyxu,bnuxd->bnyxd", along_column, v) + torch.einsum("bnyxv,bnyvd->bnyxd", along_row, v)
    return out.flatten(2, 3)


def _map(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """`[B, heads, N, D]` as `[B, heads, H, W, D]`."""
    return x.view(*x.shape[:2], *grid, x.shape[-1])
