"""What a traced function tells, and loops over one.

JAX traces a function to a `Jaxpr`: a list of equations, some of which hold further
jaxprs (what they call, bodies of loops, branches).
"""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.extend.core as jex
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.extend.core import primitives
from keras import tree

from keras_curvature.backend.contract import (
    Direction,
    Findings,
    Name,
    Outline,
    Shape,
    Tensor,
)

#: A set of arguments as the bits of an integer.
_Bits: TypeAlias = int

#: Primitives that call one jaxpr with their arguments, and the parameter that holds it.
_CALLS = {
    primitives.call_p: "call_jaxpr",
    primitives.closed_call_p: "call_jaxpr",
    primitives.custom_jvp_call_p: "call_jaxpr",
    primitives.custom_vjp_call_p: "call_jaxpr",
    primitives.jit_p: "jaxpr",
    primitives.remat_p: "jaxpr",
}


#: Primitives whose results are their inputs in another shape, or constants.
_KEEP_THE_MEMORY = {
    primitives.broadcast_in_dim_p,
    primitives.reshape_p,
    primitives.squeeze_p,
}


def outline(function: Callable[..., Any], *args: Any) -> Outline:
    """See the contract."""
    flat = tree.flatten(args)
    positions = [i for i, x in enumerate(flat) if x is not None]
    results: Any = None

    def of_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
        nonlocal results
        given: list[Any] = [None] * len(flat)
        for i, x in zip(positions, tensors, strict=True):
            given[i] = x
        results = function(*tree.pack_sequence_as(args, given))
        return [x for x in tree.flatten(results) if x is not None]

    traced = jax.make_jaxpr(of_tensors)([flat[i] for i in positions])
    found = zip(
        traced.out_avals,
        _origins(traced.jaxpr, [1 << i for i in positions]),
        strict=True,
    )
    described = [
        (None, None) if x is None else _described(*next(found))
        for x in tree.flatten(results)
    ]
    shapes, origins = ([pair[i] for pair in described] for i in (0, 1))
    return Outline(
        tree.pack_sequence_as(results, shapes),
        tree.pack_sequence_as(results, origins),
    )


def computed_bytes(function: Callable[..., Any], *args: Any) -> int:
    """See the contract. XLA fuses some of it, so that it is never stored."""
    flat = tree.flatten(args)

    def of_tensors(tensors: list[Tensor]) -> list[Tensor]:
        given = iter(tensors)
        whole = [None if x is None else next(given) for x in flat]
        results = tree.flatten(function(*tree.pack_sequence_as(args, whole)))
        return [x for x in results if x is not None]

    traced = jax.make_jaxpr(of_tensors)([x for x in flat if x is not None])
    return sum(
        variable.aval.size * variable.aval.dtype.itemsize
        for equation in equations(traced.jaxpr)
        # What calls others has the results of the last of them.
        if not list(jex.jaxprs_in_params(equation.params))
        and equation.primitive not in _KEEP_THE_MEMORY
        for variable in equation.outvars
    )


def _described(aval: Any, bits: _Bits) -> tuple[Shape, frozenset[int]]:
    positions = frozenset(i for i in range(bits.bit_length()) if bits >> i & 1)
    return Shape(tuple(aval.shape), str(aval.dtype)), positions


def examine(
    function: Callable[[Direction], tuple[Tensor, dict[Name, Tensor]]], point: Direction
) -> Findings:
    """See the contract.

    Where the loss does not depend on an entry by anything that JAX differentiates,
    JAX makes the zeros of its gradient out of nothing: they are not computed from the
    cotangent of the loss. No derivative of JAX' own is wrong, hence no caveats.
    """
    names, values = list(point), list(point.values())

    def pulled_back(cotangent: Tensor, values: list[Tensor]) -> list[Tensor]:
        loss, pull = jax.vjp(
            lambda values: function(dict(zip(names, values, strict=True)))[0], values
        )
        parts: list[Tensor] = pull(cotangent.astype(loss.dtype))[0]
        return parts

    traced = jax.make_jaxpr(pulled_back)(1.0, values)
    reached = _origins(traced.jaxpr, [1] + [0] * len(values))
    return Findings(
        frozenset(n for n, bits in zip(names, reached, strict=True) if not bits), ()
    )


