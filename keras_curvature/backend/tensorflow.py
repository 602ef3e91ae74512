"""TensorFlow: compiling, tensors, devices and random numbers.

Next to it are `tensorflow_tapes` (derivatives), `tensorflow_loops` and
`tensorflow_graphs` (what a traced graph tells).

Everything here works on plain tensors and functions of them. The conventions:

* *sources* are what a loss is differentiated by: a list of tensors or
  `tf.Variable`s;
* a *direction* is a list of tensors shaped like the sources;
* functions are pure and traceable unless their docstring says otherwise.
"""

import contextlib
import functools

import tensorflow as tf

from keras_curvature.backend.tensorflow_loops import vectorizing, without_vectorizing

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
        with without_vectorizing():
            return counted(*args)

    traced = tf.function(functools.partial(counted), **options)
    state = {"call": traced}

    def call(*args):
        before = vectorizing.count
        try:
            return state["call"](*args)
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
            # Some operations vectorize but then do not run: the gradient of a
            # grouped convolution on a CPU.
            if vectorizing.count == before or state["call"] is not traced:
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


def random_signs_like(tensor, seed):
    """Random signs of the shape and dtype of a tensor; `seed` as in `random_signs`."""
    signs = random_signs(tf.shape(tensor), seed, tensor.dtype)
    # Known also in the body of a loop, where TensorFlow does not see it.
    signs.set_shape(tensor.shape)
    return signs


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
