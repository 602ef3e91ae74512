"""The density of all eigenvalues, by stochastic Lanczos quadrature.

For a random sign vector v of length √P, Lanczos iteration from v turns `vᵀf(A)v / P`,
whose expectation is the mean of f over the eigenvalues, into a weighted sum of f at a
few nodes: Gauss quadrature. With f a narrow Gaussian around t this is the density at t.
Sources: Lin, Saad, Yang (2016), "Approximating spectral densities of large matrices",
section 3.2; Ghorbani, Krishnan, Xiao (2019), "An investigation into neural net
optimization via Hessian eigenvalue density", section 2.
"""

import collections
import dataclasses

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from keras_curvature.estimators import tall
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.products import (
    GROUP,
    Products,
    ProgressFunction,
    Seed,
    SymmetricOperator,
    on_host,
    seed_key,
)
from keras_curvature.estimators.quadratic_forms import students_factor
from keras_curvature.estimators.tall import Vector

_Array = NDArray[np.float64]

#: Keeps these draws apart from those of the other estimators.
_PURPOSE = 3

#: Numbers in the Lanczos vectors of one start, up to which all of them are kept: 64 MiB
#: in float32. To orthogonalise by more costs more than products of networks.
_BASIS_NUMBERS = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The density of the eigenvalues of a symmetric operator.

    Attributes:
        grid: eigenvalues at which the density is given, NumPy array `(points,)`.
        density: density over the grid, mean over the start vectors; it integrates
            to one.
        standard_error: of the density over the grid, from the spread over the start
            vectors; `None` from a single one. It knows nothing of the smoothing.
        sigma: standard deviation of the Gaussian that stands for an eigenvalue.
        nodes: list of NumPy arrays, the quadrature nodes of each start vector. The
            outermost ones are close to the extreme eigenvalues.
        weights: list of NumPy arrays, the weights of the nodes, adding up to one.
        size: P, the number of eigenvalues.
        num_matvecs: number of products that were spent.
    """

    grid: _Array
    density: _Array
    standard_error: _Array | None
    sigma: float
    nodes: list[_Array]
    weights: list[_Array]
    size: int
    num_matvecs: int

    @property
    def value(self) -> _Array:
        """The density over the grid: `density`, named as in an `Estimate`."""
        return self.density

    def moment(self, order: int) -> Estimate:
        """The mean of `λ^order` over the eigenvalues.

        The first is `tr A / P`, the second `‖A‖_F² / P`; m Lanczos steps give
        unbiased moments up to order 2 m − 1.

        Args:
            order: a positive integer.

        Returns:
            An `Estimate`; its error is widened by Student's t for few vectors.
        """
        each = [
            float(w @ x**order) for x, w in zip(self.nodes, self.weights, strict=True)
        ]
        error = None
        if len(each) > 1:
            error = float(np.std(each, ddof=1) / len(each) ** 0.5)
            error *= students_factor(len(each) - 1)
        return Estimate(float(np.mean(each)), error, self.num_matvecs)

    def __repr__(self) -> str:
        return (
            f"<SpectralDensity of {self.size} eigenvalues in "
            f"[{min(x.min() for x in self.nodes):.4g}, "
            f"{max(x.max() for x in self.nodes):.4g}], {len(self.nodes)} start "
            f"vectors, {self.num_matvecs} matvecs>"
        )


def spectral_density(
    A: SymmetricOperator,
    num_steps: int = 64,
    num_vectors: int = 8,
    seed: Seed = 0,
    sigma: float | None = None,
    grid: ArrayLike | None = None,
    num_points: int = 1024,
    progress: ProgressFunction | None = None,
) -> SpectralDensity:
    """The density of the eigenvalues, from Lanczos iterations with random starts.

    The Lanczos vectors are fully reorthogonalised where `num_steps · P` is at most 2²⁴,
    so that converged eigenvalues do not appear twice; four start vectors are then
    iterated together. Of larger operators only the last two vectors are kept, and
    memory does not depend on the number of steps. An eigenvalue that has converged then
    appears again after some steps, as close nodes that share its weight: the density is
    that of the same eigenvalues, and resolves what fewer steps would (Greenbaum 1989,
    "Behavior of slightly perturbed Lanczos and conjugate-gradient recurrences").

    When the iteration reaches an invariant subspace (a low rank, few distinct
    eigenvalues) it ends there: the quadrature is exact for its start vector.

    Args:
        A: symmetric operator of shape `(P, P)` with products `A @ V`.
        num_steps: Lanczos steps for each start vector, at most P are made. More
            resolve more of the spectrum.
        num_vectors: number of start vectors. More make it less noisy.
        seed: a non-negative integer, or a tuple of them.
        sigma: standard deviation of the Gaussian that stands for an eigenvalue.
            Defaults to 1 % of the width of the spectrum.
        grid: increasing eigenvalues at which to give the density. Defaults to
            `num_points` over the spectrum and 6 sigma on either side of it.
        num_points: number of points of the default grid.
        progress: `progress(done, total)` is called after each group of products; when
            it returns `False`, the density of the steps and vectors made by then is
            returned.

    Returns:
        A `SpectralDensity`.

    Raises:
        ValueError: for an operator that is not square, counts below one (below two
            for the grid) or a sigma that is not positive.
        RuntimeError: if the products are not finite.
    """
    products = Products(A, progress)
    counts = {"num_steps": num_steps, "num_vectors": num_vectors}
    for name, value in counts.items():
        if int(value) != value or value < 1:
            raise ValueError(
                f"`{name}` must be a positive integer. Received: {name}={value!r}."
            )
    if num_points < 2 or (sigma is not None and not sigma > 0):
        raise ValueError(
            "`num_points` must be at least 2 and `sigma` positive. Received: "
            f"num_points={num_points!r}, sigma={sigma!r}."
        )
    steps = min(int(num_steps), products.size)
    products.total = steps * num_vectors
    together = GROUP if steps * products.size <= _BASIS_NUMBERS else 1
    nodes: list[_Array] = []
    weights: list[_Array] = []
    with products.working():
        key = seed_key(seed, _PURPOSE)
        while len(nodes) < num_vectors and products.going:
            width = min(together, num_vectors - len(nodes))
            starts = [
                on_host(products.signs(key, number, 1))[0]
                for number in range(len(nodes), len(nodes) + width)
            ]
            for alphas, betas in _lanczos(products, starts, steps):
                points, weight = _quadrature(alphas, betas)
                nodes.append(points)
                weights.append(weight)
    return _smoothed(
        nodes, weights, sigma, grid, num_points, products.size, products.spent
    )


def _lanczos(
    products: Products, starts: list[Vector], num_steps: int
) -> list[tuple[_Array, _Array]]:
    """Lanczos iterations from a group of vectors, until told to stop.

    Returns:
        For each vector the diagonal `(steps,)` and the off-diagonal `(steps,)` of the
        tridiagonal matrix, zero from where the iteration has ended.
    """
    epsilon = float(np.finfo(products.dtype).eps)
    iterations = [_Iteration(start, num_steps) for start in starts]
    for step in range(num_steps):
        made = products(iteration.vectors[-1] for iteration in iterations)
        for iteration in iterations:
            # Not all at once: each product is dropped when it has been used.
            iteration.extend(made.pop(0), epsilon)
        alphas = [iteration.alphas[-1] for iteration in iterations]
        if not np.isfinite(alphas).all():
            raise RuntimeError(
                "Products with the operator are not finite, so it has no "
                "eigenvalues. Look for infinite or undefined weights, data or "
                f"losses. Received: vᵀAv = {np.array(alphas)} at Lanczos step "
                f"{step + 1}."
            )
        if all(i.betas[-1] == 0 for i in iterations) or not products.going:
            break
    return [(np.array(i.alphas), np.array(i.betas)) for i in iterations]


class _Iteration:
    """Lanczos iteration from one vector.

    Args:
        start: array `(P,)`, turned into a unit vector in its place.
        num_steps: how many vectors will be made.

    Attributes:
        vectors: the Lanczos vectors that are kept, the last one for the next product.
        alphas: the diagonal of the tridiagonal matrix.
        betas: what is beside it; zero at the end, and from there on.
    """

    def __init__(self, start: Vector, num_steps: int):
        kept = num_steps if num_steps * len(start) <= _BASIS_NUMBERS else 2
        self.vectors = collections.deque([np.array(start)], kept)
        self.alphas: list[float] = []
        self.betas: list[float] = []
        tall.turn([self.vectors[0]], np.array([[len(start) ** -0.5]]))

    def extend(self, r: Vector, epsilon: float) -> None:
        """One step, with the product of the last vector, which is overwritten."""
        with np.errstate(over="ignore", invalid="ignore"):
            taken, beta = tall.take_out(r, self.vectors)
        alpha = float(taken[-1])
        largest = max(map(abs, [*self.alphas, alpha, *self.betas]))
        ended = bool(self.betas) and self.betas[-1] == 0
        if ended or beta <= 10 * epsilon * max(largest, beta):
            beta = 0.0
        self.alphas.append(alpha)
        self.betas.append(beta)
        tall.turn([r], np.array([[1 / beta if beta else 0.0]]))
        self.vectors.append(r)


def _quadrature(alphas: _Array, betas: _Array) -> tuple[_Array, _Array]:
    """Nodes and weights of the Gauss quadrature of a tridiagonal matrix."""
    ends = np.flatnonzero(betas == 0)
    length = ends[0] + 1 if len(ends) else len(alphas)
    nodes, vectors = scipy.linalg.eigh_tridiagonal(alphas[:length], betas[: length - 1])
    return nodes, vectors[0] ** 2


def _smoothed(
    nodes: list[_Array],
    weights: list[_Array],
    sigma: float | None,
    grid: ArrayLike | None,
    num_points: int,
    size: int,
    spent: int,
) -> SpectralDensity:
    """The density from the nodes and weights of all start vectors."""
    low = min(x.min() for x in nodes)
    high = max(x.max() for x in nodes)
    if sigma is None:
        sigma = 0.01 * ((high - low) or max(abs(high), abs(low)) or 1.0)
    if grid is None:
        grid = np.linspace(low - 6 * sigma, high + 6 * sigma, num_points)
    points = np.asarray(grid, np.float64)
    each = np.stack(
        [
            np.exp(-0.5 * ((points[:, None] - x) / sigma) ** 2) @ w
            for x, w in zip(nodes, weights, strict=True)
        ]
    ) / (sigma * np.sqrt(2 * np.pi))
    error = None
    if len(each) > 1:
        error = each.std(0, ddof=1) / len(each) ** 0.5
    return SpectralDensity(
        points, each.mean(0), error, float(sigma), nodes, weights, size, spent
    )
