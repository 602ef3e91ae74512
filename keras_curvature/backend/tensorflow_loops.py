"""Compiled functions, and one function at many indices or on many rows.

What is traced once in a loop's body would otherwise be traced as often as it runs.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import tensorflow as tf
from keras import tree

from keras_curvature.backend.contract import Tensor

_traces = [0]


class _Vectorizing(threading.local):
    """Whether `map_range` may vectorize, and how often it did."""

    off = False
    count = 0


_vectorizing = _Vectorizing()


#: The entries of a nested structure, under the number of the structure.
_Numbered: TypeAlias = dict[str, list[Any]]


class _Structures:
    """Nested structures as lists of their entries, and back.

    `tf.function` sorts the keys of dictionaries, which names of different types do
    not allow. So it gets and returns lists.
    """

    def __init__(self) -> None:
        self._known: list[Any] = []

    def numbered(self, structure: Any) -> _Numbered:
        found = tree.flatten_with_path(structure)
        empty = tree.map_structure(lambda entry: 0, structure)
        # Equal dictionaries may be in different orders.
        known = [path for path, _ in found], empty
        if known not in self._known:
            self._known.append(known)
        return {str(self._known.index(known)): [entry for _, entry in found]}

    def packed(self, numbered: _Numbered) -> Any:
        ((number, entries),) = numbered.items()
        return tree.pack_sequence_as(self._known[int(number)][1], entries)


class _Dispatch:
    """Finds the graph for some tensors, and runs it.

    `tf.function` looks at each argument in several layers of Python, which takes ten
    times as long as to start a graph with the values of 160 variables. What decides is
    the same here, types and shapes, but for what calls seldom come with: those are left
    to `tf.function`.
    """

    def __init__(self) -> None:
        self._graphs: dict[Any, Any] = {}

    def __call__(self, function: Any, given: _Numbered) -> _Numbered:
        ((number, entries),) = given.items()
        tensors = [entry for entry in entries if entry is not None]
        plain = tf.executing_eagerly() and not tf.distribute.has_strategy()
        if not plain or not all(isinstance(tensor, tf.Tensor) for tensor in tensors):
            result: _Numbered = function(given)
            return result
        kinds = [None if e is None else (e.dtype, e._shape_tuple()) for e in entries]
        key = function, number, tuple(kinds)
        if key not in self._graphs:
            self._graphs[key] = function.get_concrete_function(given)
        graph = self._graphs[key]
        # What a graph does when it is called, after it has looked at its arguments.
        result = graph._call_flat(tensors, graph.captured_inputs)
        return result


#: Some operations vectorize but then do not run: the gradient of a grouped convolution
#: on a CPU.
_DOES_NOT_RUN = (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError)


def num_traces() -> int:
    """See the contract."""
    return _traces[0]


def compiled(
    function: Callable[..., Any], jit_compile: bool = False
) -> Callable[..., Any]:
    """See the contract.

    When a dimension varies from call to call (the last batch of a data set), the
    second trace leaves it open. XLA is off by default: it gets second derivatives of
    max-pooling wrong and is slower on a CPU.

    Returns:
        A callable with a method `traces()`, the number of graphs made so far.
    """
    arguments, results = _Structures(), _Structures()

    def counted(given: _Numbered) -> _Numbered:
        _traces[0] += 1
        return results.numbered(function(*arguments.packed(given)))

    def one_by_one(given: _Numbered) -> _Numbered:
        with _without_vectorizing():
            return counted(given)

    def traced(function: Callable[..., Any]) -> Any:
        # TensorFlow counts traces by the code of a function, over all of ours, and
        # would take the second model for a mistake; a `partial` is counted by itself.
        return tf.function(
            functools.partial(function),
            jit_compile=jit_compile,
            autograph=False,
            reduce_retracing=True,
        )

    state = {"function": traced(counted), "vectorizes": True}
    dispatch = _Dispatch()

    def call(*args: Any) -> Any:
        if not jit_compile:
            # XLA must know how often something is repeated.
            args = tuple(tf.constant(a) if type(a) is int else a for a in args)
        given, before = arguments.numbered(args), _vectorizing.count
        try:
            return results.packed(dispatch(state["function"], given))
        except _DOES_NOT_RUN:
            if _vectorizing.count == before or not state["vectorizes"]:
                raise
            state.update(function=traced(one_by_one), vectorizes=False)
            return results.packed(dispatch(state["function"], given))

    call.traces = lambda: state["function"].experimental_get_tracing_count()  # type: ignore[attr-defined]
    return call


def run_once(function: Callable[..., Any], *args: Any) -> Any:
    """See the contract: operation by operation, which takes a third of the time."""
    before = _vectorizing.count
    try:
        return function(*args)
    except _DOES_NOT_RUN:
        if _vectorizing.count == before:
            raise
        with _without_vectorizing():
            return function(*args)


def map_range(function: Callable[[Tensor], Any], count: int) -> Any:
    """See the contract.

    Vectorizing folds the index into the batch axis of every operation, which turns
    many small products into few large ones. Operations that TensorFlow cannot
    vectorize (loops, random numbers) are run one index after the other.
    """
    if _vectorizing.off:
        return loop_range(function, count)
    try:
        with _quiet():
            mapped = tf.vectorized_map(
                function, tf.range(count), fallback_to_while_loop=False
            )
    except (ValueError, NotImplementedError, LookupError):
        return loop_range(function, count)
    _vectorizing.count += 1
    return mapped


def loop_range(
    function: Callable[[Tensor], Any], count: int | Tensor, most: int | None = None
) -> Any:
    """See the contract.

    Its graph is made once, which counts where it is a whole backward pass.
    """
    static = 1 if most == 1 else tf.get_static_value(count)
    if static == 1 or tf.executing_eagerly():
        results = [function(tf.constant(i)) for i in range(int(static))]
        return tree.map_structure(lambda *parts: tf.stack(parts), *results)
    # The loop asks for the types of the results before it traces its body. As a
    # function the body is traced first, and only once.
    body = tf.function(functools.partial(function), autograph=False)
    traced = body.get_concrete_function(tf.TensorSpec((), tf.int32))
    return tf.map_fn(
        traced,
        tf.range(count),
        fn_output_signature=tree.map_structure(
            lambda t: tf.TensorSpec(t.shape, t.dtype), traced.structured_outputs
        ),
        parallel_iterations=1,
    )


def sum_range(
    function: Callable[[Tensor], Sequence[Tensor]], count: int, at_once: int
) -> list[Tensor]:
    """See the contract."""

    def part(start: Tensor) -> list[Tensor]:
        mapped = map_range(lambda i: list(function(start + i)), min(at_once, count))
        return [tf.reduce_sum(m, axis=0) for m in mapped]

    total = part(0)
    if count > at_once:
        _, total = tf.while_loop(
            lambda start, _: start < count,
            lambda start, total: (start + at_once, _added(total, part(start))),
            (tf.constant(at_once), total),
            parallel_iterations=1,
        )
    return list(total)


def sum_chunks(
    function: Callable[..., Tensor], arrays: Sequence[Tensor], rows: int
) -> Tensor:
    """See the contract."""
    static = arrays[0].shape[0]
    if static is not None and rows >= static:
        return function(*arrays)
    count = tf.shape(arrays[0])[0]

    def body(start: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        stop = tf.minimum(start + rows, count)
        return stop, total + function(*[a[start:stop] for a in arrays])

    first = tf.minimum(rows, count)
    initial = function(*[a[:first] for a in arrays])
    _, total = tf.while_loop(
        lambda start, _: start < count, body, (first, initial), parallel_iterations=1
    )
    return total


def _added(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    return [x + y for x, y in zip(xs, ys, strict=True)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TensorFlow from logging pages about what it cannot vectorize."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("CRITICAL")
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _without_vectorizing() -> Iterator[None]:
    """While tracing: `map_range` runs one index after the other."""
    _vectorizing.off = True
    try:
        yield
    finally:
        _vectorizing.off = False
