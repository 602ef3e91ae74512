"""Models of one layer, and diagonals to compare with: by differences alone."""

from typing import Any, NamedTuple

import cases
import numpy as np
import probed_cases
import reference
from keras import layers, ops

from keras_curvature.estimators import seed_key
from keras_curvature.layerwise import (
    ExactDiagonal,
    GaussNewtonDiagonal,
    LayerwiseDiagonal,
    Plan,
    find_structure,
)
from keras_curvature.operators import HessianOperator

#: Layers with a rule in odd shapes: name to input shape and layer.
LAYERS = {
    "dense": ((3,), lambda: layers.Dense(4, activation="tanh")),
    "dense_sequence": ((4, 3), lambda: layers.Dense(2)),
    "dense_image": ((2, 3, 2), lambda: layers.Dense(3, use_bias=False)),
    "dense_one_step": ((1, 3), lambda: layers.Dense(2)),
    "einsum_ellipsis": (
        (3, 2, 2),
        lambda: layers.EinsumDense("...x,xy->...y", 3, bias_axes="y"),
    ),
    "einsum_ellipsis_last": (
        (3, 2, 4),
        lambda: layers.EinsumDense("bi...,io->bo...", (2, 2, 4), bias_axes="o"),
    ),
    "einsum_group": (
        (3, 2, 4),
        lambda: layers.EinsumDense("btgd,gde->btge", (None, 2, 3), bias_axes="ge"),
    ),
    "einsum_transposed": (
        (3, 2),
        lambda: layers.EinsumDense("bti,oi->bot", (2, 3), bias_axes="o"),
    ),
    "einsum_bias_of_positions": (
        (3, 2),
        lambda: layers.EinsumDense("bti,io->bto", (3, 2), bias_axes="t"),
    ),
    "einsum_bias_of_both": (
        (3, 2),
        lambda: layers.EinsumDense("bti,io->bto", (3, 2), bias_axes="to"),
    ),
    "einsum_no_position": (
        (3, 2),
        lambda: layers.EinsumDense("bti,tio->bo", 4, bias_axes="o"),
    ),
    "conv1d": (
        (5, 2),
        lambda: layers.Conv1D(3, 2, strides=2, padding="same", activation="tanh"),
    ),
    "conv1d_causal": (
        (5, 2),
        lambda: layers.Conv1D(2, 3, padding="causal", dilation_rate=2),
    ),
    "conv1d_causal_strides": (
        (7, 1),
        lambda: layers.Conv1D(2, 3, padding="causal", strides=2),
    ),
    "conv2d_same_odd": (
        (5, 7, 2),
        lambda: layers.Conv2D(2, (3, 2), strides=(2, 3), padding="same"),
    ),
    "conv2d_same_even": (
        (4, 6, 1),
        lambda: layers.Conv2D(2, 3, strides=2, padding="same"),
    ),
    "conv2d_small_kernel": (
        (5, 7, 2),
        lambda: layers.Conv2D(2, 1, strides=3, padding="same"),
    ),
    "conv2d_dilation": (
        (7, 6, 1),
        lambda: layers.Conv2D(2, (2, 3), dilation_rate=(2, 1)),
    ),
    "conv2d_dilation_same": (
        (5, 6, 1),
        lambda: layers.Conv2D(2, (2, 3), dilation_rate=(2, 3), padding="same"),
    ),
    "conv2d_groups": ((4, 3, 4), lambda: layers.Conv2D(6, 2, groups=2)),
    "conv2d_one_pixel": ((2, 2, 2), lambda: layers.Conv2D(3, 2)),
    "conv3d": (
        (3, 4, 3, 1),
        lambda: layers.Conv3D(2, (2, 1, 2), strides=(2, 1, 2), padding="same"),
    ),
    "depthwise1d": (
        (5, 2),
        lambda: layers.DepthwiseConv1D(
            2, strides=2, padding="same", depth_multiplier=2
        ),
    ),
    "depthwise2d": (
        (5, 4, 2),
        lambda: layers.DepthwiseConv2D((2, 3), depth_multiplier=3),
    ),
    "depthwise2d_dilation": (
        (5, 4, 2),
        lambda: layers.DepthwiseConv2D(
            2, dilation_rate=2, padding="same", activation="tanh"
        ),
    ),
    "depthwise2d_first": (
        (2, 5, 4),
        lambda: layers.DepthwiseConv2D(2, data_format="channels_first"),
    ),
    "separable1d": (
        (5, 2),
        lambda: layers.SeparableConv1D(
            3, 2, strides=2, padding="same", depth_multiplier=2, activation="tanh"
        ),
    ),
    "separable2d": (
        (5, 4, 2),
        lambda: layers.SeparableConv2D(3, 2, dilation_rate=2, padding="same"),
    ),
    "transpose1d": (
        (3, 2),
        lambda: layers.Conv1DTranspose(2, 3, strides=2, padding="same"),
    ),
    # As many copies as entries, although one entry has two and another none.
    "transpose1d_output_padding": (
        (2, 2),
        lambda: layers.Conv1DTranspose(1, 3, strides=2, output_padding=1),
    ),
    "transpose2d": (
        (3, 2, 2),
        lambda: layers.Conv2DTranspose(2, (3, 2), strides=(2, 1), padding="same"),
    ),
    "transpose2d_valid": (
        (3, 2, 2),
        lambda: layers.Conv2DTranspose(
            2, (3, 2), strides=(2, 3), output_padding=(1, 2)
        ),
    ),
    "transpose2d_gaps": (
        (2, 2, 1),
        lambda: layers.Conv2DTranspose(
            2, 2, strides=3, padding="same", output_padding=1
        ),
    ),
    "transpose3d": (
        (2, 2, 2, 1),
        lambda: layers.Conv3DTranspose(2, 2, strides=(1, 2, 1), padding="same"),
    ),
    "transpose_one_pixel": ((1, 1, 2), lambda: layers.Conv2DTranspose(2, 3)),
    "embedding": ((4, "int32"), lambda: layers.Embedding(5, 2)),
    "embedding_one_step": ((1, "int32"), lambda: layers.Embedding(5, 2)),
    "embedding_no_step": (("int32",), lambda: layers.Embedding(5, 2)),
    "embedding_image": ((2, 3, "int32"), lambda: layers.Embedding(5, 2)),
    "layer_norm": ((3, 4), lambda: layers.LayerNormalization()),
    "layer_norm_axes": ((3, 4, 2), lambda: layers.LayerNormalization(axis=[1, 3])),
    "layer_norm_reversed": ((3, 4), lambda: layers.LayerNormalization(axis=[2, 1])),
    "layer_norm_first": (
        (3, 4),
        lambda: layers.LayerNormalization(axis=1, center=False),
    ),
    "layer_norm_offset": ((3, 4), lambda: layers.LayerNormalization(scale=False)),
    "group_norm": ((3, 2, 4), lambda: layers.GroupNormalization(2)),
    "group_norm_first": (
        (4, 3),
        lambda: layers.GroupNormalization(2, axis=1, scale=False),
    ),
    "instance_norm": ((3, 4), lambda: layers.GroupNormalization(-1)),
    "rms_norm": ((3, 4), lambda: layers.RMSNormalization()),
    "rms_norm_axes": ((3, 4), lambda: layers.RMSNormalization(axis=[1, 2])),
    "batch_norm": ((3, 4), lambda: layers.BatchNormalization()),
    "batch_norm_first": (
        (3, 4),
        lambda: layers.BatchNormalization(axis=1, center=False),
    ),
    "batch_norm_offset": ((4,), lambda: layers.BatchNormalization(scale=False)),
}


