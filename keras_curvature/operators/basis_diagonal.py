"""The exact diagonal of any Hessian, by the basis of its parameters."""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_curvature import backend
from keras_curvature.backend import Tensor
from keras_curvature.data_sets import Batch
from keras_curvature.evaluation import Evaluation, of_values
from keras_curvature.loss import State

#: Basis vectors that are multiplied together, and a bound for their elements in all.
TOGETHER = 256
ELEMENTS = 2**24


class BasisDiagonal:
    """`diag(H)_j = e_jᵀ H e_j`, many basis vectors at once.

    All of them share one recording, and are folded into the axes of every operation
    where the framework can.

    Args:
        evaluation: of any loss.
    """

    def __init__(self, evaluation: Evaluation):
        self._loss = evaluation.loss
        self._layout = evaluation.loss.layout
        size = self._layout.size
        self._width = max(1, min(TOGETHER, size, ELEMENTS // max(1, size)))
        self._some = evaluation.mean_of(self._entries)

    def compute(self, progress: Callable[[int, int], bool]) -> Tensor:
        """The diagonal, a flat tensor `(P,)`.

        Args:
            progress: told `progress(done, total)` in products; says whether to go on.

        Raises:
            KeyboardInterrupt: if it says stop.
        """
        parts, size = [], self._layout.size
        for start in range(0, size, self._width):
            parts.append(self._some(backend.array(start, "int32")))
            if not progress(min(start + self._width, size), size):
                raise KeyboardInterrupt
        return ops.concatenate(parts)[:size]

    def _entries(
        self, state: State, batch: Batch, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the entries from `start` on, zero beyond the last one."""
        layout = self._layout
        point = dict(enumerate(state.values))
        recording = backend.record(of_values(self._loss, state.others, batch), point)
        multiply = recording.product(point, point)
        positions = ops.arange(layout.size, dtype="int32")

        def entry(i: Any) -> Tensor:
            e = ops.cast(positions == start + i, layout.dtype.name)
            product = layout.joined(list(multiply(layout.parted(e)).values()))
            return ops.sum(e * product)

        return recording.loss, backend.map_range(entry, self._width)
