"""The contract on TensorFlow: derivatives by tapes, tensors, places, random numbers.

Next to it are `tensorflow_loops` (compiled functions and loops) and
`tensorflow_graphs` (what a traced graph tells).
"""

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_curvature.backend.contract import (
    Direction,
    Name,
    NotTwiceDifferentiable,
    Recording,
    Tensor,
)
from keras_curvature.backend.ctc import ctc_loss
from keras_curvature.backend.host import free_memory as _free_on_host
from keras_curvature.backend.tensorflow_graphs import HELD
from keras_curvature.backend.tensorflow_graphs import computed_bytes as computed_bytes
from keras_curvature.backend.tensorflow_graphs import examine as examine
from keras_curvature.backend.tensorflow_graphs import outline as outline
from keras_curvature.backend.tensorflow_loops import compiled as compiled
from keras_curvature.backend.tensorflow_loops import loop_range as loop_range
from keras_curvature.backend.tensorflow_loops import map_range as map_range
from keras_curvature.backend.tensorflow_loops import num_traces as num_traces
from keras_curvature.backend.tensorflow_loops import run_once as run_once
from keras_curvature.backend.tensorflow_loops import sum_chunks as sum_chunks
from keras_curvature.backend.tensorflow_loops import sum_range as sum_range

#: More products would make the graph larger for little gain: k of them cost about
#: 1 + 1.35 k gradients.
PRODUCTS_PER_PASS = 4

#: `tf.recompute_grad` refuses keywords in a graph, and with them every Keras layer
#: (keras#21207).
RECOMPUTES = False

#: A tape is gone with the trace of a function.
KEEPS_RECORDINGS = False

#: Without a graph each operation takes longer, and nothing is traced or optimized.
RUNS_UNCOMPILED = True

# Derivatives


def gradient(
    function: Callable[[Direction], tuple[Tensor, dict[Name, Tensor]]], point: Direction
) -> tuple[Tensor, dict[Name, Tensor], dict[Name, Tensor]]:
    """See the contract."""
    point = _own(point)
    sources = list(point.values())
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(sources)
        loss, taps = function(point)
    parts = tape.gradient(loss, sources, unconnected_gradients="zero")
    return loss, taps, _like(point, dict(zip(point, parts, strict=True)))


def record(
    function: Callable[[Direction], tuple[Tensor, dict[Name, Tensor]]],
    point: Direction,
    last: Iterable[Name] = (),
) -> Recording:
    """See the contract.

    By tape over tape: every product costs one more backward pass (about 1.35
    gradients, where a lone product costs 2 to 2.4).
    """
    return _Recording(function, point, last)


class _Tapes:
    """A tape over a tape that watch the same entries of a point.

    A tape goes back as far as it has watched, whatever is asked for.

    Args:
        sources: the entries.
    """

    def __init__(self, sources: dict[Name, Tensor]) -> None:
        self.sources = sources
        self.outer = tf.GradientTape(persistent=True, watch_accessed_variables=False)
        self.inner = tf.GradientTape(watch_accessed_variables=False)
        self._slopes: dict[Name, Tensor] | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A context whose operations they record."""
        with self.outer, self.inner:
            self.outer.watch(list(self.sources.values()))
            self.inner.watch(list(self.sources.values()))
            yield

    def slopes(self, loss: Tensor) -> dict[Name, Tensor]:
        """The gradient by what the loss depends on, under the outer tape's eyes."""
        if self._slopes is None:
            with self.outer:
                parts = self.inner.gradient(loss, list(self.sources.values()))
                # A gather's gradient is a sparse `IndexedSlices`, which cannot be
                # paired with a direction: make it dense.
                self._slopes = {
                    name: tf.convert_to_tensor(part)
                    for name, part in zip(self.sources, parts, strict=True)
                    if part is not None
                }
        return self._slopes


