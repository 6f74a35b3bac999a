"""The custom operators: schemas, fakes, autograd, autocast and vmap, once for every backend.

Each backend with kernels has a family of four operators, made from one set of schemas:

    visattn::<backend>_forward    out and lse
    visattn::<backend>_backward   gradients of q, k, v and of every term tensor
    visattn::<backend>_map        rows of the map
    visattn::<backend>_received   column sums of the map

and all share visattn::refuse_gradient, which stands where a gradient is not there.

They are declared here, in Python, so that they exist with no compiled part; a backend only adds the kernels. The
schemas hold every pattern (a list of integers) and every term (optional tensors) of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from visattn_kernels.problem import accumulate_dtype, check_tensors
from visattn_kernels.terms import TERM_TENSORS

DIFFERENTIABLE = ("q", "k", "v", *TERM_TENSORS)
"""What `<backend>_backward` returns gradients of, in order; bit i of `needs` asks for the i-th."""

NO_TERMS: tuple[None, ...] = (None,) * len(TERM_TENSORS)

_TERMS = ", ".join(f"Tensor? {name}" for name in TERM_TENSORS)
_CALL = "float scale, float relative_query_scale, float relative_key_scale, int[] pattern"
SCHEMAS = {
    "forward": f"(Tensor q, Tensor k, Tensor v, {_TERMS}, {_CALL}) -> (Tensor out, Tensor lse)",
    "backward": f"(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, {_TERMS}, Tensor out, Tensor lse, "
    f"{_CALL}, int needs) -> ({', '.join(f'Tensor grad_{name}' for name in DIFFERENTIABLE)})",
    "map": f"(Tensor q, Tensor k, {_TERMS}, Tensor at, {_CALL}) -> Tensor",
    "received": f"(Tensor q, Tensor k, {_TERMS}, {_CALL}) -> Tensor",
}
"""The schemas of one family."""

FAMILIES = {"cpu": tuple(SCHEMAS), "triton": tuple(SCHEMAS), "cuda": ("forward", "backward")}
"""The operators of each backend that has some."""

_library = torch.library.Library("visattn", "DEF")  # type: ignore[no-untyped-call]

_N_TERMS = len(TERM_TENSORS)
_N_GRADS = len(DIFFERENTIABLE)


# Asked here, since Dynamo traces this question from torch 2.12 on only; torch raises for devices without autocast.
_AUTOCAST = tuple(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))


def operator(backend: str, which: str) -> Callable[..., Any]:
    """The operator `which` (a key of `SCHEMAS`) of a backend's family."""
    packet: Callable[..., Any] = getattr(torch.ops.visattn, f"{backend}_{which}").default
    return packet


def implement(backend: str, kernels: Mapping[str, Callable[..., Any]], devices: Sequence[str]) -> None:
    """Add the kernels of a family that are Python functions, by operator.

    Args:
        backend: the family.
        kernels: functions that take what the schema says.
        devices: torch's names of the devices whose tensors they take.
    """
    for which, kernel in kernels.items():
        for device in devices:
            _library.impl(f"{backend}_{which}", kernel, device)  # type: ignore[no-untyped-call]


def autocasts(device: str) -> bool:
    """Whether an autocast is enabled for a type of device."""
    return device in _AUTOCAST and torch.is_autocast_enabled(device)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast to the dtype of an enabled autocast; float64 is left alone, as torch's own operators do."""
    device = tensors[0].device.type
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def refuse_transforms(*tensors: torch.Tensor | None) -> None:
    """Raise for derivatives that torch would drop, silently wrong (forward mode), or refuse obscurely (torch.func)."""
    present = [x for x in tensors if x is not None]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and any(map(_tracked, present)):
        raise NotImplementedError(
            "visattn: expected no torch.func.grad, vjp or jacrev, which torch keeps from custom operators; "
            'backend="reference" has them, and so has ordinary autograd, also through torch.vmap'
        )
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in present):  # type: ignore[no-untyped-call]
        raise NotImplementedError(
            "visattn: expected no forward-mode derivative, which is not there yet; "
            'backend="reference" has derivatives of every mode and order'
        )


