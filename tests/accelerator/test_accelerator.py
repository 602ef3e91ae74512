"""What only a GPU or TPU can show: `make test-accelerator`.

Each test compares the device with the CPU of the same machine. Costs are printed in
gradients, and not judged.
"""

import time

import cases
import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_curvature as kc
from keras_curvature import backend

BACKEND = keras.backend.backend()


def accelerators():
    """Names of the accelerators that the backend sees, for `keras.device`."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        kinds = [k for k in ("GPU", "TPU") if tf.config.list_physical_devices(k)]
        return [f"{kind.lower()}:0" for kind in kinds]
    if BACKEND == "jax":
        import jax

        return ["gpu:0"] if jax.default_backend() != "cpu" else []
    import torch

    return ["cuda:0"] if torch.cuda.is_available() else []


FOUND = accelerators()
pytestmark = pytest.mark.skipif(
    not FOUND, reason=f"{BACKEND} sees no accelerator on this machine"
)


def numpy_of(x):
    return np.asarray(ops.convert_to_numpy(x)).astype("float64")


def network(dtype="float32"):
    """Convolution, attention, recurrence and normalization, all small."""
    inputs = layers.Input((12, 12, 3))
    x = layers.Conv2D(8, 3, activation="gelu", dtype=dtype)(inputs)
    x = layers.MaxPooling2D(dtype=dtype)(x)
    x = layers.Reshape((25, 8), dtype=dtype)(x)
    attended = layers.MultiHeadAttention(2, 4, dtype=dtype)(x, x)
    x = layers.Add(dtype=dtype)([x, attended])
    x = layers.LayerNormalization(dtype=dtype)(x)
    x = layers.GRU(8, dtype=dtype)(x)
    model = keras.Model(inputs, layers.Dense(5, dtype=dtype)(x))
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return cases.randomize(model)


def data(samples=32):
    return cases._numbers(samples, 12, 12, 3), cases._labels(samples, 5)


def operator_on(device, dtype="float32"):
    with keras.device(device):
        return kc.HessianOperator(network(dtype), *data())


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_agrees_with_the_cpu(dtype):
    """Rounding apart: probes are in float32, without TF32 and cuDNN's recurrence."""
    there, here = operator_on(FOUND[0], dtype), operator_on("cpu:0", dtype)
    v = np.random.default_rng(0).standard_normal(there.shape[0])
    assert relative(there @ v, here @ v) < 1e-3
    with keras.device(FOUND[0]):
        exact = kc.hessian_diagonal(there, method="layerwise", num_matvecs=64)
    with keras.device("cpu:0"):
        same = kc.hessian_diagonal(here, method="layerwise", num_matvecs=64)
    distance = there.flatten(exact.value) - here.flatten(same.value)
    error = np.hypot(
        there.flatten(exact.standard_error), here.flatten(same.standard_error)
    )
    assert np.mean(np.abs(distance) <= 3 * error + 1e-6) > 0.95


def test_work_stays_on_the_device():
    op = operator_on(FOUND[0])
    with keras.device(FOUND[0]):
        v = ops.ones((op.shape[0],))
        for result in (op @ v, op.loss(), *op.value_and_gradient()):
            assert backend.place_of(result) == backend.place_of(v)


def test_what_it_costs():
    op = operator_on(FOUND[0])

    def seconds(work):
        work()
        times = []
        for _ in range(10):
            start = time.perf_counter()
            numpy_of(work())
            times.append(time.perf_counter() - start)
        return np.median(times)

    with keras.device(FOUND[0]):
        v = ops.ones((op.shape[0],))
        gradient = seconds(lambda: op.value_and_gradient()[1])
        product = seconds(lambda: op @ v)
    print(
        f"\n{BACKEND} on {FOUND[0]}: gradient {1e3 * gradient:.2f} ms, "
        f"product {product / gradient:.2f} gradients"
    )
