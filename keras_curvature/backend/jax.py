"""The contract on JAX: derivatives, compiled functions, arrays, places, random numbers.

Next to it is `jax_jaxprs` (what a traced function tells, and loops over one).
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.extend.core
import keras
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.extend.core import primitives

from keras_curvature.backend.contract import (
    Direction,
    Name,
    NotTwiceDifferentiable,
    Tensor,
)
from keras_curvature.backend.host import free_memory as _free_on_host
from keras_curvature.backend.jax_jaxprs import computed_bytes as computed_bytes
from keras_curvature.backend.jax_jaxprs import equations
from keras_curvature.backend.jax_jaxprs import examine as examine
from keras_curvature.backend.jax_jaxprs import loop_range as loop_range
from keras_curvature.backend.jax_jaxprs import map_range as map_range
from keras_curvature.backend.jax_jaxprs import outline as outline
from keras_curvature.backend.jax_jaxprs import sum_chunks as sum_chunks
from keras_curvature.backend.jax_jaxprs import sum_range as sum_range

#: On two CPU cores a lone product costs 2.5 gradients (a small convolutional and a
#: dense network alike), four one after the other 7.4 with the memory of one. All four
#: at once cost 8.5 and 13, with two to four times the memory.
PRODUCTS_PER_PASS = 4

#: `jax.checkpoint` works on what was traced.
RECOMPUTES = True

#: What was traced is gone with its trace.
KEEPS_RECORDINGS = False

#: Each kind of operation would be compiled by itself.
RUNS_UNCOMPILED = False

# Derivatives

_Recorded: TypeAlias = Callable[[Direction], tuple[Tensor, dict[Name, Tensor]]]
_Linear: TypeAlias = Callable[[list[Tensor]], list[Tensor]]


def gradient(
    function: _Recorded, point: Direction
) -> tuple[Tensor, dict[Name, Tensor], dict[Name, Tensor]]:
    """See the contract."""
    # JAX would sort the names of dictionaries, which not all can be.
    names: list[Name] = []

    def of_values(values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        loss, taps = function(dict(zip(point, values, strict=True)))
        names[:] = taps
        return loss, list(taps.values())

    differentiated = jax.value_and_grad(of_values, has_aux=True)
    (loss, taps), parts = differentiated(list(point.values()))
    return (
        loss,
        dict(zip(names, taps, strict=True)),
        dict(zip(point, parts, strict=True)),
    )


class record:
    """See the contract: a `Recording`, forward mode over reverse mode.

    Each derivative traces the function anew, by what it is asked for alone. XLA sees
    that the evaluations are the same, and keeps one.
    """

    def __init__(
        self, function: _Recorded, point: Direction, last: Iterable[Name] = ()
    ) -> None:
        del last
        self._function = function
        self._point = dict(point)
        self.loss, self.taps = function(self._point)

    @functools.cached_property
    def gradient(self) -> dict[Name, Tensor]:
        """See the contract."""
        return gradient(self._function, self._point)[2]

    def product(
        self, moved: Iterable[Name], wanted: Iterable[Name]
    ) -> Callable[[Direction], dict[Name, Tensor]]:
        """See the contract."""
        moved, wanted = tuple(moved), tuple(wanted)
        try:
            return _by_names(self._forward(moved, wanted), moved, wanted)
        except _NO_DERIVATIVE:
            pass  # What forward mode cannot do, reverse mode may.
        try:
            return _by_names(self._backward(moved, wanted), moved, wanted)
        except _NO_DERIVATIVE as error:
            raise NotTwiceDifferentiable(
                "An operation of the loss has no second derivative in JAX. Use central "
                'differences of the gradient instead: hvp="finite_difference". '
                f"JAX says: {error}"
            ) from error

    def _forward(self, moved: tuple[Name, ...], wanted: tuple[Name, ...]) -> _Linear:
        """Products by forward mode over the gradient."""
        # What has a derivative of its own (`jax.custom_vjp`) must be met in reverse
        # mode first, so the gradient is also taken by what moves. What of it is not
        # wanted is never computed.
        sources = tuple(dict.fromkeys((*wanted, *moved)))

        def slopes(values: list[Tensor]) -> list[Tensor]:
            return self._slopes(sources, moved, values)[: len(wanted)]

        product: _Linear
        _, product = jax.linearize(slopes, self._values(moved))
        traced = jax.make_jaxpr(product)(self._values(moved)).jaxpr
        if any(e.primitive is primitives.custom_lin_p for e in equations(traced)):
            raise NotImplementedError("custom_vjp in the rule of another custom_vjp")
        return product

    def _backward(self, moved: tuple[Name, ...], wanted: tuple[Name, ...]) -> _Linear:
        """Products by reverse mode twice: of the transposed Hessian, the same."""

        def slopes(values: list[Tensor]) -> list[Tensor]:
            return self._slopes(moved, wanted, values)

        _, pull = jax.vjp(slopes, self._values(wanted))
        return lambda direction: pull(direction)[0]

    def pull_back(
        self, taps: Iterable[Name], wanted: Iterable[Name]
    ) -> Callable[[Direction], dict[Name, Tensor]]:
        """See the contract."""
        taps, wanted = tuple(taps), tuple(wanted)

        def tapped(values: list[Tensor]) -> list[Tensor]:
            found = self._function(_with_values(self._point, wanted, values))[1]
            return [found[name] for name in taps]

        _, pull = jax.vjp(tapped, self._values(wanted))
        return _by_names(lambda w: pull(w)[0], taps, wanted)

    def _values(self, names: tuple[Name, ...]) -> list[Tensor]:
        return [self._point[name] for name in names]

    def _slopes(
        self, sources: tuple[Name, ...], moved: tuple[Name, ...], values: list[Tensor]
    ) -> list[Tensor]:
        """The gradient by some entries, where others have these values."""
        point = _with_values(self._point, moved, values)

        def loss(values: list[Tensor]) -> Tensor:
            return self._function(_with_values(point, sources, values))[0]

        slopes: list[Tensor] = jax.grad(loss)([point[name] for name in sources])
        return slopes


#: What JAX raises where an operation lacks a derivative: TypeError where a
#: `custom_vjp` meets forward mode, ValueError for callbacks and loops in reverse mode,
#: NotImplementedError for the rest. That the function itself runs is known by then.
_NO_DERIVATIVE = (TypeError, ValueError, NotImplementedError)


def _with_values(
    point: dict[Name, Tensor], names: tuple[Name, ...], values: list[Tensor]
) -> dict[Name, Tensor]:
    """A point with other values of some entries."""
    return {**point, **dict(zip(names, values, strict=True))}


def _by_names(
    linear: _Linear, given: tuple[Name, ...], wanted: tuple[Name, ...]
) -> Callable[[Direction], dict[Name, Tensor]]:
    def function(direction: Direction) -> dict[Name, Tensor]:
        results = linear([direction[name] for name in given])
        return dict(zip(wanted, results, strict=True))

    return function


@jax.custom_vjp
def hold_cotangent(x: Tensor) -> Tensor:
    """See the contract.

    With `f` the tensor and `g = ∂L/∂f`, the gradient `Jᵀ g` by what `f` was computed
    from is right, and its derivative is `Σ_c g_c ∂²f_c`, without `Jᵀ (∂²L/∂f²) J`.
    """
    return x


hold_cotangent.defvjp(lambda x: (x, None), lambda _, g: (lax.stop_gradient(g),))


def twice_differentiable() -> contextlib.AbstractContextManager[Any]:
    """See the contract: products of matrices in full precision.

    JAX' second derivatives are right. By default it multiplies float32 matrices with
    eight or eleven bits on a TPU or GPU.
    """
    context: contextlib.AbstractContextManager[Any] = jax.default_matmul_precision(
        "highest"
    )
    return context


def function_of_variables(
    function: Callable[[], Tensor], variables: Sequence[Any]
) -> Callable[[Sequence[Tensor]], Tensor]:
    """Refused: see the contract."""
    raise ValueError(
        "On JAX a loss must be a function of the parameters that it is differentiated "
        "by: loss_fn(parameters), with any nested structure of arrays. Received: a "
        f"function without arguments and {len(list(variables))} variables."
    )


# Compiled functions

_traces = [0]


class compiled:
    """See the contract. XLA compiles everything here: `jit_compile` has no effect."""

    #: What XLA is told.
    _options: ClassVar[dict[str, Any] | None] = None

    def __init__(self, function: Callable[..., Any], jit_compile: bool = False) -> None:
        self._traces = 0
        self._jitted: dict[tuple[int, ...], Any] = {}

        def counted(*args: Any) -> Any:
            self._traces += 1
            _traces[0] += 1
            return _with(collections.OrderedDict, function(*_with(dict, args)))

        self._function = counted

    def __call__(self, *args: Any) -> Any:
        """What the function returns."""
        # XLA must know how often something is repeated.
        numbers = tuple(i for i, arg in enumerate(args) if type(arg) is int)
        if numbers not in self._jitted:
            self._jitted[numbers] = jax.jit(
                self._function, static_argnums=numbers, compiler_options=self._options
            )
        jitted = self._jitted[numbers]
        return _with(dict, jitted(*_with(collections.OrderedDict, args)))

    def traces(self) -> int:
        """Number of signatures compiled so far."""
        return self._traces


class _compiled_quickly(compiled):
    """Without most of what XLA does to make a function fast on a CPU."""

    _options: ClassVar = {"xla_backend_optimization_level": 0}


def run_once(function: Callable[..., Any], *args: Any) -> Any:
    """See the contract: on a CPU a check takes two thirds of the time."""
    kind = _compiled_quickly if jax.default_backend() == "cpu" else compiled
    return kind(function)(*args)


def _with(kind: type, structure: Any) -> Any:
    """A nested structure with dictionaries of one kind.

    JAX sorts the names of a `dict`, which not all can be, and not of an `OrderedDict`.
    """
    if isinstance(structure, dict):
        return kind((name, _with(kind, x)) for name, x in structure.items())
    if isinstance(structure, (list, tuple)):
        parts = [_with(kind, x) for x in structure]
        named = hasattr(structure, "_fields")
        return type(structure)(*parts) if named else type(structure)(parts)
    return structure


def num_traces() -> int:
    """See the contract."""
    return _traces[0]


def current_trace() -> Any:
    """See the contract.

    JAX' own handle of whether two tracers may meet: the bodies of loops, branches,
    `vmap` and `checkpoint` have one each.
    """
    return jax.extend.core.get_opaque_trace_state()


# Arrays and places


def is_tensor(x: Any) -> bool:
    """See the contract: also while tracing."""
    return isinstance(x, jax.Array)


def array(x: Any, dtype: str | None = None) -> Tensor:
    """See the contract."""
    x = _convertible(x)
    unchanged = is_tensor(x) and (dtype is None or x.dtype == dtype)
    return x if unchanged else jnp.asarray(x, dtype)


def _convertible(x: Any) -> Any:
    """What JAX converts without a detour; other frameworks' tensors as NumPy arrays."""
    if isinstance(x, keras.Variable):
        return x.value
    if hasattr(x, "detach"):
        x = x.detach().cpu()
    return np.asarray(x) if hasattr(x, "__array__") and not is_tensor(x) else x


