"""The Triton kernels in Triton's interpreter against the reference: every case of the table in float32 and float16.

bfloat16 is not among them: the interpreter computes it wrongly, without a word, and the backend refuses it there.
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES, PATTERNS, TERM_CASES, Case, TermCase, differentiate, expected_map, hold, inputs, short
from conftest import poison
from tolerance import check

import visattn_kernels as va
from visattn_kernels import ops, reference
from visattn_kernels.backends import triton as backend
from visattn_kernels.terms import TERM_TENSORS

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    # The interpreter's own: numpy on the infinities of a softmax, and on its way from arrays to numbers.
    pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array.*:DeprecationWarning"),
]

EVERYTHING = tuple(options[0] for options in TERM_CASES)  # every term


def attend(case: Case):
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **extra: torch.Tensor):
        call = {"scale": case.scale, "terms": case.build_terms(extra), "backend": "triton"}
        with poison():
            return va.attention(q, k, v, case.pattern, **call, return_lse=True)

    return forward


INTERPRETED = [case for case in CASES if case.dtype in (torch.float32, torch.float16)]


@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.id)
def test_forward_and_backward(case: Case) -> None:
    tensors = inputs(case)
    with poison():
        results = differentiate(attend(case), tensors, case.wanted)
    assert results["out"].is_contiguous()
    assert results["out"].dtype == case.dtype
    hold(case, results)


READ = [
    case
    for case in INTERPRETED
    if case.needs == "qkv"
    and case.dtype == torch.float32
    and (len(case.terms) in (0, len(TERM_CASES)) or case.pattern == va.CrissCross())
]


@pytest.mark.parametrize("case", READ, ids=lambda case: case.id)
def test_map_and_received(case: Case) -> None:
    tensors = inputs(case)
    q, k, terms = tensors["q"], tensors["k"], case.build_terms(tensors)
    points, both = expected_map(case)
    call = {"pattern": case.pattern, "scale": case.scale, "terms": terms, "backend": "triton"}
    with poison():
        rows = va.attention_map(q, k, points, **call)
        sums = va.attention_received(q, k, **call)
    for name, x in (("map", rows), ("received", sums)):
        true, eager = both[name]
        check(name, x, true, eager, case.dtype)
        assert x[true == 0].eq(0).all(), f"{name}: weight in a masked place"


@pytest.mark.parametrize("tile", [(16, 32)])
@pytest.mark.parametrize("pattern", [pattern for pattern, grid in PATTERNS if grid == (7, 11)], ids=short)
def test_other_tiles(pattern, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Results do not depend on the boxes of a tile, beyond rounding."""
    from visattn_kernels.triton import tiles

    monkeypatch.setattr(tiles, "INTERPRETED", tiles.Tile(*tile, 4, 1))
    case = Case(batch=1, queries=(7, 11), keys=(7, 11), kv_heads=1, pattern=pattern, terms=EVERYTHING)
    hold(case, differentiate(attend(case), inputs(case), case.wanted))


@pytest.mark.parametrize("pattern", [va.Global(), va.Window(5, 2), va.Neighborhood(5, border="zero"), va.CrissCross()])
def test_same_bits_for_any_batch_and_any_run(pattern) -> None:
    case = Case(
        batch=3, queries=(5, 7), keys=(5, 7), heads=2, kv_heads=1, head_dim=5, pattern=pattern, terms=EVERYTHING
    )
    tensors = inputs(case)
    first = differentiate(attend(case), tensors, case.wanted)
    again = differentiate(attend(case), tensors, case.wanted)
    for name, x in first.items():
        assert torch.equal(x, again[name]), name
    shared = [name for name in case.term_tensors if name != "key_bias"]
    alone = differentiate(
        attend(case), {name: x if name in shared else x[1:2] for name, x in tensors.items()}, case.wanted
    )
    for name, x in first.items():
        if name.removeprefix("grad_") not in shared:  # whose gradients are sums over maps
            assert torch.equal(x[1:2], alone[name]), name


LEAKING = (va.Window(4, shift=(1, 3)), va.Neighborhood((4, 5), dilation=(1, 2)), va.Neighborhood(3, border="zero"))


