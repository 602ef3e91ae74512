"""The monitor as each framework trains: saved, frozen, on several devices."""

import os
import subprocess
import sys
import warnings

import cases
import keras
import numpy as np
import pytest
from keras import layers
from patience import PATIENCE
from training import (
    ON_JAX,
    ON_TENSORFLOW,
    assert_same,
    data,
    fit,
    monitor,
    network,
    state,
    steps,
)

import keras_curvature as kc

X, Y = data()

only_jax = pytest.mark.skipif(
    not ON_JAX, reason="`keras.distribution` works on JAX only."
)

#: No `keras.utils.set_random_seed`, which imports TensorFlow on any backend.
ALONE = """
import sys, keras, numpy as np, keras_curvature as kc
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile(kc.DiagonalNewton(), "mse")
x, y = np.ones((8, 3), "float32"), np.ones((8, 1), "float32")
watch = kc.CurvatureMonitor((x, y), 1, sys.argv[1], spectral_density=True)
model.fit(x, y, batch_size=4, verbose=0, callbacks=[watch, kc.CurvatureFeed((x, y), 1)])
assert [record["step"] for record in watch.history] == [0, 1, 2]
assert "tensorflow" not in sys.modules, "TensorFlow was imported"
"""


@pytest.mark.skipif(ON_TENSORFLOW, reason="It cannot do without itself.")
def test_without_tensorflow(tmp_path):
    """It is no part of an installation for another framework."""
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", ALONE, str(tmp_path)],
        env=os.environ | {"KERAS_BACKEND": keras.backend.backend()},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(list((tmp_path / "curvature").iterdir())) == 1


def test_resumed_from_a_file(tmp_path):
    """Saved after a fit and loaded: goes on with the curvature that it had."""

    def feed():
        return kc.CurvatureFeed((X, Y), 4, 8, diagonal="gauss_newton")

    def go_on(model, feed):
        with warnings.catch_warnings():
            # Such as that the optimizer steps without curvature.
            warnings.simplefilter("error", UserWarning)
            fit(model, feed)
        return state(model)

    model, first = network(optimizer=kc.DiagonalNewton(0.05)), feed()
    fit(model, first)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    updates = again.optimizer.curvature_updates
    assert updates == model.optimizer.curvature_updates == 3
    assert_same(go_on(model, first), go_on(again, feed()))
    # At 12, 16 and 20.
    assert again.optimizer.curvature_updates == updates + 3


def test_frozen_between_two_fits():
    """The second fit's probes cover what is still trained."""
    watch = monitor(diagonal="gauss_newton", num_matvecs=4, update_freq=5)
    model = network()
    fit(model, watch)
    model.layers[0].trainable = False
    model.compile("sgd", model.loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, watch)
    assert steps(watch) == [0, 5, 10] * 2
    covered = [[v["size"] for v in record["variables"]] for record in watch.history]
    assert covered == [[12, 4, 12, 3]] * 3 + [[12, 3]] * 3
    h = kc.hessian_matrix(model, X[:20], Y[:20])
    assert h.shape == (15, 15)
    np.testing.assert_allclose(
        watch.history[-1]["hessian_trace"], np.trace(h), rtol=1e-4
    )


# Several devices


def figures_of(distribution=None):
    """The records of a monitored fit, and the model, made under a distribution."""
    keras.distribution.set_distribution(distribution)
    try:
        stack = layers.Dense(8, "tanh", name="hidden"), layers.Dense(4), layers.Dense(3)
        model = network(*stack, optimizer=kc.DiagonalNewton(0.05))
        cases.randomize(model)
        watch = monitor(diagonal="exact", num_matvecs=12, update_freq=5)
        fit(model, watch)
    finally:
        keras.distribution.set_distribution(None)
    return watch.history, model


def assert_same_figures(found, expected):
    assert [r["step"] for r in found] == [0, 5, 10]
    # At the same weights: how `fit` deals its batches to devices is Keras' own.
    for name in ("loss", "hessian_trace", "hessian_frobenius_norm"):
        np.testing.assert_allclose(found[0][name], expected[0][name], rtol=1e-5)
        assert all(np.isfinite(record[name]) for record in found)


@pytest.fixture(scope="module")
def on_one_device():
    return figures_of()[0]


@only_jax
def test_data_parallel(on_one_device):
    """The probe's batch is spread over the devices, the weights are on each."""
    found, model = figures_of(keras.distribution.DataParallel())
    assert len(model.layers[0].kernel.value.devices()) == 4
    assert_same_figures(found, on_one_device)


@only_jax
def test_model_parallel(on_one_device):
    """Weights are spread as well: the hidden layer's columns, two on each device."""
    devices = keras.distribution.list_devices("cpu")[:4]
    mesh = keras.distribution.DeviceMesh((1, 4), ["batch", "model"], devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*hidden/kernel"] = (None, "model")
    found, model = figures_of(
        keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    )
    kernel = model.layers[0].kernel.value
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 2)}
    assert_same_figures(found, on_one_device)
