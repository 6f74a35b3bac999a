"""From tensors to launches: which kernels run, on which tiles, with which arguments.

Everything is decided here, from shapes, strides and dtypes alone, so that a launch can be made of meta tensors and be
compiled with no GPU (tests/test_triton_compiled.py does). `run` is the only function that needs a device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from visattn_kernels.errors import expected
from visattn_kernels.patterns import BORDERS, PATTERN_FIELDS, PATTERN_KINDS, Size
from visattn_kernels.triton.cut import Geometry, Side, boxes, parts_of, power, sides_of
from visattn_kernels.triton.structs import (
    NEAR,
    WHOLE,
    Config,
    Counts,
    Factors,
    Map,
    Partials,
    Table,
    Terms,
)
from visattn_kernels.triton.tiles import CAREFUL, tile_for


@dataclass(frozen=True)
class Call:
    """The arguments of an operator, checked, and where it will run.

    Attributes:
        q, k, v: maps; v may be None.
        terms: term tensors by name, present ones only.
        pattern: encoded.
        reach: K of each axis.
        scales: factors of q·k, of `RelativeQuery` and of `RelativeKey`.
        capability: compute capability such as 90; None in the interpreter.
        tf32: whether float32 products may be TF32.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None
    terms: dict[str, torch.Tensor]
    pattern: tuple[int, ...]
    reach: tuple[int, int]
    scales: tuple[float, float, float]
    capability: int | None
    tf32: bool = False

    @property
    def queries(self) -> Size:
        """The query grid."""
        return Size(self.q.shape[1], self.q.shape[2])

    @property
    def keys(self) -> Size:
        """The key grid."""
        return Size(self.k.shape[1], self.k.shape[2])

    @property
    def sums(self) -> bool:
        """Whether results go through float32 sums from part to part."""
        return parts_of(self.pattern) > 1


class Launch(NamedTuple):
    """One kernel to run.

    Attributes:
        kernel: its name, a key of `KERNELS`.
        args: what it takes, in order.
        programs: how many.
        warps, stages: as `tiles.Tile` has them.
    """

    kernel: str
    args: tuple[Any, ...]
    programs: int
    warps: int
    stages: int


def _collapses(x: torch.Tensor) -> bool:
    """Whether the positions of a map [B, H, W, ...] are evenly spaced in memory."""
    return x.shape[1] == 1 or x.shape[2] == 1 or x.stride(1) == x.shape[2] * x.stride(2)


def _is_flat(call: Call, maps: Sequence[torch.Tensor]) -> bool:
    """Whether a call's maps can be walked as one line: every key for every query, and no offsets."""
    if PATTERN_KINDS[call.pattern[0]] != "Global" or any(name.startswith("relative") for name in call.terms):
        return False
    if max(call.queries.height * call.queries.width, call.keys.height * call.keys.width) >= 2**30:
        return False
    return all(_collapses(x) for x in (*maps, *call.terms.values()))


def geometry(call: Call, part: int, maps: Sequence[torch.Tensor], points: bool = False) -> Geometry:
    """How a part is walked; `maps` are all the maps whose strides matter."""
    height, width = sides_of(call.pattern, part, call.queries, call.keys, call.reach)
    border = BORDERS.index("mask")  # what spans have
    if PATTERN_KINDS[call.pattern[0]] == "Neighborhood":
        border = call.pattern[PATTERN_FIELDS.index("border")]
    if not points and _is_flat(call, maps):
        n, m = (grid.height * grid.width for grid in (call.queries, call.keys))
        return Geometry(
            Side(WHOLE, n, m, 1, 1, 0, m, False), Side(WHOLE, 1, 1, 1, 1, 0, 1, False), border, False, flat=True
        )
    swap = width.walked(1) > height.walked(1)
    y, x = (width, height) if swap else (height, width)
    return Geometry(y, x, border, part == 1, swap)


