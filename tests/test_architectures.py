"""Architectures in use: products, diagonals and samples, and the training of one."""

import functools

import cases
import keras
import numpy as np
import pytest
from keras import layers, ops
from small_architectures import ARCHITECTURES, ROUNDED, differences

import keras_curvature as kc

BACKEND = keras.backend.backend()

#: Keras computes in float64 on TensorFlow alone.
FLOAT = "float64" if BACKEND == "tensorflow" else "float32"

#: The others are measured in benchmarks/architectures.py, because each takes long.
QUICK = (
    "gpt2",
    "llama",
    "t5",
    "vit",
    "unet",
    "detr",
    "ctc",
    "graphs",
    "graph",
    "experts",
    "lora",
    "int8",
    "nested",
)


if BACKEND == "jax":
    # Each takes seconds to compile: one of a kind.
    QUICK = ("graphs", "graph", "experts", "int8")


@pytest.fixture(autouse=True)
def _float():
    with cases.floatx(FLOAT):
        yield


@functools.cache
def operator(name):
    case = ARCHITECTURES[name]()
    return kc.HessianOperator(case.model, case.x, case.y)


@pytest.mark.parametrize("name", QUICK)
def test_products_are_differences_of_the_gradient(name):
    op = operator(name)
    v = np.random.default_rng(0).standard_normal(op.shape[0])
    # Steps that leave about as much of rounding as of truncation.
    exact = FLOAT == "float64" and name not in ROUNDED
    step, tolerance = (1e-3, 1e-7) if exact else (2e-2, 1e-3)
    expected = differences(op, v, step)
    distance = np.linalg.norm(op @ v - expected)
    assert distance <= tolerance * np.linalg.norm(expected)


@pytest.mark.skipif(BACKEND != "torch", reason="Nothing has to be compiled on PyTorch.")
# The largest two have nothing that the others lack.
@pytest.mark.parametrize("name", [n for n in QUICK if n not in ("t5", "unet")])
def test_diagonals_are_those_of_the_matrix(name):
    op = operator(name)
    dense = op.to_dense().astype("float64")
    scale = np.abs(np.diag(dense)).max()
    # Rounding of float32 through a few layers.
    np.testing.assert_allclose(dense, dense.T, rtol=0, atol=2e-5 * np.abs(dense).max())
    exact = kc.hessian_diagonal(op, method="exact", verbose=False)
    np.testing.assert_allclose(
        op.flatten(exact.value), np.diag(dense), rtol=0, atol=2e-5 * scale
    )
    sampled = kc.hessian_diagonal(
        op, method="layerwise", num_matvecs=32, control_variate=False, verbose=False
    )
    distance = np.abs(op.flatten(sampled.value) - np.diag(dense))
    error = op.flatten(sampled.standard_error)
    assert np.all(distance <= 6 * error + 2e-5 * scale)


@pytest.mark.skipif(BACKEND == "jax", reason="Not among the few that are made on JAX.")
def test_adapters_count_and_what_they_adapt_does_not():
    names = [v.name for v in operator("int8").variables]
    assert names == ["bias", "lora_kernel_a", "lora_kernel_b", "kernel", "bias"]
    names = {v.name for v in operator("lora").variables}
    kernels = {"lora_kernel_a", "lora_kernel_b"}
    # The kernel is that of the head, which was adapted too but for its bias.
    assert names == {"lora_embeddings_a", "lora_embeddings_b", "bias"} | kernels


class Gan(keras.Model):
    """Two models against each other, each with its optimizer."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([layers.Input((2,)), layers.Dense(3, "tanh")])
        self.judge = keras.Sequential(
            [layers.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(1)]
        )
        self.built = True

    def compile(self, generator_optimizer, judge_optimizer):
        super().compile()
        self.optimizers = generator_optimizer, judge_optimizer

    def call(self, noise):
        return self.judge(self.generator(noise))

    def train_step(self, data):
        import tensorflow as tf

        noise, real = data
        with tf.GradientTape(persistent=True) as tape:
            judge_loss = ops.mean(
                ops.softplus(-self.judge(real)) + ops.softplus(self(noise))
            )
            generator_loss = generated(self, noise)
        for loss, model, optimizer in zip(
            (generator_loss, judge_loss),
            (self.generator, self.judge),
            self.optimizers,
            strict=True,
        ):
            variables = model.trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)
        return {"generator_loss": generator_loss, "judge_loss": judge_loss}


def generated(model, noise, real=None):
    """What the generator minimises."""
    return ops.mean(ops.softplus(-model(noise)))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="`train_step` is TensorFlow's.")
def test_a_gan_is_watched_by_the_loss_of_its_generator():
    keras.utils.set_random_seed(0)
    noise, real = cases._numbers(8, 2), cases._numbers(8, 3, seed=1)
    model = Gan()
    model.compile(keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1))
    monitor = kc.CurvatureMonitor(
        (noise, real),
        update_freq=2,
        loss_fn=generated,
        variables=model.generator.trainable_variables,
        on_error="raise",
    )
    model.fit(noise, real, batch_size=2, verbose=0, callbacks=[monitor])
    assert [record["step"] for record in monitor.history] == [0, 2, 4]
    op = kc.HessianOperator(
        model,
        noise,
        real,
        loss_fn=generated,
        variables=model.generator.trainable_variables,
    )
    v = np.random.default_rng(0).standard_normal(op.shape[0])
    np.testing.assert_allclose(op @ v, differences(op, v, 1e-3), rtol=1e-6, atol=1e-9)
    last = monitor.history[-1]
    dense = op.to_dense()
    np.testing.assert_allclose(last["hessian_trace"], np.trace(dense), rtol=1e-6)