def _tracked(x: torch.Tensor) -> bool:
    """Whether a transform of torch.func wants the gradient of a tensor, under any number of others."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x) and x.requires_grad:
            return True
        x = functorch.get_unwrapped(x)
    return False


def _fake_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    check_tensors(q, k, v)
    shape = q.shape[:4]
    return q.new_empty((*shape, v.shape[4])), q.new_empty(shape, dtype=accumulate_dtype(q.dtype))


def _fake_backward(grad_out: torch.Tensor, grad_lse: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    needs = rest[-1]
    check_tensors(*rest[:3])
    return tuple(
        x.new_empty(x.shape) if x is not None and needs >> i & 1 else grad_out.new_empty((0,))
        for i, x in enumerate(rest[:_N_GRADS])
    )


def _fake_map(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
    check_tensors(q, k, None)
    at = rest[_N_TERMS]
    shape = (q.shape[0], at.shape[0], q.shape[3], k.shape[1], k.shape[2])
    return q.new_empty(shape, dtype=accumulate_dtype(q.dtype))


def _fake_received(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
    check_tensors(q, k, None)
    return q.new_empty(k.shape[:4], dtype=accumulate_dtype(q.dtype))


_FAKES: dict[str, Callable[..., Any]] = {
    "forward": _fake_forward,
    "backward": _fake_backward,
    "map": _fake_map,
    "received": _fake_received,
}


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_N_GRADS], *output)
    ctx.call = inputs[_N_GRADS:]


def _differentiate(backend: str) -> Callable[..., tuple[Any, ...]]:
    """The gradient of a family's forward operator: its backward operator."""

    def backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[Any, ...]:
        needs = sum(1 << i for i in range(_N_GRADS) if ctx.needs_input_grad[i])
        grads = operator(backend, "backward")(grad_out, grad_lse, *ctx.saved_tensors, *ctx.call, needs)
        wanted = (grad if needs >> i & 1 else None for i, grad in enumerate(grads))
        return (*wanted, *(None for _ in ctx.call))

    return backward


def _raise_on(what: str) -> Callable[..., NoReturn]:
    """An autograd formula for what is not differentiable: it says so."""

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        _refuse(what)

    return backward


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"visattn: expected no gradient of {what}, which is not there yet; "
        'backend="reference" is differentiable any number of times'
    )


