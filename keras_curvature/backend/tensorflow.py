"""TensorFlow: the only module that knows its tapes, tracing and devices.

Everything here works on plain tensors and functions of them. The conventions:

* *sources* are what a loss is differentiated by: a list of tensors or
  `tf.Variable`s;
* a *direction* is a list of tensors shaped like the sources;
* functions are pure and traceable unless their docstring says otherwise.
"""

import contextlib
import functools
import threading

import numpy as np
import tensorflow as tf

_traces = [0]


def num_traces():
    """Number of graphs that were traced so far, of all compiled functions."""
    return _traces[0]


def compiled(function, jit_compile=False):
    """Compiles a function of tensors (nested structures allowed).

    The graph is traced once per signature; when a dimension varies from call to
    call (the last batch of a data set), the second trace leaves it open.

    Args:
        function: a pure function of tensors.
        jit_compile: whether XLA compiles the graph as well. Off by default: XLA
            gets second derivatives of max-pooling wrong and is slower on a CPU.

    Returns:
        A callable with a method `traces()`, the number of graphs made so far.
    """
    # TensorFlow counts traces by the code of a function, over all operators, and would
    # take the second model for a mistake; a `partial` is counted by itself.
    options = {
        "jit_compile": jit_compile,
        "autograph": False,
        "reduce_retracing": True,
    }

    def counted(*args):
        _traces[0] += 1
        return function(*args)

    def one_by_one(*args):
        with _without_vectorizing():
            return counted(*args)

    traced = tf.function(functools.partial(counted), **options)
    state = {"call": traced}

    def call(*args):
        before = _vectorizing.count
        try:
            return state["call"](*args)
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
            # Some operations vectorize but then do not run: the gradient of a
            # grouped convolution on a CPU.
            if _vectorizing.count == before or state["call"] is not traced:
                raise
            state["call"] = tf.function(functools.partial(one_by_one), **options)
            return state["call"](*args)

    call.traces = lambda: state["call"].experimental_get_tracing_count()
    return call


def is_tensor(x):
    """Whether `x` is a tensor of this backend."""
    return isinstance(x, tf.Tensor)


def array(x, dtype=None):
    """`x` as a tensor of this backend, on the current device."""
    if is_tensor(x) and (dtype is None or x.dtype == tf.as_dtype(dtype)):
        return x
    return tf.cast(x, dtype) if is_tensor(x) else tf.convert_to_tensor(x, dtype)


def values_of(variables):
    """The current values of Keras or TensorFlow variables, as tensors."""
    raw = [getattr(variable, "value", variable) for variable in variables]
    return [tf.convert_to_tensor(v() if callable(v) else v) for v in raw]


def device_of(variable):
    """The name of the device that holds a variable; empty when unknown."""
    value = getattr(variable, "value", None)
    # A Keras variable holds a TensorFlow one; `value` of the latter is a method.
    raw = variable if value is None or callable(value) else value
    return getattr(raw, "device", "") or ""


def on_device(device):
    """A context in which new tensors are placed on `device` (a name)."""
    return tf.device(device) if device else contextlib.nullcontext()


