"""The diagonal of the Gauss–Newton matrix, exactly or by samples."""

import functools
import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_curvature import backend
from keras_curvature.axes import Axes
from keras_curvature.backend import Tensor
from keras_curvature.data_sets import Batch
from keras_curvature.evaluation import Evaluation
from keras_curvature.layerwise import gauss_newton
from keras_curvature.layerwise.checks import LEAK, find_structure, half_of, shuffled
from keras_curvature.layerwise.outputs import OutputSpace, output_sizes
from keras_curvature.layerwise.penalties import exact_penalties
from keras_curvature.layerwise.recording import LayerRecording
from keras_curvature.layerwise.sampled import Draw, Samples
from keras_curvature.layerwise.structure import Name, Structure, num_samples
from keras_curvature.loss import State
from keras_curvature.parameters import full_precision


class GaussNewtonDiagonal:
    """The diagonal of G, exactly or by samples that are never negative.

    Penalties on the variables are included with their full curvature.

    Args:
        evaluation: of a `TrainingLoss`.

    Raises:
        ValueError: for a model whose samples interact, or whose outputs have no fixed
            size.
    """

    def __init__(self, evaluation: Evaluation):
        self._evaluation = evaluation
        self._structure = evaluation.once(find_structure).of_first_order
        if not self._structure.samples_independent:
            raise ValueError(
                "The Gauss–Newton diagonal is computed sample by sample, and the "
                "samples of this model interact (BatchNormalization with batch "
                "statistics, or a layer that mixes the batch). Pass `num_matvecs` for "
                "an estimate from samples, which losses convex in the outputs allow, "
                "or use training=False."
            )
        self._count = sum(output_sizes(self._structure))
        self._uncovered = [
            i
            for i in range(len(evaluation.loss.variables))
            if i not in self._structure.uses_of
        ]
        exact = functools.partial(by_outputs, self._structure, self._uncovered)
        self._exact = evaluation.mean_of(exact)
        self._samples: Samples | None = None

    def compute(
        self, max_matvecs: float = math.inf, axes: list[Axes] | None = None
    ) -> tuple[Tensor, int]:
        """The exact diagonal, and the backward passes that it took.

        One backward pass per scalar output of the model serves all layers with a
        rule; the other variables take two more per output and sample.

        Args:
            max_matvecs: how many it may be.
            axes: of each variable, that the diagonal is taken in.

        Returns:
            A flat tensor `(P,)` on the device, and their number.

        Raises:
            ValueError: if it takes more.
        """
        samples = num_samples(self._evaluation.data.first())
        passes = self._count * (1 + 2 * samples * bool(self._uncovered))
        if passes > max_matvecs:
            raise ValueError(
                f"The exact Gauss–Newton diagonal takes {passes:,} backward passes "
                f"({self._count:,} outputs for each sample), more than "
                f"max_matvecs={max_matvecs:,}. Pass `num_matvecs` for an estimate "
                "from so many samples, or raise `max_matvecs`."
            )
        return self._exact(axes), passes

    @property
    def samples(self) -> Samples:
        """Samples of the diagonal: with `S_n = F_n F_nᵀ`, `E (Jᵀ F r)² = diag(JᵀSJ)`.

        Negative eigenvalues of `S_n`, which convex losses do not have, are left out.
        """
        if self._samples is None:
            by_position = not self._positions_interact()
            self._samples = Samples(
                self._evaluation,
                lambda state, batch, *axes: self._prepared(
                    state, batch, by_position, *axes
                ),
            )
        return self._samples

    def _positions_interact(self) -> bool:
        """Whether positions of the output meet in the loss, or there are none.

        The words of a sequence do not, in the usual losses; then the Hessian of the
        loss by the outputs has a small block for each of them.
        """
        shapes = self._structure.output_shapes
        if len(shapes) != 1 or len(shapes[0].shape) < 3:
            return True
        key = backend.array([0, 0], "int32")
        leak = self._evaluation.at_first(self._leak, key)
        return bool(ops.convert_to_numpy(leak) > self._evaluation.beyond_rounding(LEAK))

    # While tracing

    def _leak(self, state: State, batch: Batch, key: Tensor) -> Tensor:
        """The largest relative product at positions that a direction leaves out."""
        recording = LayerRecording(self._structure, state, batch, True)
        space = OutputSpace(recording)
        (name,), multiply = space.names, space.product()
        shift = recording.point[name]
        positions = shift.shape[1:-1]
        order = shuffled(math.prod(positions), key)
        move = backend.normal(ops.shape(shift), backend.fold_in(key, 5), shift.dtype)
        leaks = []
        for number in range(2):
            half = half_of(order, number)
            mask = ops.cast(ops.reshape(half, (1, *positions, 1)), shift.dtype)
            product = multiply({name: mask * move})[name]
            leaked = ops.max(ops.abs(product * (1 - mask)))
            whole = ops.max(ops.abs(product))
            leaks.append(leaked / ops.where(whole > 0, whole, 1))
        return ops.cast(ops.maximum(*leaks), "float32")

    def _prepared(
        self,
        state: State,
        batch: Batch,
        by_position: bool,
        axes: list[Axes] | None = None,
    ) -> tuple[Tensor, Draw]:
        recording = LayerRecording(self._structure, state, batch, True, axes=axes)
        space = OutputSpace(recording)
        s = space.hessian_by_position() if by_position else space.hessian()
        # No eigenvectors in half precision anywhere.
        dtype = full_precision(ops.dtype(s))
        eigenvalues, vectors = ops.linalg.eigh(ops.cast(s, dtype))
        root = vectors * ops.sqrt(ops.maximum(eigenvalues, 0))[:, None, :]
        root = ops.cast(root, s.dtype)
        uncovered = [i for i in self._uncovered if i in recording.point]
        wanted: list[Name] = [*uncovered, *recording.shifts]
        back = space.back(wanted)
        penalties = exact_penalties(recording)

        def draw(key: Tensor) -> list[Tensor]:
            signs = backend.signs(ops.shape(s)[:2], key, s.dtype)
            weights = ops.einsum("ncr,nr->nc", root, signs)
            g = back(space.parted(ops.reshape(weights, (-1, space.count))))
            parts = recording.diagonal(g, g)
            return [part + p for part, p in zip(parts, penalties, strict=True)]

        return recording.loss, draw


