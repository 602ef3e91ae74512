"""The density of all eigenvalues, by stochastic Lanczos quadrature.

For a random sign vector v of length √P, Lanczos iteration from v turns `vᵀf(A)v / P`,
whose expectation is the mean of f over the eigenvalues, into a weighted sum of f at a
few nodes: Gauss quadrature. With f a narrow Gaussian around t this is the density at t.
Sources: Lin, Saad, Yang (2016), "Approximating spectral densities of large matrices",
section 3.2; Ghorbani, Krishnan, Xiao (2019), "An investigation into neural net
optimization via Hessian eigenvalue density", section 2.
"""

import dataclasses

import numpy as np
import scipy.linalg
from keras import ops

from keras_curvature.backend import array
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.products import GROUP, Products, seed_key, to_host
from keras_curvature.estimators.quadratic_forms import students_factor

#: Keeps these draws apart from those of the other estimators.
_PURPOSE = 3

#: Numbers in the Lanczos bases of the vectors that are iterated together.
_BASIS_NUMBERS = 2**28


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

    grid: np.ndarray
    density: np.ndarray
    standard_error: np.ndarray | None
    sigma: float
    nodes: list
    weights: list
    size: int
    num_matvecs: int

    @property
    def value(self):
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

    def __repr__(self):
        return (
            f"<SpectralDensity of {self.size} eigenvalues in "
            f"[{min(x.min() for x in self.nodes):.4g}, "
            f"{max(x.max() for x in self.nodes):.4g}], {len(self.nodes)} start "
            f"vectors, {self.num_matvecs} matvecs>"
        )


def spectral_density(
    A,
    num_steps: int = 64,
    num_vectors: int = 8,
    seed=0,
    sigma: float | None = None,
    grid=None,
    num_points: int = 1024,
    progress=None,
    partial: bool = True,
) -> SpectralDensity:
    """The density of the eigenvalues, from Lanczos iterations with random starts.

    The Lanczos vectors are fully reorthogonalised, so that converged eigenvalues do
    not appear twice. They take `num_steps · P` numbers for each start vector; four
    of them are iterated together where that is at most 1 GiB in float32. When the
    iteration reaches an invariant subspace (a low rank, few distinct eigenvalues)
    it ends there: the quadrature is exact for its start vector.

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
        progress: `progress(done, total)` is called after each group of products.
        partial: whether Ctrl-C ends the iteration, and what is known by then is
            returned unless that is nothing; else it is raised.

    Returns:
        A `SpectralDensity`.

    Raises:
        ValueError: for an operator that is not square, counts below one (below two
            for the grid) or a sigma that is not positive.
        RuntimeError: if the products are not finite.
    """
    products = Products(A)
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
    together = GROUP if GROUP * steps * products.size <= _BASIS_NUMBERS else 1
    nodes: list = []
    weights: list = []
    spent = 0
    interrupted = False
    with products.placed():
        key = seed_key(seed, _PURPOSE)
        while len(nodes) < num_vectors and not interrupted:
            width = min(together, num_vectors - len(nodes))
            starts = products.signs(key, len(nodes), width)
            done = spent

            def after_step(made, done=done, width=width):
                if progress is not None:
                    progress(done + made * width, steps * num_vectors)

            try:
                alphas, betas, interrupted = _lanczos(
                    products, starts, steps, after_step, partial
                )
            except KeyboardInterrupt:
                if not (partial and nodes):
                    raise
                break
            spent += alphas.size
            for a, b in zip(alphas.T, betas.T, strict=True):
                points, weight = _quadrature(a, b)
                nodes.append(points)
                weights.append(weight)
    return _smoothed(nodes, weights, sigma, grid, num_points, products.size, spent)


def _lanczos(products, starts, num_steps, after_step, partial):
    """Lanczos iterations from several vectors.

    Returns:
        The diagonals `(steps, k)` and off-diagonals `(steps, k)` of the tridiagonal
        matrices, zero from where an iteration has ended, and whether Ctrl-C ended
        them all.

    Raises:
        KeyboardInterrupt: before the first step is made, or if nothing partial is
            wanted.
    """
    epsilon = np.finfo(products.dtype).eps
    # One basis for each start vector: (k, steps, P).
    q = ops.transpose(starts) / products.size**0.5
    basis = q[:, None]
    alphas, betas = [], []
    try:
        for step in range(num_steps):
            r = ops.transpose(products(ops.transpose(q)))
            alpha = to_host(ops.sum(q * r, axis=1))
            if not np.isfinite(alpha).all():
                raise RuntimeError(
                    "Products with the operator are not finite, so it has no "
                    "eigenvalues. Look for infinite or undefined weights, data or "
                    f"losses. Received: vᵀAv = {alpha} at Lanczos step {step + 1}."
                )
            # All components along earlier vectors, twice: once leaves rounding
            # errors that grow (Parlett 1998, section 6.9, "twice is enough").
            for _ in range(2):
                parts = ops.matmul(basis, r[:, :, None])
                r = r - ops.matmul(ops.transpose(parts, (0, 2, 1)), basis)[:, 0]
            beta = to_host(ops.sqrt(ops.sum(r * r, axis=1)))
            scale = np.max([np.abs(alphas + [alpha]).max(0)] + betas, axis=0)
            ended = beta <= 10 * epsilon * np.maximum(scale, beta)
            if betas:
                ended |= betas[-1] == 0
            beta[ended] = 0
            alphas.append(alpha)
            betas.append(beta)
            after_step(step + 1)
            if ended.all() or step + 1 == num_steps:
                break
            inverse = np.divide(1, beta, out=np.zeros_like(beta), where=~ended)
            q = r * array(inverse[:, None], products.dtype)
            basis = ops.concatenate([basis, q[:, None]], axis=1)
    except KeyboardInterrupt:
        made = min(len(alphas), len(betas))
        if not (partial and made):
            raise
        return np.stack(alphas[:made]), np.stack(betas[:made]), True
    return np.stack(alphas), np.stack(betas), False


def _quadrature(alphas, betas):
    """Nodes and weights of the Gauss quadrature of a tridiagonal matrix."""
    ends = np.flatnonzero(betas == 0)
    length = ends[0] + 1 if len(ends) else len(alphas)
    nodes, vectors = scipy.linalg.eigh_tridiagonal(alphas[:length], betas[: length - 1])
    return nodes, vectors[0] ** 2


def _smoothed(nodes, weights, sigma, grid, num_points, size, spent):
    low = min(x.min() for x in nodes)
    high = max(x.max() for x in nodes)
    if sigma is None:
        sigma = 0.01 * ((high - low) or max(abs(high), abs(low)) or 1.0)
    if grid is None:
        grid = np.linspace(low - 6 * sigma, high + 6 * sigma, num_points)
    grid = np.asarray(grid, np.float64)
    each = np.stack(
        [
            np.exp(-0.5 * ((grid[:, None] - x) / sigma) ** 2) @ w
            for x, w in zip(nodes, weights, strict=True)
        ]
    ) / (sigma * np.sqrt(2 * np.pi))
    error = None
    if len(each) > 1:
        error = each.std(0, ddof=1) / len(each) ** 0.5
    return SpectralDensity(
        grid, each.mean(0), error, float(sigma), nodes, weights, size, spent
    )
