"""The loss of training beside that of the probe."""

import keras
import numpy as np
import pytest

from keras_curvature.callbacks.training_loss import RecentLosses

MODEL = keras.Sequential([keras.layers.Dense(1)])


def seen(epochs, each=1):
    """What is noted of epochs with the given losses of their batches."""
    recent = RecentLosses()
    for losses in epochs:
        for done in range(each, len(losses) + 1, each):
            recent.add(MODEL, done, {"loss": np.mean(losses[:done])})
    return recent


def test_losses_of_batches_come_from_means_since_the_epoch_began():
    rng = np.random.default_rng(0)
    epochs = rng.uniform(size=(3, 8))
    found = seen(epochs).batches()
    np.testing.assert_allclose(found, np.ravel(epochs)[1:], rtol=1e-10)
    by_pairs = seen(epochs, each=2).batches()
    expected = np.ravel(epochs).reshape(-1, 2).mean(1)[1:]
    np.testing.assert_allclose(by_pairs, expected, rtol=1e-10)


def test_only_the_last_batches_count():
    recent = seen([np.full(100, 5.0), np.full(40, 1.0)])
    assert recent.typical() == pytest.approx((1.0, 0.0))


def test_few_batches_tell_nothing():
    recent = seen([[1.0, 1.0, 1.0]])
    assert recent.typical() is None and recent.mismatch(100.0) is None


@pytest.mark.parametrize(
    ("loss", "differs"), [(0.09, False), (0.13, False), (2.47, True), (0.0, True)]
)
def test_a_probe_on_another_loss_is_told(loss, differs):
    rng = np.random.default_rng(0)
    message = seen([0.09 + 0.015 * rng.standard_normal(30)]).mismatch(loss)
    assert (message is not None) == differs
    if differs:
        assert f"probe data is {loss:.3g}, but 0.088 ± 0.013" in message


def test_what_a_train_step_of_its_own_logs_is_not_believed():
    class Custom(keras.Model):
        def train_step(self, *args):
            """Not called."""

    recent, model = RecentLosses(), Custom()
    for done in range(1, 9):
        recent.add(model, done, {"loss": 1.0})
    assert recent.typical() is None
