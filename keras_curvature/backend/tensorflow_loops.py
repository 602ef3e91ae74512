"""One function at many indices or on many rows: all at once, or one by one.

What is traced once in a loop's body would otherwise be traced as often as it runs.
"""

import contextlib
import threading

import tensorflow as tf


def sum_over_chunks(function, arrays, chunk_size):
    """`Σ_chunks function(*chunk)`, so that memory is bounded by one chunk.

    Args:
        function: takes the rows of each array that belong to one chunk; returns a
            tensor whose shape and dtype do not depend on the chunk.
        arrays: tensors with the same first dimension.
        chunk_size: number of rows in a chunk (the last may be shorter).
    """
    rows = arrays[0].shape[0]
    if rows is not None and not tf.is_tensor(chunk_size) and chunk_size >= rows:
        return function(*arrays)
    rows = tf.shape(arrays[0])[0]

    def body(start, total):
        stop = tf.minimum(start + chunk_size, rows)
        part = function(*[a[start:stop] for a in arrays])
        return stop, total + part

    first = tf.minimum(chunk_size, rows)
    initial = function(*[a[:first] for a in arrays])
    _, total = tf.while_loop(
        lambda start, _: start < rows, body, (first, initial), parallel_iterations=1
    )
    return total


def map_over_range(function, count):
    """`function(i)` for `i = 0 … count − 1`, all at once where TensorFlow can.

    Vectorizing folds the index into the batch axis of every operation, which turns
    many small products into few large ones. Operations that TensorFlow cannot
    vectorize (loops) are run one index after the other.

    Args:
        function: takes a scalar integer tensor, returns a tensor.
        count: number of indices.

    Returns:
        The results, stacked along a new first axis.
    """
    indices = tf.range(count)
    try:
        if vectorizing.off:
            raise NotImplementedError
        with _quiet():
            mapped = tf.vectorized_map(function, indices, fallback_to_while_loop=False)
        vectorizing.count += 1
        return mapped
    except (ValueError, NotImplementedError, LookupError):
        dtype = tf.TensorSpec.from_tensor(function(tf.constant(0))).dtype
        return tf.map_fn(
            function, indices, fn_output_signature=dtype, parallel_iterations=1
        )


def loop_over_range(function, count, dtype):
    """`function(i)` for `i = 0 … count − 1`, one after the other.

    Its graph is made once, which counts where it is a whole backward pass, and its
    memory is needed once.

    Args:
        function: takes a scalar integer tensor, returns a tensor.
        count: number of indices.
        dtype: dtype of what it returns.

    Returns:
        The results, stacked along a new first axis.
    """
    if count == 1:
        return function(tf.constant(0))[None]
    return tf.map_fn(
        function, tf.range(count), fn_output_signature=dtype, parallel_iterations=1
    )


class _Vectorizing(threading.local):
    """Whether `map_over_range` may vectorize, and how often it did."""

    off = False
    count = 0


vectorizing = _Vectorizing()


@contextlib.contextmanager
def _quiet():
    """Keeps TensorFlow from logging pages about what it cannot vectorize."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("CRITICAL")
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def without_vectorizing():
    """While tracing: `map_over_range` runs one index after the other."""
    vectorizing.off = True
    try:
        yield
    finally:
        vectorizing.off = False


def sum_over_range(function, count, chunk_size):
    """`Σ_i function(i)` for `i = 0 … count − 1`, `chunk_size` of them at once.

    Args:
        function: takes a scalar integer tensor, returns a list of tensors whose
            shapes do not depend on it. Must give zeros for indices ≥ `count`.
        count: number of indices.
        chunk_size: how many are vectorized together, which bounds the memory.

    Returns:
        A list of tensors.
    """
    specs = []

    def flat(i):
        parts = function(i)
        specs[:] = [(p.shape, p.dtype) for p in parts]
        return tf.concat([tf.reshape(p, [-1]) for p in parts], axis=0)

    def of_chunk(start):
        mapped = map_over_range(lambda i: flat(start + i), min(chunk_size, count))
        return tf.reduce_sum(mapped, axis=0)

    total = of_chunk(0)
    if count > chunk_size:
        _, total = tf.while_loop(
            lambda start, _: start < count,
            lambda start, total: (start + chunk_size, total + of_chunk(start)),
            (tf.constant(chunk_size), total),
            parallel_iterations=1,
        )
    parts = tf.split(total, [shape.num_elements() for shape, _ in specs])
    return [tf.reshape(p, s) for p, (s, _) in zip(parts, specs, strict=True)]