def num_replicas():
    """Number of replicas of the distribution strategy whose scope we are in, or 1."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def placed(x, device):
    """`x` as a tensor on `device` (a name; empty for wherever it is)."""
    with on_device(device):
        x = array(x)
        return x if not device or x.device == device else tf.identity(x)


#: The default is chosen by device, and reads negative seeds differently under XLA.
_GENERATOR = "philox"


def random_signs(shape, seed, dtype="float32"):
    """Rademacher directions: independent random signs ±1, each with probability ½.

    Args:
        shape: shape of the result (a tensor or a tuple).
        seed: two integers, as a pair or an int tensor of shape `(2,)`. The same
            seed always gives the same signs; no global random state is read or
            written, and inside a compiled function a seed passed as a tensor
            gives fresh signs on every call.
        dtype: floating type of the result.
    """
    bits = tf.random.stateless_uniform(shape, seed, 0, 2, tf.int32, alg=_GENERATOR)
    return tf.cast(2 * bits - 1, dtype)


def fold_seed(seed, number):
    """A seed that differs for each `number`; both may be tensors."""
    seed = tf.cast(seed, tf.int32)
    return tf.random.experimental.stateless_fold_in(seed, number, alg=_GENERATOR)


def random_normal(shape, seed, dtype="float32"):
    """Independent standard normal numbers; `seed` as in `random_signs`."""
    return tf.random.stateless_normal(shape, seed, dtype=dtype, alg=_GENERATOR)


def current_trace():
    """What is being traced right now: an object to compare with `is`.

    The body of a loop or of a branch is a trace of its own, whose tensors cannot be
    used outside of it.
    """
    return tf.compat.v1.get_default_graph() if not tf.executing_eagerly() else None


def sum_over_chunks(function, arrays, chunk_size):
    """`Σ_chunks function(*chunk)`, so that memory is bounded by one chunk.

    Args:
        function: takes the rows of each array that belong to one chunk; returns a
            tensor whose shape and dtype do not depend on the chunk.
        arrays: tensors with the same first dimension.
        chunk_size: number of rows in a chunk (the last may be shorter).
    """
    rows = arrays[0].shape[0]
    if rows is not None and not is_tensor(chunk_size) and chunk_size >= rows:
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
        if _vectorizing.off:
            raise NotImplementedError
        with _quiet():
            mapped = tf.vectorized_map(function, indices, fallback_to_while_loop=False)
        _vectorizing.count += 1
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


_vectorizing = _Vectorizing()


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
def _without_vectorizing():
    """While tracing: `map_over_range` runs one index after the other."""
    _vectorizing.off = True
    try:
        yield
    finally:
        _vectorizing.off = False


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


def gradient(loss_fn, sources):
    """The loss and its gradient.

    Args:
        loss_fn: function without arguments that returns a scalar and reads
            `sources`.
        sources: list of tensors or `tf.Variable`s.

    Returns:
        The loss, and a list of dense gradients shaped like the sources, `None`
        for a source that the loss does not depend on.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(sources)
        loss = loss_fn()
    return loss, [_dense(g) for g in tape.gradient(loss, sources)]


