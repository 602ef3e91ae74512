"""The shorthand that feeds an optimizer from the training data."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers
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
        history = fit(model, watch, epochs=3)
    assert steps(watch) == list(range(0, 3 * BATCHES + 1, 2))
    assert model.optimizer.curvature_updates == len(watch.history)
    assert history["loss"][-1] < history["loss"][0]
    # No column is named of what is not measured.
    assert list(history) == ["loss", "hessian_trace"]
    last = watch.history[-1]
    assert last["num_matvecs"] == 1
    assert set(last["optimizer"]) == {
        "curvature_age",
        "step_size",
        "clipped_share",
        "newton_share",
        "negative_share",
    }


def test_each_probe_takes_another_batch():
    """The weights stand still, so the loss tells the batch."""
    taken = []

    class Batches(keras.utils.PyDataset):
        num_batches = 5

        def __getitem__(self, i):
            taken.append(i)
            return X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]

    watches = feed(diagonal="gauss_newton"), feed(Batches())
    fit(network(optimizer=keras.optimizers.SGD(0.0)), *watches)
    for watch in watches:
        losses = [record["loss"] for record in watch.history]
        assert len(losses) == 6
        assert len({round(loss, 6) for loss in losses[:5]}) == 5
    # One batch is read at each probe, not a pass over all of them.
    assert taken == [0, 1, 2, 3, 4, 0]


def probed(model, *steps, **arguments):
    """The records of probes at the weights as they are, and the feed."""
    watch = feed(verbose=0, **arguments)
    watch.set_model(model)
    return [watch.probe(step) for step in steps], watch


def test_rows_are_a_function_of_the_seed():
    """The loss tells the rows."""
    model = network()

    def losses(**arguments):
        cheap = {"diagonal": None, "num_matvecs": 1}
        records, _ = probed(model, 0, 2, 4, **cheap, **arguments)
        return [record["loss"] for record in records]

    first = losses()
    assert losses() == first
    assert len({*first, *losses(seed=1)}) == 6


def test_more_rows_than_there_are():
    """Then it is all of them: the same loss, and a trace along other directions."""
    model, found = network(layers.Dense(3)), []
    for seed in (0, 1):
        arguments = {"batch_size": 1000, "diagonal": "hutchinson", "seed": seed}
        (record,), watch = probed(model, 0, **arguments)
        assert watch.operator.evaluation.data.first()[0].shape[0] == len(X)
        found.append((record["loss"], record["hessian_trace"]))
    (loss, trace), (same, other) = found
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    assert other != trace


def test_settings_can_be_overruled():
    settings = {"num_matvecs": 4, "diagonal": "gauss_newton"}
    (record,), _ = probed(network(), 0, **settings)
    assert record["hessian_frobenius_norm"] > 0
    assert record["hessian_trace_standard_error"] == 0


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
