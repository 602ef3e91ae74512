"""A loss on data: one function for all products, and one mean for all batches."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_curvature as kc
from keras_curvature import HessianOperator, backend, estimators
from keras_curvature.evaluation import Evaluation

BACKEND = keras.backend.backend()


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def compiled(*stack, **arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(list(stack))
    model.compile(**{"loss": "mse"} | arguments)
    return model


def dense(*more, **arguments):
    return compiled(
        layers.Input((3,)), layers.Dense(2, "tanh"), *more, layers.Dense(2), **arguments
    )


X, Y = numbers(8, 3), numbers(8, 2, seed=1)


# One function for all products


def test_an_estimate_is_at_the_weights_that_it_began_with():
    model = dense()
    op = HessianOperator(model, X, Y)

    def moments(progress=None):
        return estimators.hutchinson_moments(op, 8, progress=progress)

    def move(done, total):
        for variable in model.trainable_variables:
            variable.assign(variable * 2.0)
        return True

    before, during, after = moments(), moments(move), moments()
    assert before.trace.value == during.trace.value != after.trace.value
    assert before.trace.standard_error == during.trace.standard_error


def test_products_by_themselves_are_at_the_present_weights():
    model = dense()
    op = HessianOperator(model, X, Y)
    v = np.ones(op.shape[0])
    first = op @ v
    with op.still():
        model.layers[0].kernel.assign(model.layers[0].kernel * 2.0)
        np.testing.assert_array_equal(op @ v, first)
        with op.still():
            np.testing.assert_array_equal(op @ v, first)
        np.testing.assert_array_equal(op @ v, first)
    assert not np.allclose(op @ v, first)


def moving_operator():
    """An operator whose loss reads something that is no variable, and that.

    Two batches: of one, the loss may be computed once for all products.
    """
    scale = [1.0]
    return HessianOperator(
        dense(),
        X,
        Y,
        batch_size=4,
        loss_fn=lambda m, x, y: scale[0] * ops.mean((m(x) - y) ** 2),
    ), scale


def test_a_loss_that_moves_between_products_is_refused():
    op, scale = moving_operator()

    def move(done, total):
        scale[0] *= 1.01
        return True

    # Five samples: four products, and then one, which is compiled by itself. What is
    # compiled once remembers the scale that it met.
    with pytest.raises(ValueError, match="loss moved while.*Received: losses between"):
        estimators.hutchinson_moments(op, 5, progress=move)
    # Nothing of it is left.
    assert estimators.hutchinson_moments(op, 4).trace.standard_error > 0


def test_an_interruption_is_not_hidden_by_a_loss_that_moves():
    op, scale = moving_operator()

    def interrupt(done, total):
        scale[0] *= 2.0
        if done > 4:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        estimators.hutchinson_moments(op, 5, progress=interrupt)
    assert op.evaluation.state() is not op.evaluation.state()


def test_what_is_seen_meanwhile_is_kept_until_the_end():
    evaluation = HessianOperator(dense(), X, Y).evaluation
    with evaluation.still():
        evaluation.meanwhile("one")["seen"] = 1
        with evaluation.still():
            assert evaluation.meanwhile("one") == {"seen": 1}
            assert not evaluation.meanwhile("other")
        assert evaluation.meanwhile("one") == {"seen": 1}
    # Nothing holds the state still here.
    evaluation.meanwhile("one")["seen"] = 1
    assert not evaluation.meanwhile("one")
    with evaluation.still():
        assert not evaluation.meanwhile("one")


def test_all_figures_keep_still_and_see_the_loss(monkeypatch):
    if BACKEND != "torch":
        pytest.skip("The same everywhere, and quick where nothing is compiled.")
    op = HessianOperator(dense(), X, Y, batch_size=5)
    seen, saw = [], Evaluation.saw

    def watched(self, loss):
        assert self._held is not None
        seen.append(float(ops.convert_to_numpy(loss)))
        saw(self, loss)

    expected = float(ops.convert_to_numpy(op.loss()))
    monkeypatch.setattr(Evaluation, "saw", watched)
    few = {"num_matvecs": 4, "verbose": False}
    figures = [
        lambda: kc.hessian_diagonal(op, method="exact"),
        lambda: kc.hessian_diagonal(op, method="layerwise", **few),
        lambda: kc.hessian_diagonal(op, method="hutchinson", **few),
        lambda: kc.hessian_diagonal(op, method="gauss_newton"),
        lambda: kc.hessian_diagonal(op, method="gauss_newton", **few),
        lambda: kc.hessian_trace(op, method="deflated", **few),
        lambda: kc.hessian_frobenius_norm(op, method="exact"),
        lambda: kc.hessian_eigenvalues(op, k=1, **few),
        lambda: kc.hessian_spectral_density(op, num_steps=2, num_vectors=1),
        lambda: kc.hessian_matrix(op),
        lambda: kc.curvature_summary(op, num_matvecs=4, print_fn=False),
    ]
    for figure in figures:
        seen.clear()
        figure()
        assert seen
        # float32, compiled for one purpose and another.
        np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_differences_see_the_loss_too():
    op = HessianOperator(dense(), X, Y, hvp="finite_difference")
    with op.still():
        op @ np.ones(op.shape[0])
        (loss,) = op.evaluation._losses_seen
    np.testing.assert_allclose(loss, op.loss(), rtol=1e-6)


# Random numbers


class Noisy(layers.Layer):
    """Adds what a function draws."""

    def __init__(self, draw):
        super().__init__(name="noisy")
        self.draw = draw

    def call(self, x):
        return x + self.draw()


def test_random_numbers_of_tensorflow_are_refused():
    tf = pytest.importorskip("tensorflow")
    if BACKEND != "tensorflow":
        pytest.skip("TensorFlow's own")
    generator = tf.random.Generator.from_seed(0)

    def function(draw):
        return HessianOperator.from_function(
            lambda p: ops.sum(draw() * p**2), np.ones(2, "float32")
        )

    for draw in (
        lambda: tf.random.normal((2,), seed=1),
        lambda: generator.normal((2,)),
        lambda: tf.cond(generator.uniform(()) > 2, lambda: 0.0, lambda: 1.0),
        lambda: tf.while_loop(
            lambda i, x: i < 2,
            lambda i, x: (i + 1, x + tf.random.uniform((2,))),
            [0, tf.zeros(2)],
        )[1],
    ):
        with pytest.raises(ValueError, match="draws other random numbers.*Received: "):
            function(draw)
    with pytest.raises(ValueError, match="RandomUniform in layer 'noisy'"):
        HessianOperator(dense(Noisy(lambda: tf.random.uniform((2,)))), X, Y)
    for draw in (
        lambda: tf.random.stateless_uniform((2,), [1, 2]),
        lambda: tf.ones_like(tf.random.uniform((2,)).shape, "float32"),  # Not used.
    ):
        op = function(draw)
        np.testing.assert_array_equal(op.to_dense(), op.to_dense())


def test_random_numbers_of_torch_rest():
    if BACKEND != "torch":
        pytest.skip("PyTorch's own")
    import torch

    model = dense(Noisy(lambda: torch.rand(2)), layers.Dropout(0.5))
    op = HessianOperator(model, X, Y, training=True)  # Builds the loss, as `fit` does.
    before = torch.get_rng_state()
    HessianOperator(model, X, Y, training=True)
    v = np.ones(op.shape[0])
    first = op @ v
    np.testing.assert_array_equal(op @ v, first)
    trace = kc.hessian_trace(op, method="hutchinson", num_matvecs=4)
    assert trace.standard_error > 0
    function = HessianOperator.from_function(
        lambda p: (torch.rand(3) * p**2).sum(), torch.ones(3)
    )
    np.testing.assert_array_equal(function.to_dense(), function.to_dense())
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    torch.rand(1)
    assert not np.allclose(op @ v, first)  # As with the seeds of Keras.


def test_generators_of_torch_that_move_are_refused():
    if BACKEND != "torch":
        pytest.skip("PyTorch's own")
    import torch

    generator = torch.Generator()
    with pytest.raises(ValueError, match="draws other random numbers.*first .*, then"):
        HessianOperator.from_function(
            lambda p: (torch.rand(3, generator=generator) * p**2).sum(), torch.ones(3)
        )


def test_seeds_of_keras_are_still():
    model = dense(layers.Dropout(0.5), layers.GaussianNoise(0.1))
    op = HessianOperator(model, X, Y, training=True)
    v = np.ones(op.shape[0])
    first = op @ v
    np.testing.assert_array_equal(op @ v, first)
    for variable in model.non_trainable_variables:
        variable.assign(variable + 1)
    if BACKEND != "torch":  # Whose dropout has no seed that is a variable.
        assert not np.allclose(op @ v, first)


# One mean for all batches


def sequences(lengths, steps=6):
    rng = np.random.default_rng(0)
    x = np.zeros((len(lengths), steps), "int32")
    for row, length in zip(x, lengths, strict=True):
        row[:length] = rng.integers(1, 9, length)
    return x, rng.integers(0, 5, x.shape)


def language_model(mask=True, **arguments):
    # Before training, all words are equally likely: every sequence has the same loss.
    stack = layers.Embedding(9, 4, mask_zero=mask), layers.Dense(5, None, True, "zeros")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return compiled(layers.Input((None,), dtype="int32"), *stack, loss=loss)


def told(model, *data, **arguments):
    """Whether a loss was said to be no mean over samples."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        HessianOperator(model, *data, **arguments)
    return any("not a mean over samples" in str(w.message) for w in caught)