def values(variables: Iterable[Any]) -> list[Tensor]:
    """See the contract."""
    return [array(variable) for variable in variables]


def reading(variables: Iterable[Any]) -> Callable[[], list[Tensor]]:
    """See the contract."""
    variables = list(variables)
    return lambda: values(variables)


def on_variables(
    function: Callable[..., Any], variables: Sequence[Any]
) -> Callable[..., Any]:
    """See the contract."""
    variables, jitted = list(variables), compiled(function)

    def call(*args: Any) -> Any:
        new, result = jitted(values(variables), *args)
        for variable, value in zip(variables, new, strict=False):
            variable.assign(value)
        return result

    return call


def wide_float() -> str:
    """See the contract."""
    return str(jax.dtypes.canonicalize_dtype("float64"))


def place_of(variable: Any) -> jax.Device | jax.sharding.Sharding | None:
    """See the contract: a device, or the sharding over several of them."""
    x = variable.value if isinstance(variable, keras.Variable) else variable
    if not is_tensor(x) or isinstance(x, jax.core.Tracer):
        return None
    return x.sharding if len(x.devices()) > 1 else next(iter(x.devices()))


def on(place: Any) -> contextlib.AbstractContextManager[Any]:
    """See the contract. What several devices share takes tensors from anywhere."""
    if isinstance(place, jax.Device):
        context: contextlib.AbstractContextManager[Any] = jax.default_device(place)
        return context
    return contextlib.nullcontext()