def layer_and_input(name, samples=3):
    """A layer of `LAYERS` with the shape of its input and numbers for it."""
    shape, make = LAYERS[name]
    if "int32" in shape:
        shape = shape[:-1]
        # Few rows for many ids: some occur twice in a sample, row 4 in none.
        x = np.random.default_rng(0).integers(0, 4, (samples, *shape))
        return make(), layers.Input(shape, dtype="int32"), x.astype("int32")
    return make(), layers.Input(shape), cases._numbers(samples, *shape)


def mixing_loss(weights, outputs):
    """`(Σ w tanh z)²`: curved, and every output of a sample meets every other."""
    axes = tuple(range(1, len(outputs.shape)))
    return ops.square(ops.sum(weights * ops.tanh(outputs), axis=axes))


def mixing(*stack, samples=3, x=None, **compile_arguments):
    """A case with a stack of layers whose outputs meet in the loss."""
    model = cases.sequential(*stack, loss=mixing_loss, **compile_arguments)
    if x is None:
        x = cases._numbers(samples, *model.input_shape[1:])
    return cases.Case(model, x, 0.5 * cases._numbers(*model(x).shape, seed=1))


def operator(case, **kwargs):
    """The `HessianOperator` of a case."""
    model, x, y, sample_weight, training = case
    return HessianOperator(model, x, y, sample_weight, training=training, **kwargs)