@pytest.mark.parametrize(
    "lengths, size, expected",
    [
        ([2, 2, 5, 5, 2, 2, 5, 5], 4, True),  # Varies within batches.
        ([2, 2, 2, 2, 5, 5, 5, 5], 4, True),  # From batch to batch.
        ([2, 2, 2, 2, 5, 5, 5, 5], 1, True),
        ([3, 3, 3, 3, 3, 3, 3, 4], 3, True),  # In the last batch alone.
        ([3, 3, 3, 3, 3, 3, 3, 3], 3, False),
        ([2, 2, 2, 2, 5, 5, 5, 5], 8, False),  # There are no others.
    ],
)
def test_masks(lengths, size, expected):
    x, y = sequences(lengths)
    assert told(language_model(), x, y, batch_size=size) == expected


def test_steps_without_a_mask():
    x, y = sequences([2, 2, 2, 2, 5, 5, 5, 5])
    assert not told(language_model(mask=False), x, y, batch_size=4)


class Ragged(keras.utils.PyDataset):
    """Two batches, each as long as its longest sequence."""

    num_batches = 2

    def __init__(self, *lengths):
        super().__init__()
        self.lengths = lengths

    def __getitem__(self, i):
        return sequences(self.lengths[i], max(self.lengths[i]))


@pytest.mark.parametrize(
    "lengths, expected",
    [(([2, 2, 3, 3], [4, 5, 6, 6]), True), (([3] * 4, [6] * 4), False)],
)
def test_ragged_sequences(lengths, expected):
    model = language_model()
    assert told(model, Ragged(*lengths)) == expected
    op = HessianOperator(model, *sequences([3, 3]))
    if expected:
        with pytest.warns(UserWarning, match="not a mean over samples"):
            op.set_data(Ragged(*lengths))