def free_memory(place: Any) -> int | None:
    """See the contract: of several devices what the fullest has, times their number."""
    devices = [place] if isinstance(place, jax.Device) else _devices_of(place)
    if all(device.platform == "cpu" for device in devices):
        return _free_on_host()
    free: list[int] = []
    for device in devices:
        told = device.memory_stats() or {}
        if "bytes_limit" not in told:
            return None
        free.append(told["bytes_limit"] - told.get("bytes_in_use", 0))
    return min(free) * len(free)


def _devices_of(place: Any) -> list[Any]:
    if place is None:
        return [jax.local_devices()[0]]
    return [d for d in place.device_set if d.process_index == jax.process_index()]


def is_out_of_memory(error: BaseException) -> bool:
    """See the contract."""
    told = isinstance(error, jax.errors.JaxRuntimeError)
    told = told and "RESOURCE_EXHAUSTED" in str(error)
    return told or isinstance(error, MemoryError)


def placed(x: Any, place: Any) -> Tensor:
    """See the contract.

    Where several devices share the model, the first axis is spread as the distribution
    spreads data. Without a distribution, or if the axis does not divide, each of them
    gets all of it.
    """
    if place is None or isinstance(place, jax.Device):
        with on(place):
            x = array(x)
        # What is put on a device is committed to it, and so is all that is computed of
        # it: an optimizer's slots, with them the weights, for which every function
        # would be compiled again. Where JAX computes anyway, nothing has to be put.
        at_home = x.devices() == jnp.zeros(()).devices() and place in (
            None,
            *x.devices(),
        )
        return x if at_home else jax.device_put(x, place)
    x = _convertible(x)
    x = x if is_tensor(x) else np.asarray(x)
    distribution = keras.distribution.distribution()
    if distribution is not None and x.ndim:
        spread = distribution.get_data_layout(x.shape).backend_layout
        with contextlib.suppress(ValueError):
            # Of several processes each has rows of its own, as in `fit`.
            return jax.make_array_from_process_local_data(spread, x)
    by_no_axis = jax.sharding.PartitionSpec()
    return jax.device_put(x, jax.sharding.NamedSharding(place.mesh, by_no_axis))


