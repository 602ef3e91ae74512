"""The progress bar of long computations, with a clock of our own."""

import os
import signal
import threading
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
def evaluation():
    return types.SimpleNamespace(on_batch=None)


def run(evaluation, clock, verbose, total=10, seconds=1.0, unknown=False, batches=1):
    """Ten products, a second each."""
    with Progress(evaluation, verbose) as progress:
        for done in range(1, total + 1):
            for batch in range(1, batches + 1):
                clock.seconds += seconds / batches
                evaluation.on_batch(batch, batches)
            progress(done, None if unknown else total)


def lines(capsys):
    """The states of the bar that were drawn one over the other."""
    output = capsys.readouterr().out
    return [s.replace("\b", "") for s in output.replace("\r", "\n").split("\n") if s]


def test_appears_when_long(evaluation, clock, capsys):
    run(evaluation, clock, "auto")
    states = lines(capsys)
    # After 2.5 seconds, if as much is to come: at the third product of ten.
    assert " 3/10" in states[0] and "7s" in states[0] and "1s/matvec" in states[0]
    assert "10/10" in states[-1]
    assert evaluation.on_batch is None


def test_does_not_appear_when_short(evaluation, clock, capsys):
    run(evaluation, clock, "auto", seconds=0.4)
    # Three seconds spent, but the rest takes a single one.
    run(evaluation, clock, "auto", total=4)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("seconds", [0.1, 10.0])
def test_on_request_and_never(evaluation, clock, capsys, seconds):
    run(evaluation, clock, True, seconds=seconds)
    assert "10/10" in lines(capsys)[-1]
    run(evaluation, clock, False, seconds=seconds)
    assert capsys.readouterr().out == ""


def test_unknown_total(evaluation, clock, capsys):
    run(evaluation, clock, "auto", unknown=True)
    states = lines(capsys)
    assert "3/Unknown" in states[0] and "10/Unknown" in states[-1]


def test_batches_move_the_bar_between_products(evaluation, clock, capsys):
    run(evaluation, clock, True, total=4, seconds=100.0, batches=50)
    states = lines(capsys)
    products = [s for s in states if "/4" in s]
    assert len(products) > 100  # Drawn at every batch from the first product on.
    assert "4/4" in products[-1]


def test_batches_alone(evaluation, clock, capsys):
    """A single pass over a long data set, by something that counts no products."""
    with Progress(evaluation, "auto"):
        for batch in range(1, 21):
            clock.seconds += 1
            evaluation.on_batch(batch, 20)
        for batch in range(1, 21):  # A short one does not show.
            evaluation.on_batch(batch, 20)
    states = lines(capsys)
    # The clock starts when the first batch is done, which includes compiling.
    assert " 4/20" in states[0] and "/batch" in states[0]
    assert sum("20/20" in s for s in states) >= 1


def test_one_batch_is_no_news(evaluation, clock, capsys):
    with Progress(evaluation, True):
        for _ in range(5):
            clock.seconds += 9
            evaluation.on_batch(1, 1)
            evaluation.on_batch(1, None)
    assert capsys.readouterr().out == ""


def test_interrupted_bar_stays_where_it_was(evaluation, clock, capsys):
    with pytest.raises(KeyboardInterrupt), Progress(evaluation, True) as progress:
        clock.seconds += 1
        progress(3, 10)
        raise KeyboardInterrupt
    states = lines(capsys)
    assert " 3/10" in states[-1] and "10/10" not in "".join(states)
    assert evaluation.on_batch is None


def interrupt():
    """Ctrl-C, as the terminal sends it; Python handles it before the next line."""
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_interrupt_asks_to_stop_and_the_second_stops(evaluation, capsys):
    with Progress(evaluation, False) as progress:
        assert progress(1, 10) and not progress.stopped
        interrupt()
        assert progress.stopped and not progress(2, 10)
        assert capsys.readouterr().out.count("Ctrl-C again stops at once") == 1
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert capsys.readouterr().out == ""
    # And then it is Python's own again.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_an_inner_progress_shares_the_flag(evaluation):
    with Progress(evaluation, False) as outer:
        with Progress(evaluation, False) as inner:
            interrupt()
            assert not inner(1, 2)
        assert evaluation.on_batch == outer._on_batch
        assert not outer(1, 2)
        with Progress(evaluation, False) as late:
            assert late.stopped
    assert evaluation.on_batch is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_somebody_else_is_left_alone(evaluation):
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(1))
    try:
        with Progress(evaluation, False) as progress:
            interrupt()
            assert caught == [1] and progress(1, 2)
        interrupt()
        assert caught == [1, 1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_interrupts_alone(evaluation):
    seen = []

    def work():
        with Progress(evaluation, False) as progress:
            seen.append(signal.getsignal(signal.SIGINT))
            seen.append(progress(1, 2))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler, True]


@pytest.mark.parametrize("verbose", ["loud", None, 2])
def test_verbose_is_checked(evaluation, verbose):
    with pytest.raises(ValueError, match=f"Received: verbose={verbose!r}"):
        Progress(evaluation, verbose)


@pytest.mark.parametrize(
    ("verbose", "cost", "said"),
    [(True, 5, True), ("auto", 5, False), ("auto", 5000, True), (False, 5000, False)],
)
def test_cost_is_said_beforehand(evaluation, capsys, verbose, cost, said):
    with Progress(evaluation, verbose) as progress:
        progress.announce(cost)
    assert (f"{cost:,} products" in capsys.readouterr().out) == said
