"""The shorthand that feeds an optimizer from the training data."""

import warnings

import keras
import numpy as np
import pytest
from training import BATCHES, data, fit, network, steps

import keras_curvature as kc

X, Y = data()


def feed(train_data=(X, Y), update_freq=2, batch_size=8, **arguments):
    return kc.CurvatureFeed(train_data, update_freq, batch_size, **arguments)


def test_two_lines_are_all():
    """No warning, a delivery at each probe, and the figures of the optimizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, watch = network(optimizer=kc.DiagonalNewton()), feed()
        losses = fit(model, watch, epochs=3)["loss"]
    assert steps(watch) == list(range(0, 3 * BATCHES + 1, 2))
    assert model.optimizer.curvature_updates == len(watch.history)
    assert losses[-1] < losses[0]
    last = watch.history[-1]
    assert last["num_matvecs"] == 1
    assert set(last["optimizer"]) == {
        "curvature_age",
        "step_size",
        "clipped_share",
        "newton_share",
        "negative_share",
    }


@pytest.mark.parametrize("kind", ["arrays", "data set"])
def test_each_probe_takes_another_batch(kind):
    """The weights stand still, so the loss tells the batch."""
    taken = []

    class Batches(keras.utils.PyDataset):
        num_batches = 5

        def __getitem__(self, i):
            taken.append(i)
            return X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]

    source = (X, Y) if kind == "arrays" else Batches()
    model, watch = network(optimizer=kc.DiagonalNewton(0.0)), feed(source)
    fit(model, watch)
    losses = [record["loss"] for record in watch.history]
    assert len(losses) == 6
    assert len({round(loss, 6) for loss in losses[:5]}) == 5
    if kind == "data set":
        # One batch is read at each probe, not a pass over all of them.
        assert taken == [0, 1, 2, 3, 4, 0]


def test_rows_are_a_function_of_the_seed():
    """The loss tells the rows, the trace the directions as well."""

    def figures(**arguments):
        watch = feed(diagonal="hutchinson", **arguments)
        fit(network(), watch)
        return [(r["loss"], r["hessian_trace"]) for r in watch.history]

    first = figures()
    assert figures() == first
    for one, other in zip(first, figures(seed=1), strict=True):
        assert all(np.not_equal(one, other))


def test_more_rows_than_there_are():
    watch = feed(batch_size=1000)
    fit(network(), watch)
    assert len({round(record["loss"], 4) for record in watch.history[:1]}) == 1
    assert watch.operator.evaluation.data.first()[0].shape[0] == len(X)


def test_settings_can_be_overruled():
    watch = feed(num_matvecs=4, diagonal="exact")
    fit(network(), watch)
    assert watch.history[-1]["hessian_frobenius_norm"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size`.*Received: batch_size=0"),
        ({"train_data": (X, Y[:3])}, r"same number.*Received: \[3, 40\]"),
        ({"update_freq": 0}, "`update_freq`.*Received: update_freq=0"),
    ],
)
def test_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        feed(**arguments)