def _origins(jaxpr: Any, received: Sequence[_Bits]) -> list[_Bits]:
    """The arguments that each result of a jaxpr is computed from.

    Args:
        jaxpr: a `Jaxpr`, or a `ClosedJaxpr`.
        received: what each of its arguments is computed from.
    """
    jaxpr = _opened(jaxpr)
    known = dict(zip(jaxpr.invars, received, strict=True))

    def of(atoms: Sequence[Any]) -> list[_Bits]:
        # Neither literals nor the values that a jaxpr closes over are arguments.
        return [0 if isinstance(x, jex.Literal) else known.get(x, 0) for x in atoms]

    for equation in jaxpr.eqns:
        results = _through(equation, of(equation.invars))
        known.update(zip(equation.outvars, results, strict=True))
    return of(jaxpr.outvars)


def _through(equation: Any, received: list[_Bits]) -> list[_Bits]:
    """What the results of an equation are computed from."""
    primitive, parameters = equation.primitive, equation.params
    if primitive in _CALLS:
        return _origins(parameters[_CALLS[primitive]], received)
    if primitive is primitives.scan_p:
        consts, length = parameters["num_consts"], parameters["num_carry"]
        before, after = received[:consts], received[consts + length :]
        carry, results = _carried(
            lambda carry: _origins(parameters["jaxpr"], [*before, *carry, *after]),
            received[consts : consts + length],
        )
        return carry + results[length:]
    if primitive is primitives.while_p:
        first, second = parameters["cond_nconsts"], parameters["body_nconsts"]
        asked, before = received[:first], received[first : first + second]
        carry, _ = _carried(
            lambda carry: _origins(parameters["body_jaxpr"], [*before, *carry]),
            received[first + second :],
        )
        # How often the body runs decides about every result.
        (count,) = _origins(parameters["cond_jaxpr"], [*asked, *carry])
        return [bits | count for bits in carry]
    if primitive is primitives.cond_p:
        branches = [_origins(b, received[1:]) for b in parameters["branches"]]
        return [
            functools.reduce(operator.or_, bits, received[0])
            for bits in zip(*branches, strict=True)
        ]
    return [functools.reduce(operator.or_, received, 0)] * len(equation.outvars)


def _carried(
    body: Callable[[list[_Bits]], list[_Bits]], carry: list[_Bits]
) -> tuple[list[_Bits], list[_Bits]]:
    """What a loop carries is computed from, after any number of steps.

    Returns:
        What is carried, and all results of the last step.
    """
    while True:
        results = body(carry)
        joined = [a | b for a, b in zip(carry, results, strict=False)]
        if joined == carry:
            return carry, results
        carry = joined


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a `Jaxpr`, those of the jaxprs in it included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jex.jaxprs_in_params(equation.params):
            yield from equations(inner)


def _opened(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr


# Loops


def map_range(function: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """See the contract."""
    body = _Body(function)
    if body.slow_at_once():
        return lax.map(body.in_loop, _indices(count))
    return jax.vmap(body)(_indices(count))


def loop_range(
    function: Callable[[Tensor], Tensor], count: int | Tensor, most: int | None = None
) -> Tensor:
    """See the contract."""
    if (most or count) == 1:
        return function(_indices(1)[0])[None]
    body = _Body(function)
    if most is None:
        return lax.map(body.in_loop, _indices(count))

    def step(i: Tensor, rows: Tensor) -> Tensor:
        return jax.tree.map(lambda x, row: x.at[i].set(row), rows, body.in_loop(i))

    none = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), body.shapes)
    return lax.fori_loop(0, count, step, none)