class Builder:
    """Makes the arguments of one kernel for one part of a call."""

    def __init__(
        self,
        call: Call,
        which: str,
        part: int,
        maps: Sequence[torch.Tensor],
        value_dim: int,
        points: torch.Tensor | None = None,
        values: bool = True,
        careful: bool = False,
    ) -> None:
        self.call, self.part, self.points = call, part, points
        self.geometry = g = geometry(call, part, maps, points is not None)
        head_dim = call.q.shape[4]
        vectors = {name.split("_")[1] for name in call.terms if name.startswith("relative")} - {"bias"}
        near = NEAR in (g.y.kind, g.x.kind)
        bias = "relative_bias" in call.terms and which != "forward"
        holds = "query" if vectors == {"query"} else "vectors" if vectors else "near" if near or bias else "plain"
        self.tile = tile_for(which, max(head_dim, value_dim), call.q.element_size(), holds, call.capability)
        if careful and call.capability is not None:
            self.tile = CAREFUL
        if points is not None:
            self.tile = self.tile._replace(m=16)
        (qy, qx), (ky, kx) = boxes(g, self.tile, points is not None)
        of_keys = which == "dkdv"
        self.y, self.x = g.y.axis(ky if of_keys else qy, of_keys), g.x.axis(kx if of_keys else qx, of_keys)
        self.tiles = self.y.classes * self.y.blocks * self.x.classes * self.x.blocks
        if points is not None:
            self.tiles = points.shape[0]
        heads = call.q.shape[3]
        self.counts = Counts(
            heads, heads // call.k.shape[3], self.tiles, call.queries.height * call.queries.width,
            call.queries.width,
        )  # fmt: skip
        self.config = Config(
            qy, qx, qy * qx, ky, kx, ky * kx, max(16, power(qy + ky - 1)), max(16, power(qx + kx - 1)),
            head_dim, value_dim,
            g.y.kind, g.x.kind, g.y.causal, g.x.causal, g.border, g.others,
            leaks=values and (near or g.others or bool(vectors)),
            precision="tf32" if call.tf32 and call.q.dtype == torch.float32 else "ieee",
            natural=call.q.dtype == torch.float32,
            wide=self.tiles * heads * call.q.shape[0] > NARROW,
            careful=careful, goes_on=part > 0, with_values=values, points=points is not None,
        )  # fmt: skip

    def map(self, x: torch.Tensor | None) -> Map:
        """A tensor [B, H, W, heads(, channels)] as the kernel walks it; None is an empty map."""
        if x is None:
            return Map(None, 0, 0, 0, 0, 0)
        batch, height, width, head, *channel = x.stride()
        if self.geometry.flat:
            height, width = (width if x.shape[2] > 1 else height), 0
        y, x_stride = self.geometry.place(height, width)
        return Map(x, batch, y, x_stride, head, channel[0] if channel else 0)

    def lse(self, x: torch.Tensor | None) -> Map:
        """Lse as the forward writes it: that of points is [B, P, 1, heads] and its y counts them."""
        if x is None or self.points is None:
            return self.map(x)
        return Map(x, x.stride(0), x.stride(1), 0, x.stride(3), 0)

    def terms(self, values: bool = True) -> Terms:
        """The terms of the call; the tables of vectors contiguous but for their heads."""
        call = self.call
        found: dict[str, Any] = {}
        for name in ("query", "key", *(("value",) if values else ())):
            for axis, side in zip("yx", self.geometry.place("h", "w"), strict=True):
                table = call.terms.get(f"relative_{name}_{side}")
                if table is not None:
                    rows = table if table.stride()[-2:] == (table.shape[-1], 1) else table.contiguous()
                    found[f"{name}_{axis}"] = Table(rows, rows.stride(0) if rows.dim() == 3 else 0)
        terms = Terms(**found)
        if (bias := call.terms.get("relative_bias")) is not None:
            head, *strides = bias.stride()
            bias_y, bias_x = self.geometry.place(*strides)
            terms = terms._replace(bias=bias, bias_head=head, bias_y=bias_y, bias_x=bias_x)
        if (key_bias := call.terms.get("key_bias")) is not None:
            m = self.map(key_bias if key_bias.dim() == 4 else key_bias[..., None])
            terms = terms._replace(
                key_bias=key_bias, key_bias_batch=m.batch, key_bias_y=m.y, key_bias_x=m.x,
                key_bias_head=m.head if key_bias.dim() == 4 else 0,
            )  # fmt: skip
        return terms

    def launch(self, kernel: str, arguments: tuple[Any, ...], programs: int) -> Launch:
        """The launch of a kernel."""
        return Launch(kernel, arguments, programs, self.tile.warps, self.tile.stages)

    @property
    def common(self) -> tuple[Any, ...]:
        """y, x, factors and counts, as every kernel takes them."""
        return self.y, self.x, Factors(*self.call.scales), self.counts