def by_differences(case, **kwargs):
    """The diagonal of the Hessian by central differences of the gradient."""
    return np.diag(reference.hessian_by_differences(case, **kwargs))


def structure(op):
    """What is known of the layers of an operator's model."""
    return op.evaluation.once(find_structure)


def by_way(op, way):
    """The exact diagonal with all variables taking one way, as a NumPy vector."""
    plan = Plan(dict.fromkeys(op.evaluation.loss.layout.names, way), 0)
    return np.asarray(ExactDiagonal(op.evaluation).compute(plan))


def exact(op):
    """The exact diagonal by the cheapest ways, and the plan of it."""
    diagonal = op.evaluation.once(ExactDiagonal)
    plan = diagonal.plan()
    return np.asarray(diagonal.compute(plan)), plan


def gauss_newton(op):
    """The exact Gauss–Newton diagonal, as a NumPy vector."""
    return np.asarray(op.evaluation.once(GaussNewtonDiagonal).compute()[0])


def sampler(op, *arguments):
    """`draw(seed, start, width)` of samples at the layers' outputs."""
    return drawing(LayerwiseDiagonal(op.evaluation, *arguments).samples)


def drawing(samples):
    """`draw(seed, start, width)` of some `Samples`, as NumPy arrays `(P, width)`."""
    return lambda seed, start, width: (
        np.asarray(samples(seed_key(seed, 4), start, width)).T
    )


def samples_of(op, count, seed=0, width=4):
    """Samples of the diagonal, `(P, count)`, a few of them in each call."""
    draw = sampler(op)
    parts = [draw(seed, i, width) for i in range(0, count, width)]
    return np.concatenate(parts, axis=1)


def assert_close(actual, expected, rtol=1e-6):
    """Relative to the largest entry: differences are good to about 1e-9 of it."""
    scale = np.abs(expected).max()
    assert scale > 1e-4
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * scale)


def assert_unbiased(samples, expected, sigmas=6, rounding=1e-7):
    """The mean is the truth within a bound that 10 000 entries do not exceed."""
    count, scale = samples.shape[1], np.abs(expected).max()
    error = samples.std(axis=1, ddof=1) / np.sqrt(count)
    distance = np.abs(samples.mean(axis=1) - expected)
    # An entry without noise is exact, up to rounding of the differences.
    assert np.all(distance <= sigmas * error + rounding * scale), np.max(
        distance / (error + rounding * scale)
    )


class Probed(NamedTuple):
    """A case in float64, its operator, and its diagonal by differences."""

    case: Any
    op: HessianOperator
    expected: np.ndarray


def probed(name):
    """A named case, built and probed once for all tests."""
    found = probed_cases.probed(name)
    return Probed(found.case, found.op, np.diag(found.differences))
