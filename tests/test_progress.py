"""The progress bar of long computations, with a clock of our own."""

import types

import pytest

from keras_curvature import progress as module
from keras_curvature.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told, for the bar's decisions and its display."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now.seconds)
    monkeypatch.setattr("time.time", lambda: now.seconds)
    return now


@pytest.fixture
def operator():
    return types.SimpleNamespace(on_batch=None)


def run(operator, clock, verbose, total=10, seconds=1.0, unknown=False, batches=1):
    """Ten products, a second each."""
    with Progress(operator, verbose) as progress:
        for done in range(1, total + 1):
            for batch in range(1, batches + 1):
                clock.seconds += seconds / batches
                operator.on_batch(batch, batches)
            progress(done, None if unknown else total)


def lines(capsys):
    """The states of the bar that were drawn one over the other."""
    output = capsys.readouterr().out
    return [s.replace("\b", "") for s in output.replace("\r", "\n").split("\n") if s]


def test_appears_when_long(operator, clock, capsys):
    run(operator, clock, "auto")
    states = lines(capsys)
    # After 2.5 seconds, if as much is to come: at the third product of ten.
    assert " 3/10" in states[0] and "7s" in states[0] and "1s/matvec" in states[0]
    assert "10/10" in states[-1]
    assert operator.on_batch is None


def test_does_not_appear_when_short(operator, clock, capsys):
    run(operator, clock, "auto", seconds=0.4)
    # Three seconds spent, but the rest takes a single one.
    run(operator, clock, "auto", total=4)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("seconds", [0.1, 10.0])
def test_on_request_and_never(operator, clock, capsys, seconds):
    run(operator, clock, True, seconds=seconds)
    assert "10/10" in lines(capsys)[-1]
    run(operator, clock, False, seconds=seconds)
    assert capsys.readouterr().out == ""


def test_unknown_total(operator, clock, capsys):
    run(operator, clock, "auto", unknown=True)
    states = lines(capsys)
    assert "3/Unknown" in states[0] and "10/Unknown" in states[-1]


def test_batches_move_the_bar_between_products(operator, clock, capsys):
    run(operator, clock, True, total=4, seconds=100.0, batches=50)
    states = lines(capsys)
    products = [s for s in states if "/4" in s]
    assert len(products) > 100  # Drawn at every batch from the first product on.
    assert "4/4" in products[-1]


def test_batches_alone(operator, clock, capsys):
    """A single pass over a long data set, by something that counts no products."""
    with Progress(operator, "auto"):
        for batch in range(1, 21):
            clock.seconds += 1
            operator.on_batch(batch, 20)
        for batch in range(1, 21):  # A short one does not show.
            operator.on_batch(batch, 20)
    states = lines(capsys)
    # The clock starts when the first batch is done, which includes compiling.
    assert " 4/20" in states[0] and "/batch" in states[0]
    assert sum("20/20" in s for s in states) >= 1


def test_one_batch_is_no_news(operator, clock, capsys):
    with Progress(operator, True):
        for _ in range(5):
            clock.seconds += 9
            operator.on_batch(1, 1)
            operator.on_batch(1, None)
    assert capsys.readouterr().out == ""


def test_interrupted_bar_stays_where_it_was(operator, clock, capsys):
    with pytest.raises(KeyboardInterrupt), Progress(operator, True) as progress:
        clock.seconds += 1
        progress(3, 10)
        raise KeyboardInterrupt
    states = lines(capsys)
    assert " 3/10" in states[-1] and "10/10" not in "".join(states)
    assert operator.on_batch is None


@pytest.mark.parametrize("verbose", ["loud", None, 2])
def test_verbose_is_checked(operator, verbose):
    with pytest.raises(ValueError, match=f"Received: verbose={verbose!r}"):
        Progress(operator, verbose)


@pytest.mark.parametrize(
    ("verbose", "cost", "said"),
    [(True, 5, True), ("auto", 5, False), ("auto", 5000, True), (False, 5000, False)],
)
def test_cost_is_said_beforehand(operator, capsys, verbose, cost, said):
    with Progress(operator, verbose) as progress:
        progress.announce(cost)
    assert (f"{cost:,} products" in capsys.readouterr().out) == said