NARROW = 2**31 - 1
"""The most programs that 32 bits count."""

PROGRAMS = 1024
"""Among so many programs the tiles are dealt where gradients of tables are wanted, and in careful launches; fixed, so
that bits do not depend on the device."""

SHARES_BYTES = 2**26
"""Of the shares of the gradients of tables, at most, unless one share is more."""


def forward(call: Call, points: torch.Tensor | None = None) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """The launches of a forward; out and lse, which they will fill.

    Args:
        call: with v None, in the place of out and lse l and m of the softmax (see the kernel), both shaped like lse.
        points: int64 [P, 2]; l and m of these queries alone, [B, P, 1, heads].
    """
    q, v = call.q, call.v
    shape = (*q.shape[:4],) if points is None else (q.shape[0], points.shape[0], 1, q.shape[3])
    lse = q.new_empty(shape, dtype=torch.float32)
    out = torch.empty_like(lse) if v is None else q.new_empty((*q.shape[:4], v.shape[4]))
    before = torch.empty_like(out, dtype=torch.float32) if call.sums else None
    before_lse = torch.empty_like(lse) if call.sums else None
    flags = q.new_zeros((parts_of(call.pattern), q.shape[3]), dtype=torch.int32)
    maps = [x for x in (q, call.k, v) if x is not None]
    launches = []
    for part in range(parts_of(call.pattern)):
        last = part == parts_of(call.pattern) - 1
        for careful in (False, True):
            build = Builder(call, "forward", part, maps, 0 if v is None else v.shape[4], points, v is not None, careful)
            if careful and not build.config.leaks:
                continue
            every = build.tiles * q.shape[0]
            if careful:
                every = min(every, max(1, PROGRAMS // q.shape[3]))
            place = build.lse if v is None else build.map
            arguments = (
                build.map(q), build.map(call.k), build.map(v), place(out if last else before),
                build.lse(lse if last else before_lse), place(before), None if part == 0 else before_lse,
                build.terms(v is not None), *build.common, q.shape[0], every, _swapped(points, build),
                flags[part] if build.config.leaks else None, build.config,
            )  # fmt: skip
            launches.append(build.launch("attention_forward_kernel", arguments, q.shape[3] * every))
    return launches, out, lse


def _swapped(points: torch.Tensor | None, build: Builder) -> torch.Tensor | None:
    """Points in the order (y, x) of the kernel."""
    if points is None:
        return None
    return points.flip(1).contiguous() if build.geometry.swap else points.contiguous()


def backward(
    call: Call,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs: Sequence[str],
) -> tuple[list[Launch], Any]:
    """The launches of a backward, and a function that afterwards gives the gradients by name.

    Args:
        call: of the forward.
        grad_out, grad_lse, out, lse: shaped like the forward's results.
        needs: names among q, k, v and the term tensors.
    """
    q, k, v = call.q, call.k, call.v
    assert v is not None
    maps = [q, k, v, grad_out, lse, grad_lse, out]
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    launches = [_delta(call, grad_out, out, grad_lse, delta)]
    grads: dict[str, torch.Tensor] = {
        name: x.new_empty(x.shape) for name, x in (("q", q), ("k", k), ("v", v)) if name in needs
    }
    sums = {name: x.new_empty(x.shape, dtype=torch.float32) for name, x in grads.items() if call.sums}
    key_bias: dict[int, torch.Tensor] = {}  # by part
    if "key_bias" in needs:
        for part in range(parts_of(call.pattern)):
            key_bias[part] = q.new_empty((*k.shape[:3], q.shape[3]), dtype=torch.float32)
    shares: list[tuple[Builder, torch.Tensor, dict[str, tuple[int, tuple[int, ...]]]]] = []
    flags = q.new_zeros((2 * parts_of(call.pattern), q.shape[3]), dtype=torch.int32)
    for part in range(parts_of(call.pattern)):
        last = part == parts_of(call.pattern) - 1
        to = {name: x if last else sums[name] for name, x in grads.items()}
        for which, mine in (("dq", ("q",)), ("dkdv", ("k", "v", "key_bias"))):
            names = [name for name in needs if name in mine or _side(name) == which]
            if not names:
                continue
            partials = None
            for careful in (False, True):
                build = Builder(call, which, part, maps, v.shape[4], careful=careful)
                if careful and not build.config.leaks:
                    continue
                partials, shares_of_head, layout = _partials(build, names, which, partials)
                if partials.data is not None and not careful:
                    shares.append((build, partials.data, layout))
                wanted: dict[str, Any] = {f"grad_{_kernel_name(name, build)}": True for name in names}
                wanted["tables" if which == "dq" else "key_tables"] = partials.data is not None
                config = build.config._replace(shared=careful or partials.data is not None, **wanted)
                inputs = [build.map(x) for x in (q, k, v, grad_out, lse, delta)]
                if which == "dq":
                    outputs = [build.map(to.get("q")), build.map(sums.get("q"))]
                else:
                    outputs = [build.map(x) for x in (to.get("k"), to.get("v"), sums.get("k"), sums.get("v"))]
                    outputs += [build.map(key_bias.get(part)), build.map(key_bias.get(part - 1)), build.map(None)]
                flag = flags[2 * part + (which == "dq")] if config.leaks else None
                arguments = (
                    *inputs,
                    *outputs,
                    build.terms(),
                    *build.common,
                    partials,
                    q.shape[0],
                    shares_of_head,
                    flag,
                    config,
                )
                heads = q.shape[3] if which == "dq" else k.shape[3]
                launches.append(build.launch(f"attention_backward_{which}_kernel", arguments, shares_of_head * heads))

    def finish() -> dict[str, torch.Tensor]:
        done = dict(grads)
        if "key_bias" in needs:
            like, found = call.terms["key_bias"], key_bias[max(key_bias)]
            done["key_bias"] = (found if like.dim() == 4 else found.sum(-1)).to(like.dtype)
        totals: dict[str, torch.Tensor] = {}
        for build, data, layout in shares:
            of_head = data.sum(0)  # [heads, size], in a fixed order
            for name, (first, shape) in layout.items():
                n = shape[0] * shape[1]
                table = of_head[:, first : first + n].reshape(-1, *shape)
                if name == "relative_bias" and build.geometry.swap:
                    table = table.transpose(1, 2)
                totals[name] = totals[name] + table if name in totals else table
        for name, table in totals.items():
            like = call.terms[name]
            done[name] = (table if like.dim() == 3 else table.sum(0)).to(like.dtype).contiguous()
        return done

    return launches, finish


def _side(name: str) -> str:
    """Which kernel has the gradient of a term tensor."""
    return "dkdv" if name.startswith("relative_key") else "dq" if name.startswith("relative") else ""


def _kernel_name(name: str, build: Builder) -> str:
    """The kernel's name of a tensor: relative_query_w may be its query_y."""
    if name == "relative_bias" or not name.startswith("relative"):
        return name.removeprefix("relative_")
    stem, side = name.removeprefix("relative_").rsplit("_", 1)
    return f"{stem}_{'yx'[build.geometry.place('h', 'w').index(side)]}"


def _partials(
    build: Builder, names: Sequence[str], which: str, fast: Partials | None
) -> tuple[Partials, int, dict[str, tuple[int, tuple[int, ...]]]]:
    """Shares of the gradients of tables, zeros; how many; where each table begins in one, and its shape.

    Args:
        build: of the launch.
        names: of all gradients wanted.
        which: "dq" or "dkdv".
        fast: those of the launch that a careful one follows, or None.
    """
    call, counts = build.call, build.counts
    every = build.tiles * call.q.shape[0]
    layout: dict[str, tuple[int, tuple[int, ...]]] = {}
    begins: dict[str, int] = {}
    size = 0
    for name in names:
        if not name.startswith("relative"):
            continue
        if name == "relative_bias":
            shape: tuple[int, ...] = (2 * build.y.reach - 1, 2 * build.x.reach - 1)
        else:
            shape = tuple(call.terms[name].shape[-2:])
        layout[name] = (size, shape)
        begins[_kernel_name(name, build)] = size
        size += shape[0] * shape[1]
    programs = counts.heads if which == "dq" else counts.heads // counts.group
    most = max(1, PROGRAMS // programs)
    if not layout:
        return Partials(), min(every, most) if fast else every, {}
    if fast:
        return fast, fast.data.shape[0], layout
    shares = min(every, most, max(1, SHARES_BYTES // (4 * size * counts.heads)))
    data = call.q.new_zeros((shares, counts.heads, size), dtype=torch.float32)
    return Partials(data, size, **begins), shares, layout


def _delta(
    call: Call, grad_out: torch.Tensor, out: torch.Tensor, grad_lse: torch.Tensor, delta: torch.Tensor
) -> Launch:
    """The launch of `attention_delta_kernel`."""
    rows, width = 64, grad_out.shape[4]
    batch, heads, positions = call.q.shape[0], call.q.shape[3], call.queries.height * call.queries.width
    tiles = -(-positions // rows)
    counts = Counts(heads, 1, tiles, positions, call.queries.width)
    maps = [_plain(x) for x in (grad_out, out, grad_lse, delta)]
    programs = tiles * heads * batch
    wide = max(programs, positions + rows) > NARROW
    return Launch("attention_delta_kernel", (*maps, counts, batch, rows, width, wide), programs, 4, 1)


def _plain(x: torch.Tensor) -> Map:
    """A map as it lies."""
    batch, height, width, head, *channel = x.stride()
    return Map(x, batch, height, width, head, channel[0] if channel else 0)


def rows(call: Call, points: torch.Tensor) -> tuple[list[Launch], torch.Tensor]:
    """The launches of `attention_map`, and its result [B, P, heads, Hk, Wk], which they will fill."""
    q, k = call.q, call.k
    launches, total, maximum = forward(replace(call, v=None), points)
    weights = q.new_zeros((q.shape[0], points.shape[0], q.shape[3], *call.keys), dtype=torch.float32)
    batch, point, head, height, width = weights.stride()
    for part in range(parts_of(call.pattern)):
        build = Builder(call, "forward", part, [q, k], 0, points, values=False)
        y, x = build.geometry.place(height, width)
        arguments = (
            build.map(q), build.map(k), build.lse(maximum), total, Map(weights, batch, y, x, head, point),
            build.terms(False), *build.common, q.shape[0], _swapped(points, build), build.config,
        )  # fmt: skip
        programs = build.tiles * q.shape[3] * q.shape[0]
        launches.append(build.launch("attention_map_kernel", arguments, programs))
    return launches, weights


def received(call: Call) -> tuple[list[Launch], torch.Tensor]:
    """The launches of `attention_received`, and its result [B, Hk, Wk, kv_heads], which they will fill."""
    q, k = call.q, call.k
    launches, total, maximum = forward(replace(call, v=None))
    sums = q.new_empty(k.shape[:4], dtype=torch.float32)
    nothing = Map(None, 0, 0, 0, 0, 0)
    for part in range(parts_of(call.pattern)):
        build = Builder(call, "dkdv", part, [q, k], 0, values=False)
        shares = build.tiles * q.shape[0]
        arguments = (
            build.map(q), build.map(k), nothing, nothing, build.map(maximum), build.map(total),
            nothing, nothing, nothing, nothing, nothing, nothing, build.map(sums),
            build.terms(False), *build.common, Partials(), q.shape[0], shares, None, build.config,
        )  # fmt: skip
        launches.append(build.launch("attention_backward_dkdv_kernel", arguments, shares * k.shape[3]))
    return launches, sums


def fold(programs: int) -> tuple[int, int]:
    """A grid of at least so many programs: of two dimensions if the first, which holds 2^31 - 1, is not enough."""
    width = programs if programs <= NARROW else 2**30
    return width, -(-programs // width)


def options(one: Launch) -> dict[str, Any]:
    """What Triton compiles a launch with. Products are fused with sums, which Triton is to be told from 3.10 on."""
    return {"num_warps": one.warps, "num_stages": one.stages, "enable_fp_fusion": True}


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Run launches in order, on the current stream of the device."""
    from triton.runtime.errors import OutOfResources

    from visattn_kernels.triton.kernels import KERNELS

    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for one in launches:
            try:
                if one.programs:
                    KERNELS[one.kernel][fold(one.programs)](*one.args, **options(one))
            except OutOfResources as error:
                config = one.args[-1]
                raise expected(
                    f"heads whose tiles fit this GPU in {one.kernel}",
                    "D",
                    f"{getattr(config, 'head_dim', 0)} and Dv={getattr(config, 'value_dim', 0)}",
                    RuntimeError,
                    f"{error}. Fewer channels, 16-bit tensors or no relative vectors take less.",
                ) from error
