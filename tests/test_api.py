"""The public functions: what they accept, what they refuse and how they say it, what holds between them."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import warnings

import pytest
import torch
from cases import Case, inputs

import visattn_kernels as va
from visattn_kernels import backends
from visattn_kernels.backends import cpu
from visattn_kernels.patterns import Size

pytestmark = pytest.mark.fast

needs_engine = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))
MESSAGE = re.compile(r"visattn: expected .+, but got .+=")


def maps(*shapes, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def jagged(x: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([x[0]], layout=torch.jagged)


ALL = slice(None)


def attend(pattern, *terms, keys: slice = ALL):
    """A call with a pattern and terms; `keys` cuts the key grid's height."""
    return lambda q, k, v: va.attention(q, k[:, keys], v[:, keys], pattern, terms=terms)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


Q = (2, 3, 4, 2, 8)
WINDOW = va.Window((2, 3))  # tables of 3 and 5 entries
BAD = [
    ("not a tensor", lambda q, k, v: va.attention([1], k, v), TypeError, "q=list"),
    ("not a tensor", lambda q, k, v: va.attention(q, k, None), TypeError, "v=NoneType"),
    ("rank", lambda q, k, v: va.attention(q[0], k, v), RuntimeError, r"q.shape=\[3, 4, 2, 8\].*heads_last"),
    ("rank", lambda q, k, v: va.attention(q, k, v[..., 0]), RuntimeError, r"v.shape=\[2, 3, 4, 2\]"),
    ("batch", lambda q, k, v: va.attention(q, k[:1], v[:1]), RuntimeError, r"\[2, 3, 4, 2, 8\].*\[1, 3, 4, 2, 8\]"),
    ("D", lambda q, k, v: va.attention(q, k[..., :7], v), RuntimeError, r"agree in D.*\[2, 3, 4, 2, 7\]"),
    ("key grid", lambda q, k, v: va.attention(q, k, v[:, :2]), RuntimeError, r"k and v to agree in H"),
    ("key grid", lambda q, k, v: va.attention(q, k, v[:, :, :1]), RuntimeError, r"k and v to agree in W"),
    ("kv heads", lambda q, k, v: va.attention(q, k, v[:, :, :, :1]), RuntimeError, r"agree in heads"),
    (
        "heads",
        lambda q, k, v: va.attention(q.repeat(1, 1, 1, 2, 1)[:, :, :, :3], k, v),
        RuntimeError,
        r"divide the heads of q.*q.shape=\[2, 3, 4, 3, 8\] and k.shape=\[2, 3, 4, 2, 8\]",
    ),
    (
        "dtype",
        lambda q, k, v: va.attention(q, k, v.double()),
        RuntimeError,
        "q.dtype=torch.float32 and v.dtype=torch.f",
    ),
    ("dtype", lambda q, k, v: va.attention(q.int(), k.int(), v.int()), RuntimeError, "one of float64.*torch.int32"),
    ("device", lambda q, k, v: va.attention(q, k.to("meta"), v), RuntimeError, "q.device=cpu and k.device=meta"),
    ("no channel", lambda q, k, v: va.attention(q[..., :0], k[..., :0], v), RuntimeError, "D of q to be at least 1"),
    ("no row", lambda q, k, v: va.attention(q[:, :0], k, v), RuntimeError, "H of q to be at least 1"),
    ("sparse", lambda q, k, v: va.attention(q.to_sparse(), k, v), RuntimeError, "strided"),
    ("pattern", lambda q, k, v: va.attention(q, k, v, "global"), TypeError, "pattern='global'"),
    ("pattern class", lambda q, k, v: va.attention(q, k, v, va.Global), TypeError, "pattern=the class Global"),
    ("pattern a term", lambda q, k, v: va.attention(q, k, v, va.KeyBias(q)), TypeError, "pattern=KeyBias$"),
    ("pattern a tensor", lambda q, k, v: va.attention(q, k, v, q), TypeError, "pattern=Tensor$"),
    ("scale", lambda q, k, v: va.attention(q, k, v, scale="1"), TypeError, "scale='1'"),
    ("scale", lambda q, k, v: va.attention(q, k, v, scale=True), TypeError, "scale=True"),
    ("terms", lambda q, k, v: va.attention(q, k, v, terms=3), TypeError, "terms=3"),
    ("term", attend(WINDOW, 3), TypeError, r"terms\[0\]=3"),
    ("term class", attend(WINDOW, va.KeyBias), TypeError, "every term to be a term.*=the class KeyBias$"),
    ("term a tensor", lambda q, k, v: va.attention(q, k, v, terms=(q,)), TypeError, r"terms\[0\]=Tensor$"),
    ("terms alone", lambda q, k, v: va.attention(q, k, v, terms=va.KeyBias(q)), TypeError, "a tuple.*terms=KeyBias$"),
    ("return_lse", lambda q, k, v: va.attention(q, k, v, return_lse="no"), TypeError, "a bool.*return_lse='no'"),
    ("term twice", attend(WINDOW, *[va.KeyBias(zeros(2, 3, 4))] * 2), ValueError, r"at most one.*\(KeyBias, KeyBias\)"),
    ("no tensor", lambda q, k, v: va.RelativeBias([1]), TypeError, "table=list"),
    ("no tensor", lambda q, k, v: va.RelativeQuery(1.0), TypeError, "rel_h=float"),
    ("no tensor", lambda q, k, v: va.RelativeKey(rel_w=1.0), TypeError, "rel_w=float"),
    ("no tensor", lambda q, k, v: va.KeyBias(None), TypeError, "bias=NoneType"),
    ("no table", lambda q, k, v: va.RelativeValue(), ValueError, "at least one of rel_h and rel_w for RelativeValue"),
    ("no table", lambda q, k, v: va.RelativeKey(scale=2), ValueError, "rel_h=None and rel_w=None"),
    ("term scale", lambda q, k, v: va.RelativeQuery(q, scale="1"), TypeError, "scale of RelativeQuery.*scale='1'"),
    ("term scale", lambda q, k, v: va.RelativeKey(q, scale=True), TypeError, "scale=True"),
    (
        "table length",
        attend(va.Window(3), va.RelativeQuery(zeros(4, 8))),
        RuntimeError,
        r"rel_h of shape \[5, 8\] or \[2, 5, 8\].*\[4, 8\] and q.shape=\[2, 3, 4, 2, 8\].*2K-1 = 5 entries for the "
        r"reach K = 3 of Window.*along the height",
    ),
    ("table length", attend(WINDOW, va.RelativeKey(rel_w=zeros(2, 6, 8))), RuntimeError, "5 entries.*K = 3.*the width"),
    ("table length", attend(va.Global(), va.RelativeKey(zeros(4, 8))), RuntimeError, "5 entries.*K = 3 of Global"),
    ("table width", attend(WINDOW, va.RelativeValue(zeros(3, 7))), RuntimeError, r"\[2K-1, Dv\].*=\[3, 7\]"),
    ("table heads", attend(WINDOW, va.RelativeValue(zeros(1, 3, 8))), RuntimeError, r"=\[1, 3, 8\]"),
    ("table rank", attend(WINDOW, va.RelativeQuery(zeros(3))), RuntimeError, r"=\[3\] and q"),
    ("table rank", attend(WINDOW, va.RelativeQuery(torch.tensor(1.0))), RuntimeError, r"=\[\] and q"),
    (
        "table dtype",
        attend(WINDOW, va.RelativeQuery(zeros(3, 8).double())),
        RuntimeError,
        "float32 and .*rel_h.dtype=t",
    ),
    ("table device", attend(WINDOW, va.RelativeQuery(zeros(3, 8).to("meta"))), RuntimeError, "device=cpu and .*=meta"),
    ("table layout", attend(WINDOW, va.RelativeQuery(zeros(3, 8).to_sparse())), RuntimeError, "rel_h to be a strided"),
    ("bias shape", attend(WINDOW, va.RelativeBias(zeros(2, 3, 3))), RuntimeError, r"\[2, 3, 5\].*\[2, 3, 3\] and q"),
    ("bias shape", attend(WINDOW, va.RelativeBias(zeros(3, 5))), RuntimeError, r"heads, 2Kh-1, 2Kw-1.*\[3, 5\]"),
    ("bias dtype", attend(WINDOW, va.RelativeBias(zeros(2, 3, 5).half())), RuntimeError, "RelativeBias.table.dtype"),
    ("key bias", attend(WINDOW, va.KeyBias(zeros(2, 4, 3))), RuntimeError, r"\[2, 3, 4\] or \[2, 3, 4, 2\]"),
    ("key bias", attend(WINDOW, va.KeyBias(zeros(1, 3, 4))), RuntimeError, r"=\[1, 3, 4\], k.shape=\[2,.* and q.shape"),
    ("key bias", attend(WINDOW, va.KeyBias(zeros(2, 3, 4).int())), RuntimeError, "KeyBias.bias.dtype=torch.int32"),
    (
        "two grids",
        attend(va.Global(), va.RelativeBias(zeros(2, 5, 7)), keys=slice(2)),
        RuntimeError,
        r"one grid, as RelativeBias needs.*q.shape=\[2, 3, 4, 2, 8\] and k.shape=\[2, 2, 4, 2, 8\]",
    ),
    ("two grids", attend(va.Global(), va.RelativeValue(zeros(5, 8)), keys=slice(1)), RuntimeError, "as RelativeValue"),
    *(
        (
            "two grids",
            attend(pattern, keys=slice(2)),
            RuntimeError,
            rf"one grid, as {type(pattern).__name__}\(.*q.shape=\[2, 3, 4, 2, 8\] and k.shape=\[2, 2, 4, 2, 8\]",
        )
        for pattern in (WINDOW, va.Grid(2), va.Neighborhood(1), va.Row(), va.Column(), va.CrissCross())
    ),
    *(
        ("two grids, no tensors", lambda *_, p=pattern: p.check(Size(3, 4), Size(2, 4)), ValueError, "s=3x4 and keys=2")
        for pattern in (va.Row(), va.Neighborhood(1, border="mask"))
    ),
    ("window", lambda q, k, v: va.Window(0), ValueError, "window_size of at least 1.*window_size=0"),
    ("huge", lambda q, k, v: va.Window((2**31, 1)), ValueError, "window_size of at most 2147483647.*2147483648, 1"),
    ("window", lambda q, k, v: va.Window((2, -1)), ValueError, r"window_size=\(2, -1\)"),
    ("window", lambda q, k, v: va.Window(2.0), TypeError, "an integer or a pair.*window_size=2.0"),
    ("window", lambda q, k, v: va.Window(True), TypeError, "window_size=True"),
    ("window", lambda q, k, v: va.Window("7"), TypeError, "window_size='7'"),
    ("window", lambda q, k, v: va.Window(q), TypeError, "window_size=Tensor$"),
    ("window", lambda q, k, v: va.Window((1, 2, 3)), ValueError, r"window_size=\(1, 2, 3\)"),
    ("shift", lambda q, k, v: va.Window((2, 3), 2), ValueError, r"0 <= shift < window_size.*\(2, 3\).*shift=2"),
    ("shift", lambda q, k, v: va.Window(2, -1), ValueError, "shift=-1"),
    ("grid", lambda q, k, v: va.Grid(0), ValueError, "grid_size=0"),
    ("grid", lambda q, k, v: va.Grid((1, None)), TypeError, r"grid_size=\(1, None\)"),
    ("kernel", lambda q, k, v: va.Neighborhood(0), ValueError, "kernel_size=0"),
    ("dilation", lambda q, k, v: va.Neighborhood(3, 0), ValueError, "dilation=0"),
    ("border", lambda q, k, v: va.Neighborhood(3, border="wrap"), ValueError, "shift, mask, zero.*border='wrap'"),
    ("border", lambda q, k, v: va.Neighborhood(3, border=1), TypeError, "border=1"),
    ("causal", lambda q, k, v: va.Neighborhood(3, is_causal=1), TypeError, "is_causal=1"),
    ("causal", lambda q, k, v: va.Neighborhood(3, is_causal=(True,)), ValueError, r"is_causal=\(True,\)"),
    (
        "kernel too large",
        attend(va.Neighborhood((3, 5))),
        ValueError,
        "kernel_size \\* dilation <= 4, the width.*kernel_size=5 and dilation=1 along the width.*kernel_size <= 4, or "
        'border="mask" or border="zero"',
    ),
    ("kernel too large", attend(va.Neighborhood(2, 2)), ValueError, "height.*dilation=2 .*kernel_size <= 1, or"),
    ("kernel too large", attend(va.Neighborhood(2, (1, 5), is_causal=True)), ValueError, "width.*dilation <= 4, or"),
    ("span", lambda q, k, v: va.Row(2), ValueError, "odd.*span=2"),
    ("huge span", lambda q, k, v: va.Row(2**31 + 1), ValueError, "odd.*span=2147483649"),
    ("span", lambda q, k, v: va.Column(-1), ValueError, "span=-1"),
    ("span", lambda q, k, v: va.Row(True), TypeError, "span=True"),
    ("span", lambda q, k, v: va.Column(3.0), TypeError, "span=3.0"),
    ("backend", lambda q, k, v: va.attention(q, k, v, backend="gpu"), ValueError, "backend='gpu'"),
    ("backend", lambda q, k, v: va.attention(q, k, v, backend=None), TypeError, "backend=None"),
    ("points", lambda q, k, v: va.attention_map(q, k, [(3, 0)]), ValueError, r"0 <= y < 3 and 0 <= x < 4.*\(3, 0\)"),
    ("points", lambda q, k, v: va.attention_map(q, k, [(0, -1)]), ValueError, r"at=\(0, -1\)"),
    ("points", lambda q, k, v: va.attention_map(q, k, [(0.5, 1)]), TypeError, "pairs of integers"),
    ("points", lambda q, k, v: va.attention_map(q, k, [(0, 1, 2)]), ValueError, r"at\[0\]=\(0, 1, 2\)"),
    ("points", lambda q, k, v: va.attention_map(q, k, torch.zeros(1, 3).int()), ValueError, r"at.shape=\[1, 3\]"),
    ("points", lambda q, k, v: va.attention_map(q, k, torch.zeros(1, 2)), TypeError, "at.dtype=torch.float32"),
    ("points", lambda q, k, v: va.attention_map(q, k, {(0, 0)}), TypeError, "a sequence of pairs"),
    (
        "nested",
        lambda q, k, v: va.attention(torch.nested.nested_tensor([q[0]], layout=torch.jagged), k, v),
        RuntimeError,
        "nested",
    ),
    ("explain", lambda q, k, v: va.explain(q), TypeError, "k=NoneType"),
    ("explain", lambda q, k, v: va.explain(q, k, v, terms=5), TypeError, "terms=5"),
    ("explain", lambda q, k, v: va.explain(terms=5), TypeError, "terms=5"),
    ("explain", lambda q, k, v: va.explain(pattern="bogus"), TypeError, "pattern='bogus'"),
    ("explain", lambda q, k, v: va.explain(scale="1"), TypeError, "scale='1'"),
    ("points", lambda q, k, v: va.attention_map(q, k, [(0, 1), 2]), TypeError, r"pairs.*at\[1\]=2"),
    ("points", lambda q, k, v: va.attention_map(q, k, [(True, False)]), TypeError, r"at\[0\]=\(True, False\)"),
    ("points", lambda q, k, v: va.attention_map(q, k, [[q, 0]]), TypeError, r"at\[0\]=\[Tensor, 0\]$"),
    ("points", lambda q, k, v: va.attention_map(q, k, 3), TypeError, "at=3"),
    ("heads_last", lambda q, k, v: va.heads_last(q), RuntimeError, r"x of shape \[B, C, H, W\]"),
    ("heads_last", lambda q, k, v: va.heads_last(q[0], 3), ValueError, "divide the 4 channels.*heads=3"),
    ("heads_last", lambda q, k, v: va.heads_last(q[0], 1.0), TypeError, "heads=1.0"),
    ("channels_first", lambda q, k, v: va.channels_first(q[0]), RuntimeError, r"y.shape=\[3, 4, 2, 8\]$"),
    ("merge", lambda q, k, v: va.merge([]), ValueError, "at least one part"),
    ("merge", lambda q, k, v: va.merge(q), TypeError, "parts=Tensor"),
    ("merge", lambda q, k, v: va.merge([1]), TypeError, r"parts\[0\]=1$"),
    ("merge", lambda q, k, v: va.merge([(q, q), (q, q, q)]), TypeError, r"parts\[1\]=\(Tensor, Tensor, Tensor\)$"),
    ("merge", lambda q, k, v: va.merge([(q, q)]), RuntimeError, r"\[2, 3, 4, 2, 8\] and \[2, 3, 4, 2, 8\]"),
    ("merge", lambda q, k, v: va.merge([(q, q[..., 0]), (q[:1], q[:1, ..., 0])]), RuntimeError, "same shape"),
]