def num_replicas() -> int:
    """See the contract: Keras divides by nothing on JAX."""
    return 1


def process() -> tuple[int, int] | None:
    """See the contract: `keras.distribution` spreads data itself."""
    return None


def sum_over_processes(x: Tensor) -> Tensor:
    """See the contract."""
    return x


# Blocks of entries

#: What is reduced, what does not count, and how the pieces of a block are put together.
_OVER_BLOCKS: dict[str, tuple[Callable[..., Tensor], float, Callable[..., Tensor]]] = {
    "sum": (jnp.sum, 0, jax.ops.segment_sum),
    "max": (jnp.max, -jnp.inf, jax.ops.segment_max),
    "min": (jnp.min, jnp.inf, jax.ops.segment_min),
}


def by_entries(function: Callable[..., list[Tensor]], *tensors: Tensor) -> list[Tensor]:
    """See the contract: what is compiled goes entry by entry as it is."""
    return function(*tensors)


def parts(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """See the contract."""
    return jnp.split(x, np.cumsum(sizes)[:-1], axis=-1)


def over_blocks(kind: str, rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """See the contract.

    XLA compiles an operation for each size anew, 40 ms each on a CPU. So all pieces
    that are reduced have one length, at most two of them a block in the mean.
    """
    return _reduction(kind, tuple(sizes))(rows)


@functools.lru_cache(maxsize=64)
def _reduction(kind: str, sizes: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Compiled: outside of other compiled functions a loop is compiled at each call."""
    reduce, nothing, together = _OVER_BLOCKS[kind]
    size, ends = sum(sizes), np.cumsum(sizes)
    length = max(1, -(-size // len(sizes)))
    blocks = np.repeat(np.arange(len(sizes)), -(-np.array(sizes) // length))
    within = np.arange(len(blocks)) - np.searchsorted(blocks, blocks)
    starts = (ends - sizes)[blocks] + length * within
    stops = np.minimum(starts + length, ends[blocks])

    def reduced(rows: Tensor) -> Tensor:
        def piece(bounds: Tensor) -> Tensor:
            # The last ones would reach beyond the end.
            start = jnp.minimum(bounds[0], size - length)
            entries = start + jnp.arange(length)
            counts = (entries >= bounds[0]) & (entries < bounds[1])
            part = lax.dynamic_slice_in_dim(rows, start, length, axis=1)
            return reduce(jnp.where(counts, part, nothing), axis=1)

        pieces = lax.map(piece, np.stack([starts, stops], axis=1))
        return together(pieces, blocks, len(sizes), indices_are_sorted=True).T

    function: Callable[[Tensor], Tensor] = jax.jit(reduced)
    return function


def block_numbers(sizes: Sequence[int]) -> Tensor:
    """See the contract."""
    ends = np.cumsum(sizes)
    # XLA would count at compilation, which takes it a minute for 10^6 entries.
    ends = lax.optimization_barrier(jnp.asarray(ends[:-1], "int32"))
    return jnp.cumsum(jnp.zeros(sum(sizes), "int32").at[ends].add(1))


# Random numbers


def random_state_at_rest() -> contextlib.AbstractContextManager[None]:
    """See the contract: JAX has no random state."""
    return contextlib.nullcontext()


def signs(shape: Sequence[int], key: Any, dtype: str) -> Tensor:
    """See the contract.

    32 signs from each random number, along the last axis: on a CPU the generator
    takes 17 ns for a number, which for as many numbers as there are signs would be
    as long as the gradient of a large network.
    """
    *rows, length = shape or (1,)
    words = jax.random.bits(_generator(key), (*rows, -(-length // 32)), "uint32")
    bits = (words[..., None] >> jnp.arange(32, dtype="uint32")) & 1
    bits = bits.reshape(*rows, -1)[..., :length].reshape(shape)
    return 2 * bits.astype(dtype) - 1


def normal(shape: Sequence[int], key: Any, dtype: str) -> Tensor:
    """See the contract."""
    return jax.random.normal(_generator(key), tuple(shape), dtype)


def fold_in(key: Any, number: Any) -> Tensor:
    """See the contract."""
    folded = jax.random.fold_in(_generator(key), number)
    return lax.bitcast_convert_type(jax.random.key_data(folded), jnp.int32)


def _generator(key: Any) -> Tensor:
    """The key as JAX wants it, for one generator whatever its default is."""
    data = lax.bitcast_convert_type(array(key, "int32"), jnp.uint32)
    return jax.random.wrap_key_data(data, impl="threefry2x32")
