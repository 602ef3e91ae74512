"""The Gauss–Newton part of the Hessian, over the layers' outputs.

With `f` the model's outputs (in front of a final activation) and `S_n` the
Hessian of the loss by the outputs of sample n, the Gauss–Newton matrix is
`G = Σ_n (∂f_n/∂θ)ᵀ S_n (∂f_n/∂θ)`: what remains of H when the model's own curvature
is left out. For a model that is piecewise linear between a layer and its outputs
(relu, max-pooling, residual sums), both agree within that layer.
"""

import math

import numpy as np
from keras import ops

from keras_curvature import backend
from keras_curvature.layer_rules import stacked_products

#: Bound for the elements of all outputs' rows at the layers (64 MiB in float32);
#: beyond it, they are computed a few at a time.
ROWS_ELEMENTS = 2**24

#: Taken for the number of samples where a graph serves any number of them.
UNKNOWN_SIZE = 256


class GaussNewtonDiagonal:
    """The diagonal of G, exactly or by samples that are never negative.

    Penalties on the variables are included with their full curvature.

    Args:
        layer_outputs: a `LayerOutputHessian`.
    """

    def __init__(self, layer_outputs):
        self._layer_outputs = layer_outputs
        self._operator = layer_outputs.operator

    @property
    def num_matvecs(self):
        """Backward passes that the last `compute` took; `None` before it."""
        return self._layer_outputs.notes.get("gauss newton")

    @property
    def device(self):
        """Name of the device that does the work."""
        return self._operator.device

    @property
    def size(self):
        """P, the number of entries."""
        return self._operator.shape[0]

    def compute(self):
        """The exact diagonal, a flat tensor `(P,)` on the device.

        One backward pass per scalar output of the model serves all layers with a
        rule; each other variable takes two per output and sample. `num_matvecs`
        tells how many it was.
        """
        return self._operator.mean_over_batches(self._exact, ("gauss newton", "exact"))

    def diagonal_samples(self, seed, first, count):
        """Independent unbiased samples, `(P, count)`, none of them negative.

        With `S_n = F_n F_nᵀ` and random signs r: `E (Jᵀ F r)² = diag(JᵀSJ)`. Negative
        eigenvalues of `S_n`, which convex losses do not have, are left out.

        Args:
            seed: integer seed.
            first: index of the first sample.
            count: number of samples.
        """
        return self._operator.mean_over_batches(
            lambda batch, seed, number: self._samples(batch, seed, number, count),
            ("gauss newton", "samples", count),
            backend.array([seed, first], "int32"),
            numbered=True,
        )

    def _exact(self, batch):
        recording = self._layer_outputs.record(batch, outputs=True)
        count, samples = sum(output_sizes(recording)), _num_samples(recording)
        covered, uncovered = _by_coverage(recording)
        parts = diagonal(recording, covered) if covered else {}
        for i in covered:
            parts[i] = parts[i] + _penalty(recording.tapes, i)
        for i in uncovered:
            parts[i] = _by_samples(recording, i) + self._own_penalty(recording, i)
        # Kept with the operator, as the graph is that is traced here.
        self._layer_outputs.notes["gauss newton"] = count + sum(
            2 * samples * count for _ in uncovered
        )
        return self._operator.flatten([parts[i] for i in sorted(parts)])

    def _samples(self, batch, seed, number, count):
        recording = self._layer_outputs.record(batch, outputs=True)
        s = output_hessian(recording)
        eigenvalues, vectors = ops.linalg.eigh(s)
        root = vectors * ops.sqrt(ops.maximum(eigenvalues, 0))[:, None, :]
        covered, uncovered = _by_coverage(recording)
        penalties = {i: _penalty(recording.tapes, i) for i in covered}
        penalties.update({i: self._own_penalty(recording, i) for i in uncovered})
        reached = {k for uses in recording.paths.values() for _, k in uses}
        wanted = sorted({*uncovered, *reached})
        sources = [recording.tapes.sources[k] for k in wanted]
        samples = []
        for index in range(count):
            key = backend.fold_seed(seed + [0, index], number)
            signs = backend.random_signs(ops.shape(s)[:2], key, s.dtype.name)
            weights = ops.einsum("ncr,nr->nc", root, signs)
            carried = recording.tapes.pull_back(
                _targets(recording), _as_outputs(recording, weights), sources
            )
            g = [None] * len(recording.tapes.sources)
            for k, part in zip(wanted, carried, strict=True):
                g[k] = part
            parts = recording.diagonal(g, g)
            parts = [part + penalties[i] for i, part in enumerate(parts)]
            samples.append(self._operator.flatten(parts))
        return ops.stack(samples, axis=1)

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


