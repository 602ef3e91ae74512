"""The diagonal: `diag A = E v ⊙ Av` for random signs v."""

from keras import ops

from keras_curvature.backend import compiled
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.products import Products
from keras_curvature.estimators.sampling import moments_of, sample
from keras_curvature.estimators.shares import sum_over_basis


def hutchinson_diagonal(
    A,
    num_matvecs: int | None = None,
    tolerance: float | None = None,
    seed=0,
    progress=None,
) -> Estimate:
    """Unbiased estimate of the diagonal from random sign directions.

    Variance of entry i per sample: `Σ_{j≠i} A_ij²`. Source: Bekas, Kokiopoulou, Saad
    (2007), "An estimator for the diagonal of a matrix", eq. 2; with signs the
    denominator of their estimator is the number of samples.

    Args:
        A: symmetric operator of shape `(P, P)` with products `A @ V`.
        num_matvecs: budget of products. Defaults to 32, or to 1024 with a tolerance.
        tolerance: relative standard error `‖errors‖ / ‖diagonal‖` at which to stop,
            not before 16 samples.
        seed: a non-negative integer, or a tuple of them.
        progress: `progress(done, total)` is called after each group of products.

    Returns:
        An `Estimate` whose value and standard error are tensors of shape `(P,)` on
        the operator's device, in the units of A.

    Raises:
        ValueError: for an operator that is not square, a budget below one, or a
            tolerance that is not positive.
    """
    samples = sample(
        Products(A),
        _moments,
        ("diagonal",),
        num_matvecs,
        tolerance,
        seed,
        progress=progress,
    )
    return diagonal_estimate(samples)


def exact_diagonal(A, progress=None) -> Estimate:
    """The diagonal from P products with the basis vectors, rounding apart.

    Args:
        A: symmetric operator of shape `(P, P)` with products `A @ V`.
        progress: `progress(done, total)` is called after each group of products.

    Returns:
        An `Estimate` whose value is a tensor of shape `(P,)` on the operator's
        device, with a standard error of zeros.

    Raises:
        ValueError: for an operator that is not square.
    """
    products = Products(A)
    value = sum_over_basis(products, _summed, progress)
    return Estimate(value, ops.zeros_like(value), products.size)


def diagonal_estimate(samples):
    """The `Estimate` of the diagonal from a `Samples`."""
    return Estimate(
        samples.means["diagonal"], samples.standard_error("diagonal"), samples.count
    )


_moments = moments_of(lambda v, av: {"diagonal": v * av})


_summed = compiled(lambda v, av: ops.sum(v * av, axis=1))