class _Recording:
    """A `Recording`."""

    def __init__(
        self,
        function: Callable[[Direction], tuple[Tensor, dict[Name, Tensor]]],
        point: Direction,
        last: Iterable[Name],
    ) -> None:
        self._point = _own(point)
        self._tapes = _Tapes(self._point)
        self._last = _Tapes({name: self._point[name] for name in last})
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._tapes.watching())
            if self._last.sources:
                stack.enter_context(self._last.watching())
            self.loss, self.taps = function(self._point)

    @functools.cached_property
    def gradient(self) -> dict[Name, Tensor]:
        """See the contract."""
        slopes = self._tapes.slopes(self.loss)
        return {
            name: slopes[name] if name in slopes else tf.zeros_like(source)
            for name, source in self._point.items()
        }

    def product(
        self, moved: Iterable[Name], wanted: Iterable[Name]
    ) -> Callable[[Direction], dict[Name, Tensor]]:
        """See the contract."""
        # With `output_gradients` the tape returns Σ_i v_i ∂g_i/∂θ = Hv. Without, it
        # would return the row sums of H, which are often mistaken for its diagonal.
        moved, wanted = list(moved), list(wanted)
        named = {*moved, *wanted}
        tapes = self._tapes
        if named and named <= set(self._last.sources):
            tapes = self._last
        slopes = tapes.slopes(self.loss)
        return self._backward(tapes, {name: slopes.get(name) for name in moved}, wanted)

    def pull_back(
        self, taps: Iterable[Name], wanted: Iterable[Name]
    ) -> Callable[[Direction], dict[Name, Tensor]]:
        """See the contract."""
        targets = {name: self.taps[name] for name in taps}
        return self._backward(self._tapes, targets, wanted)

    def _backward(
        self, tapes: _Tapes, targets: dict[Name, Tensor | None], wanted: Iterable[Name]
    ) -> Callable[[Direction], dict[Name, Tensor]]:
        sources = {name: self._point[name] for name in wanted}

        def backward(weights: Direction) -> dict[Name, Tensor]:
            pairs = [(t, weights[n]) for n, t in targets.items() if t is not None]
            if not pairs or not sources:
                return {name: tf.zeros_like(s) for name, s in sources.items()}
            with _missing_derivatives_named():
                parts = tapes.outer.gradient(
                    [t for t, _ in pairs],
                    list(sources.values()),
                    output_gradients=[w for _, w in pairs],
                    unconnected_gradients="zero",
                )
            return _like(sources, dict(zip(sources, parts, strict=True)))

        return backward


def _own(point: Direction) -> dict[Name, Tensor]:
    """The point as tensors of its own.

    A tape knows tensors by what they are, so that a function which uses one of the
    point's in another way as well would be differentiated by that too.
    """
    return {
        name: x if isinstance(x, tf.Variable) else tf.identity(x)
        for name, x in point.items()
    }


def _like(point: Direction, parts: Direction) -> dict[Name, Tensor]:
    """Dense gradients that know their shapes, also in the body of a loop."""
    dense = {name: tf.convert_to_tensor(part) for name, part in parts.items()}
    for name, part in dense.items():
        if not tf.executing_eagerly():
            part.set_shape(point[name].shape)
    return dense


@contextlib.contextmanager
def _missing_derivatives_named() -> Iterator[None]:
    """Translates TensorFlow's error for a gradient that it does not have."""
    try:
        yield
    except LookupError as error:
        # `gradient registry has no entry for: X` if eager, in graphs
        # `No gradient defined for operation 'name' (op type: X)`.
        found = re.search(
            r"registry has no entry for: (\w+)|No gradient.*\(op type: (\w+)\)",
            str(error),
        )
        if found is None:
            raise  # A KeyError of the user's own function, for instance.
        raise NotTwiceDifferentiable(
            f"TensorFlow has no derivative of {found[1] or found[2]}, which second "
            "derivatives of the loss need. Use central differences of the gradient "
            'instead: hvp="finite_difference".'
        ) from error