@pytest.mark.parametrize(("what", "call", "kind", "says"), BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)])
def test_bad_input(what: str, call, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind) as caught:
        call(*maps(Q, Q, Q))
    assert type(caught.value) is kind
    assert MESSAGE.search(str(caught.value)), caught.value
    assert re.search(says, str(caught.value), re.S), caught.value


def test_forced_backend_lists_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.to("meta") for x in maps(Q, Q, Q))
    with pytest.raises(RuntimeError, match=r"backend='cpu'.*tensors are on meta"):
        va.attention(q, k, v, backend="cpu")
    monkeypatch.setattr(cpu, "_failure", "the extension is missing")
    with pytest.raises(RuntimeError, match=r"It cannot: the extension is missing; the tensors are on meta"):
        va.attention(q, k, v, backend="cpu")


def test_fallback_warns_once_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_failure", "the extension is missing, says the test")
    monkeypatch.setattr(backends, "_warned", set())
    q, k, v = maps(Q, Q, Q)
    with pytest.warns(UserWarning, match="falling back to the reference.*missing, says the test") as caught:
        va.attention(q, k, v)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        va.attention(q, k, v)
    text = va.explain(q, k, v)
    assert "no: the extension is missing, says the test" in text
    assert "reference  yes, taken" in text


@needs_engine
def test_explain() -> None:
    q, k, v = maps(Q, Q, (2, 3, 4, 2, 5))
    text = va.explain(q, k, v)
    assert "queries 3x4, keys 3x4, 2 heads (2 of keys), D 8, Dv 5" in text
    assert re.search(r"^cpu +yes, taken", text, re.M)
    assert re.search(r"^reference +yes ", text, re.M)
    assert re.search(r"^cpu +yes \(", va.explain(), re.M)
    assert "no: the tensors are on meta" in va.explain(*(x.to("meta") for x in (q, k, v)))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_views_never_copy(memory: torch.memory_format) -> None:
    x = torch.randn(2, 12, 5, 7).contiguous(memory_format=memory)
    y = va.heads_last(x, 3)
    assert y.shape == (2, 5, 7, 3, 4)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y[1, 2, 3, 1], x[1, 4:8, 2, 3])
    back = va.channels_first(y)
    assert back.data_ptr() == x.data_ptr()
    assert torch.equal(back, x)
    assert back.stride() == x.stride()
    image = va.channels_first(torch.randn(2, 5, 7, 3, 4))
    assert image.is_contiguous(memory_format=torch.channels_last)


