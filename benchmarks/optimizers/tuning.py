"""The same number of trials for everybody, where they are likely to help."""

import math

TRIALS = 10


def tune(objective, rate, values, trials=TRIALS):
    """Searches a learning rate and one more parameter.

    Five rates over a hundredfold range with the first value; then, one trial at a time:
    further out while the best is at an edge, the other values at the best rate, and
    rates in between.

    Args:
        objective: function of rate and value; less is better.
        rate: the middle of the first five rates.
        values: of the other parameter.
        trials: how often `objective` is called.

    Returns:
        List of `(rate, value, objective)` in the order of the trials.
    """
    tried = {}

    def attempt(rate, value):
        key = round(math.log10(rate), 4), value
        if key in tried or len(tried) == trials:
            return False
        loss = objective(10 ** key[0], value)
        tried[key] = loss if math.isfinite(loss) else math.inf
        return True

    for power in (-1, -0.5, 0, 0.5, 1):
        attempt(rate * 10**power, values[0])
    while len(tried) < trials:
        (log_rate, value), _ = min(tried.items(), key=lambda item: item[1])
        known = [r for r, v in tried if v == value]
        proposals = []
        if log_rate == min(known):
            proposals.append((log_rate - 0.5, value))
        if log_rate == max(known):
            proposals.append((log_rate + 0.5, value))
        proposals += [(log_rate, other) for other in values]
        proposals += [
            (log_rate + sign * 0.5**k, value)
            for k in (1, 2, 3, 4, 5)
            for sign in (1, -1)
        ]
        if not any(attempt(10**r, v) for r, v in proposals):
            break
    return [(10**r, v, loss) for (r, v), loss in tried.items()]
