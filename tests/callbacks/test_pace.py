"""How often to probe within a share of the time."""

import pytest

from keras_curvature.callbacks.pace import Pace


def spent(pace, batch_seconds, probe_seconds_per_matvec, batches=2000, freq=10):
    """Shares and probes of a simulated run."""
    trained = probed = 0.0
    probes, since = 0, 0
    for _ in range(batches):
        trained += batch_seconds
        since += 1
        pace.trained(batch_seconds, 1)
        if since % freq == 0 and pace.due():
            seconds = probe_seconds_per_matvec * pace.num_matvecs
            pace.probed(seconds, compiled=False)
            probed += seconds
            probes += 1
    return probed / (trained + probed), probes


def test_share_is_kept():
    share, probes = spent(Pace(0.05, 10, 12), 0.002, 0.002)
    assert 0.03 <= share <= 0.06
    assert probes > 10


def test_cheap_probes_come_at_every_multiple():
    share, probes = spent(Pace(0.05, 10, 12), 0.01, 1e-5)
    assert probes == 200
    assert share < 0.05


def test_dear_probes_get_fewer_products_before_they_get_rare():
    pace = Pace(0.05, 10, 48)
    share, _ = spent(pace, 0.002, 0.002)
    assert pace.num_matvecs == Pace.LEAST_MATVECS
    assert share <= 0.06


def test_products_come_back_when_there_is_time():
    pace = Pace(0.05, 10, 48)
    spent(pace, 0.002, 0.002)
    spent(pace, 0.2, 0.0002)
    assert pace.num_matvecs == 48


def test_compilation_is_not_counted():
    pace = Pace(0.05, 10, 12)
    pace.probed(100.0, compiled=True)
    assert pace.due()
    pace.trained(0.01, 10)
    pace.probed(1.0, compiled=False)
    assert not pace.due()
    pace.trained(18.9, 10)
    assert not pace.due()
    pace.trained(0.2, 1)
    assert pace.due()


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_other_shares(share):
    found, _ = spent(Pace(share, 1, 6), 0.002, 0.001, batches=20_000, freq=1)
    assert found == pytest.approx(share, rel=0.1)
