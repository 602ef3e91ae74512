"""Keras' progress bar and the stop flag, for computations that turn out to be long."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Protocol, Self

import keras

#: A bar appears when half of this many seconds is spent, and half is still to come.
LONG = 5.0

#: Products that are worth a word before they begin.
MANY = 1000


class Evaluation(Protocol):
    """What works on batches of data, and says when it is done with one.

    Attributes:
        on_batch: called as `on_batch(done, num_batches)` after each batch, the number
            `None` where it is unknown.
    """

    on_batch: Callable[[int, int | None], None] | None


class Progress:
    """Shows how far a computation is, and knows whether to go on.

    Used as a context around the computation, and handed to it as the function
    `progress(done, total)`, which returns whether to go on. Where data consists of
    several batches, they advance the bar between the products; where nothing else is
    known, they are the bar.

    Inside of the context the first Ctrl-C sets the stop flag, so that what is known by
    then can be returned; the second raises `KeyboardInterrupt`. Ctrl-C stays what it
    was in other threads than the main one, and where somebody has given it another
    meaning. A `Progress` inside of another one shares its flag.

    Args:
        evaluation: what works on the data; its batches are counted.
        verbose: `True`, `False`, or `"auto"`: if it is expected to take long.

    Raises:
        ValueError: for another `verbose`.
    """

    def __init__(self, evaluation: Evaluation, verbose: bool | str = "auto"):
        if verbose not in (True, False, "auto"):
            raise ValueError(
                '`verbose` must be True, False or "auto". '
                f"Received: verbose={verbose!r}."
            )
        self._evaluation = evaluation
        self._verbose = verbose
        self._done = 0
        self._total: int | None = None
        self._before = self._after = 0
        self._shown: float | None = None
        self._outer: Progress | None = None
        self._told_to_stop = False

    def __enter__(self) -> Self:
        self._begin("matvec")
        self._told_before = self._evaluation.on_batch
        self._evaluation.on_batch = self._on_batch
        handler = signal.getsignal(signal.SIGINT)
        owner = getattr(handler, "__self__", None)
        self._outer = owner if isinstance(owner, Progress) else None
        # Python takes handlers from the main thread only.
        self._listening = (
            handler is signal.default_int_handler
            and threading.current_thread() is threading.main_thread()
        )
        if self._listening:
            signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._listening:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._evaluation.on_batch = self._told_before
        self._end()

    @property
    def stopped(self) -> bool:
        """Whether the computation is to stop."""
        outer = self._outer
        return self._told_to_stop or (outer is not None and outer.stopped)

    def place(self, before: int = 0, after: int = 0) -> None:
        """Makes what is told from now on a part of something longer, in one bar.

        Args:
            before: number of products that were made earlier.
            after: number of those that will follow.
        """
        self._before, self._after = before, after

    def announce(self, cost: int) -> None:
        """Says beforehand how many products are about to be made, if it is many.

        For computations that are compiled into one, and advance no bar.
        """
        if self._verbose is True or (self._verbose == "auto" and cost >= MANY):
            print(f"Exact: {cost:,} products, folded together", flush=True)

    def __call__(self, done: int, total: int | None) -> bool:
        """Notes that `done` of `total` products have been made.

        A total of `None` is one that nobody knows.

        Returns:
            Whether to go on.
        """
        if self._bar.unit_name != "matvec":
            self._begin("matvec")
        self._done = self._before + done
        self._total = None if total is None else self._before + total + self._after
        self._show(self._done, self._total)
        return not self.stopped

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._told_to_stop:
            signal.default_int_handler(number, frame)
        self._told_to_stop = True
        # Whoever is printing right now cannot be interrupted by a print.
        with contextlib.suppress(RuntimeError):
            print(
                "\nStopping after the product under way; Ctrl-C again stops at once.",
                flush=True,
            )

    def _on_batch(self, done: int, num_batches: int | None) -> None:
        if not num_batches or num_batches == 1:
            return
        if self._total is not None:
            # The share of the group of products that is under way, as one product.
            self._show(min(self._done + done / num_batches, self._total), self._total)
        elif not self._done:
            if done == 1:
                self._begin("batch")  # One bar for each pass over the data.
            self._show(done, num_batches)

    def _begin(self, unit: str) -> None:
        self._end()
        # Prints nothing yet. Made now, because it tells the time left from its start.
        self._bar = keras.utils.Progbar(None, unit_name=unit)
        self._start = time.monotonic()

    def _show(self, done: float, total: int | None) -> None:
        if self._shown is None:
            spent = time.monotonic() - self._start
            # With an unknown total, as much again is as good a guess as any.
            left = spent if total is None else spent * (total / done - 1)
            # Not at once: the first products include the time to compile them.
            unclear = spent < LONG / 2 or left < LONG / 2
            if not self._verbose or (self._verbose == "auto" and unclear):
                return
        self._bar.target, self._shown = total, done
        self._bar.update(done, finalize=False)

    def _end(self) -> None:
        """Leaves a bar where it is: complete, unless the work was interrupted."""
        if self._shown is not None:
            self._bar.update(self._shown, finalize=True)
            self._shown = None
