"""What users call to see eigenvalues: the largest ones, and the density of all."""

from keras_curvature import estimators
from keras_curvature.analysis import operator_for
from keras_curvature.progress import Progress


def hessian_eigenvalues(
    model,
    x=None,
    y=None,
    k: int = 6,
    *,
    which: str = "magnitude",
    tolerance: float = 1e-4,
    eigenvectors: bool = False,
    num_matvecs: int | None = None,
    seed: int = 0,
    verbose: bool | str = "auto",
    **options,
) -> estimators.Eigenvalues:
    """The largest eigenvalues of the Hessian of the training loss.

    ```python
    top = kc.hessian_eigenvalues(model, x, y, k=3)
    print(top.value)            # sharpness: gradient descent is stable below 2 / η
    ```

    Lanczos iteration with thick restarts (Wu, Simon 2000). Ctrl-C ends it; the best
    eigenvalues known by then are returned with their bounds.

    Args:
        model: a compiled Keras model, or a `HessianOperator`.
        x: inputs, or a data set; see `HessianOperator`.
        y: targets.
        k: number of eigenvalues.
        which: `"magnitude"`, `"algebraic"` (the largest, signed) or `"both"` (half of
            them from each end of the spectrum).
        tolerance: residual relative to the eigenvalue at which it has converged. The
            eigenvalue itself is usually much more accurate.
        eigenvectors: whether to return the eigenvectors as well.
        num_matvecs: budget of products, about. Defaults to ten times P.
        seed: seed of the start vector.
        verbose: whether to show progress; `"auto"` does if it takes long.
        **options: further arguments of `HessianOperator`.

    Returns:
        An `Eigenvalues`: `value` in the units of the Hessian, `standard_error` the
        bounds that the residuals give, `num_matvecs`, `eigenvectors` `(P, k)`.

    Raises:
        ValueError: for inconsistent data, an unknown `which`, or a `k` or a tolerance
            that is not positive.
        RuntimeError: if the products are not finite.
    """
    operator = operator_for(model, x, y, options)
    with Progress(operator.evaluation, verbose) as progress:
        return estimators.eigenvalues(
            operator, k, tolerance, which, eigenvectors, seed, num_matvecs, progress
        )


def hessian_spectral_density(
    model,
    x=None,
    y=None,
    *,
    num_steps: int = 64,
    num_vectors: int = 8,
    sigma: float | None = None,
    grid=None,
    seed: int = 0,
    verbose: bool | str = "auto",
    **options,
) -> estimators.SpectralDensity:
    """The density of the eigenvalues of the Hessian of the training loss.

    ```python
    density = kc.hessian_spectral_density(model, x, y)
    keras_curvature.plots.plot_spectral_density(density)     # with matplotlib
    ```

    Stochastic Lanczos quadrature (Lin, Saad, Yang 2016; Ghorbani, Krishnan, Xiao
    2019) with full reorthogonalisation. Costs `num_steps × num_vectors` products.
    Ctrl-C ends it; the density is then that of the steps and vectors made so far.

    Args:
        model: a compiled Keras model, or a `HessianOperator`.
        x: inputs, or a data set; see `HessianOperator`.
        y: targets.
        num_steps: Lanczos steps for each start vector; more resolve more.
        num_vectors: number of start vectors; more make it less noisy.
        sigma: standard deviation of the Gaussian that stands for an eigenvalue.
            Defaults to 1 % of the width of the spectrum.
        grid: increasing eigenvalues at which to give the density.
        seed: seed of the start vectors.
        verbose: whether to show progress; `"auto"` does if it takes long.
        **options: further arguments of `HessianOperator`.

    Returns:
        A `SpectralDensity`: `grid`, `density` (also as `value`), `standard_error`,
        `moment(order)`.

    Raises:
        ValueError: for inconsistent data or counts below one.
    """
    operator = operator_for(model, x, y, options)
    with Progress(operator.evaluation, verbose) as progress:
        return estimators.spectral_density(
            operator, num_steps, num_vectors, seed, sigma, grid, progress=progress
        )
