"""The diagonal of the Gauss–Newton matrix, exactly or by samples."""

import math

import numpy as np
from keras import ops

from keras_curvature import backend
from keras_curvature.operators import gauss_newton
from keras_curvature.operators.diagonal_sampler import DiagonalSampler
from keras_curvature.operators.layer_outputs import LEAK, half_of


class GaussNewtonDiagonal(DiagonalSampler):
    """The diagonal of G, exactly or by samples that are never negative.

    Penalties on the variables are included with their full curvature.

    A sample: with `S_n = F_n F_nᵀ` and random signs r, `E (Jᵀ F r)² = diag(JᵀSJ)`.
    Negative eigenvalues of `S_n`, which convex losses do not have, are left out.

    Args:
        layer_outputs: a `LayerOutputHessian`.
    """

    def __init__(self, layer_outputs):
        super().__init__(layer_outputs)
        self._positions_interact = None

    @property
    def num_matvecs(self):
        """Backward passes that the last `compute` took; `None` before it."""
        return self._layer_outputs.notes.get("gauss newton")

    def compute(self, max_matvecs=math.inf):
        """The exact diagonal, a flat tensor `(P,)` on the device.

        One backward pass per scalar output of the model serves all layers with a
        rule; each other variable takes two per output and sample. `num_matvecs`
        tells how many it was.

        Args:
            max_matvecs: how many it may be.

        Raises:
            ValueError: if it takes more.
        """
        return self._operator.mean_over_batches(
            lambda batch: self._exact(batch, max_matvecs), ("gauss newton", "exact")
        )

    @property
    def positions_interact(self):
        """Whether positions of the output meet in the loss, or there are none.

        The words of a sequence do not, in the usual losses; then the Hessian of the
        loss by the outputs has a small block for each of them. Found out once.
        """
        if self._positions_interact is None:
            leak = self._operator.mean_over_batches(
                self._leak, ("gauss newton", "leak"), backend.array([0, 0], "int32")
            )
            self._positions_interact = bool(leak > LEAK)
        return self._positions_interact

    def _find_out(self):
        super()._find_out()
        self.positions_interact  # noqa: B018

    def _leak(self, batch, seed):
        """The largest relative product at positions that a direction leaves out."""
        recording = self._layer_outputs.record(batch, outputs=True)
        gauss_newton.output_sizes(recording)
        sources = [recording.tapes.sources[k] for k in recording.outputs]
        if len(sources) != 1 or len(sources[0].shape) < 3:
            return ops.ones(())
        source = sources[0]
        shape = ops.shape(source)
        positions = math.prod(source.shape[1:-1])
        leaks = []
        for number in range(2):
            half = half_of(positions, seed, number)
            mask = ops.reshape(half, (1, *source.shape[1:-1], 1))
            mask = ops.cast(mask, source.dtype.name)
            move = mask * backend.random_normal(shape, seed, source.dtype.name)
            (product,) = gauss_newton.output_product(recording, [move])
            leaked = ops.max(ops.abs(product * (1 - mask)))
            leaks.append(ops.divide_no_nan(leaked, ops.max(ops.abs(product))))
        return ops.cast(ops.maximum(*leaks), "float32")

    def _exact(self, batch, max_matvecs):
        recording = self._layer_outputs.record(batch, outputs=True)
        count = sum(gauss_newton.output_sizes(recording))
        samples = recording.tapes.sources[recording.outputs[0]].shape[0] or 1
        covered, uncovered = gauss_newton.by_coverage(recording)
        passes = count + 2 * samples * count * len(uncovered)
        if passes > max_matvecs:
            raise ValueError(
                f"The exact Gauss–Newton diagonal takes {passes:,} backward passes "
                f"({count:,} outputs for each sample), more than "
                f"max_matvecs={max_matvecs:,}. Pass `num_matvecs` for an estimate "
                "from so many samples, or raise `max_matvecs`."
            )
        parts = gauss_newton.diagonal(recording, covered) if covered else {}
        for i in covered:
            parts[i] = parts[i] + _penalty(recording.tapes, i)
        for i in uncovered:
            parts[i] = _by_samples(recording, i) + self._own_penalty(recording, i)
        # Kept with the operator, as the graph is that is traced here.
        self._layer_outputs.notes["gauss newton"] = passes
        return self._operator.flatten([parts[i] for i in sorted(parts)])

    def _prepared(self, batch):
        recording = self._layer_outputs.record(batch, outputs=True)
        if self.positions_interact:
            s = gauss_newton.output_hessian(recording)
        else:
            s = gauss_newton.hessian_by_position(recording)
        size = sum(gauss_newton.output_sizes(recording))
        eigenvalues, vectors = ops.linalg.eigh(s)
        root = vectors * ops.sqrt(ops.maximum(eigenvalues, 0))[:, None, :]
        covered, uncovered = gauss_newton.by_coverage(recording)
        penalties = {i: _penalty(recording.tapes, i) for i in covered}
        penalties.update({i: self._own_penalty(recording, i) for i in uncovered})
        reached = {k for uses in recording.paths.values() for _, k in uses}
        wanted = sorted({*uncovered, *reached})
        sources = [recording.tapes.sources[k] for k in wanted]

        def draw(seed):
            signs = backend.random_signs(ops.shape(s)[:2], seed, s.dtype.name)
            weights = ops.einsum("ncr,nr->nc", root, signs)
            weights = ops.reshape(weights, (-1, size))
            carried = recording.tapes.pull_back(
                gauss_newton.targets(recording),
                gauss_newton.as_outputs(recording, weights),
                sources,
            )
            g = [None] * len(recording.tapes.sources)
            for k, part in zip(wanted, carried, strict=True):
                g[k] = part
            parts = recording.diagonal(g, g)
            return [part + penalties[i] for i, part in enumerate(parts)]

        return draw

    def _own_penalty(self, recording, i):
        """The same for a variable that also acts in ways that no rule knows."""
        source, regularizer = (
            recording.tapes.sources[i],
            recording.variables[i].regularizer,
        )
        if regularizer is None or self._operator.probe._loss_fn:
            return ops.zeros_like(source)
        tapes = backend.GradientProducts(lambda watch: regularizer(source), [source])
        return _penalty(tapes, 0)


