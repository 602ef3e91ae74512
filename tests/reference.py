"""Dense Hessians by independent means: no code of the package is used here.

Central differences of the gradient are the judge: no defect in second derivatives
can fool them. Second derivatives as TensorFlow gives them without our help are here
too, to document where they are wrong.
"""

import contextlib
import random

import numpy as np
import tensorflow as tf


def loss(model, x, y=None, sample_weight=None, training=False):
    """The training loss as `Model.train_step` computes it (with side effects)."""
    y_pred = model(x, training=training)
    return model.compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
    )


class FlatGradient:
    """The gradient of a case's loss as a function of one flat parameter vector.

    Args:
        model, x, y, sample_weight, training: see `cases.Case`.
        loss_fn: function without arguments that replaces the training loss.
    """

    def __init__(
        self, model, x, y=None, sample_weight=None, training=False, loss_fn=None
    ):
        x, y, sample_weight = tf.nest.map_structure(
            lambda a: None if a is None else tf.convert_to_tensor(a),
            (x, y, sample_weight),
        )
        self.loss_fn = loss_fn or (lambda: loss(model, x, y, sample_weight, training))
        self.variables = list(model.trainable_variables)
        # Statistics and seeds move in each call: the next starts from the same ones.
        self.state = list(model.non_trainable_variables)
        with self.unchanged_state():
            self.loss_fn()  # Creates what is still missing: losses and metrics.
        self.compiled = tf.function(self.value_and_gradient, autograph=False)

    @contextlib.contextmanager
    def unchanged_state(self):
        values = [v.numpy() for v in self.state]
        yield
        for variable, value in zip(self.state, values, strict=True):
            variable.assign(value)

    def value_and_gradient(self):
        """The loss and its flat gradient; traceable."""
        raw = [v.value for v in self.variables]
        with tf.GradientTape() as tape:
            value = self.loss_fn()
        gradients = tape.gradient(value, raw, unconnected_gradients="zero")
        return value, flatten(gradients)

    def at(self):
        """The flat vector of the current values."""
        return np.concatenate([np.ravel(v.numpy()) for v in self.variables])

    def __call__(self, flat):
        """The gradient at `flat`, as a NumPy vector; nothing stays changed."""
        original = self.at()
        self._assign(flat)
        with self.unchanged_state():
            gradient = self.compiled()[1].numpy()
        self._assign(original)
        return gradient

    def _assign(self, flat):
        start = 0
        for variable in self.variables:
            size = int(np.prod(variable.shape))
            variable.assign(np.reshape(flat[start : start + size], variable.shape))
            start += size


def flatten(tensors):
    """Tensors (sparse gradients too) as one flat tensor."""
    return tf.concat([tf.reshape(tf.convert_to_tensor(t), [-1]) for t in tensors], 0)


def hessian_by_differences(case, step=1e-5, **kwargs):
    """The dense Hessian by central differences of the gradient, in float64.

    With steps of 1e-5 truncation and rounding both stay near 1e-10 for functions
    of order one.
    """
    gradient = FlatGradient(*case, **kwargs)
    at = gradient.at()
    rows = []
    for i in range(at.size):
        shift = np.zeros_like(at)
        shift[i] = step
        rows.append((gradient(at + shift) - gradient(at - shift)) / (2 * step))
    return np.stack(rows)


def hessian_by_tapes(case, **kwargs):
    """The dense Hessian as TensorFlow's tapes give it, row by row, unmended."""
    gradient = FlatGradient(*case, **kwargs)
    raw = [v.value for v in gradient.variables]

    @tf.function(autograph=False)
    def rows():
        with tf.GradientTape() as outer:
            _, flat = gradient.value_and_gradient()
        jacobians = outer.jacobian(
            flat, raw, unconnected_gradients="zero", experimental_use_pfor=False
        )
        return tf.concat([tf.reshape(j, [flat.shape[0], -1]) for j in jacobians], 1)

    with gradient.unchanged_state():
        return rows().numpy()


def state_of(model):
    """All that a probe must leave alone, as a dictionary to compare with another."""
    optimizer = model.optimizer
    groups = {
        "variable": model.variables,
        "metric": model.metrics_variables,
        "optimizer": optimizer.variables if optimizer is not None else [],
    }
    state = {
        f"{kind} {i} {variable.path}": np.array(variable.numpy())
        for kind, variables in groups.items()
        for i, variable in enumerate(variables)
    }
    # Keras itself leaves symbolic tensors behind, from `evaluate` for instance.
    state["losses"] = [
        loss.numpy() if hasattr(loss, "numpy") else id(loss) for loss in model.losses
    ]
    for i, layer in enumerate(model._flatten_layers()):
        state[f"layer {i}"] = (
            layer.name,
            layer.built,
            layer.trainable,
            layer.dtype_policy,
            layer.compute_dtype,
            getattr(layer, "use_cudnn", None),
        )
    state["optimizer built"] = optimizer is not None and optimizer.built
    state["moments"] = tf.nn.moments
    state["random"] = random.getstate()
    state["numpy"] = [str(part) for part in np.random.get_state()]
    state["replicas"] = tf.distribute.get_strategy().num_replicas_in_sync
    return state


def assert_same_state(before, after):
    """Bit for bit; metrics that had not been built may have been."""
    assert all(key.startswith("metric") for key in after.keys() - before.keys())
    for key, value in before.items():
        np.testing.assert_equal(after[key], value, err_msg=key)