@pytest.mark.parametrize("where", ["q", "k", "v", "grad_out", *TERM_TENSORS[:-1]])
@pytest.mark.parametrize("pattern", [*LEAKING, va.CrissCross()], ids=short)
def test_nan_never_leaks(pattern, where: str) -> None:
    """What a bad number reaches in the reference, and nothing else; forwards, and in every gradient."""
    terms = (*EVERYTHING[:-1], TermCase("KeyBias"))
    case = Case(
        batch=1,
        queries=(7, 11),
        keys=(7, 11),
        heads=1,
        kv_heads=1,
        head_dim=3,
        value_dim=2,
        pattern=pattern,
        terms=terms,
    )
    tensors = inputs(case)
    tensors["key_bias"][0, 2, 2] = -torch.inf
    tensors["k"][0, 2, 2] = torch.nan  # removed: reaches nothing
    if where in TERM_TENSORS:
        tensors[where][..., 0, 0] = torch.nan  # the longest offset, which few pairs have, or none
    else:
        tensors[where][0, 3, 5, 0, 1] = torch.nan
    results = differentiate(attend(case), tensors, case.wanted)

    def formula(q, k, v, **extra):
        return reference.formula(q, k, v, pattern, scale=case.true_scale, terms=case.build_terms(extra))

    exact = differentiate(formula, {name: x.double() for name, x in tensors.items()}, case.wanted)
    for name, x in results.items():
        assert torch.equal(x.isnan(), exact[name].isnan()), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("pattern", [va.Global(), va.Neighborhood(3)], ids=short)
def test_nan_and_inf_reach_what_they_reach_in_the_reference(pattern, value: float, where: str) -> None:
    case = Case(batch=1, queries=(7, 9), keys=(7, 9), head_dim=3, value_dim=4, pattern=pattern)
    tensors = inputs(case)
    tensors[where][0, 2, 3, 1, 0] = value
    with torch.no_grad():
        results = attend(case)(tensors["q"], tensors["k"], tensors["v"])
        call = {"scale": case.true_scale}
        exact = reference.formula(*(tensors[n].double() for n in "qkv"), pattern, **call)
        eager = reference.formula(*(tensors[n] for n in "qkv"), pattern, **call)
    for name, x, r, low in zip(("out", "lse"), results, exact, eager, strict=True):
        low = torch.where(r.isfinite(), low.double().nan_to_num(), r)
        check(name, x, r, low, torch.float32)


@pytest.mark.parametrize("pattern", [va.Global(), va.Window(3), va.Neighborhood(3), va.CrissCross()], ids=short)
def test_a_query_of_nan_is_not_one_with_no_key(pattern) -> None:
    """The maximum drops NaN, so that such a query has none either; `merge` would drop its part without a word."""
    q, k, v = (torch.randn(1, 5, 6, 1, 4) for _ in range(3))
    q[0, 1, 2] = torch.nan
    out, lse = va.attention(q, k, v, pattern, backend="triton", return_lse=True)
    assert lse.isnan().nonzero().tolist() == [[0, 1, 2, 0]]
    assert out.isnan().nonzero().tolist() == [[0, 1, 2, 0, i] for i in range(4)]
    assert not lse.isinf().any()


@pytest.mark.parametrize("pattern", [va.Global(), va.Window(3), va.CrissCross()], ids=short)
def test_queries_with_no_key(pattern) -> None:
    case = Case(batch=2, queries=(5, 7), keys=(5, 7), pattern=pattern, terms=(TermCase("KeyBias"), *EVERYTHING[:-1]))
    tensors = inputs(case)
    tensors["key_bias"][1] = -torch.inf
    results = differentiate(attend(case), tensors, case.wanted)
    for name in ("out", "grad_q", "grad_k", "grad_v", "grad_key_bias"):
        assert results[name][1].eq(0).all(), name
        assert results[name].isfinite().all(), name
    assert results["lse"][1].eq(-torch.inf).all()


@pytest.mark.parametrize("width", [96, 200, 257, 512])
def test_wide_heads_in_pieces(width: int) -> None:
    case = Case(batch=1, queries=(3, 5), keys=(3, 5), heads=1, kv_heads=1, head_dim=width, value_dim=width - 3)
    hold(case, differentiate(attend(case), inputs(case), case.wanted))


def test_channels_come_in_pieces() -> None:
    from visattn_kernels.triton.engine import pieces

    found = {width: pieces(width) for width in range(1, 513)}
    assert (found[80], found[512], found[3], found[48], found[112]) == ((64, 16), (128,) * 4, (16,), (32, 16), (128,))
    for width, sizes in found.items():
        assert all(size & (size - 1) == 0 and size >= 16 for size in sizes)
        assert all(size == sizes[0] for size in sizes[:-1])  # engine.piece_start rests on it
        assert width <= sum(sizes) < max(17, 2 * width)