def by_outputs(
    structure: Structure,
    uncovered: Sequence[int],
    state: State,
    batch: Batch,
    axes: list[Axes] | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and the exact diagonal, from a backward pass for each output; to trace.

    Args:
        structure: what is known of the model's layers.
        uncovered: variables that take two more passes for each output and sample.
        state: values of all variables.
        batch: `(x, y, sample_weight)`.
        axes: of each variable, that the diagonal is taken in.
    """
    recording = LayerRecording(structure, state, batch, outputs=True, axes=axes)
    parts = gauss_newton.diagonal(recording, list(structure.uses_of))
    parts |= _by_samples(recording, uncovered)
    penalties = enumerate(exact_penalties(recording))
    return recording.loss, structure.loss.layout.joined(
        [parts.get(i, 0.0) + penalty for i, penalty in penalties]
    )


def _by_samples(
    recording: LayerRecording, variables: Sequence[int]
) -> dict[int, Tensor]:
    """`Σ_n Σ_cd S_ncd ∂f_nc/∂θ ⊙ ∂f_nd/∂θ` for variables that no rule covers."""
    parts = {i: ops.zeros_like(recording.value(i)) for i in variables}
    acting = [i for i in variables if i in recording.point]
    if not acting:
        return parts
    space = OutputSpace(recording)
    if space.known_samples is None:
        raise ValueError(
            "The Gauss–Newton diagonal of a variable without a layer rule needs "
            "batches of a fixed size."
        )
    s, back = space.hessian(), space.back([*acting])

    def entry(j: Any) -> list[Tensor]:
        n, c = j // space.count, j % space.count
        here = ops.cast(ops.arange(space.known_samples, dtype="int32") == n, s.dtype)[
            :, None
        ]
        rows = (ops.one_hot(c, space.count, dtype=s.dtype)[None], s[:, c])
        first, second = (back(space.parted(here * row)) for row in rows)
        return [
            recording.turned(i, first[i]) * recording.turned(i, second[i])
            for i in acting
        ]

    elements = sum(math.prod(recording.point[i].shape) for i in acting)
    fold = min(256, max(1, 2**20 // max(1, elements)))
    count = space.known_samples * space.count
    sums = backend.sum_range(entry, count, fold)
    return parts | dict(zip(acting, sums, strict=True))