def _save_shapes(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.shapes = [x.shape if isinstance(x, torch.Tensor) else None for x in inputs]


def _raise_when_run(what: str) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    """As `_raise_on`, but when it is run: `torch.compile` traces the formula of every result, used or not."""

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        zero = torch.ops.visattn.refuse_gradient(grad, what)
        return tuple(
            zero.expand(shape) if shape is not None and needed else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        )

    return backward


def _refuse_gradient(grad: torch.Tensor, what: str) -> torch.Tensor:
    """Raise, or give a zero where the gradient is zero: a compiled backward has zeros for results that nobody used."""
    if grad.any():
        _refuse(what)
    return grad.new_zeros(())


def _refuse_batched(info: Any, in_dims: tuple[Any, ...], grad: torch.Tensor, what: str) -> tuple[torch.Tensor, None]:
    return torch.ops.visattn.refuse_gradient(grad, what), None


def _batched(backend: str, which: str, maps: tuple[int, ...]) -> Callable[..., tuple[Any, Any]]:
    """The vmap rule of an operator: fold the mapped dimension into the batch.

    Where a term tensor is present the operator runs once per slice, since a shared table's gradient must not be
    summed over the mapped dimension.

    Args:
        backend: the family.
        which: the operator.
        maps: positions of the arguments that have a leading batch dimension.
    """

    def fold(x: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
        x = x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
        return x.flatten(0, 1)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        op, size = operator(backend, which), info.batch_size
        dims = [dim if isinstance(dim, int) else None for dim in in_dims]  # a list argument has a list of None
        has_terms = any(args[i] is not None for i in term_slots)
        if not has_terms and all(i in maps for i, dim in enumerate(dims) if dim is not None):
            folded = (fold(x, dims[i], size) if i in maps else x for i, x in enumerate(args))
            results = op(*folded)
            first, dim = args[maps[0]], dims[maps[0]]
            batch = first.shape[0] if dim is None else first.movedim(dim, 0).shape[1]
            single = isinstance(results, torch.Tensor)
            results = tuple(
                x.reshape(size, batch, *x.shape[1:]) if x.dim() > 1 else x.expand(size, 0)  # a gradient not asked for
                for x in ((results,) if single else results)
            )
        else:
            if size == 0:  # one slice tells the shapes: a sum of nothing, which is zeros and may require grad
                args = tuple(
                    x if dim is None else x.sum(dim, keepdim=True, dtype=x.dtype)
                    for x, dim in zip(args, dims, strict=True)
                )
            slices = [
                op(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, dims, strict=True)))
                for i in range(size or 1)
            ]
            single = isinstance(slices[0], torch.Tensor)
            slices = [(x,) for x in slices] if single else slices
            results = tuple(torch.stack(x)[:size] for x in zip(*slices, strict=True))
        return (results[0], 0) if single else (results, (0,) * len(results))

    first_term = {"forward": 3, "backward": 5, "map": 2, "received": 2}[which]
    term_slots = range(first_term, first_term + _N_TERMS)
    return rule


_MAPS = {
    "forward": (0, 1, 2),
    "backward": (0, 1, 2, 3, 4, 5 + _N_TERMS, 6 + _N_TERMS),
    "map": (0, 1),
    "received": (0, 1),
}


def _declare(backend: str) -> None:
    """Declare a backend's family of operators."""
    for which in FAMILIES[backend]:
        schema = SCHEMAS[which]
        name = f"{backend}_{which}"
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        qualified = f"visattn::{name}"
        torch.library.register_fake(qualified, _FAKES[which], lib=_library)
        torch.library.register_vmap(qualified, _batched(backend, which, _MAPS[which]), lib=_library)
    formulas: Sequence[tuple[str, Callable[..., Any], Callable[..., None] | None]] = (
        ("forward", _differentiate(backend), _save),
        ("backward", _raise_on("a gradient (double backward)"), None),
        ("map", _raise_when_run("attention_map"), _save_shapes),
        ("received", _raise_when_run("attention_received"), _save_shapes),
    )
    for which, formula, save in formulas:
        if which not in FAMILIES[backend]:
            continue
        torch.library.register_autograd(f"visattn::{backend}_{which}", formula, setup_context=save, lib=_library)


def _declare_launches() -> None:
    """Declare what launches the CUDA kernels, beneath the family "cuda".

    torch's C++ interface does not tell whether products may be TF32, so that this comes as an argument.
    """
    for which in FAMILIES["cuda"]:
        schema = SCHEMAS[which].replace(") ->", ", bool tf32) ->")
        torch.library.define(f"visattn::cuda_launch_{which}", schema, lib=_library)


def _declare_refusal() -> None:
    """Declare the operator that refuses a gradient when it is run, not when it is traced."""
    name, schema = "visattn::refuse_gradient", "(Tensor grad, str what) -> Tensor"
    torch.library.define(name, schema, lib=_library, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CompositeExplicitAutograd", _refuse_gradient, lib=_library)
    torch.library.register_fake(name, lambda grad, what: grad.new_empty(()), lib=_library)
    torch.library.register_autograd(name, _raise_on("a gradient (double backward)"), lib=_library)
    torch.library.register_vmap(name, _refuse_batched, lib=_library)


_declare_refusal()
_declare_launches()
for _backend in FAMILIES:
    _declare(_backend)