def sum_range(
    function: Callable[[Tensor], Sequence[Tensor]], count: int, at_once: int
) -> list[Tensor]:
    """See the contract."""
    body, width = _Body(lambda i: list(function(i))), min(at_once, count)
    if width == 1 or body.slow_at_once():
        return _total(body, _indices(count))

    def part(start: Tensor) -> list[Tensor]:
        return [x.sum(0) for x in jax.vmap(body)(start + _indices(width))]

    return _total(_Body(part), width * _indices(-(-count // width)))


def sum_chunks(
    function: Callable[..., Tensor], arrays: Sequence[Tensor], rows: int
) -> Tensor:
    """See the contract.

    Chunk i has the rows `i, i + count, …`: where devices have a part of the rows each,
    all of them have a part of every chunk.
    """
    if rows >= arrays[0].shape[0]:
        return function(*arrays)
    count, rest = divmod(arrays[0].shape[0], rows)
    whole = [a[: rows * count].reshape(rows, count, *a.shape[1:]) for a in arrays]

    def part(i: Tensor) -> list[Tensor]:
        chunks = [lax.dynamic_index_in_dim(a, i, 1, keepdims=False) for a in whole]
        return [function(*chunks)]

    (total,) = _total(_Body(part), _indices(count))
    return total + function(*[a[rows * count :] for a in arrays]) if rest else total


def _total(body: "_Body", indices: Tensor) -> list[Tensor]:
    """The sum over indices, one after the other."""
    if indices.size == 1:
        total: list[Tensor] = body(indices[0])
        return total

    def step(total: list[Tensor], i: Tensor) -> tuple[list[Tensor], None]:
        return [t + x for t, x in zip(total, body.in_loop(i), strict=True)], None

    zeros = [jnp.zeros(x.shape, x.dtype) for x in body.shapes]
    total, _ = lax.scan(step, zeros, indices)
    return total


def _indices(count: int) -> Tensor:
    return jnp.arange(count, dtype="int32")


class _Body:
    """A function of an index, traced once for all that a loop does with it.

    XLA has quick kernels on a CPU for convolutions in one order of axes, and brings
    others into that order, but not in the body of a loop. What is left there, the
    gradients by kernels, runs a hundred times slower (JAX 0.10.2: 1440 ms in place of
    16). So the order is changed before XLA sees it.

    Args:
        function: takes an integer tensor, returns a tensor or a list of tensors.

    Attributes:
        shapes: structured like its results, with `shape` and `dtype`.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        trace = jax.make_jaxpr(function, return_shape=True)
        self._traced, self.shapes = trace(np.int32(0))

    def __call__(self, i: Tensor) -> Any:
        """What the function returns."""
        return self._packed(jex.jaxpr_as_fun(self._traced)(i))

    def in_loop(self, i: Tensor) -> Any:
        """The same, as it runs best in the body of a loop."""
        if not _on_cpu():
            return self(i)
        return self._packed(_reordered(self._traced.jaxpr, self._traced.consts, [i]))

    def slow_at_once(self) -> bool:
        """Whether `jax.vmap` would slow it down.

        On a CPU, XLA computes the gradient by the kernel of a grouped convolution
        well, but for several indices at once as a dense convolution with zeros: 170
        times slower for 48 channels.
        """
        return _on_cpu() and any(
            equation.params["batch_group_count"] > 1
            for equation in equations(self._traced.jaxpr)
            if equation.primitive is lax.conv_general_dilated_p
        )

    def _packed(self, results: Sequence[Tensor]) -> Any:
        return jax.tree.unflatten(jax.tree.structure(self.shapes), results)


def _on_cpu() -> bool:
    """Whether what is being traced will run on a CPU."""
    device = jax.default_device.value
    platform: str = getattr(device, "platform", device) or jax.default_backend()
    return platform == "cpu"


def _reordered(
    jaxpr: Any, consts: Sequence[Tensor], args: Sequence[Tensor]
) -> list[Tensor]:
    """The results of a jaxpr, computed with its convolutions in another order."""
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))

    def of(atoms: Sequence[Any]) -> list[Tensor]:
        return [x.val if isinstance(x, jex.Literal) else known[x] for x in atoms]

    for equation in jaxpr.eqns:
        given, primitive = of(equation.invars), equation.primitive
        parameters = primitive.get_bind_params(equation.params)
        if primitive is lax.conv_general_dilated_p:
            results = [_convolution(*given, **parameters)]
        elif primitive is primitives.jit_p:
            inner = parameters["jaxpr"]
            results = _reordered(inner.jaxpr, inner.consts, given)
        else:
            results = primitive.bind(*given, **parameters)
            results = results if primitive.multiple_results else [results]
        known.update(zip(equation.outvars, results, strict=True))
    return of(jaxpr.outvars)


def _convolution(
    x: Tensor, kernel: Tensor, *, dimension_numbers: Any, **parameters: Any
) -> Tensor:
    """A convolution in the order of axes for which XLA has a kernel on a CPU."""
    rank = x.ndim
    lhs, rhs, out = dimension_numbers
    if kernel.shape[rhs[1]] == 1 and parameters["feature_group_count"] > 1:
        # Depthwise. The quick kernel takes ten times as long as XLA does without.
        return lax.conv_general_dilated_p.bind(
            x, kernel, dimension_numbers=dimension_numbers, **parameters
        )
    space = tuple(range(1, rank - 1))
    # Samples, space, channels; space, channels in, channels out.
    ordered = lax.ConvDimensionNumbers(
        (0, rank - 1, *space),
        (rank - 1, rank - 2, *range(rank - 2)),
        (0, rank - 1, *space),
    )
    result = lax.conv_general_dilated_p.bind(
        lax.transpose(x, (lhs[0], *lhs[2:], lhs[1])),
        lax.transpose(kernel, (*rhs[2:], rhs[1], rhs[0])),
        dimension_numbers=ordered,
        **parameters,
    )
    axes = (out[0], *out[2:], out[1])
    return lax.transpose(result, [axes.index(i) for i in range(rank)])
