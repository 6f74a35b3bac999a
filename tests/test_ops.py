"""The operators as citizens of torch: opcheck, compile, export, autocast, vmap."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from cases import DTYPES, TERM_CASES, Case, TermCase, inputs

import visattn_kernels as va
from visattn_kernels import ops
from visattn_kernels.backends import cpu
from visattn_kernels.dynamo import constant
from visattn_kernels.terms import TERM_TENSORS

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))

EVERYTHING = tuple(options[0] for options in TERM_CASES)  # every term
CALL = (0.7, 1.0, 1.0, va.Global().encode())
SHAPES = [
    Case(heads=4, kv_heads=2, value_dim=5, keys=(3, 4)),
    Case(layouts=("nchw", "packed", "transposed", "nchw")),
    Case(batch=0),
]


@pytest.mark.fast
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.id)
def test_opcheck(case: Case, dtype: torch.dtype) -> None:
    tensors = inputs(Case(**{**vars(case), "dtype": dtype}))
    q, k, v = (tensors[n] for n in "qkv")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = ops.operator("cpu", "forward")(q, k, v, *ops.NO_TERMS, *CALL)
    for args in ((q, k, v), leaves):
        torch.library.opcheck(ops.operator("cpu", "forward"), (*args, *ops.NO_TERMS, *CALL))
    grads = tensors["grad_out"], tensors["grad_lse"]
    for needs in (7, 1, 2, 4, 0):
        args = (*grads, q, k, v, *ops.NO_TERMS, out, lse, *CALL, needs)
        torch.library.opcheck(ops.operator("cpu", "backward"), args)
    at = torch.tensor([[0, 0], [2, 3]])
    torch.library.opcheck(ops.operator("cpu", "map"), (q, k, *ops.NO_TERMS, at, *CALL))
    torch.library.opcheck(ops.operator("cpu", "received"), (q, k, *ops.NO_TERMS, *CALL))


LOCAL = [
    Case(batch=1, keys=(5, 7), pattern=pattern, terms=terms, heads=2, kv_heads=1, head_dim=3, value_dim=2)
    for pattern in (va.Window((2, 3), 1), va.Neighborhood(3, border="zero"), va.CrissCross())
    for terms in ((), EVERYTHING, (TermCase("RelativeQuery", sides="w", layout="transposed"),))
]


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LOCAL, ids=lambda case: case.id)
def test_opcheck_of_patterns_and_terms(case: Case, dtype: torch.dtype) -> None:
    tensors = inputs(replace(case, dtype=dtype))
    q, k, v = (tensors[n] for n in "qkv")
    terms = tuple(tensors.get(name) for name in TERM_TENSORS)
    scalars = (0.7, 0.5, -0.3, case.pattern.encode())
    wants = lambda x: None if x is None else x.detach().requires_grad_()
    out, lse = ops.operator("cpu", "forward")(q, k, v, *terms, *scalars)
    for args in ((q, k, v, *terms), tuple(wants(x) for x in (q, k, v, *terms))):
        torch.library.opcheck(ops.operator("cpu", "forward"), (*args, *scalars))
    present = sum(1 << i for i, x in enumerate((q, k, v, *terms)) if x is not None)
    for needs in (present, present & ~7, 5):
        args = (tensors["grad_out"], tensors["grad_lse"], q, k, v, *terms, out, lse, *scalars, needs)
        torch.library.opcheck(ops.operator("cpu", "backward"), args)
    scores = tuple(None if name.startswith("relative_value") else tensors.get(name) for name in TERM_TENSORS)
    at = torch.tensor([[0, 0], [4, 3]])
    torch.library.opcheck(ops.operator("cpu", "map"), (q, k, *scores, at, *scalars))
    torch.library.opcheck(ops.operator("cpu", "received"), (q, k, *scores, *scalars))


def attend(case: Case, backend: str = "auto"):
    """A call of a case's pattern and terms; a function of q, k, v and the term tensors, in schema order."""

    def f(*leaves: torch.Tensor):
        q, k, v, *extra = leaves
        terms = case.build_terms(dict(zip(case.term_tensors, extra, strict=True)))
        return va.attention(q, k, v, case.pattern, terms=terms, backend=backend, return_lse=True)

    return f


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", LOCAL, ids=lambda case: case.id)
def test_compile_patterns_and_terms(case: Case, backend: str) -> None:
    """Of any size; the reference of this one, whose gathers in symbols take minutes to prove anything about."""
    torch._dynamo.reset()
    f = attend(case, backend)
    loss = lambda *leaves: sum(x.sin().sum() for x in f(*leaves))
    compiled = torch.compile(loss, fullgraph=True, dynamic=backend == "cpu", backend="aot_eager")
    tensors = inputs(case)
    close_with_gradients(loss, compiled, *(tensors[name] for name in ("q", "k", "v", *case.term_tensors)))


