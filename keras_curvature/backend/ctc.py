"""The CTC loss, which the frameworks' own kernels let be differentiated only once.

Connectionist temporal classification (Graves, Fernández, Gomez, Schmidhuber, ICML 2006)
sums over all ways to align labels with the steps of a sequence. The kernels return the
gradient as numbers next to the loss; the forward recursion alone, written in operations
that have derivatives, has them all.
"""

from typing import Any

from keras import ops

from keras_curvature.backend.contract import Tensor

#: Logarithm of a probability of zero. Infinity would make derivatives of sums `nan`.
_LOG_ZERO = -1e30


def ctc_loss(
    log_probabilities: Tensor,
    labels: Tensor,
    label_lengths: Tensor,
    lengths: Tensor,
    blank: int,
) -> Tensor:
    """Minus the logarithm of the probability of the labels (equations 3 and 6 to 8).

    Args:
        log_probabilities: of the symbols at every step, shape `(T, N, K)`.
        labels: integers of shape `(N, L)`.
        label_lengths: how many of them count, shape `(N,)`.
        lengths: how many steps count, shape `(N,)`.
        blank: number of the symbol that stands for none.

    Returns:
        Tensor `(N,)`; infinite where there is no way to align them.
    """
    steps, samples = ops.shape(log_probabilities)[:2]
    # A blank before, between and after the labels: the states that are passed through.
    labels = ops.cast(labels, "int32")
    blanks = ops.full_like(labels, blank)
    states = ops.reshape(ops.stack([blanks, labels], axis=2), (samples, -1))
    states = ops.concatenate([states, ops.full((samples, 1), blank, "int32")], axis=1)
    count = 2 * ops.shape(labels)[1] + 1

    def back(x: Tensor, by: int, fill: Any) -> Tensor:
        first = ops.full((samples, by), fill, x.dtype)
        return ops.concatenate([first, x], axis=1)[:, :count]

    # From a label the blank after it may be left out, unless the same label follows.
    skips = (states != blank) & (states != back(states, 2, blank))
    emitted = ops.take_along_axis(
        log_probabilities, ops.broadcast_to(states[None], (steps, samples, count)), 2
    )
    lengths = ops.cast(lengths, "int32")[:, None]

    def step(t: Any, log_alpha: Tensor) -> Tensor:
        skipped = ops.where(skips, back(log_alpha, 2, _LOG_ZERO), _LOG_ZERO)
        ways = ops.stack([log_alpha, back(log_alpha, 1, _LOG_ZERO), skipped])
        moved = ops.logsumexp(ways, axis=0) + emitted[t]
        return ops.where(t < lengths, moved, log_alpha)

    number = ops.arange(count, dtype="int32")[None]
    none = ops.full_like(emitted[0], _LOG_ZERO)
    log_alpha = ops.where(number == 0, ops.zeros_like(none), none)
    log_alpha = ops.fori_loop(0, steps, step, log_alpha)
    # At the end the last label, or the blank after it.
    last = 2 * ops.cast(label_lengths, "int32")[:, None]
    ends = (number == last) | (number == last - 1)
    log_probability = ops.logsumexp(ops.where(ends, log_alpha, none), axis=1)
    # There may be too few steps for the labels.
    possible = log_probability > _LOG_ZERO / 2
    return ops.where(possible, -log_probability, float("inf"))
