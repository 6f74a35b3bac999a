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

needs_engine = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))
MESSAGE = re.compile(r"visattn: expected .+, but got .+=")


def maps(*shapes, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def jagged(x: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([x[0]], layout=torch.jagged)


Q = (2, 3, 4, 2, 8)
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
    ("pattern class", lambda q, k, v: va.attention(q, k, v, va.Global), TypeError, "pattern="),
    ("scale", lambda q, k, v: va.attention(q, k, v, scale="1"), TypeError, "scale='1'"),
    ("scale", lambda q, k, v: va.attention(q, k, v, scale=True), TypeError, "scale=True"),
    ("terms", lambda q, k, v: va.attention(q, k, v, terms=3), TypeError, "terms=3"),
    ("backend", lambda q, k, v: va.attention(q, k, v, backend="gpu"), ValueError, "backend='gpu'"),
    ("backend", lambda q, k, v: va.attention(q, k, v, backend=None), TypeError, "backend=None"),
    ("points", lambda q, k, v: va.attention_map(q, k, [(3, 0)]), ValueError, r"0 <= y < 3 and 0 <= x < 4.*\(3, 0\)"),
    ("points", lambda q, k, v: va.attention_map(q, k, [(0, -1)]), ValueError, r"at=\(0, -1\)"),
    ("points", lambda q, k, v: va.attention_map(q, k, [(0.5, 1)]), TypeError, "pairs of integers"),
    ("points", lambda q, k, v: va.attention_map(q, k, [(0, 1, 2)]), ValueError, r"at=\[\(0, 1, 2\)\]"),
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
    ("points", lambda q, k, v: va.attention_map(q, k, [(0, 1), 2]), TypeError, "pairs"),
    ("points", lambda q, k, v: va.attention_map(q, k, 3), TypeError, "at=3"),
    ("heads_last", lambda q, k, v: va.heads_last(q), RuntimeError, r"x of shape \[B, C, H, W\]"),
    ("heads_last", lambda q, k, v: va.heads_last(q[0], 3), ValueError, "divide the 3 channels|heads=3"),
    ("heads_last", lambda q, k, v: va.heads_last(q[0], 1.0), TypeError, "heads=1.0"),
    ("channels_first", lambda q, k, v: va.channels_first(q[0]), RuntimeError, "y.shape"),
    ("merge", lambda q, k, v: va.merge([]), ValueError, "at least one part"),
    ("merge", lambda q, k, v: va.merge(q), TypeError, "parts=Tensor"),
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


def test_patterns_copy_and_pickle() -> None:
    for pattern in (va.Global(),):
        assert copy.deepcopy(pattern) == pattern
        assert pickle.loads(pickle.dumps(pattern)) == pattern
        assert hash(pattern) == hash(copy.deepcopy(pattern))
        assert pattern.mask is not None


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