def test_export_of_patterns_and_terms() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pattern = va.Window(3, 1)
            self.table, self.rel = torch.nn.Parameter(torch.randn(2, 5, 5)), torch.nn.Parameter(torch.randn(5, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = va.heads_last(x, 2)
            terms = (va.RelativeBias(self.table), va.RelativeQuery(self.rel, scale=0.5))
            return va.channels_first(va.attention(q, q, q, self.pattern, terms=terms))

    layer, x = Layer(), torch.randn(2, 8, 5, 6)
    dims = {"x": {0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim("height", min=2, max=64)}}
    program = torch.export.export(layer, (x,), dynamic_shapes=dims, strict=True)
    for shape in ((2, 8, 5, 6), (3, 8, 9, 6)):
        y = torch.randn(shape)
        torch.testing.assert_close(program.module()(y), layer(y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_terms(dtype: torch.dtype) -> None:
    case = Case(pattern=va.Window(3), terms=EVERYTHING)
    tensors = inputs(case)
    leaves = [tensors[name].requires_grad_() for name in ("q", "k", "v", *case.term_tensors)]
    with torch.autocast("cpu", dtype=dtype):
        out, lse = attend(case)(*leaves)
        terms = case.build_terms(tensors)
        assert va.attention_map(leaves[0], leaves[1], [(0, 0)], case.pattern, terms=terms).dtype == torch.float32
        assert va.attention_received(leaves[0], leaves[1], case.pattern, terms=terms).dtype == torch.float32
        assert "bfloat16" in (text := va.explain(*leaves[:3], case.pattern, terms=terms)) or "float16" in text
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    with torch.no_grad():
        assert torch.equal(out, attend(case)(*(x.to(dtype) for x in leaves))[0])
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert [x.dtype for x in grads] == [torch.float32] * len(leaves)


@pytest.mark.parametrize(("bias", "lse"), [(-65519.0, -65504.0), (-65521.0, -torch.inf)])
def test_autocast_to_float16_ends_at_its_range(bias: float, lse: float) -> None:
    q = torch.zeros(1, 1, 1, 1, 4)
    with torch.autocast("cpu", dtype=torch.float16):
        got = va.attention(q, q, q, terms=(va.KeyBias(torch.tensor([[[bias]]])),), return_lse=True)[1]
    assert float(got) == lse


@pytest.mark.parametrize("case", [LOCAL[1], LOCAL[4]], ids=lambda case: case.id)
def test_vmap_with_terms(case: Case) -> None:
    tensors = inputs(case)
    leaves = [tensors[name] for name in ("q", "k", "v", *case.term_tensors)]
    stacks = [torch.stack([x, x * 0.5, x.flip(-1)]) for x in leaves]
    stacks[-1] = leaves[-1]  # one key bias for all
    dims = (*(0,) * (len(leaves) - 1), None)
    results = torch.vmap(attend(case), in_dims=dims)(*stacks)
    for i in range(3):
        alone = attend(case)(*(x if d is None else x[i] for x, d in zip(stacks, dims, strict=True)))
        torch.testing.assert_close([x[i] for x in results], list(alone), rtol=0, atol=0)


def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """In float64, so that the order of the sum, which a compiler chooses, is not what is compared."""
    out, lse = va.attention(q, k, v, return_lse=True)
    return (out.double() * 2).sum() + lse.double().sin().sum()


def close_with_gradients(f, g, *inputs) -> None:
    """Hold two functions' values and gradients together."""
    both = []
    for function in (f, g):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        both.append((y.detach(), *torch.autograd.grad(y, leaves)))
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_dynamic(backend: str) -> None:
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for height, width, heads in ((5, 7, 2), (6, 9, 2), (4, 4, 2)):
        case = Case(queries=(height, width), keys=(height, width), heads=heads)
        tensors = inputs(case)
        close_with_gradients(step, compiled, *(tensors[n] for n in "qkv"))


def test_no_recompilation_across_batch_sizes() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for batch in (11, 3, 4, 6):  # none equal to another size, which torch would take for the same symbol
        tensors = inputs(Case(batch=batch))
        compiled(*(tensors[n].requires_grad_() for n in "qkv")).backward()
    assert counter.frame_count == 1


def test_no_graph_break() -> None:
    at = torch.tensor([[3, 4], [0, 0]])

    def everything(x: torch.Tensor) -> torch.Tensor:
        q = va.heads_last(x, 2)
        out, lse = va.attention(q, q, q, va.Global(), scale=0.3, return_lse=True)
        out, lse = va.merge([(out, lse), (out, lse)])
        lse = lse + va.attention_map(q, q, [(0, 1), (2, 3)]).sum() + va.attention_map(q, q, at).sum()
        return va.channels_first(out) + va.attention_received(q, q).mean() + lse.mean()

    torch._dynamo.reset()
    x = torch.randn(1, 8, 4, 5)
    torch.testing.assert_close(torch.compile(everything, fullgraph=True, backend="aot_eager")(x), everything(x))
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(everything)(x)
    assert explanation.graph_break_count == 0, explanation.break_reasons


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_map_that_is_only_read_compiles(backend: str) -> None:
    """Parameters require grad, and so do the map's rows and sums: nothing raises until their gradient is asked for."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.bias = torch.nn.Conv2d(4, 8, 1), torch.nn.Parameter(torch.randn(1, 4, 5))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            q = va.heads_last(self.project(x), 2)
            terms = (va.KeyBias(self.bias),)
            rows = va.attention_map(q, q, [(0, 1)], terms=terms)
            return va.attention(q, q, q, terms=terms), va.attention_received(q, q, terms=terms), rows

    torch._dynamo.reset()
    layer, x = Layer(), torch.randn(1, 4, 4, 5)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = []
    for module in (layer, compiled):
        outputs = module(x)
        results.append((outputs, torch.autograd.grad(outputs[0].sin().sum(), [*layer.parameters()])))
    torch.testing.assert_close(*results)
    for result, what in ((1, "attention_received"), (2, "attention_map")):
        with pytest.raises(NotImplementedError, match=rf'visattn: .*no gradient of {what}.*backend="reference"'):
            compiled(x)[result].sum().backward()


def test_refused_gradients() -> None:
    """A map's gradient is refused by vmap too, and what a gradient of zeros gives has no silent gradient of its own."""
    q = inputs(Case())["q"].requires_grad_()
    refused = pytest.raises(NotImplementedError, match="no gradient of attention_received")
    sums = va.attention_received(q, q)
    with refused:
        torch.autograd.grad(sums, q, torch.randn(3, *sums.shape), is_grads_batched=True)
    with refused:
        torch.vmap(lambda x: va.attention_received(x, x))(q[None]).sum().backward()
    zeros = torch.zeros_like(sums).requires_grad_()
    (grad,) = torch.autograd.grad(va.attention_received(q, q), q, zeros, create_graph=True)
    assert torch.equal(grad, torch.zeros_like(q))
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()
    torch.library.opcheck(torch.ops.visattn.refuse_gradient.default, (zeros.detach(), "a test"))


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    """`constant` is `torch.compiler.assume_constant_result` without its imports: called once, never traced."""
    calls: list[int] = []

    def count() -> int:
        calls.append(1)
        return len(calls)

    constant(count)
    compiled = torch.compile(lambda x: x * count(), backend="eager", fullgraph=True)
    assert [compiled(torch.ones(())).item() for _ in range(3)] == [1, 1, 1]
    assert vars(count) == vars(torch.compiler.assume_constant_result(lambda: 1))


def test_errors_are_of_the_same_type_under_compile() -> None:
    torch._dynamo.reset()
    q, k = torch.randn(1, 2, 3, 1, 4), torch.randn(1, 2, 3, 1, 5)
    for fullgraph in (False, True):
        with pytest.raises(RuntimeError, match="agree in D"):
            torch.compile(lambda q, k: va.attention(q, k, k), backend="eager", fullgraph=fullgraph)(q, k)


def test_export() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = va.heads_last(x, 2)
            return va.channels_first(va.attention(q, q, q))

    x = torch.randn(2, 8, 5, 6)
    dims = {"x": {0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim("height", min=2, max=64)}}
    program = torch.export.export(Layer(), (x,), dynamic_shapes=dims, strict=True)
    assert "visattn.cpu_forward" in str(program.graph)
    for shape in ((2, 8, 5, 6), (3, 8, 9, 6)):
        y = torch.randn(shape)
        torch.testing.assert_close(program.module()(y), Layer()(y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_all_three(dtype: torch.dtype) -> None:
    """Autocast may hand q and k in one dtype and v in another."""
    tensors = inputs(Case())
    q, k, v = (tensors[n].requires_grad_() for n in "qkv")
    with torch.autocast("cpu", dtype=dtype):
        out, lse = va.attention(q.to(dtype), k.to(dtype), v, return_lse=True)
        received = va.attention_received(q, k)
        rows = va.attention_map(q, k, [(0, 0)])
    assert (out.dtype, lse.dtype, received.dtype, rows.dtype) == (dtype, *(torch.float32,) * 3)
    with torch.no_grad():
        expected = va.attention(*(x.to(dtype) for x in (q, k, v)))
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert [x.grad.dtype for x in (q, k, v)] == [torch.float32] * 3
    with torch.autocast("cpu", dtype=dtype):
        doubles = [x.double() for x in (q, k, v)]
        assert va.attention(*doubles).dtype == torch.float64


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 2), (None, 3, None)])
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    tensors = inputs(Case(batch=2, heads=2, kv_heads=1, value_dim=5, keys=(3, 4)))

    def mapped(x: torch.Tensor, dim: int | None) -> torch.Tensor:
        return x if dim is None else torch.stack([x, x.flip(1), x * 0.5], dim)

    args = [mapped(tensors[n], dim) for n, dim in zip("qkv", in_dims, strict=True)]
    f = lambda q, k, v: va.attention(q, k, v, return_lse=True)
    results = torch.vmap(f, in_dims=in_dims)(*args)
    for i in range(3):
        alone = f(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)))
        for x, y in zip(results, alone, strict=True):
            assert torch.equal(x[i], y)
    if in_dims[2] is None:
        return
    got = torch.vmap(lambda q, k: va.attention_map(q, k, [(1, 1), (0, 3)]), in_dims=in_dims[:2])(*args[:2])
    alone = [
        va.attention_map(
            *(x if d is None else x.select(d, i) for x, d in zip(args[:2], in_dims[:2], strict=True)), [(1, 1), (0, 3)]
        )
        for i in range(3)
    ]
    assert torch.equal(got, torch.stack(alone))


def test_vmap_over_points_and_over_nothing() -> None:
    tensors = inputs(Case())
    q, k = tensors["q"], tensors["k"]
    at = torch.tensor([[[0, 0], [4, 6]], [[1, 2], [3, 4]], [[2, 2], [0, 5]]])
    got = torch.vmap(lambda points: va.attention_map(q, k, points))(at)
    assert torch.equal(got, torch.stack([va.attention_map(q, k, points) for points in at]))
    nothing = torch.zeros(0, *q.shape)
    assert torch.vmap(lambda x: va.attention(x, x, x))(nothing).shape == (0, *q.shape)
    bias = torch.zeros(q.shape[:3])
    tables = torch.zeros(0, 2, 5, 5, requires_grad=True)  # shared by the maps of a slice, of which there is none
    for terms in (lambda _: (va.KeyBias(bias),), lambda table: (va.RelativeBias(table),)):
        f = lambda x, table, terms=terms: va.attention(x, x, x, va.Window(3), terms=terms(table), return_lse=True)
        for dim in (0, 2):
            out, lse = torch.vmap(f, in_dims=(dim, 0))(nothing.movedim(0, dim), tables)
            assert (out.shape, lse.shape) == ((0, *q.shape), (0, *q.shape[:4]))
    assert torch.autograd.grad(out.sum() + lse.sum(), tables)[0].shape == tables.shape
    rows = torch.vmap(lambda x: va.attention_map(x, x, [(0, 1)], terms=(va.KeyBias(bias),)))(nothing)
    assert rows.shape == (0, q.shape[0], 1, q.shape[3], *q.shape[1:3])


@pytest.mark.parametrize("which", ["attention", "attention_map", "attention_received"])
def test_forward_mode_raises_and_is_never_silently_wrong(which: str) -> None:
    q = inputs(Case())["q"]
    call = {
        "attention": lambda x: va.attention(x, q, q),
        "attention_map": lambda x: va.attention_map(x, q, [(0, 0)]),
        "attention_received": lambda x: va.attention_received(x, q),
    }[which]
    with pytest.raises(NotImplementedError, match=r'forward-mode.*backend="reference"'):
        torch.func.jvp(call, (q,), (q,))
    table = q[0, :, 0, 0, :1]  # [5, 1]: a table of K = 3
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(
            lambda x: va.attention(q, q, q, va.Window(3), terms=(va.RelativeQuery(x.expand(5, 8)),)), (table,), (table,)
        )
    with torch.autograd.forward_ad.dual_level():
        call(q)  # no tangent: nothing to refuse
        with pytest.raises(NotImplementedError, match="forward-mode"):
            call(torch.autograd.forward_ad.make_dual(q, q))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, q: torch.func.grad(lambda x: f(x).sum())(q),
        lambda f, q: torch.func.vjp(f, q)[1](f(q)),
        lambda f, q: torch.func.jacrev(f)(q),
        lambda f, q: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(q[None]),
        lambda f, q: torch.func.grad(lambda x: torch.vmap(f)(x[None]).sum())(q),
    ],
    ids=["grad", "vjp", "jacrev", "vmap-grad", "grad-vmap"],
)
def test_torch_func_raises_and_names_the_alternative(transform) -> None:
    q = inputs(Case(dtype=torch.float64, batch=1, queries=(2, 2), keys=(2, 2), heads=1, kv_heads=1))["k"]
    calls = (
        lambda x, backend: va.attention(x, x, x, backend=backend),
        lambda x, backend: va.attention_received(q, x, backend=backend),
        lambda x, backend: va.attention_map(x, q, [(0, 0)], backend=backend),
        lambda x, backend: va.attention(q, q, q, terms=(va.KeyBias(x[..., 0]),), backend=backend),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match=r'visattn: .*torch.func.grad.*backend="reference"'):
            transform(lambda x, call=call: call(x, "cpu"), q)
        transform(lambda x, call=call: call(x, "reference"), q)
        leaf = q.clone().requires_grad_()  # outside of the transform: nothing to refuse
        torch.vmap(lambda x, call=call: call(x, "cpu"))(leaf[None])


