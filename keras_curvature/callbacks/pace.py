"""How often to probe, so that curvature takes at most a given share of the time."""

import time


class Pace:
    """Times training and probes as they run, and spaces probes by the clock.

    After a probe that took `p` seconds the next is due when training has gone on for
    `p (1 − s) / s` seconds, `s` the share that probes may take. The time that the
    first probe takes to compile is not counted: it is paid once, however long training
    goes on.

    When probes would come less often than every fourth multiple of `update_freq`, they
    get cheaper instead: the number of products is halved, down to `LEAST_MATVECS`, and
    doubled again when there is time.

    Args:
        share: share of the wall-clock time that probes may take, in (0, 1);
            `None` for probes that are always due. May be changed at any time.
        update_freq: least number of batches between probes.
        num_matvecs: products per probe when there is time.
        clock: function without arguments that tells the time in seconds.
    """

    #: Fewer products say little about the norm.
    LEAST_MATVECS = 6

    #: Probes that took fewer seconds than this in all are not worth a word.
    WORTH_A_WORD = 10.0

    def __init__(self, share, update_freq, num_matvecs, clock=time.perf_counter):
        self.num_matvecs = num_matvecs
        self.share = share
        self._update_freq = update_freq
        self._most = num_matvecs
        self._clock = clock
        self._mark = clock()
        # All seconds, batches and probes so far, and what went on since the last one.
        self._training, self._probes = 0.0, 0.0
        self._steps, self._timed = 0, 0
        self._trained, self._batches = 0.0, 0
        self._needed = 0.0

    @property
    def overhead(self):
        """Share of the time that the probes so far have taken, compilation apart."""
        total = self._probes + self._training
        return self._probes / total if total else 0.0

    @property
    def advice(self):
        """One line to the user where probes take most of the time; else `None`.

        Not where they are spaced by the clock: there it is a matter of waiting.
        """
        spent = self.share is None and self._probes >= self.WORTH_A_WORD
        if not spent or self.overhead <= 0.5 or not self._steps:
            return None
        each = self._probes / self._timed / (self._training / self._steps)
        return (
            f"Probing the curvature takes {self.overhead:.0%} of the time: a probe "
            f"takes as long as {each:.0f} batches of training. A larger `update_freq`, "
            'fewer probe data or fewer `num_matvecs` take less; update_freq="auto" '
            "takes a tenth, where the optimizer does not need the curvature."
        )

    def start(self):
        """Notes that training starts, or goes on."""
        self._mark = self._clock()

    def trained(self, batches):
        """Notes that training went on for some batches since the last call."""
        seconds = self._lap()
        self._training += seconds
        self._trained += seconds
        self._batches += batches
        self._steps += batches

    def due(self):
        """Whether there is time for a probe."""
        return self.share is None or self._trained >= self._needed

    def probed(self, compiled):
        """Notes that a probe went on since the last call, or began and failed.

        Args:
            compiled: whether its time includes compilation.
        """
        seconds = self._lap()
        if compiled:
            # Its price is not known yet: the next probe tells, at the usual distance.
            self._needed = 0.0
        else:
            self._probes += seconds
            self._timed += 1
            if self.share is not None:
                self._needed = seconds * (1 - self.share) / self.share
                self._choose_matvecs()
        self._trained, self._batches = 0.0, 0

    def _lap(self):
        now = self._clock()
        seconds, self._mark = now - self._mark, now
        return seconds

    def _choose_matvecs(self):
        if not self._batches or not self._trained:
            return
        batches = self._needed / (self._trained / self._batches)
        if batches > 4 * self._update_freq and self.num_matvecs > self.LEAST_MATVECS:
            self.num_matvecs = max(self.LEAST_MATVECS, self.num_matvecs // 2)
        elif batches < self._update_freq and self.num_matvecs < self._most:
            self.num_matvecs = min(self._most, 2 * self.num_matvecs)
