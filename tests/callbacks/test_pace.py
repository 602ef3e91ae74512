"""How often to probe within a share of the time."""

import numpy as np
import pytest
from training import monitor, network, steps, told

import keras_curvature as kc
from keras_curvature.callbacks.pace import Pace


class Run:
    """A pace, and the time that its clock tells."""

    def __init__(self, *arguments):
        self.now = 0.0
        self.pace = Pace(*arguments, clock=lambda: self.now)

    def train(self, seconds, batches=1):
        self.now += seconds
        self.pace.trained(batches)

    def probe(self, seconds, compiled=False):
        self.now += seconds
        self.pace.probed(compiled)


def spent(run, batch_seconds, probe_seconds_per_matvec, batches=2000, freq=10):
    """Shares and probes of a simulated run."""
    trained = probed = 0.0
    probes, since = 0, 0
    for _ in range(batches):
        trained += batch_seconds
        since += 1
        run.train(batch_seconds)
        if since % freq == 0 and run.pace.due():
            seconds = probe_seconds_per_matvec * run.pace.num_matvecs
            run.probe(seconds)
            probed += seconds
            probes += 1
    return probed / (trained + probed), probes


def test_share_is_kept():
    share, probes = spent(Run(0.05, 10, 12), 0.002, 0.002)
    assert 0.03 <= share <= 0.06
    assert probes > 10


def test_cheap_probes_come_at_every_multiple():
    share, probes = spent(Run(0.05, 10, 12), 0.01, 1e-5)
    assert probes == 200
    assert share < 0.05


def test_dear_probes_get_fewer_products_before_they_get_rare():
    run = Run(0.05, 10, 48)
    share, _ = spent(run, 0.002, 0.002)
    assert run.pace.num_matvecs == Pace.LEAST_MATVECS
    assert share <= 0.06


def test_products_come_back_when_there_is_time():
    run = Run(0.05, 10, 48)
    spent(run, 0.002, 0.002)
    spent(run, 0.2, 0.0002)
    assert run.pace.num_matvecs == 48


def test_compilation_is_not_counted():
    run = Run(0.05, 10, 12)
    run.probe(100.0, compiled=True)
    assert run.pace.due()
    assert run.pace.overhead == 0
    run.train(0.01, 10)
    run.probe(1.0)
    assert not run.pace.due()
    run.train(18.9, 10)
    assert not run.pace.due()
    run.train(0.2, 1)
    assert run.pace.due()
    assert run.pace.overhead == pytest.approx(1 / 20.11)


def test_without_a_limit_probes_are_always_due():
    run = Run(None, 10, 12)
    share, probes = spent(run, 0.002, 0.02)
    assert probes == 200
    assert run.pace.num_matvecs == 12
    assert run.pace.overhead == pytest.approx(share)


def test_time_between_two_trainings_is_nobodys():
    run = Run(None, 10, 12)
    run.train(3.0)
    run.now += 50.0
    run.pace.start()
    run.probe(1.0)
    assert run.pace.overhead == pytest.approx(0.25)


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_other_shares(share):
    found, _ = spent(Run(share, 1, 6), 0.002, 0.001, batches=20_000, freq=1)
    assert found == pytest.approx(share, rel=0.1)


def test_advice_where_probes_take_most_of_the_time():
    run = Run(None, 10, 12)
    run.train(0.1, 10)
    run.probe(100.0, compiled=True)
    for _ in range(3):
        run.train(0.1, 10)
        run.probe(3.0)
    assert run.pace.advice is None  # Nine seconds in all.
    run.train(0.1, 10)
    run.probe(3.0)
    # 12 of 12.4 seconds, and a batch takes a hundredth of one.
    assert "takes 96% of the time: a probe takes as long as 300 ba" in run.pace.advice
    assert "\n" not in run.pace.advice
    run.train(11.0, 1100)
    assert run.pace.advice  # Most of the time it is still,
    run.train(1.0, 100)
    assert run.pace.advice is None  # and no longer.


def test_no_advice_where_probes_are_spaced():
    run = Run(0.1, 10, 12)
    run.probe(100.0)
    run.train(1.0)
    assert run.pace.overhead > 0.9 and run.pace.advice is None


class Timed:
    """Stands in for `time.perf_counter`: batches and probes take what they are told."""

    def __init__(self, watch, batch, probe):
        self.now, self.watch, self.batch = 0.0, watch, batch
        pace = watch._pace
        pace._clock, pace._mark = lambda: self.now, 0.0

        def look(step):
            self.now += probe
            return {"step": step, "hessian_trace": 1.0}

        watch._look = look

    def train(self, batches):
        self.watch.on_train_begin()
        self.watch.on_epoch_begin(0)
        for batch in range(batches):
            self.now += self.batch
            self.watch.on_train_batch_end(batch)
        return steps(self.watch)


@pytest.mark.parametrize(
    ("optimizer", "arguments", "expected"),
    [
        # A probe is 30 batches: 270 of them make it a tenth of the time.
        ("sgd", {}, [0, 300, 600, 900]),
        ("sgd", {"max_overhead": 0.2}, [0, 200, 400, 600, 800]),
        ("sgd", {"update_freq": 200}, [0, 200, 400, 600, 800]),
        # What training depends on does not depend on the clock.
        ("newton", {}, list(range(0, 1000, 100))),
        ("newton", {"diagonal": None}, [0, 300, 600, 900]),
    ],
)
def test_auto_is_every_hundred_batches_and_a_tenth_of_the_time(
    optimizer, arguments, expected
):
    arguments = {"update_freq": "auto", "diagonal": "layerwise"} | arguments
    watch = monitor(**arguments, verbose=0)
    optimizer = kc.DiagonalNewton() if optimizer == "newton" else optimizer
    watch.set_model(network(optimizer=optimizer))
    assert Timed(watch, batch=0.1, probe=3.0).train(999) == expected


def test_auto_is_the_default():
    assert kc.CurvatureMonitor((np.ones((4, 3)), np.ones(4))).update_freq == "auto"


def test_a_number_is_kept_and_the_advice_is_given_once():
    watch = monitor(update_freq=100, verbose=0)
    watch.set_model(network())
    with pytest.warns(UserWarning, match="A larger `update_freq`") as caught:
        seen = Timed(watch, batch=0.1, probe=14.0).train(800)
    assert seen == list(range(0, 801, 100))
    (message,) = told(caught)
    assert "a probe takes as long as 140 batches of training" in message
