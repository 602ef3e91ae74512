"""An eigenvalue that is followed from probe to probe is shown once it is known."""

import keras
import numpy as np
import pytest

import keras_curvature as kc
from keras_curvature.callbacks.sharpness import Sharpness


def trained(optimizer, epochs=3):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)]
    )
    model.compile(optimizer, "mse")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((32, 3)), rng.standard_normal((32, 1))
    model.fit(x, y, batch_size=8, epochs=epochs, verbose=0)
    return model, kc.HessianOperator(model, x, y)


@pytest.mark.parametrize(
    ("values", "bounds", "shown"),
    [
        # Of a run with Adam: nothing that is positive was found yet, and then
        # something that may be anything.
        ([-1103.0], [185.0], None),
        ([20.9, 3.0], [2777.0, 1.0], None),
        ([-5.0, 50.0], [1.0, 3.0], 50.0),
    ],
)
def test_an_eigenvalue_is_shown_when_its_bound_is_below_it(values, bounds, shown):
    model, op = trained("adam", epochs=1)
    sharpness = Sharpness(0)

    class Found:
        eigenvalues, residual_norms = np.array(values), np.array(bounds)
        num_matvecs = 4

    sharpness._subspace.update = lambda *_: Found
    figures, spent = sharpness.look(model, op)
    key = "hessian_preconditioned_max_eigenvalue"
    assert figures[key] == shown and spent == (4 if shown else 12)
    assert figures[f"{key}_error"] == bounds[int(np.argmax(values))]
