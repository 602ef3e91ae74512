"""Critical sharpness along trainings, against the eigenvalue that it stands for.

Two networks are trained on all of 512 digits at once, by gradient descent and by Adam.
On the way the critical sharpness along the (preconditioned) gradient is compared with
the curvature along the same step, and with the largest eigenvalue of the Hessian that
the optimizer sees; both are computed from products.
"""

import keras
import measure
import networks
import numpy as np
import scipy.sparse.linalg

import keras_curvature as kc
from keras_curvature.callbacks.sharpness import stability_threshold
from keras_curvature.critical import CriticalSearch
from keras_curvature.preconditioning import preconditioner

#: Steps at which to look.
STEPS = (1, 10, 30, 100, 200, 400, 600)


def deep_mlp():
    """Four hidden layers: gradient descent drives them to the edge of stability."""
    hidden = [keras.layers.Dense(32, "relu") for _ in range(4)]
    return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])


def half_squares(y, prediction):
    """Half the squared distance of each sample from its one-hot label."""
    target = keras.ops.one_hot(y, 10)
    return keras.ops.sum((target - prediction) ** 2, axis=-1) / 2


CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TRAININGS = {
    "relu MLP, squares, gradient descent": (
        deep_mlp,
        half_squares,
        lambda: keras.optimizers.SGD(0.3),
    ),
    "gelu CNN, cross-entropy, Adam": (
        networks.gelu_cnn,
        CROSS_ENTROPY,
        lambda: keras.optimizers.Adam(0.01),
    ),
}


def run():
    """Trains both networks; returns a list of rows, one for each look."""
    rows = []
    for name, (build, loss, optimizer) in TRAININGS.items():
        keras.utils.set_random_seed(0)
        x, y = (part[:512] for part in networks.digits())
        model = build()
        model.compile(optimizer(), loss)
        operator, search = kc.HessianOperator(model, x, y), CriticalSearch()
        done = 0
        for step in STEPS:
            model.fit(
                x, y, batch_size=len(x), epochs=step - done, shuffle=False, verbose=0
            )
            done = step
            rows.append({"training": name, "step": step} | _look(operator, search))
        print(f"{name} done", flush=True)
    return rows


def _look(operator, search):
    optimizer = operator.evaluation.loss.model.optimizer
    scale = preconditioner(optimizer, operator)
    found = search.look(operator, scale)
    loss, gradient = (measure.on_host(t) for t in operator.value_and_gradient())
    scale = np.ones_like(gradient) if scale is None else measure.on_host(scale)
    # The Hessian that the optimizer sees, and its step in the same coordinates.
    root = np.sqrt(scale)
    seen = scipy.sparse.linalg.LinearOperator(
        operator.shape,
        matvec=lambda v: (operator @ (np.ravel(v) / root)) / root,
        dtype=operator.dtype,
    )
    (largest,) = scipy.sparse.linalg.eigsh(
        seen, k=1, which="LA", tol=1e-4, return_eigenvectors=False
    )
    direction = gradient / root
    return {
        "loss": float(loss),
        "critical": found.value,
        "bound": found.error,
        "losses": found.num_losses,
        "along the step": float(
            direction @ (seen @ direction) / (direction @ direction)
        ),
        "largest": float(largest),
        "threshold": stability_threshold(optimizer),
        "critical / largest": found.value and found.value / float(largest),
    }


if __name__ == "__main__":
    results = run()
    measure.save("critical_sharpness", results)
    measure.print_table("Critical sharpness along two trainings", results)