@needs_engine
def test_merge_is_exact_over_disjoint_keys() -> None:
    tensors = inputs(Case(dtype=torch.float64, keys=(9, 5)))
    q, k, v = (tensors[n] for n in "qkv")
    whole = va.attention(q, k, v, return_lse=True)
    cuts = [0, 2, 3, 9]
    parts = [va.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(va.merge(parts), whole, rtol=1e-13, atol=1e-13)
    nan = torch.full_like(whole[0], torch.nan), torch.full_like(whole[1], -torch.inf)
    torch.testing.assert_close(va.merge([nan, *parts]), whole, rtol=1e-13, atol=1e-13)  # what has no weight never leaks
    leaf = torch.full_like(whole[1], -torch.inf).requires_grad_()
    va.merge([(whole[0], leaf), (whole[0], leaf)])[0].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.eq(0).all()
    nothing = torch.zeros_like(whole[0]), torch.full_like(whole[1], -torch.inf)
    torch.testing.assert_close(va.merge([nothing, *parts]), whole, rtol=1e-13, atol=1e-13)
    assert torch.equal(va.merge([nothing])[0], nothing[0])
    assert torch.equal(va.merge([nothing, nothing])[1], nothing[1])


@needs_engine
def test_properties() -> None:
    tensors = inputs(Case(dtype=torch.float64, keys=(6, 8)))
    q, k, v = (tensors[n] for n in "qkv")
    out, lse = va.attention(q, k, v, return_lse=True)
    close = lambda x, y: torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    close(va.attention(q, k, torch.ones_like(v)), torch.ones_like(out))  # rows sum to 1
    close(va.attention(q, k + 3.0, v), out)  # one number per query added to all logits changes nothing ...
    close(va.attention(q, k + 3.0, v, return_lse=True)[1], lse + 3 * 8**-0.5 * q.sum(-1))  # ... but lse
    order = torch.randperm(48)
    mixed = [x.flatten(1, 2)[:, order].unflatten(1, (6, 8)) for x in (k, v)]
    close(va.attention(q, *mixed), out)  # the order of keys does not matter
    close(va.attention(2 * q, k, v, scale=0.5 * 8**-0.5), out)
    rows = va.attention_map(q, k, torch.tensor([[4, 6], [0, 2]]))
    close(torch.einsum("bphyx,byxhd->bphd", rows, v), torch.stack([out[:, 4, 6], out[:, 0, 2]], 1))
    close(torch.einsum("byxh,byxhd->bhd", va.attention_received(q, k), v), out.sum((1, 2)))


EVERY_PATTERN = (
    va.Global(),
    va.Window(3, 1),
    va.Grid((2, 3)),
    va.Neighborhood(3, 2, "zero", (True, False)),
    va.Row(3),
    va.Column(),
    va.CrissCross(),
)


def test_patterns_copy_and_pickle() -> None:
    for pattern in EVERY_PATTERN:
        assert copy.deepcopy(pattern) == pattern
        assert pickle.loads(pickle.dumps(pattern)) == pattern
        assert hash(pattern) == hash(copy.deepcopy(pattern))
        assert pattern.mask is not None


def test_terms_copy_and_pickle() -> None:
    table = torch.arange(15.0).view(1, 3, 5)
    terms = [va.RelativeBias(table), va.RelativeQuery(table[0], scale=0.5), va.RelativeKey(rel_w=table[0], scale=2)]
    terms += [va.RelativeValue(table[0], table[0]), va.KeyBias(table)]
    for term in terms:
        for twin in (copy.deepcopy(term), pickle.loads(pickle.dumps(term))):
            assert type(twin) is type(term)
            assert twin != term  # identity: tensors have no other cheap equality
            for field in term.__dataclass_fields__:
                x, y = getattr(twin, field), getattr(term, field)
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_terms_are_told() -> None:
    q, k, v = maps(Q, Q, Q)
    text = va.explain(q, k, v, va.Window(2), terms=(va.KeyBias(zeros(2, 3, 4)), va.RelativeValue(zeros(3, 8))))
    assert "Window(window_size=(2, 2), shift=(0, 0)) with KeyBias, RelativeValue on cpu" in text


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_engine)])
@pytest.mark.parametrize("pattern", EVERY_PATTERN[1:], ids=lambda pattern: type(pattern).__name__)
def test_equals_masked_global_attention(pattern, backend: str) -> None:
    """A local pattern is global attention with scores of -inf outside it; one key bias per query says the same."""
    tensors = inputs(Case(dtype=torch.float64, batch=1, queries=(6, 7), keys=(6, 7)))
    q, k, v = (tensors[n] for n in "qkv")
    grid = Size(6, 7)
    if pattern.margin() != ((0, 0), (0, 0)):
        pattern = va.Neighborhood(3, 2, "mask", (True, False))
    mask = pattern.mask(grid, grid)
    rows = va.attention(q, k, v, pattern, backend=backend)
    for y, x in ((0, 0), (2, 3), (5, 6)):
        bias = torch.zeros(1, 6, 7, dtype=torch.float64).masked_fill(~mask[y, x], -torch.inf)
        alone = va.attention(q[:, y : y + 1, x : x + 1], k, v, terms=(va.KeyBias(bias),), backend=backend)
        torch.testing.assert_close(rows[:, y, x], alone[:, 0, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_engine)])