def _by_coverage(recording):
    """Indices of the variables that act through layer outputs, and of the others."""
    covered = [i for i, v in enumerate(recording.variables) if id(v) in recording.paths]
    return covered, [i for i in range(len(recording.variables)) if i not in covered]


def _num_samples(recording):
    return recording.tapes.sources[recording.outputs[0]].shape[0] or 1


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
    signs = [
        backend.random_signs(source.shape, (i, number), source.dtype.name)
        for number in range(2)
    ]
    distance = [ops.max(ops.abs(v * product(v) - ones)) for v in signs]
    threshold = np.finfo(source.dtype.name).eps ** (2 / 3) * ops.max(ops.abs(ones))
    diagonal = ops.maximum(*distance) <= threshold
    return ops.cond(diagonal, lambda: ones, by_basis)


def _by_samples(recording, i):
    """`Σ_n Σ_cd S_ncd ∂f_nc/∂θ ⊙ ∂f_nd/∂θ` for a variable that no rule covers."""
    tapes = recording.tapes
    source, s = tapes.sources[i], output_hessian(recording)
    samples, count = ops.shape(s)[0], s.shape[1]

    def entry(j):
        n, c = j // count, j % count
        here = ops.cast(ops.arange(samples, dtype="int32") == n, s.dtype.name)[:, None]
        parts = []
        for weights in (ops.one_hot(c, count, dtype=s.dtype.name)[None], s[:, c]):
            cotangents = _as_outputs(recording, here * weights)
            parts += tapes.pull_back(_targets(recording), cotangents, [source])
        return [ops.reshape(parts[0] * parts[1], source.shape)]

    fold = max(1, 2**20 // max(1, math.prod(source.shape)))
    static = s.shape[0]
    if static is None:
        raise ValueError(
            "The Gauss–Newton diagonal of a variable without a layer rule needs "
            "batches of a fixed size."
        )
    return backend.sum_over_range(entry, static * count, min(256, fold))[0]


def _as_outputs(recording, flat):
    """`(N, C)` as a list of tensors shaped like the outputs."""
    ends = np.cumsum(output_sizes(recording))
    starts = [0, *ends[:-1]]
    return [
        ops.reshape(flat[:, start:end], ops.shape(recording.tapes.sources[k]))
        for k, start, end in zip(recording.outputs, starts, ends, strict=True)
    ]


def output_sizes(recording):
    """Number of scalar outputs per sample, for each output of the model.

    Raises:
        ValueError: if the shape of an output is not known while tracing.
    """
    sizes = []
    for k in recording.outputs:
        shape = tuple(recording.tapes.sources[k].shape)
        if not shape or None in shape[1:]:
            raise ValueError(
                "The Gauss–Newton matrix needs outputs of a fixed size for each "
                f"sample. Received: an output of shape {shape}. Pad the sequences."
            )
        sizes.append(math.prod(shape[1:]))
    if not sizes:
        raise ValueError(
            "The Gauss–Newton matrix needs a loss of the model's outputs. Received: a "
            "`loss_fn` that does not call the model itself, or only in a loop."
        )
    return sizes


def output_hessian(recording):
    """`S_n` for every sample, shape `(N, C, C)`, C scalar outputs in all."""
    tapes, outputs = recording.tapes, recording.outputs

    def column(i):
        direction = [None] * len(tapes.sources)
        for k, e in zip(outputs, _basis(recording, i), strict=True):
            direction[k] = e
        product = tapes.product(direction, wanted=outputs)
        return ops.concatenate([_flat(product[k]) for k in outputs], axis=1)

    columns = backend.map_over_range(column, sum(output_sizes(recording)))
    return ops.transpose(columns, (1, 2, 0))


def output_product(recording, moved):
    """`S_n df_n` for moves `df` of the outputs (a list of tensors)."""
    tapes, outputs = recording.tapes, recording.outputs
    direction = [None] * len(tapes.sources)
    for k, d in zip(outputs, moved, strict=True):
        direction[k] = d
    product = tapes.product(direction, wanted=outputs)
    return [product[k] for k in outputs]


def diagonal(recording, variables):
    """The exact diagonal of the Gauss–Newton matrix.

    `Σ_n Σ_c (J_nᵀ a_nc) ⊙ (J_nᵀ b_nc)` with the rows `a_c = ∂f_c/∂z` and
    `b_c = Σ_d S_cd ∂f_d/∂z`: no matrix has to be factorized.

    Args:
        recording: a `Recording` with outputs.
        variables: indices of the variables to return it for; all act through layer
            outputs.

    Returns:
        Dictionary from the index of a variable to a tensor of its shape.
    """
    tapes, count = recording.tapes, sum(output_sizes(recording))
    uses_of = {i: recording.paths[id(recording.variables[i])] for i in variables}
    wanted = sorted({k for uses in uses_of.values() for _, k in uses})
    sources = {k: tapes.sources[k] for k in wanted}
    pointwise = {
        i: uses[0]
        for i, uses in uses_of.items()
        if len(uses) == 1
        and sources[uses[0][1]].shape[0]
        and uses[0][0].pointwise(sources[uses[0][1]].shape)
    }
    others = [i for i in variables if i not in pointwise]
    summed = sorted({k for _, k in pointwise.values()})

    def of_others(a, b):
        return [
            stacked_products(
                [path for path, _ in uses_of[i]],
                [a[k] for _, k in uses_of[i]],
                [b[k] for _, k in uses_of[i]],
            )
            for i in others
        ]

    def carried(cotangents):
        back = tapes.pull_back(_targets(recording), cotangents, list(sources.values()))
        return dict(zip(wanted, back, strict=True))

    def row(c):
        parts = carried(_basis(recording, c)).values()
        return ops.concatenate([_flat(part) for part in parts], axis=1)

    def few_rows(c):
        e = _basis(recording, c)
        a, b = carried(e), carried(output_product(recording, e))
        return [a[k] * b[k] for k in summed] + of_others(a, b)

    elements = sum(
        math.prod(n or UNKNOWN_SIZE for n in z.shape) for z in sources.values()
    )
    if count * elements <= ROWS_ELEMENTS:
        rows = backend.map_over_range(row, count)
        weighted = ops.einsum("ncd,dnz->cnz", output_hessian(recording), rows)
        sums = _like(sources, ops.sum(rows * weighted, axis=0))
        sums = [sums[k] for k in summed]
        if others:
            sums += backend.sum_over_range(
                lambda c: of_others(
                    _like(sources, rows[c]), _like(sources, weighted[c])
                ),
                count,
                chunk_size=1,
            )
    else:
        # `b_c` by a second backward pass.
        fold = max(1, min(256, ROWS_ELEMENTS // (4 * elements)))
        sums = backend.sum_over_range(few_rows, count, 1 if others else fold)
    diagonals = dict(zip(others, sums[len(summed) :], strict=True))
    for i, (path, k) in pointwise.items():
        own = sums[summed.index(k)]
        diagonals[i] = path.products(own, ops.ones_like(own))
    return diagonals


def _like(sources, flat):
    """Rows `(N, ...)` of several sources side by side, taken apart again."""
    parts, start = {}, 0
    for k, source in sources.items():
        width = math.prod(source.shape[1:])
        part = flat[:, start : start + width]
        parts[k] = ops.reshape(part, (ops.shape(flat)[0], *source.shape[1:]))
        start += width
    return parts


def departure(recording, seed):
    """How far M is from its Gauss–Newton part, at each shift.

    For random `v`, `(M − G) v` vanishes up to rounding with probability one only if
    the rows of `M − G` do. This certifies what a list of layer types could only
    guess.

    Args:
        recording: a `Recording` with outputs.
        seed: seed of the direction.

    Returns:
        Dictionary from source index to the relative size of `(M − G) v` there.
    """
    tapes = recording.tapes
    first = len(recording.variables)
    v = recording.signs(seed)
    v[:first] = [None] * first
    probed = [k for k in range(first, len(v)) if v[k] is not None]
    for k in probed:
        # Normal numbers, so that no finite set of directions can hide a part.
        v[k] = backend.random_normal(
            ops.shape(v[k]), backend.fold_seed(seed, 10_000 + k), v[k].dtype.name
        )
    u = tapes.product(v, wanted=probed)
    sources = [tapes.sources[k] for k in probed]
    moved = tapes.push_forward(_targets(recording), sources, [v[k] for k in probed])
    back = tapes.pull_back(
        _targets(recording), output_product(recording, moved), sources
    )
    sizes = {}
    for k, g in zip(probed, back, strict=True):
        scale = ops.maximum(ops.max(ops.abs(u[k])), ops.max(ops.abs(g)))
        distance = ops.max(ops.abs(u[k] - g))
        sizes[k] = ops.where(scale > 0, distance / scale, 0.0)
    return sizes


def _targets(recording):
    """The recorded outputs of the model, with their shifts."""
    return [recording.shifted[k] for k in recording.outputs]


def _basis(recording, i):
    """The i-th unit vector of the outputs, for every sample at once."""
    source = recording.tapes.sources[recording.outputs[0]]
    size = sum(output_sizes(recording))
    e = ops.one_hot(i, size, dtype=source.dtype.name)[None]
    return _as_outputs(recording, ops.broadcast_to(e, (ops.shape(source)[0], size)))


def _flat(x):
    return ops.reshape(x, (ops.shape(x)[0], math.prod(x.shape[1:])))