def _penalty(tapes, i):
    """The diagonal of the Hessian of what acts on source i directly: penalties.

    Ones give it exactly where it is diagonal; two random directions tell.
    """
    source = tapes.sources[i]
    if tapes.gradients[i] is None:
        return ops.zeros_like(source)

    def product(v):
        direction = [None] * len(tapes.sources)
        direction[i] = v
        return tapes.product(direction, wanted=[i])[i]

    size = math.prod(source.shape)

    def entry(j):
        e = ops.reshape(ops.one_hot(j, size, dtype=source.dtype.name), source.shape)
        return [e * product(e)]

    def by_basis():
        return backend.sum_over_range(entry, size, max(1, min(256, 2**20 // size)))[0]

    ones = product(ops.ones_like(source))
    signs = [backend.random_signs_like(source, (i, number)) for number in range(2)]
    distance = [ops.max(ops.abs(v * product(v) - ones)) for v in signs]
    threshold = np.finfo(source.dtype.name).eps ** (2 / 3) * ops.max(ops.abs(ones))
    diagonal = ops.maximum(*distance) <= threshold
    return ops.cond(diagonal, lambda: ones, by_basis)


def _by_samples(recording, i):
    """`Σ_n Σ_cd S_ncd ∂f_nc/∂θ ⊙ ∂f_nd/∂θ` for a variable that no rule covers."""
    tapes, targets = recording.tapes, gauss_newton.targets(recording)
    source, s = tapes.sources[i], gauss_newton.output_hessian(recording)
    samples, count = ops.shape(s)[0], s.shape[1]

    def entry(j):
        n, c = j // count, j % count
        here = ops.cast(ops.arange(samples, dtype="int32") == n, s.dtype.name)[:, None]
        parts = []
        for weights in (ops.one_hot(c, count, dtype=s.dtype.name)[None], s[:, c]):
            cotangents = gauss_newton.as_outputs(recording, here * weights)
            parts += tapes.pull_back(targets, cotangents, [source])
        return [ops.reshape(parts[0] * parts[1], source.shape)]

    fold = max(1, 2**20 // max(1, math.prod(source.shape)))
    static = s.shape[0]
    if static is None:
        raise ValueError(
            "The Gauss–Newton diagonal of a variable without a layer rule needs "
            "batches of a fixed size."
        )
    return backend.sum_over_range(entry, static * count, min(256, fold))[0]