def test_value_terms_change_no_weight(backend: str) -> None:
    q, k, _ = maps(Q, Q, Q)
    across = va.RelativeValue(rel_w=zeros(5, 9))  # of any width: there are no values
    rows = va.attention_map(q, k, [(0, 0)], va.Row(3), terms=(across,), backend=backend)
    assert torch.equal(rows, va.attention_map(q, k, [(0, 0)], va.Row(3), backend=backend))
    sums = va.attention_received(q, k, va.Window(2), terms=(va.RelativeValue(zeros(3, 5)),), backend=backend)
    assert torch.equal(sums, va.attention_received(q, k, va.Window(2), backend=backend))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_engine)])
def test_what_rows_and_columns_of_the_map_sum_to(backend: str) -> None:
    """1 for each query, less what zeros around the map take; 0 for a query with no key."""
    q = torch.zeros(1, 3, 3, 2, 4)
    for pattern, total in ((va.Global(), 9), (va.Neighborhood(3, border="zero"), 49 / 9)):  # 4+6+4, 6+9+6, 4+6+4 ninths
        rows = va.attention_map(q, q, [(0, 0), (1, 1)], pattern, backend=backend).sum((-2, -1))
        wanted = torch.tensor([1.0 if total == 9 else 4 / 9, 1.0])[None, :, None].expand(1, 2, 2)
        torch.testing.assert_close(rows, wanted)
        received = va.attention_received(q, q, pattern, backend=backend).sum()
        torch.testing.assert_close(received, torch.tensor(2.0 * total))
    nothing = (va.KeyBias(torch.full((1, 3, 3), -torch.inf)),)
    assert va.attention_map(q, q, [(0, 0)], terms=nothing, backend=backend).eq(0).all()
    assert va.attention_received(q, q, terms=nothing, backend=backend).eq(0).all()


@needs_engine
def test_module_with_attention_copies_and_pickles() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pattern = va.Global()
            self.project = torch.nn.Conv2d(4, 12, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (va.heads_last(y, 2) for y in self.project(x).chunk(3, 1))
            return va.channels_first(va.attention(q, k, v, self.pattern))

    layer, x = Layer(), torch.randn(2, 4, 5, 6)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    twin.load_state_dict(layer.state_dict())
    twin(x).sum().backward()
    layer.pattern = pickle.loads(pickle.dumps(layer.pattern))
    assert torch.equal(twin(x), layer(x))
