"""How often to probe, so that curvature takes at most a given share of the time."""


class Pace:
    """Spaces probes by the clock.

    Training and probes are timed as they run. After a probe that took `p` seconds the
    next is due when training has gone on for `p (1 − s) / s` seconds, `s` the share
    that probes may take. The time that the first probe takes to compile is not
    counted: it is paid once, however long training goes on.

    When probes would come less often than every fourth multiple of `update_freq`, they
    get cheaper instead: the number of products is halved, down to `LEAST_MATVECS`, and
    doubled again when there is time.

    Args:
        max_overhead: share of the wall-clock time that probes may take, in (0, 1).
        update_freq: least number of batches between probes.
        num_matvecs: products per probe when there is time.
    """

    #: Fewer products say little about the norm.
    LEAST_MATVECS = 6

    def __init__(self, max_overhead, update_freq, num_matvecs):
        self.max_overhead = max_overhead
        self.num_matvecs = num_matvecs
        self._update_freq = update_freq
        self._most = num_matvecs
        self._trained = 0.0
        self._batches = 0
        self._needed = 0.0

    def trained(self, seconds, batches):
        """Notes that training went on for some batches."""
        self._trained += seconds
        self._batches += batches

    def due(self):
        """Whether there is time for a probe."""
        return self._trained >= self._needed

    def probed(self, seconds, compiled):
        """Notes a probe, and whether its time includes compilation."""
        if compiled:
            # Its price is not known yet: the next probe tells, at the usual distance.
            self._needed = 0.0
        else:
            share = self.max_overhead
            self._needed = seconds * (1 - share) / share
            self._choose_matvecs()
        self._trained, self._batches = 0.0, 0

    def _choose_matvecs(self):
        if not self._batches:
            return
        batches = self._needed / (self._trained / self._batches)
        if batches > 4 * self._update_freq and self.num_matvecs > self.LEAST_MATVECS:
            self.num_matvecs = max(self.LEAST_MATVECS, self.num_matvecs // 2)
        elif batches < self._update_freq and self.num_matvecs < self._most:
            self.num_matvecs = min(self._most, 2 * self.num_matvecs)