def test_torch_func_takes_what_wants_no_gradient() -> None:
    q = inputs(Case())["q"]

    def constant(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return va.attention(x, q, q).sum()

    for function in (constant, lambda x: va.attention(x.detach(), q, q).sum()):
        grad, value = torch.func.grad_and_value(lambda x, f=function: f(x) + x.sum())(q)
        assert torch.equal(grad, torch.ones_like(q))
        torch.testing.assert_close(value, function(q) + q.sum())


def test_fakes_check_what_kernels_check() -> None:
    q = torch.zeros(1, 2, 2, 1, 3)
    for args in ((q.to("meta"), q, q), (q, q.to("meta"), q), (q.to("meta"), q.to("meta")[..., :2], q.to("meta"))):
        with pytest.raises(RuntimeError, match="visattn: expected"):
            ops.operator("cpu", "forward")(*args, *ops.NO_TERMS, *CALL)


def test_gradients_through_vmap() -> None:
    tensors = inputs(Case(batch=3))
    leaves = [tensors[n].clone().requires_grad_() for n in "qkv"]
    f = lambda q, k, v: va.attention(q[None], k[None], v[None])[0].pow(2).sum()
    got = torch.autograd.grad(torch.vmap(f)(*leaves).sum(), leaves)
    expected = torch.autograd.grad(va.attention(*leaves).pow(2).sum(), leaves)
    torch.testing.assert_close(got, expected)


def test_saved_tensors_are_not_on_the_context() -> None:
    """Saved tensors go through save_for_backward: hooks see them, and nothing lives on the context."""
    tensors = inputs(Case())
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.shape) or x, lambda x: x):
        out = va.attention(*(tensors[n].requires_grad_() for n in "qkv"))
    assert len(packed) == 5  # q, k, v, out, lse
    assert out.grad_fn is not None
    assert not any(isinstance(value, torch.Tensor) for value in out.grad_fn.call)


def test_saved_term_tensors_are_not_on_the_context() -> None:
    case = Case(pattern=va.Window(3), terms=EVERYTHING)
    tensors = inputs(case)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.shape) or x, lambda x: x):
        out, _ = attend(case, "cpu")(*(tensors[n].requires_grad_() for n in ("q", "k", "v", *case.term_tensors)))
    assert len(packed) == 5 + len(TERM_TENSORS)
    assert not any(isinstance(value, torch.Tensor) for value in out.grad_fn.call)
