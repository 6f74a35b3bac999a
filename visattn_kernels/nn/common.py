"""What the modules share: the checks of their arguments, and the names and shapes of other libraries' weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any, cast

import torch
from torch import nn

from visattn_kernels.attention import attention, attention_map, channels_first, heads_last
from visattn_kernels.errors import expected, strided, told
from visattn_kernels.patterns import Pattern
from visattn_kernels.terms import Term
from visattn_kernels.tracing import lacking, proxy_in, recording, refusing, surely


class Layer(nn.Module):
    """A module whose public methods are one node each of the graphs that torch.fx traces, as torch's own modules are.

    torch.fx looks into every module that is not of `torch.nn`, unless it is told otherwise.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method) and not name.startswith("_"):
                setattr(cls, name, _one_node(method))

    @property
    def itself(self) -> Layer:
        """The module: the path to it in a graph of the module alone."""
        return self


def _one_node(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, but for proxies of torch.fx, of which it makes a node."""

    @wraps(method)
    def call(self: Layer, *args: Any, **kwargs: Any) -> Any:
        proxy = proxy_in((*args, *kwargs.values()))
        if proxy is None:
            return method(self, *args, **kwargs)
        tracer = cast(torch.fx.Tracer, proxy.tracer)
        path = tracer.path_of_module(self) or "itself"
        if method.__name__ == "forward":
            return tracer.create_proxy("call_module", path, args, kwargs)
        module = tracer.create_proxy("get_attr", path, (), {})
        return tracer.create_proxy("call_method", method.__name__, (module, *args), kwargs)

    return call


@refusing
def image(x: object, channels: int | None = None, argument: str = "x") -> torch.Tensor:
    """Return `x` if it is an image `[B, channels, H, W]`, of any channels with None, else raise an error.

    Raises:
        TypeError, RuntimeError: it is none.
    """
    x = strided(x, argument)
    if x.dim() != 4 or (channels is not None and x.shape[1] != channels):
        shape = f"[B, {'C' if channels is None else channels}, H, W]"
        raise expected(f"{argument} of shape {shape}", f"{argument}.shape", list(x.shape), RuntimeError)
    if not x.is_floating_point():
        raise expected(f"{argument} to be of a floating-point dtype", f"{argument}.dtype", x.dtype, TypeError)
    if not (x.shape[2] and x.shape[3]):
        raise expected(f"{argument} of one position or more", f"{argument}.shape", list(x.shape), RuntimeError)
    return x


def count(value: object, argument: str, least: int = 1) -> int:
    """Return `value` if it is an integer of `least` or more, else raise TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise expected(f"{argument} to be an integer", argument, told(value), TypeError)
    if value < least:
        raise expected(f"{argument} of {least} or more", argument, value, ValueError)
    return value


def flag(value: object, argument: str) -> bool:
    """Return `value` if it is a bool, else raise TypeError."""
    if not isinstance(value, bool):
        raise expected(f"{argument} to be a bool", argument, told(value), TypeError)
    return value


def share(channels: int, parts: int, argument: str = "heads") -> int:
    """Return `channels // parts`; raise ValueError where `parts` does not divide the channels."""
    if channels % count(parts, argument):
        raise expected(f"{argument} to divide {channels} channels", argument, parts, ValueError)
    return channels // parts


def choice(value: object, argument: str, options: tuple[str, ...]) -> str:
    """Return `value` if it is one of `options`, else raise ValueError."""
    if not isinstance(value, str) or value not in options:
        raise expected(f"{argument} to be one of {', '.join(options)}", argument, told(value), ValueError)
    return value


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The context in which dtypes are what they are, on any device, tensors without numbers (meta) included."""
    return torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext()


def zero_factor(module: nn.Module, name: str) -> nn.Parameter:
    """A new factor of a module, which starts at 0, to be set as its attribute `name`.

    It is a vector of one element, since FSDP2 (`fully_shard`) takes no scalars. State dicts that have it as a scalar
    load too.
    """
    module.register_load_state_dict_pre_hook(partial(_as_vector, name))  # type: ignore[no-untyped-call]
    return nn.Parameter(torch.zeros(1))


def _as_vector(name: str, module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    """The hook that `zero_factor` registers."""
    value = state.get(prefix + name)
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        state[prefix + name] = value.reshape(1)


def scaled(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`factor * x` in the dtype of x, as a factor without dimensions gives it."""
    return factor.to(x.dtype) * x


def pooled(x: torch.Tensor, factor: int) -> torch.Tensor:
    """The map max-pooled by a factor; what it leaves over of an odd size is dropped."""
    return x if factor == 1 else nn.functional.max_pool2d(_at_least(x, factor), factor)


def averaged(x: torch.Tensor, stride: int) -> torch.Tensor:
    """The map average-pooled by a stride; what it leaves over of an odd size is dropped."""
    return x if stride == 1 else nn.functional.avg_pool2d(_at_least(x, stride), stride)


@refusing
def _at_least(x: torch.Tensor, side: int) -> torch.Tensor:
    if x.shape[2] < side or x.shape[3] < side:
        sides = f"{x.shape[2]}×{x.shape[3]}"
        raise expected(f"a map of at least {side}×{side}, which is pooled", "its size", sides, RuntimeError)
    return x


def renamed(
    state: Mapping[str, torch.Tensor], names: Mapping[str, str | None], needed: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """Give the entries of another library's state dict our names.

    Args:
        state: their state dict.
        names: their prefixes, whole dotted parts, and ours; None leaves the entries out. The longest that fits counts.
        needed: ours, of entries that must be there.

    Raises:
        ValueError: no prefix fits an entry, or one that is needed is not there: it is the state dict of something else.
    """
    ours = {}
    for key, value in state.items():
        parts = key.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        found = next((prefix for prefix in prefixes if prefix in names), None)
        if found is None:
            raise expected(f"a state dict with the entries {', '.join(names)}", "an entry", key, ValueError)
        name = names[found]
        if name is not None:
            ours[name + key[len(found) :]] = value
    for name in needed:
        if name not in ours:
            fits = ((theirs, own) for theirs, own in names.items() if own and f"{name}.".startswith(f"{own}."))
            theirs = " or ".join(theirs + name[len(own) :] for theirs, own in fits)
            raise expected(f"a state dict with an entry {theirs}", "entries", list(state), ValueError)
    return ours


def convolutions(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of linear layers as those of 1x1 convolutions; all others as they are."""
    return {name: as_convolution(x) if x.dim() == 2 else x for name, x in state.items()}


def as_convolution(weight: torch.Tensor) -> torch.Tensor:
    """The weight `[out, in]` of a linear layer, or `[out, in, 1]`, as that of a 1x1 convolution; others as they are."""
    return weight[(...,) + (None,) * (4 - weight.dim())] if weight.dim() in (2, 3) else weight


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Both sides, of one for both or of two; anything else is not checked here."""
    return (value[0], value[1]) if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)


def by_head(table: torch.Tensor, size: int | tuple[int, int] | None = None) -> torch.Tensor:
    """A bias table `[(2h-1)(2w-1), heads]` by query minus key as `[heads, 2h-1, 2w-1]` by key minus query.

    Args:
        table: theirs; one that has three dimensions is returned as it is.
        size: h and w, or one for both; None if they are one.
    """
    if table.dim() == 3:
        return table
    height, width = pair(int(len(table) ** 0.5 + 1) // 2 if size is None else size)
    if len(table) != (2 * height - 1) * (2 * width - 1):
        raise expected(f"the sides of a table of {len(table)} entries", "size", told(size), ValueError)
    return table.flip(0).T.reshape(-1, 2 * height - 1, 2 * width - 1).contiguous()


def by_reach(table: torch.Tensor, dim: int) -> torch.Tensor:
    """Widen a table by offset from its K entries to the `2K - 1` that patterns want, with zeros that nothing reads.

    A neighborhood of K keys has the offsets `-(K // 2)` and following, and a span those to either side.
    """
    kernel, after = table.shape[dim], table.dim() - 1 - dim % table.dim()
    return nn.functional.pad(table, (0, 0) * after + (kernel - 1 - kernel // 2, kernel // 2))


class BatchNorm2d(nn.BatchNorm2d):
    """Torch's, right too where a side or the batch is 1.

    Either memory format then has strides that pass for the other, and torch 2.13 on CPUs gives wrong gradients where
    the map has the one and the gradient the other; the strides of a sequence are not ambiguous.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        ambiguous = recording() or 1 in (x.shape[0], *x.shape[2:])
        y: torch.Tensor = super().forward(x.flatten(2) if ambiguous else x)
        return y.view(x.shape) if ambiguous else y

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Sequences are fine."""


class PackedAttention(Layer):
    """What the transformers' layers have in common: one convolution for q, k and v, and one for the result.

        y = W_o attention(W_q x, W_k x, W_v x)

    Which keys are seen, and what is added to the logits, is a subclass's to say in `_geometry`.

    Args:
        channels: C, those of the map.
        heads: number of heads; divides C.
        qkv_bias: whether the first convolution has a bias; the second has one.
        scale: factor of q·k; None means `1/sqrt(C // heads)`.
        least, multiple: what the sides of the map are padded to, and to a multiple of, at its end, with zeros before
            the projection: what is padded has the biases for keys and values, and takes part.
        backend: as in `attention`.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        qkv_bias: bool,
        scale: float | None,
        least: tuple[int, int] = (1, 1),
        multiple: tuple[int, int] = (1, 1),
        backend: str,
    ) -> None:
        super().__init__()
        self.channels, self.heads = count(channels, "channels"), heads
        self.head_dim = share(channels, heads)
        self.scale, self.backend = scale, backend
        self.least, self.multiple = least, multiple
        self.padded = max(*least, *multiple) > 1
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=qkv_bias)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What each position gathered, projected."""
        q, k, v = self._heads(x)
        pattern, terms = self._geometry(*q.shape[1:3])
        y = attention(q, k, v, pattern, scale=self.scale, terms=terms, backend=self.backend)
        out: torch.Tensor = self.proj(channels_first(y))
        return _cropped(out, x) if self.padded else out

    def attention_map(self, x: torch.Tensor, at: Sequence[tuple[int, int]] | torch.Tensor) -> torch.Tensor:
        """The map's rows of the positions `at`, points (y, x): `[B, len(at), heads, H, W]`, float32.

        H and W are those of the padded map.
        """
        q, k, _ = self._heads(x)
        pattern, terms = self._geometry(*q.shape[1:3])
        return attention_map(q, k, at, pattern, scale=self.scale, terms=terms, backend=self.backend)

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v, views of the convolution's output."""
        x = image(x, self.channels)
        if self.padded:
            bottom, right = map(_padding, x.shape[2:], self.least, self.multiple)
            if not (surely(bottom == 0) and surely(right == 0)):
                x = nn.functional.pad(x, (0, right, 0, bottom))
        return tuple(heads_last(part, self.heads) for part in self.qkv(x).chunk(3, 1))

    def _geometry(self, height: int, width: int) -> tuple[Pattern, tuple[Term, ...]]:
        """The pattern and the terms on a map of this size."""
        raise NotImplementedError


def _padding(side: int, least: int, multiple: int) -> int:
    """What a side lacks of a multiple that is no less than the least."""
    lack = lacking(side, least) if least > 1 else 0
    return lack + -(side + lack) % multiple


def _cropped(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The beginning of a map, as large as x."""
    if torch.compiler.is_exporting():  # a view would hold the graph to sizes that are padded, or to those that are not
        return nn.functional.pad(out, (0, x.shape[3] - out.shape[3], 0, x.shape[2] - out.shape[2]))
    return out[..., : x.shape[2], : x.shape[3]]
