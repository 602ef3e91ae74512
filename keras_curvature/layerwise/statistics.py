"""Curvature through the statistics that BatchNormalization takes of a batch.

Batch statistics s (mean and variance of each channel) couple all samples of a batch.
*Given* the statistics, samples are independent. So they are taken as variables of
their own, with the equations `s = S(z, s)` that they obey as constraints, and with

    𝓛(z, s) = L(z, s) + λᵀ (S(z, s) − s),     λ = dL/ds, held constant,

the loss with a multiplier for each of them. As 𝓛 does not change to first order when s
does, its second derivatives are all there is: for variables W that move the outputs of
layers by `δz_n = J_n δW` and the statistics by `δs = G δW` (what one statistic does to
those that follow included),

    H = Σ_n J_nᵀ A_n J_n + Jᵀ B G + (Jᵀ B G)ᵀ + Gᵀ C G,    A, B, C = 𝓛_zz, 𝓛_zs, 𝓛_ss.

S is a mean over samples, given the statistics before: A has no terms between samples,
and its part of the diagonal is had as for other models. The rest has few directions,
two for each channel: with signs r on the statistics

    E[(Gᵀ r) ⊙ (2 Jᵀ B r + Gᵀ C r)] = diag(2 Jᵀ B G + Gᵀ C G),

for a product of 𝓛 along r, and two backward passes of the statistics.
"""

import math
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_curvature import backend
from keras_curvature.backend import Tensor
from keras_curvature.layerwise.opened import Statistic
from keras_curvature.layerwise.recording import LayerRecording
from keras_curvature.layerwise.structure import Structure

#: Keeps the signs of statistics apart from those of layer outputs.
_PURPOSE = 1


class ThroughStatistics:
    """What the statistics of a batch add to the diagonal: `diag(2 Jᵀ B G + Gᵀ C G)`.

    Args:
        recording: a `LayerRecording`. Used while a function is traced.
    """

    def __init__(self, recording: LayerRecording):
        self._recording = recording
        self._statistics = recording.statistics
        reached = [*recording.shifts, *recording.structure.direct]
        self._multiply = recording.product(
            self._statistics, [*reached, *self._statistics]
        )
        self._back = recording.statistics_back(reached)
        self._units = _units(recording)

    def sample(self, key: Tensor) -> list[Tensor]:
        """An unbiased sample, a tensor for each variable."""
        key = backend.fold_in(key, _PURPOSE)
        names = self._statistics
        return self._along(self._recording.random(backend.signs, names, key))

    def exact(self) -> list[Tensor]:
        """The sum over all statistics, a tensor for each variable."""
        sizes = {n: math.prod(u.shape) for n, u in self._units.items()}
        dtype = max(
            keras.backend.standardize_dtype(u.dtype) for u in self._units.values()
        )

        def entry(j: Any) -> list[Tensor]:
            flat = ops.one_hot(j, sum(sizes.values()), dtype=dtype)
            parts, start = {}, 0
            for name, size in sizes.items():
                part = ops.reshape(flat[start : start + size], self._units[name].shape)
                parts[name] = ops.cast(part, self._units[name].dtype)
                start += size
            return self._along(parts)

        return backend.sum_range(entry, sum(sizes.values()), 1)

    def _along(self, r: Mapping[Statistic, Tensor]) -> list[Tensor]:
        """`(Gᵀ r) ⊙ (2 Jᵀ B r + Gᵀ C r)`."""
        units, carried = self._units, self._recording.carried
        u = self._multiply({name: r[name] * units[name] for name in r})
        left = carried(self._back({name: r[name] / units[name] for name in r}))
        back = self._back({name: u[name] for name in r})
        right = carried({name: 2 * u[name] + part for name, part in back.items()})
        return [a * b for a, b in zip(left, right, strict=True)]


def num_statistics(structure: Structure) -> int:
    """The number of statistics of a batch, over all channels."""
    return sum(int(math.prod(s.shape)) for s in structure.statistics.values())


def _units(recording: LayerRecording) -> dict[Statistic, Tensor]:
    """What statistics are measured in: the spread of their channel, and its square.

    Then a sample does not depend on the scale of what is normalized.
    """
    layers, units = recording.structure.loss.layers(), {}
    for name in recording.statistics:
        variance = recording.taps[name._replace(moment="variance")]
        square = variance + layers[name.layer].epsilon
        units[name] = ops.sqrt(square) if name.moment == "mean" else square
    return units
