"""How often to probe within a share of the time."""

import pytest

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