def test_more_programs_than_one_dimension_of_a_grid_holds() -> None:
    from visattn_kernels.triton.launch import fold

    for programs in (1, 65_535, 65_536, 2**30, 2**31, 2**40 + 1):
        width, height = fold(programs)
        assert width < 2**31
        assert height < 2**16
        assert width * height >= programs


def test_a_folded_grid_has_no_program_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids of two dimensions, of which the last row is not full."""
    from visattn_kernels.triton import launch

    monkeypatch.setattr(launch, "NARROW", 0)
    monkeypatch.setattr(launch, "fold", lambda programs: (5, -(-programs // 5)))
    case = Case(batch=2, queries=(5, 7), keys=(5, 7), pattern=va.Window(3), terms=EVERYTHING)
    hold(case, differentiate(attend(case), inputs(case), case.wanted))


def test_bfloat16_is_refused_in_the_interpreter() -> None:
    q = torch.zeros(1, 2, 2, 1, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="the interpreter computes bfloat16 wrongly"):
        va.attention(q, q, q, backend="triton")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.zeros(1, 2, 2, 1, 513), "at most 512"),
        (lambda: torch.zeros(1, 2, 2, 1, 8, dtype=torch.float64), "the dtype is float64"),
        (lambda: torch.zeros(1, 2, 2, 1, 8, device="meta"), "the tensors are on meta"),
    ],
)
def test_what_it_cannot_run_it_says(make, reason: str) -> None:
    q = make()
    with pytest.raises(RuntimeError, match=rf"backend='triton'.*It cannot: .*{reason}"):
        va.attention(q, q, q, backend="triton")
    assert reason in va.explain(q, q, q)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "interpret", False)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    q = torch.zeros(1, 2, 2, 1, 8)
    reasons = "torch sees no NVIDIA GPU; the tensors are on cpu, not on a GPU"
    with pytest.raises(RuntimeError, match=rf"backend='triton'\. It cannot: {reasons}"):
        va.attention(q, q, q, backend="triton")
    assert f"no: {reasons}" in va.explain(q, q, q)
    assert "torch sees no NVIDIA GPU" in va.explain()
    with pytest.raises(RuntimeError, match=r"visattn: expected .*torch sees no NVIDIA GPU"):
        ops.operator("triton", "forward")(q, q, q, *ops.NO_TERMS, 1.0, 1.0, 1.0, va.Global().encode())


def test_compiles_and_batches_through_the_same_operator() -> None:
    """torch.compile with no graph break, and vmap."""
    q = torch.randn(2, 3, 5, 2, 8, requires_grad=True)

    def loss(x):
        return va.attention(x, x, x, va.Window(3), backend="triton").square().sum()

    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(q), q)
    (plain,) = torch.autograd.grad(loss(q), q)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(torch.vmap(lambda x: va.attention(x[None], x[None], x[None], backend="triton")[0])(q),
                               va.attention(q, q, q, backend="triton"))  # fmt: skip


def test_saved_numbers_of_the_backward_are_checked() -> None:
    q = torch.zeros(1, 2, 3, 1, 8)
    lse = torch.zeros(1, 2, 3, 1)
    good = [q, lse, q, q, q, *ops.NO_TERMS, q, lse, 1.0, 1.0, 1.0, va.Global().encode(), 7]
    assert [x.numel() for x in ops.operator("triton", "backward")(*good)[:3]] == [48] * 3
    for i, wrong, what in (
        (0, q[:, :1], "grad_out of shape"),
        (0, q.half(), "grad_out of dtype"),
        (1, lse[..., :0], "grad_lse of shape"),
        (5 + len(TERM_TENSORS), q[..., :4], "out of shape"),
        (6 + len(TERM_TENSORS), lse.double(), "lse of dtype"),
        (-1, 8, "a tensor relative_bias"),
        (-1, -1, "needs from 0"),
        (-2, [7, 0], "pattern to be the integers"),
        (-2, va.Window(3).encode()[:9], "pattern to be the integers"),
    ):
        bad = [*good]
        bad[i] = wrong
        with pytest.raises(RuntimeError, match=f"visattn: expected {what}"):
            ops.operator("triton", "backward")(*bad)