def hold_cotangent(x: Tensor) -> Tensor:
    """See the contract.

    With `f` the tensor and `g = ∂L/∂f`, the gradient `Jᵀ g` by what `f` was computed
    from is right, and its derivative is `Σ_c g_c ∂²f_c`, without `Jᵀ (∂²L/∂f²) J`.
    """

    def held(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return tf.identity(x), lambda g: tf.stop_gradient(g, name=HELD)

    return tf.custom_gradient(held)(x)


def function_of_variables(
    function: Callable[[], Tensor], variables: Sequence[Any]
) -> Callable[[Sequence[Tensor]], Tensor]:
    """See the contract."""
    raw = [_raw(variable) for variable in variables]

    def of_values(values: Sequence[Tensor]) -> Tensor:
        if all(_raw(x) is variable for x, variable in zip(values, raw, strict=True)):
            return tf.convert_to_tensor(function())
        # Tapes that watch the values do not see them pass through the variables, so
        # the gradient is taken where the function is, and handed to them.
        originals = [tf.identity(variable) for variable in raw]
        try:
            _assign(raw, values)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(raw)
                loss = tf.convert_to_tensor(function())
            parts = tape.gradient(loss, raw, unconnected_gradients="zero")
            parts = [tf.convert_to_tensor(part) for part in parts]
        finally:
            _assign(raw, originals)

        def known(*values: Tensor) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
            del values
            return tf.identity(loss), lambda g: [g * part for part in parts]

        return tf.custom_gradient(known)(*values)

    return of_values


def _raw(variable: Any) -> Any:
    """The framework's own variable inside a Keras variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _assign(variables: Sequence[Any], values: Sequence[Tensor]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


#: The option of TensorFlow's that leaves graphs as they are written.
_AS_WRITTEN = "disable_meta_optimizer"


class _Exactness:
    """What `twice_differentiable` changes in TensorFlow, and how it was before."""

    lock = threading.Lock()
    depth = 0
    originals: dict[tuple[Any, str], Any] = {}
    tensor_float_32 = False
    as_written = False


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """See the contract.

    Within this context some public functions are replaced; see `_EXACT`. Graphs traced
    outside are not affected. TF32, whose matrix products are good to three digits, is
    off, and so is what rewrites graphs before they run, where there is no GPU: it takes
    up to half of the time to the first product, and the next ones are no faster for it.

    The first one in changes TensorFlow and the last one out restores it. Nobody
    holds the lock in between: the threads of a strategy's replicas enter while the
    thread that waits for them is inside.
    """
    with _Exactness.lock:
        if _Exactness.depth == 0:
            for owner, name in _EXACT:
                _Exactness.originals[owner, name] = getattr(owner, name, None)
                setattr(owner, name, _EXACT[owner, name])
            _Exactness.tensor_float_32 = (
                tf.config.experimental.tensor_float_32_execution_enabled()
            )
            tf.config.experimental.enable_tensor_float_32_execution(False)
            options = tf.config.optimizer.get_experimental_options()
            _Exactness.as_written = options.get(_AS_WRITTEN, False)
            if not tf.config.list_physical_devices("GPU"):
                _leave_as_written(True)
        _Exactness.depth += 1
    try:
        yield
    finally:
        with _Exactness.lock:
            _Exactness.depth -= 1
            if _Exactness.depth == 0:
                for (owner, name), original in _Exactness.originals.items():
                    if original is None:
                        delattr(owner, name)
                    else:
                        setattr(owner, name, original)
                tf.config.experimental.enable_tensor_float_32_execution(
                    _Exactness.tensor_float_32
                )
                _leave_as_written(_Exactness.as_written)


def _leave_as_written(wanted: bool) -> None:
    """Whether TensorFlow rewrites no graphs before they first run (by Grappler)."""
    tf.config.optimizer.set_experimental_options({_AS_WRITTEN: wanted})


def _exact_moments(
    x: Any, axes: Any, shift: Any = None, keepdims: bool = False, name: Any = None
) -> tuple[Tensor, Tensor]:
    """`tf.nn.moments` with a variance that depends on the mean, as it does."""
    del shift  # The original ignores it as well.
    with tf.name_scope(name or "moments"):
        y = tf.cast(x, tf.float32) if x.dtype in (tf.float16, tf.bfloat16) else x
        mean = tf.reduce_mean(y, axes, keepdims=True)
        variance = tf.reduce_mean(
            tf.math.squared_difference(y, mean), axes, keepdims=keepdims
        )
        if not keepdims:
            mean = tf.squeeze(mean, axes)
        return tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)


def _exact_ctc_loss(
    labels: Any,
    logits: Any,
    label_length: Any,
    logit_length: Any,
    logits_time_major: bool = True,
    unique: Any = None,
    blank_index: int | None = None,
    name: Any = None,
) -> Tensor:
    """`tf.nn.ctc_loss`; sparse labels are left to the original."""
    if isinstance(labels, tf.SparseTensor):
        original = _Exactness.originals[tf.nn, "ctc_loss"]
        return original(
            labels,
            logits,
            label_length,
            logit_length,
            logits_time_major,
            unique,
            blank_index,
            name,
        )
    if not logits_time_major:
        logits = tf.transpose(logits, [1, 0, 2])
    blank = (blank_index or 0) % logits.shape[-1]
    with tf.name_scope(name or "ctc_loss"):
        return ctc_loss(
            tf.nn.log_softmax(logits), labels, label_length, logit_length, blank
        )


#: What is replaced where second derivatives are wanted.
_EXACT: dict[tuple[Any, str], Callable[..., Any]] = {
    # Keras' normalization layers call it. It computes its variance around
    # `stop_gradient(mean)`: the gradient is exact, the Hessian is not, and it is still
    # symmetric, so nothing looks wrong.
    (tf.nn, "moments"): _exact_moments,
    (tf.nn, "ctc_loss"): _exact_ctc_loss,
    # A gather's gradient is sparse. Gradients of gradients (of tanh, sigmoid, sqrt)
    # multiply and divide it by something, as if it were dense.
    (tf.IndexedSlices, "__mul__"): lambda x, y: tf.convert_to_tensor(x) * y,
    (tf.IndexedSlices, "__truediv__"): lambda x, y: tf.convert_to_tensor(x) / y,
}


# Tensors and places


def current_trace() -> Any:
    """See the contract."""
    return tf.compat.v1.get_default_graph() if not tf.executing_eagerly() else None


def is_tensor(x: Any) -> bool:
    """See the contract."""
    return isinstance(x, tf.Tensor)


def array(x: Any, dtype: str | None = None) -> Tensor:
    """See the contract."""
    if is_tensor(x) and (dtype is None or x.dtype == tf.as_dtype(dtype)):
        return x
    return tf.cast(x, dtype) if is_tensor(x) else tf.convert_to_tensor(x, dtype)


def values(variables: Iterable[Any]) -> list[Tensor]:
    """See the contract."""
    return [tf.convert_to_tensor(_raw(variable)) for variable in variables]


def reading(variables: Iterable[Any]) -> Callable[[], list[Tensor]]:
    """See the contract: read by one graph."""
    return on_variables(lambda values: ([], values), list(variables))


def on_variables(
    function: Callable[..., Any], variables: Sequence[Any]
) -> Callable[..., Any]:
    """See the contract.

    The graph reads and assigns by itself: each operation from Python would take longer
    than all of them in it.
    """
    raw = [_raw(variable) for variable in variables]

    def called(*args: Any) -> Any:
        new, result = function([tf.convert_to_tensor(v) for v in raw], *args)
        _assign(raw[: len(new)], new)
        return result

    return compiled(called)


def wide_float() -> str:
    """See the contract."""
    return "float64"


def place_of(variable: Any) -> str | None:
    """See the contract: the name of a device, `None` when unknown."""
    return getattr(_raw(variable), "device", None) or None


def on(place: str | None) -> contextlib.AbstractContextManager[Any]:
    """See the contract."""
    return tf.device(place) if place else contextlib.nullcontext()


def placed(x: Any, place: str | None) -> Tensor:
    """See the contract."""
    with on(place):
        x = array(x)
        return x if not place or x.device == place else tf.identity(x)


def free_memory(place: str | None) -> int | None:
    """See the contract. TensorFlow does not tell what an accelerator has."""
    return _free_on_host() if "CPU" in (place or "CPU") else None


def is_out_of_memory(error: BaseException) -> bool:
    """See the contract."""
    return isinstance(error, (MemoryError, tf.errors.ResourceExhaustedError))


def num_replicas() -> int:
    """See the contract."""
    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def process() -> tuple[int, int] | None:
    """See the contract: `tf.distribute` spreads data itself."""
    return None


def sum_over_processes(x: Tensor) -> Tensor:
    """See the contract."""
    return x


# Blocks of entries

_OVER_BLOCKS = {"sum": tf.reduce_sum, "max": tf.reduce_max, "min": tf.reduce_min}


#: Entries of each tensor that are worked on at once. Operations of a graph run as they
#: can, and each of them makes a tensor.
_ENTRIES = 2**20


def by_entries(function: Callable[..., list[Tensor]], *tensors: Tensor) -> list[Tensor]:
    """See the contract."""
    size = tensors[0].shape[-1] if tensors[0].shape.rank else 1
    if size is None or size <= _ENTRIES:
        return function(*tensors)

    def chunk(start: Any) -> list[Tensor]:
        found = function(*(x[..., start : start + _ENTRIES] for x in tensors))
        return [_first_last(x, -1) for x in found]

    def body(i: Tensor, *arrays: Any) -> list[Any]:
        found = zip(arrays, chunk(i * _ENTRIES), strict=True)
        return [i + 1, *(array.write(i, x) for array, x in found)]

    first = chunk(0)
    arrays = [
        tf.TensorArray(
            x.dtype,
            -(-size // _ENTRIES),
            infer_shape=False,
            element_shape=[None] * x.shape.rank,
        ).write(0, x)
        for x in first
    ]
    _, *arrays = tf.while_loop(
        lambda i, *_: i * _ENTRIES < size, body, [1, *arrays], parallel_iterations=1
    )
    # The last one is shorter: side by side in one go, they are copied but once.
    results = [_first_last(array.concat(), 1) for array in arrays]
    for result, x in zip(results, first, strict=True):
        result.set_shape([*x.shape[1:], size])
    return results


def _first_last(x: Tensor, shift: int) -> Tensor:
    """The last axis as the first one (−1), or the first one as the last (1)."""
    axes = range(x.shape.rank)
    return x if len(axes) == 1 else tf.transpose(x, np.roll(axes, -shift))


def parts(x: Tensor, sizes: Sequence[Any]) -> list[Tensor]:
    """See the contract: one operation, where each slice would be five of a graph."""
    return list(tf.split(x, list(sizes), axis=-1))


def over_blocks(kind: str, rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """See the contract.

    Along the last axis TensorFlow adds in a tree. Along the first one it adds one
    number after the other, and is off by 2 to 9 % after 10^7 in float32.
    """
    blocks = [_OVER_BLOCKS[kind](part, axis=1) for part in parts(rows, sizes)]
    return tf.stack(blocks, axis=1)


def block_numbers(sizes: Sequence[int]) -> Tensor:
    """See the contract: not by `tf.repeat`, which makes all blocks as long as one."""
    starts, size = np.cumsum(list(sizes)[:-1]), sum(sizes)
    starts = starts[starts < size].astype("int32")[:, None]
    begins = tf.scatter_nd(starts, tf.ones(len(starts), "int32"), [size])
    return tf.cumsum(begins)


# Random numbers

# `tf.random` reads a key in thirty operations, of which a graph with many keys is full.
# Its default generator takes one, but depends on the device, and reads negative keys
# differently under XLA. This reads them as `tf.random` does, in a few operations.
_PHILOX = {"alg": 1}
_SCRAMBLE = 0x02461E293EC8F720


def random_state_at_rest() -> contextlib.AbstractContextManager[None]:
    """See the contract: nothing puts TensorFlow's back."""
    return contextlib.nullcontext()


def signs(shape: Sequence[Any], key: Tensor, dtype: str) -> Tensor:
    """See the contract."""
    return _drawn(_signs, shape, key, dtype)


def normal(shape: Sequence[Any], key: Tensor, dtype: str) -> Tensor:
    """See the contract."""
    return _drawn(_normal, shape, key, dtype)


def fold_in(key: Tensor, number: Any) -> Tensor:
    """See the contract."""
    return _own_graph(_folded)(tf.cast(key, tf.int32), tf.cast(number, tf.int32))


def _signs(shape: Sequence[Any], dtype: str, key: Tensor) -> Tensor:
    bits = tf.raw_ops.StatelessRandomUniformIntV2(
        shape=shape, minval=0, maxval=2, **_read(key)
    )
    return tf.cast(2 * bits - 1, dtype)


def _normal(shape: Sequence[Any], dtype: str, key: Tensor) -> Tensor:
    return tf.raw_ops.StatelessRandomNormalV2(shape=shape, dtype=dtype, **_read(key))


def _folded(key: Tensor, number: Tensor) -> Tensor:
    first = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=(), dtype=tf.int32, **_read(key)
    )
    return tf.stack([first, number])


def _read(key: Tensor) -> dict[str, Any]:
    """A key as the generator takes it."""
    mixed = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=(2, 2),
        key=[_SCRAMBLE],
        counter=tf.cast(key, tf.uint64),
        dtype=tf.uint32,
        **_PHILOX,
    )
    own, counter = tf.unstack(tf.bitcast(mixed, tf.uint64))
    return {"key": own[tf.newaxis], "counter": [0, counter], **_PHILOX}


def _drawn(
    draw: Callable[..., Tensor], shape: Sequence[Any], key: Tensor, dtype: str
) -> Tensor:
    if any(tf.is_tensor(size) for size in shape):
        return draw(shape, dtype, key)
    return _own_graph(draw, tuple(shape), dtype)(key)


@functools.lru_cache(maxsize=1024)
def _own_graph(draw: Callable[..., Tensor], *settings: Any) -> Callable[..., Tensor]:
    """What draws, as a graph that others call: it is written once."""
    graph: Callable[..., Tensor] = tf.function(
        functools.partial(draw, *settings), autograph=False
    )
    return graph
