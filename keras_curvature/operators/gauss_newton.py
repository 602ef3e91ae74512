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

#: Bound for the elements of the Hessian of the loss by the outputs (1 GiB in float32).
HESSIAN_ELEMENTS = 2**28

#: Taken for the number of samples where a graph serves any number of them.
UNKNOWN_SIZE = 256


def by_coverage(recording):
    """Indices of the variables that act through layer outputs, and of the others."""
    covered = [i for i, v in enumerate(recording.variables) if id(v) in recording.paths]
    return covered, [i for i in range(len(recording.variables)) if i not in covered]


def as_outputs(recording, flat):
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
    count = sum(output_sizes(recording))
    _check_size(recording, count)

    def column(i):
        product = output_product(recording, _basis(recording, i))
        return ops.concatenate([_flat(part) for part in product], axis=1)

    return ops.transpose(backend.map_over_range(column, count), (1, 2, 0))


def hessian_by_position(recording):
    """The blocks of S of single positions, shape `(N T, C, C)`.

    For one output of shape `(N, ..., C)` whose positions do not meet in the loss, as
    the words of a sequence; then they are all there is of S.
    """
    (k,) = recording.outputs
    source = recording.tapes.sources[k]
    count = source.shape[-1]
    _check_size(recording, count)

    def column(i):
        e = ops.one_hot(i, count, dtype=source.dtype.name)
        product = output_product(recording, [ops.broadcast_to(e, ops.shape(source))])
        return ops.reshape(product[0], (-1, count))

    return ops.transpose(backend.map_over_range(column, count), (1, 2, 0))


def _check_size(recording, width):
    shapes = [recording.tapes.sources[k].shape for k in recording.outputs]
    outputs = sum(math.prod(n or UNKNOWN_SIZE for n in shape) for shape in shapes)
    if outputs * width > HESSIAN_ELEMENTS:
        raise ValueError(
            "The Hessian of the loss by the outputs is too large to take roots of: "
            f"{outputs * width:,} numbers for outputs of shape "
            f"{', '.join(map(str, shapes))}. Use a smaller batch (`batch_size`), or "
            'method="layerwise".'
        )


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
        back = tapes.pull_back(targets(recording), cotangents, list(sources.values()))
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

    For random `v`, `(M − G) v` vanishes with probability one only if the rows of
    `M − G` do. This certifies what a list of layer types could only guess.

    Args:
        recording: a `Recording` with outputs.
        seed: seed of the direction.

    Returns:
        Dictionary from source index to the relative size of `(M − G) v` there, and
        the noise of samples of the diagonal drawn with `M − G` over that with M: a
        ratio of variances, infinite where M has none.
    """
    v = [None] * len(recording.tapes.sources)
    w = list(v)
    probed = _reached(recording)
    for k in probed:
        # Normal numbers, so that no finite set of directions can hide a part.
        v[k] = _normal(recording.tapes.sources[k], seed, 10_000 + k)
        w[k] = _normal(recording.tapes.sources[k], seed, 30_000 + k)
    product = recording.tapes.product(v, wanted=probed)
    residual = recording.residual().tapes.product(v, wanted=probed)
    # With w independent of v, all entries of the matrices count, the diagonal too.
    left, whole = (
        sum(ops.sum(ops.square(d)) for d in recording.diagonal(w, u))
        for u in (residual, product)
    )
    noise = ops.where(whole > 0, left / whole, float("inf"))
    return {k: _relative(residual[k], product[k]) for k in probed}, noise


def coupling(recording, seed):
    """How far the loss is from a function of the outputs plus one of the rest.

    Then `M = Jᵀ S J + R` has no other mixed terms, which all that tells G from
    R relies on. A loss that multiplies an output with something else has them.

    Args:
        recording: a `Recording` with outputs.
        seed: seed of the direction.

    Returns:
        The largest relative distance between `M v` and `Jᵀ S v` over all shifts, for
        a random move `v` of the outputs, a scalar.
    """
    tapes, outputs, probed = recording.tapes, recording.outputs, _reached(recording)
    moved = [_normal(tapes.sources[k], seed, 20_000 + k) for k in outputs]
    v = [None] * len(tapes.sources)
    for k, move in zip(outputs, moved, strict=True):
        v[k] = move
    product = tapes.product(v, wanted=sorted({*outputs, *probed}))
    carried = tapes.pull_back(
        targets(recording),
        [product[k] for k in outputs],
        [tapes.sources[k] for k in probed],
    )
    return ops.max(
        ops.stack(
            [
                _relative(product[k] - g, product[k], g)
                for k, g in zip(probed, carried, strict=True)
            ]
            or [0.0]
        )
    )


def _reached(recording):
    """Indices of the shifts that move the loss."""
    first, gradients = len(recording.variables), recording.tapes.gradients
    return [k for k in range(first, len(gradients)) if gradients[k] is not None]


def _normal(like, seed, number):
    return backend.random_normal(
        ops.shape(like), backend.fold_seed(seed, number), like.dtype.name
    )


def _relative(difference, *terms):
    """The largest entry of a difference, relative to those of its terms."""
    scale = ops.max(ops.stack([ops.max(ops.abs(t)) for t in terms]))
    size = ops.max(ops.abs(difference))
    return ops.where(scale > 0, size / scale, ops.cast(size > 0, size.dtype))


def targets(recording):
    """The recorded outputs of the model, with their shifts."""
    return [recording.shifted[k] for k in recording.outputs]


def _basis(recording, i):
    """The i-th unit vector of the outputs, for every sample at once."""
    source = recording.tapes.sources[recording.outputs[0]]
    size = sum(output_sizes(recording))
    e = ops.one_hot(i, size, dtype=source.dtype.name)[None]
    return as_outputs(recording, ops.broadcast_to(e, (ops.shape(source)[0], size)))


def _flat(x):
    return ops.reshape(x, (ops.shape(x)[0], math.prod(x.shape[1:])))
