"""An optimizer that steps in axes of the layers is handed its diagonal in them."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_curvature as kc


@pytest.mark.parametrize("diagonal", ["exact", "layerwise"])
def test_delivered_in_the_axes_of_the_moment(diagonal):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 5)) * np.logspace(-1, 1, 5)).astype("float32")
    y = rng.standard_normal((64, 3)).astype("float32")
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
    # Nothing is averaged, and the weights stay: what is left is the last delivery.
    optimizer = kc.DiagonalNewton(0.0, beta_2=0.0, axes="layer")
    model.compile(optimizer, "mse")
    feed = kc.CurvatureMonitor(
        (x, y), 5, diagonal=diagonal, diagonal_samples=4, num_matvecs=0
    )
    model.fit(x, y, batch_size=16, epochs=5, shuffle=False, verbose=0, callbacks=[feed])
    assert optimizer.curvature_updates > 3
    axes = optimizer.curvature_axes()
    left, right = (ops.convert_to_numpy(q) for q in axes[0])
    assert axes[1] is None
    # By the second renewal no axis is where it began.
    assert np.abs(left - np.eye(5)).max() > 0.3
    expected = kc.hessian_diagonal(model, x, y, method="exact", axes=axes).value
    found = [ops.convert_to_numpy(h + 0) for h in optimizer._curvatures]
    # One layer and a squared error: a sample's outputs do not meet, and signs are exact
    # where each output has its own axis. Turned, four samples are within a factor.
    for h, e in zip(found, expected, strict=True):
        if diagonal == "exact":
            np.testing.assert_allclose(h, e, 1e-3, 1e-4 * np.abs(e).max())
        else:
            assert np.abs(h - e).max() < 0.7 * np.abs(e).max()