@pytest.mark.parametrize(
    "reduction, expected",
    [("sum_over_batch_size", False), ("mean_with_sample_weight", True), ("sum", True)],
)
def test_weights_of_samples(reduction, expected):
    weights = np.repeat([0.5, 2.0], 4)
    model = dense(loss=keras.losses.MeanSquaredError(reduction=reduction))
    assert told(model, X, Y, weights, batch_size=4) == expected


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_batch_statistics_hide_nothing_and_are_no_fault(reduction):
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    stack = layers.Dense(3), layers.BatchNormalization(), layers.Dense(1)
    model = compiled(layers.Input((3,)), *stack, loss=loss)
    assert told(model, X, Y, batch_size=4) == (reduction == "sum")
    op = HessianOperator(model, X, Y, batch_size=4)
    assert op.evaluation.loss.takes_batch_statistics


def test_a_large_penalty_hides_nothing():
    # Of all samples together 1e4, of the masked steps 0.1.
    model = language_model()
    model.layers[0].embeddings_regularizer = keras.regularizers.L2(300.0)
    x, y = sequences([2, 2, 2, 2, 5, 5, 5, 5])
    assert told(model, x, y, batch_size=4)


def test_a_loss_that_overflows_nearby_is_compared_where_it_is():
    model = compiled(layers.Input((3,)), layers.Dense(1, use_bias=False))
    model.layers[0].kernel.assign(ops.full((3, 1), 1e-3))

    def loss_fn(m, x, y):
        # Not finite but at weights that are all alike.
        spread = ops.max(m.trainable_variables[0]) - ops.min(m.trainable_variables[0])
        return ops.sum(m(x)) + ops.where(spread > 0, np.nan, 0.0)

    assert told(model, X, Y, loss_fn=loss_fn, batch_size=4)


# One graph for products that follow each other


@pytest.mark.skipif(not backend.KEEPS_RECORDINGS, reason="graphs end with their trace")
def test_one_graph_for_all_products_that_follow_each_other(monkeypatch):
    made = []
    record = backend.record

    def counted(function, point):
        made.append(1)
        return record(function, point)

    monkeypatch.setattr(backend, "record", counted)
    model = dense()
    op = HessianOperator(model, X, Y)
    v = numbers(op.shape[0])
    expected = op @ v
    made.clear()

    def graphs(function):
        made.clear()
        with op.still():
            function()
        return len(made)

    def products(count=3):
        for _ in range(count):
            np.testing.assert_array_equal(op @ v, expected)

    assert graphs(products) == 1
    # Another pass over the data needs the memory, and others are not kept.
    assert graphs(lambda: (products(), op.loss(), products())) == 2
    assert op.evaluation._kept is None
    made.clear()
    products()
    assert len(made) == 3
    # The weights that it began with, and after it the present ones.
    with op.still():
        products(1)
        model.trainable_variables[0].assign(model.trainable_variables[0] + 1)
        products(1)
    assert not np.allclose(op @ v, expected)
    # Several batches would each need the memory of one.
    op = HessianOperator(model, X, Y, batch_size=4)
    assert graphs(lambda: (op @ v, op @ v)) == 2 * 2
    # Those of one group have them in common.
    assert graphs(lambda: op @ np.stack([v, v], 1)) == 2
