"""Keras' progress bar, for computations that turn out to be long."""

import time

import keras

#: A bar appears when half of this many seconds is spent, and half is still to come.
LONG = 5.0

#: Products that are worth a word before they begin.
MANY = 1000


class Progress:
    """Shows how far a computation is, from the products spent.

    Used as a context around the computation, and handed to it as the function
    `progress(done, total)`. Where data consists of several batches, they advance the
    bar between the products; where nothing else is known, they are the bar.

    Args:
        operator: the `HessianOperator` that works; its batches are counted.
        verbose: `True`, `False`, or `"auto"`: if it is expected to take long.

    Raises:
        ValueError: for another `verbose`.
    """

    def __init__(self, operator, verbose="auto"):
        if verbose not in (True, False, "auto"):
            raise ValueError(
                '`verbose` must be True, False or "auto". '
                f"Received: verbose={verbose!r}."
            )
        self._operator = operator
        self._verbose = verbose
        self._done, self._total = 0, None
        self._bar = None

    def __enter__(self):
        self._begin("matvec")
        self._operator.on_batch = self._on_batch
        return self

    def __exit__(self, *exception):
        self._operator.on_batch = None
        self._end()

    def announce(self, cost):
        """Says beforehand how many products are about to be made, if it is many.

        For computations that are compiled into one, and advance no bar.
        """
        if self._verbose is True or (self._verbose == "auto" and cost >= MANY):
            print(f"Exact: {cost:,} products, folded together", flush=True)

    def __call__(self, done, total):
        """Notes that `done` of `total` products have been made.

        A total of `None` is one that nobody knows.
        """
        if self._bar.unit_name != "matvec":
            self._begin("matvec")
        self._done, self._total = done, total
        self._show(done, total)

    def _on_batch(self, done, num_batches):
        if not num_batches or num_batches == 1:
            return
        if self._total is not None:
            # The share of the group of products that is under way, as one product.
            self._show(min(self._done + done / num_batches, self._total), self._total)
        elif not self._done:
            if done == 1:
                self._begin("batch")  # One bar for each pass over the data.
            self._show(done, num_batches)

    def _begin(self, unit):
        self._end()
        # Prints nothing yet. Made now, because it tells the time left from its start.
        self._bar = keras.utils.Progbar(None, unit_name=unit)
        self._start, self._shown = time.monotonic(), None

    def _show(self, done, total):
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

    def _end(self):
        """Leaves a bar where it is: complete, unless the work was interrupted."""
        if self._bar is not None and self._shown is not None:
            self._bar.update(self._shown, finalize=True)
            self._shown = None