class GradientProducts:
    """Hessian-vector products by tape over tape, one forward pass for many.

    Records the loss and its gradient once; every call of `product` then costs one
    more backward pass (about 1.35 gradients, where a lone product costs 2 to 2.4).

    Args:
        loss_fn: function that returns the scalar loss. It receives a function
            `watch(tensor)`, with which it may declare further sources while the
            loss is being computed; they are appended to `sources`.
        sources: list of tensors or `tf.Variable`s to differentiate by.

    Attributes:
        loss: the scalar loss.
        sources: all sources, the ones declared later included.
        gradients: dense gradients by source, `None` where there is no dependence.
    """

    def __init__(self, loss_fn, sources):
        self.sources = list(sources)
        self._outer = tf.GradientTape(persistent=True, watch_accessed_variables=False)
        with self._outer as outer:
            with tf.GradientTape(watch_accessed_variables=False) as inner:

                def watch(tensor):
                    inner.watch(tensor)
                    outer.watch(tensor)
                    self.sources.append(tensor)

                outer.watch(self.sources)
                inner.watch(self.sources)
                self.loss = loss_fn(watch)
            # A gather's gradient is a sparse `IndexedSlices`, which cannot be
            # paired with a direction: make it dense while the outer tape looks on.
            self.gradients = [
                _dense(g) for g in inner.gradient(self.loss, self.sources)
            ]

    def product(self, direction, wanted=None):
        """`H v`: the Hessian of the loss times one direction.

        Args:
            direction: list of tensors shaped like `sources`; `None` stands for zero
                and saves its part of the work.
            wanted: indices of the sources whose part of the product is needed.
                Defaults to all.

        Returns:
            A list shaped like `sources`, with `None` for parts not wanted, and zeros
            where the loss is at most linear.
        """
        wanted = range(len(self.sources)) if wanted is None else wanted
        products = [None] * len(self.sources)
        pairs = [
            (g, v)
            for g, v in zip(self.gradients, direction, strict=True)
            if g is not None and v is not None
        ]
        if not pairs:
            for i in wanted:
                products[i] = tf.zeros_like(self.sources[i])
            return products
        targets, weights = zip(*pairs, strict=True)
        # With `output_gradients` the tape returns Σ_i v_i ∂g_i/∂θ = Hv. Without,
        # it would return the row sums of H, which are often mistaken for its
        # diagonal.
        parts = self._outer.gradient(
            targets,
            [self.sources[i] for i in wanted],
            output_gradients=list(weights),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        for i, part in zip(wanted, parts, strict=True):
            products[i] = _dense(part)
        return products

    def pull_back(self, targets, cotangents, sources):
        """`Jᵀ w`: recorded tensors' cotangents carried back to sources.

        Args:
            targets: list of recorded tensors.
            cotangents: list of tensors shaped like the targets.
            sources: list of sources or recorded tensors.

        Returns:
            A list shaped like `sources`; zeros where there is no dependence.
        """
        parts = self._outer.gradient(
            targets,
            sources,
            output_gradients=cotangents,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return [_dense(part) for part in parts]

    def depends(self, target, sources):
        """Whether a recorded tensor depends on any of `sources`, structurally."""
        parts = self._outer.gradient(target, sources)
        return any(part is not None for part in parts)


@tf.custom_gradient
def with_constant_cotangent(x):
    """`x`, behind which the gradient counts as a constant for the next derivative.

    With `f` the tensor and `g = ∂L/∂f`, the gradient `Jᵀ g` by what `f` was computed
    from is right, and its derivative is `Σ_c g_c ∂²f_c`, without `Jᵀ (∂²L/∂f²) J`.
    """
    return tf.identity(x), tf.stop_gradient


def finite_difference_products(gradient_at, values, directions):
    """Hessian-vector products by central differences of the gradient.

    `Hv ≈ (g(θ + εv) − g(θ − εv)) / 2ε`. The displacement `ε‖v‖` is
    `0.2 u^{1/3} (1 + ‖θ_v‖)`, with the machine epsilon `u` and the norm `‖θ_v‖` of
    the parameters that `v` moves: about 1e-3 in float32 and 1e-6 in float64. The
    power balances truncation against rounding (Nocedal and Wright, Numerical
    Optimization, section 8.1). The factor is ours: five times the displacement left
    errors of 5 to 50 % for the leading eigenvector of a transformer in float32.

    The relative error is about 1e-4 to 1e-3 in float32 and 1e-9 in float64. Where the
    gradient jumps (relu, max), a jump within the displacement adds a large error.

    Args:
        gradient_at: function from a list of values to the list of gradients.
        values: list of tensors, the point θ.
        directions: list of directions.

    Returns:
        A list of products, each shaped like `values`.
    """
    step = 0.2 * max(_epsilon(v.dtype) for v in values) ** (1 / 3)
    products = []
    for direction in directions:
        length = tf.sqrt(_sum_of_squares(direction))
        length = tf.where(length > 0, length, tf.ones_like(length))
        unit = [tf.cast(v, tf.float64) / length for v in direction]
        # The parameters' mean square where v moves them, times the number of them:
        # `1 / Σ u⁴`, from 1 for a basis vector to P for random signs.
        moved = _sum_of_squares(
            [tf.cast(x, tf.float64) * u for x, u in zip(values, unit, strict=True)]
        )
        spread = _sum_of_squares([u * u for u in unit])
        size = tf.sqrt(tf.math.divide_no_nan(moved, spread))
        epsilon = tf.cast(step, tf.float64) * (1 + size) / length

        def shifted(by, direction=direction):
            return [
                x + tf.cast(by, x.dtype) * v
                for x, v in zip(values, direction, strict=True)
            ]

        up, down = gradient_at(shifted(epsilon)), gradient_at(shifted(-epsilon))
        products.append(
            [
                (u - d) / tf.cast(2 * epsilon, u.dtype)
                for u, d in zip(up, down, strict=True)
            ]
        )
    return products


def _epsilon(dtype):
    """The distance from 1 to the next number."""
    if dtype == tf.bfloat16:
        return 2.0**-7  # NumPy does not know it.
    return float(np.finfo(dtype.as_numpy_dtype).eps)


def _sum_of_squares(tensors):
    """Over all tensors, whose dtypes may differ, in float64."""
    return tf.add_n([tf.reduce_sum(tf.square(tf.cast(t, tf.float64))) for t in tensors])


_moments_lock = threading.RLock()


@contextlib.contextmanager
def exact_second_derivatives():
    """While tracing: makes TensorFlow's second derivatives right.

    `tf.nn.moments`, which Keras' normalization layers call, computes its variance
    around `stop_gradient(mean)`. The gradient is exact, the Hessian is not, and it
    is still symmetric, so nothing looks wrong. Within this context the public
    function is replaced by one without the shortcut. Graphs traced outside are not
    affected.
    """
    with _moments_lock:
        original = tf.nn.moments
        tf.nn.moments = _exact_moments
        try:
            yield
        finally:
            tf.nn.moments = original


def _exact_moments(x, axes, shift=None, keepdims=False, name=None):
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


def _dense(g):
    return g if g is None else tf.convert_to_tensor(g)
