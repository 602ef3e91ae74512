"""Curvature through the statistics that BatchNormalization takes of a batch.

Statistics s of the batch (mean and variance of each channel) couple all its samples.
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
two for each channel: for random signs r on the statistics

    E[(Gᵀ r) ⊙ (2 Jᵀ B r + Gᵀ C r)] = diag(2 Jᵀ B G + Gᵀ C G).

`Gᵀ r` and `Gᵀ C r` are backward passes of the statistics, and `B r` and `C r` come with
the product that samples A: the signs there are independent of r.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras import ops

from keras_curvature import backend
from keras_curvature.backend import Tensor
from keras_curvature.layerwise.opened import Statistic
from keras_curvature.layerwise.recording import LayerRecording
from keras_curvature.layerwise.structure import Name, Structure


class ThroughStatistics:
    """What the statistics of a batch add to the diagonal: `diag(2 Jᵀ B G + Gᵀ C G)`.

    Args:
        recording: a `LayerRecording`. Used while a function is traced.
    """

    def __init__(self, recording: LayerRecording):
        self._recording = recording
        self._statistics = recording.statistics
        moved: list[Name] = [*recording.shifts, *recording.structure.direct]
        self._reached: list[Name] = [*moved, *self._statistics]
        self._back = recording.statistics_back(moved)
        self._units = _units(recording)

    def sampler(
        self, names: Sequence[Name]
    ) -> Callable[[Mapping[Name, Tensor]], list[Tensor]]:
        """The function from signs to a sample, one product for both.

        Args:
            names: what the signs are at: all statistics, and some more, whose own part
                of the diagonal is sampled as well.
        """
        recording = self._recording
        multiply = recording.product(names, self._reached)

        def sample(signs: Mapping[Name, Tensor]) -> list[Tensor]:
            u = multiply(self._direction(signs))
            others = {n: v for n, v in signs.items() if n not in self._units}
            parts = recording.diagonal(others, u), self._diagonal(signs, u)
            return [a + b for a, b in zip(*parts, strict=True)]

        return sample

    def _direction(self, signs: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
        """Statistics are moved in their units, see `_units`."""
        units = self._units
        return {n: v * units[n] if n in units else v for n, v in signs.items()}

    def _diagonal(
        self, signs: Mapping[Name, Tensor], u: Mapping[Name, Tensor]
    ) -> list[Tensor]:
        """`(Gᵀ r) ⊙ (2 Jᵀ B r + Gᵀ C r)` for signs r, and the product along them."""
        names, recording = self._statistics, self._recording
        carried = recording.carried
        left = carried(self._back({n: signs[n] / self._units[n] for n in names}))
        back = self._back({n: u[n] for n in names})
        right = carried({name: 2 * u[name] + part for name, part in back.items()})
        return [
            recording.turned(i, a) * recording.turned(i, b)
            for i, (a, b) in enumerate(zip(left, right, strict=True))
        ]

    def exact(self) -> list[Tensor]:
        """The sum over all statistics, a tensor for each variable."""
        multiply = self._recording.product(self._statistics, self._reached)
        count = num_statistics(self._recording.structure)

        def entry(j: Any) -> list[Tensor]:
            e: dict[Name, Tensor] = {}
            start = 0
            for name, unit in self._units.items():
                end = start + math.prod(unit.shape)
                one = ops.one_hot(j, count, dtype=unit.dtype)[start:end]
                e[name] = ops.reshape(one, unit.shape)
                start = end
            return self._diagonal(e, multiply(self._direction(e)))

        total: list[Tensor] = backend.sum_range(entry, count, 1)
        return total


def num_statistics(structure: Structure) -> int:
    """The number of statistics of a batch, over all channels."""
    # The number of channels is known: variables have it.
    shapes: list[Any] = [s.shape for s in structure.statistics.values()]
    return sum(math.prod(shape) for shape in shapes)


def _units(recording: LayerRecording) -> dict[Statistic, Tensor]:
    """What statistics are measured in: twice their channel's spread, or its square.

    In one product with signs at the layers' outputs each disturbs the other: small
    moves of the statistics drown in what the outputs' signs add to their products, and
    large ones add more to those of the outputs. The sum is least, and flat, near this.
    """
    layers, units = recording.structure.loss.layers(), {}
    for name in recording.statistics:
        variance = recording.taps[name._replace(moment="variance")]
        square = variance + layers[name.layer].epsilon
        units[name] = 2 * (ops.sqrt(square) if name.moment == "mean" else square)
    return units
